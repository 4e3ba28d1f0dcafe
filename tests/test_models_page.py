"""docs/models.md is what its script makes, and what it says of some kinds of models is found again."""

from __future__ import annotations

import re

import pytest

from docs import models as page
from docs.models import COLUMNS, PAGE, Row, cells, parse, render, tried


def test_the_page_is_of_the_form_that_the_script_gives_it() -> None:
    text = PAGE.read_text("utf-8")
    versions = re.findall(r"kind that transformers (\S+) knows|vLLM (\S+) knows the class", text)
    (transformers, _), (_, vllm) = versions
    rows = []
    for kind, (architecture, *said) in parse(text).items():
        pairs = dict(zip(COLUMNS, (one.partition(": ")[::2] for one in said), strict=True))
        last = re.search(rf"^\| {re.escape(kind)} \|.* \| (\S+) \|$", text, re.MULTILINE)
        assert last
        reasons = {column: why for column, (_, why) in pairs.items() if why}
        rows.append(Row(kind, architecture, {column: one for column, (one, _) in pairs.items()}, reasons, last[1]))
    untried = text.rpartition(": ")[2].strip(".\n").split(", ")
    rows += [Row(kind, "?", {}, {"build": "?"}) for kind in untried if kind]
    assert render(rows, transformers, vllm) == text
    assert len(parse(text)) > 50


@pytest.mark.parametrize("kind", ["llama", "gemma3", "qwen3_5", "mistral3", "mamba", "bamba"])
def test_what_the_page_says_is_found_again(kind: str) -> None:
    assert cells(tried(kind)) == parse(PAGE.read_text("utf-8"))[kind]


def test_a_kind_that_cannot_be_built_is_told_and_no_end_of_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "examine", lambda kind: 1 / 0)
    assert tried("llama").reasons == {"build": "ZeroDivisionError: division by zero"}
