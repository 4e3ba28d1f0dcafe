"""Perplexity of plain text, plain and steered: what a direction costs where nobody asks anything."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from steer.direction import Dataset
from steer.errors import InvalidInput
from steer.lab.evaluation.arms import PLAIN
from steer.lab.evaluation.report import Difference, PerplexityOf, TextResult
from steer.lab.evaluator import Evaluator, Floats, Steer
from steer.lab.statistics import Estimate, difference_of_means

#: Tokens of one window, or the model's context where that is shorter; each window but the first begins half a window
#: after the one before, so that every token is predicted from at least half a window of text.
WINDOW = 1024
#: Tokens that stand together are alike, so the bootstrap draws blocks: the tokens of one.
BLOCK = 32


@dataclass(frozen=True, slots=True)
class Windows:
    """Pieces of one text, and from which token of each the predictions count: every token of the text but the first
    counts once."""

    pieces: list[list[int]]
    starts: list[int]


@dataclass(frozen=True, slots=True)
class Text:
    """Plain text in tokens, and where it came from."""

    dataset: Dataset
    windows: Windows


def windows(ids: Sequence[int], size: int) -> Windows:
    """`ids` in windows of at most `size` tokens. Raises InvalidInput where there is nothing to predict."""
    if len(ids) < 2:
        raise InvalidInput(f"--text: has {len(ids)} tokens, and at least 2 are needed")
    pieces, starts, done = [list(ids[:size])], [1], min(size, len(ids))
    while done < len(ids):
        end = min(done + size // 2, len(ids))
        begin = max(0, end - size)
        pieces.append(list(ids[begin:end]))
        starts.append(done - begin)
        done = end
    return Windows(pieces, starts)


def negative_log_likelihoods(evaluator: Evaluator, text: Windows, steer: Steer) -> Floats:
    """−ln p of each token of the text but the first, in its order."""
    scored = evaluator.log_probabilities(text.pieces, steer)
    joined: Floats = -np.concatenate([row[start - 1 :] for row, start in zip(scored, text.starts, strict=True)])
    return joined


def perplexity(nll: Floats) -> float:
    return math.exp(float(nll.mean()))


def ratio(plain: Floats, steered: Floats) -> Estimate:
    """Perplexity steered ÷ plain, with the interval of a paired bootstrap over blocks of tokens."""
    blocks = range(0, len(plain), BLOCK)
    means = [[float(values[at : at + BLOCK].mean()) for at in blocks] for values in (plain, steered)]
    log = difference_of_means(*means)
    return Estimate(perplexity(steered) / perplexity(plain), math.exp(log.low), math.exp(log.high))


def result(text: Text, negative: Mapping[str, Floats]) -> TextResult:
    """The perplexity of each arm, from the negative log-likelihoods of the text's tokens, those of PLAIN among them."""
    plain = negative[PLAIN]
    return TextResult(
        dataset=text.dataset,
        tokens=len(plain) + 1,
        arms=tuple(
            PerplexityOf(
                arm=name,
                perplexity=perplexity(values),
                ratio=None if name == PLAIN else Difference.of(ratio(plain, values)),
            )
            for name, values in negative.items()
        ),
    )
