"""The outcome of each prompt of a set in each arm, with the rates and paired differences of the outcomes; what a right
answer contains; and the perplexity of plain text, which shows what a direction costs on text without a request."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, Field, ValidationError

from steer.direction import Dataset
from steer.errors import InvalidInput
from steer.files import read_bytes
from steer.lab import statistics
from steer.lab.behaviour import Behaviour
from steer.lab.evaluation.arms import PLAIN
from steer.lab.evaluation.report import Agreement, ArmOnSet, Difference, Judged, PerplexityOf, Rate, TextResult
from steer.lab.evaluator import Evaluator, Floats, Steer
from steer.lab.lines import json_lines, unquoted
from steer.lab.outcome import FAULTS, OUTCOMES, Answer, Fault, Outcome, classify, unended
from steer.lab.prompts import Prompt, prompt_of


@dataclass(frozen=True, slots=True)
class Row:
    """One answer and its outcome. `right` is None if it is not known what a right answer contains. A verdict is None if
    the judge gave none."""

    answer: Answer
    outcome: Outcome
    why: str
    fault: Fault | None
    unended: bool
    right: bool | None = None
    verdicts: Mapping[str, Outcome | None] = field(default_factory=dict)


def rows_of(
    behaviour: Behaviour,
    prompts: Sequence[Prompt],
    answers: Sequence[Answer],
    plain: Sequence[Answer],
    max_tokens: int,
    right: Sequence[bool] | None = None,
    verdicts: Mapping[str, Sequence[Outcome | None]] | None = None,
    limit_tells: bool = False,
) -> list[Row]:
    """Decide the outcome of each answer by the behaviour's patterns, and keep the judges' verdicts with it. Only a
    judge can decide that an answer is about something else, so the outcome "deflected" is taken from the judges.

    Args:
        plain: the plain model's answers to the same prompts.
        right: whether each answer is as expected; None if that is not known.
        verdicts: of each judge, by its name.
        limit_tells: whether an answer that reaches `max_tokens` is a runaway, see `ends`.
    """
    found = []
    for i, (prompt, answer, beside) in enumerate(zip(prompts, answers, plain, strict=True)):
        votes = {judge: given[i] for judge, given in (verdicts or {}).items()}
        result = classify(
            behaviour,
            answer,
            deflected="deflected" in votes.values(),
            prompt=prompt,
            beside=beside,
            limit=max_tokens,
            limit_tells=limit_tells,
        )
        known = None if right is None else right[i] and result.outcome == "complied"
        found.append(Row(answer, result.outcome, result.why, result.fault, unended(answer, max_tokens), known, votes))
    return found


def arms_on_set(rows_of_arms: Mapping[str, Sequence[Row]]) -> tuple[ArmOnSet, ...]:
    """The figures of every arm, including PLAIN, and the differences of each arm from PLAIN, with p-values corrected
    for the number of arms."""
    against = differences(rows_of_arms, {name: PLAIN for name in rows_of_arms if name != PLAIN})
    return tuple(_arm(name, arm, against.get(name, {})) for name, arm in rows_of_arms.items())


def differences(
    rows_of_arms: Mapping[str, Sequence[Row]], pairs: Mapping[str, str]
) -> dict[str, dict[str, Difference]]:
    """Return, for each arm and figure, the difference from the arm that `pairs` gives for it, with p-values corrected
    for the number of arms."""
    against = {name: _against(rows_of_arms[other], rows_of_arms[name]) for name, other in pairs.items()}
    for figure in sorted({figure for found in against.values() for figure in found}):
        having = {name: found[figure] for name, found in against.items() if figure in found}
        for name, difference in corrected(having).items():
            against[name][figure] = difference
    return against


def corrected(differences: Mapping[str, Difference]) -> dict[str, Difference]:
    """Return `differences` with p-values corrected for their number."""
    p_values = statistics.holm([one.p or 0.0 for one in differences.values()])
    return {
        name: one.model_copy(update={"p_holm": p}) for (name, one), p in zip(differences.items(), p_values, strict=True)
    }


def _figures(rows: Sequence[Row]) -> dict[str, list[bool | None]]:
    """Whether each figure holds for each prompt; None if that is not known."""
    found: dict[str, list[bool | None]] = {outcome: [t.outcome == outcome for t in rows] for outcome in OUTCOMES}
    found["right"] = [t.right for t in rows]
    for judge in rows[0].verdicts:
        found[judged_by(judge)] = [None if (v := t.verdicts[judge]) is None else v == "shown" for t in rows]
    return found


def judged_by(judge: str) -> str:
    """The name of the figure that counts the answers that show the behaviour according to `judge`."""
    return f"shown by {judge}"


def _against(plain: Sequence[Row], arm: Sequence[Row]) -> dict[str, Difference]:
    found = {}
    before, after = _figures(plain), _figures(arm)
    for figure in before:
        first, second = _both_known(before[figure], after[figure])
        if first:
            found[figure] = Difference.of(
                statistics.difference_of_rates(first, second), statistics.mcnemar(first, second)
            )
    return found


def _both_known(first: Sequence[bool | None], second: Sequence[bool | None]) -> tuple[list[bool], list[bool]]:
    """Return the outcomes of both for the prompts where neither is None."""
    pairs = [(a, b) for a, b in zip(first, second, strict=True) if a is not None and b is not None]
    return [a for a, _ in pairs], [b for _, b in pairs]


def _arm(name: str, rows: Sequence[Row], against: dict[str, Difference]) -> ArmOnSet:
    lengths = [len(t.answer.ids) for t in rows]
    right = [t.right for t in rows if t.right is not None]
    return ArmOnSet(
        arm=name,
        **{outcome: Rate.of([t.outcome == outcome for t in rows]) for outcome in OUTCOMES},
        right=Rate.of(right) if right else None,
        judged={judge: _judged(rows, judge) for judge in rows[0].verdicts},
        faults={f: count for f in FAULTS if (count := sum(t.fault == f for t in rows))},
        unended=sum(t.unended for t in rows),
        tokens_mean=float(np.mean(lengths)),
        tokens_median=float(np.median(lengths)),
        against_plain=against,
    )


def _judged(rows: Sequence[Row], judge: str) -> Judged:
    verdicts = [v for t in rows if (v := t.verdicts[judge]) is not None]
    return Judged(
        shown=Rate.of([v == "shown" for v in verdicts]),
        deflected=sum(v == "deflected" for v in verdicts),
        silent=len(rows) - len(verdicts),
    )


def agreements(rows: Iterable[Row]) -> tuple[Agreement, ...]:
    """Cohen's kappa of the matcher and each judge, and of each pair of judges, on whether an answer shows the
    behaviour. It is computed over the answers on which both have a verdict."""
    found = list(rows)
    figures = _figures(found) if found else {}
    raters = {"matcher": figures.get("shown", [])}
    raters |= {judge: figures[judged_by(judge)] for judge in (found[0].verdicts if found else ())}
    made = []
    for first, second in itertools.combinations(raters, 2):
        one, other = _both_known(raters[first], raters[second])
        if one and (kappa := statistics.cohens_kappa(one, other)) is not None:
            ends = {"kappa": kappa.value, "low": kappa.low, "high": kappa.high}
            made.append(Agreement(first=first, second=second, count=len(one), **ends))
    return tuple(made)


#: The tokens of one window; the model's context if it is shorter. Each window but the first begins half a window after
#: the one before, so every token after the first window is predicted from at least half a window of text.
WINDOW = 1024
#: The tokens of one block. The bootstrap draws blocks, because neighbouring tokens are alike.
BLOCK = 32


@dataclass(frozen=True, slots=True)
class Text:
    """Plain text in windows of tokens. Every token of the text but the first is predicted once.

    Attributes:
        dataset: where the text came from.
        pieces: the token ids of each window.
        starts: the index, in each window, of the first token whose prediction counts.
    """

    dataset: Dataset
    pieces: list[list[int]]
    starts: list[int]


def in_windows(dataset: Dataset, ids: Sequence[int], size: int) -> Text:
    """`ids` in windows of at most `size` tokens. Raises InvalidInput if there is nothing to predict."""
    if len(ids) < 2:
        raise InvalidInput(f"--text: has {len(ids)} tokens, and at least 2 are needed")
    pieces, starts, done = [list(ids[:size])], [1], min(size, len(ids))
    while done < len(ids):
        end = min(done + size // 2, len(ids))
        begin = max(0, end - size)
        pieces.append(list(ids[begin:end]))
        starts.append(done - begin)
        done = end
    return Text(dataset, pieces, starts)


def negative_log_likelihoods(evaluator: Evaluator, text: Text, steer: Steer) -> Floats:
    """−ln p of each token of the text but the first, in the order of the text."""
    scored = evaluator.log_probabilities(text.pieces, steer)
    return -np.concatenate([row[start - 1 :] for row, start in zip(scored, text.starts, strict=True)])


def perplexity(nll: Floats) -> float:
    return math.exp(float(nll.mean()))


def ratio(plain: Floats, steered: Floats) -> statistics.Estimate:
    """The steered perplexity divided by the plain one, with the interval of a paired bootstrap over blocks of
    tokens."""
    blocks = range(0, len(plain), BLOCK)
    means = [[float(values[at : at + BLOCK].mean()) for at in blocks] for values in (plain, steered)]
    log = statistics.difference_of_means(*means)
    return statistics.Estimate(perplexity(steered) / perplexity(plain), math.exp(log.low), math.exp(log.high))


def text_result(text: Text, negative: Mapping[str, Floats]) -> TextResult:
    """The perplexity of each arm, from the negative log-likelihoods of the text's tokens in each arm, including
    PLAIN."""
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


ACCEPTED = """\
accepted: .jsonl whose lines have a prompt (or messages) with contains and lacks, lists of texts; a line of vocabulary \
and lacks without a prompt holds for the lines after it"""


class Expected(BaseModel, frozen=True, extra="ignore"):
    """What a right answer contains and lacks; letter case does not matter."""

    contains: tuple[str, ...] = Field(default=(), description="all of these stand in a right answer")
    lacks: tuple[str, ...] = Field(default=(), description="none of these does")
    vocabulary: tuple[str, ...] = Field(default=(), description="of these only those in contains do")

    def met(self, answer: str) -> bool:
        text = answer.casefold()
        named = {c.casefold() for c in self.contains}
        others = [*self.lacks, *(word for word in self.vocabulary if word.casefold() not in named)]
        return all(c in text for c in named) and not any(word.casefold() in text for word in others)


def read_expected(path: Path) -> dict[Prompt, Expected]:
    """What a right answer to each prompt contains and lacks, from a file of JSON lines. Raises InvalidInput with every
    problem, and with what is accepted."""
    try:
        text = read_bytes(path).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput(f"--expected: {path}: cannot be read: {error}; {ACCEPTED}") from error
    found: dict[Prompt, Expected] = {}
    common = Expected()

    def read(item: Any) -> None:
        nonlocal common
        try:
            own = Expected.model_validate(item)
        except ValidationError as error:
            raise InvalidInput(unquoted(error, "line")) from error
        if "vocabulary" in item:
            common = own
            return
        own = own.model_copy(update={"lacks": (*common.lacks, *own.lacks), "vocabulary": common.vocabulary})
        if not own.contains and not own.lacks:
            raise InvalidInput("needs texts in contains or lacks")
        if found.setdefault(prompt_of(item), own) != own:
            raise InvalidInput("says otherwise than an earlier line of the same prompt")

    try:
        if not json_lines(str(path), text, read):
            raise InvalidInput(f"{path}: has no prompts")
    except InvalidInput as error:
        raise InvalidInput([*error.problems, ACCEPTED]) from error
    return found


def right(expected: Mapping[Prompt, Expected], prompts: Sequence[Prompt], answers: Sequence[str]) -> list[bool] | None:
    """Whether each answer is as expected; None if `expected` does not have all of the prompts."""
    if not all(prompt in expected for prompt in prompts):
        return None
    return [expected[prompt].met(answer) for prompt, answer in zip(prompts, answers, strict=True)]
