"""Who may do what, on a real server: every rule by every carrier, streamed or not, and every way around them."""

from __future__ import annotations

import contextlib
import json
import select
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from steer.direction import Dataset, FoundCondition
from steer.serve.audit import verify
from tests import models
from tests.serve.rules import CASES, POLICY, SECRETS, bearer, check_table
from tests.servers import Server, receipt

MESSAGES = [{"role": "user", "content": "hello"}]
BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"model": "tiny", "prompt": "hello", "max_tokens": 2, "temperature": 0},
    "/v1/chat/completions": {"model": "tiny", "messages": MESSAGES, "max_tokens": 2, "temperature": 0},
}
PROMPT = "/v1/completions"
COUNTED = Dataset(name="prompts", sha256="0" * 64, count=8)
FOUND = FoundCondition(layer=0, above=0.25, harmful=COUNTED, harmless=COUNTED, missed=1, caught=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("guarded")


@pytest.fixture(scope="module")
def server(tiny_folder: Path, folder: Path) -> Iterator[Server]:
    directions = folder / "directions"
    directions.mkdir()
    model = models.tiny("llama")
    for seed, name in enumerate(("refusal", "verbosity"), 1):
        models.direction(model, seed=seed).with_meta(condition=FOUND).save(directions / f"{name}.safetensors")
    shutil.copy(directions / "refusal.safetensors", directions / "copy.safetensors")
    (folder / "policy.toml").write_text(POLICY)
    with Server(
        *(str(tiny_folder), "--directions", str(directions), "--served-model-name", "tiny"),
        *("--policy", str(folder / "policy.toml"), "--audit", str(folder / "audit.jsonl")),
        directions=directions,
    ) as running:
        yield running


def ask(server: Server, key: str | None, headers: Any = None, route: str = PROMPT, **more: Any) -> httpx.Response:
    sent = list((bearer(key) if key else {}).items()) + list(headers or [])
    return server.client.post(route, json=BODIES[route] | more, headers=sent)


@pytest.mark.parametrize("route", BODIES)
@pytest.mark.parametrize("stream", [False, True])
def test_every_rule_by_every_carrier(server: Server, route: str, stream: bool) -> None:
    check_table(server.client, route, BODIES[route], streams=(stream,))


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [("Authorization", "Bearer sk-steer-wrong")],
        [("Authorization", SECRETS["all"])],
        [("Authorization", f"Basic {SECRETS['all']}")],
        [("Authorization", f"Bearer {SECRETS['all'][:-1]}")],
        [("Authorization", f"Bearer {SECRETS['all']}"), ("Authorization", "Bearer other")],
        [("Authorization", f"Bearer {SECRETS['reader']}"), ("X-Api-Key", SECRETS["all"])],
        [("X-Steer-Caller", "all")],
    ],
)
def test_nothing_is_served_without_one_known_key(server: Server, headers: list[tuple[str, str]]) -> None:
    for method, path in (
        ("POST", PROMPT),
        ("POST", "/v1/chat/completions"),
        ("GET", "/v1/models"),
        ("GET", "/v1/directions"),
        ("GET", "/v1/directions/refusal"),
        ("PUT", "/v1/directions/x"),
        ("DELETE", "/v1/directions/refusal"),
        ("GET", "/v1/steering"),
        ("POST", "/v1/steering"),
        ("GET", "/metrics"),
        ("GET", "/openapi.json"),
        ("GET", "/nowhere"),
        ("OPTIONS", "/v1/models"),
    ):
        answer = server.client.request(method, path, headers=headers)
        assert answer.status_code == 401, (method, path, answer.text)
        assert answer.json()["error"]["code"] == "invalid_api_key"
        assert answer.headers["www-authenticate"] == "Bearer"
        assert "refusal" not in answer.text


