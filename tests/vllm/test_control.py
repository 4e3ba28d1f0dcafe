"""Keys, policy, audit log and kill switch on vLLM's own server: the same bank, and every route that is vLLM's."""

from __future__ import annotations

import contextlib
import http.server
import json
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
import uvicorn
from fastapi import FastAPI
from starlette.testclient import TestClient

from steer.serve.access import ORDINARY
from steer.serve.audit import verify
from steer.serve.policy import hash_of
from steer.vllm.server import Middleware
from tests.serve.rules import CASES, POLICY, bearer, carried, check, check_table
from tests.servers import Server, receipt, stopped_under_streams
from tests.vllm import device
from tests.vllm.engines import Home
from tests.vllm.test_server import MESSAGES, OPTIONS
from tests.waiting import eventually

BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "hello", "max_tokens": 2},
    "/v1/chat/completions": {"messages": MESSAGES, "max_tokens": 2},
    "/v1/responses": {"input": "hello", "max_output_tokens": 2},
    "/v1/messages": {"messages": MESSAGES, "max_tokens": 2},
}
BODIES = {route: body | {"model": "tiny", "temperature": 0} for route, body in BODIES.items()}
#: What a proxy in front would have its clients write before each path.
PREFIX = "/api"
SINGLE = f"""
[keys.single]
hash = "{hash_of("single")}"
requests_at_once = 1

[keys.one_manager]
hash = "{hash_of("one_manager")}"
manage = true
requests_at_once = 1

[keys.metered]
hash = "{hash_of("metered")}"
manage = true
tokens_per_minute = 60
"""
ONE = {"Authorization": "Bearer single"}
STEERED = {"max_tokens": 4, "temperature": 0, "extra_args": {"steer": "refusal"}}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    made = Home.make("llama", tmp_path_factory.mktemp("control"))
    shutil.copy(made.directions / "refusal.safetensors", made.directions / "copy.safetensors")
    (made.directions.parent / "policy.toml").write_text(f'on_kill = "abort"\n{POLICY}{SINGLE}')
    return made


