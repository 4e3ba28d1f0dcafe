"""A client that takes nothing of its answer is not waited for without end; one that is slow is."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Iterator

import pytest
import uvicorn
from starlette.types import Receive, Scope, Send

from steer.serve import connection

TOTAL = 512 * 2**20
left = threading.Event()


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    """Writes a long answer, and tells when nobody takes it any more."""
    if scope["type"] != "http":
        return
    await receive()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % TOTAL)]})

    async def write() -> None:
        for _ in range(TOTAL // 2**16):
            await send({"type": "http.response.body", "body": b"x" * 2**16, "more_body": True})
        await send({"type": "http.response.body"})

    writing = asyncio.ensure_future(write())
    gone = asyncio.ensure_future(receive())
    await asyncio.wait([writing, gone], return_when=asyncio.FIRST_COMPLETED)
    if gone.done():
        left.set()
    writing.cancel(), gone.cancel()


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    monkeypatch.setattr(connection, "WRITE_TIMEOUT", 3)
    left.clear()
    server = uvicorn.Server(uvicorn.Config(app, port=0, http=connection.PROTOCOL, lifespan="off", log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    [listening] = server.servers[0].sockets
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2**18)  # what is taken is noticed soon
    yield listening.getsockname()[1]
    server.should_exit = True
    thread.join(30)


@pytest.mark.parametrize("reads", [False, True])
def test_only_who_takes_nothing_is_left(port: int, reads: bool) -> None:
    with socket.create_connection(("127.0.0.1", port), timeout=30) as client:
        client.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        if reads:
            for _ in range(50):  # longer than the server's patience
                assert client.recv(2**20)
                time.sleep(0.1)
        assert left.wait(0 if reads else 30) != reads
