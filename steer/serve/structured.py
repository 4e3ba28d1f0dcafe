"""The form that a request asks for: a schema, a grammar, a regular expression or a choice. An engine compiles it while
all others wait, so its size is limited. A small form can be expensive too, so a policy decides who may ask for one
(`forms`)."""

from __future__ import annotations

import json
from collections.abc import Mapping

from steer.errors import RequestError

#: Bytes, as JSON, of all forms in one request.
MAX_FORM = 32 * 1024
#: The fields that have a form, in several APIs and in older versions of them. Of a field in `INNER` only that part.
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
    """Raises RequestError for more than `MAX_FORM`. Wrong types are left to the app."""
    size = 0
    for name in FIELDS:
        form = body.get(name)
        if name in INNER:
            form = form.get(INNER[name]) if isinstance(form, dict) else None
        size += 0 if form is None else len(json.dumps(form, ensure_ascii=False).encode())
        if size > MAX_FORM:
            raise RequestError(
                f"{name}: the form of an answer is {size} bytes of JSON or more, at most {MAX_FORM} are accepted",
                param=name,
            )
