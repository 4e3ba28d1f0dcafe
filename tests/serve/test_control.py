"""What an operator does to a server: start it safely, switch it off, change its policy, fill its disk."""

from __future__ import annotations

import asyncio
import json
import os
import random
import resource
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import schemathesis
import uvicorn
from hypothesis import HealthCheck, given, settings

from steer import watch
from steer.serve import control
from steer.serve.audit import verify
from steer.serve.authorise import Caller, Refusal
from steer.serve.body import tokens_of
from steer.serve.connection import PROTOCOL
from steer.serve.origin import is_loopback
from steer.serve.policy import hash_of, read
from steer.serve.routes import health
from steer.shared import Shared
from steer.watch import Follower
from tests import models
from tests.serve.inside import COMPLETION, PROMPT, Inside, engine, post
from tests.serve.rules import CASES, HASH, POLICY, SECRETS, bearer, carried
from tests.servers import Server, receipt
from tests.waiting import eventually

COMPLETIONS = "/v1/completions"
BODY = {"model": "tiny", "prompt": "hello", "max_tokens": 2, "temperature": 0}
#: Long enough to be running when the switch moves.
LONG = BODY | {"max_tokens": 480, "ignore_eos": True}


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
            assert status == case.gets[0], (case, more, told)
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
    lines = [json.loads(line) for path in [inside.log, *files] for line in path.read_text().splitlines()]
    found = Counter(line["event"] for line in lines)
    assert found["admitted"] == found["ended"] == expected["steered"] > 1000
    refused = [line for line in lines if line["event"] == "refused"]
    told = sum((line["outcome"] != "summed") + line["detail"].get("unkept", 0) for line in refused)
    assert told == expected["refused"] > 1000 > len(refused), "all are told of, and few one by one"
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
        eventually(lambda: server.client.get("/health", headers=bearer("all")).json()["in_flight"] == 0)


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


def test_a_rule_on_a_direction_is_told_by_the_name_that_was_asked_for(tmp_path: Path) -> None:
    """Not by others of the same file, of which the key may not know."""
    key = f'[keys.all]\nhash = "{HASH["all"]}"\ndirections = ["copy"]\nconditions = true\n'
    rules = '[directions.refusal]\nmax_strength = 0.1\ntokens = []\nlayers = "0"\nconditions = false\n'
    inside = Inside(tmp_path, rules + key, audited=False)
    inside.start()
    body = BODY | {"steer": "copy?copy@0>9=0.7"}
    status, _, told = asyncio.run(inside.post(body, bearer("all")))
    inside.control.stop()
    assert status == 403
    assert told.count(b"direction 'copy'") == 5
    assert b"refusal" not in told


