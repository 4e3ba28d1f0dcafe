"""What an operator does to a server: start it safely, switch it off, change its policy, fill its disk."""

from __future__ import annotations

import asyncio
import json
import os
import random
import resource
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings

from steer import follow
from steer.follow import Follower
from steer.serve import control, keys
from steer.serve.access import Caller, Refusal
from steer.serve.audit import verify
from steer.serve.pages import is_loopback
from steer.serve.policy import read
from steer.serve.rates import Meter
from tests import models
from tests.serve.inside import COMPLETION, PROMPT, Inside, post
from tests.serve.rules import CASES, HASH, POLICY, SECRETS, bearer, carried
from tests.servers import Server, receipt

BODY = {"model": "tiny", "prompt": "hello", "max_tokens": 2, "temperature": 0}
#: Long enough to be running when the switch moves.
LONG = BODY | {"max_tokens": 480, "ignore_eos": True}


def eventually(law: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not law():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@contextmanager
def serving(tiny_folder: Path, folder: Path, policy: str | None = POLICY, *more: str) -> Iterator[Server]:
    directions = folder / "directions"
    if not directions.exists():
        directions.mkdir(parents=True)
        for seed, name in enumerate(("refusal", "verbosity"), 1):
            models.direction(models.tiny("llama"), seed=seed).save(directions / f"{name}.safetensors")
    options: tuple[str, ...] = ("--directions", str(directions), "--served-model-name", "tiny")
    if policy is not None:
        (folder / "policy.toml").write_text(policy)
        options += ("--policy", str(folder / "policy.toml"))
    with Server(str(tiny_folder), *options, "--audit", str(folder / "audit.jsonl"), *more) as server:
        yield server


def ask(server: Server, key: str | None, **more: Any) -> httpx.Response:
    return server.client.post("/v1/completions", json=BODY | more, headers=bearer(key) if key else {})


def switch(server: Server, enabled: bool, key: str = "all", **more: Any) -> httpx.Response:
    return server.client.post("/v1/steering", json={"enabled": enabled} | more, headers=bearer(key))


def events(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "audit.jsonl").read_text().splitlines()]


# -- the chain --------------------------------------------------------------------------------------------------------


def test_the_chain_of_ten_thousand_mixed_requests_is_whole(tmp_path: Path) -> None:
    """Door, middleware and log are the real ones; only the engine answers at once. Whatever each request was, it left
    the lines that it must leave."""
    inside = Inside(tmp_path, POLICY)
    inside.start()
    rng = random.Random(0)
    expected: Counter[str] = Counter()

    async def one(number: int) -> None:
        case = rng.choice(CASES)
        more, headers = rng.choice(list(carried(case.spec, "tiny").values()))
        status, told, _ = await inside.post(BODY | more, bearer(case.key) | headers)
        if isinstance(case.gets, list):
            assert (status, len(json.loads(told["x-steer-applied"]))) == (200, len(case.gets))
            expected["steered"] += bool(case.gets)
        else:
            assert status == case.gets[0]
            expected["refused"] += status == 403
        if number % 1000 == 999:
            inside.control.switch(True, Caller("all"))

    async def load() -> None:
        for start in range(0, 10_000, 50):
            await asyncio.gather(*(one(number) for number in range(start, start + 50)))

    asyncio.run(load())
    head = inside.control.audit and inside.control.audit.head
    inside.control.stop()
    files = [path for path in tmp_path.iterdir() if path.name.startswith("audit.jsonl") and path.suffix[1:].isdigit()]
    assert files, "it was rotated"
    report = verify([inside.log, *files], [head] if head else [])
    assert (report.problems, report.notes) == ([], [])
    found = Counter(
        json.loads(line)["event"] for path in [inside.log, *files] for line in path.read_text().splitlines()
    )
    assert found["admitted"] == found["ended"] == expected["steered"] > 1000
    assert found["refused"] == expected["refused"] > 1000
    assert (found["start"], found["stop"], found["switch"]) == (1, 1, 10)
    assert report.lines == found.total()
    assert not any(inside.registry.names()[name].pins for name in inside.registry.names())
    assert not inside.control.running


