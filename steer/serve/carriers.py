"""The four carriers of a steer spec: body field, header, model name, `vllm_xargs`. All are equal; conflicts are errors.

Any other name in a request that begins with `steer` is a mistake, and an error names it. So a request that is meant to
be steered is never answered plain.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from typing import TypeAlias
from urllib.parse import parse_qsl

from starlette.datastructures import Headers

from steer import readout
from steer.errors import SpecError, brief
from steer.serve.body import MAX_VALUES, check_structure
from steer.spec import MAX_ITEMS, RequestedDirection, bare, mentions, nearly, parse

FIELD = "steer"
HEADER = "x-steer"
RECEIPT = "x-steer-applied"
XARGS = "vllm_xargs"
#: Joins a served model's name and the directions in an alias.
PLUS = "+"
#: The names from `traces` that a route accepts as carriers or as the read-out.
ACCEPTED = frozenset({FIELD, readout.FIELD, f"{XARGS}.{FIELD}", f"header {HEADER}", "model"})
#: Names of body fields, normalised by `bare`, whose content is for the model or describes its answer. There a key that
#: begins with `steer` is content. In all other fields it is a mistake, at any depth.
_CONTENT = {"messages", "input", "prompt", "prompts", "system", "instructions", "documents", "tools", "functions"}
_CONTENT |= {"toolchoice", "functioncall", "responseformat", "structuredoutputs", "guidedjson", "text", "outputconfig"}
#: Fields whose keys the client chooses, so that only the exact name of a carrier is a mistake there.
_TAGS = {"chattemplatekwargs", "metadata"}
#: Fields in which a string may hold the fields of a request as JSON.
_QUOTING = {"chattemplatekwargs", "generationconfig", "body", "metadata", "options", "parameters", "request"}
_QUOTING |= {"requests", "samplingparams", "kvtransferparams", "streamoptions"}
#: Fields that exist only to pass further fields, so that a string in them may be one, in any notation.
_VEHICLES = {"extraargs", "extrabody", "extraheaders", "extraquery", "headers", "vllmxargs"}
_QUOTING |= _VEHICLES


#: Names of the carriers and of the read-out, normalised by `bare`.
_NAMES = {bare(name) for name in (FIELD, HEADER, readout.FIELD)}
_PLAIN_ROLES = {"system", "developer", "user", "assistant"}


@dataclass(frozen=True, slots=True)
class Carried:
    """What one request carries.

    Attributes:
        found: the parsed value of each carrier that is present.
        model: the name of the model, without the directions of an alias.
        tools: whether the request has tools, or answers of tools.
    """

    found: dict[str, tuple[RequestedDirection, ...]]
    model: str | None
    tools: bool = False


def read(body: dict[str, object], headers: Headers, served: Sequence[str], query: bytes = b"") -> Carried:
    """Read all carriers of a request. Raises SpecError with every problem of every carrier, and for names that look
    like a carrier and are none."""
    found: dict[str, tuple[RequestedDirection, ...]] = {}
    problems: list[str] = []
    param: str | None = None

    def take(carrier: str, value: object, name: str) -> None:
        nonlocal param
        try:
            found[carrier] = parse(value, name)
        except SpecError as error:
            problems.extend(error.problems)
            param = param or error.param

    for name in islice((name for name in traces(body, headers, served, query) if name not in ACCEPTED), MAX_ITEMS):
        param = param or name[:100]
        problems.append(
            f"'{name[:100]}': steering cannot be requested like this; accepted: the fields '{FIELD}', "
            f"'{readout.FIELD}' and '{XARGS}.{FIELD}' and the header 'X-Steer'"
        )
    if FIELD in body:
        take("body field 'steer'", body[FIELD], FIELD)
    sent = [value for name, value in headers.items() if name.lower() == HEADER]
    if len(sent) > MAX_ITEMS:
        raise SpecError(f"{len(sent)} headers 'X-Steer', at most {MAX_ITEMS}", param="X-Steer")
    for number, value in enumerate(sent):
        which = "header 'X-Steer'" if len(sent) == 1 else f"header 'X-Steer' ({number + 1} of {len(sent)})"
        take(which, value, "X-Steer")
    xargs = body.get(XARGS)
    if isinstance(xargs, dict) and FIELD in xargs:
        take("body field 'vllm_xargs.steer'", xargs[FIELD], "vllm_xargs.steer")
    model = body.get("model")
    if isinstance(model, str) and (alias := split_alias(model, served)):
        model, directions = alias
        if directions.strip():
            take("model name", directions, "model")
        else:
            param = param or "model"
            accepted = f"'{model}', or with directions after it, as {model}+refusal"
            problems.append(f"model: {brief(body['model'])} names no direction; accepted: {accepted}")
    if problems:
        raise SpecError(problems, param)
    return Carried(found, model if isinstance(model, str) else None, has_tools(body))


def has_tools(body: dict[str, object]) -> bool:
    """Whether a request of any generation route may have tools, or answers of tools.

    In doubt it has: roles other than the plain ones count, and so do earlier turns that the server keeps. Tools that a
    client describes inside a text are not seen.
    """
    if any(body.get(name) for name in ("previous_response_id", "previous_input_messages")):
        return True
    items: list[object] = [body, body.get("chat_template_kwargs")]
    for name in ("messages", "input"):
        items += found if isinstance(found := body.get(name), list) else []
    for item in tuple(items[2:]):
        items += found if isinstance(item, dict) and isinstance(found := item.get("content"), list) else []
    return any(_mentions_tools(item) for item in items if isinstance(item, dict))


def _mentions_tools(item: Mapping[str, object]) -> bool:
    """`item`: a body, a template's variables, a message or a part of one."""
    named = any(
        value and re.search("tools|functions|tool_calls|function_call$", str(name)) for name, value in item.items()
    )
    kind = str(item.get("type", ""))
    return named or str(item.get("role", "user")) not in _PLAIN_ROLES or "call" in kind or "tool" in kind


