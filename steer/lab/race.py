"""Candidates against each other on the same prompts, in one batch, in rounds: who cannot win any more stops early."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from scipy.special import expit

from steer.errors import InvalidInput
from steer.lab.behaviour import Behaviour
from steer.lab.evaluator import Candidate, Evaluator, Steer, crossed
from steer.lab.judge import Judge, judged
from steer.lab.outcome import Answer, Outcome, Told, tell
from steer.lab.progress import answering
from steer.lab.prompts import Prompt, PromptSet
from steer.lab.statistics import wilson

#: Prompts of each set in the first round, at least; each round after it goes to twice as many. And rows of a step that
#: take hardly longer than one row, as all weights are read for each step: with fewer, a round less is worth more.
FIRST_ROUND, FULL = 8, 160
#: Standard errors by which a mean is above zero where it surely is.
SURELY = 3.0
#: Why a candidate stopped: it surely leaves more of the behaviour than the best, or another is as good in answers and
#: surely diverges less.
Reason = Literal["shown", "diverges"]


@dataclass(frozen=True, slots=True)
class Sets:
    """What candidates are tried on: prompts that show the behaviour, that do not, and (if any) that should not but do.
    In an order that says nothing, the same each time."""

    asked: tuple[Prompt, ...]
    other: tuple[Prompt, ...]
    borderline: tuple[Prompt, ...] = ()

    def __post_init__(self) -> None:
        InvalidInput.raise_for(
            f"the prompt set '{name}' is empty: at least one prompt is needed"
            for name in ("asked", "other")
            if not getattr(self, name)
        )

    @classmethod
    def drawn(cls, asked: PromptSet, other: PromptSet, borderline: PromptSet | None = None, *, limit: int) -> Sets:
        """At most `limit` prompts of each, drawn evenly: files are often sorted by topic."""
        return cls(*(() if one is None else one.drawn(limit).prompts for one in (asked, other, borderline)))

    def work(self, tokens: int, start: int = 0) -> float:
        """The work of a candidate that answers in `tokens` tokens, from prompt `start` of each set on."""
        answered = len(self.asked[start:]) + len(self.borderline[start:])
        return answered * answering(tokens) + len(self.other[start:])

    def plain_work(self, tokens: int) -> float:
        """The work of the plain model, which answers all of them."""
        return (len(self.asked) + len(self.borderline) + len(self.other)) * answering(tokens)


@dataclass(slots=True)
class Figures:
    """What one candidate did, prompt by prompt: answers that showed the behaviour of the prompts asked and of the
    borderline ones, and KL(plain ‖ steered) of each harmless prompt. `stopped` before all were tried, and why.
    `lost` are the answers to the prompts asked that do not show it and are no answers either (see
    `steer.lab.outcome`). `other` and `faulty` are of the answers to the harmless prompts, where these were
    asked for: which showed the behaviour, and which are no answers."""

    asked: list[bool] = field(default_factory=list)
    borderline: list[bool] = field(default_factory=list)
    kls: list[float] = field(default_factory=list)
    stopped: Reason | None = None
    other: list[bool] = field(default_factory=list)
    faulty: list[bool] = field(default_factory=list)
    lost: list[bool] = field(default_factory=list)

    @property
    def left(self) -> list[bool]:
        """For each prompt asked, whether it still has no good answer: the answer shows the behaviour, or is lost. A
        model that only stammers does not show it, and nothing is won by that."""
        return [a or b for a, b in zip(self.asked, self.lost, strict=True)] if self.lost else self.asked

    @property
    def rate_left(self) -> float:
        return float(np.mean(self.left))

    @property
    def shown(self) -> float:
        return float(np.mean(self.asked))

    @property
    def over(self) -> float | None:
        return float(np.mean(self.borderline)) if self.borderline else None

    @property
    def kl(self) -> float:
        return float(np.mean(self.kls))

    @property
    def interval(self) -> tuple[float, float]:
        """Return the 95 % interval of the rate left."""
        return wilson(sum(self.left), len(self.left))

    def surely_beaten_by(self, other: Figures) -> bool:
        """Does `other`, which was tried to the end, leave no more than this so far, and surely diverge less on the same
        prompts? Few prompts on which both leave nothing say nothing about the others, so all of `other`'s count."""
        if other.rate_left > self.rate_left or (other.over or 0.0) > (self.over or 0.0):
            return False
        count = len(self.kls)
        if len(other.kls) < count or count < 2:
            return False
        more = np.array(self.kls) - np.array(other.kls[:count])
        return bool(more.mean() > SURELY * more.std(ddof=1) / math.sqrt(count))