def test_a_key_in_the_wrong_place_and_a_wrong_base_url_are_told_as_such(server: Server) -> None:
    """With a client of another make, or a base URL with no /v1 or with two, nobody needs another key."""
    for sent in (SECRETS["all"], f"Basic {SECRETS['all']}", "Bearer"):
        told = server.client.get("/v1/models", headers={"Authorization": sent}).json()["error"]["message"]
        assert told == (
            "an API key is needed: Authorization: Bearer KEY; the request has something else there, or more than one"
        )
    for method, path, meant in (
        ("POST", "/chat/completions", True),
        ("POST", "/v1/v1/chat/completions", True),
        ("GET", "/models", True),
        ("POST", "/pause", False),
        ("POST", "/v1/tokenize", False),
        ("PUT", "/v1/directions/x", False),
    ):
        answer = server.client.request(method, path, headers=bearer("reader"))
        told = answer.json()["error"]["message"]
        assert answer.status_code == 403
        assert (f"{method} {path} needs a key" in told, "the base URL of a client ends in /v1" in told) == (True, meant)


def test_reading_is_a_right_of_its_own_and_goes_no_further_than_steering(server: Server) -> None:
    refused = ask(server, "reader", steer="refusal", steer_readout=True)
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "steering_forbidden")
    assert "readout = true" in refused.json()["error"]["message"]
    for steer in ("off", "refusal=0.5"):
        answer = ask(server, "seer", steer=steer, steer_readout="refusal")
        assert [line["name"] for line in answer.json()["choices"][0]["steer_readout"]["directions"]] == ["refusal"]
    hidden, unknown = (ask(server, "seer", steer_readout=name) for name in ("verbosity", "nobody"))
    assert hidden.status_code == unknown.status_code == 400
    assert hidden.text.replace("verbosity", "nobody") == unknown.text


def test_health_needs_no_key_and_tells_nothing(server: Server) -> None:
    told = server.client.get("/health")
    assert told.status_code == 200
    assert "refusal" not in told.text
    assert (told.json()["steering"], told.json()["policy"], told.json()["audit"]) == ("on", "ok", "ok")
    of_others = {"directions", "failed_directions", "in_flight"}
    assert not of_others & set(told.json())
    assert of_others <= set(server.client.get("/health", headers=bearer("all")).json())


def test_the_key_may_come_as_anthropics_clients_send_it(server: Server) -> None:
    answer = ask(server, None, [("X-Api-Key", SECRETS["reader"])], steer="refusal")
    assert receipt(answer)[0]["direction"] == "refusal"


def test_lists_have_only_what_a_key_may_use(server: Server) -> None:
    def listed(key: str) -> tuple[set[str], set[str]]:
        cards = server.client.get("/v1/models", headers=bearer(key)).json()["data"]
        directions = server.client.get("/v1/directions", headers=bearer(key)).json()["data"]
        return {card["id"].partition("+")[2] for card in cards} - {""}, {d["id"] for d in directions}

    every = {"refusal", "verbosity", "copy"}
    assert listed("reader") == ({"refusal"}, {"refusal"})
    assert listed("nothing") == listed("mute") == (set(), set())
    assert listed("all") == (every, every)
    cards = server.client.get("/v1/directions", headers=bearer("all")).json()["data"]
    most = {card["id"]: (card["may"]["max_strength"], card["may"]["conditions"]) for card in cards}
    assert most["refusal"] == most["copy"] == (2, True), "a rule of a direction holds under its other names"
    assert most["verbosity"] == (10, False)
    narrow = server.client.get("/v1/directions/refusal", headers=bearer("narrow")).json()["may"]
    assert narrow["layers"] == "0-1"
    assert narrow["tokens"] == ["answer", "first-4"]
    for path in ("/v1/directions/verbosity", "/v1/directions/nobody"):
        answer = server.client.get(path, headers=bearer("reader"))
        name = path.rpartition("/")[2]
        assert answer.status_code == 404
        assert answer.json()["error"]["message"] == f"direction '{name}' is not served; served: refusal"
    assert server.client.get("/v1/models/tiny+verbosity", headers=bearer("reader")).status_code == 404


def test_a_condition_that_was_found_is_told_to_those_who_may_write_it(server: Server) -> None:
    def told(key: str, name: str) -> tuple[Any, Any]:
        detail = server.client.get(f"/v1/directions/{name}", headers=bearer(key)).json()
        return detail["condition"], detail["meta"].get("condition")

    assert told("reader", "refusal") == ("refusal@0>0.25", FOUND.model_dump(mode="json"))
    assert told("certain", "refusal") == told("all", "verbosity") == (None, None)


