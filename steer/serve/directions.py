"""Control routes for directions, the same on every engine: list, read, put, delete."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal, NotRequired

import anyio.to_thread
from fastapi import APIRouter, Request
from pydantic import Field
from typing_extensions import TypedDict

from steer.direction import MAX_BYTES, DirectionMeta, Dose, LayerProfile
from steer.errors import NoRoom, UnknownDirection
from steer.names import Mode, Site, check_name
from steer.registry import Registry, Version
from steer.serve import errors
from steer.serve.authorise import Caller
from steer.serve.body import read_body
from steer.serve.control import Control
from steer.serve.errors import Code, documented
from steer.serve.origin import FILE
from steer.serve.policy import Bounds, Limits, bounds
from steer.serve.route import own_route
from steer.spec import Condition


class DirectionCard(TypedDict):
    """A direction that is served."""

    id: Annotated[str, Field(description="its name")]
    object: Literal["direction"]
    status: Annotated[
        Literal["served", "stale"],
        Field(description="stale: the file was replaced by an invalid one, and the version before is served"),
    ]
    errors: Annotated[list[str], Field(description="the problems of a stale file")]
    digest: Annotated[str, Field(description="sha256 of the file's bytes: the version")]
    created: Annotated[int, Field(description="when this version was loaded, in seconds since 1970")]
    method: Annotated[str, Field(description="how it was made")]
    source_layer: Annotated[int | None, Field(description="the layer whose direction serves all layers, if one does")]
    rank: Annotated[int, Field(description="rows at each layer")]
    mode: Annotated[Mode, Field(description="the mode of a request that names none")]
    strength: Annotated[float, Field(description="the strength of a request that names none")]
    modes: Annotated[list[Mode], Field(description="the modes for which the file has what they need")]
    calibrated: Annotated[
        dict[Mode, Dose], Field(description="for each mode the range of strengths in which no harm was seen")
    ]
    sites: Annotated[list[Site], Field(description="where it acts")]
    condition: Annotated[
        str | None,
        Field(description="a condition that was found for it, if the caller may use it; never applied by itself"),
    ]
    bytes: Annotated[int, Field(description="size of the file")]
    usable: Annotated[bool, Field(description="whether the caller may steer with it")]
    may: Annotated[Bounds, Field(description="what the caller may ask for with it, if it is usable")]
    requests: NotRequired[
        Annotated[int, Field(description="requests that use this version now; for the managing role")]
    ]


class DirectionDetail(DirectionCard):
    """A direction with the metadata of its file."""

    meta: Annotated[DirectionMeta, Field(description="the metadata of the file")]
    profile: Annotated[list[LayerProfile], Field(description="figures of each layer")]


class FailedDirection(TypedDict):
    """A file that is not served."""

    id: Annotated[str, Field(description="its name")]
    object: Literal["direction"]
    status: Literal["failed"]
    errors: Annotated[list[str], Field(description="the problems of the file")]


class DirectionList(TypedDict):
    object: Literal["list"]
    data: list[DirectionCard | FailedDirection]


class DirectionDeleted(TypedDict):
    id: Annotated[str, Field(description="its name")]
    object: Literal["direction"]
    deleted: Literal[True]


def router(control: Control) -> APIRouter:
    routes = APIRouter(prefix="/v1/directions", tags=["directions"], route_class=own_route(control, FILE))

    def registry() -> Registry:
        assert control.registry is not None, "the server has started"
        return control.registry

    @routes.get("", summary="All served directions, and files that are not served", responses=documented())
    async def list_directions(request: Request) -> DirectionList:
        caller = control.caller(request.scope)
        limits = control.rules.limits(registry())
        served = [
            card(name, version, registry(), caller, limits)
            for name, version in registry().names().items()
            if caller.may_know(name)
        ]
        known = {item["id"] for item in served}
        failed: list[FailedDirection] = [
            {"id": name, "object": "direction", "status": "failed", "errors": list(problems)}
            for name, problems in sorted(registry().failures.items())
            if name not in known and caller.may_know(name)
        ]
        return {"object": "list", "data": [*served, *failed]}

    @routes.get(
        "/{name}",
        summary="One direction with its metadata and the figures of each layer",
        responses=documented(Code.DIRECTION_NOT_FOUND),
    )
    async def get_direction(name: str, request: Request) -> DirectionDetail:
        caller = control.caller(request.scope)
        try:
            version = registry().get(name, caller.may_know)
        except UnknownDirection as error:
            raise _not_found(error) from error
        own, meta = card(name, version, registry(), caller, control.rules.limits(registry())), version.direction.meta
        return {
            **own,
            "meta": meta if own["condition"] else meta.model_copy(update={"condition": None}),
            "profile": await anyio.to_thread.run_sync(version.direction.profile),
        }

    body = {"required": True, "content": {FILE: {"schema": {"type": "string", "format": "binary"}}}}

    @routes.put(
        "/{name}",
        summary="Serve these safetensors bytes under this name from now on",
        openapi_extra={"requestBody": body},
        responses=documented(
            Code.BODY_TOO_LARGE,
            Code.CONTENT_TYPE,
            Code.INVALID_DIRECTION,
            Code.INVALID_VALUE,
            Code.NO_FREE_ROWS,
            Code.STEERING_FORBIDDEN,
            Code.STORAGE,
        ),
    )
    async def put_direction(name: str, request: Request) -> DirectionCard:
        check_name(name)
        data = await read_body(request.scope, request.receive, MAX_BYTES)
        caller = control.manager(request.scope)  # checked again: the right may have been lost while the file came
        control.moving(caller)

        def put() -> Version:
            version = registry().put(name, data)
            control.shared.settle()
            return version

        try:
            version = await anyio.to_thread.run_sync(put)
        except NoRoom as error:
            raise errors.HTTPProblem(Code.NO_FREE_ROWS, str(error)) from error
        except OSError as error:
            raise errors.HTTPProblem(Code.STORAGE, f"the file cannot be stored: {error}") from error
        return card(name, version, registry(), caller, control.rules.limits(registry()))

    @routes.delete(
        "/{name}",
        summary="Stop serving this name and remove its file",
        responses=documented(Code.DIRECTION_NOT_FOUND, Code.STEERING_FORBIDDEN, Code.STORAGE),
    )
    async def delete_direction(name: str, request: Request) -> DirectionDeleted:
        control.moving(control.caller(request.scope))

        def delete() -> None:
            registry().delete(name)
            control.shared.settle()

        try:
            await anyio.to_thread.run_sync(delete)
        except UnknownDirection as error:
            raise _not_found(error) from error
        except OSError as error:
            raise errors.HTTPProblem(Code.STORAGE, f"the file cannot be removed: {error}") from error
        return {"id": name, "object": "direction", "deleted": True}

    return routes


def card(
    name: str, version: Version, registry: Registry, caller: Caller, limits: Mapping[str, Sequence[Limits]]
) -> DirectionCard:
    """The card of a direction as `caller` may see it. Only the managing role sees how many requests use it now, which
    says something about others. `limits`: those of each version (`Rules.limits`)."""
    meta, problems = version.direction.meta, registry.failures.get(name)
    may = bounds((caller.rules, *limits.get(version.digest, ())), registry.placement.shape)
    found = meta.condition if may["conditions"] and "answer" in may["tokens"] else None
    out: DirectionCard = {
        "id": name,
        "object": "direction",
        "status": "stale" if problems else "served",
        "errors": list(problems or ()),
        "digest": version.digest,
        "created": int(version.loaded),
        "method": meta.method,
        "source_layer": meta.source_layer,
        "rank": version.direction.rank,
        "mode": meta.mode,
        "strength": meta.strength,
        "modes": list(meta.modes),
        "calibrated": meta.calibrated,
        "sites": list(meta.sites),
        "condition": None if found is None else str(Condition(name, found.layer, found.above, found.below)),
        "bytes": version.bytes,
        "usable": caller.may_use(name),
        "may": may,
    }
    if caller.manages:
        out["requests"] = version.pins
    return out


def _not_found(error: UnknownDirection) -> errors.HTTPProblem:
    return errors.HTTPProblem(Code.DIRECTION_NOT_FOUND, str(error), param="name")
