"""Trying a model out: divergence and log-probabilities are what the textbook says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from steer.hf.attach import Steering
from steer.hf.load import load
from steer.lab.probe import Probe
from tests import models


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


def test_log_probabilities_are_those_of_one_sequence_alone(tiny_folder: Path) -> None:
    loaded = load(str(tiny_folder))
    probe = Probe(loaded, Steering(loaded.model))
    sequences = [loaded.text_ids(text) for text in ("hello world", "ab", "a longer text than the others")]
    with probe.resident(models.direction(loaded.model), "ablate", 1.0) as steer:
        together = probe.log_probabilities(sequences, steer)
        for ids, row in zip(sequences, together, strict=True):
            with torch.no_grad(), probe.steering.batch([steer]):
                logits = loaded.model(input_ids=torch.tensor([ids])).logits[0].double()
            alone = logits.log_softmax(-1)[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
            assert row == pytest.approx(alone.numpy(), abs=1e-4)
    assert probe.log_probabilities(sequences[:1], None)[0] != pytest.approx(together[0], abs=1e-3)
