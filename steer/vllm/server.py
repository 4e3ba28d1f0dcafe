"""vLLM's own OpenAI server with steering: carriers on its generation routes, receipts, aliases, control routes.

All of this is added inside vLLM's app, after its API-key check and its other middleware, by one of its two official
extension points: the option `--middleware steer.vllm.server.Middleware`, or the endpoint plugin `steer` (an entry point
`vllm.endpoint_plugins`, loaded if `VLLM_PLUGINS` names it).

No request reaches a server's engine unless a layer here has let it pass. The outer layer closes the way (`Closed`). The
layer on a route opens it, with a ticket for the admitted request (`Generation`) or for plain requests only (`Other`).
A route without a layer (websockets, routes that are added later) cannot generate.
"""

from __future__ import annotations

import json
import logging
import os
from argparse import Namespace
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import ClassVar

from anyio import to_thread
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.datastructures import Headers, UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from steer.errors import InvalidInput, NotFinite, SpecError, SteerError, UnsupportedModel, brief
from steer.readout import FIELD
from steer.registry import Admission
from steer.serve import carriers, errors, html, metrics, origin, routes
from steer.serve.access import REQUEST_ID, Access
from steer.serve.answers import ReadReport, report
from steer.serve.asgi import Change, HeadRequests, Outgoing, rewriting, with_headers
from steer.serve.authorise import NO_READOUT, Caller, resolve
from steer.serve.body import (
    BODY,
    LARGE,
    LIMITS,
    SIZE,
    Gone,
    answer_count,
    asks_most,
    check_size,
    engine_bytes,
    offload,
    parse_body,
    prompt_count,
    read_body,
    replay,
    text_length,
    tokens_of,
    understood,
)
from steer.serve.connection import PROTOCOL
from steer.serve.control import Control, Run, request_id
from steer.serve.errors import Code, HTTPProblem
from steer.serve.middleware import RenderingWatch, SteerMiddleware, counted, refuse, wrap_routes
from steer.settings import ControlSettings
from steer.spec import Spec
from steer.vllm import frontend as front_ends
from steer.vllm import internals
from steer.vllm.answers import UnlessLost, restated, with_fields
from steer.vllm.frontend import Frontend, Passage, Ticket, passage
from steer.vllm.parent import end_with_parent
from steer.vllm.settings import KEY, check_absent
from steer.vllm.settings import read as settings_of

log = logging.getLogger("steer")

#: The routes that steer, each with the fields with which vLLM does not pass `vllm_xargs` to the engine.
GENERATION_ROUTES: Mapping[str, tuple[str, ...]] = {
    "/v1/chat/completions": ("use_beam_search",),
    "/v1/completions": ("use_beam_search",),
    "/v1/responses": ("background",),
    "/v1/messages": (),
}
#: Fields that need the managing role if there are keys, each with the reason. vLLM's store of responses does not
#: separate keys.
MANAGER_FIELDS: Mapping[str, str] = {
    "background": "what runs on without its request is in no key's limits",
    "previous_response_id": "a stored answer may be another key's",
    "mm_processor_kwargs": "it can enlarge a small image to any size",
    "media_io_kwargs": "it can make any number of pictures of a video",
    "kv_transfer_params": "it names the host from which keys and values are taken, which other requests may then get",
    "ec_transfer_params": "it names the host from which an encoder's output is taken",
}
#: Routes whose answers have choices, to which the read-out and `steer_applied` are added. A server must have them.
READ_ROUTES = ("/v1/chat/completions", "/v1/completions")
NOT_READ = f"this route gives no read-out: ask {' or '.join(READ_ROUTES)}"
#: The route of vLLM whose body has the options in `sampling_params`.
NESTING_ROUTE = "/inference/v1/generate"
MODELS_ROUTE = "/v1/models"
HEALTH_ROUTE = "/health"
MAX_BODY = 64 * 2**20
#: Limit of the characters of text in one request: TEXT_PER_TOKEN for each token of the context, at least MIN_TEXT. vLLM
#: tokenizes one request after the other, on some routes at any length, so all others wait for a long one.
TEXT_PER_TOKEN, MIN_TEXT = 16, 2 * 2**20


