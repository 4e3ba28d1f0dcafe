"""What a request says of the form of its answer: a schema, a grammar, a regular expression or a choice. An engine
compiles it before it answers anybody, in a time that can be many times that of reading it, so it is bounded first."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from urllib.parse import unquote

from steer.errors import RequestError

#: Bytes, as JSON, of all of it in one request, and the texts of one choice.
MAX_FORM, MAX_CHOICES = 32 * 1024, 1024
#: Where engines take it, by the names of several APIs, today's and those of before; of an object in `INNER` that part.
FIELDS = (
    "structured_outputs",
    "response_format",
    "text",
    "output_config",
    "guided_json",
    "guided_regex",
    "guided_choice",
    "guided_grammar",
)
INNER: Mapping[str, str] = {"text": "format", "output_config": "format"}


def check_form(body: Mapping[str, object]) -> None:
    """Raises RequestError for what is more than `MAX_FORM` or `MAX_CHOICES`, and for a schema that is met by nothing,
    since it refers to itself: engines fail at it. Wrong types are left to the app that is called next."""
    size = 0
    for name in FIELDS:
        form = body.get(name)
        if form is not None and name in INNER:
            form = _of(form, INNER[name])
        if form is None:
            continue
        size += len(json.dumps(form, ensure_ascii=False).encode())
        if size > MAX_FORM:
            raise RequestError(
                f"{name}: the form of an answer is {size} bytes of JSON or more, at most {MAX_FORM} are accepted",
                param=name,
            )
        choice = form if name == "guided_choice" else _of(form, "choice")
        if isinstance(choice, list) and len(choice) > MAX_CHOICES:
            raise RequestError(f"{name}: a choice of {len(choice)} texts, at most {MAX_CHOICES}", param=name)
        for schema in _schemas(name, form):
            if (circle := _circle(schema)) is not None:
                raise RequestError(f"{name}: the schema's $ref {circle[:100]!r} leads to itself", param=name)


def _of(form: object, name: str) -> object:
    return form.get(name) if isinstance(form, dict) else None


def _schemas(name: str, form: object) -> Iterator[object]:
    """JSON Schemas, which may also be given as their text."""
    for schema in (
        form if name == "guided_json" else None,
        _of(form, "json"),
        _of(form, "schema"),
        _of(_of(form, "json_schema"), "schema"),
    ):
        if isinstance(schema, str):
            try:
                yield json.loads(schema)
            except (ValueError, RecursionError):
                continue
        else:
            yield schema


def _circle(schema: object) -> str | None:
    """A `$ref` of this JSON Schema that leads to itself by nothing but others; None where there is none."""
    sound: set[str] = set()
    for ref in _refs(schema):
        way: set[str] = set()
        at: object = ref
        while isinstance(at, str) and at not in sound:
            if at in way:
                return at
            way.add(at)
            at = _of(_target(schema, at), "$ref")
        sound |= way
    return None


def _refs(schema: object) -> Iterator[str]:
    parts = [schema]
    while parts:
        part = parts.pop()
        if isinstance(part, dict):
            if isinstance(ref := part.get("$ref"), str):
                yield ref
            parts += part.values()
        elif isinstance(part, list):
            parts += part


def _target(schema: object, ref: str) -> object:
    """What a reference inside of this document means (RFC 6901); None for any other."""
    found: object = schema if ref.startswith("#") else None
    for name in unquote(ref).split("/")[1:]:
        name = name.replace("~1", "/").replace("~0", "~")
        if isinstance(found, list):
            found = found[int(name)] if name.isdecimal() and len(name) < 6 and int(name) < len(found) else None
        else:
            found = _of(found, name)
    return found