def test_the_commands_off_and_on(tiny_folder: Path, tmp_path: Path) -> None:
    def run(*arguments: str, key: str | None) -> subprocess.CompletedProcess[str]:
        environment = {k: v for k, v in os.environ.items() if k != "STEER_API_KEY"}
        environment |= {"STEER_API_KEY": SECRETS[key]} if key else {}
        command = [sys.executable, "-m", "steer", *arguments, "--url", server.url]
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
        path, fresh = tmp_path / "policy.toml", tmp_path / "fresh"
        assert receipt(ask(server, "reader", steer="refusal"))
        fresh.write_text(POLICY + "\n[keys.reader]\n")  # twice: not TOML
        os.replace(fresh, path)  # at once: a file that is written in place may be read half written
        eventually(lambda: server.client.get("/health").json()["policy"] == "stale")
        assert receipt(ask(server, "reader", steer="refusal"))
        assert "reader" not in server.client.get("/health").text
        told = server.client.get("/v1/steering", headers=bearer("all")).json()["policy"]
        assert "not TOML" in told["problems"][0]
        assert "the old one stays in force" in server.log
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
        fresh.write_text(f'[keys.all]\nhash = "{HASH["all"]}"\nmanage = true')
        os.replace(fresh, path)
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
    monkeypatch.setattr(watch, "EVERY", 0.05)
    inside = Inside(tmp_path, POLICY)
    if trouble == "the thread is gone":
        monkeypatch.setattr(Follower, "_run", lambda self: None)
    inside.start()
    try:
        if trouble == "the file is gone":
            assert asyncio.run(inside.post(BODY, bearer("reader")))[0] == 200
            inside.policy.unlink()
        eventually(lambda: health(inside.control)["policy"] == "unread")
        status, told, body = asyncio.run(inside.post(BODY, bearer("reader")))
        assert (status, json.loads(body)["error"]["code"], told["retry-after"]) == (503, "policy_unread", "10")
        assert asyncio.run(inside.post(BODY, {"Authorization": "Bearer unknown"}))[0] == 401
        assert asyncio.run(inside.post(b"", path="/health", method="GET"))[0] == 200, "which says so"
        if trouble == "the file is gone":
            inside.policy.write_text(POLICY)
            eventually(lambda: health(inside.control)["policy"] == "ok")
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
        told = health(inside.control)
        assert (told["policy"], told["folder"]) == ("ok", "ok")
        ages = told["seconds_since_look"]
        assert ages.keys() == {"policy", "folder"}
        assert all(0 <= age < watch.STALLED for age in ages.values())
        monkeypatch.setattr(watch, "STALLED", -1)
        told = health(inside.control)
        assert (told["policy"], told["folder"]) == ("stalled", "stalled")
        inside.registry.stop()
        assert health(inside.control)["folder"] == "dead"
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
    text = POLICY + f'\n[keys.slow]\nhash = "{hash_of("slow")}"\nrequests_per_minute = 3\n'
    one = tokens_of(BODY, len(json.dumps(BODY)), 2**15, COMPLETIONS)  # what is taken in advance
    enough = PROMPT + COMPLETION + one
    text += f'\n[keys.short]\nhash = "{hash_of("short")}"\ntokens_per_minute = {enough}\n'
    inside = Inside(tmp_path, text)
    inside.start()

    async def statuses(key: str, count: int) -> list[tuple[int, str | None]]:
        answers = [await inside.post(BODY, {"Authorization": f"Bearer {key}"}) for _ in range(count)]
        return [(status, told.get("retry-after")) for status, told, _ in answers]

    async def run() -> None:
        assert await statuses("slow", 5) == [(200, None)] * 3 + [(429, "20")] * 2
        answers = await statuses("short", 4)
        assert [status for status, _ in answers] == [200, 200, 429, 429]
        assert 0 < int(answers[-1][1] or 0) <= 60

    asyncio.run(run())
    inside.control.stop()
    kept = [line for line in inside.lines() if line["event"] == "refused"]
    assert [(line["key"], line["detail"]["rule"]) for line in kept] == [
        *[("slow", "requests_per_minute")] * 2,
        *[("short", "tokens_per_minute")] * 2,
    ]


GATED = """
[keys.gated]
hash = "{hash}"
directions = ["*"]
manage = true
requests_at_once = {at_once}
tokens_per_minute = 1000
"""


def gated(folder: Path, app: Any, on_kill: str = "finish", at_once: int = 3) -> Inside:
    """A policy with one key more, whose secret is `gated`, around an engine that waits."""
    inside = Inside(
        folder, f'on_kill = "{on_kill}"\n{POLICY}{GATED.format(hash=hash_of("gated"), at_once=at_once)}', app=app
    )
    inside.start()
    return inside


def after(go: asyncio.Event) -> Any:
    """The engine, which does not begin before `go`."""

    async def waiting(scope: Any, receive: Any, send: Any) -> None:
        await go.wait()
        await engine(scope, receive, send)

    return waiting


KEY = {"Authorization": "Bearer gated"}


def test_what_runs_at_once_cannot_take_more_than_what_runs_one_after_the_other(tmp_path: Path) -> None:
    """All that a request may come to is taken before the engine has it, and given back at its end."""

    async def run() -> None:
        go = asyncio.Event()
        inside = gated(tmp_path, after(go), at_once=1000)
        big = BODY | {"n": 4, "max_tokens": 200}
        first = asyncio.create_task(inside.post(big, KEY))
        await asyncio.sleep(0)
        for more in ({"n": 4, "max_tokens": 200}, {"n": 1000}, {"prompt": ["x"] * 500}, {"max_tokens": None}):
            status, told, body = await inside.post(BODY | more, KEY)
            assert (status, json.loads(body)["error"]["code"]) == (429, "rate_limit_exceeded"), more
            assert int(told["retry-after"]) > 0
        small = asyncio.create_task(inside.post(BODY, KEY))
        go.set()
        assert [(await task)[0] for task in (first, small)] == [200, 200]
        assert (await inside.post(big, KEY))[0] == 200, "what was not used was given back"
        inside.control.stop()

    asyncio.run(run())