def install(app: FastAPI) -> None:
    """Add steering to vLLM's app, whose routes exist and whose engine may not exist yet. A second call does nothing.

    Raises UnsupportedModel if a route is missing.
    """
    if getattr(app.state, "steer_installed", False):
        return
    app.state.steer_installed = True
    layers: dict[tuple[str, str], Callable[[ASGIApp], ASGIApp]] = {
        (path, "POST"): partial(Generation, reads=path in READ_ROUTES, dropping=dropping)
        for path, dropping in GENERATION_ROUTES.items()
    }
    for route in app.routes:
        internals.server.fail_fast(route)
    wrapped = wrap_routes(app, {**layers, (MODELS_ROUTE, "GET"): ModelsLayer, (HEALTH_ROUTE, "GET"): HealthLayer})
    for needed in (*READ_ROUTES, MODELS_ROUTE):
        if needed not in wrapped:
            raise UnsupportedModel(f"vLLM {internals.version()} serves no route {needed}")
    found = settings_of(getattr(app.state.args, "additional_config", None))  # the settings that the engine gets too
    control = app.state.steer_control = Control(found.control if found else ControlSettings())
    check_door(control, app.state.args)
    routes.put_control_on(app, control)
    html.put_pages_on(app)
    app.router.default = partial(_no_route, app.router.default)


