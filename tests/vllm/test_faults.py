"""vLLM under faults: clients that leave free what they held, that an engine was killed is told at once, and a server
that is stopped while it starts, or is killed, leaves nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.servers import Server, free_port, receipt
from tests.vllm.engines import Home
from tests.vllm.test_server import OPTIONS
from tests.waiting import eventually

LONG: dict[str, Any] = {"prompt": "hello", "max_tokens": 200, "ignore_eos": True, "temperature": 0, "stream": True}


def starting(folder: Path, *options: str) -> Server:
    home = Home.make("llama", folder)
    command = [sys.executable, "-m", "tests.vllm.run_server", str(home.folder), str(home.directions)]
    more = (*OPTIONS, "--host", "127.0.0.1", "--enforce-eager", *options)
    return Server(*more, command=command, directions=home.directions)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with starting(tmp_path_factory.mktemp("faults")) as running:
        yield running


def held(server: Server) -> int:
    return sum(card["requests"] for card in server.client.get("/v1/directions").json()["data"])


def test_clients_that_leave_free_what_they_held(server: Server) -> None:
    body = LONG | {"model": server.model_name, "steer": "refusal"}
    for _ in range(20):
        with server.client.stream("POST", "/v1/completions", json=body) as answer:
            assert receipt(answer)
            next(answer.iter_lines())
    eventually(lambda: held(server) == 0, 30)
    assert server.client.delete("/v1/directions/refusal").status_code == 200
    eventually(lambda: "steer_rows_in_use 1.0" in server.client.get("/metrics").text)


def test_an_engine_that_is_killed_is_told_of(server: Server) -> None:
    """Last, since nothing is served behind it."""
    body = LONG | {"model": server.model_name, "steer": "verbosity"}
    children = psutil.Process(server.process.pid).children(recursive=True)
    # its title says EngineCore, where it can have one
    said = {child: " ".join((child.name(), *child.cmdline())) for child in children}
    engines = [child for child, words in said.items() if "EngineCore" in words or "spawn_main" in words]
    assert engines, list(said.values())
    started = time.monotonic()
    heard = ""
    try:
        with server.client.stream("POST", "/v1/completions", json=body, timeout=60) as answer:
            lines = answer.iter_lines()
            next(lines)
            for engine in engines:
                engine.kill()
            heard = "\n".join(lines)
    except httpx.TransportError as error:
        heard = f"error: {error!r}"
    assert "error" in heard, "the stream does not end as if it were whole"
    assert time.monotonic() - started < 60

    def told() -> bool:
        """By /health, or by a server that has ended, which is what vLLM does when its engine is dead."""
        if server.process.poll() is not None:
            return True
        try:
            return server.client.get("/health").status_code == 503
        except httpx.TransportError:
            return False

    eventually(told, 60)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_server_that_is_stopped_while_its_engine_starts_ends(number: signal.Signals, tmp_path: Path) -> None:
    """vLLM drops the signal where it waits for its engine, and serves."""
    home, log = Home.make("llama", tmp_path), tmp_path / "log"
    command = [sys.executable, "-m", "steer", "serve", str(home.folder), "--backend", "vllm", *OPTIONS]
    more = ["--directions", str(home.directions), "--enforce-eager", "--port", str(free_port())]
    environment = os.environ | {"VLLM_LOGGING_LEVEL": "INFO"}

    def heeding() -> None:  # also where the tests run in the background of a shell, which ignores SIGINT
        signal.signal(number, signal.SIG_DFL)

    with (
        log.open("w") as out,
        subprocess.Popen([*command, *more], stdout=out, stderr=out, env=environment, preexec_fn=heeding) as process,
    ):
        try:
            eventually(lambda: "Initializing a V1" in log.read_text(), 300)
            started = psutil.Process(process.pid).children(recursive=True)
            process.send_signal(number)
            assert process.wait(120) == 128 + number
        finally:
            process.kill()
    gone, left = psutil.wait_procs(started, timeout=60)
    assert gone
    assert not left, [each.name() for each in left]
    assert "Application startup complete" not in log.read_text()


def test_a_signal_that_is_ignored_does_not_end_a_start() -> None:
    """As SIGINT is in the background of a script, where Ctrl-C is for another."""
    from steer.vllm.internals.engine import _ended_by_signals

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def handler(*_: object) -> None:
        pass

    try:
        signal.signal(signal.SIGTERM, handler)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        with pytest.raises(SystemExit) as ended, _ended_by_signals():
            list(map(signal.raise_signal, (signal.SIGINT, signal.SIGTERM)))
        assert ended.value.code == 128 + signal.SIGTERM
        assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == (handler, signal.SIG_IGN)
    finally:
        for number, was in before.items():
            signal.signal(number, was)


@pytest.mark.parametrize("fronts", [1, 2])
def test_a_server_that_is_killed_leaves_no_process(fronts: int, tmp_path: Path) -> None:
    """An engine that stayed would keep the device's memory, and no other one would start there."""
    with starting(tmp_path, "--api-server-count", str(fronts)) as running:
        assert receipt(running.complete(steer="refusal"))
        left = psutil.Process(running.process.pid).children(recursive=True)
        try:
            running.process.kill()
            gone, left = psutil.wait_procs(left, timeout=60)
            assert gone
            assert not left, [process.name() for process in left]
        finally:
            for process in left:
                process.kill()