@pytest.fixture(scope="module")
def spans() -> Iterator[tuple[str, list[bytes]]]:
    """A collector of traces: its address, and the exports that came."""
    came: list[bytes] = []

    class Collector(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            came.append(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *args: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Collector) as collector:
        thread = threading.Thread(target=collector.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{collector.server_port}/v1/traces", came
        collector.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def server(home: Home, spans: tuple[str, list[bytes]]) -> Iterator[Server]:
    root = home.directions.parent
    patch = pytest.MonkeyPatch()
    patch.setenv("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "http/protobuf")
    patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "200")
    command = [sys.executable, "-m", "steer", "serve", str(home.folder), "--backend", "vllm", "--rank", "2"]
    ours = ["--directions", str(home.directions), "--policy", str(root / "policy.toml")]
    with Server(
        *(
            *OPTIONS,
            *device.ARGUMENTS,
            *ours,
            "--audit",
            str(root / "audit.jsonl"),
            "--enable-scale-out",
            "--enforce-eager",
            "--host",
            "0.0.0.0",
        ),
        *("--root-path", PREFIX, "--otlp-traces-endpoint", spans[0]),
        command=command,
    ) as running:
        yield running
    patch.undo()


def ask(server: Server, key: str | None, route: str = "/v1/completions", **more: Any) -> httpx.Response:
    headers = bearer(key) if key else {}
    return server.client.post(route, json=BODIES.get(route, {}) | more, headers=headers)


@pytest.mark.parametrize("route", ["/v1/completions", "/v1/chat/completions"])
def test_every_rule_by_every_carrier(server: Server, route: str) -> None:
    check_table(server.client, route, BODIES[route], streams=(False, True))


@pytest.mark.parametrize("route", ["/v1/responses", "/v1/messages"])
def test_every_rule_on_the_other_routes(server: Server, route: str) -> None:
    for number, case in enumerate(CASES):
        ways = list(carried(case.spec, "tiny").items())
        carrier, (more, headers) = ways[number % len(ways)]
        stream = bool(number % 2)
        body = BODIES[route] | more | ({"stream": True} if stream else {})
        answer = server.client.post(route, json=body, headers=bearer(case.key) | headers)
        check(case, answer, f"{carrier} on {route}, stream={stream}")


def test_every_route_that_vllm_has_is_behind_the_door(server: Server) -> None:
    """Also those that we do not know: without a key none but /health, and without the managing role only ours."""
    paths = server.client.get("/openapi.json", headers=bearer("all")).json()["paths"]
    assert paths.keys() >= {
        "/health",
        "/tokenize",
        "/inference/v1/generate",
        "/v1/chat/completions/batch",
        "/invocations",
    }
    for path, methods in paths.items():
        for method in map(str.upper, methods):
            url = re.sub(r"\{[^}]*\}", "x", path)
            stranger = server.client.request(method, url)
            assert stranger.status_code == (200 if url == "/health" else 401), (method, path, stranger.text)
            ordinary = url in ("/health",) or (method in ORDINARY and ORDINARY[method].fullmatch(url))
            if not ordinary:
                answer = server.client.request(method, url, headers=bearer("reader"), json={})
                assert (answer.status_code, answer.json()["error"]["code"]) == (403, "steering_forbidden"), (
                    method,
                    path,
                )
    for path in ("/docs", "/redoc", "/nowhere", "/abort_requests", "/v1/realtime", "/v1"):
        assert server.client.get(path).status_code == 401
        assert server.client.post(path).status_code == 401


def test_where_no_route_is_the_error_has_the_form_of_all_others(server: Server) -> None:
    answer = server.client.get("/nowhere", headers=bearer("all"))
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")
    beams: dict[str, Any] = {"use_beam_search": True, "n": 2, "max_tokens": 4, "length_penalty": 1e308}
    answer = ask(server, "all", **beams)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "length_penalty"), answer.text


def test_what_the_engine_cannot_take_is_refused_with_a_word(server: Server) -> None:
    """Of who manages, who alone may send it."""
    tokens = {"model": "tiny", "token_ids": [5, 6], "sampling_params": {"max_tokens": 2, "trace_decode_token_ids": []}}
    xargs = {"vllm_xargs": {"kv_transfer_params": "abc"}}
    bodies: list[tuple[str, dict[str, Any], dict[str, str]]] = [
        ("/v1/completions", BODIES["/v1/completions"] | xargs, {}),
        ("/inference/v1/generate", tokens, {}),
    ]
    bodies += [(route, body, {"X-Vllm-Priority": f"1{'0' * 30}"}) for route, body in BODIES.items()]
    for route, body, headers in bodies:
        answer = server.client.post(route, json=body, headers=bearer("all") | headers)
        assert answer.status_code == 400, (route, answer.text)
        assert "accepted: " in answer.text or "trace_decode_token_ids must be" in answer.text


def test_a_form_is_not_read(server: Server) -> None:
    """vLLM would read it on the event loop, the empty ones too."""
    kind = {"Content-Type": "application/x-www-form-urlencoded"} | bearer("all")
    answer = server.client.post("/tokenize", content=b"prompt=x" + b"&" * 100_000, headers=kind)
    assert (answer.status_code, answer.json()["error"]["code"]) == (415, "content_type")


TAKEN = ("application/json", "application/vnd.api+json", "application/ld+json", "application/json ; a")


@pytest.mark.parametrize("route", [*BODIES, "/tokenize", "/v1/messages/count_tokens"])
def test_a_body_has_the_type_of_json_or_is_refused_for_it(server: Server, route: str) -> None:
    """Also by vLLM's own checks, which know one name of it."""
    body = json.dumps(BODIES.get(route, {"model": "tiny", "messages": MESSAGES})).encode()
    for kind in (*TAKEN, None, "text/json", "application/jsonx"):
        headers = bearer("reader") | ({} if kind is None else {"Content-Type": kind})
        answer = server.client.post(route, content=body, headers=headers)
        if kind in TAKEN:
            assert answer.status_code == 200, (kind, answer.text)
        else:
            assert answer.status_code == 415, (kind, answer.text)
            assert "needs the header 'Content-Type: application/json' (got" in answer.text


def test_a_request_of_any_route_is_one_at_once_to_its_end(server: Server) -> None:
    """From its headers on: bodies are held in memory while they come."""

    def asked() -> int:
        return server.client.post("/tokenize", json={"model": "tiny", "prompt": "x"}, headers=ONE).status_code

    head = "POST /tokenize HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer single\r\n"
    head += "Content-Type: application/json\r\nContent-Length: 100\r\n\r\n"

    def holds() -> bool:
        with socket.create_connection(("127.0.0.1", server.port), timeout=30) as held:
            held.sendall(head.encode() + b"{")
            return asked() == 429  # or this one was there first, and the other was refused

    eventually(holds)
    eventually(lambda: asked() == 200)


def test_an_answer_is_charged_on_every_route_and_only_an_answer(server: Server) -> None:
    chat, completion = BODIES["/v1/chat/completions"], BODIES["/v1/completions"]
    ids = {"model": "tiny", "token_ids": [1, 5, 6]}
    several: dict[str, dict[str, Any]] = {
        "/v1/chat/completions/batch": chat | {"messages": [MESSAGES] * 3},
        "/invocations": completion | {"n": 3, "stream": True, "temperature": 1},
        "/inference/v1/generate": ids | {"sampling_params": {"n": 3, "max_tokens": 4}},
    }

    def asked(key: str, path: str, body: dict[str, Any]) -> httpx.Response:
        return server.client.post(path, json=body, headers={"Authorization": f"Bearer {key}"})

    for path, body in several.items():
        told = asked("one_manager", path, body)
        assert told.status_code == 400, (path, told.text)
        assert "prompts × n are 3 answers, and this key may have 1 at once" in told.json()["error"]["message"]
        one: dict[str, Any] = {"messages": [MESSAGES]} if "messages" in body else {"n": 1, "temperature": 0}
        one = {"sampling_params": {"max_tokens": 4}} if "sampling_params" in body else one
        assert asked("one_manager", path, body | one).status_code == 200, path
    for _ in range(5):
        assert asked("metered", "/tokenize", {"model": "tiny", "prompt": "hello " * 60}).status_code == 200
    long = several["/v1/chat/completions/batch"] | {"max_tokens": 100, "ignore_eos": True}
    assert asked("metered", "/v1/chat/completions/batch", long).status_code == 200
    over = asked("metered", "/tokenize", {"model": "tiny", "prompt": "hello"})
    assert (over.status_code, "tokens_per_minute" in over.text) == (429, True), over.text


def test_what_never_becomes_a_request_is_not_kept(server: Server) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        sent = 0
        with contextlib.suppress(ConnectionError):
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: ")
            while sent < 64 * 2**20:
                connection.sendall(b"y" * 8192)
                sent += 8192
    assert sent < 16 * 2**20


@pytest.mark.parametrize("stream", [False, True])
def test_the_form_of_an_answer_is_a_right(server: Server, stream: bool) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    chat = {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}}
    asking: dict[str, dict[str, Any]] = {
        "/v1/completions": {"structured_outputs": {"regex": "(([a-z ]*)*)*"}},
        "/v1/chat/completions": chat,
        "/v1/responses": {"text": {"format": {"type": "json_schema", "name": "x", "schema": schema}}},
        "/v1/messages": {"output_config": {"format": {"type": "json_schema", "schema": schema}}},
    }
    for route, more in asking.items():
        for steer in ({}, {"steer": "refusal=0.5"}):
            refused = ask(server, "reader", route, stream=stream, **more, **steer)
            assert (refused.status_code, refused.json()["error"]["code"]) == (403, "steering_forbidden"), refused.text
            assert "forms = true" in refused.json()["error"]["message"]
    assert ask(server, "reader", "/v1/chat/completions", response_format={"type": "json_object"}).status_code == 200
    assert ask(server, "seer", "/v1/chat/completions", stream=stream, **chat).status_code == 200
    for form in ({"grammar": "root ::= root"}, {"json": {"$ref": "#"}}, {"json": {"items": False, "minItems": 9}}):
        told = ask(server, "seer", structured_outputs=form, stream=stream)
        assert "no answer can be held to the form" in told.text, told.text
        assert told.status_code == (200 if stream else 400)


