"""Errors as the OpenAI API gives them: one table from exception to status, one shape of body."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from itertools import islice
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
    accepted,
    field_path,
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
    """The problems of one body, up to `MAX_PROBLEMS`, in one message that names each field."""
    assert isinstance(error, RequestValidationError)
    problems: dict[str, str] = {}
    others = []
    for item in islice(error.errors(), MAX_PROBLEMS):
        where = item["loc"][item["loc"][:1] == ("body",) :]
        cause = item.get("ctx", {}).get("error")
        if isinstance(cause, Unserved):
            for name, wrong in cause.found:
                problems.setdefault(".".join([*field_path(where), name]), wrong)
        else:
            others.append({**item, "loc": where})
    problems = problems_by_field(others, "body") | problems
    message = "; ".join(f"{where}: {wrong}" for where, wrong in problems.items())
    return response(400, message, param=next(iter(problems)), code="invalid_value")


#: Problems of one body that are told of.
MAX_PROBLEMS = 16
#: Characters of a message that others wrote.
LONGEST = 1000
#: How pydantic tells of a problem where an engine hands its whole text on.
_TOLD = re.compile(r"^(\S.*)\n +(.*) \[type=(\w+), input_value=(.*), input_type=\S+\]$", re.MULTILINE)


def pydantic_text(message: str) -> tuple[str, str] | None:
    """What pydantic tells in a text of its own, in plain words, and the first field that it is of; None for others."""
    found: dict[str, str] = {}
    for place, said, kind, value in _TOLD.findall(message)[:MAX_PROBLEMS]:
        what = accepted(kind, {})
        own = kind == "value_error"
        wrong = said.removeprefix("Value error, ") if own else f"{value[:60]} is not accepted{what and f': {what}'}"
        parts = place.split(".")
        found.setdefault(".".join(field_path(parts[parts[:1] == ["body"] :])), wrong)
    if not found:
        return None
    return "; ".join(f"{where}: {wrong}" for where, wrong in found.items())[:LONGEST], next(iter(found))


async def on_http_exception(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    return response(
        error.status_code, str(error.detail), code={404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
    )
