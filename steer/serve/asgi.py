"""Answers as ASGI messages on their way out: what kind they are, and another body for them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import Message, Send

Change = Callable[[bytes], Awaitable[bytes]]


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
                headers = MutableHeaders(raw=list(start["headers"]))
                headers["content-length"] = str(len(whole))
                if media_type is not None:
                    headers["content-type"] = media_type
                await send({**start, "headers": headers.raw})
                await send({"type": "http.response.body", "body": whole})

    return sending
