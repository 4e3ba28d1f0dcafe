"""Control routes for the kill switch, the same on every engine: is steering on, and switch it."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field

from steer.serve.control import Control
from steer.serve.directions import own_route
from steer.serve.pages import JSON
from steer.serve.route import JsonRoute

PATH = "/v1/steering"


class Switch(BaseModel):
    """The body of `POST /v1/steering`."""

    model_config = ConfigDict(extra="forbid")

    enabled: bool = Field(strict=True, description="false: no steered request is admitted from the answer on")
    reason: str = Field("", max_length=200, description="why; refused requests are told, and the audit log keeps it")


def router(control: Control) -> APIRouter:
    routes = APIRouter(prefix=PATH, tags=["operation"], route_class=own_route(control, JSON, JsonRoute))

    @routes.get(
        "",
        summary="Is steering on, what who asks may do, and for the managing role how policy and audit log are",
    )
    async def get_steering(request: Request) -> dict[str, Any]:
        return control.state(request.scope)

    @routes.post("", summary="Switch steering off or on for the whole server")
    async def post_steering(body: Switch, request: Request) -> dict[str, Any]:
        caller = control.caller(request.scope)
        control.switch(body.enabled, caller, body.reason)
        return control.state(request.scope)

    return routes