def test_each_answer_of_a_request_is_one_at_once(tmp_path: Path) -> None:
    """One request with many answers takes as much of the engine as many requests."""

    async def run() -> None:
        go = asyncio.Event()
        inside = gated(tmp_path, after(go))
        for body in ({"n": 4}, {"prompt": ["x"] * 2, "n": 2}, {"best_of": 4}):
            status, _, told = await inside.post(BODY | body, KEY)
            assert (status, json.loads(told)["error"]["param"]) == (400, next(iter(body))), body
            assert "4 answers, and this key may have 3 at once" in json.loads(told)["error"]["message"]
        running = asyncio.create_task(inside.post(BODY | {"n": 2}, KEY))
        await asyncio.sleep(0)
        assert (await inside.post(BODY | {"n": 2}, KEY))[0] == 429
        one = asyncio.create_task(inside.post(BODY, KEY))
        await asyncio.sleep(0)
        assert (await inside.post(BODY, KEY))[0] == 429
        go.set()
        assert [(await task)[0] for task in (running, one)] == [200, 200]
        assert (await inside.post(BODY | {"n": 3}, KEY))[0] == 200, "what had ended was given back"
        inside.control.stop()

    asyncio.run(run())


@pytest.mark.parametrize("path", ["answer", "stream", "refused", "unread", "broken off"])
def test_a_client_that_has_its_whole_answer_may_ask_again(path: str, tmp_path: Path) -> None:
    """Also before the app has returned: what the request held is given back before the end of its answer is sent."""

    async def streaming(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
        for chunk in (b'data: {"choices": []}\n\n', b"data: [DONE]\n\n"):
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    async def failing(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
        inside.control.abort_all()
        await asyncio.sleep(60)

    bodies = {"refused": BODY | {"steer": "nobody"}, "unread": b"{"}
    app = {"stream": streaming, "broken off": failing}.get(path, engine)
    inside = gated(tmp_path, app, at_once=1)
    held: list[float] = []

    def seen(message: Any) -> None:
        if message.get("body"):
            held.append(inside.control.shared.total("at_once:gated"))

    async def run() -> None:
        await post(inside.app, bodies.get(path, BODY), KEY, seen=seen)
        inside.control.stop()

    asyncio.run(run())
    assert held == ([1, 0] if path == "stream" else [0])


def test_an_answer_that_is_not_read_holds_its_place(tmp_path: Path) -> None:
    """Or a key could leave any number of long answers in the memory of the server. One that is read does not: its
    client asks again at once."""
    size = 8 * 2**20

    async def long(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % size)]})
        await send({"type": "http.response.body", "body": b"x" * size})

    inside = gated(tmp_path, long, at_once=1)
    data = json.dumps(BODY).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: {KEY['Authorization']}\r\n"
    asked = f"{head}Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data

    async def answer(reader: asyncio.StreamReader) -> int:
        top = await reader.readuntil(b"\r\n\r\n")
        await reader.readexactly(int(top.lower().split(b"content-length:")[1].split(b"\r\n")[0]))
        return int(top.split(b"HTTP/1.1 ")[-1].split()[0])

    async def run() -> None:
        listening = socket.create_server(("127.0.0.1", 0))
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2**16)  # or the system takes all of an answer
        config = uvicorn.Config(inside.app, http=PROTOCOL, lifespan="off", log_level="error")
        serving = asyncio.create_task((server := uvicorn.Server(config)).serve([listening]))
        one, other = [await asyncio.open_connection(*listening.getsockname(), limit=2**16) for _ in range(2)]
        one[1].write(asked)
        await one[0].readuntil(b"HTTP/1.1 ")
        await asyncio.sleep(0.1)
        other[1].write(asked)
        assert await answer(other[0]) == 429
        await answer(one[0])
        for _ in range(20):
            other[1].write(asked)
            assert await answer(other[0]) == 200
        for _, writer in (one, other):
            writer.close()
        server.should_exit = True
        await serving
        inside.control.stop()

    asyncio.run(run())


