"""Carriers in, receipt out: an ASGI middleware around any server's generation routes.

It reads the body of a generation request, resolves and pins the spec and what is to be read, hands the request on
without the carriers (`scope["steer"]` has the admission, `scope["steer_readout"]` the read-out or None), puts the
receipt on the answer, and unpins when the answer has ended or the client has gone. It never touches other routes.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from steer import readout
from steer.errors import SpecError, SteerError, UnknownDirection
from steer.readout import Readout, ReadWanted
from steer.registry import Admission, Registry
from steer.serve import carriers, errors, metrics
from steer.spec import Wanted

GENERATION_ROUTES = ("/v1/chat/completions", "/v1/completions")
Forward = Callable[[dict[str, Any], Admission], None]


class SteerMiddleware:
    """`served` are the model names that aliases extend; `forward` may write the admission into the body for an engine
    that lives behind another interface; `readable` is how many layers the engine behind can read, 0 for none."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        registry: Registry,
        served: Sequence[str],
        default: tuple[Wanted, ...] = (),
        max_body: int = 8 * 2**20,
        routes: Sequence[str] = GENERATION_ROUTES,
        forward: Forward | None = None,
        readable: int = 0,
    ) -> None:
        self.app, self.registry, self.served, self.default = app, registry, tuple(served), default
        self.max_body, self.routes, self.forward = max_body, frozenset(routes), forward
        self.readable = readable

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST" or scope["path"] not in self.routes:
            await self.app(scope, receive, send)
            return
        started = time.perf_counter()
        try:
            body = parse_body(await read_body(scope, receive, self.max_body))
            carried = carriers.read(body, scope["headers"], self.served)
            admission, reading = self._admit(carried, readout.parse(body.get(readout.FIELD)))
        except _Gone:
            return
        except SteerError as error:
            metrics.REFUSED.labels(reason=type(error).__name__).inc()
            await errors.of(error)(scope, receive, send)
            return
        try:
            body.pop(carriers.FIELD, None)
            body.pop(readout.FIELD, None)
            if isinstance(xargs := body.get(carriers.XARGS), dict):
                xargs.pop(carriers.FIELD, None)
            if carried.model is not None:
                body["model"] = carried.model
            if self.forward:
                self.forward(body, admission)
            scope["steer"], scope["steer_readout"] = admission, reading
            metrics.ADMISSION.observe(time.perf_counter() - started)
            await self.app(scope, _replay(json.dumps(body).encode(), receive), self._with_receipt(admission, send))
        finally:
            admission.release()
            if reading:
                reading.release()

    def _admit(self, carried: carriers.Carried, wanted: ReadWanted | None) -> tuple[Admission, Readout | None]:
        """Both in one step, so that what is read is the version that steers."""
        if wanted and not self.readable:
            raise SpecError(f"{readout.FIELD}: this server offers no read-out", param=readout.FIELD)
        with self.registry.steady():
            admission = self._admit_steering(carried)
            try:
                reading = readout.admit(wanted, admission.spec, self.registry, self.readable) if wanted else None
            except BaseException:
                admission.release()
                raise
        return admission, reading

    def _admit_steering(self, carried: carriers.Carried) -> Admission:
        try:
            return carriers.admit(carried, self.registry, self.default)
        except UnknownDirection as error:
            if carried.found:
                raise
            raise errors.HTTPProblem(
                503, f"the server's default steering cannot be applied: {error}", code="default_unavailable"
            ) from error

    def _with_receipt(self, admission: Admission, send: Send) -> Send:
        receipt = (carriers.RECEIPT.encode(), admission.spec.receipt().encode())

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                if message["status"] < 400:
                    message = {**message, "headers": [*message["headers"], receipt]}
                metrics.count(admission.spec, message["status"])
            await send(message)

        return sending


class _Gone(Exception):
    """The client left before its body had arrived."""


async def read_body(scope: Scope, receive: Receive, limit: int) -> bytes:
    """The whole body, not more than `limit` bytes. Raises HTTPProblem 413."""
    declared = next((v for k, v in scope["headers"] if k == b"content-length"), b"0")
    chunks: list[bytes] = []
    size = int(declared) if declared.isdigit() else 0
    while size <= limit:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise _Gone
        chunks.append(message.get("body", b""))
        size = sum(map(len, chunks))
        if not message.get("more_body", False) and size <= limit:
            return b"".join(chunks)
    raise errors.HTTPProblem(413, f"the body is over the limit of {limit} bytes", code="body_too_large")


def parse_body(data: bytes) -> dict[str, Any]:
    """A JSON object in which no key stands twice, so that nothing behind us can read another one than we did."""
    try:
        body = json.loads(data, object_pairs_hook=_unique)
    except errors.HTTPProblem:
        raise
    except (ValueError, RecursionError) as error:
        raise errors.HTTPProblem(400, f"the body is not JSON: {error}", code="invalid_json") from None
    if not isinstance(body, dict):
        raise errors.HTTPProblem(400, "the body must be a JSON object", code="invalid_json")
    return body


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = sorted({key for key in keys if keys.count(key) > 1})
        raise errors.HTTPProblem(400, f"the body has a key twice: {', '.join(twice)[:100]}", code="invalid_json")
    return out


def _replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives `body` once and then whatever comes, which is the client's disconnect."""
    given = False

    async def receiving() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return receiving
