"""Errors as the OpenAI API gives them: one table from exception to status, one shape of body."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from steer.errors import (
    DirectionError,
    EngineFailed,
    InvalidInput,
    NoRoom,
    NotFinite,
    RequestFailed,
    SteerError,
    problems_by_field,
)
from steer.serve.fields import Unserved

_NONE: Mapping[str, str] = MappingProxyType({})


class HTTPProblem(SteerError):
    """A problem that has a status of its own (404, 413, ...)."""

    def __init__(
        self, status: int, message: str, *, code: str, param: str | None = None, headers: Mapping[str, str] = _NONE
    ) -> None:
        self.status, self.code, self.param, self.headers = status, code, param, headers
        super().__init__(message)


def body(status: int, message: str, *, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    kind = "invalid_request_error" if status < 500 and status != 429 else "server_error"
    if status == 429:
        kind = "rate_limit_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def response(status: int, message: str, *, param: str | None = None, code: str | None = None) -> JSONResponse:
    return JSONResponse(body(status, message, param=param, code=code), status)


def of(error: Exception) -> JSONResponse:
    """The response that `error` becomes."""
    if isinstance(error, HTTPProblem):
        out = response(error.status, str(error), param=error.param, code=error.code)
        out.headers.update(error.headers)
        return out
    if isinstance(error, NoRoom):
        out = response(429, str(error), code="queue_full")
        out.headers["Retry-After"] = str(max(1, math.ceil(error.retry_after)))
        return out
    if isinstance(error, InvalidInput):
        code = "invalid_direction" if isinstance(error, DirectionError) else "invalid_value"
        told = body(400, str(error), param=error.param, code=code)
        if isinstance(error, DirectionError):
            told["error"]["problems"] = list(error.problems)
        return JSONResponse(told, 400)
    if isinstance(error, NotFinite):
        return response(400, str(error), param="steer", code="not_finite")
    if isinstance(error, RequestFailed):
        return response(500, str(error), code="request_failed")
    if isinstance(error, EngineFailed):
        return response(503, str(error), code="engine_failed")
    raise error


def event(error: Exception) -> str:
    """`error` as a server-sent event, for a stream that has already begun."""
    return f"data: {bytes(of(error).body).decode()}\n\n"


async def on_steer_error(_request: Request, error: Exception) -> JSONResponse:
    return of(error)


async def on_validation_error(_request: Request, error: Exception) -> JSONResponse:
    """The problems of one body, all of them, in one message that names each field."""
    assert isinstance(error, RequestValidationError)
    problems: dict[str, str] = {}
    others = []
    for item in error.errors():
        where = tuple(part for part in item["loc"] if part != "body")
        cause = item.get("ctx", {}).get("error")
        if isinstance(cause, Unserved):
            for name, wrong in cause.found:
                problems.setdefault(".".join([*map(str, where), name]), wrong)
        else:
            others.append({**item, "loc": where})
    problems = problems_by_field(others, "body") | problems
    message = "; ".join(f"{where}: {wrong}" for where, wrong in problems.items())
    return response(400, message, param=next(iter(problems)), code="invalid_value")


async def on_http_exception(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    return response(
        error.status_code, str(error.detail), code={404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
    )