def test_a_raw_spec_reaches_the_engine_by_no_route(server: Server) -> None:
    """The managing role reaches the other routes of vLLM, and even there steering is not to be had: it would be neither
    checked nor kept."""
    chat = BODIES["/v1/chat/completions"]
    ways: list[tuple[str, dict[str, Any]]] = [
        ("/inference/v1/generate", {"model": "tiny", "token_ids": [1, 5, 6], "sampling_params": STEERED}),
        ("/invocations", BODIES["/v1/completions"] | {"vllm_xargs": {"steer": "refusal"}}),
        ("/invocations", chat | {"vllm_xargs": {"steer": "refusal"}}),
        ("/v1/chat/completions/batch", chat | {"messages": [MESSAGES], "vllm_xargs": {"steer": "refusal"}}),
        (
            "/v1/messages/count_tokens",
            BODIES["/v1/messages"] | {"vllm_xargs": {"steer": "refusal"}, "steer": "refusal"},
        ),
        ("/v1/completions", BODIES["/v1/completions"] | {"extra_args": {"steer": "refusal"}}),
        ("/v1/completions", BODIES["/v1/completions"] | {"sampling_params": STEERED}),
    ]
    before = steered_tokens(server)
    for path, body in ways:
        answer = ask(server, "all", path, **body)
        assert answer.status_code == 400, (path, answer.text)
        assert "steer" in answer.json()["error"]["message"], (path, answer.text)
    for path in ("/inference/v1/generate", "/invocations"):
        body = dict(next(body for route, body in ways if route == path))
        body |= {"vllm_xargs": {}} if "vllm_xargs" in body else {"sampling_params": {"max_tokens": 4}}
        plain = ask(server, "all", path, **body)
        assert (plain.status_code, receipt(plain)) == (200, []), (path, plain.text)
        bound = ask(server, "warden", path, **body)
        assert "requests without steering are not allowed here" in bound.text, (path, bound.text)
    assert steered_tokens(server) == before


