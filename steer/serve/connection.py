"""uvicorn's connection, with a bound on what comes in of a request before it is whole."""

from __future__ import annotations

try:
    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
except ImportError:  # then uvicorn takes h11, which has such a bound
    HttpToolsProtocol = None  # type: ignore[assignment]

#: Bytes of request line and headers, of a chunk's extensions, or of trailers: more than a door lets in.
MOST = 128 * 2**10
#: How uvicorn is told of it: a class by its name, or what it takes by itself.
PROTOCOL = "auto" if HttpToolsProtocol is None else f"{__name__}:Bounded"

if HttpToolsProtocol is not None:

    class Bounded(HttpToolsProtocol):
        """Ends a connection on which more than MOST bytes came since its headers, a piece of a body or a request was
        last whole. httptools itself keeps them all, and joins the pieces of one header in the square of its length."""

        _since = 0

        def data_received(self, data: bytes) -> None:
            self._since += len(data)
            super().data_received(data)
            if self._since > MOST and not self.transport.is_closing():
                if self.cycle is None or self.cycle.response_complete:
                    self.send_400_response(f"The headers are over {MOST} bytes.")
                self.transport.close()

        def on_headers_complete(self) -> None:
            self._since = 0
            super().on_headers_complete()

        def on_body(self, body: bytes) -> None:
            self._since = 0
            super().on_body(body)

        def on_message_complete(self) -> None:
            self._since = 0
            super().on_message_complete()