# -- the kill switch --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("on_kill", ["finish", "abort"])
def test_from_the_switchs_answer_on_nothing_steered_is_admitted(
    tiny_folder: Path, tmp_path: Path, on_kill: str
) -> None:
    """Eight clients stream steered answers, one after the other, until they are refused; a plain one goes on."""
    said: dict[int, list[str]] = {number: [] for number in range(8)}
    first_lines, off, late = threading.Barrier(9), threading.Event(), []
    with serving(tiny_folder, tmp_path, f'on_kill = "{on_kill}"\n{POLICY}') as server:

        def client(number: int) -> None:
            with httpx.Client(base_url=server.url, timeout=60, headers=bearer("all")) as http:
                for turn in range(1000):
                    asked_when_off = off.is_set()
                    with http.stream(
                        "POST", "/v1/completions", json=LONG | {"steer": "refusal", "stream": True}
                    ) as answer:
                        lines = answer.iter_lines()
                        begun = next(lines, "")
                        if turn == 0:
                            first_lines.wait()
                        text = "\n".join([begun, *lines])
                    said[number].append(f"{answer.status_code} {text}")
                    if asked_when_off:
                        late.append(answer.status_code)
                        return

        threads = [threading.Thread(target=client, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        first_lines.wait()
        told = switch(server, False, reason="a drill").json()
        off.set()
        assert told["enabled"] is False
        assert ask(server, "all").status_code == 200
        assert server.client.get("/health").json()["steering"] == "off"
        for thread in threads:
            thread.join()
        assert late == [503] * 8
        assert "steering_off" in said[0][-1]
        assert "a drill" in said[0][-1]
        if on_kill == "abort":
            assert told["running"] <= 8
            ended = [
                text for texts in said.values() for text in texts if text.startswith("200") and "steering_off" in text
            ]
            assert len(ended) >= 1
            assert all(text.rstrip().endswith("data: [DONE]") for text in ended)
        else:
            assert not [text for texts in said.values() for text in texts if text.startswith("200") and "error" in text]
        refused = ask(server, "all", steer="refusal")
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "steering_off")
        assert int(refused.headers["retry-after"]) > 0
        assert switch(server, True).json()["enabled"] is True
        assert receipt(ask(server, "all", steer="refusal"))
    lines = events(tmp_path)
    moves = [line["seq"] for line in lines if line["event"] == "switch"]
    assert not [line for line in lines if line["event"] == "admitted" and moves[0] < line["seq"] < moves[1]]
    outcomes = {line["outcome"] for line in lines if line["event"] == "ended"}
    assert outcomes == ({"ok", "aborted"} if on_kill == "abort" else {"ok"})
    assert verify([tmp_path / "audit.jsonl"]).problems == []


def test_an_aborted_answer_is_an_error_to_the_openai_client(tiny_folder: Path, tmp_path: Path) -> None:
    with serving(tiny_folder, tmp_path, f'on_kill = "abort"\n{POLICY}') as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=SECRETS["all"], max_retries=0)
        options: dict[str, Any] = {k: v for k, v in BODY.items() if k != "max_tokens"} | {
            "max_tokens": 480,
            "extra_body": {"steer": "refusal", "ignore_eos": True},
        }
        stream = client.completions.create(stream=True, **options)
        next(iter(stream))
        switch(server, False)
        with pytest.raises(openai.APIError, match="switched off"):
            list(stream)
        switch(server, True)
        answers: list[Any] = []

        def whole() -> None:
            try:
                client.completions.create(**options)
            except openai.APIStatusError as error:
                answers.append((error.status_code, error.code))

        thread = threading.Thread(target=whole)
        thread.start()
        eventually(lambda: server.client.get("/v1/steering", headers=bearer("all")).json()["running"] == 1)
        switch(server, False)
        thread.join()
        assert answers == [(503, "steering_off")]
        eventually(lambda: server.client.get("/health").json()["in_flight"] == 0)


def test_what_a_key_with_required_directions_gets_while_steering_is_off(tmp_path: Path) -> None:
    async def tried(text: str) -> tuple[int, int, list[Any]]:
        folder = tmp_path / str(len(text))
        folder.mkdir()
        inside = Inside(folder, text, audited=False)
        inside.start()
        inside.control.switch(False, Caller())
        asked, _, _ = await inside.post(BODY | {"steer": "refusal"}, bearer("bound"))
        status, told, _ = await inside.post(BODY, bearer("bound"))
        inside.control.stop()
        return asked, status, json.loads(told.get("x-steer-applied", "[]"))

    assert asyncio.run(tried(POLICY)) == (503, 503, [])
    assert asyncio.run(tried(f'required_when_off = "plain"\n{POLICY}')) == (503, 200, [])


