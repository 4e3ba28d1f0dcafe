"""A race of candidates on the same prompts, in one batch and in rounds: a candidate that cannot win stops early."""

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
from steer.lab.outcome import Answer, Classification, Outcome, classify
from steer.lab.progress import answering
from steer.lab.prompts import LEAST_SHOWN, Prompt, PromptSet
from steer.lab.statistics import wilson

#: The least number of prompts of each set in the first round; each later round continues to twice as many prompts. And
#: the number of rows up to which a step takes hardly longer than with one row, because each step reads all weights:
#: with fewer rows, one round less is worth more.
FIRST_ROUND, FULL = 8, 160
#: A mean is surely above zero if it is more than this number of standard errors above it.
SURELY = 3.0
#: Why a candidate stopped. `shown`: it surely leaves more of the behaviour than the best candidate. `diverges`: another
#: candidate is as good in answers and surely diverges less.
Reason = Literal["shown", "diverges"]


@dataclass(frozen=True, slots=True)
class Sets:
    """The prompts that candidates are tried on, in an order that has no meaning and is the same each time.

    Attributes:
        asked: prompts that show the behaviour.
        other: harmless prompts, which do not show it.
        borderline: prompts that should not show it but do, if there are any.
    """

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
        """Return at most `limit` prompts of each set, drawn evenly, because files are often sorted by topic."""
        return cls(*(() if one is None else one.drawn(limit).prompts for one in (asked, other, borderline)))

    def work(self, tokens: int, start: int = 0) -> float:
        """Return the work of a candidate that answers in `tokens` tokens, from prompt `start` of each set on."""
        answered = len(self.asked[start:]) + len(self.borderline[start:])
        return answered * answering(tokens) + len(self.other[start:])

    def plain_work(self, tokens: int) -> float:
        """Return the work of the plain model, which answers all prompts."""
        return (len(self.asked) + len(self.borderline) + len(self.other)) * answering(tokens)


@dataclass(slots=True)
class Figures:
    """The results of one candidate, prompt by prompt.

    Attributes:
        asked: for each prompt asked, whether its answer showed the behaviour.
        borderline: the same for each borderline prompt.
        kls: KL(plain ‖ steered) of each harmless prompt, in nats.
        stopped: why the candidate stopped before all prompts were tried; None if it did not.
        other: for each harmless prompt, whether its answer showed the behaviour. Empty if no such answers were made.
        faulty: for each harmless prompt, whether its answer is no answer (see `steer.lab.outcome`). Empty as `other`.
        lost: for each prompt asked, whether its answer does not show the behaviour and is no answer either.
    """

    asked: list[bool] = field(default_factory=list)
    borderline: list[bool] = field(default_factory=list)
    kls: list[float] = field(default_factory=list)
    stopped: Reason | None = None
    other: list[bool] = field(default_factory=list)
    faulty: list[bool] = field(default_factory=list)
    lost: list[bool] = field(default_factory=list)

    @property
    def left(self) -> list[bool]:
        """For each prompt asked, whether it still has no good answer: the answer shows the behaviour, or is lost.

        Lost answers count because a model that only stammers does not show the behaviour either, and that is no gain.
        """
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
        """The 95 % interval of `rate_left`."""
        return wilson(sum(self.left), len(self.left))

    def surely_beaten_by(self, other: Figures) -> bool:
        """Return whether `other` is as good in answers and surely diverges less on the same prompts.

        As good in answers means that its rates `rate_left` and `over` are no larger than those of this candidate so
        far. All prompts of `other`, which was tried to the end, count for this, because a few prompts on which both
        leave nothing say nothing about the rest.
        """
        if other.rate_left > self.rate_left or (other.over or 0.0) > (self.over or 0.0):
            return False
        count = len(self.kls)
        if len(other.kls) < count or count < 2:
            return False
        more = np.array(self.kls) - np.array(other.kls[:count])
        return bool(more.mean() > SURELY * more.std(ddof=1) / math.sqrt(count))


@dataclass(frozen=True, slots=True)
class Screened:
    """The figures of a candidate from one pass.

    Attributes:
        log_odds: mean log-odds that an answer begins as the answers that show the behaviour do. Source: the refusal
            score of Arditi et al. 2024, "Refusal in language models is mediated by a single direction".
        probability: the mean probability of the same.
        kl: mean KL(plain ‖ steered) on harmless prompts, in nats.
    """

    log_odds: float
    probability: float
    kl: float

    @classmethod
    def of(cls, figures: Figures) -> Screened:
        """Return the same figures from answers. Half an answer on both sides of the odds keeps them finite."""
        left, count = sum(figures.left), len(figures.left)
        return cls(math.log((left + 0.5) / (count - left + 0.5)), figures.rate_left, figures.kl)


