"""Real servers for tests: `steer serve` in a process of its own, on a free port, stopped by SIGTERM."""

from __future__ import annotations

import http.client
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from itertools import count
from pathlib import Path
from random import randrange
from types import TracebackType
from typing import Any

import httpx

from tests.waiting import eventually

ROOT = Path(__file__).parents[1]
#: Beside other work, not on a machine of its own.
START_TIMEOUT = 1500.0


#: Of each test process its own, below those that a system gives: until a server has bound one, nobody else takes it.
_PORTS = count(20_000 + 1_500 * int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:]) % 12_000 + randrange(1_000))


def free_port() -> int:
    for port in _PORTS:
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError


class Client(httpx.Client):
    """Says of a file that it is one: httpx gives bytes no type."""

    def build_request(self, method: str, url: Any, **more: Any) -> httpx.Request:
        request = super().build_request(method, url, **more)
        if method == "PUT":
            request.headers.setdefault("Content-Type", "application/octet-stream")
        return request


class Server:
    """`steer serve ARGUMENTS`, ready when the `with` begins. `client` speaks to it; `log` is what it printed."""

    def __init__(
        self, *arguments: str, directions: Path | None = None, command: list[str] | None = None, cwd: Path = ROOT
    ) -> None:
        self.directions, self.cwd = directions, cwd
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        base = command or [sys.executable, "-m", "steer", "serve", "--backend", "transformers"]
        self.command = [*base, *arguments, "--port", str(self.port)]
        self._log = tempfile.NamedTemporaryFile("w+", suffix=".log")  # noqa: SIM115

    def __enter__(self) -> Server:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        self.process = subprocess.Popen(
            self.command, stdout=self._log, stderr=subprocess.STDOUT, env=environment, cwd=self.cwd
        )
        self.client = Client(base_url=self.url, timeout=120)
        deadline = time.monotonic() + START_TIMEOUT
        while True:
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.process.kill()
                self.process.wait()
                self.client.close()
                with self._log:  # a file left open would fail another test
                    raise RuntimeError(f"the server did not start:\n{self.log}")
            try:
                if self.client.get("/health").status_code == 200:
                    return self
            except httpx.TransportError:
                time.sleep(0.1)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.client.close()
        self.stop()
        self._log.close()

    def stop(self) -> int:
        """SIGTERM, and the exit code."""
        self.process.terminate()
        try:
            return self.process.wait(timeout=120)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise

    @property
    def log(self) -> str:
        return Path(self._log.name).read_text()

    @property
    def model(self) -> str:
        return str(self.client.get("/v1/models").json()["data"][0]["id"])

    def complete(self, prompt: Any = "hello", headers: Any = None, **body: Any) -> httpx.Response:
        """POST /v1/completions, greedy and 8 tokens unless told otherwise."""
        whole = {"model": self.model_name, "prompt": prompt, "max_tokens": 8, "temperature": 0, **body}
        return self.client.post("/v1/completions", json=whole, headers=headers or {})

    def chat(self, content: Any = "hello", headers: Any = None, **body: Any) -> httpx.Response:
        messages = [{"role": "user", "content": content}]
        whole = {"model": self.model_name, "messages": messages, "max_tokens": 8, "temperature": 0, **body}
        return self.client.post("/v1/chat/completions", json=whole, headers=headers or {})

    @property
    def model_name(self) -> str:
        if not hasattr(self, "_name"):
            self._name = self.model
        return self._name


def front_ends(server: Server, headers: dict[str, str] | None = None) -> dict[int, Client]:
    """A client for each front end of a server, by its number: each with one connection, which stays where it is.
    `headers` let it manage."""
    found: dict[int, Client] = {}
    more: list[Client] = []  # they stay open until all are found: the front end with the fewest is the next
    count = 0
    deadline = time.monotonic() + START_TIMEOUT
    while not count or len(found) < count:
        assert time.monotonic() < deadline, f"of {count} front ends only {sorted(found)} answer"
        client = Client(
            base_url=server.url,
            timeout=120,
            headers=headers,
            limits=httpx.Limits(max_connections=1, keepalive_expiry=60),
        )
        try:
            index, count = client.get("/v1/steering").json()["front_end"]
        except httpx.TransportError:  # one that has just begun to listen
            client.close()
            continue
        if found.setdefault(index, client) is not client:
            more.append(client)
            time.sleep(0.05)
    for client in more:
        client.close()
    return dict(sorted(found.items()))


def receipt(response: httpx.Response) -> list[dict[str, Any]]:
    return list(json.loads(response.headers["x-steer-applied"]))


def text(response: httpx.Response) -> str:
    assert response.status_code == 200, response.text
    choice = response.json()["choices"][0]
    return str(choice["text"] if "text" in choice else choice["message"]["content"])


def outlives_clients(server: Server) -> bool:
    """Is a connection that lay idle for longer than clients keep theirs (httpx: 5 s) still the same one?"""
    with closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)) as kept:
        kept.request("GET", "/health")
        assert kept.getresponse().read()
        first = kept.sock
        time.sleep(6)
        kept.request("GET", "/health")
        assert kept.getresponse().read()
        return kept.sock is first


def stopped_under_streams(
    server: Server,
    asked: Sequence[tuple[httpx.Client, dict[str, Any], dict[str, str]]],
    ready: Callable[[], object] = lambda: True,
) -> list[str]:
    """What streams of completions say, each by (client of the server's, body, headers), on which the server is stopped
    when all have begun and `ready` holds."""
    began = threading.Barrier(len(asked) + 1)

    def streamed(client: httpx.Client, body: dict[str, Any], headers: dict[str, str]) -> str:
        with httpx.Client(base_url=client.base_url, timeout=60) as own:
            sent = body | {"stream": True, "ignore_eos": True}
            with own.stream("POST", "/v1/completions", json=sent, headers=headers) as answer:
                lines = answer.iter_lines()
                first = next(lines)
                began.wait(60)
                return "\n".join([first, *lines])

    with ThreadPoolExecutor(len(asked)) as pool:
        streams = [pool.submit(streamed, *one) for one in asked]
        began.wait(60)
        eventually(ready)
        assert server.stop() in (0, 1), server.log
        return [stream.result() for stream in streams]