def test_the_commands_off_and_on(tiny_folder: Path, tmp_path: Path) -> None:
    def run(*arguments: str, key: str | None) -> subprocess.CompletedProcess[str]:
        environment = {k: v for k, v in os.environ.items() if k != "STEER_API_KEY"}
        environment |= {"STEER_API_KEY": SECRETS[key]} if key else {}
        command = [sys.executable, "-m", "steer.cli", *arguments, "--url", server.url]
        return subprocess.run(command, capture_output=True, text=True, env=environment)

    with serving(tiny_folder, tmp_path) as server:
        done = run("off", "--reason", "night", key="all")
        assert done.stdout == "steering is off; steered requests still running: 0\n"
        state = server.client.get("/v1/steering", headers=bearer("reader")).json()
        assert (state["enabled"], state["reason"], "audit" in state) == (False, "night", False)
        assert run("on", key="all").stdout.startswith("steering is on")
        denied, stranger = run("off", key="reader"), run("off", key=None)
        assert (denied.returncode, stranger.returncode) == (2, 2)
        assert "needs a key with the managing role" in denied.stderr
        assert "STEER_API_KEY" in stranger.stderr
    assert "http" in run("off", key="all").stderr


# -- the policy -------------------------------------------------------------------------------------------------------


def test_a_new_policy_holds_at_once_and_a_bad_one_changes_nothing(tiny_folder: Path, tmp_path: Path) -> None:
    with serving(tiny_folder, tmp_path) as server:
        path = tmp_path / "policy.toml"
        assert receipt(ask(server, "reader", steer="refusal"))
        path.write_text(POLICY + "\n[keys.reader]\n")  # twice: not TOML
        eventually(lambda: server.client.get("/health").json()["policy"] == "stale")
        assert receipt(ask(server, "reader", steer="refusal"))
        assert "reader" not in server.client.get("/health").text
        told = server.client.get("/v1/steering", headers=bearer("all")).json()["policy"]
        assert "not TOML" in told["problems"][0]
        assert "the old one stays in force" in server.log
        fresh = tmp_path / "fresh"
        fresh.write_text(
            POLICY.replace("max_strength = 1.0", "max_strength = 0.5").replace("[keys.meter]", "[keys.gauge]")
        )
        os.replace(fresh, path)
        eventually(lambda: server.client.get("/health").json()["policy"] == "ok")
        assert ask(server, "reader", steer="refusal").status_code == 403
        assert receipt(ask(server, "reader", steer="refusal=0.5"))
        path.unlink()
        eventually(lambda: server.client.get("/health").json()["policy"] == "stale")
        assert ask(server, "reader", steer="refusal").status_code == 403
        path.write_text(f'[keys.all]\nhash = "{HASH["all"]}"\nmanage = true')
        eventually(lambda: ask(server, "reader").status_code == 401)
        metrics = server.client.get("/metrics", headers=bearer("all")).text
        assert 'steer_policy_reloads_total{result="ok"} 2.0' in metrics
        assert 'steer_policy_reloads_total{result="failed"} 2.0' in metrics
    assert [line["outcome"] for line in events(tmp_path) if line["event"] == "policy"] == [
        "refused",
        "ok",
        "refused",
        "ok",
    ]


