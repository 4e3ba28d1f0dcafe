"""How our routes read bodies, and the control routes, the same on every engine: directions, the state of steering with
the kill switch, and what `/health` says. If the middleware has parsed a body, it is not parsed again."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping
from functools import partial
from typing import Annotated, Literal, NotRequired

import anyio.to_thread
from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import BaseModel, Field, ValidationError
from starlette.types import Scope
from typing_extensions import TypedDict

from steer.direction import MAX_BYTES, DirectionMeta, Dose, LayerProfile
from steer.errors import NoRoom, SteerError, UnknownDirection, with_rules
from steer.names import MODE_SCALES, MODE_SUMMARIES, SHIFTING, TURNING, Mode, Scale, Site, check_name
from steer.registry import Registry, Version
from steer.serve import errors
from steer.serve.authorise import Caller, Refusal
from steer.serve.body import BODY, SIZE, Gone, parse_body, read_body, understood
from steer.serve.control import Control
from steer.serve.errors import Code, HTTPProblem, documented
from steer.serve.origin import FILE, JSON, READING, check_kind
from steer.serve.policy import Bounds, Limits, bounds
from steer.spec import TOKENS, Condition
from steer.watch import State

#: Bytes of the JSON body of a control route.
MAX_CONTROL = 16 * 1024


def _checked(model: type[BaseModel], body: object) -> BaseModel:
    try:
        return model.model_validate(body)
    except ValidationError as error:
        raise RequestValidationError(with_rules(error.errors(include_url=False), model)) from None


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


def put_control_on(app: FastAPI, control: Control) -> None:
    """Add the control routes to `app`."""
    app.include_router(_directions(control))
    app.include_router(_steering(control))


# -- directions ------------------------------------------------------------------------------------------------------


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


def _directions(control: Control) -> APIRouter:
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
            raise HTTPProblem(Code.NO_FREE_ROWS, str(error)) from error
        except OSError as error:
            raise HTTPProblem(Code.STORAGE, f"the file cannot be stored: {error}") from error
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
            raise HTTPProblem(Code.STORAGE, f"the file cannot be removed: {error}") from error
        return {"id": name, "object": "direction", "deleted": True}

    return routes


def card(
    name: str, version: Version, registry: Registry, caller: Caller, limits: Mapping[str, Mapping[str, Limits]]
) -> DirectionCard:
    """The card of a direction as `caller` may see it. Only the managing role sees how many requests use it now, which
    says something about others. `limits`: those of each version (`Rules.limits`)."""
    meta, problems = version.direction.meta, registry.failures.get(name)
    may = bounds((caller.rules, *limits.get(version.digest, {}).values()), registry.placement.shape)
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


def _not_found(error: UnknownDirection) -> HTTPProblem:
    return HTTPProblem(Code.DIRECTION_NOT_FOUND, str(error), param="name")


# -- the server itself -----------------------------------------------------------------------------------------------


class ServerState(TypedDict):
    """The state of a server. It mentions no keys, and directions only to the managing role."""

    directions: NotRequired[Annotated[int, Field(description="number of served directions; for the managing role")]]
    failed_directions: NotRequired[
        Annotated[list[str], Field(description="files that are not served; for the managing role")]
    ]
    steering: Annotated[Literal["on", "off"], Field(description="whether steering is switched on")]
    audit: Annotated[Literal["none", "ok", "failed"], Field(description="the audit log; `none` without one")]
    policy: Annotated[
        Literal["none", "unread", "stale"] | State, Field(description="the policy file, and the thread that watches it")
    ]
    folder: Annotated[
        Literal["none", "unreadable"] | State,
        Field(description="the folder of directions, and the thread that watches it"),
    ]
    seconds_since_look: Annotated[
        dict[str, float], Field(description="seconds since `policy` and `folder` were last looked at")
    ]
    in_flight: NotRequired[Annotated[int, Field(description="answers in progress; for the managing role")]]


class May(Bounds):
    """What the caller may do. For one direction `may` of its card can be narrower."""

    steer: bool
    modes: list[Mode]
    readout: Annotated[bool, Field(description="whether it may use `steer_readout`")]
    forms: Annotated[bool, Field(description="whether it may constrain answers by a schema or a grammar")]
    manage: Annotated[bool, Field(description="whether it may change directions and use the kill switch")]


class PolicyState(TypedDict):
    """The policy file."""

    digest: Annotated[str | None, Field(description="sha256 of the policy in force; null without one")]
    problems: Annotated[list[str], Field(description="why the present file is not in force")]


class AuditState(TypedDict):
    """The audit log."""

    head: Annotated[str, Field(description="number and hash of the last line, which `steer audit verify` takes")]
    failed: Annotated[str | None, Field(description="why lines cannot be written; null while they can")]


class SteeringState(TypedDict):
    """The kill switch, and what the caller may do."""

    object: Literal["steering"]
    enabled: Annotated[bool, Field(description="whether steering is switched on")]
    reason: Annotated[str, Field(description="why it was switched")]
    modes: Annotated[dict[Mode, str], Field(description="what each mode does")]
    scales: Annotated[dict[Mode, Scale], Field(description="strengths worth trying in each mode, and what they mean")]
    shifting: Annotated[tuple[Mode, ...], Field(description="modes whose threshold a request may shift")]
    turning: Annotated[tuple[Mode, ...], Field(description="modes that always keep the norm, without being asked to")]
    tokens: Annotated[dict[str, str], Field(description="values of `tokens` in a spec, and what each means")]
    may: May
    running: NotRequired[Annotated[int, Field(description="running steered requests; for the managing role")]]
    front_end: NotRequired[
        Annotated[
            list[int],
            Field(description="number of the front end that answers, and how many there are; for the managing role"),
        ]
    ]
    policy: NotRequired[Annotated[PolicyState, Field(description="for the managing role")]]
    audit: NotRequired[Annotated[AuditState | None, Field(description="for the managing role; null without a log")]]


class Switch(BaseModel, extra="forbid"):
    """The body of `POST /v1/steering`."""

    enabled: bool = Field(strict=True, description="false: from the answer on, no steered request is admitted")
    reason: str = Field("", max_length=200, description="why; shown to refused requests and kept in the audit log")


def _steering(control: Control) -> APIRouter:
    routes = APIRouter(prefix="/v1/steering", tags=["operation"], route_class=own_route(control, JSON))

    @routes.get(
        "",
        summary="Whether steering is on, what the caller may do, and for the managing role the state of policy and log",
        responses=documented(),
    )
    async def get_steering(request: Request) -> SteeringState:
        return steering(control, request.scope)

    @routes.post(
        "",
        summary="Switch steering off or on for the whole server",
        responses=documented(
            Code.BODY_TOO_COMPLEX,
            Code.BODY_TOO_LARGE,
            Code.CONTENT_TYPE,
            Code.INVALID_JSON,
            Code.INVALID_VALUE,
            Code.STEERING_FORBIDDEN,
        ),
    )
    async def post_steering(body: Switch, request: Request) -> SteeringState:
        # checked again: the caller may have lost the right while the body came
        control.switch(body.enabled, control.manager(request.scope), body.reason)
        return steering(control, request.scope)

    return routes


def health(control: Control, *, manages: bool = False) -> ServerState:
    """The answer of `/health`. `manages`: whether the caller has the managing role."""
    state: ServerState = {
        "steering": "on" if control.steering else "off",
        "audit": "none" if control.audit is None else "failed" if control.audit.failed else "ok",
        "policy": _policy(control),
        "folder": _folder(control),
        "seconds_since_look": {
            name: round(follower.age, 1)
            for name, follower in (
                ("policy", control.follower),
                ("folder", control.registry and control.registry.follower),
            )
            if follower
        },
    }
    if control.registry is not None and manages:
        state["directions"] = len(control.registry.names())
        state["failed_directions"] = sorted(control.registry.failures)
    return state


def _policy(control: Control) -> Literal["none", "unread", "stale"] | State:
    if control.in_force is None:
        return "none"
    if control.policy_unread:
        return "unread"
    return "stale" if control.policy_problems else control.follower.state if control.follower else "ok"


def _folder(control: Control) -> Literal["none", "unreadable"] | State:
    registry = control.registry
    if registry is None or registry.folder is None:
        return "none"
    if registry.folder_problem:
        return "unreadable"
    return registry.follower.state if registry.follower else "ok"


def steering(control: Control, scope: Scope) -> SteeringState:
    """The answer of `/v1/steering`."""
    caller = control.caller(scope)
    rules, manages = caller.rules, True
    shape = None if control.registry is None else control.registry.placement.shape
    try:
        control.manager(scope)
    except Refusal:
        manages = False
    state: SteeringState = {
        "object": "steering",
        "enabled": control.steering,
        "reason": control.reason,
        "modes": MODE_SUMMARIES,
        "scales": MODE_SCALES,
        "shifting": SHIFTING,
        "turning": TURNING,
        "tokens": TOKENS if shape is None else shape.tokens,
        "may": {
            "steer": rules.steer,
            "modes": list(rules.modes),
            **bounds((rules,), shape),
            "readout": rules.readout,
            "forms": rules.forms,
            "manage": manages,
        },
    }
    if caller.manages:
        state["running"] = control.steered
        state["front_end"] = [control.shared.index, control.shared.count]
        state["policy"] = {"digest": control.policy_digest, "problems": list(control.policy_problems)}
        audit = control.audit
        state["audit"] = None if audit is None else {"head": str(audit.head), "failed": audit.failed}
    return state
