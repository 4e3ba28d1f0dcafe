"""Which web pages a server without keys answers to: its own, and those that the operator names."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import httpx
import pytest

from steer.errors import InvalidInput
from steer.serve.control import Control
from steer.serve.origin import AllowedOrigins, hosts_of
from steer.settings import ControlSettings
from tests import models
from tests.serve.inside import Inside, post
from tests.serve.rules import POLICY
from tests.servers import Server

BODY = {"model": "tiny", "prompt": "hello", "max_tokens": 2, "temperature": 0}
EVIL = "http://rebind.evil.example"
ROUTES = [
    ("GET", "/"),
    ("GET", "/health"),
    ("GET", "/metrics"),
    ("GET", "/v1/directions"),
    ("POST", "/v1/steering"),
    ("POST", "/v1/completions"),
    ("PUT", "/v1/directions/evil"),
    ("DELETE", "/v1/directions/evil"),
]


def code(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["error"]["code"]


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_a_page_whose_name_was_made_to_point_here_gets_nothing(tiny_server: Server, method: str, path: str) -> None:
    host = f"rebind.evil.example:{tiny_server.port}"
    headers = {"Host": host, "Origin": f"http://{host}", "Content-Type": "application/json"}
    answer = tiny_server.client.request(method, path, headers=headers, content=b'{"enabled": false}')
    assert code(answer) == (421, "host_not_allowed")
    assert "--allowed-hosts" in answer.json()["error"]["message"]
    assert tiny_server.client.get("/health").json()["steering"] == "on"


@pytest.mark.parametrize(("method", "path"), ROUTES)
@pytest.mark.parametrize("origin", [EVIL, "null", "http://127.0.0.1", "http://localhost:3000", "http://127.0.0.1:0"])
def test_a_page_of_another_origin_gets_nothing(tiny_server: Server, method: str, path: str, origin: str) -> None:
    answer = tiny_server.client.request(method, path, headers={"Origin": origin})
    assert code(answer) == (403, "origin_not_allowed")
    assert not [name for name in answer.headers if name.startswith("access-control-")]


def test_its_own_page_and_programs_are_answered(tiny_server: Server) -> None:
    port = tiny_server.port
    for host in (
        "127.0.0.1",
        f"127.0.0.1:{port}",
        f"localhost:{port}",
        f"LOCALHOST:{port}",
        f"[::1]:{port}",
        "127.0.0.1:1",
    ):
        for headers in ({"Host": host}, {"Host": host, "Origin": f"http://{host}"}):
            assert (
                tiny_server.client.post(
                    "/v1/completions", json=BODY | {"model": tiny_server.model_name}, headers=headers
                ).status_code
                == 200
            )


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", None]
)
def test_what_changes_something_or_generates_says_what_its_body_is(tiny_server: Server, kind: str | None) -> None:
    """What a page may send to anybody unasked is none of it, whatever FastAPI thinks of bodies without a type."""
    headers = {"Content-Type": kind} if kind else {}
    for path, content in (
        ("/v1/steering", b'{"enabled": false}'),
        ("/v1/completions", b'{"model": "tiny", "prompt": "x"}'),
    ):
        answer = tiny_server.client.post(path, content=content, headers=headers)
        assert code(answer) == (415, "content_type"), path
        assert "Content-Type: application/json" in answer.json()["error"]["message"]
    data = models.direction(models.tiny("llama"), seed=9).to_bytes()
    with httpx.Client(base_url=tiny_server.url) as client:
        answer = client.put("/v1/directions/typed", content=data, headers=headers)
    assert code(answer) == (415, "content_type")
    assert "Content-Type: application/octet-stream" in answer.json()["error"]["message"]
    assert tiny_server.client.get("/health").json()["steering"] == "on"
    assert tiny_server.client.get("/v1/directions/typed").status_code == 404


@pytest.mark.parametrize("policy", [None, POLICY])
@pytest.mark.parametrize("origins", [(), ("https://example.org",)])
def test_a_preflight_is_answered_at_the_door(tmp_path: Path, policy: str | None, origins: tuple[str, ...]) -> None:
    """Behind it may be what looks at no method, as Prometheus' own app does."""
    asked: list[str] = []

    async def behind(scope: Any, receive: Any, send: Any) -> None:
        asked.append(scope["path"])
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"steer_direction_info"})

    inside = Inside(tmp_path, policy, audited=False, app=behind, origins=origins)
    for path in ("/metrics", "/v1/completions", "/nowhere"):
        for origin in ({}, {"Origin": EVIL}, {"Origin": "https://example.org"}):
            asking = {"Host": "127.0.0.1", "Access-Control-Request-Method": "GET", **origin}
            status, told, body = asyncio.run(post(inside.app, b"", asking, path, "OPTIONS"))
            allowed = origin.get("Origin") in origins
            assert (status, told.get("access-control-allow-origin")) == (
                (200, "https://example.org") if allowed else (403, None)
            )
            assert b"steer_direction_info" not in body
    assert not asked


