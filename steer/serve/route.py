"""Route classes: how routes read bodies and report errors. If the middleware has parsed a body, it is not parsed
again."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from functools import partial

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from steer.errors import SteerError, whole_ranges
from steer.serve import errors
from steer.serve.body import BODY, SIZE, Gone, parse_body, read_body, understood
from steer.serve.control import Control
from steer.serve.origin import READING, check_kind

#: Bytes of the body of a control route.
MAX_CONTROL = 16 * 1024


class HeadRequests:
    """Answers HEAD, which load balancers use, on every route that has GET: with the same answer without its body."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self.app(scope, receive, send)
            return

        async def sending(message: Message) -> None:
            await send({**message, "body": b""} if message["type"] == "http.response.body" else message)

        await self.app({**scope, "method": "GET"}, receive, sending)


def _checked(model: type[BaseModel], body: object) -> BaseModel:
    try:
        return model.model_validate(body)
    except ValidationError as error:
        raise RequestValidationError(whole_ranges(error.errors(include_url=False), model)) from None


class JsonRoute(APIRoute):
    """A route with a JSON body. A large body is parsed and checked in a thread; FastAPI accepts the checked model."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[None, None, Response]]:
        handler, field = super().get_route_handler(), self.body_field
        if field is None:
            return handler
        model: type[BaseModel] = field.field_info.annotation  # type: ignore[assignment]

        async def handling(request: Request) -> Response:
            try:
                if BODY not in request.scope:
                    data = await read_body(request.scope, request.receive, MAX_CONTROL)
                    request.scope[BODY], request.scope[SIZE] = parse_body(data), len(data)
                body = await understood(partial(_checked, model, request.scope[BODY]), request.scope[SIZE])
            except Gone:
                return Response(status_code=400)
            request._body, request._json = b"{}", body  # Starlette's caches of the body and of its JSON
            return await handler(request)

        return handling


def own_route(control: Control, kind: str) -> type[JsonRoute]:
    """A class of control routes. Their errors have OpenAI's shape, also in another app. Routes that change something
    need the managing role, and their body must have the content type `kind`."""

    class OwnRoute(JsonRoute):
        def get_route_handler(self) -> Callable[[Request], Coroutine[None, None, Response]]:
            handler = super().get_route_handler()

            async def handling(request: Request) -> Response:
                try:
                    if request.method not in READING:
                        control.manager(request.scope)
                    if request.method in ("POST", "PUT"):
                        check_kind(request.scope, kind)
                    return await handler(request)
                except RequestValidationError as error:
                    return await errors.on_validation_error(request, error)
                except SteerError as error:
                    control.refused(error, request.scope)
                    return errors.of(error)

            return handling

    return OwnRoute