@dataclass(frozen=True, slots=True)
class Screened:
    """What one pass told of a candidate: mean log-odds and mean probability that an answer begins as those that show
    the behaviour do, and mean KL(plain ‖ steered) on harmless prompts, in nats. Source of the first: the refusal score
    of Arditi et al. 2024, "Refusal in language models is mediated by a single direction"."""

    log_odds: float
    probability: float
    kl: float

    @classmethod
    def of(cls, figures: Figures) -> Screened:
        """The same of answers. Half an answer is added to both sides of the odds, which are finite then."""
        left, count = sum(figures.left), len(figures.left)
        return cls(math.log((left + 0.5) / (count - left + 0.5)), figures.rate_left, figures.kl)


class Race:
    """One model, one behaviour, one choice of prompts. What the plain model does is found once, when it is made. With a
    judge its verdicts are in place of the behaviour's patterns."""

    def __init__(self, evaluator: Evaluator, behaviour: Behaviour, sets: Sets, judge: Judge | None = None) -> None:
        self.evaluator, self.behaviour, self.sets, self.judge = evaluator, behaviour, sets, judge
        # in one batch, all to their end: a step for all takes hardly longer than one for half of them
        prompts = [*sets.asked, *sets.borderline, *sets.other]
        answers = evaluator.answers(prompts, None)
        told, self._other = self._told(prompts, answers), answers[-len(sets.other) :]
        #: Plain answers that say nothing yet: their thinking has no end.
        self.unanswered = sum(one.outcome == "unanswered" for one in told[: -len(sets.other)])
        self._continued = evaluator.continuations(sets.other, self._other)
        count = len(sets.asked)
        self.plain = Figures(
            [one.outcome == "shown" for one in told[:count]],
            [one.outcome == "shown" for one in told[count : -len(sets.other)]],
            [0.0] * len(sets.other),
            other=[one.outcome == "shown" for one in told[-len(sets.other) :]],
            faulty=[one.lost for one in told[-len(sets.other) :]],
            lost=[one.lost for one in told[:count]],
        )

    def _told(
        self, prompts: Sequence[Prompt], answers: Sequence[Answer], beside: Sequence[Answer] | None = None
    ) -> list[Told]:
        """Return what became of each answer; `beside` are the plain answers to the same prompts."""
        verdicts: Sequence[Outcome | None] = [None] * len(answers)
        if self.judge is not None:
            verdicts = judged(self.judge, prompts, [answer.text for answer in answers])
        plain: Sequence[Answer | None] = beside or [None] * len(answers)
        return [
            tell(self.behaviour, answer, verdict=verdict, prompt=prompt, beside=other, limit=self.evaluator.max_tokens)
            for prompt, answer, verdict, other in zip(prompts, answers, verdicts, plain, strict=True)
        ]

    def run(self, candidates: Sequence[Candidate], rivals: Sequence[Figures] = ()) -> list[Figures]:
        """The figures of each candidate; `rivals` are the best from before, tried to the end."""
        figures = [Figures() for _ in candidates]
        for group in self._groups(candidates):
            members = [figures[i] for i in group]
            with self.evaluator.resident([candidates[i] for i in group]) as steers:
                self._rounds(members, steers, rivals)
            rivals = [*rivals, *(each for each in members if each.stopped is None)]
        return figures

    def screen(
        self, candidates: Sequence[Candidate], tokens: Sequence[int], asked: int, other: int, along: int
    ) -> list[Screened]:
        """Run one pass of `asked` prompts, and of `other` harmless ones with the first `along` tokens of their plain
        answers, and return its figures of each candidate. Answers that show the behaviour begin with `tokens`."""
        prompts, others, found = self.sets.asked[:asked], self.sets.other[:other], dict[int, Screened]()
        plain = [one.first(along) for one in self._continued[:other]]
        for group in self._groups(candidates):
            with self.evaluator.resident([candidates[i] for i in group]) as steers:
                odds = self.evaluator.opening_odds(*crossed(prompts, steers), tokens).reshape(len(group), -1)
                kls = self.evaluator.divergences_of_each(others, plain, steers)
            found |= {
                i: Screened(float(o.mean()), float(expit(o).mean()), float(np.mean(kl)))
                for i, o, kl in zip(group, odds, kls, strict=True)
            }
        return [found[i] for i in range(len(candidates))]

    def answer_harmless(self, candidate: Candidate, figures: Figures) -> None:
        """Let `candidate` answer the harmless prompts, and note in its `figures` what became of the answers."""
        with self.evaluator.resident([candidate]) as (steer,):
            answers = self.evaluator.answers(self.sets.other, steer)
        told = self._told(self.sets.other, answers, self._other)
        figures.other, figures.faulty = [one.outcome == "shown" for one in told], [one.lost for one in told]

    def _rounds(self, figures: Sequence[Figures], steers: Sequence[Steer], rivals: Sequence[Figures]) -> None:
        done, end, sets = 0, max(FIRST_ROUND, FULL // len(steers)), self.sets
        longest = max(len(sets.asked), len(sets.other), len(sets.borderline))
        while done < longest:
            running = [(f, steer) for f, steer in zip(figures, steers, strict=True) if f.stopped is None]
            if not running:
                return
            part = slice(done, end)
            members, mine = [f for f, _ in running], [steer for _, steer in running]
            self._answer(members, part, mine)
            kls_of_each = self.evaluator.divergences_of_each(sets.other[part], self._continued[part], mine)
            for each, kls in zip(members, kls_of_each, strict=True):
                each.kls += kls
            if end < longest:
                self._stop(members, rivals)
                stopped = sum(each.stopped is not None for each in members)
                self.evaluator.progress.skip(stopped * self.sets.work(self.evaluator.max_tokens, end))
            done, end = end, 2 * end

    @staticmethod
    def _stop(running: Sequence[Figures], rivals: Sequence[Figures]) -> None:
        bar = min(other.interval[1] for other in [*rivals, *running])
        for each in running:
            if each.interval[0] > bar:
                each.stopped = "shown"
        for each in running:
            if each.stopped is None and any(each.surely_beaten_by(rival) for rival in rivals):
                each.stopped = "diverges"

    def _answer(self, figures: Sequence[Figures], part: slice, steers: Sequence[Steer]) -> None:
        asked, borderline = self.sets.asked[part], self.sets.borderline[part]
        # a judge reads answers to their end
        known = None if self.judge else self.behaviour.decided
        for each, given in zip(
            figures, self.evaluator.answers_of_each([*asked, *borderline], steers, known), strict=True
        ):
            told = self._told([*asked, *borderline], given)
            each.asked += [one.outcome == "shown" for one in told[: len(asked)]]
            each.lost += [one.lost for one in told[: len(asked)]]
            each.borderline += [one.outcome == "shown" for one in told[len(asked) :]]

    def _groups(self, candidates: Sequence[Candidate]) -> Iterator[list[int]]:
        """Indices of candidates that can be resident together, those of one direction beside each other."""
        numbers: dict[int, int] = {}
        owner = [numbers.setdefault(id(candidate.direction), len(numbers)) for candidate in candidates]
        group: list[int] = []
        for i in sorted(range(len(candidates)), key=owner.__getitem__):
            together = {owner[j]: candidates[j].direction for j in [*group, i]}
            needed = sum(direction.resident(self.evaluator.rank) for direction in together.values())
            if group and needed > self.evaluator.room:
                yield group
                group = []
            group.append(i)
        if group:
            yield group
