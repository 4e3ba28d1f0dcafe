"""`python -m docs.api`: write docs/api.md from the OpenAPI document of a running app, the fields' own descriptions and
the modules that define the request language."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import steer.readout
import steer.runtime.readout
import steer.spec
from steer.cli.console import quiet_libraries
from steer.demo import MODEL
from steer.serve import protocol
from steer.serve.answers import DIGITS
from steer.serve.app import build, prepare
from steer.serve.errors import Code
from steer.settings import ServeSettings

#: Values of a field that are listed.
MOST_VALUES = 8
ROOT = Path(__file__).parents[1]
TARGET = ROOT / "docs" / "api.md"

INTRODUCTION = """\
# The HTTP API

Made from the code by `make docs`; a test fails when it is stale. The generation routes are OpenAI's with two fields
more, `steer` and `steer_readout`. Errors have OpenAI's shape, `{"error": {"message", "type", "param", "code"}}`. The
server also gives its OpenAPI document at `/openapi.json`, and the playground at `/`.
"""

CARRIERS = """\
The header `X-Steer`, the model's name (`MODEL+refusal`) and `vllm_xargs` (`{"steer": "refusal"}`) carry the same;
carriers that disagree are a 400. Every answer has the header `X-Steer-Applied`: a JSON list of
`{"direction", "digest", "mode", "strength"}` (and `layers` and `tokens`, where these are not all, `if`, where there is
a condition, and `shift`, where a threshold is moved), `[]` for a plain answer.

