"""Authentication: who calls, and which paths they may reach. An ASGI layer around every route of a server.

With a policy in force, only `/health` and the playground's own files (`PUBLIC`) answer without a key. An ordinary key
reaches the paths that are listed here. Every other path, also an unknown one, needs the managing role. Without a
policy, only the server's own web pages may call it (`origin`). A browser's preflight request is answered here, on every
server.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from steer.serve import errors, html
from steer.serve.asgi import with_headers
from steer.serve.authorise import ANYONE, CALLER, NOBODY, Caller, Refusal, forbidden
from steer.serve.control import Control, request_id
from steer.serve.errors import Code, HTTPProblem
from steer.serve.origin import ANY, foreign, header, is_preflight
from steer.serve.policy import hash_of

REQUEST_ID = "x-request-id"
MAX_HEADERS = 64 * 2**10
MAX_PATH = 8 * 2**10
#: Readable without a key. Their answers must not mention directions or keys.
PUBLIC = frozenset({"/health", *html.PATHS})
METRICS = "/metrics"
#: What a key without the managing role can reach: routes that our middleware steers, and routes that cannot generate.
ORDINARY: dict[str, re.Pattern[str]] = {
    "GET": re.compile(r"/v1/models(/.+)?|/v1/directions(/[^/]+)?|/v1/steering|/metrics|/version|/openapi\.json|/docs"),
    "POST": re.compile(
        r"/v1/chat/completions|/v1/completions|/v1/responses|/v1/messages(/count_tokens)?|/tokenize|/detokenize"
    ),
}
#: Matches no path.
NO_PATH = re.compile(r"(?!)")


def _with_request_id(send: Send, scope: Scope) -> Send:
    """Add the request's id to its answer: the audit log has the request under this id."""

    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            message = with_headers(message, lambda headers: headers.setdefault(REQUEST_ID, request_id(scope)))
        await send(message)

    return sending


class Access:
    """The layer. It tells the app who is calling, in `scope["steer.caller"]`.

    Args:
        control: has the policy, and the origins of the web pages that may call.
        cors: further arguments of Starlette's CORS layer.
    """

    def __init__(self, app: ASGIApp, *, control: Control, cors: Mapping[str, Any] | None = None) -> None:
        self.app, self.control = app, control
        self._keyed: ASGIApp = self._with_keys
        if control.origins:
            self._keyed = CORSMiddleware(self._with_keys, allow_origins=control.origins, **(cors or {}))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        if scope["type"] == "http":
            send = _with_request_id(send, scope)
        try:
            self._check_page(scope)
        except HTTPProblem as error:
            await self._refuse(error, scope, receive, send)
        else:
            await self._keyed(scope, receive, send)

    async def _with_keys(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            scope[CALLER] = self._enter(scope)
        except HTTPProblem as error:
            await self._refuse(error, scope, receive, send)
        else:
            await self.app(scope, receive, send)

    async def _refuse(self, error: HTTPProblem, scope: Scope, receive: Receive, send: Send) -> None:
        self.control.refused(error, scope)
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008, "reason": error.code.wire})
        else:
            await errors.of(error)(scope, receive, send)

    def _check_page(self, scope: Scope) -> None:
        """Check what holds for every caller, known or not. Raises HTTPProblem."""
        headers = Headers(scope=scope)
        if sum(len(name) + len(value) for name, value in headers.raw) > MAX_HEADERS:
            raise HTTPProblem(Code.HEADERS_TOO_LARGE, f"the headers are over {MAX_HEADERS} bytes")
        if len(scope.get("raw_path") or b"") + len(scope.get("query_string") or b"") > MAX_PATH:
            raise HTTPProblem(Code.PATH_TOO_LONG, f"the path is over {MAX_PATH} bytes")
        if self.control.allowed_origins is not None:
            self.control.allowed_origins.check(headers)
        if is_preflight(scope):
            origin = header(headers, "origin")
            if origin is None or not {ANY, origin} & self.control.origins:
                raise foreign(origin or "")

    def _enter(self, scope: Scope) -> Caller:
        force = self.control.in_force
        if force is None:
            return ANYONE
        method = "GET" if scope.get("method") == "HEAD" else scope.get("method", "websocket")
        path = route_path(scope)
        secret = api_key_of(Headers(scope=scope))
        stored = hash_of(secret or "")
        name = force.names.get(stored)
        known = Caller(name, force.keys[name], stored) if name and secret else None
        if method == "GET" and (path in PUBLIC or (path == METRICS and force.metrics_public)):
            return known or NOBODY
        if known is None:
            message = "the API key is not known here"
            if not secret:
                message = "an API key is needed: Authorization: Bearer KEY"
                if {"authorization", "x-api-key"} & set(Headers(scope=scope)):
                    message += "; the request has something else there, or more than one"
            raise Refusal(Code.INVALID_API_KEY, "key", message, WWW_Authenticate="Bearer")
        scope[CALLER] = known
        self.control.check_policy()
        if path == METRICS and not (known.rules.metrics or known.manages):
            refusal = "/metrics tells of all directions: it needs a key with `metrics = true` or the managing role"
        elif known.manages or ORDINARY.get(method, NO_PATH).fullmatch(path):
            return known
        else:
            refusal = f"{method} {path[:100]} needs a key with the managing role"
            meant = [f"/v1{path}", path.removeprefix("/v1") if path.startswith("/v1/v1/") else path]
            if any(ORDINARY.get(method, NO_PATH).fullmatch(one) for one in meant):
                refusal += f"; {errors.BASE_URL}"
        raise forbidden("path", refusal)


def route_path(scope: Scope) -> str:
    """The path that a server's router compares with its routes: the part after `root_path`."""
    path, root = str(scope["path"]), str(scope.get("root_path") or "")
    rest = path.removeprefix(root)
    return rest if rest != path and rest.startswith("/") else path


def api_key_of(headers: Headers) -> str | None:
    """The secret of a request, sent as OpenAI's or Anthropic's clients do; None for no secret or two, "" for a secret
    that is sent in another way."""
    found = {value.strip() for value in headers.getlist("x-api-key")}
    for value in headers.getlist("authorization"):
        scheme, _, secret = value.partition(" ")
        found.add(secret.strip() if scheme.lower() == "bearer" else "")
    return found.pop() if len(found) == 1 else None
