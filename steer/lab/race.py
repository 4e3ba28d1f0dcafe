"""Candidates against each other on the same prompts, in one batch, in rounds: who cannot win any more stops early."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np

from steer.errors import InvalidInput
from steer.lab.behaviour import Behaviour
from steer.lab.prompts import Prompt
from steer.lab.screen import Candidate, Screen
from steer.lab.statistics import wilson

#: Prompts of each set in the first round; each round after it goes to twice as many.
FIRST_ROUND = 8


@dataclass(frozen=True, slots=True)
class Sets:
    """What candidates are tried on: prompts that show the behaviour, that do not, and (if any) that should not but do.
    In an order that says nothing, the same each time."""

    asked: tuple[Prompt, ...]
    other: tuple[Prompt, ...]
    borderline: tuple[Prompt, ...] = ()

    def __post_init__(self) -> None:
        empty = [name for name in ("asked", "other") if not getattr(self, name)]
        if empty:
            raise InvalidInput([f"the prompts {name} are none: at least one is needed" for name in empty])

    @classmethod
    def drawn(
        cls,
        asked: Sequence[Prompt],
        other: Sequence[Prompt],
        borderline: Sequence[Prompt] = (),
        *,
        limits: tuple[int, int, int],
    ) -> Sets:
        """At most `limits` of each, drawn evenly: files are often sorted by topic."""
        each = [
            tuple(random.Random(0).sample(list(prompts), min(limit, len(prompts))))
            for prompts, limit in zip((asked, other, borderline), limits, strict=True)
        ]
        return cls(*each)


@dataclass(slots=True)
class Figures:
    """What one candidate did: answers that showed the behaviour of the prompts asked and of the borderline ones, and
    KL(plain ‖ steered) of each harmless prompt. `stopped`: it could not win, so that it was not tried on all."""

    asked: list[bool] = field(default_factory=list)
    borderline: list[bool] = field(default_factory=list)
    kls: list[float] = field(default_factory=list)
    stopped: bool = False

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
        """Of the rate shown, 95 %."""
        return wilson(sum(self.asked), len(self.asked))


class Race:
    """One model, one behaviour, one choice of prompts. What the plain model does is found once, when it is made."""

    def __init__(self, screen: Screen, behaviour: Behaviour, sets: Sets) -> None:
        self.screen, self.behaviour, self.sets = screen, behaviour, sets
        plain = screen.answers([*sets.asked, *sets.borderline], None, "plain", behaviour.decided)
        shown = [behaviour.shown(answer.text) for answer in plain]
        self.plain = Figures(shown[: len(sets.asked)], shown[len(sets.asked) :], [0.0] * len(sets.other))
        self._continued = screen.continuations(sets.other, "plain, harmless")

    def run(
        self, candidates: Sequence[Candidate], bar: float = 1.0, after: Callable[[int], object] | None = None
    ) -> list[Figures]:
        """The figures of each candidate. `bar` is the upper bound of the best rate so far, from before: whose lower
        bound is over it stops. `after` is told how many candidates are done."""
        figures = [Figures() for _ in candidates]
        done = 0
        for group in self._groups(candidates):
            members = [figures[i] for i in group]
            with self.screen.all_resident([candidates[i] for i in group]) as steers:
                bar = self._rounds(members, steers, bar)
            done += len(group)
            if after is not None:
                after(done)
        return figures

    def opening_odds(self, candidates: Sequence[Candidate], tokens: Sequence[int], count: int) -> list[float]:
        """The mean over `count` prompts asked of the log-odds that an answer begins with one of `tokens`. Source: the
        refusal score of Arditi et al. 2024, "Refusal in language models is mediated by a single direction"."""
        prompts, odds = self.sets.asked[:count], dict[int, float]()
        for group in self._groups(candidates):
            with self.screen.all_resident([candidates[i] for i in group]) as steers:
                rows = list(chain.from_iterable([steer] * len(prompts) for steer in steers))
                found = self.screen.opening_odds([*prompts] * len(group), rows, tokens, "first tokens")
            odds |= dict(zip(group, found.reshape(len(group), -1).mean(1).tolist(), strict=True))
        return [odds[i] for i in range(len(candidates))]

    def _rounds(self, figures: Sequence[Figures], steers: Sequence[Any], bar: float) -> float:
        done, end, sets = 0, FIRST_ROUND, self.sets
        longest = max(len(sets.asked), len(sets.other), len(sets.borderline))
        while done < longest:
            running = [(f, steer) for f, steer in zip(figures, steers, strict=True) if not f.stopped]
            part = slice(done, end)
            self._answer([f.asked for f, _ in running], sets.asked[part], [s for _, s in running])
            self._answer([f.borderline for f, _ in running], sets.borderline[part], [s for _, s in running])
            self._diverge([f for f, _ in running], part, [s for _, s in running])
            bar = min([bar, *(f.interval[1] for f, _ in running)])
            for each, _ in running:
                each.stopped = each.interval[0] > bar and end < longest
            done, end = end, 2 * end
        return bar

    def _answer(self, shown: Sequence[list[bool]], prompts: Sequence[Prompt], steers: Sequence[Any]) -> None:
        if not prompts:
            return
        rows = list(chain.from_iterable([steer] * len(prompts) for steer in steers))
        title = f"{len(steers)} candidates × {len(prompts)}"
        answers = self.screen.answers([*prompts] * len(steers), rows, title, self.behaviour.decided)
        for number, each in enumerate(shown):
            mine = answers[number * len(prompts) : (number + 1) * len(prompts)]
            each += [self.behaviour.shown(answer.text) for answer in mine]

    def _diverge(self, figures: Sequence[Figures], part: slice, steers: Sequence[Any]) -> None:
        prompts, plain = self.sets.other[part], self._continued[part]
        if not prompts:
            return
        rows = list(chain.from_iterable([steer] * len(prompts) for steer in steers))
        title = f"{len(steers)} candidates × {len(prompts)}, divergence"
        found = self.screen.divergences([*prompts] * len(steers), [*plain] * len(steers), rows, title)
        for number, each in enumerate(figures):
            mine = found[number * len(prompts) : (number + 1) * len(prompts)]
            each.kls += [float(row.mean()) for row in mine]

    def _groups(self, candidates: Sequence[Candidate]) -> Iterator[list[int]]:
        """Indices of candidates that can be resident together, those of one direction beside each other."""
        order = sorted(range(len(candidates)), key=lambda i: _first(candidates, i))
        group: list[int] = []
        for i in order:
            ranks = {id(candidates[j].direction): candidates[j].direction.rank for j in [*group, i]}
            if group and sum(ranks.values()) > self.screen.room:
                yield group
                group = []
            group.append(i)
        if group:
            yield group


def _first(candidates: Sequence[Candidate], i: int) -> int:
    """The first candidate that has the direction of candidate `i`."""
    return next(j for j, other in enumerate(candidates) if other.direction is candidates[i].direction)