async def _no_route(default: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
    """The answer for an unknown path. FastAPI's own is not in the shape of OpenAI's errors."""
    found = default if scope["type"] != "http" else errors.no_route(scope["path"])
    await found(scope, receive, send)


def guard(app: FastAPI) -> None:
    """Put `Other` on every route and mount of vLLM that has no layer of ours. A second call does nothing."""
    for route in app.routes:
        inner = getattr(route, "app", None)
        ours = getattr(getattr(route, "endpoint", None), "__module__", "").startswith("steer.")
        if inner is not None and not ours and not isinstance(inner, Generation | ModelsLayer | HealthLayer | Other):
            route.app = Other(inner)  # type: ignore[attr-defined]


class Middleware:
    """The outermost layer, around every route of vLLM's app: authentication. With `--middleware` it also installs the
    rest when the app starts."""

    #: The error with which the server of this process did not start.
    failed: ClassVar[Exception | None] = None

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self._door: ASGIApp | None = None
        self._started = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._live(scope, receive, send)
            return
        if not self._started:  # the policy is not watched, and there is no audit log
            refused = errors.response(Code.STEERING_OFF, "steering did not start: the server's log says why")
            await refused(scope, receive, send)
            return
        if self._door is None:
            args = scope["app"].state.args
            access = Access(
                Closed(self.app),
                control=control_of(scope["app"]),
                cors={
                    "allow_methods": args.allowed_methods,
                    "allow_headers": args.allowed_headers,
                    "allow_credentials": args.allow_credentials,
                },
            )
            self._door = HeadRequests(access)
        await self._door(scope, receive, send)

    async def _live(self, scope: Scope, receive: Receive, send: Send) -> None:
        app = scope["app"]
        try:
            install(app)
            guard(app)
            control = control_of(app)
            front = front_end_of(app)  # raises for an engine without steering
            control.start(front.registry, internals.server.served_names(app)[0], front.shared)
        except Exception as error:
            # not raised: uvicorn would take that for an app without a lifespan, and serve
            log.error("the server does not start: %s", error, exc_info=not isinstance(error, SteerError | OSError))
            Middleware.failed = error
            await receive()
            await send({"type": "lifespan.startup.failed"})
            return
        self._started = True
        internals.engine.before_shutdown(app.state.engine_client, control.drain)
        if front.place[1] > 1:
            end_with_parent()  # a switch would not reach it together with others, started on the same port
        try:
            await self.app(scope, receive, send)
        finally:
            control.stop()


class _Layer:
    """A layer around an ASGI app."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app


class Closed(_Layer):
    """Closes the way to the engine. Only the layer of a route can open it."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008, "reason": "unsupported with steering on"})
            return
        if scope["type"] == "http":  # so vLLM's logs and answers have the request's id in the audit log
            named = {REQUEST_ID: request_id(scope)}
            scope = with_headers(scope, lambda headers: headers.update(named))
        with _passing(Passage()):
            await self.app(scope, receive, send)


@contextmanager
def _passing(way: Passage) -> Iterator[None]:
    token = passage.set(way)
    try:
        yield
    finally:
        passage.reset(token)


def check_app(app: FastAPI) -> None:
    """Raise UnsupportedModel for an app that would ignore the field `steer` and answer without a receipt. Also sets the
    class of its connections, which has limits."""
    classes: list[object] = [layer.cls for layer in app.user_middleware]
    if Middleware not in classes:
        raise UnsupportedModel(
            f"steering is on, but this server would ignore the field 'steer': start it with --middleware "
            f"{__name__}.{Middleware.__name__}, or with VLLM_PLUGINS naming the plugin '{EndpointPlugin.name}'"
        )
    internals.server.take_connection(PROTOCOL)


class EndpointPlugin:
    """The plugin of the entry point `vllm.endpoint_plugins`."""

    name = "steer"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        install(app)
        named = f"{__name__}.{Middleware.__name__}"
        if named not in app.state.args.middleware:
            app.add_middleware(Middleware)

    async def init_state(self, engine_client: object, _state: object, _args: Namespace) -> None:
        front_ends.of(engine_client)


def front_end_of(app: FastAPI) -> Frontend:
    return front_ends.of(app.state.engine_client)


def control_of(app: FastAPI) -> Control:
    return app.state.steer_control


def check_door(control: Control, args: Namespace) -> None:
    """Raises InvalidInput if the server must not listen: others could reach it without keys, or it would have two kinds
    of keys."""
    keys = args.api_key or os.environ.get("VLLM_API_KEY")
    if keys and control.in_force is not None:
        raise InvalidInput("--api-key (or VLLM_API_KEY) and a policy exclude each other: put the keys into the policy")
    guarded = bool(keys or getattr(args, "uds", None))
    origins = list(args.allowed_origins)
    if "*" in origins and not (guarded or control.in_force or control.settings.insecure):
        origins = []  # * is vLLM's own default, which would let every web page steer and manage
        log.warning("other origins' pages may not call: list them in --allowed-origins, or give a policy with keys")
    control.listen(args.host, origins, guarded=guarded)


class Generation:
    """The layer on one generation route. The engine gets a ticket for the admission, so exactly what the receipt says
    is applied, even if a direction is swapped meanwhile.

    Args:
        reads: whether its answers have choices, which can carry a read-out.
        dropping: fields with which vLLM would not pass the ticket on.
    """

    def __init__(self, app: ASGIApp, *, reads: bool, dropping: Sequence[str]) -> None:
        self.app, self.reads, self.dropping = app, reads, tuple(dropping)
        self.rendering: RenderingWatch | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        front = front_end_of(scope["app"])
        if self.rendering is None:
            self.rendering = RenderingWatch(front.registry, internals.server.template_variables(scope["app"]))
        ticket: Ticket | None = None
        control = control_of(scope["app"])

        def forward(body: dict[str, object], admission: Admission) -> None:
            nonlocal ticket
            check_text(body, scope[SIZE], front)
            check_repeated(body, scope[SIZE])
            xargs = body.get(carriers.XARGS) or {}
            check_absent(xargs, served=True)
            check_reserved(body, control.caller(scope))
            if admission.readout:
                counts = (body.get("n"), body.get("best_of"))
                several = prompt_count(body) > 1 or any(count not in (None, 1) for count in counts)
                if several or body.get("use_beam_search"):
                    message = f"{FIELD}: on this server one answer is read at a time: one prompt, and n = 1"
                    raise SpecError(message, param=FIELD)
            elif not admission.spec:
                return
            for field in self.dropping:
                if body.get(field):
                    raise errors.unsupported(f"'{field}' cannot be used together with steering or a read-out", field)
            if isinstance(xargs, dict):  # vLLM refuses anything else
                ticket = front.ticket(admission)
                body[carriers.XARGS] = xargs | {KEY: ticket.name}

        async def checked(scope: Scope, receive: Receive, send: Send) -> None:
            admission: Admission = scope["steer"]
            spec = admission.spec

            async def fetch() -> ReadReport:
                assert ticket is not None
                assert admission.readout is not None
                tokenizer = internals.engine.tokenizer_of(scope["app"].state.engine_client)
                readings = await front.readings(ticket, tokenizer)
                # for a long answer this takes a fifth of a second, in which the loop serves others
                return await to_thread.run_sync(report, admission.readout, readings)

            answer = UnlessLost(send, lambda: ticket is not None and ticket.lost)
            send = answer.send
            if self.reads and ticket is not None and (admission.readout or spec.decided_once or spec.phased):
                send = with_fields(send, partial(front.met, ticket), fetch if admission.readout else None)
            used = None if ticket is None else lambda: ticket.used
            try:
                caller = control.caller(scope)
                plain = not admission.spec and not admission.readout
                beams, repeats = _reads_beams(scope[BODY], scope["path"]), _repeats(scope["path"])
                way = Passage(plain, caller.rules.forms, caller.manages, beams=beams, repeats=repeats)
                await _run(self.app, control, way, scope[BODY], scope, receive, send, used)
            except Exception:
                if ticket is None or not ticket.lost:
                    raise
                await answer.break_off(NotFinite())

        middleware = SteerMiddleware(
            checked,
            registry=front.registry,
            served=internals.server.served_names(scope["app"]),
            default=front.default,
            max_body=MAX_BODY,
            forward=forward,
            readable=front.readable if self.reads else 0,
            unreadable=NO_READOUT if self.reads or not front.readable else NOT_READ,
            control=control,
            context=front.context,
            rendering=self.rendering,
        )
        try:
            try:
                await middleware(scope, receive, send)
            finally:
                if ticket is not None and (left := front.forget(ticket)):
                    await internals.engine.abort_async(scope["app"].state.engine_client, left)
        except SteerError as error:
            await errors.of(error)(scope, receive, send)


class Other(_Layer):
    """The layer on a route of vLLM that does not steer. It generates only if nothing in the request asks for steering
    and neither a default nor the key requires any. Such an answer has the receipt of a plain one."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "OPTIONS"):
            await self.app(scope, receive, send)  # the way stays closed
            return
        await counted(control_of(scope["app"]), self._handle, scope, receive, send)

    async def _handle(self, run: Run, scope: Scope, receive: Receive, send: Send) -> None:
        app = scope["app"]
        control = control_of(app)
        try:
            data = await read_body(scope, receive, MAX_BODY)
            body = await _understood(scope, data)
            front, fields = front_end_of(app), _fields(body, scope["path"])
            check_text(body, len(data), front)
            check_repeated(fields, len(data))
            run.caller = control.renewed(scope)
            check_reserved(fields, run.caller)
            served = internals.server.served_names(app)
            traces = carriers.traces(body, Headers(scope=scope), served, scope["query_string"])
            found = await understood(lambda: next(traces, None), len(data))
            if found is not None:
                raise errors.unsupported(
                    f"this route does not take steering, but the request has '{found[:100]}'", found[:100]
                )
        except Gone:
            return
        except SteerError as error:
            await refuse(control, error, scope, receive, send)
            return
        rules, tokens = run.caller.rules, tokens_of(fields, len(data), front.context, scope["path"])
        reserve = partial(control.reserve, run, scope, tokens, answer_count(fields), asks_most(fields))
        plain = body is not None and _may_be_plain(scope)
        beams, repeats = _reads_beams(fields, scope["path"]), _repeats(scope["path"])
        way = Passage(plain, rules.forms, run.caller.manages, reserve, beams=beams, repeats=repeats)

        async def sending(message: Message) -> None:
            if way.plain and message["type"] == "http.response.start" and message["status"] < 400:
                message = with_headers(message, lambda headers: headers.append(carriers.RECEIPT, Spec().receipt()))
            await send(message)

        control.add(run)
        with metrics.counting_usage() as run.usage:
            if fields.get("use_beam_search"):
                run.usage.prompts = prompt_count(fields)
            try:
                await run.serve(
                    partial(_run, self.app, control, way, body), scope, replay(data, receive), Outgoing(sending)
                )
            finally:
                control.discard(run)


def _may_be_plain(scope: Scope) -> bool:
    """Whether a request without a carrier is plain here, by the defaults, the key and the policy."""
    control, front = control_of(scope["app"]), front_end_of(scope["app"])
    nothing = carriers.Carried({}, None)
    try:
        return not resolve(nothing, front.registry, front.default, caller=control.caller(scope), rules=control.rules)
    except SteerError:
        return False


async def _understood(scope: Scope, data: bytes) -> object:
    """The parsed body: the value of JSON, the fields of a form, {} for none; None if it cannot be parsed."""
    kind = (origin.header(Headers(scope=scope), "content-type") or "").lower()
    forms = ("multipart/form-data", "application/x-www-form-urlencoded")
    if kind.startswith(forms) and not data.lstrip().startswith(b"{"):  # a route may parse { as JSON, whatever its type
        if not kind.startswith(forms[0]):  # vLLM would parse it on the event loop
            raise HTTPProblem(Code.CONTENT_TYPE, f"the content type is {brief(kind)}, which no route reads: send JSON")
        try:
            async with Request(scope, replay(data, _nothing)).form() as form:
                return {name: value for name, value in form.multi_items() if not isinstance(value, UploadFile)}
        except HTTPException:
            return None

    def read() -> dict[str, object]:
        check_size(_fields(body := parse_body(data), scope["path"]))
        return body

    try:
        return await understood(read, len(data)) if data else {}
    except HTTPProblem as error:
        if error.code is Code.BODY_TOO_COMPLEX or error.param:  # vLLM would parse it on the event loop, or accept it
            raise
        return None


def _fields(body: object, path: str) -> dict[str, object]:
    """The fields of a body, and on `NESTING_ROUTE` those of its `sampling_params`, which are read there in their
    place."""
    fields = dict(body) if isinstance(body, dict) else {}
    if not path.endswith(NESTING_ROUTE) or not isinstance(params := fields.pop("sampling_params", None), dict):
        return fields
    kept = {"token_ids": fields["token_ids"]} if "token_ids" in fields else {}
    return {name: value for name, value in fields.items() if name not in LIMITS[NESTING_ROUTE]} | params | kept


def _reads_beams(fields: Mapping[str, object], path: str) -> bool:
    """Whether the answer has log-probabilities, if it is of a beam search."""
    asked = [value for name in ("logprobs", "top_logprobs") if (value := fields.get(name)) is not None]
    if path.endswith("/v1/chat/completions"):  # a completion reads False as 0, which asks for that of the token itself
        asked = [value for value in asked if value is not False]
    return bool(asked)


def _repeats(path: str) -> bool:
    """Whether the last events of a stream on this route have the whole answer again."""
    return path.endswith("/v1/responses")


async def _nothing() -> Message:
    return {"type": "http.disconnect"}


def check_text(body: object, size: int, front: Frontend) -> None:
    """Raise HTTPProblem if a body of `size` bytes has more text than a request may have."""
    most = max(MIN_TEXT, TEXT_PER_TOKEN * front.context)
    if size > most and text_length(body) > most:
        raise HTTPProblem(
            Code.BODY_TOO_LARGE, f"the texts of the body have more than {most} characters, the limit here"
        )


def check_repeated(body: dict[str, object], size: int) -> None:
    """Raise HTTPProblem if the prompts of a body of `size` bytes, which the engine has once for each answer, are too
    much."""
    if (repeated := engine_bytes(body, size)) > MAX_BODY:
        raise HTTPProblem(
            Code.BODY_TOO_LARGE,
            "the prompt counts n times, and 4 times more for each log-probability of it (`prompt_logprobs`, or "
            f"`logprobs` with `echo`): that is {repeated} bytes, and the limit is {MAX_BODY}; lower these, or send "
            "several requests",
            param="n",
        )


def check_reserved(body: dict[str, object], caller: Caller) -> None:
    """Raise HTTPProblem for a field that this caller may not use."""
    if caller.manages:
        return
    xargs = body.get(carriers.XARGS)
    for field, reason in MANAGER_FIELDS.items():
        if body.get(field) or (isinstance(xargs, dict) and xargs.get(field)):
            raise errors.unsupported(f"'{field}' needs a key with the managing role: {reason}", field)


async def _run(
    app: ASGIApp,
    control: Control,
    way: Passage,
    body: object,
    scope: Scope,
    receive: Receive,
    send: Send,
    used: Callable[[], bool] | None = None,
) -> None:
    """Run `app` with its way to the engine.

    Args:
        body: what the client sent, for errors that name a field of it.
        used: whether the engine has got the admission; None if it need not get one.
    """
    scope = _in_our_words(origin.plain_json(scope), body)
    answer = _Held(restated(send, body if isinstance(body, dict) else ()), way, used, scope, receive)
    with _passing(way):
        try:
            await app(scope, receive, answer.send)
        except Exception:
            if way.refused is None or not await answer.refuse():
                raise
        finally:
            way.over = used is not None
            if way.refused:
                metrics.REFUSED.labels(reason=type(way.refused).__name__).inc()
                control.refused(way.refused, scope)


def _in_our_words(scope: Scope, body: object) -> Scope:
    """The scope of a route with exception handlers that report a body's problems as our own routes do, whatever vLLM's
    checks raise. Starlette passes an app's handlers to its routes in the scope."""
    theirs, by_status = scope.get("starlette.exception_handlers", ({}, {}))

    async def telling(
        request: Request, error: Exception, then: Callable[[Request, Exception], Awaitable[Response]] | None = None
    ) -> Response:
        if internals.server.of_the_body(error) and isinstance(body, dict):
            found = await offload("body", LARGE, lambda: internals.server.problems_of(scope.get("route"), body))
            if found or then is None:
                unknown = {
                    "type": "value_error",
                    "loc": ("body",),
                    "ctx": {"error": "a field has the wrong type"},
                }
                return await errors.on_validation_error(request, RequestValidationError(found or [unknown]))
        if then is None:
            raise error
        return await then(request, error)

    ours: dict[object, object] = {
        kind: then if issubclass(kind, HTTPException) else partial(telling, then=then) for kind, then in theirs.items()
    }
    ours |= {Exception: telling, RequestValidationError: _on_validation_error}
    return {**scope, "starlette.exception_handlers": (ours, by_status)}


async def _on_validation_error(request: Request, error: Exception) -> Response:
    """Validation errors of vLLM's routes. A wrong content type comes as an error without a field."""
    assert isinstance(error, RequestValidationError)
    if any(isinstance(item, str) for item in error.errors()):
        try:
            origin.check_kind(request.scope, origin.JSON)
        except HTTPProblem as problem:
            return errors.of(problem)
    return await errors.on_validation_error(request, error)


class _Held:
    """An answer that is held back until the engine has got the request with its admission, or until the answer's end.

    So a request gets a 400 if the engine refuses it or never gets it as it was admitted; of several prompts the first
    decides. Without this, some routes begin a stream before they ask the engine, and others answer with a 500.
    """

    def __init__(
        self, send: Send, way: Passage, used: Callable[[], bool] | None, scope: Scope, receive: Receive
    ) -> None:
        self._send, self._way, self._used, self._scope, self._receive = send, way, used, scope, receive
        self._kept: list[Message] = []
        self._passes = self._refused = False

    async def send(self, message: Message) -> None:
        if self._passes:
            await self._send(message)
        elif not self._refused:
            self._kept.append(message)
            await self._judge(ends=message["type"] == "http.response.body" and not message.get("more_body", False))

    async def _judge(self, ends: bool) -> None:
        way = self._way
        taken = way.plain and (way.asked or (way.forms and way.reserve is None)) if self._used is None else self._used()
        failed = self._kept[0]["status"] >= 400
        if self._way.refused or (ends and not (taken or failed or self._used is None)):
            await self.refuse()
        elif taken or failed or ends:
            self._passes = True
            for message in self._kept:
                await self._send(message)
            self._kept.clear()

    async def refuse(self) -> bool:
        """Send a 400 in place of the answer. Returns False if the answer has already begun."""
        if not self._passes and not self._refused:
            self._refused = True
            reason = self._way.refused or errors.unsupported(
                "vLLM does not pass this kind of request to the engine with its steering"
            )
            await errors.of(reason)(self._scope, self._receive, self._send)
        return self._refused


class ModelsLayer(_Layer):
    """The layer around `GET /v1/models`: adds an alias for each served model with each direction."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        caller = control_of(scope["app"]).caller(scope)
        names = [name for name in front_end_of(scope["app"]).registry.names() if caller.may_use(name)]

        async def change(body: bytes) -> bytes:
            listed = json.loads(body)
            for card in list(listed["data"]):
                for name in names:
                    alias = {"id": f"{card['id']}{carriers.PLUS}{name}", "parent": card["id"], "root": name}
                    listed["data"].append(card | alias)
            return json.dumps(listed).encode()

        await self.app(scope, receive, rewriting(send, lambda start: change if start["status"] == 200 else None))


class HealthLayer(_Layer):
    """The layer around `GET /health`: vLLM's status, with the state of steering as the body."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        control = control_of(scope["app"])
        health = routes.health(control, manages=control.caller(scope).manages)

        def choose(start: Message) -> Change:
            async def change(_: bytes) -> bytes:
                return json.dumps({"status": "ok" if start["status"] == 200 else "failed", **health}).encode()

            return change

        await self.app(scope, receive, rewriting(send, choose, origin.JSON))
