"""The two web pages of a server, the same on every engine.

The playground at `/` shows plain and steered answers side by side: static files without a build step. It uses the same
routes as any other client, so it can do nothing that a client cannot. Its own files (`PATHS`) need no key.

`/docs` shows the server's OpenAPI document as one plain page, without scripts and without other hosts. FastAPI's own
pages load scripts from other hosts, which would then run in the origin of the managing routes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from html import escape
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Response
from starlette.routing import Route

#: Everything comes from this server: no inline script or style, no frame around the page, no form that can be sent.
PLAYGROUND_POLICY = "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; object-src 'none'"
HEADERS = {
    "Content-Security-Policy": PLAYGROUND_POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
ASSETS = "playground"
TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}

_FILES = {file.name: file.read_bytes() for file in (files("steer.serve") / ASSETS).iterdir()}
#: The file of each path.
PATHS = {"/": "index.html"} | {f"/{ASSETS}/{name}": name for name in sorted(_FILES)}


DOCS = "/docs"
#: FastAPI's own pages, also the one at `DOCS`.
FOREIGN = frozenset({DOCS, "/docs/oauth2-redirect", "/redoc"})
#: No scripts at all, and no frame around the page.
DOCS_POLICY = (
    "default-src 'none'; style-src 'self'; img-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
STYLE = f"{ASSETS}/reference.css"


def put_pages_on(app: FastAPI) -> None:
    """Add the playground to `app`, and `/docs` in place of FastAPI's own pages."""
    app.router.routes[:] = [route for route in app.router.routes if getattr(route, "path", None) not in FOREIGN]
    for path, name in PATHS.items():
        file = Response(_FILES[name], media_type=TYPES[name.rpartition(".")[2]], headers=HEADERS)
        app.router.routes.append(Route(path, file, methods=["GET"]))  # a Response is an ASGI app
    if app.openapi_url is None:
        return

    @cache
    def text() -> str:
        return page(app.openapi())

    async def docs() -> Response:
        return Response(text(), media_type="text/html", headers=HEADERS | {"Content-Security-Policy": DOCS_POLICY})

    app.add_api_route(DOCS, docs, methods=["GET"], include_in_schema=False)


def page(document: Mapping[str, Any]) -> str:
    info = document["info"]
    title = escape(f"{info['title']} {info['version']}")
    parts = [
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{title}</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<link rel="stylesheet" href="{STYLE}">\n</head>\n<body>\n<h1>{title}</h1>\n'
        '<p>Every route of this server. For programs: <a href="openapi.json">openapi.json</a>.</p>'
    ]
    for path, methods in document.get("paths", {}).items():
        for method, operation in methods.items():
            parts.append(_operation(path, method, operation))
    for name, schema in document.get("components", {}).get("schemas", {}).items():
        parts.append(f'<h2 id="{escape(name)}">{escape(name)}</h2>\n{_json(schema)}')
    return "\n".join([*parts, "</body>\n</html>\n"])


def _operation(path: str, method: str, operation: Mapping[str, Any]) -> str:
    parts = [f"<h2><code>{escape(method.upper())} {escape(path)}</code></h2>"]
    said = dict.fromkeys(operation[key] for key in ("summary", "description") if operation.get(key))
    parts += [f"<p>{escape(text)}</p>" for text in said]
    for part in ("parameters", "requestBody", "responses"):
        if operation.get(part):
            parts.append(f"<details><summary>{part}</summary>\n{_json(operation[part])}</details>")
    return "\n".join(parts)


def _json(value: object) -> str:
    return f"<pre>{escape(json.dumps(value, indent=2, ensure_ascii=False))}</pre>"