def test_a_forbidden_direction_and_an_unknown_one_differ_in_the_name_alone(server: Server) -> None:
    for spec in ("{}", "{}=0.5", "{}:add", "{}=0", "refusal,{}", "{},{}=0.1"):
        for carrier in ("steer", "xargs", "header", "model"):

            def said(name: str, spec: str = spec, carrier: str = carrier) -> tuple[Any, ...]:
                text = spec.replace("{}", name)
                more: dict[str, Any] = {"steer": text} if carrier == "steer" else {}
                more |= {"vllm_xargs": {"steer": text}} if carrier == "xargs" else {}
                more |= {"model": f"tiny+{text.replace(',', '+')}"} if carrier == "model" else {}
                answer = ask(server, "reader", [("X-Steer", text)] if carrier == "header" else (), **more)
                kept = {k: v for k, v in answer.headers.items() if k not in ("date", "content-length", "x-request-id")}
                return answer.status_code, answer.text.replace(name, "NAME"), kept

            assert said("verbosity") == said("nobodyyyy")


def test_managing_is_a_role_of_its_own(server: Server) -> None:
    data = models.direction(models.tiny("llama"), seed=9).to_bytes()
    for key in ("reader", "nothing", "bound", "meter"):
        for answer in (
            server.client.put("/v1/directions/refusal", content=data, headers=bearer(key)),
            server.client.put("/v1/directions/mine", content=data, headers=bearer(key)),
            server.client.delete("/v1/directions/refusal", headers=bearer(key)),
            server.client.post("/v1/steering", json={"enabled": False}, headers=bearer(key)),
        ):
            assert (answer.status_code, answer.json()["error"]["code"]) == (403, "steering_forbidden")
    assert server.client.put("/v1/directions/new", content=data, headers=bearer("all")).status_code == 200
    assert ask(server, "reader", steer="new").json()["error"]["message"].endswith("served: refusal")
    assert server.client.delete("/v1/directions/new", headers=bearer("all")).status_code == 200


def test_metrics_tell_of_all_directions_so_they_need_a_right(server: Server) -> None:
    assert server.client.get("/metrics", headers=bearer("reader")).status_code == 403
    assert "steer_direction_info" in server.client.get("/metrics", headers=bearer("meter")).text


BYPASSES: dict[str, dict[str, Any]] = {
    "duplicated keys": {"content": b'{"model":"tiny","prompt":"x","steer":"off","steer":"refusal"}'},
    "duplicated keys inside": {
        "content": b'{"model":"tiny","prompt":"x","vllm_xargs":{"steer":"off","steer":"refusal"}}'
    },
    "escaped keys": {"content": b'{"model":"tiny","prompt":"x","st\\u0065er":"refusal"}'},
    "another case": {"json": {"Steer": "refusal", "STEER": "refusal"}},
    "a space before": {"json": {" steer": "refusal"}},
    "two headers": {"headers": [("X-Steer", "off"), ("X-Steer", "refusal")]},
    "two in one header": {"headers": [("X-Steer", "off, refusal")]},
    "a header of another case": {"headers": [("x-STEER", "refusal")]},
    "an underscore": {"headers": [("X_Steer", "refusal")]},
    "a receipt": {"headers": [("X-Steer-Applied", '[{"direction":"refusal"}]')]},
    "a homoglyph": {"json": {"steer": "rеfusal"}},
    "full width": {"json": {"steer": "ｒefusal"}},
    "a combining mark": {"json": {"steer": "refusal\u0301"}},
    "a zero width space": {"json": {"steer": "refusal\u200b"}},
    "half a surrogate pair": {"content": b'{"model":"tiny","prompt":"x","steer":"refusal\\ud800"}'},
    "a null byte": {"json": {"steer": "refusal\u0000"}},
    "a path": {"json": {"steer": "./refusal"}},
    "several plus signs": {"json": {"model": "tiny++refusal"}},
    "an alias of an alias": {"json": {"model": "tiny+off+refusal"}},
    "an encoded plus": {"json": {"model": "tiny%2Brefusal"}},
    "a batch of prompts": {"json": {"prompt": ["x", "y"], "steer": ["refusal", "refusal"]}},
    "a list in a list": {"json": {"steer": [["refusal"]]}},
    "text that is JSON": {"json": {"steer": '[{"direction":"refusal"}]'}},
    "extra_args": {"json": {"extra_args": {"steer": "refusal"}}},
    "extra_body": {"json": {"extra_body": {"steer": "refusal"}}},
    "sampling_params": {"json": {"sampling_params": {"extra_args": {"steer": "refusal"}}}},
    "resolved": {"json": {"vllm_xargs": {"steer.resolved": '[{"direction":"refusal"}]'}}},
    "a path that is a key": {"json": {"vllm_xargs.steer": "refusal"}},
    "a ticket": {"json": {"vllm_xargs": {"steer": "ticket:0123456789abcdef0123456789abcdef"}}},
    "a digest": {"json": {"steer": "0" * 64}},
    "a query": {"params": {"steer": "refusal"}},
    "a cookie": {"headers": [("Cookie", "steer=refusal; X-Steer=refusal")]},
}


