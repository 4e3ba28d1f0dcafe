"""Tables are Markdown, and nothing is wider than the terminal."""

from __future__ import annotations

import pytest

from steer.lab.tables import markdown, shown, wrapped

HEAD = ("arm", "shown", "what it is")
ROWS = [("d:ablate=1", "3 of 13", "slerp t=0.50, layer 3"), ("plain", "–", "nothing")]


def test_texts_stand_to_the_left_and_figures_to_the_right() -> None:
    assert markdown(HEAD, ROWS).splitlines() == [
        "| arm        |   shown | what it is            |",
        "| ---------- | ------: | --------------------- |",
        "| d:ablate=1 | 3 of 13 | slerp t=0.50, layer 3 |",
        "| plain      |       – | nothing               |",
    ]


def test_a_table_without_rows_is_its_head() -> None:
    assert len(markdown(HEAD, []).splitlines()) == 2


def test_where_the_terminal_is_too_narrow_each_row_is_a_list(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    assert shown(HEAD, ROWS) == markdown(HEAD, ROWS)
    monkeypatch.setenv("COLUMNS", "24")
    assert shown(HEAD, ROWS).splitlines() == [
        "arm: d:ablate=1",
        "  shown: 3 of 13",
        "  what it is: slerp",
        "    t=0.50, layer 3",
        "arm: plain",
        "  shown: –",
        "  what it is: nothing",
    ]


def test_where_there_is_no_terminal_it_is_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    assert shown(HEAD, [("x" * 300, "1", "")]).startswith("| arm")


def test_what_a_file_says_cannot_steer_the_terminal() -> None:
    assert wrapped("model: a\x1b[2J\x9b1m\nverified: \u202eno", 99) == r"model: a\x1b[2J\x9b1m verified: \u202eno"