@pytest.mark.parametrize("prefix", ["", PREFIX])
def test_every_route_steers_or_refuses_what_asks_for_it(server: Server, prefix: str) -> None:
    """Of all that vLLM's own app has and that takes a body, by every carrier and its near misses, under the root path
    and without; and nothing of it reaches the engine."""
    paths = server.client.get("/openapi.json", headers=bearer("all")).json()["paths"]
    ours = {path for path in paths if path.startswith(("/v1/directions", "/v1/steering"))}
    chat = BODIES["/v1/chat/completions"]
    bodies = {
        "/v1/chat/completions/batch": chat | {"messages": [MESSAGES]},
        "/inference/v1/generate": {"model": "tiny", "token_ids": [1, 5, 6], "sampling_params": {"max_tokens": 4}},
        "/invocations": chat,
    }
    nearly: list[tuple[dict[str, Any], dict[str, str]]] = [
        ({"Steering": "refusal"}, {}),
        ({}, {"X-Steering": "refusal"}),
        ({"extra_body": {"steer": "refusal"}}, {}),
        ({"vllm_xargs": {"steer_mode": "ablate"}}, {}),
    ]
    ways = [*carried("refusal", "tiny").values(), *nearly]
    before = asked_of_the_engine(server)
    tried = 0
    for path, methods in paths.items():
        for method in {"post", "put", "patch", "delete"} & methods.keys():
            for more, headers in nearly if path in BODIES else () if path in ours else ways:
                url = prefix + re.sub(r"\{[^}]*\}", "x", path)
                body = (BODIES | bodies).get(path, {}) | more
                answer = server.client.request(method, url, json=body, headers=bearer("all") | headers)
                assert 400 <= answer.status_code < 500, (path, more, headers, answer.text)
                assert "steer" in answer.json()["error"]["message"], (path, more, headers, answer.text)
                tried += 1
    assert tried > 50
    assert asked_of_the_engine(server) == before
    for path, body in bodies.items():
        plain = server.client.post(prefix + path, json=body, headers=bearer("all"))
        assert (plain.status_code, receipt(plain)) == (200, []), (path, plain.text)


