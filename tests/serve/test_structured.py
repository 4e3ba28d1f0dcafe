"""What is said of the form of an answer is bounded before an engine compiles it."""

from __future__ import annotations

from typing import Any

import pytest

from steer.errors import RequestError
from steer.serve.body import check_size
from steer.serve.structured import MAX_CHOICES, MAX_FORM

LOOP = {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}
ESCAPED = {"properties": {"x": {"$ref": "#/$defs/a~1b%20c"}}, "$defs": {"a/b c": {"$ref": "#/$defs/a~1b c"}}}
TREE = {
    "$ref": "#/$defs/node",
    "$defs": {"node": {"type": "object", "properties": {"next": {"$ref": "#/$defs/node"}, "$ref": {"type": "string"}}}},
    "anyOf": [{"$ref": "#/anyOf/1"}, {"type": "null"}, {"$ref": "http://elsewhere/x"}, {"$ref": "#/anyOf/9"}],
}


@pytest.mark.parametrize(
    ("asked", "param", "says"),
    [
        ({"structured_outputs": {"regex": "a" * MAX_FORM}}, "structured_outputs", f"at most {MAX_FORM}"),
        ({"response_format": {"json_schema": {"schema": {"title": "é" * 17_000}}}}, "response_format", "bytes of JSON"),
        ({"text": {"format": {"schema": {"enum": ["a" * 100] * 400}}}}, "text", "bytes of JSON"),
        ({"output_config": {"format": {"schema": {"enum": ["a" * 100] * 400}}}}, "output_config", "bytes of JSON"),
        ({"guided_grammar": "a" * 40_000}, "guided_grammar", "bytes of JSON"),
        ({"guided_json": "a" * 20_000, "structured_outputs": {"json": "a" * 20_000}}, "guided_json", "bytes of JSON"),
        ({"structured_outputs": {"choice": ["a"] * 1025}}, "structured_outputs", f"at most {MAX_CHOICES}"),
        ({"guided_choice": ["a"] * 1025}, "guided_choice", "1025 texts"),
        ({"structured_outputs": {"json": {"$ref": "#"}}}, "structured_outputs", "'#' leads to itself"),
        ({"structured_outputs": {"json": '{"$ref": "#"}'}}, "structured_outputs", "leads to itself"),
        ({"response_format": {"json_schema": {"schema": LOOP}}}, "response_format", "leads to itself"),
        ({"text": {"format": {"schema": ESCAPED}}}, "text", "leads to itself"),
        ({"guided_json": LOOP}, "guided_json", "leads to itself"),
    ],
)
def test_a_form_that_is_too_much_or_is_met_by_nothing_is_refused(asked: dict[str, Any], param: str, says: str) -> None:
    with pytest.raises(RequestError) as caught:
        check_size(asked)
    assert caught.value.param == param
    assert says in str(caught.value)


def test_any_other_form_is_left_to_the_engine() -> None:
    many = {f"a{i}": {"$ref": f"#/$defs/a{i + 1}"} for i in range(900)} | {"a900": {"type": "string"}}
    bodies: list[dict[str, Any]] = [
        {"structured_outputs": {"choice": ["a"] * 1024}, "response_format": {"type": "json_object"}},
        {"structured_outputs": {"json": TREE}, "guided_json": "no JSON", "text": "a" * 100_000, "output_config": 7},
        {"response_format": {"json_schema": {"schema": {"$ref": "#/$defs/a0", "$defs": many}}}},
        {"structured_outputs": 7, "response_format": [], "guided_choice": "a", "text": {"format": None}},
        {"structured_outputs": {"json": {"$ref": 7}}, "guided_json": '{"$ref":'},
    ]
    for asked in bodies:
        check_size(asked)