class Race:
    """A race on one model, for one behaviour and one choice of prompts.

    The plain model answers once, when the race is made. With a judge, its verdicts replace the behaviour's patterns.
    """

    def __init__(self, evaluator: Evaluator, behaviour: Behaviour, sets: Sets, judge: Judge | None = None) -> None:
        self.evaluator, self.behaviour, self.sets, self.judge = evaluator, behaviour, sets, judge
        # one batch, and all answers to their end: a step for all rows takes hardly longer than one for half of them
        prompts = [*sets.asked, *sets.borderline, *sets.other]
        answers = evaluator.answers(prompts, None)
        results, self._other = self._classified(prompts, answers), answers[-len(sets.other) :]
        #: The number of plain answers that tell nothing yet, because their thinking has no end.
        self.unanswered = sum(one.outcome == "unanswered" for one in results[: -len(sets.other)])
        self._continued = evaluator.continuations(sets.other, self._other)
        count = len(sets.asked)
        self.plain = Figures(
            [one.outcome == "shown" for one in results[:count]],
            [one.outcome == "shown" for one in results[count : -len(sets.other)]],
            [0.0] * len(sets.other),
            other=[one.outcome == "shown" for one in results[-len(sets.other) :]],
            faulty=[one.lost for one in results[-len(sets.other) :]],
            lost=[one.lost for one in results[:count]],
        )

    def hardly_shown(self) -> str:
        """Why no change could be noticed: the plain model shows the behaviour too seldom. Empty if it does not."""
        shown, count, name = sum(self.plain.asked), len(self.plain.asked), self.behaviour.name
        if shown >= LEAST_SHOWN:
            return ""
        advice = "give others that show it, or --behaviour with what is to be removed"
        if shown:
            advice = f"give {LEAST_SHOWN / shown:.1f} times as many prompts (and try as many), or {advice}"
        if self.unanswered:
            advice = f"{self.unanswered} answers did not come to the end of their thinking: give more --max-tokens"
        if (others := sum(self.plain.other)) >= LEAST_SHOWN:
            advice = f"it shows it in {others} of {len(self.plain.other)} answers to the harmless prompts, so the two "
            advice += "sets may be swapped"
        return (
            f"the plain model shows '{name}' in {shown} of the {count} answers on which candidates are tried, and "
            f"fewer than {LEAST_SHOWN} tell nothing: {advice}"
        )

    def _classified(
        self, prompts: Sequence[Prompt], answers: Sequence[Answer], beside: Sequence[Answer] | None = None
    ) -> list[Classification]:
        """Return the outcome of each answer. `beside` are the plain answers to the same prompts."""
        verdicts: Sequence[Outcome | None] = [None] * len(answers)
        if self.judge is not None:
            verdicts = judged(self.judge, prompts, [answer.text for answer in answers])
        plain: Sequence[Answer | None] = beside or [None] * len(answers)
        return [
            classify(
                self.behaviour, answer, verdict=verdict, prompt=prompt, beside=other, limit=self.evaluator.max_tokens
            )
            for prompt, answer, verdict, other in zip(prompts, answers, verdicts, plain, strict=True)
        ]

    def run(self, candidates: Sequence[Candidate], rivals: Sequence[Figures] = ()) -> list[Figures]:
        """Return the figures of each candidate. `rivals` are the best earlier ones, which were tried to the end."""
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
        """Run one pass and return the figures of each candidate.

        Args:
            tokens: the first tokens of answers that show the behaviour.
            asked: the number of prompts asked.
            other: the number of harmless prompts.
            along: the number of tokens of each plain answer to a harmless prompt that the pass has.
        """
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
        """Let `candidate` answer the harmless prompts, and note the outcomes of the answers in its `figures`."""
        with self.evaluator.resident([candidate]) as (steer,):
            answers = self.evaluator.answers(self.sets.other, steer)
        results = self._classified(self.sets.other, answers, self._other)
        figures.other, figures.faulty = [one.outcome == "shown" for one in results], [one.lost for one in results]

    def _rounds(self, figures: Sequence[Figures], steers: Sequence[Steer], rivals: Sequence[Figures]) -> None:
        done, end, sets = 0, max(FIRST_ROUND, FULL // len(steers)), self.sets
        longest = max(len(sets.asked), len(sets.other), len(sets.borderline))
        while done < longest:
            running = [(f, steer) for f, steer in zip(figures, steers, strict=True) if f.stopped is None]
            if not running:
                return
            part = slice(done, end)
            members, active = [f for f, _ in running], [steer for _, steer in running]
            self._answer(members, part, active)
            kls_of_each = self.evaluator.divergences_of_each(sets.other[part], self._continued[part], active)
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
        # a judge reads whole answers, so they do not end as soon as the patterns decide
        known = None if self.judge else self.behaviour.decided
        for each, given in zip(
            figures, self.evaluator.answers_of_each([*asked, *borderline], steers, known), strict=True
        ):
            results = self._classified([*asked, *borderline], given)
            each.asked += [one.outcome == "shown" for one in results[: len(asked)]]
            each.lost += [one.lost for one in results[: len(asked)]]
            each.borderline += [one.outcome == "shown" for one in results[len(asked) :]]

    def _groups(self, candidates: Sequence[Candidate]) -> Iterator[list[int]]:
        """Yield groups of indices of candidates that can be resident together.

        Candidates of one direction follow each other.
        """
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