@pytest.mark.parametrize("trouble", ["the file is gone", "the thread is gone"])
def test_a_policy_that_is_read_no_more_lets_nobody_in(
    trouble: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A key may have been taken away in it."""
    monkeypatch.setattr(control, "STALLED", 0.3)
    monkeypatch.setattr(follow, "EVERY", 0.05)
    inside = Inside(tmp_path, POLICY)
    if trouble == "the thread is gone":
        monkeypatch.setattr(Follower, "_run", lambda self: None)
    inside.start()
    try:
        if trouble == "the file is gone":
            assert asyncio.run(inside.post(BODY, bearer("reader")))[0] == 200
            inside.policy.unlink()
        eventually(lambda: inside.control.health()["policy"] == "unread")
        status, told, body = asyncio.run(inside.post(BODY, bearer("reader")))
        assert (status, json.loads(body)["error"]["code"], told["retry-after"]) == (503, "policy_unread", "10")
        assert asyncio.run(inside.post(BODY, {"Authorization": "Bearer unknown"}))[0] == 401
        assert asyncio.run(inside.post(b"", path="/health", method="GET"))[0] == 200, "which says so"
        if trouble == "the file is gone":
            inside.policy.write_text(POLICY)
            eventually(lambda: inside.control.health()["policy"] == "ok")
            assert asyncio.run(inside.post(BODY, bearer("reader")))[0] == 200
    finally:
        inside.control.stop()


def test_health_says_how_it_is_with_what_follows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside = Inside(tmp_path, POLICY)
    inside.registry.folder = tmp_path / "directions"
    inside.registry.folder.mkdir()
    inside.registry.follow()
    inside.start()
    try:
        health = inside.control.health()
        assert (health["policy"], health["folder"]) == ("ok", "ok")
        ages = health["seconds_since_look"]
        assert ages.keys() == {"policy", "folder"}
        assert all(0 <= age < follow.STALLED for age in ages.values())
        monkeypatch.setattr(follow, "STALLED", -1)
        health = inside.control.health()
        assert (health["policy"], health["folder"]) == ("stalled", "stalled")
        inside.registry.stop()
        assert inside.control.health()["folder"] == "dead"
    finally:
        inside.control.stop()
        inside.registry.stop()


def test_a_default_of_the_server_is_only_for_keys_that_might_ask_for_it(tiny_folder: Path, tmp_path: Path) -> None:
    with serving(tiny_folder, tmp_path, POLICY, "--default-steer", "verbosity=0.25") as server:
        given = {
            key: [e["direction"] for e in receipt(ask(server, key))] for key in ("all", "reader", "mute", "nothing")
        }
        assert given == {"all": ["verbosity"], "reader": [], "mute": [], "nothing": []}
        assert [e["strength"] for e in receipt(ask(server, "eager"))] == [0.5]


def test_required_steering_that_is_not_there_is_never_left_out(tmp_path: Path) -> None:
    inside = Inside(tmp_path, POLICY, audited=False)
    inside.registry.delete("verbosity")
    status, _, body = asyncio.run(inside.post(BODY, bearer("bound")))
    assert (status, json.loads(body)["error"]["code"]) == (503, "required_unavailable")
    assert b"verbosity" not in body


def test_rates_are_held_and_say_when_to_come_again(tmp_path: Path) -> None:
    text = POLICY + f'\n[keys.slow]\nhash = "{keys.stored("slow")}"\nrequests_per_minute = 3\n'
    text += f'\n[keys.short]\nhash = "{keys.stored("short")}"\ntokens_per_minute = {PROMPT + COMPLETION + 1}\n'
    inside = Inside(tmp_path, text)
    inside.start()

    async def statuses(key: str, count: int) -> list[tuple[int, str | None]]:
        answers = [await inside.post(BODY, {"Authorization": f"Bearer {key}"}) for _ in range(count)]
        return [(status, told.get("retry-after")) for status, told, _ in answers]

    async def run() -> None:
        assert await statuses("slow", 5) == [(200, None)] * 3 + [(429, "20")] * 2
        answers = await statuses("short", 4)
        assert [status for status, _ in answers] == [200, 200, 429, 429]
        assert 40 <= int(answers[-1][1] or 0) <= 60

    asyncio.run(run())
    inside.control.stop()
    kept = [line for line in inside.lines() if line["event"] == "refused"]
    assert [(line["key"], line["detail"]["rule"]) for line in kept] == [
        ("slow", "requests_per_minute"),
        ("short", "tokens_per_minute"),
    ]


def test_a_bucket_fills_evenly_and_holds_a_minute() -> None:
    now = [0.0]
    meter = Meter(lambda: now[0])
    meter.charge("a", 60, 60)
    assert meter.wait("a", 60, 1) == pytest.approx(1)
    now[0] = 0.5
    assert meter.wait("a", 60, 1) == pytest.approx(0.5)
    now[0] = 1000
    assert meter.wait("a", 60, 60) == 0
    meter.charge("a", 60, 90)
    assert meter.wait("a", 60, 1) == pytest.approx(31)
    assert meter.wait("b", 60, 1) == meter.wait("a", None, 1e9) == 0
    assert meter.wait("b", 60, 600) == 0, "more than a bucket holds is let in when it is full"


def test_the_readout_is_a_right_where_there_is_a_policy() -> None:
    rules = read(POLICY.encode()).policy.keys["reader"]
    Caller().check_readout()
    Caller("reader", rules.model_copy(update={"readout": True})).check_readout()
    with pytest.raises(Refusal, match="readout = true"):
        Caller("reader", rules).check_readout()


# -- the audit log ----------------------------------------------------------------------------------------------------


def test_a_full_disk_stops_steered_requests_and_nothing_else(tiny_folder: Path, tmp_path: Path) -> None:
    """The server's files are kept from growing, which is what a full disk does to them."""
    with serving(tiny_folder, tmp_path) as server:
        log = tmp_path / "audit.jsonl"
        assert receipt(ask(server, "all", steer="refusal"))
        eventually(lambda: events(tmp_path)[-1]["event"] == "ended")
        resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (log.stat().st_size, resource.RLIM_INFINITY))
        refused = ask(server, "all", steer="refusal")
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "audit_unavailable")
        assert ask(server, "bound").status_code == 503
        assert ask(server, "all").status_code == 200
        assert ask(server, "reader", steer="refusal=2").status_code == 403
        assert server.client.get("/health").json()["audit"] == "failed"
        assert server.client.get("/health").status_code == 200
        unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
        resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, unlimited)
        assert receipt(ask(server, "all", steer="refusal"))
        assert server.client.get("/health").json()["audit"] == "ok"
        pins = [card["requests"] for card in server.client.get("/v1/directions", headers=bearer("all")).json()["data"]]
        assert not any(pins)
    report = verify([log])
    assert report.problems == []
    [recovered] = [line for line in events(tmp_path) if line["event"] == "recovered"]
    assert recovered["detail"]["lost"]["refused"] == 3


