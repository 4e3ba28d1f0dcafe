"""Items of files that people write: each problem is told once, with the lines that have it."""

from __future__ import annotations

from typing import Any

import pytest

from steer.errors import InvalidInput
from steer.lab.lines import each, json_lines


def small(item: Any) -> int:
    if not isinstance(item, int):
        raise InvalidInput("not a number")
    if item > 9:
        raise InvalidInput(["over 9", "too large"])
    return item


def test_blank_lines_are_none() -> None:
    assert json_lines("file", "1\n\n \r\n2\r\n", small) == [1, 2]
    assert json_lines("file", '"a\u2028b"', str) == ["a\u2028b"], "other signs end no line"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('"a"\n1', ["file, line 1: not a number"]),
        ('1\n"a"\n{}', ["file, lines 2 and 3: not a number"]),
        ('"a"\n' * 3, ["file, lines 1, 2 and 3: not a number"]),
        ('"a"\n' * 40, ["file, lines 1, 2, 3 and 37 more: not a number"]),
        (
            '10\n"a"\n11',
            [f"file, lines 1 and 3: {told}" for told in ("over 9", "too large")] + ["file, line 2: not a number"],
        ),
        ("[1", ["file, line 1: not JSON: Expecting ',' delimiter: line 1 column 3 (char 2)"]),
        ("[1\n[12", ["file, lines 1 and 2: not JSON: Expecting ',' delimiter"]),
    ],
)
def test_a_problem_is_told_once_with_the_first_lines_that_have_it(text: str, told: list[str]) -> None:
    with pytest.raises(InvalidInput) as caught:
        json_lines("file", text, small)
    assert sorted(caught.value.problems) == sorted(told)


def test_items_of_another_kind_are_called_so() -> None:
    with pytest.raises(InvalidInput, match=r"^table, rows 5 and 7: not a number$"):
        each("table", "row", [(5, "a"), (6, 1), (7, None)], small)
