"""The OpenAI-compatible server on the transformers engine: its start (load, attach, check, fill the registry, serve; a
step that fails ends the start), its routes, the layers around them, and its end."""

from __future__ import annotations

import asyncio
import gc
import logging
import math
import socket
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from types import FrameType
from typing import Annotated, Literal

import uvicorn
from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import Field
from starlette.exceptions import HTTPException
from typing_extensions import TypedDict

from steer._version import __version__
from steer.errors import InvalidInput, RequestError, SteerError
from steer.hf.batching import start_engine
from steer.hf.load import load, template_parameters
from steer.hf.steering import Steering
from steer.names import readable
from steer.registry import Registry
from steer.serve import answers, completions, errors, html, metrics, routes
from steer.serve.access import REQUEST_ID, Access
from steer.serve.asgi import HeadRequests
from steer.serve.carriers import PLUS, RECEIPT
from steer.serve.connection import PROTOCOL, check_address
from steer.serve.control import GRACE, Control
from steer.serve.generation import Served
from steer.serve.middleware import RenderingWatch, SteerMiddleware, wrap_routes
from steer.settings import KEEP_ALIVE, ServeSettings, served_name
from steer.spec import parse
from steer.tokenization import Chat

log = logging.getLogger("steer")

#: Routes of the vLLM backend, which get an error that says so.
ONLY_VLLM = ("/v1/responses", "/v1/messages", "/tokenize", "/detokenize")


class Health(routes.ServerState):
    status: Annotated[Literal["ok", "failed"], Field(description="failed: the server must be restarted")]
    engine: Annotated[str, Field(description="how answers are generated")]


class ModelCard(TypedDict):
    """The model, or an alias of it."""

    id: Annotated[str, Field(description="the value for `model`; `MODEL+DIRECTION` for an alias")]
    object: Literal["model"]
    created: Annotated[int, Field(description="when the server was started, in seconds since 1970")]
    owned_by: Literal["steer"]
    root: Annotated[str, Field(description="the model's own name; for an alias its direction")]
    parent: Annotated[str | None, Field(description="for an alias its model")]
    max_model_len: Annotated[int, Field(description="the most tokens of a prompt with its answer")]


class ModelList(TypedDict):
    object: Literal["list"]
    data: list[ModelCard]


class _App(FastAPI):
    def openapi(self) -> dict[str, object]:
        if self.openapi_schema is None:
            super().openapi()["components"]["schemas"] |= answers.event_schemas()
        return super().openapi()


def build(served: Served) -> FastAPI:
    """The app. `Access` is around all routes, and the middleware takes the carriers out of every request that
    generates."""
    control, registry, engine = served.control, served.registry, served.engine

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        registry.follow(lambda: metrics.refresh(registry))
        metrics.refresh(registry)
        yield
        registry.stop()
        engine.stop()

    app = _App(title="Steer", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.add_exception_handler(SteerError, errors.on_steer_error)
    app.add_exception_handler(RequestValidationError, errors.on_validation_error)
    app.add_exception_handler(HTTPException, errors.on_http_exception)
    cors = {"allow_methods": ["*"], "allow_headers": ["*"], "expose_headers": [RECEIPT, REQUEST_ID]}
    app.add_middleware(Access, control=control, cors=cors)
    app.add_middleware(HeadRequests)
    html.put_pages_on(app)
    routes.put_control_on(app, control)
    app.include_router(completions.router(served))
    layer = partial(
        SteerMiddleware,
        registry=registry,
        served=[served.model_name],
        default=served.default,
        max_body=served.max_body,
        readable=engine.steering.anatomy.layers if readable(engine.steering.bank.sites) else 0,
        control=control,
        parsed=True,
        context=engine.context,
        rendering=RenderingWatch(registry, served.template),
    )
    generating = {(path, "POST"): layer for path in ("/v1/chat/completions", "/v1/completions")}
    assert len(wrap_routes(app, generating)) == len(generating)
    app.include_router(_models(served))
    metrics.watch(registry, engine.steering.bank.rows)

    async def only_vllm(request: Request) -> Response:
        raise errors.HTTPProblem(
            errors.Code.NOT_FOUND,
            f"{request.scope['path']} is served by the vLLM backend alone (steer serve MODEL --backend vllm), and this "
            "is the transformers backend; here there are /v1/chat/completions and /v1/completions",
        )

    for path in ONLY_VLLM:
        app.add_api_route(path, only_vllm, methods=["POST"], include_in_schema=False)

    @app.get(
        "/health",
        tags=["operation"],
        summary="State of the server; 503 when its engine has failed",
        responses=errors.documented() | {503: {"model": Health, "description": "The engine has failed"}},
    )
    async def health(request: Request, response: Response) -> Health:
        manages, healthy = control.caller(request.scope).manages, engine.healthy
        response.status_code = 200 if healthy else 503
        state = routes.health(control, manages=manages)
        if manages:
            state["in_flight"] = engine.in_flight
        return {**state, "status": "ok" if healthy else "failed", "engine": engine.description}

    @app.get(
        "/metrics",
        tags=["operation"],
        summary="Prometheus metrics",
        response_class=PlainTextResponse,
        responses=errors.documented(),
    )
    async def prometheus() -> Response:
        return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)

    return app