@pytest.mark.parametrize("prefix", ["", PREFIX])
def test_what_is_required_is_applied_whatever_the_prefix(server: Server, prefix: str) -> None:
    for route in BODIES:
        answer = server.client.post(prefix + route, json=BODIES[route], headers=bearer("bound"))
        assert [entry["direction"] for entry in receipt(answer)] == ["verbosity"], (route, answer.text)


@pytest.mark.parametrize(
    ("route", "more"),
    [
        ("/v1/chat/completions", {"use_beam_search": True, "n": 2}),
        ("/v1/completions", {"use_beam_search": True, "n": 2}),
        ("/v1/responses", {"background": True, "store": True}),
    ],
)
def test_what_vllm_generates_without_its_arguments_is_refused(server: Server, route: str, more: dict[str, Any]) -> None:
    before = asked_of_the_engine(server)
    for key, steer in (("all", {"steer": "refusal"}), ("bound", {}), ("eager", {})):
        answer = ask(server, key, route, **more, **steer)
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "unsupported"), (key, answer.text)
    assert asked_of_the_engine(server) == before
    if "use_beam_search" not in more:  # what goes on without its request is in no key's limits
        for field, value in (("background", True), ("previous_response_id", "resp_1"), ("priority", -1)):
            answer = ask(server, "reader", route, **{field: value})
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, field), answer.text
            assert "needs a key with the managing role" in answer.json()["error"]["message"]
        answer = server.client.post(route, json=BODIES[route], headers=bearer("reader") | {"X-Vllm-Priority": "-1"})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "priority"), answer.text
        for path in (*BODIES, "/tokenize"):
            enlarged = BODIES.get(path, BODIES["/v1/completions"]) | {"mm_processor_kwargs": {"min_pixels": 10**9}}
            answer = server.client.post(path, json=enlarged, headers=bearer("reader"))
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, "mm_processor_kwargs"), answer.text
    else:
        assert receipt(ask(server, "all", route, **more)) == []


def asked_of_the_engine(server: Server) -> float:
    """How many tokens of prompts it has been given."""
    text = server.client.get("/metrics", headers=bearer("meter")).text
    return sum(float(n) for n in re.findall(r"^vllm:prompt_tokens_total\S* (\S+)", text, re.MULTILINE))


def steered_tokens(server: Server) -> float:
    text = server.client.get("/metrics", headers=bearer("meter")).text
    found = re.search(r'^steer_generated_tokens_total\{steered="true"\} (\S+)', text, re.MULTILINE)
    return float(found[1]) if found else 0.0


def test_lists_have_only_what_a_key_may_use(server: Server) -> None:
    for key, expected in (("reader", {"refusal"}), ("nothing", set()), ("all", {"refusal", "verbosity", "copy"})):
        cards = server.client.get("/v1/models", headers=bearer(key)).json()["data"]
        assert {card["id"].partition("+")[2] for card in cards} - {""} == expected
        listed = server.client.get("/v1/directions", headers=bearer(key)).json()["data"]
        assert {card["id"] for card in listed} == expected
    assert server.client.get("/v1/directions/verbosity", headers=bearer("reader")).status_code == 404


def test_the_switch_ends_streams_and_admits_no_more(server: Server) -> None:
    told = server.client.get("/health").json()
    assert (told["steering"], told["policy"], told["audit"]) == ("on", "ok", "ok")
    body = BODIES["/v1/completions"] | {"max_tokens": 240, "ignore_eos": True, "steer": "refusal", "stream": True}
    with server.client.stream("POST", "/v1/completions", json=body, headers=bearer("all")) as answer:
        lines = answer.iter_lines()
        next(lines)
        switched = server.client.post("/v1/steering", json={"enabled": False}, headers=bearer("all")).json()
        rest = "\n".join(lines)
    assert (switched["enabled"], switched["running"]) == (False, 1)
    assert "steering_off" in rest
    assert rest.rstrip().endswith("data: [DONE]")
    for route in BODIES:
        refused = ask(server, "all", route, steer="refusal")
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "steering_off")
        assert receipt(ask(server, "all", route)) == []
    assert server.client.get("/health").json()["steering"] == "off"
    assert server.client.post("/v1/steering", json={"enabled": True}, headers=bearer("all")).json()["enabled"]
    assert receipt(ask(server, "all", steer="refusal"))

    def pinned() -> list[str]:
        served = server.client.get("/v1/directions", headers=bearer("all")).json()["data"]
        return [d["id"] for d in served if d["requests"]]

    eventually(lambda: not pinned(), told="pins are left")


