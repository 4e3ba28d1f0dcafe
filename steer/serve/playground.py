"""The playground: one page at `/` that asks plain and steered side by side, the same on every engine.

Static files without a build step. The page speaks to the same routes as any other client, so it can do nothing that a
client cannot; whoever guards the routes leaves `PATHS` open, since nothing in them needs a key.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from importlib.resources import files

from fastapi import APIRouter, Response

#: Everything comes from this server; no inline script or style, no frame around the page, no form that is sent.
POLICY = "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; object-src 'none'"
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
FOLDER = "playground"
TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}

_FILES = {file.name: file.read_bytes() for file in (files("steer.serve") / FOLDER).iterdir()}
#: Path → name of the file that it gives.
PATHS = {"/": "index.html"} | {f"/{FOLDER}/{name}": name for name in sorted(_FILES)}


def router() -> APIRouter:
    routes = APIRouter(include_in_schema=False)
    for path, name in PATHS.items():
        routes.add_api_route(path, _giver(name), methods=["GET"])
    return routes


def _giver(name: str) -> Callable[[], Awaitable[Response]]:
    content, media_type = _FILES[name], TYPES[name.rpartition(".")[2]]

    async def give() -> Response:
        return Response(content, media_type=media_type, headers=HEADERS)

    return give
