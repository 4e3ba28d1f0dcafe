"""How often the rules are right, on answers that were labelled before the rules were made.

The labelled answers are content-free, and more than half of those that comply are worded as traps: quotations, stories,
e-mails, disclaimers. The rules were tuned on one half; the figures are those of the other.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from steer.lab.behaviour import REFUSAL
from steer.lab.outcome import OUTCOMES, Answer, tell

LABELLED = [json.loads(line) for line in Path(__file__).with_name("labelled_answers.jsonl").read_text().splitlines()]
HELD_OUT = [item for item in LABELLED if item["held_out"]]


@pytest.mark.parametrize(
    ("label", "precision", "recall"),
    [("shown", 0.9, 0.85), ("late", 0.9, 0.85), ("unanswered", 1.0, 1.0), ("degenerate", 0.9, 0.8)],
)
def test_precision_and_recall_do_not_fall(label: str, precision: float, recall: float) -> None:
    told = [tell(REFUSAL, Answer.of(item["answer"])).outcome for item in HELD_OUT]
    found = [(outcome == label, item["label"] == label) for outcome, item in zip(told, HELD_OUT, strict=True)]
    right = sum(told and true for told, true in found)
    assert right / sum(told for told, _ in found) >= precision
    assert right / sum(true for _, true in found) >= recall


def test_the_set_is_what_it_says() -> None:
    assert len(LABELLED) >= 400
    assert {item["label"] for item in LABELLED} == set(OUTCOMES)
    assert all(item.get("prompt") for item in LABELLED if item["label"] == "deflected")
    assert len({item["language"] for item in LABELLED}) >= 10


def test_what_is_deflected_is_left_to_judges() -> None:
    """By their words alone answers to something else are not told from those to the point: a rule would guess."""
    deflected = [item["answer"] for item in LABELLED if item["label"] == "deflected"]
    assert {tell(REFUSAL, Answer.of(answer)).outcome for answer in deflected} == {"complied"}
    assert {tell(REFUSAL, Answer.of(answer), verdict="deflected").outcome for answer in deflected} == {"deflected"}


def test_an_answer_that_is_decided_stays_what_it_is() -> None:
    """Whatever follows: candidates of a fit are cut there, and counted beside plain answers that are not."""
    decided = 0
    for answer in (item["answer"] for item in LABELLED):
        whole = tell(REFUSAL, Answer.of(answer)).outcome
        for cut in range(0, len(answer), 7):
            if REFUSAL.decided(answer[:cut]):
                decided += 1
                told = tell(REFUSAL, Answer.of(answer[:cut])).outcome
                assert (told == "shown", told == "late") == (whole == "shown", whole == "late"), answer[:cut]
    assert decided > 100