def test_a_key_has_so_many_requests_at_once(tmp_path: Path) -> None:
    async def run() -> None:
        go = asyncio.Event()
        inside = gated(tmp_path, after(go))
        running = [asyncio.create_task(inside.post(BODY | {"steer": steer}, KEY)) for steer in ("off", "refusal", None)]
        await asyncio.sleep(0)
        status, told, body = await inside.post(BODY, KEY)
        assert (status, int(told["retry-after"])) == (429, 1)
        assert "requests_at_once (3)" in json.loads(body)["error"]["message"]
        assert asyncio.current_task()
        others = asyncio.create_task(inside.post(BODY, bearer("reader")))
        running[0].cancel()
        await asyncio.gather(running[0], return_exceptions=True)
        running.append(asyncio.create_task(inside.post(BODY, KEY)))
        await asyncio.sleep(0)
        assert (await inside.post(BODY, KEY))[0] == 429, "a place that was left is taken once"
        go.set()
        assert [(await task)[0] for task in (*running[1:], others)] == [200] * 4
        assert (await inside.post(BODY, KEY))[0] == 200
        inside.control.stop()

    asyncio.run(run())


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        BODY | {"steer": "nobody"},
        BODY | {"steer": 7},
        BODY | {"steer": "refusal=99"},
        b"x" * 9 * 2**20,
    ],
    ids=range(7),
)
def test_a_request_that_fails_was_one_too(tmp_path: Path, body: Any) -> None:
    text = POLICY + f'\n[keys.slow]\nhash = "{hash_of("slow")}"\nrequests_per_minute = 3\ntokens_per_minute = 99\n'
    inside = Inside(tmp_path, text, audited=False)

    async def run() -> None:
        statuses = [(await inside.post(body, {"Authorization": "Bearer slow"}))[0] for _ in range(4)]
        assert all(400 <= status < 500 for status in statuses)
        assert [status == 429 for status in statuses] == [False, False, False, True]

    asyncio.run(run())


@pytest.mark.parametrize("value", [None, True, "x", -1, 0, 10**400, [], {}, 2.5, [[]], ["x"], [1]])
def test_a_request_that_makes_no_sense_has_a_size(value: Any) -> None:
    fields = ("max_tokens", "max_completion_tokens", "n", "best_of", "prompt")
    for body in (dict.fromkeys(fields, value), *({field: value} for field in fields)):
        assert 0 <= tokens_of(body, 8, 100, COMPLETIONS) <= 10**9


def test_what_a_request_may_come_to() -> None:
    """Never less than what the engine allows it, whatever stands beside."""

    def come_to(body: dict[str, object], size: int = 0, route: str = COMPLETIONS) -> int:
        return tokens_of(body, size, 1000, route)

    assert come_to({"prompt": "x", "max_tokens": 5}, 400) == 100 + 5
    assert come_to({"prompt": ["x", "y"], "n": 3, "max_tokens": 5}) == 30
    assert come_to({"prompt": [1, 2, 3], "best_of": 4, "max_tokens": 5}) == 32, "a prompt for each answer"
    assert come_to({"max_tokens": 10**9}) == come_to({"max_tokens": None}) == 1000
    assert come_to({}) == 16, "the default of this route"
    assert come_to({"max_tokens": 5.0}) == 5
    assert come_to({"max_tokens": -1}) == come_to({"max_tokens": 0}) == 1000, "as long as it likes"
    assert come_to({"max_tokens": 0, "echo": True}) == 0, "its prompt is all that is asked for"
    for no in ("false", "no", 1):
        assert come_to({"max_tokens": 0, "echo": no}) == 1000, "engines read some texts as false"
    assert come_to({"prompt": "x", "prompt_embeds": ["y"] * 50, "max_tokens": 10}) == 510, "each is answered"
    assert come_to({"prompt_embeds": "y", "max_tokens": 10}) >= 10
    chat, responses, messages = "/v1/chat/completions", "/v1/responses", "/v1/messages"
    assert come_to({"messages": []}, route=chat) == 1000
    assert come_to({"max_tokens": 1, "max_completion_tokens": 200}, route=chat) == 200
    assert come_to({"max_tokens": 1, "max_completion_tokens": "200"}, route=chat) == 1000, "engines read some texts"
    assert come_to({"max_tokens": 1, "max_completion_tokens": 200}, route=f"/root{chat}") == 200
    assert come_to({"max_tokens": 0, "max_output_tokens": 800}, route=responses) == 800
    assert come_to({"max_completion_tokens": 0, "max_tokens": 800}, route=messages) == 800
    for route, other in ((responses, "max_tokens"), (chat, "max_output_tokens"), ("/v1/x", "max_tokens")):
        assert come_to({other: 1}, route=route) == 1000, "a field that the route does not read"
    assert come_to({"max_completion_tokens": 1}) == 16
    assert come_to({"max_tokens": "5"}) == come_to({"max_tokens": True}) == 1000


