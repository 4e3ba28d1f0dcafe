"""ASGI helpers: the headers of requests and answers, and a replacement body for an answer on its way out."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import Message, Send

#: Makes the new body of an answer of the whole old one.
Change = Callable[[bytes], Awaitable[bytes]]


def with_headers(message: Message, change: Callable[[MutableHeaders], object]) -> Message:
    """A copy of an `http.response.start`, or of the scope of a request, with its headers as `change` leaves them."""
    headers = MutableHeaders(raw=list(message["headers"]))
    change(headers)
    return {**message, "headers": headers.raw}


async def send_response(send: Send, response: Response) -> None:
    """Send a response that has its whole body."""
    await send({"type": "http.response.start", "status": response.status_code, "headers": response.raw_headers})
    await send({"type": "http.response.body", "body": response.body})


def is_event_stream(start: Message) -> bool:
    """Does this `http.response.start` begin a stream of server-sent events?"""
    return "event-stream" in Headers(raw=start["headers"]).get("content-type", "")


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
