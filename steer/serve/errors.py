"""Errors as the OpenAI API gives them: one table from exception to status, one shape of body."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from itertools import islice
from types import MappingProxyType
from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from steer.errors import DirectionError, EngineFailed, InvalidInput, NoRoom, NotFinite, RequestFailed, SteerError
from steer.serve.fields import Unserved
from steer.spec import brief

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
        return response(400, str(error), param=error.param, code=code)
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
    for item in islice(error.errors(), MAX_PROBLEMS):
        where = _where(item["loc"])
        cause = item.get("ctx", {}).get("error")
        if isinstance(cause, Unserved):
            for name, wrong in cause.found:
                problems.setdefault(".".join([*where, name]), wrong)
        else:
            problems.setdefault(".".join(where) or "body", _wrong(item))
    message = "; ".join(f"{where}: {wrong}" for where, wrong in problems.items())
    return response(400, message, param=next(iter(problems)), code="invalid_value")


def _where(place: Iterable[int | str]) -> list[str]:
    """The path of a field. Pydantic also says which function and which of several types it was at, by their names."""
    parts = [str(part)[:100] for part in place if not str(part).startswith("function-")]
    types = (i for i, part in enumerate(parts) if "[" in part or part in _KINDS or part[:1].isupper())
    return parts[parts[:1] == ["body"] : next(types, len(parts))]


#: Problems of one body that are told of.
MAX_PROBLEMS = 16
_KINDS = frozenset(("str", "int", "float", "bool", "list", "dict", "nullable", "union"))
#: What is accepted where pydantic says this, with what it says of the limit. A beginning stands for all that have it.
_ACCEPTED = {
    "bool_": "true or false",
    "bytes_": "a text",
    "dataclass_": "an object",
    "dict_": "an object",
    "enum": "{expected}",
    "finite_": "a number",
    "float_": "a number",
    "greater_than": "a number above {gt}",
    "greater_than_equal": "a number from {ge} up",
    "int_": "a whole number",
    "iterable_": "a list",
    "less_than": "a number below {lt}",
    "less_than_equal": "a number up to {le}",
    "list_": "a list",
    "literal_": "{expected}",
    "mapping_": "an object",
    "model_": "an object",
    "multiple_of": "a multiple of {multiple_of}",
    "none_": "null",
    "string_pattern_mismatch": "a text that matches {pattern}",
    "string_too_long": "a text of at most {max_length} characters",
    "string_too_short": "a text of at least {min_length} characters",
    "string_": "a text",
    "too_long": "at most {max_length} of them",
    "too_short": "at least {min_length} of them",
    "tuple_": "a list",
    "union_tag_": "one of {expected_tags}",
}
#: How pydantic tells of a problem where an engine hands its whole text on.
_TOLD = re.compile(r"^(\S.*)\n +(.*) \[type=(\w+), input_value=(.*), input_type=\S+\]$", re.MULTILINE)


def _wrong(item: Mapping[str, Any]) -> str:
    """What is wrong about one field."""
    kind, limits = item["type"], item.get("ctx", {})
    if kind == "missing":
        return "missing; it is required"
    if kind == "extra_forbidden":
        return "unknown field"
    if kind == "value_error":
        return str(limits["error"])[:LONGEST]
    return f"{brief(item.get('input'))} is not accepted{_accepted(kind, limits)}"


def _accepted(kind: str, limits: Mapping[str, Any]) -> str:
    exact = kind if kind in _ACCEPTED else next((k for k in _ACCEPTED if k.endswith("_") and kind.startswith(k)), None)
    if exact is None:
        return ""
    try:
        shown = {name: f"{limit:g}" if isinstance(limit, float) else str(limit)[:200] for name, limit in limits.items()}
        return f": {_ACCEPTED[exact].format(**shown)}"
    except KeyError:
        return ""


#: Characters of a message that others wrote.
LONGEST = 1000


def pydantic_text(message: str) -> tuple[str, str] | None:
    """What pydantic tells in a text of its own, in plain words, and the first field that it is of; None for others."""
    found: dict[str, str] = {}
    for where, said, kind, value in _TOLD.findall(message)[:MAX_PROBLEMS]:
        own = kind == "value_error"
        wrong = said.removeprefix("Value error, ") if own else f"{value[:60]} is not accepted{_accepted(kind, {})}"
        found.setdefault(".".join(_where(where.split("."))), wrong)
    if not found:
        return None
    return "; ".join(f"{where}: {wrong}" for where, wrong in found.items())[:LONGEST], next(iter(found))


async def on_http_exception(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    return response(
        error.status_code, str(error.detail), code={404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
    )
