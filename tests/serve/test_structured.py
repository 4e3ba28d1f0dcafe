"""What is said of the form of an answer is bounded before an engine reads it."""

from __future__ import annotations

from typing import Any

import pytest

from steer.errors import RequestError
from steer.serve.body import check_size
from steer.serve.structured import MAX_FORM


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        ({"structured_outputs": {"regex": "a" * MAX_FORM}}, "structured_outputs"),
        ({"response_format": {"json_schema": {"schema": {"title": "é" * 17_000}}}}, "response_format"),
        ({"text": {"format": {"schema": {"enum": ["a" * 100] * 400}}}}, "text"),
        ({"output_config": {"format": {"schema": {"enum": ["a" * 100] * 400}}}}, "output_config"),
        ({"guided_grammar": "a" * 40_000}, "guided_grammar"),
        ({"guided_json": "a" * 20_000, "structured_outputs": {"json": "a" * 20_000}}, "guided_json"),
        ({"guided_choice": ["a"] * MAX_FORM}, "guided_choice"),
    ],
)
def test_a_form_that_is_too_much_is_refused(asked: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError, match=f"bytes of JSON or more, at most {MAX_FORM}") as caught:
        check_size(asked)
    assert caught.value.param == param


def test_any_other_form_is_left_to_the_engine() -> None:
    for asked in (
        {"structured_outputs": {"choice": ["a"] * 1024}, "response_format": {"type": "json_object"}},
        {"guided_json": "no JSON", "text": "a" * 100_000, "output_config": 7},
        {"structured_outputs": 7, "response_format": [], "guided_choice": "a", "text": {"format": None}},
    ):
        check_size(asked)
