"""An answer's body is rewritten whole, with its length; what is not to be changed goes on message by message."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from starlette.types import Message, Receive, Scope, Send

from steer.errors import NotFinite
from steer.serve import asgi
from steer.serve.asgi import Outgoing, is_event_stream, rewriting
from steer.serve.body import replay

PIECES = (b"one ", b"two ", b"three")


def sent(status: int, headers: list[tuple[bytes, bytes]], media_type: str | None = None) -> list[Message]:
    found: list[Message] = []

    async def send(message: Message) -> None:
        found.append(message)

    async def upper(body: bytes) -> bytes:
        return body.upper() + b"!"

    async def run() -> None:
        sending = rewriting(send, lambda start: upper if start["status"] == 200 else None, media_type)
        await sending({"type": "http.response.start", "status": status, "headers": headers})
        for i, piece in enumerate(PIECES):
            await sending({"type": "http.response.body", "body": piece, "more_body": i < len(PIECES) - 1})

    asyncio.run(run())
    return found


@pytest.mark.parametrize("kind", [None, "application/json"])
def test_a_body_is_rewritten_whole(kind: str | None) -> None:
    given = [(b"content-type", b"text/plain"), (b"content-length", b"13"), (b"x-other", b"stays")]
    start, body = sent(200, given, kind)
    headers = dict(start["headers"])
    assert body == {"type": "http.response.body", "body": b"ONE TWO THREE!"}
    assert headers == {
        b"content-type": (kind or "text/plain").encode(),
        b"content-length": b"14",
        b"x-other": b"stays",
    }
    assert given[1] == (b"content-length", b"13")  # of the message that came: it is another's


def test_what_is_not_to_be_changed_goes_on_as_it_comes() -> None:
    start, *rest = sent(404, [(b"content-length", b"13")])
    assert (start["status"], start["headers"]) == (404, [(b"content-length", b"13")])
    assert [message["body"] for message in rest] == list(PIECES)


@pytest.mark.parametrize(
    ("headers", "is_one"),
    [
        ([(b"content-type", b"text/event-stream; charset=utf-8")], True),
        ([(b"content-type", b"application/json")], False),
        ([], False),
    ],
)
def test_event_streams(headers: Any, is_one: bool) -> None:
    assert is_event_stream({"type": "http.response.start", "status": 200, "headers": headers}) == is_one


def test_a_client_that_does_not_read_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """What an answer held is let go when it is broken off, whether or not its last event gets through."""
    monkeypatch.setattr(asgi, "BREAK_OFF_TIMEOUT", 0.01)

    async def send(_message: Message) -> None:
        await asyncio.Event().wait()

    async def run() -> None:
        answer = Outgoing(send)
        await asyncio.wait_for(answer.break_off(NotFinite()), 30)
        assert answer.ended

    asyncio.run(run())


def test_an_answer_that_is_broken_off_begins_once() -> None:
    found: list[Message] = []

    async def send(message: Message) -> None:
        found.append(message)

    async def run() -> None:
        answer = Outgoing(send)
        await answer.break_off(NotFinite())
        await answer.break_off(NotFinite())
        await answer.send({"type": "http.response.start", "status": 200, "headers": []})

    asyncio.run(run())
    assert [message["type"] for message in found] == ["http.response.start", "http.response.body"]


@pytest.mark.parametrize("begun", [False, True])
def test_what_an_app_that_is_stopped_had_begun_ends(begun: bool) -> None:
    """Also in a task of its own, which cancelling the app does not reach, where it waits for its client to leave: as
    vLLM's routes do. A stream that has begun is cancelled."""
    found: list[Message] = []
    ended: list[str] = []

    async def work() -> None:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            ended.append("work")
            raise

    async def app(_scope: Scope, receive: Receive, send: Send) -> None:
        if begun:
            start = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]}
            await send(start)
            await work()
        assert (await receive())["type"] == "http.request"
        working, leaving = asyncio.ensure_future(work()), asyncio.ensure_future(receive())
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        assert leaving.result()["type"] == "http.disconnect"
        working.cancel()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"null"})

    async def send(message: Message) -> None:
        found.append(message)

    async def run() -> None:
        async def nothing() -> Message:
            return await asyncio.get_running_loop().create_future()

        stop: asyncio.Future[Exception] = asyncio.get_running_loop().create_future()
        answering = asyncio.ensure_future(asgi.answered(app, {}, replay(b"{}", nothing), Outgoing(send), stop))
        await asyncio.sleep(0.01)
        stop.set_result(NotFinite())
        await asyncio.wait_for(answering, 5)
        await asyncio.sleep(0)

    asyncio.run(run())
    assert ended == ["work"]
    assert found[0]["status"] == (200 if begun else 400)
    assert b"not_finite" in found[-1]["body"]


def test_an_app_that_does_not_hear_that_its_client_has_left_is_cancelled() -> None:
    ended: list[str] = []

    async def app(_scope: Scope, _receive: Receive, _send: Send) -> None:
        try:
            await asyncio.sleep(60)
        finally:
            ended.append("app")

    async def nothing() -> Message:
        return {}

    async def send(_message: Message) -> None:
        pass

    async def run(stops: bool) -> None:
        stop: asyncio.Future[Exception] = asyncio.get_running_loop().create_future()
        answering = asyncio.ensure_future(asgi.answered(app, {}, nothing, Outgoing(send), stop))
        await asyncio.sleep(0.01)
        if stops:
            stop.set_result(NotFinite())
            await asyncio.wait_for(answering, 5)
        else:
            answering.cancel()
            with pytest.raises(asyncio.CancelledError):
                await answering

    for stops in (True, False):
        asyncio.run(run(stops))
    assert ended == ["app", "app"]