def traces(body: object, headers: Headers, served: Sequence[str], query: bytes = b"") -> Iterator[str]:
    """The name of everything in a request that asks for steering, or seems to: `steer`, `steering`, `metadata.steer`,
    `requests.0.steer`, `header x-steer`, `?steer`, and `model` if it is an alias."""
    for name in map(str.lower, headers.keys()):
        if nearly(name) and name != RECEIPT:  # a receipt that is sent back asks for nothing
            yield f"header {name}"
    for name, _ in parse_qsl(query.decode("latin-1"), keep_blank_values=True):
        if nearly(name):
            yield f"?{name}"
    left = MAX_VALUES
    places: list[tuple[_Place | None, object]] = [(None, body)]
    while places:  # a loop, since values may be nested more deeply than Python can recurse
        place, value = places.pop()
        if isinstance(value, list):
            places.extend(((place, i), each) for i, each in enumerate(value) if isinstance(each, dict | list))
        elif isinstance(value, dict):
            tags = place is not None and isinstance(place[1], str) and bare(place[1]) in _TAGS
            for key, inner in value.items():
                if bare(key) in _NAMES if tags else nearly(key):
                    yield _name((place, key))
                elif (plain := bare(key)) in _CONTENT:
                    continue
                elif isinstance(inner, dict | list):
                    places.append(((place, key), inner))
                elif isinstance(inner, str) and plain in _QUOTING:  # the field of a form, or a body quoted as a whole
                    if inner.lstrip()[:1] in ("{", "["):
                        left -= check_structure(inner.encode(errors="surrogatepass"), left)
                    unwrapped = _unwrapped(inner)
                    if plain in _VEHICLES and isinstance(unwrapped, str) and mentions(unwrapped):
                        yield _name((place, key))
                    places.append(((place, key), unwrapped))
                elif key == "model" and isinstance(inner, str) and split_alias(inner, served):
                    yield _name((place, key))


#: Where a value is in a body: the place of its container (None for the body itself), and its key or index there.
_Place: TypeAlias = "tuple[_Place | None, str | int]"


def _name(place: _Place | None) -> str:
    """The path of a place, as `requests.0.steer`. Long keys are cut, and a key that contains a dot is quoted. It is
    made only for what is reported: a body has many places, some of them deep."""
    parts: list[str] = []
    while place is not None:
        place, key = place
        parts.append(f'"{key[:40]}"' if isinstance(key, str) and "." in key else str(key)[:40])
    return ".".join(reversed(parts))


def _unwrapped(value: str) -> object:
    """The value that a string holds as JSON, or the string itself."""
    with suppress(ValueError, RecursionError):
        return json.loads(value)
    return value


def split_alias(model: str, served: Sequence[str]) -> tuple[str, str] | None:
    """(served model, directions) of an alias like `base+refusal` or `base+refusal=0.7+other`, or None."""
    for base in sorted(served, key=len, reverse=True):
        if model.startswith(base + PLUS) and model not in served:
            return base, model[len(base) + 1 :].replace(PLUS, ",")
    return None
