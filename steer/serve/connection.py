"""uvicorn's HTTP connection with limits on what one client can make it hold or do, and a check of the address to listen
on."""

from __future__ import annotations

import errno
import os
import socket
from asyncio import TimerHandle
from contextlib import suppress
from typing import TYPE_CHECKING

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from steer.errors import InvalidInput
from steer.serve import errors
from steer.serve.errors import Code
from steer.spec import nearly

if TYPE_CHECKING:
    from uvicorn._types import ASGI3Application
    from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

#: Bytes of the request line with its headers, of a chunk's extensions, or of trailers. `access` allows fewer.
MAX_HEAD = 128 * 2**10
#: Requests on one connection that wait for the answer to the request before.
MAX_PIPELINED = 16
#: A body of more than MAX_PIECES pieces must have at least MIN_PIECE bytes a piece on average: each piece costs a call
#: in Python.
MAX_PIECES, MIN_PIECE = 4096, 64
#: Seconds after which a client that reads nothing is disconnected: its request may keep a version of a direction alive.
WRITE_TIMEOUT = 60.0
#: The import string of `Bounded`, for uvicorn.
PROTOCOL = f"{__name__}:Bounded"
#: Headers with which a client asks for another protocol.
_UPGRADE = (b"connection", b"upgrade", b"http2-settings")


class Bounded(HttpToolsProtocol):
    """Closes a connection that exceeds a limit: MAX_HEAD bytes without a complete header block, piece of a body or
    request (httptools keeps all of them, and joins the pieces of one header in quadratic time), MAX_PIPELINED,
    MAX_PIECES or WRITE_TIMEOUT.

    A trailer (a header after the body) never becomes a header of the request. A trailer that is meant to steer ends the
    connection. A request to upgrade to anything but websockets is served as a plain request.
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
            self._end(str(cause) if isinstance(cause, _Refused) else "the bytes received are not an HTTP/1.1 request")
        if self._since > MAX_HEAD and not self.transport.is_closing():
            self._end(f"the headers are over {MAX_HEAD} bytes")

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    def _end(self, why: str) -> None:
        """Close the connection, and say why unless the client is waiting for the answer to another request."""
        if self.transport.is_closing():
            return
        running = self._running
        if running is None or running.response_complete or (running is self.cycle and not running.response_started):
            answer = errors.response(Code.INVALID_HTTP, why)
            answer.headers["connection"] = "close"
            head = b"".join(b"%s: %s\r\n" % each for each in answer.raw_headers)
            self.transport.write(b"HTTP/1.1 400 Bad Request\r\n" + head + b"\r\n" + bytes(answer.body))
        self._leave()
        self.transport.close()

    def _leave(self) -> None:
        """Tell the running request that its client has left. uvicorn would tell the newest request instead."""
        self.pipeline.clear()
        if self._running is not None and not self._running.response_complete:
            self._running.disconnected = True
            self._running.message_event.set()

    def _go_on_without(self, rest: bytes) -> None:
        """Parse the request that asks for another protocol again, without the headers that ask for it."""
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
        """Whether `_go_on_without` will parse this request again."""
        return bool(self.parser.should_upgrade()) and not self._should_upgrade()

    def on_message_begin(self) -> None:
        self._in_headers, self._pieces, self._bytes = True, 0, 0
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._in_headers:
            super().on_header(name, value)
        elif nearly(name.decode("latin-1")):
            raise _Refused(f"the trailer {name.decode('latin-1')!r}: steering cannot be requested like this")

    def on_headers_complete(self) -> None:
        self._since, self._in_headers = 0, False
        if self.parser.get_method() == b"CONNECT":
            raise _Refused("the method CONNECT is not served")
        if len(self.pipeline) >= MAX_PIPELINED:
            raise _Refused(f"{MAX_PIPELINED} requests wait on this connection, which is the limit")
        if not self._read_again:
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._since, self._pieces, self._bytes = 0, self._pieces + 1, self._bytes + len(body)
        if self._pieces > MAX_PIECES and self._bytes < MIN_PIECE * self._pieces:
            raise _Refused(f"the body comes in pieces of less than {MIN_PIECE} bytes on average")
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
        """Abort the connection if its write buffer still has the `before` bytes of WRITE_TIMEOUT seconds ago."""
        size = self.transport.get_write_buffer_size()
        if size == before:
            self.transport.abort()
        else:
            self._stuck = self.loop.call_later(WRITE_TIMEOUT, self._wait_for_client, size)

    def _stop_waiting(self) -> None:
        if self._stuck is not None:
            self._stuck.cancel()
            self._stuck = None


def check_address(host: str, port: int) -> None:
    """Raise InvalidInput if a server cannot listen here. Without this check it would fail only after the model is
    loaded."""
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise InvalidInput(f"--host {host}: {error.strerror}; accepted: an address of this machine") from error
    failures: list[OSError] = []
    for family, *_, address in found:
        try:
            socket.create_server(address, family=family).close()
        except OSError as error:
            if error.errno in (errno.EADDRINUSE, errno.EACCES):
                reason = os.strerror(error.errno)
                raise InvalidInput(f"--port {port}: {reason}; give another (--port 0 takes a free one)") from error
            failures.append(error)  # an address family that this machine does not have
    if len(failures) == len(found):
        raise InvalidInput(f"--host {host}: {failures[0].strerror}; accepted: an address of this machine")


class _Refused(Exception):
    """Raised in a callback of the parser to end the connection."""