@pytest.mark.parametrize("on_kill", ["finish", "abort"])
@pytest.mark.parametrize("taken", ["the table", "the secret"])
def test_what_runs_for_a_key_that_is_taken_away_ends_as_the_policy_says(
    tmp_path: Path, on_kill: str, taken: str
) -> None:
    """Plain requests too, and no other key's."""

    async def run() -> None:
        go = asyncio.Event()

        async def streaming(scope: Any, receive: Any, send: Any) -> None:
            headers = [(b"content-type", b"text/event-stream")]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": b"data: 1\n\n", "more_body": True})
            await go.wait()
            await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})

        inside = gated(tmp_path, streaming, on_kill)
        asked = [asyncio.create_task(inside.post(BODY | {"steer": steer}, KEY)) for steer in ("off", "refusal")]
        other = asyncio.create_task(inside.post(BODY | {"steer": "refusal"}, bearer("all")))
        await asyncio.sleep(0.05)
        more = GATED.format(hash=hash_of("new"), at_once=3) if taken == "the secret" else ""
        inside.write(f'on_kill = "{on_kill}"\n{POLICY}{more}')
        await asyncio.sleep(0.05)
        assert all(task.done() == (on_kill == "abort") for task in asked)
        go.set()
        for body in [(await task)[2].decode() for task in asked]:
            assert ("the API key was taken away" in body) == (on_kill == "abort")
            assert body.endswith("data: [DONE]\n\n")
        assert b"error" not in (await other)[2]
        inside.control.stop()
        ended = Counter(line["outcome"] for line in inside.lines() if line["event"] == "ended")
        assert ended == ({"aborted": 1, "ok": 1} if on_kill == "abort" else {"ok": 2})

    asyncio.run(run())


@pytest.mark.parametrize(
    "event", [b'data: {"error": {"message": "x", "code": 500}}\n\n', b"event: error\ndata: {}\n\n"]
)
def test_a_stream_that_ends_in_an_error_did_not_go_well(tmp_path: Path, event: bytes) -> None:
    async def breaking(scope: Any, receive: Any, send: Any) -> None:
        headers = [(b"content-type", b"text/event-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for piece in (b'data: {"choices": []}\n\n', event):
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})

    async def run() -> None:
        inside = gated(tmp_path, breaking)
        await inside.post(BODY | {"steer": "refusal"}, KEY)
        inside.control.stop()
        assert [line["outcome"] for line in inside.lines() if line["event"] == "ended"] == ["error"]

    asyncio.run(run())


@pytest.mark.parametrize(
    ("then", "steer", "status"),
    [
        (POLICY, "refusal", 401),
        (POLICY + GATED.format(hash=hash_of("new"), at_once=3), "off", 401),
        (POLICY + GATED.format(hash=hash_of("gated"), at_once=3) + 'required = "refusal:add=0.5"\n', "off", 200),
        (POLICY + GATED.format(hash=hash_of("gated"), at_once=3) + "max_strength = 0.1\n", "refusal", 403),
    ],
)
def test_a_request_is_judged_by_the_policy_that_holds_when_it_is_whole(
    tmp_path: Path, then: str, steer: str, status: int
) -> None:
    """And not by that of its first byte: clients open connections in advance."""

    async def run() -> None:
        inside = gated(tmp_path, engine, "finish")
        whole = asyncio.Event()
        asked = asyncio.create_task(inside.post(BODY | {"steer": steer}, KEY, whole=whole))
        await asyncio.sleep(0.02)
        inside.write(then)
        whole.set()
        got, headers, _ = await asked
        assert got == status
        if got == 200:
            assert json.loads(headers["x-steer-applied"])[0]["mode"] == "add"
        assert headers["x-request-id"].startswith("req-")
        inside.control.stop()
        assert not inside.control.shared.total("at_once:gated")

    asyncio.run(run())


