"""`/openapi.json` says what is sent: real answers are valid by it, and have no field that it does not name."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import jsonschema_rs
import pytest

from steer.serve.errors import Code
from steer.serve.policy import hash_of, new_secret
from tests import models
from tests.servers import Server

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
MESSAGES = {"messages": [{"role": "user", "content": "hello"}]}
PROMPT = {"prompt": ["hello", "world"]}
READ = {"steer": "refusal=0.7", "steer_readout": True}
SECRETS = {"all": new_secret(), "nothing": new_secret()}
POLICY = f"""
[keys.all]
hash = "{hash_of(SECRETS["all"])}"
directions = ["*"]
readout = true
manage = true

[keys.nothing]
hash = "{hash_of(SECRETS["nothing"])}"
"""
FULL = READ | {"n": 2, "seed": 1, "temperature": 1, "max_tokens": 4}


@pytest.fixture(scope="module")
def server(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """With keys and an audit log, so that all fields are sent; one of its files is no direction."""
    folder = tmp_path_factory.mktemp("openapi")
    (directions := folder / "directions").mkdir()
    models.direction(models.tiny("llama"), seed=1).save(directions / "refusal.safetensors")
    (directions / "broken.safetensors").write_bytes(b"nothing")
    (folder / "policy.toml").write_text(POLICY)
    options = ["--directions", str(directions), "--policy", str(folder / "policy.toml")]
    with Server(str(tiny_folder), *options, "--audit", str(folder / "audit.jsonl"), directions=directions) as server:
        server.client.headers["Authorization"] = f"Bearer {SECRETS['all']}"
        yield server


@pytest.fixture(scope="module")
def document(server: Server) -> dict[str, Any]:
    """Its document, in which no object may have other fields than those that are named."""
    found: dict[str, Any] = server.client.get("/openapi.json").json()
    for schema in found["components"]["schemas"].values():
        if "properties" in schema:
            schema.setdefault("additionalProperties", False)
    return found


def check(document: dict[str, Any], schema: dict[str, Any], value: Any) -> None:
    jsonschema_rs.Draft202012Validator(schema | {"components": document["components"]}).validate(value)


def answered(document: dict[str, Any], path: str, answer: httpx.Response) -> None:
    """Check an answer, or each event of a stream, by what the document says of its route and status."""
    responses = document["paths"][path][answer.request.method.lower()]["responses"]
    assert str(answer.status_code) in responses, f"{answer.status_code} {answer.text}"
    content = responses[str(answer.status_code)]["content"]
    media_type = answer.headers["content-type"].partition(";")[0]
    schema = content[media_type]["schema"]
    if media_type == "application/json":
        check(document, schema, answer.json())
        return
    assert media_type == "text/event-stream"
    *events, last = [line.removeprefix("data: ") for line in answer.text.splitlines() if line]
    assert last == "[DONE]"
    assert events
    for event in events:
        check(document, schema, json.loads(event))


@pytest.mark.parametrize("more", [{}, {"stream": True}, {"stream": True, "stream_options": {"include_usage": True}}])
@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, MESSAGES),
        (CHAT, MESSAGES | FULL | {"logprobs": True, "top_logprobs": 2}),
        (COMPLETIONS, PROMPT),
        (COMPLETIONS, PROMPT | FULL | {"logprobs": 2}),
    ],
    ids=["chat", "chat with all", "completions", "completions with all"],
)
def test_generated(
    server: Server, document: dict[str, Any], path: str, body: dict[str, Any], more: dict[str, Any]
) -> None:
    answer = server.client.post(path, json={"model": server.model_name} | body | more)
    assert answer.status_code == 200, answer.text
    answered(document, path, answer)
    described = document["paths"][path]["post"]["responses"]["200"]["headers"]
    assert all(name in answer.headers for name in described)


def test_an_echoed_prompt(server: Server, document: dict[str, Any]) -> None:
    answered(document, COMPLETIONS, server.complete(echo=True, logprobs=1, max_tokens=0))


@pytest.mark.parametrize("who", SECRETS)
def test_control_and_lists(server: Server, document: dict[str, Any], who: str) -> None:
    data = models.direction(models.tiny("llama"), seed=2).to_bytes()
    headers = {"Authorization": f"Bearer {SECRETS[who]}"}

    def ask(method: str, path: str, name: str = "", **more: Any) -> httpx.Response:
        answer = server.client.request(method, path.replace("{name}", name), headers=headers, **more)
        answered(document, path, answer)
        return answer

    one, steering = "/v1/directions/{name}", "/v1/steering"
    file = {"content": data}
    known = 200 if who == "all" else 404
    statuses = [
        ask("GET", "/health").status_code,
        ask("GET", "/v1/models").status_code,
        ask("GET", "/v1/models/{name}", server.model_name).status_code,
        ask("GET", "/v1/models/{name}", "nobody").status_code,
        ask("GET", "/v1/directions").status_code,
        ask("GET", one, "refusal").status_code,
        ask("GET", one, "nobody").status_code,
        ask("PUT", one, "other", **file).status_code,
        ask("DELETE", one, "other").status_code,
        ask("GET", steering).status_code,
        ask("POST", steering, json={"enabled": True, "reason": "a test"}).status_code,
    ]
    changes = [200] if who == "all" else [403]
    assert statuses == [200, 200, 200, 404, 200, known, 404, *changes * 2, 200, *changes]
    if who == "all":
        listed = {card["id"]: card["status"] for card in server.client.get("/v1/directions").json()["data"]}
        assert listed == {"refusal": "served", "broken": "failed"}
        assert ask("PUT", one, "other", content=b"nothing").status_code == 400
        assert ask("PUT", one, "a b", **file).status_code == 400


WRONG: dict[str, tuple[Code, Callable[[Server], httpx.Response]]] = {
    "a field": (Code.INVALID_VALUE, lambda server: server.complete(temperature=9)),
    "a direction": (Code.INVALID_VALUE, lambda server: server.complete(steer="nobody")),
    "no JSON": (Code.INVALID_JSON, lambda server: posted(server, content=b"{")),
    "too deep": (Code.BODY_TOO_COMPLEX, lambda server: posted(server, content=b"[" * 1000)),
    "a type": (Code.CONTENT_TYPE, lambda server: posted(server, content=b"{}", kind="text/plain")),
    "a model": (Code.MODEL_NOT_FOUND, lambda server: server.complete(model="nobody")),
    "too long": (Code.CONTEXT_LENGTH_EXCEEDED, lambda server: server.complete(max_tokens=10**6)),
    "a combination": (Code.UNSUPPORTED, lambda server: server.complete(stream=True, echo=True)),
    "a read-out": (Code.STEERING_FORBIDDEN, lambda server: by(server, "nothing", steer_readout="refusal")),
}


def posted(server: Server, content: bytes, kind: str = "application/json") -> httpx.Response:
    return server.client.post(COMPLETIONS, content=content, headers={"Content-Type": kind})


def by(server: Server, who: str, **body: Any) -> httpx.Response:
    return server.complete(headers={"Authorization": f"Bearer {SECRETS[who]}"}, **body)


@pytest.mark.parametrize("which", WRONG)
def test_errors(server: Server, document: dict[str, Any], which: str) -> None:
    code, ask = WRONG[which]
    answer = ask(server)
    assert (answer.status_code, answer.json()["error"]["code"]) == (code.status, code.wire)
    answered(document, COMPLETIONS, answer)


def test_what_comes_from_around_the_routes_has_the_shape_of_all_others(
    server: Server, document: dict[str, Any]
) -> None:
    answer = server.client.get("/v1/models", headers={"Authorization": "Bearer nobody"})
    assert answer.status_code == 401
    operation = document["paths"]["/v1/models"]["get"]["responses"]
    check(document, operation["default"]["content"]["application/json"]["schema"], answer.json())
