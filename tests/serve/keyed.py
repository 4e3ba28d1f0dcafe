"""`python -m tests.serve.keyed`: `steer serve` with every `/v1` route behind one key, in OpenAI's shape."""

from __future__ import annotations

import sys

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send

from steer.demo import MODEL
from steer.serve import errors
from steer.serve.app import build
from steer.serve.run import prepare
from steer.settings import ServeSettings

KEY = "sk-only-for-tests"


class Keyed:
    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        guarded = scope["type"] == "http" and scope["path"].startswith("/v1")
        if guarded and (b"authorization", f"Bearer {KEY}".encode()) not in scope["headers"]:
            await errors.response(401, "this server needs a key", code="invalid_api_key")(scope, receive, send)
            return
        await self.app(scope, receive, send)


if __name__ == "__main__":
    _, _, directions, _, port = sys.argv
    settings = ServeSettings(directions=directions, port=port, served_model_name="demo")
    app = build(prepare(str(MODEL), settings))
    app.add_middleware(Keyed)
    uvicorn.run(app, host=settings.host, port=settings.port, access_log=False)