def test_who_manages_must_do_so_when_the_request_is_whole(tiny_folder: Path, tmp_path: Path) -> None:
    with serving(tiny_folder, tmp_path) as server:
        held = []
        for path, kind, body in (
            ("/v1/steering", "application/json", b'{"enabled": false}'),
            ("/v1/directions/evil", "application/octet-stream", models.direction(models.tiny("llama")).to_bytes()),
        ):
            connection = socket.create_connection(("127.0.0.1", server.port), timeout=30)
            head = f"{'POST' if kind.endswith('json') else 'PUT'} {path} HTTP/1.1\r\nHost: localhost\r\n"
            head += f"Authorization: Bearer {SECRETS['all']}\r\nContent-Type: {kind}\r\n"
            connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body[:-1])
            held.append((connection, body[-1:]))
        policy = tmp_path / "policy.toml"
        fresh = tmp_path / "fresh.toml"
        fresh.write_text(POLICY.replace("manage = true", "manage = false"))
        fresh.replace(policy)
        eventually(lambda: ask_manages(server) == 403)
        for connection, last in held:
            connection.sendall(last)
            assert b"403" in connection.recv(4096).split(b"\r\n")[0]
            connection.close()
        assert server.client.get("/health").json()["steering"] == "on"


def ask_manages(server: Server) -> int:
    return server.client.delete("/v1/directions/nothing", headers=bearer("all")).status_code


def test_what_a_policy_can_never_apply_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """At the start, and of a policy that comes later."""
    wrong = f'[keys.never]\nhash = "{hash_of("never")}"\nrequired = "refusal@thinking"\n'
    inside = Inside(tmp_path, POLICY + wrong, audited=False)
    inside.start()
    assert inside.control.follower is not None
    inside.control.follower.stop()  # or its thread reads a file before `write` does, and logs after this has looked
    try:
        for policy in (None, POLICY, POLICY + wrong):
            if policy is not None:
                caplog.clear()
                inside.write(policy)
            told = "the required steering of the key 'never' cannot be applied: tokens: 'thinking'" in caplog.text
            assert told == (policy != POLICY)
            assert "steering of the key 'bound'" not in caplog.text
    finally:
        inside.control.stop()


