"""The playground: one page at `/` that asks plain and steered side by side, the same on every engine.

Three static files without a build step; the page speaks to the same routes as any other client, so it can do nothing
that a client cannot. Whoever guards the routes leaves `PATHS` open: there is nothing in them that needs a key.
"""

from __future__ import annotations

from importlib.resources import files

from fastapi import APIRouter, Response

#: Everything comes from this server; no inline script or style, no frame around the page, no form that posts.
POLICY = "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; object-src 'none'"
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
FOLDER = "playground"
TYPES = {"app.js": "text/javascript", "style.css": "text/css", "icon.svg": "image/svg+xml"}
PATHS = ("/", *(f"/{FOLDER}/{name}" for name in TYPES))


def router() -> APIRouter:
    routes = APIRouter(include_in_schema=False)

    @routes.get("/")
    async def page() -> Response:
        return _file("index.html", "text/html")

    @routes.get(f"/{FOLDER}/{{name}}")
    async def part(name: str) -> Response:
        return _file(name, TYPES[name]) if name in TYPES else Response(status_code=404)

    return routes


def _file(name: str, media_type: str) -> Response:
    return Response((files(__package__) / FOLDER / name).read_bytes(), media_type=media_type, headers=HEADERS)