def _models(served: Served) -> APIRouter:
    """`GET /v1/models`: the model, and an alias of it for each direction that the caller may use."""
    router = APIRouter()
    started = int(time.time())

    def cards(request: Request) -> list[ModelCard]:
        caller, own = served.control.caller(request.scope), served.model_name
        usable = (name for name in served.registry.names() if caller.may_use(name))
        named = [(own, own, None), *((f"{own}{PLUS}{name}", name, own) for name in usable)]
        return [
            {
                "id": name,
                "object": "model",
                "created": started,
                "owned_by": "steer",
                "root": root,
                "parent": parent,
                "max_model_len": served.engine.context,
            }
            for name, root, parent in named
        ]

    @router.get(
        "/v1/models",
        tags=["models"],
        summary="The model, and an alias of it for each direction",
        responses=errors.documented(),
    )
    async def models(request: Request) -> ModelList:
        return {"object": "list", "data": cards(request)}

    @router.get(
        "/v1/models/{name:path}",
        tags=["models"],
        summary="The card of one model or alias",
        responses=errors.documented(errors.Code.MODEL_NOT_FOUND),
    )
    async def model(name: str, request: Request) -> ModelCard:
        for card in cards(request):
            if card["id"] == name:
                return card
        raise errors.HTTPProblem(errors.Code.MODEL_NOT_FOUND, f"the model {name[:100]!r} is not served here")

    return router


#: Direction rows for each token, if the settings do not say. An eager hook costs only for the rows that are used.
RANK = 4


def prepare(model: str, settings: ServeSettings) -> Served:
    """Do everything but listen. Raises SteerError if the server must not start."""
    control = Control(settings)
    control.listen(settings.host, settings.origins)
    check_address(settings.host, settings.port)
    if taken := template_parameters().intersection(settings.template_variables):
        raise InvalidInput(
            f"--chat-template-kwargs: '{name}' is not a variable of a model's template" for name in sorted(taken)
        )
    loaded = load(model, **settings.loading)
    warn_of_template(loaded)
    steering = Steering(loaded.model, sites=settings.site_list, rows=settings.rows, rank=settings.rank or RANK)
    anatomy = steering.anatomy
    log.info(
        "%s: %d layers × %d, attached at %s, self-check passed",
        anatomy.architecture,
        anatomy.layers,
        anatomy.d_model,
        ", ".join(steering.sites),
    )
    registry = Registry(steering.placement(loaded.thinking), settings.directions)
    registry.sync()
    default = parse(settings.default_steer)
    registry.resolve(default)
    name = settings.served_model_name or served_name(model)
    control.start(registry, name)  # before the engine, whose threads would keep a process that refuses to start alive
    context = min(settings.context or loaded.context, loaded.context)
    engine = start_engine(
        steering, loaded.eos_ids, context=context, capacity=settings.max_requests, cache_tokens=settings.cache_tokens
    )
    try:
        log.info("engine: %s, context %d", engine.description, engine.context)
        served = Served(
            name, loaded, engine, registry, control, default, settings.max_body, settings.template_variables
        )
        log.info(
            "serving '%s'; directions: %s; requests that name no steering get: %s",
            served.model_name,
            ", ".join(registry.names()) or "none",
            settings.default_steer,
        )
    except BaseException:  # an interrupt too: the engine's thread would keep the process alive
        engine.stop()
        raise
    return served


def warn_of_template(chat: Chat) -> None:
    """Warn at the start if the model's template makes every request to /v1/chat/completions fail."""
    try:
        chat.chat_ids([{"role": "user", "content": "x"}])
    except RequestError as error:
        log.warning("no chat can be served, only /v1/completions: %s", error)


class _Server(uvicorn.Server):
    """uvicorn with another end. After a drain uvicorn raises the signal again, so that a clean stop looks like a crash:
    this exits with 0. Requests that still run GRACE before the time is up, or at a second signal, are aborted and told
    so: uvicorn would only cut them off."""

    def __init__(self, config: uvicorn.Config, control: Control) -> None:
        super().__init__(config)
        self._control = control

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        limit = self.config.timeout_graceful_shutdown or 0
        ending = asyncio.get_running_loop().call_later(limit - GRACE, self._control.abort_all)
        await super().shutdown(sockets)
        ending.cancel()
        if self.force_exit:
            if self._control.runs:
                self._control.abort_all()
                await asyncio.sleep(GRACE)
            await self.lifespan.shutdown()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.force_exit = self.should_exit
        self.should_exit = True


def stay_responsive() -> None:
    """Keep garbage collection and computing threads from delaying the event loop: objects that exist now are never
    collected, so they are not searched again, and threads release the interpreter's lock after 1 ms instead of 5."""
    gc.collect()
    gc.freeze()
    sys.setswitchinterval(0.001)


def serve(model: str, settings: ServeSettings) -> None:
    """Run until SIGTERM or SIGINT. Requests that run then have `settings.drain` seconds to end."""
    served = prepare(model, settings)
    try:
        stay_responsive()
        config = uvicorn.Config(
            build(served),
            host=settings.host,
            port=settings.port,
            log_level=settings.log_level,
            access_log=False,
            http=PROTOCOL,
            timeout_keep_alive=KEEP_ALIVE,
            timeout_graceful_shutdown=max(settings.drain, math.ceil(GRACE)),
        )
        _Server(config, served.control).run()
    finally:
        gc.unfreeze()  # or libraries report leaks at the end
        served.engine.stop()
        served.control.stop()
