"""Choosing among directions by their effect on the model: a grid of positions, source layers, methods and actions.

Each candidate is first screened by one pass: the log-odds that an answer begins as the behaviour's answers do, and the
KL on harmless prompts. The candidates that remain then answer, in rounds (`steer.lab.race`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, TypeVar

import numpy as np

from steer.direction import Direction
from steer.errors import DegenerateError, InvalidInput, NothingFound, noted, prefixed
from steer.lab.behaviour import REFUSAL, Behaviour
from steer.lab.derive import Recipe, check_needs, derive, separated, source_layer
from steer.lab.evaluator import Candidate, MakeEvaluator, first_tokens
from steer.lab.judge import Judge
from steer.lab.measurement import Measurement
from steer.lab.methods.base import Method
from steer.lab.prompts import PromptSet
from steer.lab.race import Figures, Race, Screened, Sets
from steer.lab.resume import Cache
from steer.lab.statistics import undominated
from steer.names import Mode

T = TypeVar("T")
#: The most prompts of each class that candidates are tried on, and the most tokens of their answers.
PROMPTS, TOKENS = 48, 24
#: The most prompts of each class by which candidates are screened, the most tokens of a plain answer along which their
#: divergence is measured in the screening, and the number of candidates that then answer.
SCREEN_ASKED, SCREEN_OTHER, SCREEN_TOKENS, SURVIVORS = 16, 8, 8, 16
#: A probability of the behaviour counts as equal to the least one if it is at most this much above it.
HARDLY = 0.05
#: A layer is tried if the angle between its class means is at least this share of the largest angle. A fixed angle
#: would not do: the largest angle is 8.5° in one model (Gemma 3 270M) and 66° in another.
SEPARATION = 0.4
#: A smaller change of harmless answers is worth more than one answer in this number that shows the behaviour: on 32
#: prompts a difference of two answers is chance, while the KL of such candidates often differs tenfold.
ONE_IN = 16
#: A mean KL (nats) up to which harmless answers count as unchanged: no answer is given up for a smaller KL.
QUIET = 0.01
#: The name of a part of a command's progress.
CHOOSING = "choosing"
BY = (
    f"least N-token KL on harmless prompts (all up to {QUIET} count as equal) among those that leave the fewest "
    f"answers with the behaviour (within one in {ONE_IN})"
)


@dataclass(frozen=True, slots=True)
class Action:
    """How a direction acts: its mode and strength, and the threshold and target of `one_sided` (see `Recipe`)."""

    mode: Mode = "ablate"
    strength: float = 1.0
    threshold: float | None = None
    target: float | None = None


@dataclass(frozen=True, slots=True)
class Grid:
    """The candidates to choose among. `layers` "auto" means all layers whose class means are far enough apart."""

    methods: tuple[Method, ...]
    positions: tuple[int | None, ...] = (None,)
    layers: tuple[int | Literal["widest", "all"], ...] | Literal["auto"] = "auto"
    actions: tuple[Action, ...] = (Action(),)

    def __post_init__(self) -> None:
        empty = [name for name in ("methods", "positions", "layers", "actions") if not getattr(self, name)]
        InvalidInput.raise_for(f"{name}: at least one is needed" for name in empty)

    def recipes(self, measurement: Measurement, recipe: Recipe) -> list[Recipe]:
        """Return the recipes of all candidates. All that does not vary is as in `recipe`.

        Raises:
            InvalidInput: has everything that the measurement does not have.
            DegenerateError: the classes separate at no position.
        """
        found: list[Recipe] = []
        problems: list[str] = []
        undefined: list[str] = []
        for method in self.methods:
            with noted(problems):
                check_needs(measurement, replace(recipe, method=method))
        for position in self.positions:
            base, where = replace(recipe, position=position), f"position {position}"
            with noted(problems), noted(undefined, DegenerateError), prefixed(where, DegenerateError):
                measurement.position(position)
                layers = layers_of(measurement, base) if self.layers == "auto" else self.layers
                sources = [
                    layer if layer == "all" else source_layer(measurement, replace(base, layer=layer))
                    for layer in layers
                ]
                found += [
                    replace(base, method=method, layer=layer, **asdict(action))
                    for method in self.methods
                    for layer in sources
                    for action in self.actions
                ]
        InvalidInput.raise_for(problems)
        if not found:
            raise DegenerateError(undefined)
        return found


@dataclass(frozen=True, slots=True)
class Entrant:
    """A candidate, the recipe that makes it, and its figures, which are None until they are measured."""

    recipe: Recipe
    candidate: Candidate
    screened: Screened | None = None
    figures: Figures | None = None

    def row(self) -> dict[str, Any]:
        """Return the row of this candidate in the direction file."""
        meta = self.candidate.direction.meta
        found: dict[str, Any] = {
            "layer": meta.source_layer,
            "method": meta.method,
            "parameters": meta.parameters,
            "mode": self.recipe.mode,
            "strength": self.recipe.strength,
        }
        if self.screened is not None:
            found |= {"log_odds": self.screened.log_odds, "screened_kl": self.screened.kl}
        if (figures := self.figures) is not None:
            found |= {
                "refused": figures.shown,
                "lost": float(np.mean(figures.lost)),
                "prompts": len(figures.asked),
                "kl": figures.kl,
                "kl_prompts": len(figures.kls),
                "stopped": figures.stopped,
            }
        return found


class Selection:
    """The candidates of one measurement, tried on one model.

    `cache` holds what was measured before an interruption.
    """

    def __init__(self, race: Race, cache: Cache | None = None) -> None:
        self.race, self.cache = race, cache or Cache(None, {})
        openings = race.behaviour.openings
        self._openings = first_tokens(race.evaluator.tokenizer, openings) if openings else []
        #: Every candidate that was tried, with all its figures.
        self.tried: dict[Recipe, Entrant] = {}

    def check_shown(self) -> None:
        """Raise NothingFound if the plain model shows the behaviour too seldom for a change to be noticed."""
        if why := self.race.hardly_shown():
            raise NothingFound(why)

    def screen(self, entrants: Sequence[Entrant]) -> list[Entrant]:
        """Return `entrants` with their figures from one pass, or from answers if the behaviour has no openings."""

        def make(start: int, stop: int) -> list[Any]:
            some = [e.candidate for e in entrants[start:stop]]
            found = self.race.screen(some, self._openings, SCREEN_ASKED, SCREEN_OTHER, SCREEN_TOKENS)
            return [asdict(one) for one in found]

        if not self._openings:
            return [replace(e, screened=Screened.of(e.figures)) for e in self.run(entrants) if e.figures is not None]
        found = self.cache.rows(f"screened-{_named(entrants)}", {}, len(entrants), make)
        screened = [replace(e, screened=Screened(**one)) for e, one in zip(entrants, found, strict=True)]
        self.tried |= {e.recipe: e for e in screened}
        return screened

    def run(self, entrants: Sequence[Entrant]) -> list[Entrant]:
        """Return `entrants` with the figures of their answers. Only those without such figures answer now."""
        new = [e for e in entrants if e.figures is None]

        def make() -> list[Any]:
            return [asdict(figures) for figures in self.race.run([e.candidate for e in new])]

        found = self.cache.value(f"answered-{_named(new)}", {}, make)
        figures = {e.recipe: Figures(**one) for e, one in zip(new, found, strict=True)}
        raced = [e if e.figures is not None else replace(e, figures=figures[e.recipe]) for e in entrants]
        self.tried |= {e.recipe: e for e in raced}
        return raced

    def metadata(self, chosen: Entrant) -> dict[str, Any]:
        """Return what the direction file says about the choice."""
        plain = self.race.plain
        return {
            "by": BY,
            "behaviour": self.race.behaviour.name,
            "mode": chosen.recipe.mode,
            "prompts": len(plain.asked),
            "tokens": self.race.evaluator.max_tokens,
            "refused_plain": plain.shown,
            "screened": any(e.screened is not None for e in self.tried.values()),
            "candidates": [entrant.row() for entrant in self.tried.values()],
        }


def select(
    measurement: Measurement,
    recipe: Recipe,
    grid: Grid,
    asked: PromptSet,
    other: PromptSet,
    evaluator: MakeEvaluator,
    *,
    behaviour: Behaviour = REFUSAL,
    judge: Judge | None = None,
    survivors: int = SURVIVORS,
    prompts: int = PROMPTS,
    tokens: int = TOKENS,
) -> Direction:
    """Return the best direction of `grid`. Its metadata have the figures of every candidate.

    Args:
        recipe: gives all that does not vary in the grid.
        asked, other: prompts that show the behaviour, and harmless prompts.
        judge: decides what an answer does, in place of the behaviour's patterns.
        survivors: the most candidates that answer after the screening.
        prompts: the most prompts of each set.
        tokens: the most tokens of an answer.

    Raises:
        InvalidInput: has every part of the grid that the measurement cannot make.
        DegenerateError: no candidate is left.
        NothingFound: the plain model hardly shows the behaviour, or no candidate lessens it.
    """
    entrants = entrants_of(measurement, grid.recipes(measurement, recipe))
    sets = Sets.drawn(asked, other, limit=prompts)
    tried = evaluator(max(e.candidate.rows for e in entrants), tokens)
    screened = len(entrants) > survivors and bool(behaviour.openings)
    tried.progress.plan(CHOOSING, work(sets, tokens, len(entrants), survivors if screened else None))
    with tried.progress.part(CHOOSING):
        selection = Selection(Race(tried, behaviour, sets, judge))
        selection.check_shown()
        selection.tried |= {e.recipe: e for e in entrants}
        kept = through(selection.screen(entrants), survivors) if screened else entrants
        answered = selection.run(kept)
    plain = selection.race.plain
    less = [e for e in answered if e.figures and not e.figures.stopped and sum(e.figures.left) < sum(plain.left)]
    if not less:
        raise NothingFound(
            f"none of {len(entrants)} candidates lessens '{behaviour.name}', which the plain model shows in "
            f"{sum(plain.asked)} of {len(plain.asked)} answers: as many show it, or are lost, with each of them"
        )
    chosen = best(less)
    return derive(measurement, chosen.recipe, selection.metadata(chosen))


def through(entrants: Sequence[Entrant], count: int) -> list[Entrant]:
    """Return the `count` entrants that are worth trying further, the best first.

    If nothing was screened, these are the first ones. Otherwise the entrants within HARDLY of the least probability
    come first. Of these, the Pareto front in log-odds and KL leads; if it is too long, it is thinned to entrants that
    are evenly spaced in the order of their KL, because only the answers show how much KL is needed. All others follow,
    ordered by their log-odds.
    """
    each = [(e, e.screened) for e in entrants if e.screened is not None]
    if len(each) <= count:
        return list(entrants[:count])
    least = min(screened.probability for _, screened in each)
    good = [pair for pair in each if pair[1].probability <= least + HARDLY]
    front = sorted(undominated(good, lambda pair: (pair[1].log_odds, pair[1].kl)), key=lambda pair: pair[1].kl)
    first = [e for e, _ in spaced(front, count)]
    rest = sorted(each, key=lambda pair: (pair not in good, pair[1].log_odds))
    return [*first, *(e for e, _ in rest if e not in first)][:count]


def spaced(items: Sequence[T], count: int) -> list[T]:
    """Return at most `count` of `items`, evenly spaced, with the first and the last."""
    count = min(count, len(items))
    return [items[round(i * (len(items) - 1) / max(1, count - 1))] for i in range(count)]


def work(sets: Sets, tokens: int, screened: int, through: int | None) -> float:
    """Return the work of a selection. If `through` is None, all candidates answer and none is screened."""
    each = len(sets.asked[:SCREEN_ASKED]) + len(sets.other[:SCREEN_OTHER])
    screening = 0 if through is None else screened * each
    return sets.plain_work(tokens) + screening + (screened if through is None else through) * sets.work(tokens)


def best(entrants: Sequence[Entrant]) -> Entrant:
    """Return the candidate with the least KL among those that leave the fewest prompts, or hardly more.

    Hardly more means one prompt, or one in ONE_IN. Only candidates that were tried to the end count. KLs below QUIET
    are equal. Of candidates with equal KL the one that leaves the fewest prompts is best, then the one with the least
    KL.
    """
    tried = [(e, sum(e.figures.left), e.figures.kl) for e in entrants if e.figures and e.figures.stopped is None]
    fewest = min(left for _, left, _ in tried)
    slack = max(1, max(len(e.figures.left) for e, _, _ in tried if e.figures) // ONE_IN)
    near = (one for one in tried if one[1] <= fewest + slack)
    return min(near, key=lambda one: (max(one[2], QUIET), one[1], one[2]))[0]


def entrants_of(measurement: Measurement, recipes: Iterable[Recipe]) -> list[Entrant]:
    """Return the candidates that `recipes` make.

    Candidates that differ in mode and strength alone share a direction if they can, and with it the rows of the bank.

    Raises:
        InvalidInput: has everything that the measurement cannot make.
        DegenerateError: no candidate is left.
    """
    found: list[Entrant] = []
    made: dict[Recipe, Direction] = {}
    problems: list[str] = []
    undefined: list[str] = []
    for recipe in recipes:
        # a direction for `add` is not shared: it has other weights than one for the other modes
        shared = replace(recipe, mode="add" if recipe.mode == "add" else "ablate", strength=1.0)
        with noted(problems), noted(undefined, DegenerateError):
            direction = made[shared] = made.get(shared) or derive(measurement, shared)
            if recipe.mode not in (modes := direction.meta.modes):
                reason = f"the mode '{recipe.mode}' cannot be used with '{recipe.method.name}', but: {', '.join(modes)}"
                raise InvalidInput(reason)
            found.append(Entrant(recipe, Candidate.of(direction, recipe.mode, recipe.strength)))
    InvalidInput.raise_for(problems)
    if not found:
        raise DegenerateError(list(dict.fromkeys(undefined)))
    return found


def layers_of(measurement: Measurement, recipe: Recipe) -> tuple[int, ...]:
    """Return the layers worth trying: their class means are far enough apart, compared with the other layers."""
    angles = separated(measurement, recipe)
    widest = max(degrees for _, degrees in angles)
    return tuple(layer for layer, degrees in angles if degrees >= SEPARATION * widest)


def _named(entrants: Sequence[Entrant]) -> str:
    """Return a name under which the cache holds what is measured of `entrants`."""
    return hashlib.sha256(repr([e.recipe for e in entrants]).encode()).hexdigest()[:16]
