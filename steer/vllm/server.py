"""vLLM's own OpenAI server with steering on: the carriers on its generation routes, receipts, aliases, control routes.

All of it is put inside vLLM's app, behind its API-key check and its other middleware, by either of its two official
extension points: the option `--middleware steer.vllm.server.Middleware`, or the endpoint plugin `steer` (an entry point
`vllm.endpoint_plugins`, loaded where `VLLM_PLUGINS` names it).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from typing import Any

from fastapi import FastAPI
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from steer.errors import SpecError, UnsupportedModel
from steer.registry import Admission
from steer.serve import carriers, errors
from steer.serve.directions import router as directions_router
from steer.serve.middleware import SteerMiddleware
from steer.vllm import frontend as front_ends
from steer.vllm import internals, plugin, wire
from steer.vllm.frontend import Frontend
from steer.vllm.settings import KEY, EngineSettings

log = logging.getLogger("steer")

GENERATION_ROUTES = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages")
MODELS_ROUTE = "/v1/models"
MAX_BODY = 64 * 2**20


def install(app: FastAPI) -> None:
    """Put steering into vLLM's app, whose routes are there and whose engine may not be yet. Twice is once.

    Raises UnsupportedModel where a route is missing.
    """
    if getattr(app.state, "steer_installed", False):
        return
    app.state.steer_installed = True
    wrapped = internals.wrap_routes(
        app, {(path, "POST"): Generation for path in GENERATION_ROUTES} | {(MODELS_ROUTE, "GET"): Models}
    )
    for needed in (*GENERATION_ROUTES[:2], MODELS_ROUTE):
        if needed not in wrapped:
            raise UnsupportedModel(f"vLLM {internals.version()} serves no route {needed}")
    app.include_router(directions_router(_LateRegistry(app)))  # type: ignore[arg-type]


class Middleware:
    """For `--middleware`: installs when the app starts, and is never again in the way."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            install(scope["app"])
            front_end_of(scope["app"])  # the server does not come up on an engine without steering
        await self.app(scope, receive, send)


def check_app(app: FastAPI) -> None:
    """Raise UnsupportedModel for an app that would ignore the field `steer` and answer without a receipt."""
    classes: list[Any] = [layer.cls for layer in app.user_middleware]
    if Middleware not in classes and not getattr(app.state, "steer_installed", False):
        raise UnsupportedModel(
            f"steering is on, but this server would ignore the field 'steer': start it with --middleware "
            f"{__name__}.{Middleware.__name__}, or with VLLM_PLUGINS naming the plugin '{EndpointPlugin.name}'"
        )


class EndpointPlugin:
    """For the entry point `vllm.endpoint_plugins`."""

    name = "steer"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        install(app)

    async def init_state(self, engine_client: Any, _state: Any, _args: Any) -> None:
        front_ends.of(engine_client)


def front_end_of(app: FastAPI) -> Frontend:
    return front_ends.of(app.state.engine_client)


class _LateRegistry:
    """The registry of the app's engine, which is there only when the app serves."""

    def __init__(self, app: FastAPI) -> None:
        self._app = app

    def __getattr__(self, name: str) -> Any:
        return getattr(front_end_of(self._app).registry, name)


class Generation:
    """Around one generation route. The engine gets a ticket for what was admitted, so that what the receipt says is
    what is applied, whatever is swapped in between."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        front = front_end_of(scope["app"])
        tickets: list[str] = []

        def forward(body: dict[str, Any], admission: Admission) -> None:
            xargs = body.get(carriers.XARGS) or {}
            wire.check_absent(xargs)
            if not admission.spec and not front.default:
                return
            if isinstance(xargs, dict):  # anything else is vLLM's to refuse
                tickets.append(front.ticket(admission))
                body[carriers.XARGS] = xargs | {KEY: tickets[0]}

        async def checked(scope: Scope, receive: Receive, send: Send) -> None:
            await self.app(scope, receive, _only_if_used(send, lambda: all(front.used(t) for t in tickets)))

        middleware = SteerMiddleware(
            checked,
            registry=front.registry,
            served=internals.served_names(scope["app"]),
            default=front.default,
            max_body=MAX_BODY,
            routes=GENERATION_ROUTES,
            forward=forward,
        )
        try:
            await middleware(scope, receive, send)
        except SpecError as error:
            await errors.of(error)(scope, receive, send)
        finally:
            for ticket in tickets:
                front.forget(ticket)


def _only_if_used(send: Send, used: Callable[[], bool]) -> Send:
    """Passes on an answer only if the engine took what was admitted for it: a plain answer at its start, a stream,
    which may start before its request does, at its end. There is no way to take a begun stream back but to break it."""
    succeeded = streamed = False

    async def sending(message: Message) -> None:
        nonlocal succeeded, streamed
        if message["type"] == "http.response.start":
            succeeded = message["status"] < 400
            streamed = any(k.lower() == b"content-type" and b"event-stream" in v for k, v in message["headers"])
        ends = message["type"] == "http.response.body" and not message.get("more_body", False)
        if succeeded and (ends or not streamed) and not used():
            raise RuntimeError("this route's requests do not carry vllm_xargs, so the answer was not steered as asked")
        await send(message)

    return sending


class Models:
    """Around `GET /v1/models`: an alias for each served model with each direction."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        names = list(front_end_of(scope["app"]).registry.names())
        start: Message = {}
        body = b""

        async def sending(message: Message) -> None:
            nonlocal start, body
            if message["type"] == "http.response.start":
                start = message
                return
            body += message.get("body", b"")
            if not message.get("more_body", False):
                whole = _with_aliases(body, names) if start["status"] == 200 else body
                headers = [(k, v) for k, v in start["headers"] if k.lower() != b"content-length"]
                headers.append((b"content-length", str(len(whole)).encode()))
                await send({**start, "headers": headers})
                await send({"type": "http.response.body", "body": whole})

        await self.app(scope, receive, sending)


def _with_aliases(body: bytes, names: Sequence[str]) -> bytes:
    listed = json.loads(body)
    for card in list(listed["data"]):
        for name in names:
            alias = {"id": f"{card['id']}{carriers.PLUS}{name}", "parent": card["id"], "root": name}
            listed["data"].append(card | alias)
    return json.dumps(listed).encode()


def serve(model: str, settings: EngineSettings, options: Sequence[str] = ()) -> None:
    """Run vLLM's OpenAI server until SIGTERM or SIGINT. `options`: any of `vllm serve`, as on its command line.

    In this process and with one API server, whatever the number of engines: the registry is here.
    """
    plugin.register()
    args = internals.server_arguments(model, options)
    args.worker_cls = internals.WORKER
    args.additional_config = dict(args.additional_config or {}) | {KEY: settings.model_dump(mode="json")}
    args.middleware = [*args.middleware, f"{__name__}.{Middleware.__name__}"]
    internals.run_server(args)