@pytest.mark.parametrize("route", BODIES)
def test_the_switch_ends_whole_answers_in_the_engine_too(server: Server, route: str) -> None:
    """It makes nothing more for who was told so."""
    choices = route in ("/v1/completions", "/v1/chat/completions")
    limit = "max_output_tokens" if route == "/v1/responses" else "max_tokens"
    more: dict[str, Any] = {limit: 240, "ignore_eos": True, "temperature": 1, "steer": "refusal"}
    more |= {"n": 96} if choices else {}
    requests = 1 if choices else 48
    before = metric(server, "generation_tokens_total")
    with ThreadPoolExecutor(requests) as pool:
        asked = [pool.submit(ask, server, "all", route, **more) for _ in range(requests)]
        eventually(lambda: metric(server, "generation_tokens_total") > before)
        assert server.client.post("/v1/steering", json={"enabled": False}, headers=bearer("all")).status_code == 200
        answers = [one.result() for one in asked]
    told = metric(server, "generation_tokens_total")
    eventually(lambda: not metric(server, "num_requests_running") + metric(server, "num_requests_waiting"))
    after = metric(server, "generation_tokens_total")
    assert server.client.post("/v1/steering", json={"enabled": True}, headers=bearer("all")).json()["enabled"]
    refused = [one for one in answers if one.status_code != 200]
    assert len(refused) == len(answers) or (refused and route == "/v1/messages"), "whose answers may end before"
    assert {(one.status_code, one.json()["error"]["code"]) for one in refused} == {(503, "steering_off")}
    assert after - told < 2000, "of the 10 or 20 thousand that were asked for"
    assert "never retrieved" not in server.log


def metric(server: Server, name: str) -> float:
    text = server.client.get("/metrics", headers=bearer("meter")).text
    return sum(float(n) for n in re.findall(rf"^vllm:{name}{{\S* (\S+)", text, re.MULTILINE))


def test_pages_of_other_origins_may_not_call(server: Server) -> None:
    answer = ask(server, "reader")
    assert "access-control-allow-origin" not in answer.headers
    page = {"Origin": "https://example.org", "Access-Control-Request-Method": "POST"}
    assert "access-control-allow-origin" not in server.client.options("/v1/completions", headers=page).headers


def test_the_spans_of_vllm_say_what_was_applied(server: Server, spans: tuple[str, list[bytes]]) -> None:
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    steered, plain = ask(server, "all", steer="refusal=0.5,verbosity:add=1"), ask(server, "all")
    applied: dict[str, Any] = {}
    deadline = time.monotonic() + 30
    while len(applied) < 2:
        assert time.monotonic() < deadline, "the spans of both requests must come"
        time.sleep(0.1)
        for data in tuple(spans[1]):
            for resource in ExportTraceServiceRequest.FromString(data).resource_spans:
                for span in (span for scope in resource.scope_spans for span in scope.spans):
                    said = {item.key: item.value for item in span.attributes}
                    for answer in (steered, plain):
                        if answer.headers["x-request-id"] in said.get("gen_ai.request.id", _Nothing).string_value:
                            applied[answer.headers["x-request-id"]] = said
    found = applied[steered.headers["x-request-id"]]
    assert found["steer.applied"].string_value == steered.headers["x-steer-applied"]
    assert [v.double_value for v in found["steer.strengths"].array_value.values] == [0.5, 1.0]
    assert not [name for name in applied[plain.headers["x-request-id"]] if name.startswith("steer.")]


class _Nothing:
    string_value = ""


