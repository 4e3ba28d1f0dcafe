"""Several API servers of one engine: what one is told holds for all, and what keys may use is theirs together."""

from __future__ import annotations

import json
import re
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from steer.direction import digest
from steer.files import write_file
from steer.serve.audit import verify
from steer.serve.policy import hash_of
from tests import models
from tests.servers import Client, Server, front_ends, receipt, stopped_under_streams, text
from tests.vllm import device
from tests.vllm.engines import Home, Reference, are_likeliest
from tests.vllm.test_server import OPTIONS
from tests.waiting import eventually

COUNT = 2
ROWS = 6
SECRETS = {name: f"sk-steer-{name}" for name in ("boss", "slow", "single", "visitor")}
HASHES = {name: hash_of(secret) for name, secret in SECRETS.items()}
POLICY = f"""
on_kill = "abort"
[keys.boss]
hash = "{HASHES["boss"]}"
directions = ["*"]
readout = true
manage = true
[keys.slow]
hash = "{HASHES["slow"]}"
requests_per_minute = 1
[keys.single]
hash = "{HASHES["single"]}"
requests_at_once = 1
"""
VISITOR = f"""
[keys.visitor]
hash = "{HASHES["visitor"]}"
"""
BODY: dict[str, Any] = {"model": "tiny", "prompt": "hello", "max_tokens": 8, "temperature": 0}
#: More answers than run at once, so that it takes several turns.
LONG = BODY | {"max_tokens": 240, "n": 128, "temperature": 1, "ignore_eos": True, "stream": True}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    made = Home.make("llama", tmp_path_factory.mktemp("fronts"))
    (made.directions.parent / "policy.toml").write_text(POLICY)
    return made


@pytest.fixture(scope="module")
def server(home: Home) -> Iterator[Server]:
    root = home.directions.parent
    command = [sys.executable, "-m", "steer", "serve", str(home.folder), "--backend", "vllm", "--rank", "2"]
    ours = ["--directions", str(home.directions), "--rows", str(ROWS), "--readout", "1"]
    more = ["--policy", str(root / "policy.toml"), "--audit", str(root / "audit.jsonl")]
    with Server(
        *(*OPTIONS, *device.ARGUMENTS, *ours, *more, "--enforce-eager", "--api-server-count", str(COUNT)),
        command=command,
    ) as running:
        yield running


@pytest.fixture(scope="module")
def fronts(server: Server) -> Iterator[dict[int, Client]]:
    found = front_ends(server, bearer("boss"))
    assert found.keys() == set(range(COUNT))
    yield found
    for client in found.values():
        client.close()


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {SECRETS[key]}"}


def ask(front: Client, key: str = "boss", **more: Any) -> httpx.Response:
    return front.post("/v1/completions", json=BODY | more, headers=bearer(key))


def test_each_steers(fronts: dict[int, Client], home: Home) -> None:
    reference = Reference(home)
    for front in fronts.values():
        for spec in ("off", "refusal", "refusal:one_sided=0.5,verbosity=-0.5"):
            answer = ask(front, steer=spec, logprobs=1, return_token_ids=True)
            body = answer.json()["choices"][0]
            prompt, ids = body["prompt_token_ids"], body["token_ids"]
            expected = reference.logprobs(prompt + ids, spec)[len(prompt) - 1 : -1]
            assert are_likeliest(ids, expected)
            assert len(receipt(answer)) == (0 if spec == "off" else spec.count(",") + 1)
        for number, holds in ((-1e6, True), (1e6, False)):
            answer = ask(front, steer=f"refusal?verbosity@0>{number}", n=2, temperature=1)
            assert [choice["steer_applied"] for choice in answer.json()["choices"]] == [holds, holds]


def test_what_is_put_or_deleted_through_one_holds_in_all_from_the_answer_on(
    fronts: dict[int, Client], home: Home
) -> None:
    for n, through in fronts.items():
        data = models.direction(home.model, seed=50 + n).to_bytes()
        assert through.put("/v1/directions/guest", content=data).status_code == 200
        answers = [ask(front, steer="guest") for front in fronts.values()]
        assert [receipt(answer)[0]["digest"] for answer in answers] == [digest(data)] * COUNT
        assert len({text(answer) for answer in answers}) == 1
        assert through.delete("/v1/directions/guest").status_code == 200
        assert [ask(front, steer="guest").status_code for front in fronts.values()] == [400] * COUNT


