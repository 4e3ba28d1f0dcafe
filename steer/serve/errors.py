"""Errors as the OpenAI API gives them: one table from exception to status, one shape of body."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from enum import Enum
from itertools import islice
from types import MappingProxyType
from typing import Annotated, Literal, NotRequired, cast

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import Field, WithJsonSchema
from pydantic_core import ErrorDetails
from starlette.exceptions import HTTPException
from typing_extensions import TypedDict

from steer.errors import (
    MAX_PROBLEM,
    MAX_PROBLEMS,
    DirectionError,
    EngineFailed,
    InvalidInput,
    NoRoom,
    NotFinite,
    RequestFailed,
    SteerError,
    describe_expected,
    field_path,
    problems_by_field,
)

_NONE: Mapping[str, str] = MappingProxyType({})


class Code(Enum):
    """Every `code` of an error, with its status and what it says to a client. Its value on the wire is the name in
    small letters."""

    AUDIT_UNAVAILABLE = 503, "the audit log cannot be written, so nothing is steered"
    BODY_TOO_COMPLEX = 400, "the body nests too deeply, or has too many values or keys"
    BODY_TOO_LARGE = 413, "the body is over the limit of bytes"
    CONTENT_TYPE = 415, "the header `Content-Type` is missing or another: JSON for requests, octet-stream for a file"
    CONTEXT_LENGTH_EXCEEDED = 400, "prompt and answer do not fit into the model's context"
    DEFAULT_UNAVAILABLE = 503, "the default steering of the server or the key cannot be applied"
    DIRECTION_NOT_FOUND = 404, "no direction of this name, on `/v1/directions`; in a request it is `invalid_value`"
    ENGINE_FAILED = 503, "the engine has failed: the server must be restarted"
    HEADERS_TOO_LARGE = 431, "the headers are over the limit of bytes"
    HOST_NOT_ALLOWED = 421, "the server has no keys and is not known by this name: `--allowed-hosts`"
    INVALID_API_KEY = 401, "the key is missing, unknown or was taken away"
    INVALID_DIRECTION = 400, "what was sent is no direction, or not one for this model; `problems` lists the reasons"
    INVALID_HTTP = 400, "what came is no request of HTTP/1.1, or more than one connection may send"
    INVALID_JSON = 400, "the body is no JSON object, or has a key twice"
    INVALID_VALUE = 400, "a field has a value that is not accepted, or is not known; `param` names it"
    METHOD_NOT_ALLOWED = 405, "the route has no such method"
    MODEL_NOT_FOUND = 404, "no model of this name; `/v1/models` lists the names"
    NO_FREE_ROWS = 409, "no row is free: delete a direction, wait for requests to end, or start with more `--rows`"
    NOT_FINITE = 400, "steering at this strength took the stream out of the range of the model's dtype"
    NOT_FOUND = 404, "no route of this path, or one that only the vLLM backend has"
    ORIGIN_NOT_ALLOWED = 403, "a web page of an origin that is not among `--cors-origins`"
    PATH_TOO_LONG = 414, "the path is over the limit of bytes"
    POLICY_UNREAD = 503, "the policy file has not been read for a while, so no key is known to hold"
    QUEUE_FULL = 429, "no free place in the queue: try again after `Retry-After` seconds"
    RATE_LIMIT_EXCEEDED = 429, "over a limit of this key: try again after `Retry-After` seconds"
    REQUIRED_UNAVAILABLE = 503, "steering that is required of this key cannot be applied"
    REQUEST_FAILED = 500, "this one request failed; all others go on"
    STEERING_FORBIDDEN = 403, "this key may not do that; the message names the rule"
    STEERING_OFF = 503, "steering is switched off"
    STOPPING = 503, "the server is stopping: ask another one, or this one again later"
    STORAGE = 507, "the folder of directions cannot be written"
    UNSUPPORTED = 400, "a combination that is not served"

    def __init__(self, status: int, meaning: str) -> None:
        self.status, self.meaning = status, meaning

    @property
    def wire(self) -> str:
        return self.name.lower()


class HTTPProblem(SteerError):
    """A problem with a code of its own."""

    def __init__(
        self, code: Code, message: str, *, param: str | None = None, headers: Mapping[str, str] = _NONE
    ) -> None:
        self.code, self.param, self.headers = code, param, headers
        super().__init__(message)


def unsupported(message: str, param: str | None = None) -> HTTPProblem:
    return HTTPProblem(Code.UNSUPPORTED, message, param=param)


class Unserved(ValueError):
    """Fields that a request may not have: `found` has each with what is wrong about it."""

    def __init__(self, found: Iterable[tuple[str, str]]) -> None:
        self.found = tuple(found)
        super().__init__("; ".join(f"{name}: {wrong}" for name, wrong in self.found))


class Problem(TypedDict):
    """What is wrong, in the shape of the OpenAI API."""

    message: Annotated[str, Field(description="which value, which rule, and what would be accepted")]
    type: Literal["invalid_request_error", "rate_limit_error", "server_error"]
    param: Annotated[str | None, Field(description="the field that is wrong, where it is one")]
    code: Annotated[str | None, WithJsonSchema({"enum": [*(code.wire for code in Code), None]})]
    problems: NotRequired[Annotated[list[str], Field(description="of `invalid_direction`: every reason")]]


class ErrorAnswer(TypedDict):
    """An answer with a status of 400 or more."""

    error: Problem


def documented(*codes: Code) -> dict[int | str, dict[str, object]]:
    """The errors of a route for its OpenAPI document: by status those that its handler may give, and as `default` what
    comes from the layers around it."""
    by_status: dict[int, list[str]] = {}
    for code in codes:
        by_status.setdefault(code.status, []).append(f"`{code.wire}`: {code.meaning}")
    described = {status: ". ".join(lines) for status, lines in sorted(by_status.items())}
    others = "Any other error: of the key, the host, the headers or the path"
    return {
        status: {"model": ErrorAnswer, "description": text} for status, text in {**described, "default": others}.items()
    }


def body(status: int, message: str, *, param: str | None, code: str | None) -> ErrorAnswer:
    kind: Literal["invalid_request_error", "rate_limit_error", "server_error"] = "invalid_request_error"
    if status == 429:
        kind = "rate_limit_error"
    elif status >= 500:
        kind = "server_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def response(code: Code, message: str, *, param: str | None = None, problems: Sequence[str] = ()) -> JSONResponse:
    """`problems`: every reason, where there may be several."""
    told = body(code.status, message, param=param, code=code.wire)
    if problems:
        told["error"]["problems"] = list(problems)
    return JSONResponse(told, code.status)


def of(error: Exception) -> JSONResponse:
    match error:
        case HTTPProblem():
            out = response(error.code, str(error), param=error.param)
            out.headers.update(error.headers)
            return out
        case NoRoom():
            out = response(Code.QUEUE_FULL, str(error))
            out.headers["Retry-After"] = "1"
            return out
        case DirectionError():
            return response(Code.INVALID_DIRECTION, str(error), param=error.param, problems=error.problems)
        case InvalidInput():
            return response(Code.INVALID_VALUE, str(error), param=error.param)
        case NotFinite():
            return response(Code.NOT_FINITE, str(error), param="steer")
        case RequestFailed():
            return response(Code.REQUEST_FAILED, str(error))
        case EngineFailed():
            return response(Code.ENGINE_FAILED, str(error))
    raise error


def error_event(error: Exception) -> str:
    """`error` as a server-sent event, for a stream that has already begun."""
    return f"data: {bytes(of(error).body).decode()}\n\n"


async def on_steer_error(_request: Request, error: Exception) -> JSONResponse:
    return of(error)


async def on_validation_error(_request: Request, error: Exception) -> JSONResponse:
    """The problems of one body, up to `MAX_PROBLEMS`, in one message that names each field."""
    assert isinstance(error, RequestValidationError)
    problems: dict[str, str] = {}
    others: list[ErrorDetails] = []
    for item in islice(error.errors(), MAX_PROBLEMS):
        if isinstance(item, str):  # an engine's own, of no field
            problems.setdefault("body", item[:MAX_PROBLEM])
            continue
        where = item["loc"][item["loc"][:1] == ("body",) :]
        cause = item.get("ctx", {}).get("error")
        if isinstance(cause, Unserved):
            for name, wrong in cause.found:
                problems.setdefault(".".join([*field_path(where), name]), wrong)
        else:
            others.append(cast(ErrorDetails, {**item, "loc": where}))
    problems = problems_by_field(others, "body") | problems
    message = "; ".join(f"{where}: {wrong}" for where, wrong in problems.items())
    return response(Code.INVALID_VALUE, message, param=next(iter(problems)))


#: How pydantic tells of a problem where an engine hands its whole text on.
_TOLD = re.compile(r"^(\S.*)\n +(.*) \[type=(\w+), input_value=(.*), input_type=\S+\]$", re.MULTILINE)


def pydantic_text(message: str) -> tuple[str, str] | None:
    """What pydantic tells in a text of its own, in plain words, and the first field that it is of; None for others."""
    found: dict[str, str] = {}
    for place, said, kind, value in _TOLD.findall(message)[:MAX_PROBLEMS]:
        what = describe_expected(kind, {})
        own = kind == "value_error"
        wrong = said.removeprefix("Value error, ") if own else f"{value[:60]} is not accepted{what and f': {what}'}"
        parts = place.split(".")
        found.setdefault(".".join(field_path(parts[parts[:1] == ["body"] :])), wrong)
    if not found:
        return None
    return "; ".join(f"{where}: {wrong}" for where, wrong in found.items())[:MAX_PROBLEM], next(iter(found))


def no_route(path: str) -> JSONResponse:
    """Of a client whose base URL is perhaps another than it must be."""
    said = f"there is no route {path[:100]!r} here; the base URL of a client ends in /v1, as in /v1/chat/completions"
    return response(Code.NOT_FOUND, said)


async def on_http_exception(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    if error.status_code == 404:
        return no_route(request.scope["path"])
    status = error.status_code
    code = next((code.wire for code in (Code.NOT_FOUND, Code.METHOD_NOT_ALLOWED) if code.status == status), None)
    return JSONResponse(body(status, str(error.detail), param=None, code=code), status)
