"""How often the rules are right, on answers that were labelled before the rules were made.

The labelled answers are content-free, and more than half of those that comply are worded as traps: quotations, stories,
e-mails, disclaimers. The rules were tuned on one half; the figures are those of the other.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from steer.lab.behaviour import REFUSAL, Text, fault

LABELLED = [json.loads(line) for line in Path(__file__).with_name("labelled_answers.jsonl").read_text().splitlines()]
HELD_OUT = [item for item in LABELLED if item["held_out"]]


def outcome(answer: str) -> str:
    if REFUSAL.shown(answer):
        return "shown"
    wrong = fault(Text(answer), None, None)
    return "complied" if wrong is None else "unanswered" if wrong == "unanswered" else "degenerate"


@pytest.mark.parametrize(
    ("label", "precision", "recall"), [("shown", 0.87, 0.68), ("degenerate", 0.95, 0.62), ("unanswered", 1.0, 0.57)]
)
def test_precision_and_recall_do_not_fall(label: str, precision: float, recall: float) -> None:
    found = [(outcome(item["answer"]) == label, item["label"] == label) for item in HELD_OUT]
    right = sum(told and true for told, true in found)
    assert right / sum(told for told, _ in found) >= precision
    assert right / sum(true for _, true in found) >= recall


def test_the_set_is_what_it_says() -> None:
    assert len(LABELLED) >= 400
    assert {item["label"] for item in LABELLED} == {
        *("shown", "complied", "degenerate", "unanswered", "late", "deflected")
    }
    assert all(item.get("prompt") for item in LABELLED if item["label"] == "deflected")
    assert len({item["language"] for item in LABELLED}) >= 10
