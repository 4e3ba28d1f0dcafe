"""Every field of every request type × values that no request should have, and what an answer to one must be.

The fields are read from the types themselves: those in a server's own OpenAPI document (ours, and vLLM's), those of the
`openai` package, and the table of what the transformers backend does not serve.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, get_type_hints

import httpx
from openai.types import completion_create_params as completion
from openai.types.chat import completion_create_params as chat
from openai.types.responses import response_create_params as responses

from steer.serve import protocol
from steer.serve.protocol import CARRIED
from tests.fuzz import mutate

#: As JSON texts, since some of them no JSON value can be.
VALUES: Mapping[str, str] = {
    "null": "null",
    "true": "true",
    "zero": "0",
    "negative": "-1",
    "very negative": str(-(2**63) - 1),
    "fraction": "0.5",
    "over 16 bits": str(2**17),
    "over 32 bits": str(2**33),
    "huge": str(2**64),
    "longer than a float": "9" * 400,
    "longer than Python reads": "9" * 5000,
    "large float": "1e308",
    "over all floats": "1e999",
    "NaN": "NaN",
    "Infinity": "-Infinity",
    "empty text": '""',
    "text": '"x"',
    "number as text": '"7"',
    "long text": json.dumps("x" * 20_000),
    "half a pair": '"\\ud800"',
    "control": '"\\u0000\\u202e"',
    "empty list": "[]",
    "list": "[1]",
    "huge in a list": f"[{2**40}]",
    "NaN in a list": "[NaN]",
    "texts": '["x", ""]',
    "long list": json.dumps([0] * 5000),
    "mixed list": '[0, "x", null, {}]',
    "empty object": "{}",
    "object": '{"x": 1}',
    "wrong key": '{"\\ud800": 1}',
    "token": f'{{"{2**40}": 1e308, "-1": null}}',
    "deep list": json.dumps(mutate.nested(60)),
    "deep object": '{"x":' * 60 + "1" + "}" * 60,
    "too deep": "[" * 200 + "]" * 200,
}
#: What a request of these routes has beside the field, so that the field alone is wrong. Others get the field alone.
GOOD: Mapping[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 2},
    "/v1/completions": {"prompt": "hello", "max_tokens": 2},
    "/v1/responses": {"input": "hello", "max_output_tokens": 16},
    "/v1/messages": {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 2},
    "/v1/steering": {"enabled": True},
}
GENERATES = tuple(GOOD)[:4]
OPENAI: Mapping[str, Any] = {
    "/v1/chat/completions": chat.CompletionCreateParamsStreaming,
    "/v1/completions": completion.CompletionCreateParamsStreaming,
    "/v1/responses": responses.ResponseCreateParamsStreaming,
}
JSON = {"content-type": "application/json"}
#: What is said of a body as a whole: no field is to be named there.
OF_THE_BODY = ("invalid_json", "body_too_complex", "body_too_large", "content_type")
#: Where the prompt comes from, and what else is a part of it or makes it another one: what is too long, say, is all.
PROMPT = ("prompt", "messages", "input")
OF_THE_PROMPT = (*PROMPT, "instructions", "system", "suffix", "tools", "truncate_prompt_tokens")
#: How pydantic speaks, and Python of its own types.
FOREIGN = re.compile(
    r"validation error|pydantic|Input should|Extra inputs|Value error|Field required|'loc'|'ctx'|type=|NoneType"
    r"|Traceback|\w+_(type|parsing)\b|object has no attribute|valid (string|integer|number|boolean|list|dictionary)"
)


@dataclass(frozen=True, slots=True)
class Case:
    """One request: a field of a route with one value."""

    route: str
    field: str
    kind: str

    def body(self, model: str) -> bytes:
        good = GOOD.get(self.route, {}) | ({"model": model, "temperature": 0} if self.route in GENERATES else {})
        rest = "".join(
            f", {json.dumps(name)}: {json.dumps(value)}" for name, value in good.items() if name != self.field
        )
        return f"{{{json.dumps(self.field)}: {VALUES[self.kind]}{rest}}}".encode()


def cases(document: Mapping[str, Any]) -> Iterator[Case]:
    """All of them for the server of this OpenAPI document, in rounds: each has every field once, with another value."""
    found = [(route, field) for route, names in fields_of(document).items() for field in names]
    kinds = list(VALUES)
    for number in range(len(kinds)):
        for at, (route, field) in enumerate(found):
            yield Case(route, field, kinds[(at + number) % len(kinds)])


def fields_of(document: Mapping[str, Any]) -> dict[str, list[str]]:
    """The fields of each route that takes a JSON body."""
    out: dict[str, list[str]] = {}
    for route, methods in document["paths"].items():
        content = methods.get("post", {}).get("requestBody", {}).get("content", {})
        if "application/json" not in content:
            continue
        names = set(_properties(content["application/json"]["schema"], document))
        if route in OPENAI:
            names |= get_type_hints(OPENAI[route]).keys()
        if route in GENERATES:
            names |= {*protocol.IGNORED, *protocol.NOT_SERVED, *CARRIED, "some_unknown_field"}
        out[route] = sorted(names)
    return out


def _properties(schema: Mapping[str, Any], document: Mapping[str, Any]) -> Iterator[str]:
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        yield from _properties(document["components"]["schemas"][name], document)
    yield from schema.get("properties", {})
    for part in (*schema.get("anyOf", ()), *schema.get("oneOf", ()), *schema.get("allOf", ())):
        yield from _properties(part, document)


def wrong(case: Case, answer: httpx.Response) -> str:
    """What is wrong about an answer to this; nothing if nothing is."""
    if answer.status_code >= 500 and answer.status_code != 501:
        return f"a {answer.status_code}"
    if answer.status_code < 400:
        return ""
    error = answer.json().get("error")
    if not isinstance(error, dict):
        return "not an error of ours"
    message, param = str(error["message"]), str(error.get("param"))
    if found := FOREIGN.search(message):
        return f"the words {found[0]!r}"
    if len(message) > 4000:
        return "a message without bounds"
    names = (case.field, *PROMPT) if case.field in OF_THE_PROMPT else (case.field,)
    named = any(re.match(rf"{re.escape(field)}(\W|$)", param) for field in names) or error.get("code") in OF_THE_BODY
    if case.route in GOOD and not named:
        return "another param"
    return ""