@pytest.mark.parametrize("key", ["nothing", "mute"])
@pytest.mark.parametrize("way", BYPASSES)
def test_no_way_around(server: Server, way: str, key: str) -> None:
    """A key without the right gets an error, or exactly what a plain request gets."""
    plain = ask(server, key).json()["choices"][0]["text"]
    how = dict(BYPASSES[way])
    headers = [*bearer(key).items(), *how.pop("headers", [])]
    body = BODIES[PROMPT] | how.pop("json", {})
    content = how.pop("content", json.dumps(body))
    answer = server.client.post(
        PROMPT, content=content, headers=[*headers, ("Content-Type", "application/json")], **how
    )
    assert answer.status_code < 500, answer.text
    if answer.status_code == 200:
        assert receipt(answer) == []
        if "prompt" not in way:
            assert answer.json()["choices"][0]["text"] == plain or b'"prompt":"x"' in str(content).encode()
    else:
        assert answer.status_code in (400, 403, 404), answer.text


@pytest.mark.parametrize("path", ["/v1/completions/", "//v1/completions", "/V1/completions", "/v1/./completions"])
def test_odd_paths_lead_nowhere(server: Server, path: str) -> None:
    with httpx.Client(base_url=server.url) as client:
        answer = client.post(path, json=BODIES[PROMPT] | {"steer": "verbosity"}, headers=bearer("reader"))
    assert answer.status_code in (400, 403, 404)
    assert "x-steer-applied" not in answer.headers


def test_sizes_are_bounded(server: Server) -> None:
    def code(answer: httpx.Response) -> tuple[int, str]:
        return answer.status_code, answer.json()["error"]["code"]

    big = ask(server, "reader", prompt="x" * (9 * 2**20))
    assert code(big) == (413, "body_too_large")
    many = ask(server, "reader", [(f"X-{i}", "y" * 3000) for i in range(20)] + [("X-Z", "y" * 6000)])
    assert many.status_code == 431 or code(many) == (431, "headers_too_large")
    long = server.client.get(f"/v1/directions/{'x' * 9000}", headers=bearer("reader"))
    assert code(long) == (414, "path_too_long")
    name = server.client.put(f"/v1/directions/{'x' * 65}", content=b"", headers=bearer("all"))
    assert code(name) == (400, "invalid_direction")


