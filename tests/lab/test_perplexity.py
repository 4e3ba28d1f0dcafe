"""Every token of a text counts once, and perplexity is that of one pass where the text fits one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from steer.errors import InvalidInput
from steer.hf.load import load
from steer.hf.steering import Steering
from steer.lab.evaluation.perplexity import negative_log_likelihoods, perplexity, ratio, windows
from steer.lab.evaluator import Candidate, Evaluator
from steer.lab.probe import HFEvaluator
from tests import models


class Echo:
    """Scores each token as its own id, so that what was scored can be told."""

    def log_probabilities(self, sequences: Sequence[Sequence[int]], steer: Any) -> list[np.ndarray[Any, Any]]:
        return [-np.array(ids[1:], dtype=float) for ids in sequences]


@given(st.integers(2, 300), st.integers(4, 64))
def test_every_token_but_the_first_counts_once_with_half_a_window_before_it(length: int, size: int) -> None:
    ids = list(range(length))
    cut, echo = windows(ids, size), cast(Evaluator, Echo())
    assert list(negative_log_likelihoods(echo, cut, None)) == ids[1:]
    assert all(len(piece) <= size for piece in cut.pieces)
    assert all(start >= size - size // 2 for start in cut.starts[1:])


@pytest.mark.parametrize("ids", [[], [1]])
def test_nothing_to_predict_is_refused(ids: list[int]) -> None:
    with pytest.raises(InvalidInput, match="at least 2"):
        windows(ids, 8)


def test_perplexity_is_the_models_own(tiny_folder: Path) -> None:
    loaded = load(str(tiny_folder))
    probe = HFEvaluator(loaded, Steering(loaded.model))
    ids = loaded.text_ids("plain text that is read and not asked")
    with torch.no_grad():
        loss = loaded.model(input_ids=torch.tensor([ids]), labels=torch.tensor([ids])).loss
    plain = negative_log_likelihoods(probe, windows(ids, 512), None)
    assert perplexity(plain) == pytest.approx(math.exp(float(loss)), rel=1e-4)
    with probe.all_resident([Candidate(models.direction(loaded.model), "ablate", 1.0)]) as (steer,):
        steered = negative_log_likelihoods(probe, windows(ids, 512), steer)
    found = ratio(plain, steered)
    assert found.value == pytest.approx(perplexity(steered) / perplexity(plain))
    assert found.value != pytest.approx(1, abs=1e-3)


def test_a_ratio_of_the_same_is_one_and_its_interval_holds_a_known_one() -> None:
    generator = np.random.default_rng(0)
    plain = generator.exponential(size=2000)
    same = ratio(plain, plain)
    assert (same.value, same.low, same.high) == (1, 1, 1)
    worse = ratio(plain, plain + generator.normal(0.1, 0.5, size=2000))
    assert worse.low < math.exp(0.1) < worse.high
    assert worse.low > 1
