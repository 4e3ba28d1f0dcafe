"""uvicorn's connection, with bounds on what one client can make it hold or do; and whether a server can listen."""

from __future__ import annotations

import errno
import json
import os
import socket
from asyncio import TimerHandle
from contextlib import suppress
from typing import TYPE_CHECKING

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from steer.errors import InvalidInput
from steer.spec import nearly

if TYPE_CHECKING:
    from uvicorn._types import ASGI3Application
    from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

#: Bytes of request line and headers, of a chunk's extensions, or of trailers: more than a door lets in.
MOST = 128 * 2**10
#: Requests on one connection that wait for the answer to the one before.
WAITING = 16
#: Pieces of a body, after which they must have PIECE bytes on the average: each is a call in Python.
PIECES, PIECE = 4096, 64
#: Seconds in which a client takes nothing of what is written for it: a version of a direction may wait for its end.
PATIENCE = 60.0
#: How uvicorn is told of it.
PROTOCOL = f"{__name__}:Bounded"
#: Headers by which a client asks for another protocol.
_UPGRADE = (b"connection", b"upgrade", b"http2-settings")


class Bounded(HttpToolsProtocol):
    """Ends a connection that is over one of the bounds: MOST bytes since its headers, a piece of a body or a
    request was last whole (httptools itself keeps them all, and joins the pieces of one header in the square of its
    length), WAITING, PIECES or PATIENCE.

    What stands after a body is no header, whenever it comes: a trailer that is meant to steer ends the connection.
    A request for another protocol than websockets is read as one without it.
    """

    _since = 0
    _pieces = _bytes = 0
    _in_headers = False
    _running: RequestResponseCycle | None = None
    _stuck: TimerHandle | None = None

    def data_received(self, data: bytes) -> None:
        self._since += len(data)
        self._unset_keepalive_if_required()
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            if self._should_upgrade():
                self.handle_websocket_upgrade()
            else:
                self._go_on_without(data[upgrade.args[0] :])
        except httptools.HttpParserError as error:
            cause = error.__context__
            self._end(str(cause) if isinstance(cause, _Refused) else "what came is no request of HTTP/1.1")
        if self._since > MOST and not self.transport.is_closing():
            self._end(f"the headers are over {MOST} bytes")

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    def _end(self, why: str) -> None:
        """Say why, where no answer to another request is due, and close."""
        if self.transport.is_closing():
            return
        running = self._running
        if running is None or running.response_complete or (running is self.cycle and not running.response_started):
            error = {"message": why, "type": "invalid_request_error", "param": None, "code": "invalid_http"}
            body = json.dumps({"error": error}).encode()
            head = f"content-type: application/json\r\ncontent-length: {len(body)}\r\nconnection: close"
            self.transport.write(b"HTTP/1.1 400 Bad Request\r\n" + head.encode() + b"\r\n\r\n" + body)
        self._leave()
        self.transport.close()

    def _leave(self) -> None:
        """Tell the request that runs that nobody waits for its answer: uvicorn tells the last one that came."""
        self.pipeline.clear()
        if self._running is not None and not self._running.response_complete:
            self._running.disconnected = True
            self._running.message_event.set()

    def _go_on_without(self, rest: bytes) -> None:
        """Read the request that asks for another protocol once more, as one that does not."""
        lines = [b"%s %s HTTP/1.1" % (self.parser.get_method(), self.url)]
        lines += [b"%s: %s" % each for each in self.headers if each[0] not in _UPGRADE]
        self.parser = httptools.HttpRequestParser(self)
        with suppress(AttributeError):  # as uvicorn has it
            self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
        self.data_received(b"\r\n".join(lines) + b"\r\n\r\n" + rest)

    def _should_upgrade(self) -> bool:
        return bool(super()._should_upgrade()) and self.parser.get_method() == b"GET"

    @property
    def _read_again(self) -> bool:
        """Is this a request that `_go_on_without` reads?"""
        return bool(self.parser.should_upgrade()) and not self._should_upgrade()

    def on_message_begin(self) -> None:
        self._in_headers, self._pieces, self._bytes = True, 0, 0
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._in_headers:
            super().on_header(name, value)
        elif nearly(name.decode("latin-1")):
            raise _Refused(f"the trailer {name.decode('latin-1')!r}: no request asks for steering like this")

    def on_headers_complete(self) -> None:
        self._since, self._in_headers = 0, False
        if self.parser.get_method() == b"CONNECT":
            raise _Refused("the method CONNECT is not served")
        if len(self.pipeline) >= WAITING:
            raise _Refused(f"{WAITING} requests wait on this connection, and no more can")
        if not self._read_again:
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._since, self._pieces, self._bytes = 0, self._pieces + 1, self._bytes + len(body)
        if self._pieces > PIECES and self._bytes < PIECE * self._pieces:
            raise _Refused(f"the body comes in pieces of less than {PIECE} bytes on the average")
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._since = 0
        if not self._read_again:
            super().on_message_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._wait_for_client(-1)

    def resume_writing(self) -> None:
        self._stop_waiting()
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        self._leave()
        super().connection_lost(exc)

    def _wait_for_client(self, before: int) -> None:
        """End the connection if what is written, `before` bytes when it was last looked at, is as much still."""
        left = self.transport.get_write_buffer_size()
        if left == before:
            self.transport.abort()
        else:
            self._stuck = self.loop.call_later(PATIENCE, self._wait_for_client, left)

    def _stop_waiting(self) -> None:
        if self._stuck is not None:
            self._stuck.cancel()
            self._stuck = None


def check_address(host: str, port: int) -> None:
    """Raise InvalidInput where a server cannot listen here; it would itself notice only when the model is loaded."""
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise InvalidInput(f"--host {host}: {error.strerror}; accepted: an address of this machine") from error
    refused: list[OSError] = []
    for family, *_, address in found:
        try:
            socket.create_server(address, family=family).close()
        except OSError as error:
            if error.errno in (errno.EADDRINUSE, errno.EACCES):
                said = os.strerror(error.errno)
                raise InvalidInput(f"--port {port}: {said}; give another (--port 0 takes a free one)") from error
            refused.append(error)  # of a family that this machine does not have
    if len(refused) == len(found):
        raise InvalidInput(f"--host {host}: {refused[0].strerror}; accepted: an address of this machine")


class _Refused(Exception):
    """Out of a callback of the parser, which ends the connection."""