def test_the_log_is_whole_and_has_the_tokens(server: Server, home: Home) -> None:
    more: dict[str, Any] = {"prompt": ["hello", "hello you"], "n": 2, "temperature": 1, "ignore_eos": True}
    answer = ask(server, "all", steer="refusal", **more)
    assert receipt(answer)
    path = home.directions.parent / "audit.jsonl"
    deadline = time.monotonic() + 20
    while True:
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        [last] = [line for line in lines if line.get("request_id") == answer.headers["x-request-id"]][1:] or [None]
        if last:
            break
        assert time.monotonic() < deadline
    assert verify([path]).problems == []
    assert last["completion_tokens"] == 8
    assert last["prompt_tokens"] == 6 + 10
    ended = {line["admitted"]: line for line in lines if line["event"] == "ended"}
    admitted = [line for line in lines if line["event"] == "admitted"]
    assert len(admitted) == len(ended)
    refused = [line for line in ended.values() if line["outcome"] == "error"]  # beam search and `background`, above
    assert not any(line["completion_tokens"] for line in refused)
    served = [line for line in ended.values() if line not in refused]
    assert {line["outcome"] for line in served} == {"ok", "aborted"}
    assert all(line["prompt_tokens"] and line["completion_tokens"] for line in served if line["outcome"] == "ok")


def test_what_runs_when_the_server_stops_has_its_end_or_is_told(server: Server, home: Home) -> None:
    """It is the last test of this server. Steered and plain requests, more than run at once, and some on routes that do
    not steer, which wait for them."""
    body = BODIES["/v1/completions"] | {"max_tokens": 240, "n": 24, "temperature": 1}
    asked = [(server.client, body | {"steer": steer}, bearer("all")) for steer in ("refusal", "off")]
    batch = BODIES["/v1/chat/completions"] | {"messages": [MESSAGES] * 128, "max_tokens": 240, "ignore_eos": True}

    def behind(path: str, sent: dict[str, Any]) -> httpx.Response:
        eventually(lambda: metric(server, "num_requests_waiting") > 0)
        return httpx.post(server.url + path, json=sent, headers=bearer("all"), timeout=120)

    with ThreadPoolExecutor() as pool:
        others = [
            pool.submit(behind, "/invocations", body | {"n": 128, "ignore_eos": True}),
            pool.submit(behind, "/v1/chat/completions/batch", batch),
        ]
        streams = stopped_under_streams(server, asked, lambda: metric(server, "num_requests_waiting") > 160)
    for other in others:
        answer = other.result()
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "stopping"), answer.text
    for said in streams:
        assert said.rstrip().endswith("data: [DONE]")
        assert "error" not in said or '"code":"stopping"' in said.replace(" ", "")
    report = verify([home.directions.parent / "audit.jsonl"])
    assert not [note for note in (*report.problems, *report.notes) if "not ended" in note]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--host", "0.0.0.0"], "there are no keys"),
        (["--host", "127.0.0.1", "--api-key", "k", "--policy", "POLICY"], "exclude each other"),
        (["--audit", "/nowhere/audit.jsonl"], "/nowhere/audit.jsonl cannot be written: the folder /nowhere does not"),
        (["--directions", "/nowhere"], "the directions folder '/nowhere' does not exist"),
        (["--additional-config", "7"], "--additional-config: must be a JSON object, got '7'"),
        (["--port", "TAKEN"], "Address already in use; give another"),
    ],
)
def test_a_server_that_would_not_be_safe_does_not_start(home: Home, options: list[str], says: str) -> None:
    policy = str(home.directions.parent / "policy.toml")
    command = [sys.executable, "-m", "steer", "serve", str(home.folder), "--backend", "vllm", "--port", "0"]
    with socket.create_server(("127.0.0.1", 0), reuse_port=True) as other:  # as the front ends of vLLM listen
        taken = str(other.getsockname()[1])
        command += [{"POLICY": policy, "TAKEN": taken}.get(option, option) for option in options]
        done = subprocess.run(command, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 2, done.stderr[-2000:]
    assert says in done.stderr


def test_what_fails_while_an_app_starts_ends_the_server(caplog: pytest.LogCaptureFixture) -> None:
    """In uvicorn's own way of asking: it serves an app that raises there as one that has nothing to start."""
    app = FastAPI()
    app.add_middleware(Middleware)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None))
    with pytest.raises(SystemExit):
        server.run()
    assert not server.started
    assert "the server does not start: " in caplog.text
    assert "serves no route /v1/" in str(Middleware.failed)
    asked = TestClient(app).get("/health")  # nobody told it to start
    assert (asked.status_code, asked.json()["error"]["code"]) == (503, "steering_off")
