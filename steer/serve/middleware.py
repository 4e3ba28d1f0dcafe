"""Carriers in, receipt out: an ASGI layer around each generation route of any server.

It wraps the routes themselves (`wrap_routes`), after the server's own routing. So it compares no paths, and no prefix
or mount can bypass it. It reads the body of a generation request, resolves and pins the spec and the read-out, passes
the request on without the carriers (`scope["steer"]` has the admission), adds the receipt to the answer, and releases
the admission when the answer has ended or the client has disconnected. `Control` decides who may do what, and what is
logged.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import partial

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from steer import readout
from steer.errors import SteerError
from steer.readout import RequestedReadout
from steer.registry import Admission, Registry
from steer.serve import carriers, errors, metrics
from steer.serve.asgi import Outgoing, is_event_stream, with_headers
from steer.serve.authorise import NO_READOUT, admit
from steer.serve.body import (
    BODY,
    SIZE,
    Gone,
    answer_count,
    asks_most,
    check_size,
    parse_body,
    prompt_count,
    read_body,
    replay,
    tokens_of,
    understood,
)
from steer.serve.control import Control, Run
from steer.serve.origin import JSON, check_kind
from steer.spec import RequestedDirection, Spec
from steer.tokenization import rendered_otherwise

log = logging.getLogger("steer")

#: The field in which a request gives variables of the chat template.
CHAT_TEMPLATE_KWARGS = "chat_template_kwargs"
#: Limit on different warnings: requests must not fill the memory or the log.
MAX_WARNINGS = 256
#: The beginnings of an event that ends a stream with an error, as OpenAI's and Anthropic's APIs write it.
FAILED = (b'data: {"error"', b"event: error", b"event: response.failed")
#: Bytes that are sent to a client whether it reads them or not. (uvicorn waits where it holds more.)
UNREAD = 2**16
Forward = Callable[[dict[str, object], Admission], None]


def wrap_routes(app: Starlette, layers: Mapping[tuple[str, str], Callable[[ASGIApp], ASGIApp]]) -> set[str]:
    """Put its layer around each of these routes (path, method) that the app has. Returns the paths that were found."""
    found: set[str] = set()
    for route in app.routes:
        for (path, method), layer in layers.items():
            if isinstance(route, Route) and route.path == path and method in (route.methods or ()):
                route.app = layer(route.app)
                found.add(path)
                break
    return found


def _before_end(send: Send, done: Callable[[], None]) -> Send:
    """A `send` that calls `done` before it sends the end of an answer: a client that has read the end may ask again
    before the app has returned. Clients of OpenAI's API take `[DONE]` for the end of a stream.

    `done` waits for a client that does not read what was sent before. The end of a large piece is its last byte.
    """
    streams = False

    async def sending(message: Message) -> None:
        nonlocal streams
        if message["type"] == "http.response.start":
            streams = is_event_stream(message)
        elif not message.get("more_body") or (streams and message.get("body", b"").rstrip().endswith(b"data: [DONE]")):
            if len(body := message.get("body", b"")) > UNREAD:
                await send({**message, "body": body[:-1], "more_body": True})
                message = {**message, "body": body[-1:]}
            await send({"type": "http.response.body", "body": b"", "more_body": True})  # returns when there is room
            done()
        await send(message)

    return sending


#: Answers one request, which counts for its key.
Handler = Callable[[Run, Scope, Receive, Send], Awaitable[None]]


async def counted(control: Control, handle: Handler, scope: Scope, receive: Receive, send: Send) -> None:
    """Have `handle` answer a request, which counts for its key up to the end of the answer."""
    try:
        run = control.enter(control.caller(scope))
    except SteerError as error:
        await refuse(control, error, scope, receive, send)
        return
    try:
        await handle(run, scope, receive, _before_end(send, partial(control.leave, run)))
    finally:
        control.leave(run)


async def refuse(control: Control, error: SteerError, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer with an error, and count and log the refusal."""
    metrics.REFUSED.labels(reason=type(error).__name__).inc()
    control.refused(error, scope)
    await errors.of(error)(scope, receive, send)


class RenderingWatch:
    """Warns once in the log if the chats that a direction steers are rendered in another way than the prompts that it
    was measured on: a direction that was measured without thinking may not suit answers with thinking.

    `default`: the template's variables where a request gives none.
    """

    def __init__(self, registry: Registry, default: Mapping[str, object] | None = None) -> None:
        self.registry, self.default = registry, dict(default or {})
        self._warned: set[tuple[str, str]] = set()

    def look(self, spec: Spec, body: Mapping[str, object]) -> None:
        """Look at the body of an admitted request."""
        if not spec or "messages" not in body or len(self._warned) >= MAX_WARNINGS:
            return
        given = body.get(CHAT_TEMPLATE_KWARGS)
        variables = self.default | given if isinstance(given, dict) else self.default
        for entry, meta in zip(spec.entries, self.registry.metas(spec), strict=False):
            difference = rendered_otherwise(meta.template, variables)
            if difference and (entry.digest, difference) not in self._warned:
                self._warned.add((entry.digest, difference))
                log.warning("direction '%s' acts on chats of another form: %s", entry.direction, difference)