def test_a_page_that_may_call_reads_its_refusals_too(tmp_path: Path) -> None:
    inside = Inside(tmp_path, POLICY, audited=False, origins=("https://example.org",))
    status, told, _ = asyncio.run(inside.post(BODY, {"Origin": "https://example.org"}))
    assert (status, told["access-control-allow-origin"]) == (401, "https://example.org")


@pytest.mark.parametrize(
    ("host", "allowed", "ours"),
    [
        ("localhost.", "", True),
        ("[::1]", "", True),
        ("[::ffff:127.0.0.1]:80", "", True),
        ("127.0.0.1.evil.example", "", False),
        ("localhost.evil.example:8000", "", False),
        ("evil.example#localhost", "", False),
        ("localhost:8000@evil.example", "", False),
        ("[127.0.0.1].evil.example", "", False),
        ("127.0.0.1, evil.example", "", False),
        ("", "", False),
        ("10.0.0.1", "", False),
        ("Box.lan:8000", "box.lan, other", True),
        ("other", "box.lan, other", True),
        ("a.box.lan", "box.lan", False),
        ("anything", "*", True),
    ],
)
def test_which_names_are_this_servers(host: str, allowed: str, ours: bool) -> None:
    assert AllowedOrigins(hosts_of(allowed)).is_ours(host) == ours


def test_where_it_listens_says_by_which_names_it_is_called() -> None:
    def pages(host: str | None, **more: Any) -> AllowedOrigins:
        control = Control(ControlSettings(insecure=True, allowed_hosts="box.lan", **more))
        control.listen(host)
        assert control.allowed_origins
        return control.allowed_origins

    for host in (None, "0.0.0.0", "::"):
        assert pages(host).is_ours("10.0.0.1:8000"), "any address, which no page's name is"
        assert not pages(host).is_ours("evil.example")
        assert pages(host).is_ours("box.lan")
    assert pages("10.0.0.1").is_ours("10.0.0.1")
    assert not pages("10.0.0.1").is_ours("10.0.0.2")
    assert pages("me.lan").is_ours("me.lan:80")


def test_every_page_in_the_world_must_be_said_as_an_open_address_must() -> None:
    with pytest.raises(InvalidInput, match="lets every web page call, and there are no keys"):
        Control(ControlSettings()).listen("127.0.0.1", ["*"])
    Control(ControlSettings(insecure=True)).listen("127.0.0.1", ["*"])


def test_the_page_of_routes_runs_nothing_and_stands_alone(tiny_server: Server) -> None:
    answer = tiny_server.client.get("/docs")
    assert answer.status_code == 200
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "frame-ancestors 'none'" in policy
    assert "script" not in policy
    assert "<script" not in answer.text
    assert "://" not in answer.text.replace("http://127.0.0.1", "")
    assert "PUT /v1/directions/{name}" in answer.text
    assert tiny_server.client.get("/playground/reference.css").status_code == 200
    for path in ("/redoc", "/docs/oauth2-redirect"):
        assert tiny_server.client.get(path).status_code == 404