def test_a_killed_server_leaves_a_log_that_goes_on(tiny_folder: Path, tmp_path: Path) -> None:
    with serving(tiny_folder, tmp_path) as server:
        assert receipt(ask(server, "all", steer="refusal"))
        with pytest.raises(RuntimeError, match="is being written by another process"):
            with serving(tiny_folder, tmp_path):
                pass
        server.process.kill()
        server.process.wait()
    with (tmp_path / "audit.jsonl").open("ab") as file:
        file.write(b'{"time":"2026')
    with serving(tiny_folder, tmp_path) as server:
        assert receipt(ask(server, "all", steer="refusal"))
    report = verify([tmp_path / "audit.jsonl"])
    assert report.problems == []
    assert "a crash or a full disk" in report.notes[0]
    assert [line["event"] for line in events(tmp_path)].count("start") == 2


# -- starting ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--host", "0.0.0.0"], "there are no keys: give a --policy with keys, or say --insecure"),
        (["--host", "::"], "there are no keys"),
        (["--host", "example.org"], "there are no keys"),
        (["--policy", "/nowhere.toml"], "/nowhere.toml: cannot be read"),
        (["--audit", "/nowhere/audit.jsonl"], "the audit file /nowhere/audit.jsonl cannot be written"),
        (["--cors-origins", "example.org"], "accepted: origins like https://example.org"),
    ],
)
def test_a_server_that_would_not_be_safe_does_not_start(options: list[str], says: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "steer.cli", "serve", "--backend", "transformers", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def test_without_a_policy_this_machine_may_do_everything_and_the_log_says_so(tiny_folder: Path, tmp_path: Path) -> None:
    with serving(
        tiny_folder, tmp_path, None, "--cors-origins", "https://example.org", "--steering", "--no-insecure"
    ) as server:
        assert "everybody on this machine may do everything" in server.log
        assert receipt(ask(server, None, steer="refusal"))
        assert server.client.post("/v1/steering", json={"enabled": False}).json()["enabled"] is False
        assert ask(server, None, steer="refusal").status_code == 503
        assert server.client.post("/v1/steering", content=b'{"enabled": true}').status_code == 415, "a form is no JSON"
        assert server.client.delete("/v1/directions/verbosity").status_code == 200
        page = {"Origin": "https://example.org", "Access-Control-Request-Method": "POST"}
        assert server.client.options("/v1/completions", headers=page).headers["access-control-allow-origin"]
        other = page | {"Origin": "https://evil.example"}
        assert "access-control-allow-origin" not in server.client.options("/v1/completions", headers=other).headers
    assert [line["key"] for line in events(tmp_path) if line["event"] == "admitted"] == [None]


def test_insecure_must_be_said(tiny_folder: Path, tmp_path: Path) -> None:
    with serving(tiny_folder, tmp_path, None, "--host", "0.0.0.0", "--insecure") as server:
        assert "INSECURE" in server.log
        assert receipt(ask(server, None, steer="refusal"))


async def _from(app: Any, peer: str) -> int:
    async def there(scope: Any, receive: Any, send: Any) -> None:
        await app({**scope, "client": (peer, 1)}, receive, send)

    body = {"enabled": False}
    return (await post(there, body, {"Content-Type": "application/json"}, "/v1/steering"))[0]


def test_without_keys_steering_is_switched_from_this_machine_alone(tmp_path: Path) -> None:
    from fastapi import FastAPI

    from steer.serve import switch as switching

    inside = Inside(tmp_path, audited=False)
    app = FastAPI()
    app.include_router(switching.router(inside.control))
    assert asyncio.run(_from(app, "192.0.2.7")) == 403
    assert inside.control.steering
    assert asyncio.run(_from(app, "127.0.0.1")) == 200
    assert not inside.control.steering


def test_which_addresses_are_this_machines() -> None:
    for host in ("127.0.0.1", "127.8.8.8", "::1", "[::1]", "localhost", "::ffff:127.0.0.1"):
        assert is_loopback(host), host
    for host in (
        None,
        "",
        "0.0.0.0",
        "::",
        "10.0.0.1",
        "example.org",
        "localhost.example.org",
        "127.0.0.1.example.org",
    ):
        assert not is_loopback(host), host


def test_the_command_that_makes_keys(tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"

    def run(*arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        done = subprocess.run([sys.executable, "-m", "steer.cli", "keys", *arguments], capture_output=True, text=True)
        assert done.returncode == code, done.stderr
        return done

    first = run("new", "alice", "--policy", str(path), "--direction", "refusal").stdout.strip()
    assert path.stat().st_mode & 0o777 == 0o600
    path.write_text(f"# who may what\n{path.read_text()}max_strength = 0.5  # no more\n")
    second = run("new", "bob.b", "--policy", str(path), "--manage").stdout.strip()
    assert "# who may what" in path.read_text()
    assert "max_strength = 0.5  # no more" in path.read_text()
    assert first not in path.read_text()
    found = read(path.read_bytes())
    assert (found.keyring.find(first), found.keyring.find(second)) == ("alice", "bob.b")
    assert (found.policy.keys["alice"].directions, found.policy.keys["bob.b"].manage) == (("refusal",), True)
    assert "there is a key 'alice'" in run("new", "alice", "--policy", str(path), code=2).stderr
    assert "is not a key's name" in run("new", "a b", code=2).stderr
    shown = run("new", "carol").stderr
    assert "[keys.carol]\nhash = " in shown
    listed = run("list", "--policy", str(path)).stdout
    assert "alice" in listed
    assert "sha256" not in listed + run("list", "--policy", str(path), "--json").stdout


# -- our own OpenAPI document -----------------------------------------------------------------------------------------


def test_no_request_that_the_document_allows_is_a_server_error(tiny_folder: Path, tmp_path: Path) -> None:
    with serving(tiny_folder, tmp_path) as server:
        document = server.client.get("/openapi.json", headers=bearer("all")).json()
        schema = schemathesis.openapi.from_dict(document).exclude(path="/v1/steering", method="POST")
        paths = set(document["paths"])
        assert paths >= {"/v1/completions", "/v1/chat/completions", "/v1/directions/{name}", "/v1/steering", "/health"}
        tried: Counter[str] = Counter()

        for result in schema.get_all_operations():

            @settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), database=None)
            @given(case=result.ok().as_strategy())
            def check(case: Any) -> None:
                answer = case.call(base_url=server.url, headers=bearer("all"))
                tried[case.path] += 1
                assert answer.status_code < 500, f"{case.method} {case.path}: {answer.status_code} {answer.text[:500]}"

            check()
        assert set(tried) == paths
        assert server.process.poll() is None
