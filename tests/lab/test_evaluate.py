"""Evaluating: refusals are matched as documented, divergence is zero for nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from steer.hf.attach import Steering
from steer.hf.load import load
from steer.lab.behaviour import REFUSAL
from steer.lab.evaluate import evaluate
from steer.lab.probe import Probe
from tests import models


@pytest.mark.parametrize(
    "answer",
    [
        "I'm sorry, but I can't help with that.",
        "I’m sorry, but I can’t assist with that request.",
        "I cannot help you do this.",
        "Sorry, I can't do that.",
        "I won't do this.",
        "As an AI, I have no opinion.",
        "Unfortunately I am unable to comply.",
    ],
)
def test_refusals_are_matched(answer: str) -> None:
    assert REFUSAL.shown(answer)


@pytest.mark.parametrize(
    "answer", ["", "Sure! First get flour.", "It is a pity that cats cannot swim far.", "I can help."]
)
def test_answers_are_not(answer: str) -> None:
    assert not REFUSAL.shown(answer)


def test_a_late_apology_is_not_a_refusal() -> None:
    assert not REFUSAL.shown("First get flour and water. " * 10 + "I'm sorry, but I can't say more.")


def test_report_on_a_tiny_model(tiny_folder: Path) -> None:
    loaded = load(str(tiny_folder))
    direction = models.direction(loaded.model)
    probe = Probe(loaded, Steering(loaded.model), max_tokens=6)
    prompts = {"harmful": ["ab", "cde"], "harmless": ["x", "yz", "w"]}
    nothing = evaluate(probe, direction, "ablate", 0.0, prompts, "harmless")
    assert nothing["kl"]["mean"] == pytest.approx(0, abs=1e-6)
    assert nothing["sets"]["harmful"]["plain"] == nothing["sets"]["harmful"]["steered"]
    full = evaluate(probe, direction, "ablate", 1.0, prompts, "harmless")
    assert full["kl"]["mean"] > 1e-3
    assert full["sets"]["harmless"]["plain"]["prompts"] == 3
    assert not probe.steering.table.rows_in_use


def test_divergence_is_the_textbook_sum(tiny_folder: Path) -> None:
    loaded = load(str(tiny_folder))
    direction = models.direction(loaded.model)
    probe = Probe(loaded, Steering(loaded.model), max_tokens=5)
    prompts = ["abc", "hello world"]
    plain = probe.answers(prompts, None)
    with probe.resident(direction, "ablate", 1.0) as steer:
        got = probe.divergence(prompts, plain, steer)
        expected, first = [], []
        for prompt, answer in zip(prompts, plain, strict=True):
            head = loaded.chat_ids([{"role": "user", "content": prompt}])
            ids = torch.tensor([head + answer.ids])
            with torch.no_grad():
                p = loaded.model(input_ids=ids).logits[0].double().softmax(-1)
                with probe.steering.batch([steer]):
                    q = loaded.model(input_ids=ids).logits[0].double().softmax(-1)
            kl = (p * (p / q).log()).sum(-1)[len(head) - 1 :]
            expected.append(float(kl.mean()))
            first.append(float(kl[0]))
    assert got.mean == pytest.approx(sum(expected) / 2, rel=1e-3)
    assert got.first_mean == pytest.approx(sum(first) / 2, rel=1e-3)
