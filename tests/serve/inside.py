"""The control plane in this process: door, middleware, registry and audit log around an app that answers at once."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from starlette.routing import Mount, Route, Router
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from steer.registry import Registry
from steer.serve import metrics
from steer.serve.access import Access
from steer.serve.audit import Fsync
from steer.serve.control import Control
from steer.serve.middleware import RenderingWatch, SteerMiddleware
from steer.settings import ControlSettings
from tests import models

ANSWER = json.dumps({"object": "text_completion", "choices": []}).encode()
PROMPT, COMPLETION = 7, 5


async def engine(scope: Scope, receive: Receive, send: Send) -> None:
    """What stands for routes and engine: reads the body, counts, answers."""
    while (await receive()).get("more_body"):
        pass
    metrics.current_usage().prompt += PROMPT
    metrics.current_usage().answer(lambda: COMPLETION)
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/json")]})
    await send({"type": "http.response.body", "body": ANSWER})


class Inside:
    """`app` with a policy file and an audit log in `folder`; None for neither."""

    def __init__(
        self,
        folder: Path,
        text: str | None = None,
        *,
        audited: bool = True,
        app: ASGIApp = engine,
        origins: Sequence[str] = (),
        fsync: Fsync = "never",
    ) -> None:
        model = models.tiny("llama")
        self.registry = Registry(models.placement())
        refusal, verbosity = (models.direction(model, seed=seed).to_bytes() for seed in (1, 2))
        for name, data in ("refusal", refusal), ("verbosity", verbosity), ("copy", refusal):  # one file, to the byte
            self.registry.put(name, data)
        self.policy, self.log = folder / "policy.toml", folder / "audit.jsonl"
        if text is not None:
            self.policy.write_text(text)
        self.control = Control(
            ControlSettings(
                policy=self.policy if text is not None else None,
                audit=self.log if audited else None,
                audit_fsync=fsync,
                audit_max_bytes=2**20,
            )
        )
        self.control.listen("127.0.0.1", origins)
        rendering = RenderingWatch(self.registry)
        layer = SteerMiddleware(app, registry=self.registry, served=["tiny"], control=self.control, rendering=rendering)
        routes = [Route(path, layer, methods=["POST"]) for path in ("/v1/completions", "/v1/chat/completions")]
        self.app = Access(Router([*routes, Mount("/", app)]), control=self.control)

    def start(self) -> None:
        self.control.start(self.registry, "tiny")

    def write(self, text: str) -> None:
        """A new policy file, put in force (or not) now."""
        self.policy.write_text(text)
        self.control.reload()

    async def post(
        self,
        body: Any,
        headers: dict[str, str] | None = None,
        path: str = "/v1/completions",
        method: str = "POST",
        whole: asyncio.Event | None = None,
    ) -> tuple[int, dict[str, str], bytes]:
        return await post(self.app, body, headers, path, method, whole)

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log.read_text().splitlines()]


async def post(
    app: ASGIApp,
    body: Any,
    headers: dict[str, str] | None = None,
    path: str = "/v1/completions",
    method: str = "POST",
    whole: asyncio.Event | None = None,
    seen: Callable[[Message], object] = lambda message: None,
) -> tuple[int, dict[str, str], bytes]:
    """One request, whose body comes when it is `whole`: status, headers, body. `seen` is called with each message of
    the answer, as it is sent."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    scope: Scope = {
        "type": "http",
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "client": ("127.0.0.1", 1),
        "headers": [
            (name.lower().encode(), value.encode())
            for name, value in ({"Content-Type": "application/json"} | (headers or {})).items()
        ],
    }
    given, sent = [False], list[Message]()

    async def receive() -> Message:
        if given[0]:
            return {"type": "http.disconnect"}
        given[0] = True
        if whole is not None:
            await whole.wait()
        return {"type": "http.request", "body": data, "more_body": False}

    async def send(message: Message) -> None:
        sent.append(message)
        seen(message)

    await app(scope, receive, send)
    status = int(sent[0]["status"])
    told = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    return status, told, b"".join(message.get("body", b"") for message in sent[1:])