def test_what_is_dropped_into_the_folder_comes_to_all(fronts: dict[int, Client], home: Home) -> None:
    data = models.direction(home.model, seed=60).to_bytes()
    path = home.directions / "dropped.safetensors"
    write_file(path, data)
    for front in fronts.values():
        eventually(lambda front=front: front.get("/v1/directions/dropped").json().get("digest") == digest(data))
    path.unlink()
    for front in fronts.values():
        eventually(lambda front=front: front.get("/v1/directions/dropped").status_code == 404)


def test_swaps_through_different_front_ends_under_load(fronts: dict[int, Client], server: Server, home: Home) -> None:
    """Every answer is the one that its receipt's digest predicts, and no row is lost, however few there are."""
    versions = [models.direction(home.model, seed=seed).to_bytes() for seed in range(31, 35)]
    expected: dict[str | None, str] = {None: text(ask(fronts[0]))}
    for data in versions:
        assert fronts[0].put("/v1/directions/moving", content=data).status_code == 200
        expected[digest(data)] = text(ask(fronts[1], steer="moving"))
    stop, problems, served = threading.Event(), list[str](), Counter[tuple[int, str | None]]()

    def load(number: int) -> None:
        found = front_ends(server, bearer("boss"))
        mine = found[number % COUNT]
        while not stop.is_set():
            answer = ask(mine, steer="moving" if number > 1 else "off")
            which = receipt(answer)[0]["digest"] if answer.status_code == 200 and receipt(answer) else None
            served[number % COUNT, which] += 1
            if answer.status_code != 200 or text(answer) != expected[which]:
                problems.append(f"{which}: {answer.text}")
        for each in found.values():
            each.close()

    threads = [threading.Thread(target=load, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    turn, deadline = 0, time.monotonic() + 120
    while turn < 40 or (len(served) < COUNT * (1 + len(versions)) and time.monotonic() < deadline):
        put = fronts[turn % COUNT].put("/v1/directions/moving", content=versions[turn % len(versions)])
        assert put.status_code == 200, put.text
        turn += 1
    stop.set()
    for thread in threads:
        thread.join()
    assert not problems, problems[:3]
    assert len(served) == COUNT * (1 + len(versions))
    assert fronts[0].delete("/v1/directions/moving").status_code == 200
    for front in fronts.values():
        eventually(lambda front=front: not any(card["requests"] for card in front.get("/v1/directions").json()["data"]))
    for n in range(ROWS - 3):  # all that is left is free for others
        data = models.direction(home.model, seed=70 + n).to_bytes()
        assert fronts[n % COUNT].put(f"/v1/directions/filling{n}", content=data).status_code == 200
    full = fronts[0].put("/v1/directions/over", content=versions[0])
    assert (full.status_code, full.json()["error"]["code"]) == (409, "no_free_rows")
    for n in range(ROWS - 3):
        assert fronts[(n + 1) % COUNT].delete(f"/v1/directions/filling{n}").status_code == 200


def test_the_switch_is_seen_by_the_next_request_of_any(fronts: dict[int, Client]) -> None:
    for through in fronts.values():
        told = through.post("/v1/steering", json={"enabled": False, "reason": "a look"}).json()
        assert not told["enabled"]
        for front in fronts.values():
            refused = ask(front, steer="refusal")
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "steering_off")
            assert "a look" in refused.text
            assert receipt(ask(front)) == []
            assert front.get("/health").json()["steering"] == "off"
        assert through.post("/v1/steering", json={"enabled": True}).json()["enabled"]
        for front in fronts.values():
            assert receipt(ask(front, steer="refusal"))


def test_it_ends_what_runs_on_the_others(fronts: dict[int, Client]) -> None:
    with fronts[1].stream(
        "POST", "/v1/completions", json=LONG | {"steer": "refusal"}, headers=bearer("boss")
    ) as answer:
        lines = answer.iter_lines()
        next(lines)
        told = fronts[0].post("/v1/steering", json={"enabled": False}).json()
        rest = "\n".join(lines)
    assert "steering_off" in rest
    assert told["running"] == 1
    # the other one counts a stream until after its last byte is sent
    eventually(lambda: not fronts[0].post("/v1/steering", json={"enabled": True}).json()["running"])


def test_rates_are_the_keys(fronts: dict[int, Client]) -> None:
    assert ask(fronts[0], "slow").status_code == 200
    refused = ask(fronts[1], "slow")
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "rate_limit_exceeded")
    go_on = threading.Event()

    def slowly() -> Iterator[bytes]:
        yield b"{"
        go_on.wait(1)  # who is refused hears of it only then
        yield json.dumps(BODY)[1:].encode()

    def asking() -> None:  # again and again: what asks below is one request of this key too
        headers = bearer("single") | {"Content-Type": "application/json"}
        while not go_on.is_set():
            fronts[0].post("/v1/completions", content=slowly(), headers=headers)

    running = threading.Thread(target=asking)
    running.start()
    try:
        eventually(lambda: "requests_at_once" in ask(fronts[1], "single").text)
    finally:
        go_on.set()
        running.join()
    eventually(lambda: ask(fronts[1], "single").status_code == 200)


