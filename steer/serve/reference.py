"""`/docs`: the server's own OpenAPI document as one plain page, without a script and without another host.

FastAPI's pages load programs from hosts of others, which would then run in the origin of the routes that manage.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from html import escape
from typing import Any

from fastapi import FastAPI, Response

from steer.serve import playground

PATH = "/docs"
#: FastAPI's pages, the one at `PATH` among them.
FOREIGN = frozenset({PATH, "/docs/oauth2-redirect", "/redoc"})
#: No script at all, and no frame around it.
POLICY = (
    "default-src 'none'; style-src 'self'; img-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
STYLE = f"{playground.FOLDER}/reference.css"


def put_on(app: FastAPI) -> None:
    """Give `app` the page, in place of any that FastAPI has put on it."""
    app.router.routes[:] = [route for route in app.router.routes if getattr(route, "path", None) not in FOREIGN]

    if app.openapi_url is None:
        return

    @cache
    def text() -> str:
        return page(app.openapi())

    async def docs() -> Response:
        return Response(
            text(), media_type="text/html", headers=playground.HEADERS | {"Content-Security-Policy": POLICY}
        )

    app.add_api_route(PATH, docs, methods=["GET"], include_in_schema=False)


def page(document: Mapping[str, Any]) -> str:
    """The page of an OpenAPI document."""
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
