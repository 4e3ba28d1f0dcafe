"""A client that means ill: bodies that are refused, streams that it leaves, requests that never end, numbers without
measure, direction files that are none, a direction under which every stream overflows.

What it does goes by a number alone, so a run can be repeated. It minds one thing: that nothing of it is a 5xx.
"""

from __future__ import annotations

import json
import socket
from collections import Counter, deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from random import Random
from typing import Any

import httpx
import torch

from steer.direction import Direction
from tests.fuzz import directions, fields
from tests.servers import Client, Server

#: A direction that is served, and under which no stream stays within its numbers.
WILD = "wild"
#: Connections on which half a request stands, at once.
HALF = 20


def wild(direction: Direction) -> bytes:
    return replace(direction, weights=torch.full_like(direction.weights, 1e12)).to_bytes()


class Hostile:
    """`server` serves `WILD`, where not all is `plain`: then it may be another server, which is asked for nothing that
    Steer refuses. `counts` has what was done and what came of it, `wrong` what should not have, `sequences` how many
    were begun."""

    def __init__(self, server: Server, *, plain: bool = False) -> None:
        self.server, self.model = server, server.model_name
        self.http = Client(base_url=server.url, timeout=120)
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.sequences = 0
        self._half: deque[socket.socket] = deque()
        self._acts: list[Callable[[Random], None]] = [self.left, self.half, self.rubbish]
        if not plain:
            self._cases = list(fields.cases(server.client.get("/openapi.json").json()))
            self._acts += [self.body, self.file, self.overflow]

    def act(self, number: int) -> None:
        rng = Random(f"hostile {number}")
        with suppress(httpx.TransportError):
            self._acts[number % len(self._acts)](rng)

    def close(self) -> None:
        for connection in self._half:
            connection.close()
        self.http.close()

    def body(self, rng: Random) -> None:
        """A field with a value that it should not have, on any route but the switch."""
        case = rng.choice(self._cases)
        if case.route != "/v1/steering":
            self._note("a body", self.http.post(case.route, content=case.body(self.model), headers=fields.JSON))

    def file(self, rng: Random) -> None:
        name = f"hostile{rng.randrange(3)}"
        self._note("a file", self.http.put(f"/v1/directions/{name}", content=directions.make(rng)))
        self.http.delete(f"/v1/directions/{name}")

    def overflow(self, rng: Random) -> None:
        """Also with an aborted one, and beside itself."""
        many = rng.choice((1, 4))
        self.sequences += many
        asked = self._asked(n=many, steer=f"{WILD}=-10", temperature=1)
        answer = self.http.post("/v1/completions", json=asked)
        self._note("an overflow", answer)
        if answer.status_code == 200:
            self.wrong.append(f"an overflow was answered: {answer.text[:200]}")

    def left(self, rng: Random) -> None:
        """Streams that are left at their first event, some before it."""
        self.sequences += 8
        asked = self._asked(n=8, temperature=1, stream=True, max_tokens=200, ignore_eos=True)
        with self.http.stream("POST", "/v1/completions", json=asked) as response:
            self.counts[f"a stream left: {response.status_code}"] += 1
            if rng.random() < 0.7:
                next(response.iter_bytes(), None)

    def half(self, rng: Random) -> None:
        """The beginning of a request, whose connection stays open until others take its place."""
        connection = socket.create_connection(("127.0.0.1", self.server.port), timeout=10)
        body = json.dumps(self._asked()).encode()
        head = "POST /v1/completions HTTP/1.1", "Host: 127.0.0.1", "Content-Type: application/json"
        whole = "\r\n".join((*head, f"Content-Length: {len(body)}", "", "")).encode() + body
        connection.sendall(whole[: rng.randrange(1, len(whole))])
        self._half.append(connection)
        self.counts["half a request"] += 1
        if len(self._half) > HALF:
            self._half.popleft().close()

    def rubbish(self, rng: Random) -> None:
        with socket.create_connection(("127.0.0.1", self.server.port), timeout=10) as connection, suppress(OSError):
            connection.sendall(rng.randbytes(rng.randrange(1, 5000)) + b"\r\n\r\n")
            connection.recv(1000)
        self.counts["rubbish"] += 1

    def _asked(self, **more: Any) -> dict[str, Any]:
        return {"model": self.model, "prompt": "x", "max_tokens": 8, **more}

    def _note(self, what: str, answer: httpx.Response) -> None:
        self.counts[f"{what}: {answer.status_code}"] += 1
        if answer.status_code >= 500 and answer.status_code != 501 and "steering_off" not in answer.text:
            self.wrong.append(f"{what}: {answer.status_code} {answer.text[:300]}")
