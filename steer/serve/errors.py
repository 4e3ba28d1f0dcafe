"""Errors in the shape of the OpenAI API: one table of codes, one function from exception to response."""

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
from starlette.routing import Match
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
    """Every `code` of an error, with its status and its meaning. On the wire it is its name in lower case."""

    AUDIT_UNAVAILABLE = 503, "the audit log cannot be written, so nothing is steered"
    BODY_TOO_COMPLEX = 400, "the body nests too deeply, or has too many values or keys"
    BODY_TOO_LARGE = 413, "the body is over the limit of bytes"
    CONTENT_TYPE = 415, "the header `Content-Type` is missing or wrong: JSON for requests, octet-stream for a file"
    CONTEXT_LENGTH_EXCEEDED = 400, "prompt and answer do not fit into the model's context"
    DEFAULT_UNAVAILABLE = 503, "the default steering of the server or the key cannot be applied"
    DIRECTION_NOT_FOUND = 404, "`/v1/directions` has no direction of this name; in a spec this is `invalid_value`"
    ENGINE_FAILED = 503, "the engine has failed: the server must be restarted"
    HEADERS_TOO_LARGE = 431, "the headers are over the limit of bytes"
    HOST_NOT_ALLOWED = 421, "the server has no keys and is not known by this name: `--allowed-hosts`"
    INVALID_API_KEY = 401, "the key is missing, unknown or was removed"
    INVALID_DIRECTION = 400, "the file is not a direction, or not one for this model; `problems` lists the reasons"
    INVALID_HTTP = 400, "the bytes are not an HTTP/1.1 request, or exceed a limit of one connection"
    INVALID_JSON = 400, "the body is not a JSON object, or has a key twice"
    INVALID_VALUE = 400, "a field is unknown, or has a value that is not accepted; `param` names it"
    METHOD_NOT_ALLOWED = 405, "the route has no such method"
    MODEL_NOT_FOUND = 404, "no model of this name; `/v1/models` lists the names"
    NO_FREE_ROWS = 409, "no row is free: delete a direction, wait for requests to end, or start with more `--rows`"
    NOT_FINITE = 400, "steering at this strength took the stream out of the range of the model's dtype"
    NOT_FOUND = 404, "no route with this path, or one that only the vLLM backend has"
    ORIGIN_NOT_ALLOWED = 403, "a web page whose origin is not among `--cors-origins`"
    PATH_TOO_LONG = 414, "the path is over the limit of bytes"
    POLICY_UNREAD = 503, "the policy file has not been read for a while, so it is not known which keys are valid"
    QUEUE_FULL = 429, "the queue is full: try again after `Retry-After` seconds"
    RATE_LIMIT_EXCEEDED = 429, "over a limit of this key: try again after `Retry-After` seconds"
    REQUIRED_UNAVAILABLE = 503, "steering that is required for this key cannot be applied"
    REQUEST_FAILED = 500, "this request failed; all others go on"
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
    """An error with its code."""

    def __init__(
        self, code: Code, message: str, *, param: str | None = None, headers: Mapping[str, str] = _NONE
    ) -> None:
        self.code, self.param, self.headers = code, param, headers
        super().__init__(message)


def unsupported(message: str, param: str | None = None) -> HTTPProblem:
    return HTTPProblem(Code.UNSUPPORTED, message, param=param)


class Unserved(ValueError):
    """Fields that a request may not have: `found` has (field, problem) for each."""

    def __init__(self, found: Iterable[tuple[str, str]]) -> None:
        self.found = tuple(found)
        super().__init__("; ".join(f"{name}: {wrong}" for name, wrong in self.found))


class Problem(TypedDict):
    """An error in the shape of the OpenAI API."""

    message: Annotated[str, Field(description="which value, which rule, and what would be accepted")]
    type: Literal["invalid_request_error", "rate_limit_error", "server_error"]
    param: Annotated[str | None, Field(description="the field that is wrong, if it is a field")]
    code: Annotated[str | None, WithJsonSchema({"enum": [*(code.wire for code in Code), None]})]
    problems: NotRequired[Annotated[list[str], Field(description="every reason for `invalid_direction`")]]


class ErrorAnswer(TypedDict):
    """An answer with a status of 400 or more."""

    error: Problem


def documented(*codes: Code) -> dict[int | str, dict[str, object]]:
    """The errors of a route for the OpenAPI document: those of its handler by status, and as `default` those of the
    layers around it."""
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
    """`problems`: every reason, if there may be several."""
    content = body(code.status, message, param=param, code=code.wire)
    if problems:
        content["error"]["problems"] = list(problems)
    return JSONResponse(content, code.status)


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
    """All problems of a body, up to `MAX_PROBLEMS`, in one message that names each field."""
    assert isinstance(error, RequestValidationError)
    problems: dict[str, str] = {}
    others: list[ErrorDetails] = []
    for item in islice(error.errors(), MAX_PROBLEMS):
        if not isinstance(item, str) and item["type"] == "json_invalid" and [*map(type, item["loc"])] == [str, int]:
            return response(Code.INVALID_JSON, f"the body is not JSON: {item['ctx']['error']}")
        if isinstance(item, str):  # raised by an engine, without a field
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


#: One problem in the text of a pydantic ValidationError, which an engine may pass on as a whole.
_PYDANTIC = re.compile(r"^(\S.*)\n +(.*) \[type=(\w+), input_value=(.*), input_type=\S+\]$", re.MULTILINE)


def pydantic_text(message: str) -> tuple[str, str] | None:
    """The text of a pydantic ValidationError in plain words, and the first field that it names; None for other
    texts."""
    found: dict[str, str] = {}
    for place, reason, kind, value in _PYDANTIC.findall(message)[:MAX_PROBLEMS]:
        what = describe_expected(kind, {})
        own = kind == "value_error"
        wrong = reason.removeprefix("Value error, ") if own else f"{value[:60]} is not accepted{what and f': {what}'}"
        parts = place.split(".")
        found.setdefault(".".join(field_path(parts[parts[:1] == ["body"] :])), wrong)
    if not found:
        return None
    return "; ".join(f"{where}: {wrong}" for where, wrong in found.items())[:MAX_PROBLEM], next(iter(found))


#: A hint for 404, since the base URL of a client is often wrong.
BASE_URL = "the base URL of a client ends in /v1, as in /v1/chat/completions"


def no_route(path: str) -> JSONResponse:
    hint = "" if "/v1/" in path else f"; {BASE_URL}"
    return response(Code.NOT_FOUND, f"there is no route {path[:100]!r} here{hint}")


async def on_http_exception(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    if error.status_code == 404:
        return no_route(request.scope["path"])
    if error.status_code == 405:
        scope = request.scope
        on_path = [route for route in request.app.routes if route.matches(scope)[0] is not Match.NONE]
        methods = {method for route in on_path for method in getattr(route, "methods", None) or ()}
        allowed = ", ".join(sorted(methods | ({"HEAD"} if "GET" in methods else set())))
        message = f"the method {scope['method'][:20]} is not accepted at {scope['path'][:100]}; accepted: {allowed}"
        return of(HTTPProblem(Code.METHOD_NOT_ALLOWED, message, headers={"Allow": allowed}))
    return JSONResponse(body(error.status_code, str(error.detail), param=None, code=None), error.status_code)
