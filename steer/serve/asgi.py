"""ASGI helpers: change the headers of requests and answers, rewrite or end an answer, answer HEAD."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from steer.serve import errors

#: Seconds that a client has to read the end of an answer that was broken off, before its resources are released.
BREAK_OFF_TIMEOUT = 5.0
#: Seconds that an app has to end by itself after it was told that its client has left.
DISCONNECT_TIMEOUT = 0.5
#: Makes the new body of an answer from the whole old one.
Change = Callable[[bytes], Awaitable[bytes]]


def with_headers(message: Message, change: Callable[[MutableHeaders], object]) -> Message:
    """A copy of an `http.response.start`, or of the scope of a request, with its headers as `change` leaves them."""
    headers = MutableHeaders(raw=list(message["headers"]))
    change(headers)
    return {**message, "headers": headers.raw}


def is_event_stream(start: Message) -> bool:
    """Whether this `http.response.start` begins a stream of server-sent events."""
    return "event-stream" in Headers(raw=start["headers"]).get("content-type", "")


class Outgoing:
    """An answer that is being sent.

    Attributes:
        status: 0 until the answer has begun.
        streams: whether it has begun as a stream of events.
        ended: whether it is complete, so that nothing more is sent.
    """

    def __init__(self, send: Send) -> None:
        self._send, self.status, self.streams, self.ended = send, 0, False, False

    async def send(self, message: Message) -> None:
        if self.ended:
            return
        if message["type"] == "http.response.start":
            self.status, self.streams = message["status"], is_event_stream(message)
        await self._send(message)
        self.ended = message["type"] == "http.response.body" and not message.get("more_body", False)

    async def break_off(self, error: Exception) -> None:
        """End the answer with `error`: as the whole answer if none has begun, or as the last event of a stream. Another
        answer that has begun stays incomplete, and a complete one stays as it is. A client that does not read is waited
        for BREAK_OFF_TIMEOUT seconds."""
        if self.ended:
            return
        self.ended = True
        with suppress(TimeoutError):
            async with asyncio.timeout(BREAK_OFF_TIMEOUT):
                if not self.status:
                    response = errors.of(error)
                    await self._send(
                        {
                            "type": "http.response.start",
                            "status": response.status_code,
                            "headers": response.raw_headers,
                        }
                    )
                    await self._send({"type": "http.response.body", "body": response.body})
                elif self.streams:
                    last = f"event: error\n{errors.error_event(error)}data: [DONE]\n\n"
                    await self._send({"type": "http.response.body", "body": last.encode()})


async def answered(
    app: ASGIApp, scope: Scope, receive: Receive, answer: Outgoing, stop: asyncio.Future[Exception]
) -> None:
    """Run `app` in its own task until it ends or `stop` has an error. The client is then told of the error.

    The app gets `http.disconnect`, so that it ends its requests to an engine: cancelling the app alone may not reach
    the tasks that it has made. A stream that has begun is cancelled, and so is an app that has not ended after
    DISCONNECT_TIMEOUT seconds.
    """

    async def receiving() -> Message:
        message = asyncio.ensure_future(receive())
        try:
            await asyncio.wait((message, stop), return_when=asyncio.FIRST_COMPLETED)
            return message.result() if message.done() else {"type": "http.disconnect"}
        finally:
            message.cancel()

    answering = asyncio.ensure_future(app(scope, receiving, answer.send))
    stopped = False
    try:
        await asyncio.wait((answering, stop), return_when=asyncio.FIRST_COMPLETED)
        if not answering.done():
            stopped = True
            if answer.streams:
                answering.cancel()
            await answer.break_off(stop.result())
            await asyncio.wait((answering,), timeout=DISCONNECT_TIMEOUT)
    finally:
        if not answering.done():
            answering.cancel()
            await asyncio.wait((answering,))
        if not answering.cancelled():
            answering.exception()  # retrieved, or asyncio would log it; after a stop nobody needs it
    if not stopped:
        answering.result()


def rewriting(send: Send, choose: Callable[[Message], Change | None], media_type: str | None = None) -> Send:
    """A `send` that replaces the body of an answer.

    Args:
        choose: is called with the `http.response.start`. It returns the function that makes the new body, or None for
            an answer that is passed on unchanged, piece by piece.
        media_type: of the new body, if it differs from that of the old one.
    """
    start: Message = {}
    change: Change | None = None
    body = bytearray()

    async def sending(message: Message) -> None:
        nonlocal start, change
        if message["type"] == "http.response.start":
            start, change = message, choose(message)
        if change is None:
            await send(message)
        elif message["type"] == "http.response.body":
            body.extend(message.get("body", b""))
            if not message.get("more_body", False):
                whole = await change(bytes(body))
                changed = {"content-length": str(len(whole))} | ({"content-type": media_type} if media_type else {})
                await send(with_headers(start, lambda headers: headers.update(changed)))
                await send({"type": "http.response.body", "body": whole})

    return sending


class HeadRequests:
    """Answers HEAD, which load balancers use, on every route that has GET: with the same answer without its body."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self.app(scope, receive, send)
            return

        async def sending(message: Message) -> None:
            await send({**message, "body": b""} if message["type"] == "http.response.body" else message)

        await self.app({**scope, "method": "GET"}, receive, sending)
