"""The races of `tests/test_races.py` from outside: through HTTP, on the real engine, against a plain model.

A stream ends by itself after a moment, so what the model knows for sure is what a stream says, not when its rows go.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from steer.direction import digest
from tests import models
from tests.servers import Server, receipt, text
from tests.waiting import eventually

ROWS, LENGTH = 4, 48
NAMES = ("one", "two", "three")
MODEL = models.tiny("llama")
FILES = [models.direction(MODEL, k=2 if seed == 3 else 1, seed=20 + seed).to_bytes() for seed in range(4)]
RANKS = {digest(data): 2 if seed == 3 else 1 for seed, data in enumerate(FILES)}


@dataclass
class Stream:
    """An answer that is being read: by which version it must be made (None: plain)."""

    version: str | None
    response: httpx.Response
    lines: Iterator[str]
    open: ExitStack
    text: str = ""

    def read(self, most: int | None = None) -> None:
        for line in self.lines:
            if line.startswith("data: {"):
                self.text += "".join(choice["text"] for choice in json.loads(line[6:])["choices"])
                if most is not None:
                    most -= 1
            if most == 0:
                return


@pytest.fixture(scope="module")
def server(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("races")
    with Server(str(tiny_folder), "--directions", str(folder), "--rows", str(ROWS), directions=folder) as running:
        yield running


@pytest.fixture(scope="module")
def answers(server: Server) -> dict[str | None, str]:
    """What each version answers, and what a plain request gets."""
    found: dict[str | None, str] = {None: text(server.complete(max_tokens=LENGTH, ignore_eos=True))}
    for data in FILES:
        assert server.client.put("/v1/directions/one", content=data).status_code == 200
        found[digest(data)] = text(server.complete(max_tokens=LENGTH, ignore_eos=True, steer="one"))
    assert server.client.delete("/v1/directions/one").status_code == 200
    assert len(set(found.values())) == len(found)
    return found


def scores(server: Server, steer: str | None) -> list[float]:
    """What an echoed prompt is given, token by token."""
    more = {"steer": steer} if steer else {}
    answer = server.complete(echo=True, logprobs=0, max_tokens=1, **more)
    assert answer.status_code == 200, answer.text
    return list(answer.json()["choices"][0]["logprobs"]["token_logprobs"][1:])


@pytest.fixture(scope="module")
def scored(server: Server, answers: dict[str | None, str]) -> dict[str | None, list[float]]:
    """The same for each version, alone."""
    found: dict[str | None, list[float]] = {None: scores(server, None)}
    for data in FILES:
        assert server.client.put("/v1/directions/one", content=data).status_code == 200
        found[digest(data)] = scores(server, "one")
    assert server.client.delete("/v1/directions/one").status_code == 200
    return found


def machine(
    server: Server, answers: dict[str | None, str], scored: dict[str | None, list[float]]
) -> type[RuleBasedStateMachine]:
    class Races(RuleBasedStateMachine):
        @initialize()
        def start(self) -> None:
            self.names: dict[str, str] = {}
            self.streams: list[Stream] = []
            self.on = True
            self.put("one", 0)

        @rule(name=st.sampled_from(NAMES), seed=st.integers(0, len(FILES) - 1))
        def put(self, name: str, seed: int) -> None:
            """Streams of old versions end soon, so a new one has room if the names alone leave it."""
            d = digest(FILES[seed])
            named = set(self.names.values())
            fits = sum(RANKS[v] for v in named | {d}) <= ROWS
            answer = server.client.put(f"/v1/directions/{name}", content=FILES[seed])
            assert answer.status_code == (200 if fits else 409), answer.text
            if fits:
                self.names[name] = d

        @rule(name=st.sampled_from(NAMES))
        def put_what_is_bad(self, name: str) -> None:
            assert server.client.put(f"/v1/directions/{name}", content=FILES[0][:-9]).status_code == 400

        @rule(name=st.sampled_from(NAMES))
        def delete(self, name: str) -> None:
            status = server.client.delete(f"/v1/directions/{name}").status_code
            assert status == 200 if name in self.names else status in (200, 404)
            self.names.pop(name, None)

        @precondition(lambda self: len(self.streams) < 6)
        @rule(name=st.none() | st.sampled_from(NAMES))
        def begin(self, name: str | None) -> None:
            body: dict[str, Any] = {
                "model": server.model_name,
                "prompt": "hello",
                "temperature": 0,
                "max_tokens": LENGTH,
                "ignore_eos": True,
                "stream": True,
            }
            opened = ExitStack()
            more = {"steer": name} if name else {}
            response = opened.enter_context(server.client.stream("POST", "/v1/completions", json=body | more))
            expected = 200 if name is None else 400 if name not in self.names else 200 if self.on else 503
            assert response.status_code == expected
            if expected != 200:
                opened.close()
                return
            version = self.names[name] if name else None
            assert [entry["digest"] for entry in receipt(response)] == ([version] if version else [])
            self.streams.append(Stream(version, response, response.iter_lines(), opened))

        @precondition(lambda self: self.streams)
        @rule(which=st.integers(0, 9), most=st.none() | st.integers(1, 20))
        def read(self, which: int, most: int | None) -> None:
            stream = self.streams[which % len(self.streams)]
            stream.read(most)
            assert answers[stream.version].startswith(stream.text), "begun with one version, ended with it"
            if most is None:
                self.end(stream)

        @precondition(lambda self: self.streams)
        @rule(which=st.integers(0, 9))
        def cancel(self, which: int) -> None:
            self.streams.pop(which % len(self.streams)).open.close()

        @precondition(lambda self: self.on)
        @rule(times=st.integers(1, 2))
        def score_all_at_once(self, times: int) -> None:
            """Echoed prompts are read outside of the batch, between its passes."""
            names = [None, *self.names] * times
            with ThreadPoolExecutor(len(names)) as pool:
                for name, got in zip(names, pool.map(partial(scores, server), names), strict=True):
                    assert got == pytest.approx(scored[self.names[name] if name else None], abs=1e-3)

        @rule(on=st.sampled_from([True, True, False]))
        def switch(self, on: bool) -> None:
            self.on = on
            assert server.client.post("/v1/steering", json={"enabled": on}).status_code == 200

        @invariant()
        def names_point_to_what_was_put(self) -> None:
            listed = server.client.get("/v1/directions").json()["data"]
            assert {card["id"]: card["digest"] for card in listed if "digest" in card} == self.names
            assert server.client.get("/health").status_code == 200

        def end(self, stream: Stream) -> None:
            stream.read()
            stream.open.close()
            assert stream.text == answers[stream.version]
            self.streams.remove(stream)

        def teardown(self) -> None:
            for stream in list(self.streams):
                self.end(stream)
            for name in NAMES:
                server.client.delete(f"/v1/directions/{name}")
            server.client.post("/v1/steering", json={"enabled": True})
            eventually(lambda: server.client.get("/health").json()["in_flight"] == 0)
            eventually(lambda: "steer_rows_in_use 0.0" in server.client.get("/metrics").text)
            assert "steer_steered_running 0.0" in server.client.get("/metrics").text

    return Races


def test_every_order_over_http(
    server: Server, answers: dict[str | None, str], scored: dict[str | None, list[float]]
) -> None:
    run_state_machine_as_test(
        machine(server, answers, scored),
        settings=settings(
            max_examples=20,
            stateful_step_count=20,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            database=None,
        ),
    )
    assert server.process.poll() is None
    assert "Traceback" not in server.log
