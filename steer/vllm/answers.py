"""What goes into the answers of vLLM's server: errors in plain words, the error of a request whose stream was lost, and
the read-out, into a whole answer or as one more chunk before a stream's end.

The engine hands a read-out on when its request has ended, so a stream has all of it in one piece; put together, the
chunks of a stream say what a whole answer says, as on the other engine.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

from starlette.types import Message, Send

from steer.errors import NotFinite, SteerError
from steer.readout import FIELD
from steer.serve import errors

DONE = b"data: [DONE]"
#: Makes the field of the one choice.
Fetch = Callable[[], Awaitable[dict[str, Any]]]


def with_readout(send: Send, fetch: Fetch) -> Send:
    """Sends an answer with one choice on, with what `fetch` gives in it; other answers as they are. Raises what `fetch`
    raises, unless a stream has begun: then it is an event of the stream."""
    start: Message = {}
    streamed = False
    body, last = b"", b""

    async def whole(message: Message) -> None:
        nonlocal body
        body += message.get("body", b"")
        if message.get("more_body", False):
            return
        answer = json.loads(body)
        for choice in answer["choices"]:
            choice[FIELD] = await fetch()
        data = json.dumps(answer).encode()
        headers = [(k, v) for k, v in start["headers"] if k.lower() != b"content-length"]
        await send({**start, "headers": [*headers, (b"content-length", str(len(data)).encode())]})
        await send({"type": "http.response.body", "body": data})

    async def stream(message: Message) -> None:
        nonlocal last
        data: bytes = message.get("body", b"")
        before, done, after = data.partition(DONE)
        if b'"choices"' in before:
            last = before
        if done and last:
            try:
                chunk = _chunk(last, await fetch())
            except SteerError as error:
                chunk = errors.event(error).encode()
            message = {**message, "body": before + chunk + done + after}
        await send(message)

    async def sending(message: Message) -> None:
        nonlocal start, streamed
        if message["type"] == "http.response.start":
            start = message
            streamed = any(k.lower() == b"content-type" and b"event-stream" in v for k, v in message["headers"])
        if start["status"] >= 400 or (streamed and message["type"] == "http.response.start"):
            await send(message)
        elif message["type"] == "http.response.body":
            await (stream if streamed else whole)(message)

    return sending


def restated(send: Send, sent: Iterable[str]) -> Send:
    """Sends an answer on; one that refuses the request with its message in plain words and, as `param`, the field that
    is wrong, where that says it. `sent`: the fields of the request."""
    start: Message | None = None
    body = b""

    async def sending(message: Message) -> None:
        nonlocal start, body
        if message["type"] == "http.response.start" and 400 <= message["status"] < 500:
            start = message
        elif start is None:
            await send(message)
        else:
            body += message.get("body", b"")
            if not message.get("more_body", False):
                data = _restated(body, sent)
                headers = [(k, v) for k, v in start["headers"] if k.lower() != b"content-length"]
                await send({**start, "headers": [*headers, (b"content-length", str(len(data)).encode())]})
                await send({"type": "http.response.body", "body": data})

    return sending


def _restated(body: bytes, sent: Iterable[str]) -> bytes:
    try:
        answer = json.loads(body)
        error = answer["error"]
        said, field = errors.restated(error["message"], sent)
        error |= {"message": said, "param": error.get("param") or field}
    except (ValueError, TypeError, KeyError):  # not in the shape of our errors, or OpenAI's
        return body
    return json.dumps(answer).encode()


class UnlessLost:
    """Sends an answer on until `lost()`, and from there the error in its place: vLLM's routes each tell of errors in
    their own way, some of a stream by breaking it off."""

    def __init__(self, send: Send, lost: Callable[[], bool]) -> None:
        self._send, self._lost = send, lost
        self._started = self._streams = self._ended = False

    async def send(self, message: Message) -> None:
        if self._ended:
            return
        if self._lost():
            await self.end()
            return
        if message["type"] == "http.response.start":
            self._started = True
            self._streams = any(k.lower() == b"content-type" and b"event-stream" in v for k, v in message["headers"])
        await self._send(message)

    async def end(self) -> None:
        """With the error, unless that was sent."""
        if self._ended:
            return
        self._ended = True
        error = NotFinite()
        if self._streams:
            last = f"event: error\n{errors.event(error)}data: [DONE]\n\n".encode()
        else:
            response = errors.of(error)
            last = bytes(response.body) if not self._started else b""
            if not self._started:
                start = {"type": "http.response.start", "status": response.status_code, "headers": response.raw_headers}
                await self._send(start)
        await self._send({"type": "http.response.body", "body": last})


def _chunk(last: bytes, field: dict[str, Any]) -> bytes:
    """A chunk like the `last` one, with nothing but the field."""
    line = next(line for line in reversed(last.splitlines()) if line.startswith(b"data: {"))
    envelope = {k: v for k, v in json.loads(line[6:]).items() if k not in ("usage", "choices")}
    chat = envelope.get("object") == "chat.completion.chunk"
    choice: dict[str, Any] = {"index": 0, "logprobs": None, "finish_reason": None}
    choice |= {"delta" if chat else "text": {} if chat else ""}
    return f"data: {json.dumps(envelope | {'choices': [choice | {FIELD: field}]})}\n\n".encode()