def test_as_many_are_read_as_the_engine_can(fronts: dict[int, Client], server: Server) -> None:
    """Any other is refused, and none is answered with readings that are not there."""

    def read() -> httpx.Response:  # on a connection of its own, to whichever front end
        with Client(base_url=server.url, timeout=120) as client:
            return ask(client, steer_readout="refusal", max_tokens=64, ignore_eos=True)

    with ThreadPoolExecutor(4 * COUNT) as threads:
        jobs = [threads.submit(read) for _ in range(24)]
    answers = [job.result() for job in jobs]
    served = [answer.json()["choices"][0]["steer_readout"] for answer in answers if answer.status_code == 200]
    assert served
    assert all(read == served[0] for read in served)
    for answer in answers:
        assert answer.status_code == 200 or "requests are being read" in answer.text, answer.text
    eventually(lambda: all(ask(front, steer_readout="refusal").status_code == 200 for front in fronts.values()))


def test_a_new_policy_comes_to_all(fronts: dict[int, Client], home: Home) -> None:
    path = home.directions.parent / "policy.toml"
    for policy, status in ((POLICY + VISITOR, 200), (POLICY, 401)):
        write_file(path, policy.encode())
        for front in fronts.values():
            eventually(lambda front=front, status=status: ask(front, "visitor").status_code == status)


def test_metrics_are_of_all_together(fronts: dict[int, Client]) -> None:
    def made(front: Client) -> float:
        found = re.findall(
            r'^steer_requests_total\{direction="refusal",mode="add",outcome="ok"\} (\S+)',
            front.get("/metrics").text,
            re.MULTILINE,
        )
        return sum(map(float, found))

    before = made(fronts[0])
    for n, front in fronts.items():
        for _ in range(n + 1):
            assert receipt(ask(front, steer="refusal:add=0.1"))
    # counted behind an answer's last byte
    eventually(lambda: [made(front) - before for front in fronts.values()] == [sum(n + 1 for n in fronts)] * COUNT)
    eventually(lambda: "\nsteer_steered_running 0.0\n" in fronts[0].get("/metrics").text)
    told = fronts[0].get("/metrics").text
    for line in ("steer_steering_enabled 1.0", "steer_audit_ok 1.0"):
        assert f"\n{line}\n" in told
    assert f"\nsteer_row_capacity {float(ROWS)}\n" in told


def test_the_audit_log_has_the_lines_of_all_in_one_chain(fronts: dict[int, Client], server: Server, home: Home) -> None:
    """The last test: it ends the server. What runs then has its end, or is told that there will be none."""
    log = home.directions.parent / "audit.jsonl"
    heads = [front.get("/v1/steering").json()["audit"]["head"] for front in fronts.values()]
    bodies = [BODY | {"max_tokens": 200, "steer": "refusal"}, LONG]
    asked = [(front, body, bearer("boss")) for front in fronts.values() for body in bodies]
    for said in stopped_under_streams(server, asked):
        assert said.rstrip().endswith("data: [DONE]")
        assert "error" not in said or '"code":"stopping"' in said.replace(" ", "")
    assert verify([log]).problems == []
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert {line["detail"]["front_end"] for line in lines if line["event"] == "start"} == set(fronts)
    assert {f"{line['seq']}:{line['hash']}" for line in lines} >= set(heads)
    admitted = [line["seq"] for line in lines if line["event"] == "admitted"]
    assert sorted(line["admitted"] for line in lines if line["event"] == "ended") == admitted
    assert sum(line["event"] == "stop" for line in lines) == COUNT, "each has had time to end"
