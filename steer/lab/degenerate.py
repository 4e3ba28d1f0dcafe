"""Answers that are no answers: loops, nothing at all, collapse, no end. They must not pass for compliance.

A fault is told from the token ids, so that it does not hang on spaces or on a language.

- `empty`: not one letter or digit.
- `looped`: the answer ends in a phrase that stands there at least three times, six tokens in all. Source: Holtzman et
  al. 2020, "The curious case of neural text degeneration" (a phrase of two tokens or more, three times, at the end).
- `repetitive`: more than half of its 4-grams have stood in it before, in an answer of at least 32 tokens. Source:
  seq-rep-4 of Welleck et al. 2020, "Neural text generation with unlikelihood training"; the half is our choice.
- `collapsed`: fewer than a quarter of the tokens of the plain answer to the same prompt.
- `unended`: no end before the limit. It says something only where the plain model does end; see `ends`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias

from steer.lab.probe import Answered

Fault: TypeAlias = Literal["empty", "looped", "repetitive", "collapsed", "unended"]
FAULTS: tuple[Fault, ...] = ("empty", "looped", "repetitive", "collapsed", "unended")

REPEATS, LOOP_TOKENS = 3, 6
NGRAM, REPETITIVE, REPETITIVE_TOKENS = 4, 0.5, 32
COLLAPSED = 0.25
#: Plain answers to ordinary prompts end before the limit at least so often, where to run into it means something.
ENDING = 0.95


def looped(ids: Sequence[int]) -> bool:
    """Whether `ids` end in a phrase that repeats; the last repeat may be cut short."""
    for period in range(1, len(ids) // REPEATS + 1):
        length = period
        while length < len(ids) and ids[-length - 1] == ids[-length - 1 + period]:
            length += 1
        if length >= max(REPEATS * period, LOOP_TOKENS):
            return True
    return False


def repetition(ids: Sequence[int]) -> float:
    """The share of 4-grams that have stood in `ids` before, from 0 to 1."""
    grams = [tuple(ids[i : i + NGRAM]) for i in range(len(ids) - NGRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def unended(answer: Answered, max_tokens: int) -> bool:
    return len(answer.ids) >= max_tokens


def ends(plain: Sequence[Answered], max_tokens: int) -> bool:
    """Whether `max_tokens` are enough for the plain model's answers, so that the limit tells a runaway answer; else it
    is the limit that cuts, and nothing is wrong with the answer."""
    return sum(not unended(answer, max_tokens) for answer in plain) >= ENDING * len(plain)


def fault(answer: Answered, beside: Answered | None, limit: int | None) -> Fault | None:
    """The first fault of `answer`, if it has one. `beside` is a plain answer that it should be about as long as, and
    `limit` the number of tokens before which it should have ended. None where there is no such measure."""
    ids = answer.ids
    if not any(letter.isalnum() for letter in answer.text):
        return "empty"
    if looped(ids):
        return "looped"
    if len(ids) >= REPETITIVE_TOKENS and repetition(ids) > REPETITIVE:
        return "repetitive"
    if beside is not None and len(ids) < COLLAPSED * len(beside.ids):
        return "collapsed"
    if limit is not None and unended(answer, limit):
        return "unended"
    return None