CHUNKED = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    ("begin", "again"),
    [
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: ", b"y" * 8192),
        (b"GET /", b"y" * 8192),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\n", b"X: " + b"y" * 8192 + b"\r\n"),
        (
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n",
            b"X: y\r\n" * 999,
        ),
        (b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n5;x=", b"y" * 8192),
    ],
    ids=["header", "path", "headers", "trailers", "extension"],
)
def test_what_never_becomes_a_request_is_not_kept(server: Server, begin: bytes, again: bytes) -> None:
    """Without a key: a server takes a few hundred kB of it, and ends the connection."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        connection.sendall(begin)
        sent = 0
        with contextlib.suppress(ConnectionError):
            while sent < 64 * 2**20:
                connection.sendall(again)
                sent += len(again)
    assert sent < 16 * 2**20, "what the system itself holds of a connection comes on top"


def raw(server: Server, *parts: bytes, count: int = 1) -> list[tuple[int, dict[str, str], Any]]:
    """The answers to what is sent on one connection, with a while between the parts, until it ends, or
    `count` have come and nothing more does: (status, headers, body as JSON)."""
    found: list[tuple[int, dict[str, str], Any]] = []
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        for number, part in enumerate(parts):
            time.sleep(0.2 * (number > 0))
            connection.sendall(part)
        with connection.makefile("rb", buffering=0) as answers:
            while (len(found) < count or select.select([connection], [], [], 0.3)[0]) and (line := answers.readline()):
                headers = dict(each.decode().lower().strip().split(": ", 1) for each in iter(answers.readline, b"\r\n"))
                body = answers.read(int(headers["content-length"]))
                found.append((int(line.split()[1]), headers, json.loads(body) if body else None))
    return found


def whole(body: dict[str, Any], key: str, *more: str, trailer: str = "") -> tuple[bytes, bytes]:
    """A chunked request for completions: the headers, and what comes after them."""
    data = json.dumps(body).encode()
    headers = ["Host: localhost", "Content-Type: application/json", "Transfer-Encoding: chunked"]
    headers += [f"{name}: {value}" for name, value in (bearer(key) if key else {}).items()]
    head = "\r\n".join([f"POST {PROMPT} HTTP/1.1", *headers, *more]) + "\r\n\r\n"
    return head.encode(), b"%x\r\n%s\r\n0\r\n%s\r\n" % (len(data), data, trailer.encode())


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize(
    ("trailer", "status"), [("X-Steer: refusal\r\n", 400), ("X-Steering: refusal\r\n", 400), ("X-Other: 1\r\n", 200)]
)
def test_a_trailer_is_no_header_whenever_it_comes(server: Server, trailer: str, status: int, late: bool) -> None:
    body = BODIES[PROMPT]
    parts = whole(body, "reader", trailer=trailer)
    [(got, headers, said)] = raw(server, *(parts if late else [b"".join(parts)]))
    assert got == status, said
    if status == 400:
        assert said["error"]["code"] == "invalid_http"
        assert f"the trailer '{trailer.partition(':')[0].lower()}'" in said["error"]["message"].lower()
    else:
        assert headers["x-steer-applied"] == "[]"
    key = bearer("reader")["Authorization"]
    parts = whole(body, "", trailer=f"Authorization: {key}\r\nHost: evil.example\r\n")
    assert [each[0] for each in raw(server, *(parts if late else [b"".join(parts)]))] == [401]


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("upgrade", ["h2c", "websocket"])
def test_a_request_that_asks_for_another_protocol_too_is_answered_in_this_one(
    server: Server, upgrade: str, late: bool
) -> None:
    """And its body is no request, whenever it comes."""
    more = (
        "Connection: Upgrade, HTTP2-Settings",
        f"Upgrade: {upgrade}",
        "HTTP2-Settings: AAMAAABkAAQAAP__",
        "X-Steer: off",
    )
    parts = whole(BODIES[PROMPT] | {"user": "\r\n\r\nGET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"}, "reader", *more)
    [(status, headers, _)] = raw(server, *(parts if late else [b"".join(parts)]))
    assert (status, headers["x-steer-applied"]) == (200, "[]")


def test_requests_that_wait_on_one_connection_are_few(server: Server) -> None:
    one = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    assert [status for status, *_ in raw(server, one * 10, count=10)] == [200] * 10
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        sent = 0
        with contextlib.suppress(ConnectionError):
            while sent < 64 * 2**20:
                connection.sendall(one * 500)
                sent += len(one) * 500
    assert sent < 16 * 2**20, "what the system itself holds of a connection comes on top"


def test_a_body_in_the_smallest_pieces_ends_the_connection(server: Server) -> None:
    """Also one that nobody reads any more: without a key it was answered when its headers had come."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        connection.sendall(CHUNKED)
        sent = 0
        with contextlib.suppress(ConnectionError):
            while sent < 64 * 2**20:
                connection.sendall(b"1\r\na\r\n" * 2000)
                sent += 12000
    assert sent < 16 * 2**20