Any other field, header (with or without `X-`) or query parameter whose name begins with `steer`, in any case, is a 400
that names it: in the body, in `extra_body`, `extra_args`, `vllm_xargs`, `metadata` and `sampling_params`, and in nested
`requests`."""

BOUNDS = f"""\
At most {steer.readout.MAX_DIRECTIONS} directions, whose rows together are at most the server's rank. A layer that a
direction does not steer has no row there and reads as 0."""

PLACE = """\
Each choice has a field `steer_readout`, beside `logprobs`: a [`ReadReport`](#readreport). In a stream each chunk's
choices have it for the tokens of that chunk; the lists of one choice's chunks, put one after the other, are those of
the whole answer."""


def document() -> dict[str, Any]:
    """The OpenAPI document of a server with the demo model."""
    quiet_libraries()
    served = prepare(str(MODEL), ServeSettings(directions=ROOT / "directions", served_model_name="demo", port=0))
    try:
        return build(served).openapi()
    finally:
        served.engine.stop()


def routes(openapi: dict[str, Any]) -> str:
    rows = [
        (f"`{method.upper()} {path}`", operation["summary"])
        for path, methods in openapi["paths"].items()
        for method, operation in methods.items()
    ]
    return table(("route", ""), rows)


def body(schema: dict[str, Any], without: set[str]) -> str:
    """The fields of a request body, as its JSON schema has them."""
    required = set(schema.get("required", ()))
    rows = [
        (f"`{name}`", kind(field), "required" if name in required else default(field), field.get("description", ""))
        for name, field in schema["properties"].items()
        if name not in without
    ]
    return table(("field", "type", "default", ""), rows)


def kind(field: dict[str, Any], answered: bool = False) -> str:
    """A field's type in words, with its bounds. In an answer objects have names, and null is a value."""
    if "anyOf" in field:
        options = [option for option in field["anyOf"] if answered or option.get("type") != "null"]
        return " or ".join(dict.fromkeys(kind(option, answered) for option in options))
    if "$ref" in field:
        name = field["$ref"].rpartition("/")[2]
        return f"[`{name}`](#{name.lower()})" if answered else "object"
    if "const" in field:
        return f"`{json.dumps(field['const'])}`" if answered else str(field["const"])
    if answered and len(field.get("enum", ())) in range(1, MOST_VALUES):
        return " or ".join(f"`{json.dumps(value)}`" for value in field["enum"])
    if field.get("type") == "array":
        return f"list of {kind(field['items'], answered)}"
    low, high = field.get("minimum", field.get("exclusiveMinimum")), field.get("maximum")
    bounds = ""
    if low is not None:
        above = "above" if "exclusiveMinimum" in field else "from"
        bounds = f" {above} {_exact(low)}" + ("" if high is None else f" to {_exact(high)}")
    return str(field.get("type", "see below")) + bounds


def _exact(number: float) -> str:
    return str(number) if isinstance(number, int) else f"{number:g}"


def default(field: dict[str, Any]) -> str:
    value = field.get("default")
    return "" if value is None else f"`{str(value).lower() if isinstance(value, bool) else value}`"


def answers(openapi: dict[str, Any]) -> str:
    """What each route answers, and the fields of all objects in it."""
    schemas = openapi["components"]["schemas"]
    rows, shown = list[tuple[str, ...]](), dict[str, None]()
    for path, methods in openapi["paths"].items():
        for method, operation in methods.items():
            for media_type, content in operation["responses"]["200"]["content"].items():
                said = kind(content["schema"], True) if media_type == "application/json" else f"`{media_type}`"
                if media_type == "text/event-stream":
                    event = schemas[content["schema"]["$ref"].rpartition("/")[2]]
                    said = f"with `stream`, events of {kind(event, True)}, then `[DONE]`"
                rows.append((f"`{method.upper()} {path}`", said))
                shown |= dict.fromkeys(_objects(content["schema"], schemas))
    parts = [table(("route", "answer"), rows)]
    for name in shown:
        schema = schemas[name]
        required = set(schema.get("required", ()))
        fields = [
            (f"`{field}`", kind(of, True), "" if field in required else "not always", of.get("description", ""))
            for field, of in schema["properties"].items()
        ]
        parts += [f"### `{name}`", schema.get("description", ""), table(("field", "type", "", ""), fields)]
    return "\n\n".join(filter(None, parts))


def _objects(schema: dict[str, Any], schemas: dict[str, Any]) -> list[str]:
    """The objects with fields that stand in a schema, in the order in which a reader meets them."""
    found: dict[str, None] = {}
    for name in re.findall(r"#/components/schemas/(\w+)", json.dumps(schema)):
        if "properties" in schemas[name]:
            found[name] = None
        found |= dict.fromkeys(_objects(schemas[name], schemas))
    return list(found)


def doc(module: ModuleType, count: int) -> str:
    """The first `count` paragraphs of a module's docstring after the one on its place; indented ones are code."""
    _, *paragraphs = inspect.cleandoc(module.__doc__ or "").split("\n\n")
    blocks = [f"```text\n{inspect.cleandoc(p)}\n```" if p.startswith("    ") else p for p in paragraphs[:count]]
    return "\n\n".join(blocks)


def problems() -> str:
    rows = [(str(code.status), f"`{code.wire}`", code.meaning) for code in sorted(Code, key=lambda code: code.status)]
    return table(("status", "`code`", "when"), rows)


def unserved() -> str:
    """What becomes of all other fields."""

    def listed(names: Iterable[str]) -> str:
        return ", ".join(f"`{name}`" for name in sorted(names))

    neutral = {name: values for name, values in protocol.NOT_SERVED.items() if values}
    rows = [
        (f"`{name}`", ", ".join(f"`{json.dumps(value)}`" for value in values))
        for name, values in sorted(neutral.items())
    ]
    return "\n\n".join(
        (
            "Any other field that says something is a 400 that names it, an unknown one too: "
            + listed(protocol.NOT_SERVED)
            + ". Null, and what is empty, asks for nothing and passes everywhere, and so do these values:",
            table(("field", "passes"), rows),
            "Accepted and without a meaning here, whatever they say: " + listed(protocol.IGNORED) + ".",
        )
    )


def table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def render() -> str:
    openapi = document()
    schemas = openapi["components"]["schemas"]
    carried = set(protocol.CARRIED)
    shared = set(protocol.GenerationRequest.model_fields)
    return (
        "\n\n".join(
            (
                INTRODUCTION.strip(),
                "## Routes",
                routes(openapi),
                "## Fields of both generation routes",
                body(schemas["ChatRequest"], set(schemas["ChatRequest"]["properties"]) - shared),
                unserved(),
                "## Fields of `/v1/chat/completions`",
                body(schemas["ChatRequest"], shared | carried),
                "## Fields of `/v1/completions`",
                body(schemas["CompletionRequest"], shared | carried),
                "## Steering: `steer`",
                doc(steer.spec, 3),
                CARRIERS,
                "## Reading: `steer_readout`",
                doc(steer.readout, 1),
                BOUNDS,
                "### What is read",
                doc(steer.runtime.readout, 6),
                "Component / norm is a cosine: how much of the stream points along the direction.",
                "### In the answer",
                PLACE,
                f"Numbers have {DIGITS} significant digits; what is not finite is `null`.",
                "## Answers",
                answers(openapi),
                "## Errors",
                problems(),
            )
        )
        + "\n"
    )


if __name__ == "__main__":
    TARGET.write_text(render())
