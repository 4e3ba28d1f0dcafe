"""ASGI helpers: the headers of requests and answers, and answers on their way out that are broken off or rewritten."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from steer.serve import errors

#: Seconds in which a client must take the end of an answer that is broken off: what it held is let go then.
LAST = 5.0
#: Seconds in which an app ends by itself that was told that its client has left.
LEAVING = 0.5
#: Makes the new body of an answer of the whole old one.
Change = Callable[[bytes], Awaitable[bytes]]


def with_headers(message: Message, change: Callable[[MutableHeaders], object]) -> Message:
    """A copy of an `http.response.start`, or of the scope of a request, with its headers as `change` leaves them."""
    headers = MutableHeaders(raw=list(message["headers"]))
    change(headers)
    return {**message, "headers": headers.raw}


def is_event_stream(start: Message) -> bool:
    """Does this `http.response.start` begin a stream of server-sent events?"""
    return "event-stream" in Headers(raw=start["headers"]).get("content-type", "")


class Outgoing:
    """An answer on its way out. `status`: 0 until it has begun; `streams`: has it begun as a stream of events; `ended`:
    nothing more of it is sent."""

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
        """End it with `error`, where that can still be told: instead of it, or as the last event of a stream. What has
        begun and is no stream stays cut off, and an answer that has ended stays as it is. A client that does not read
        is waited for LAST seconds."""
        if self.ended:
            return
        self.ended = True
        with suppress(TimeoutError):
            async with asyncio.timeout(LAST):
                if not self.status:
                    told = errors.of(error)
                    start = {"type": "http.response.start", "status": told.status_code, "headers": told.raw_headers}
                    await self._send(start)
                    await self._send({"type": "http.response.body", "body": told.body})
                elif self.streams:
                    last = f"event: error\n{errors.error_event(error)}data: [DONE]\n\n"
                    await self._send({"type": "http.response.body", "body": last.encode()})


async def answered(
    app: ASGIApp, scope: Scope, receive: Receive, answer: Outgoing, stop: asyncio.Future[Exception]
) -> None:
    """Have `app` answer in a task of its own, until `stop` has an error. Then the client is told of that, and the app
    gets `http.disconnect`, so that it ends its requests to an engine: cancelling it alone may not reach the tasks that
    it has made. A stream that has begun is cancelled, and so is what has not ended LEAVING seconds later."""

    async def receiving() -> Message:
        coming = asyncio.ensure_future(receive())
        try:
            await asyncio.wait((coming, stop), return_when=asyncio.FIRST_COMPLETED)
            return coming.result() if coming.done() else {"type": "http.disconnect"}
        finally:
            coming.cancel()

    answering = asyncio.ensure_future(app(scope, receiving, answer.send))
    stopped = False
    try:
        await asyncio.wait((answering, stop), return_when=asyncio.FIRST_COMPLETED)
        if not answering.done():
            stopped = True
            if answer.streams:
                answering.cancel()
            await answer.break_off(stop.result())
            await asyncio.wait((answering,), timeout=LEAVING)
    finally:
        if not answering.done():
            answering.cancel()
            await asyncio.wait((answering,))
        if not answering.cancelled():
            answering.exception()  # of what was ended it is nobody's
    if not stopped:
        answering.result()


def rewriting(send: Send, choose: Callable[[Message], Change | None], media_type: str | None = None) -> Send:
    """Send an answer on with another body.

    Args:
        choose: gets the `http.response.start`, and gives what makes the new body of the whole old one; None for an
            answer that goes on as it is, piece by piece.
        media_type: of the new body, where that is another.
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
