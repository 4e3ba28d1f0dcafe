"""`GET /v1/models`: the model, and an alias of it for each direction that the caller may use."""

from __future__ import annotations

import time
from typing import Any

from fastapi import APIRouter, Request

from steer.serve import errors
from steer.serve.carriers import PLUS
from steer.serve.served import Served


def router(served: Served) -> APIRouter:
    router = APIRouter()
    started = int(time.time())

    def model_card(name: str, **more: Any) -> dict[str, Any]:
        card = {"id": name, "object": "model", "created": started, "owned_by": "steer", "root": served.model_name}
        return card | {"parent": None, "max_model_len": served.engine.context} | more

    def cards(request: Request) -> list[dict[str, Any]]:
        caller = served.control.caller(request.scope)
        aliases = [
            model_card(f"{served.model_name}{PLUS}{name}", parent=served.model_name, root=name)
            for name in served.registry.names()
            if caller.may_use(name)
        ]
        return [model_card(served.model_name), *aliases]

    @router.get("/v1/models", tags=["models"], summary="The model, and an alias of it for each direction")
    async def models(request: Request) -> dict[str, Any]:
        return {"object": "list", "data": cards(request)}

    @router.get("/v1/models/{name:path}", tags=["models"], summary="The card of one model or alias")
    async def model(name: str, request: Request) -> dict[str, Any]:
        for card in cards(request):
            if card["id"] == name:
                return card
        raise errors.HTTPProblem(errors.Code.MODEL_NOT_FOUND, f"the model {name[:100]!r} is not served here")

    return router