@dataclass(eq=False)
class SteerMiddleware:
    """The layer around one route.

    Attributes:
        served: the model names that aliases extend.
        rendering: looks at how chats are rendered.
        default: what steers requests without a carrier.
        max_body: bytes.
        forward: may write the admission into the body, for an engine with another interface.
        readable: how many layers the engine can read.
        unreadable: why it can read none.
        parsed: whether the app takes the body from `scope[BODY]`, so that it need not be written as JSON again.
        context: the most tokens of one prompt with its answer.
    """

    app: ASGIApp
    _: KW_ONLY
    registry: Registry
    served: Sequence[str]
    control: Control
    rendering: RenderingWatch
    default: tuple[RequestedDirection, ...] = ()
    max_body: int = 8 * 2**20
    forward: Forward | None = None
    readable: int = 0
    unreadable: str = NO_READOUT
    parsed: bool = False
    context: int = 2**15

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await counted(self.control, self._handle, scope, receive, send)

    async def _handle(self, run: Run, scope: Scope, receive: Receive, send: Send) -> None:
        started = time.perf_counter()
        control = self.control
        try:
            check_kind(scope, JSON)
            data = await read_body(scope, receive, self.max_body)
            body, carried, wanted = await understood(partial(self._understand, data, scope), len(data))
            tokens = tokens_of(body, len(data), self.context, scope["path"])
            control.reserve(run, scope, tokens, answer_count(body), asks_most(body))
            admission = admit(
                carried,
                self.registry,
                self.default,
                wanted,
                readable=self.readable,
                unreadable=self.unreadable,
                caller=run.caller,
                rules=control.rules,
            )
            try:
                await control.begin(run, admission.spec, carried.model, scope)
            except BaseException:
                admission.release()
                raise
        except Gone:
            return
        except SteerError as error:
            await refuse(control, error, scope, receive, send)
            return
        answer = _Answer(send, run)
        with metrics.counting_usage() as run.usage:
            if body.get("use_beam_search"):
                run.usage.prompts = prompt_count(body)
            try:
                body.pop(carriers.FIELD, None)
                body.pop(readout.FIELD, None)
                if isinstance(xargs := body.get(carriers.XARGS), dict):
                    xargs.pop(carriers.FIELD, None)
                if carried.model is not None:
                    body["model"] = carried.model
                scope["steer"], scope[BODY], scope[SIZE] = admission, body, len(data)
                if self.forward:
                    self.forward(body, admission)
                metrics.ADMISSION.observe(time.perf_counter() - started)
                again = b"" if self.parsed else await understood(lambda: json.dumps(body).encode(), len(data))
                await run.serve(self.app, scope, replay(again, receive, answer.leave), answer)
                self.rendering.look(admission.spec, body)
            except Gone:
                pass
            except Exception:
                answer.outcome = "error"
                raise
            finally:
                admission.release()
                control.end(run, "error" if run.usage.failed else answer.outcome)

    def _understand(
        self, data: bytes, scope: Scope
    ) -> tuple[dict[str, object], carriers.Carried, RequestedReadout | None]:
        body = parse_body(data)
        check_size(body)
        carried = carriers.read(body, Headers(scope=scope), self.served, scope["query_string"])
        return body, carried, readout.parse(body.get(readout.FIELD))


class _Answer(Outgoing):
    """The answer as it is sent: adds the receipt, and records the outcome.

    `outcome`: ok, error, aborted (by the kill switch, the removal of its key or the end of the server), or cancelled
    (the client left).
    """

    def __init__(self, send: Send, run: Run) -> None:
        super().__init__(send)
        self._receipt = run.spec.receipt()
        self.outcome, self._left, self._failed = "cancelled", False, False

    def leave(self) -> None:
        """Record that the client has left: what some apps still send then is no answer."""
        self._left = True

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start" and message["status"] < 400:
            message = with_headers(message, lambda headers: headers.append(carriers.RECEIPT, self._receipt))
        await super().send(message)
        if message.get("body", b"").startswith(FAILED):
            self._failed = True
        if self.ended and self.outcome == "cancelled" and not self._left:
            self.outcome = "ok" if self.status < 400 and not self._failed else "error"

    async def break_off(self, error: Exception) -> None:
        await super().break_off(error)
        self.outcome = "aborted"
