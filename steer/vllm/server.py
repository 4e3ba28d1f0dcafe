"""vLLM's own OpenAI server with steering on: the carriers on its generation routes, receipts, aliases, control routes.

All of it is put inside vLLM's app, behind its API-key check and its other middleware, by either of its two official
extension points: the option `--middleware steer.vllm.server.Middleware`, or the endpoint plugin `steer` (an entry point
`vllm.endpoint_plugins`, loaded where `VLLM_PLUGINS` names it).
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Sequence
from typing import Any

from fastapi import FastAPI
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from steer.errors import InvalidInput, SpecError, SteerError, UnsupportedModel
from steer.readout import FIELD, Readout
from steer.registry import Admission
from steer.serve import carriers, errors, playground, switch
from steer.serve.access import PUBLIC, Access
from steer.serve.control import Control, request_id
from steer.serve.directions import router as directions_router
from steer.serve.middleware import REQUEST_ID, SteerMiddleware
from steer.serve.readout import report
from steer.settings import KEEP_ALIVE, ControlSettings
from steer.vllm import frontend as front_ends
from steer.vllm import internals, plugin, wire
from steer.vllm.answers import with_readout
from steer.vllm.frontend import Frontend
from steer.vllm.settings import KEY, EngineSettings
from steer.vllm.settings import read as settings_of

log = logging.getLogger("steer")

GENERATION_ROUTES = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages")
#: Where answers have choices, which the read-out goes into.
READ_ROUTES = GENERATION_ROUTES[:2]
MODELS_ROUTE = "/v1/models"
HEALTH_ROUTE = "/health"
MAX_BODY = 64 * 2**20


def install(app: FastAPI) -> None:
    """Put steering into vLLM's app, whose routes are there and whose engine may not be yet. Twice is once.

    Raises UnsupportedModel where a route is missing.
    """
    if getattr(app.state, "steer_installed", False):
        return
    app.state.steer_installed = True
    wrapped = internals.wrap_routes(
        app,
        {(path, "POST"): Generation for path in GENERATION_ROUTES}
        | {(MODELS_ROUTE, "GET"): Models, (HEALTH_ROUTE, "GET"): Health},
    )
    for needed in (*GENERATION_ROUTES[:2], MODELS_ROUTE):
        if needed not in wrapped:
            raise UnsupportedModel(f"vLLM {internals.version()} serves no route {needed}")
    control = app.state.steer_control = Control(control_settings(app))
    check_door(control, app.state.args)
    app.include_router(directions_router(_LateRegistry(app), control=control))  # type: ignore[arg-type]
    app.include_router(switch.router(control))
    app.include_router(playground.router())


class Middleware:
    """The door around every route of vLLM's app. With `--middleware` it also installs the rest when the app starts."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self._door: Access | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._live(scope, receive, send)
            return
        if self._door is None:
            public = PUBLIC.union(playground.PATHS)
            self._door = Access(_OverHttp(self.app), control=control_of(scope["app"]), public=public)
        await self._door(scope, receive, send)

    async def _live(self, scope: Scope, receive: Receive, send: Send) -> None:
        app = scope["app"]
        install(app)
        control = control_of(app)
        front = front_end_of(app)  # the server does not come up on an engine without steering
        control.start(front.registry, internals.served_names(app)[0])
        try:
            await self.app(scope, receive, send)
        finally:
            control.stop()


