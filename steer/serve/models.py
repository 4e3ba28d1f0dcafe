"""`GET /v1/models`: the model, and an alias of it for each direction that the caller may use."""

from __future__ import annotations

import time
from typing import Annotated, Literal

from fastapi import APIRouter, Request
from pydantic import Field
from typing_extensions import TypedDict

from steer.serve import errors
from steer.serve.carriers import PLUS
from steer.serve.served import Served


class ModelCard(TypedDict):
    """The model, or an alias of it."""

    id: Annotated[str, Field(description="the name for `model`; of an alias `MODEL+DIRECTION`")]
    object: Literal["model"]
    created: Annotated[int, Field(description="when the server was started, in seconds since 1970")]
    owned_by: Literal["steer"]
    root: Annotated[str, Field(description="the model's own name; of an alias its direction")]
    parent: Annotated[str | None, Field(description="of an alias its model")]
    max_model_len: Annotated[int, Field(description="most tokens of a prompt with its answer")]


class ModelList(TypedDict):
    object: Literal["list"]
    data: list[ModelCard]


def router(served: Served) -> APIRouter:
    router = APIRouter()
    started = int(time.time())

    def model_card(name: str, root: str, parent: str | None) -> ModelCard:
        return {
            "id": name,
            "object": "model",
            "created": started,
            "owned_by": "steer",
            "root": root,
            "parent": parent,
            "max_model_len": served.engine.context,
        }

    def cards(request: Request) -> list[ModelCard]:
        caller, own = served.control.caller(request.scope), served.model_name
        usable = (name for name in served.registry.names() if caller.may_use(name))
        return [model_card(own, own, None), *(model_card(f"{own}{PLUS}{name}", name, own) for name in usable)]

    @router.get(
        "/v1/models",
        tags=["models"],
        summary="The model, and an alias of it for each direction",
        responses=errors.documented(),
    )
    async def models(request: Request) -> ModelList:
        return {"object": "list", "data": cards(request)}

    @router.get(
        "/v1/models/{name:path}",
        tags=["models"],
        summary="The card of one model or alias",
        responses=errors.documented(errors.Code.MODEL_NOT_FOUND),
    )
    async def model(name: str, request: Request) -> ModelCard:
        for card in cards(request):
            if card["id"] == name:
                return card
        raise errors.HTTPProblem(errors.Code.MODEL_NOT_FOUND, f"the model {name[:100]!r} is not served here")

    return router