def test_what_is_no_request_is_told_so_in_json(server: Server) -> None:
    [(status, _, said)] = raw(server, b"hello\r\n\r\n")
    assert (status, said["error"]["code"]) == (400, "invalid_http")


def test_a_long_body_in_small_pieces_is_no_such_thing(server: Server) -> None:
    pieces = iter([b'{"model": "tiny", "max_tokens": 1, "prompt": "', *[b"x" * 1024] * 400, b'"}'])
    headers = bearer("reader") | {"Content-Type": "application/json"}
    answer = server.client.post(PROMPT, content=pieces, headers=headers)
    assert answer.json()["error"]["code"] == "context_length_exceeded"


def test_pages_of_other_origins_may_not_call(server: Server) -> None:
    preflight = {"Origin": "https://example.org", "Access-Control-Request-Method": "POST"}
    answer = server.client.options(PROMPT, headers=preflight)
    assert answer.status_code >= 400
    assert not [name for name in answer.headers if name.startswith("access-control")]
    answer = ask(server, "reader", [("Origin", "https://example.org")])
    assert "access-control-allow-origin" not in answer.headers


def settled(log: Path) -> str:
    """The log once every admitted request has its end there, which is written behind the answer's last byte."""
    deadline = time.monotonic() + 30
    while True:
        text = log.read_text()
        if text.count('"event":"admitted"') == text.count('"event":"ended"') or time.monotonic() > deadline:
            return text
        time.sleep(0.05)


def test_the_log_has_what_happened_and_nothing_that_was_said(server: Server, folder: Path) -> None:
    check_table(server.client, PROMPT, BODIES[PROMPT], streams=(False,))
    data = models.direction(models.tiny("llama"), seed=8).to_bytes()
    assert server.client.put("/v1/directions/moved", content=data, headers=bearer("reader")).status_code == 403
    assert server.client.put("/v1/directions/moved", content=data, headers=bearer("all")).status_code == 200
    assert server.client.delete("/v1/directions/moved", headers=bearer("all")).status_code == 200
    ask(server, "reader", prompt="a secret prompt", steer="refusal=0.7", headers=[("X-Request-Id", "mine")])
    text = settled(folder / "audit.jsonl")
    assert verify([folder / "audit.jsonl"]).problems == []
    assert "a secret prompt" not in text
    assert not any(secret in text for secret in SECRETS.values())
    lines = [json.loads(line) for line in text.splitlines()]
    ended = {line["admitted"]: line for line in lines if line["event"] == "ended"}
    admitted = [line for line in lines if line["event"] == "admitted"]
    assert len(admitted) == len(ended) > sum(isinstance(case.gets, list) for case in CASES)
    for line in admitted:
        end = ended[line["seq"]]
        assert (end["key"], end["request_id"]) == (line["key"], line["request_id"])
        assert end["outcome"] == "ok"
        assert end["prompt_tokens"] > 0
        assert 0 < end["completion_tokens"] <= 4
        assert all(set(entry) >= {"direction", "digest", "mode", "strength"} for entry in line["entries"])
    rules = {line["detail"]["rule"] for line in lines if line["event"] == "refused"}
    assert rules >= {
        "mode",
        "max_strength",
        "tokens",
        "layers",
        "conditions",
        "direction_max_strength",
        "required",
        "steer",
        "path",
    }
    moved = [
        (line["event"], line["key"], line["entries"][0]["direction"])
        for line in lines
        if "by" in line.get("detail", {})
    ]
    assert moved[-2:] == [("swap", "all", "moved"), ("delete", "all", "moved")]


def test_who_leaves_is_noticed_where_other_requests_wait_behind(server: Server, folder: Path) -> None:
    body = BODIES[PROMPT] | {"max_tokens": 200, "n": 16, "temperature": 1, "steer": "refusal", "user": "leaves"}
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        connection.sendall(b"".join(whole(body, "reader")) + b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        while '"event":"admitted"' not in (folder / "audit.jsonl").read_text().splitlines()[-1]:
            time.sleep(0.01)
    [*_, last] = settled(folder / "audit.jsonl").splitlines()
    assert json.loads(last)["outcome"] == "cancelled"
