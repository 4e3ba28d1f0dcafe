"""Routes that take JSON: the body is the one that was read, bounded and parsed once."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response

from steer.serve import errors
from steer.serve.body import BODY, Gone, parse_body, read_body
from steer.serve.directions import OwnRoute

#: Bytes of a body that steers nothing.
MAX_CONTROL = 16 * 1024


class _Parsed(Request):
    """A request whose body stands in its scope."""

    async def body(self) -> bytes:
        return b"{}"  # so that `json` is asked

    async def json(self) -> Any:
        return self.scope[BODY]


class JsonRoute(OwnRoute):
    """Its body is JSON, and says so."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()
        if self.body_field is None:
            return handler

        async def handling(request: Request) -> Response:
            kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
            if kind != "application/json":
                return errors.response(
                    415,
                    "the header 'Content-Type: application/json' is missing"
                    if not kind
                    else f"Content-Type is {kind[:60]!r}; accepted: application/json",
                    code="not_json",
                    param="Content-Type",
                )
            try:
                if BODY not in request.scope:
                    request.scope[BODY] = parse_body(await read_body(request.scope, request.receive, MAX_CONTROL))
            except Gone:
                return Response(status_code=400)
            except errors.HTTPProblem as error:
                return errors.of(error)
            return await handler(_Parsed(request.scope, request.receive))

        return handling