def test_rules_of_a_direction_that_is_not_served_are_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A misspelt one limits nothing. At the start, and of a policy that comes later."""
    rules = "[directions.refuasl]\nmax_strength = 0.1\n[directions.copy]\nmax_strength = 0.1\n"
    key = f'[keys.all]\nhash = "{HASH["all"]}"\ndirections = ["*"]\ndefault = "verbosty"\n'
    key += f'[keys.one]\nhash = "{hash_of("one")}"\ndirections = ["verbostity"]\n'
    inside = Inside(tmp_path, rules + key, audited=False)
    inside.start()
    assert inside.control.follower is not None
    inside.control.follower.stop()
    try:
        for policy in (None, POLICY, rules + key):
            if policy is not None:
                caplog.clear()
                inside.write(policy)
            told = [text for text in caplog.messages if "that are not served" in text]
            assert told == [
                "the policy limits directions that are not served: refuasl; served: copy, refusal, verbosity",
                "the policy needs directions that are not served: verbosty; served: copy, refusal, verbosity",
                "the policy lets keys use directions that are not served: verbostity; served: copy, refusal, verbosity",
            ] * (policy != POLICY)
    finally:
        inside.control.stop()


def test_what_is_wrong_with_a_default_is_not_told_to_its_key(tmp_path: Path) -> None:
    """The reason names what is served."""
    inside = Inside(tmp_path, POLICY, audited=False)
    inside.registry.delete("refusal")
    status, _, body = asyncio.run(inside.post(BODY, bearer("eager")))
    assert (status, json.loads(body)["error"]["code"]) == (503, "default_unavailable")
    assert not [name for name in ("refusal", "verbosity", "copy") if name in body.decode()]


def test_a_key_is_told_nothing_of_what_others_do(tiny_folder: Path, tmp_path: Path) -> None:
    with serving(tiny_folder, tmp_path) as server:
        for key, told in (("reader", False), ("all", True)):
            [card, *_] = server.client.get("/v1/directions", headers=bearer(key)).json()["data"]
            one = server.client.get("/v1/directions/refusal", headers=bearer(key)).json()
            state = server.client.get("/v1/steering", headers=bearer(key)).json()
            assert ("requests" in card, "requests" in one, "running" in state) == (told,) * 3


@pytest.mark.parametrize("odd", ["a name that is no text", "a FIFO", "a folder", "a device", "a link to itself"])
def test_the_policy_is_followed_whatever_lies_in_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, odd: str
) -> None:
    monkeypatch.setattr(watch, "EVERY", 0.05)
    inside = Inside(tmp_path, POLICY)
    inside.start()
    try:
        if odd == "a name that is no text":
            os.close(os.open(os.fsencode(tmp_path) + b"/notes\xe9", os.O_CREAT | os.O_WRONLY))
        else:
            inside.policy.unlink()
            if odd == "a FIFO":
                os.mkfifo(inside.policy)
            elif odd == "a folder":
                inside.policy.mkdir()
            else:
                inside.policy.symlink_to("/dev/zero" if odd == "a device" else inside.policy)
            eventually(lambda: health(inside.control)["policy"] == "stale")
            assert asyncio.run(inside.post(BODY, bearer("reader")))[0] == 200, "the old one is in force"
        looked = health(inside.control)["seconds_since_look"]["policy"]
        fresh = tmp_path / "fresh"
        fresh.write_text(f'[keys.all]\nhash = "{HASH["all"]}"')
        if odd == "a folder":
            inside.policy.rmdir()
        os.replace(fresh, inside.policy)
        eventually(lambda: asyncio.run(inside.post(BODY, bearer("reader")))[0] == 401)
        assert looked < watch.STALLED
        assert health(inside.control)["policy"] == "ok"
    finally:
        inside.control.stop()


def test_a_line_is_short_whatever_is_asked_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    inside = Inside(tmp_path, POLICY)
    inside.start()
    for more in ({"model": "x" * 300_000}, {"model": "\U0001f600" * 300_000}):
        assert asyncio.run(inside.post(BODY | {"steer": "refusal"} | more, bearer("all")))[0] == 200
    inside.control.switch(False, Caller("all"), "\x1b[2J\n" * 60)
    inside.control.stop()
    assert max(map(len, inside.log.read_bytes().splitlines())) < 4096
    assert all(record.getMessage().isprintable() for record in caplog.records), "no reason writes into the log"
    assert verify([inside.log]).problems == []


def test_refusals_cannot_fill_the_disk(tmp_path: Path) -> None:
    """And none goes untold."""
    inside = Inside(tmp_path, POLICY)
    inside.start()

    async def refused(count: int) -> None:
        for _ in range(count):
            assert (await inside.post(BODY | {"steer": "refusal=2"}, bearer("reader")))[0] == 403

    asyncio.run(refused(20))
    size = inside.log.stat().st_size
    asyncio.run(refused(300))
    assert inside.log.stat().st_size - size < 4096
    inside.control.stop()
    kept = [line for line in inside.lines() if line["event"] == "refused"]
    assert sum((line["outcome"] != "summed") + line["detail"].get("unkept", 0) for line in kept) == 320


def test_a_disk_that_does_not_answer_stops_nobody_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With `--audit-fsync always` a steered request waits for its line; a plain one and the loop wait for nothing."""
    disk = threading.Event()
    waited: list[str] = []

    def fsync(_fd: int) -> None:
        waited.append(threading.current_thread().name)
        assert disk.wait(30)

    monkeypatch.setattr(os, "fsync", fsync)
    inside = Inside(tmp_path, POLICY, fsync="always")

    async def run() -> None:
        inside.start()
        steered = asyncio.create_task(inside.post(BODY | {"steer": "refusal"}, bearer("all")))
        for _ in range(5):
            assert (await inside.post(BODY, bearer("all")))[0] == 200
        assert not steered.done()
        disk.set()
        assert (await steered)[0] == 200

    asyncio.run(run())
    inside.control.stop()
    assert set(waited) <= {"steer-audit", threading.main_thread().name}
    assert "steer-audit" in waited
    assert verify([inside.log]).problems == []


def test_a_steered_request_whose_line_does_not_reach_the_disk_does_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fsync(_fd: int) -> None:
        raise OSError(5, "Input/output error")

    inside = Inside(tmp_path, POLICY, fsync="always")
    inside.start()
    monkeypatch.setattr(os, "fsync", fsync)
    status, _, body = asyncio.run(inside.post(BODY | {"steer": "refusal"}, bearer("all")))
    assert (status, json.loads(body)["error"]["code"]) == (503, "audit_unavailable")
    monkeypatch.undo()
    assert asyncio.run(inside.post(BODY | {"steer": "refusal"}, bearer("all")))[0] == 200
    inside.control.stop()
    assert not inside.control.runs
    assert Counter(line["event"] for line in inside.lines())["ended"] == 2
    assert verify([inside.log]).problems == []


