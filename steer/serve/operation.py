"""Control routes about the server itself, the same on every engine: health, the state of steering, the kill switch."""

from __future__ import annotations

from typing import Annotated, Literal, NotRequired

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field
from starlette.types import Scope
from typing_extensions import TypedDict

from steer.names import MODE_SCALES, MODE_SUMMARIES, SHIFTING, Mode, Scale
from steer.serve.authorise import Refusal
from steer.serve.control import Control
from steer.serve.errors import Code, documented
from steer.serve.origin import JSON
from steer.serve.policy import Bounds, bounds
from steer.serve.route import own_route
from steer.spec import TOKENS
from steer.watch import State

PATH = "/v1/steering"


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


def router(control: Control) -> APIRouter:
    routes = APIRouter(prefix=PATH, tags=["operation"], route_class=own_route(control, JSON))

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