class _OverHttp:
    """Tells the front end that what is added to the engine in this context comes over HTTP."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app = scope["app"]
        caller = control_of(app).caller(scope)
        if scope["type"] == "http":  # what vLLM calls a request, in its logs and answers, is what the audit log does
            ours = (REQUEST_ID, request_id(scope).encode())
            scope = {**scope, "headers": [*(h for h in scope["headers"] if h[0] != REQUEST_ID), ours]}
        token = front_ends.over_http.set(not caller.required and not front_end_of(app).default)
        try:
            await self.app(scope, receive, send)
        finally:
            front_ends.over_http.reset(token)


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
        named = f"{__name__}.{Middleware.__name__}"
        if named not in app.state.args.middleware:
            app.add_middleware(Middleware)

    async def init_state(self, engine_client: Any, _state: Any, _args: Any) -> None:
        front_ends.of(engine_client)


def front_end_of(app: FastAPI) -> Frontend:
    return front_ends.of(app.state.engine_client)


def control_of(app: FastAPI) -> Control:
    control: Control = app.state.steer_control
    return control


def control_settings(app: FastAPI) -> ControlSettings:
    """What the engine was told; before there is one, what its arguments say."""
    config = getattr(app.state.args, "additional_config", None)
    found = settings_of(config)
    return found.control if found else ControlSettings.of_environment()


def check_door(control: Control, args: Any) -> None:
    """Raises InvalidInput where the server must not listen: without keys for others, or with two kinds of keys."""
    keys = args.api_key or os.environ.get("VLLM_API_KEY")
    if not keys and not getattr(args, "uds", None):
        control.check_address(args.host)
    if keys and control.in_force is not None:
        raise InvalidInput("--api-key (or VLLM_API_KEY) and a policy are two doors: put the keys into the policy")


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

        reads: list[Readout] = []

        def forward(body: dict[str, Any], admission: Admission, reading: Readout | None) -> None:
            xargs = body.get(carriers.XARGS) or {}
            wire.check_absent(xargs)
            if reading:
                check_one_answer(body)
                reads.append(reading)
            elif not admission.spec and not front.default:
                return
            if isinstance(xargs, dict):  # anything else is vLLM's to refuse
                tickets.append(front.ticket(admission, reading))
                body[carriers.XARGS] = xargs | {KEY: tickets[0]}

        async def fetch() -> dict[str, Any]:
            tokenizer = internals.tokenizer_of(scope["app"].state.engine_client)
            return report(reads[0], await front.readings(tickets[0], tokenizer)).model_dump()

        async def checked(scope: Scope, receive: Receive, send: Send) -> None:
            if not tickets:  # what was admitted is plain
                front_ends.over_http.set(True)
            if reads:
                send = with_readout(send, fetch)
            await self.app(scope, receive, _only_if_used(send, lambda: all(front.used(t) for t in tickets)))

        middleware = SteerMiddleware(
            checked,
            registry=front.registry,
            served=internals.served_names(scope["app"]),
            default=front.default,
            max_body=MAX_BODY,
            routes=GENERATION_ROUTES,
            forward=forward,
            readable=front.readable if scope["path"] in READ_ROUTES else 0,
            control=control_of(scope["app"]),
        )
        try:
            await middleware(scope, receive, send)
        except SteerError as error:
            await errors.of(error)(scope, receive, send)
        finally:
            for ticket in tickets:
                front.forget(ticket)


def check_one_answer(body: dict[str, Any]) -> None:
    """Raise SpecError for a request that is to be read and makes several answers, or none that is generated."""
    prompt = body.get("prompt")
    several = isinstance(prompt, list) and len(prompt) > 1 and not isinstance(prompt[0], int)
    counts = (body.get("n"), body.get("best_of"))
    if several or any(count not in (None, 1) for count in counts) or body.get("use_beam_search"):
        raise SpecError(f"{FIELD}: on this server one answer is read at a time: one prompt, and n = 1", param=FIELD)


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
        caller = control_of(scope["app"]).caller(scope)
        names = [name for name in front_end_of(scope["app"]).registry.names() if caller.may_use(name)]

        def changed(status: int, body: bytes) -> bytes:
            return _with_aliases(body, names) if status == 200 else body

        await self.app(scope, receive, _with_body(send, changed))


class Health:
    """Around `GET /health`: vLLM's status, with a body that has ours."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        health = control_of(scope["app"]).health()

        def changed(status: int, _body: bytes) -> bytes:
            return json.dumps({"status": "ok" if status == 200 else "failed", **health}).encode()

        await self.app(scope, receive, _with_body(send, changed))


def _with_body(send: Send, change: Callable[[int, bytes], bytes]) -> Send:
    """Sends a whole JSON answer on with the body that `change` makes of its status and body."""
    start: Message = {}
    body = b""

    async def sending(message: Message) -> None:
        nonlocal start, body
        if message["type"] == "http.response.start":
            start = message
            return
        body += message.get("body", b"")
        if not message.get("more_body", False):
            whole = change(start["status"], body)
            headers = [(k, v) for k, v in start["headers"] if k.lower() not in (b"content-length", b"content-type")]
            headers += [(b"content-type", b"application/json"), (b"content-length", str(len(whole)).encode())]
            await send({**start, "headers": headers})
            await send({"type": "http.response.body", "body": whole})

    return sending


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
    check_door(Control(settings.control), args)  # before the minute that the engine takes to start
    if not any(option.partition("=")[0] in ("--allowed-origins", "--allowed_origins") for option in options):
        args.allowed_origins = []  # vLLM's own default lets every page in the world call the server
    args.worker_cls = internals.WORKER
    args.additional_config = dict(args.additional_config or {}) | {KEY: settings.model_dump(mode="json")}
    args.middleware = [*args.middleware, f"{__name__}.{Middleware.__name__}"]
    internals.run_server(args, keep_alive=KEEP_ALIVE)