def test_a_bucket_fills_evenly_and_holds_a_minute() -> None:
    now = [0.0]
    meter = control.RateLimiter("requests", Shared(), lambda: now[0])
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
    rules = read(POLICY.encode()).keys["reader"]
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
        with serving(tiny_folder, tmp_path) as beside:  # two servers of one machine may write one log
            assert receipt(ask(beside, "all", steer="refusal"))
            assert receipt(ask(server, "all", steer="refusal"))
        server.process.kill()
        server.process.wait()
    with (tmp_path / "audit.jsonl").open("ab") as file:
        file.write(b'{"time":"2026')
    with serving(tiny_folder, tmp_path) as server:
        assert receipt(ask(server, "all", steer="refusal"))
    report = verify([tmp_path / "audit.jsonl"])
    assert report.problems == []
    assert any("a crash or a full disk" in note for note in report.notes)
    assert [line["event"] for line in events(tmp_path)].count("start") == 3


# -- starting ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--host", "0.0.0.0"], "there are no keys: give a --policy with keys, or say --insecure"),
        (["--host", "::"], "there are no keys"),
        (["--host", "example.org"], "there are no keys"),
        (["--policy", "/nowhere.toml"], "/nowhere.toml: cannot be read"),
        (["--audit", "/nowhere/audit.jsonl"], "/nowhere/audit.jsonl cannot be written: the folder /nowhere does not"),
        (["--cors-origins", "example.org"], "accepted: origins like https://example.org"),
    ],
)
def test_a_server_that_would_not_be_safe_does_not_start(options: list[str], says: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "steer", "serve", "--backend", "transformers", "--port", "0", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 2
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert "self-check" not in done.stderr, "a large model loads for minutes, and that comes first"


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

    from steer.serve import routes

    inside = Inside(tmp_path, audited=False)
    app = FastAPI()
    routes.put_control_on(app, inside.control)
    assert asyncio.run(_from(app, "192.0.2.7")) == 403
    assert inside.control.steering
    assert asyncio.run(_from(app, "127.0.0.1")) == 200
    assert not inside.control.steering


def test_which_addresses_are_this_machines() -> None:
    for host in ("127.0.0.1", "127.8.8.8", "::1", "[::1]", "localhost", "::ffff:127.0.0.1"):
        assert is_loopback(host), host
    others = (
        None,
        "",
        "0.0.0.0",
        "::",
        "10.0.0.1",
        "example.org",
        "localhost.example.org",
        "127.0.0.1.example.org",
    )
    for other in others:
        assert not is_loopback(other), other


def test_the_command_that_makes_keys(tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"

    def run(*arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        done = subprocess.run([sys.executable, "-m", "steer", "keys", *arguments], capture_output=True, text=True)
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
    assert (found.names[hash_of(first)], found.names[hash_of(second)]) == ("alice", "bob.b")
    assert (found.keys["alice"].directions, found.keys["bob.b"].manage) == (("refusal",), True)
    assert "there is a key 'alice'" in run("new", "alice", "--policy", str(path), code=2).stderr
    assert run("new", "a b", code=2).stderr.startswith("error: 'a b' is not a key's name: 1 to 64")
    run("new", "prometheus", "--policy", str(path), "--metrics")
    watching = read(path.read_bytes()).keys["prometheus"]
    assert (watching.metrics, watching.manage, watching.directions) == (True, False, ())
    shown = run("new", "carol").stderr
    assert "[keys.carol]\nhash = " in shown
    listed = run("list", "--policy", str(path)).stdout
    assert "alice" in listed
    assert "sha256" not in listed + run("list", "--policy", str(path), "--json").stdout


# -- our own OpenAPI document -----------------------------------------------------------------------------------------


def test_requests_that_the_document_allows_get_answers_of_the_document(tiny_folder: Path, tmp_path: Path) -> None:
    with serving(tiny_folder, tmp_path) as server:
        document = server.client.get("/openapi.json", headers=bearer("all")).json()
        schema = schemathesis.openapi.from_dict(document).exclude(path="/v1/steering", method="POST")
        paths = set(document["paths"])
        assert paths >= {"/v1/completions", "/v1/chat/completions", "/v1/directions/{name}", "/v1/steering", "/health"}
        tried: Counter[str] = Counter()

        for result in schema.get_all_operations():

            @settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), database=None)
            @given(case=result.ok().as_strategy())  # type: ignore[union-attr]
            def check(case: Any) -> None:
                answer = case.call(base_url=server.url, headers=bearer("all"))
                tried[case.path] += 1
                assert answer.status_code < 500, f"{case.method} {case.path}: {answer.status_code} {answer.text[:500]}"
                case.operation.validate_response(answer)

            check()
        assert set(tried) == paths
        assert server.process.poll() is None
