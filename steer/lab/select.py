"""Choosing a direction by what it does: position × source layer × method (with its t) × mode, from one measurement.

Stage 1 takes the first token alone: the log-odds that an answer begins as the behaviour's answers do, after one prefill
of the prompts. Stage 2 lets the best of them answer, in rounds (`steer.lab.race`). `fit` varies the layer alone.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from steer.direction import Direction
from steer.errors import DegenerateError, InvalidInput
from steer.lab.behaviour import REFUSAL, Behaviour
from steer.lab.derive import Recipe, check_needs, derive, separated, source_layer
from steer.lab.evaluator import Candidate, MakeEvaluator, first_tokens
from steer.lab.measurement import Measurement
from steer.lab.methods.base import Method
from steer.lab.prompts import PromptSet
from steer.lab.race import Figures, Race, Sets
from steer.names import Mode

log = logging.getLogger("steer")
#: Prompts of each class that candidates are tried on, and tokens of their answers.
PROMPTS, TOKENS = 48, 24
#: Prompts by whose first tokens candidates are screened, and how many of these then answer.
SCREEN_PROMPTS, SURVIVORS = 32, 16
#: Layers whose class means are closer than this do nothing (measured on small models).
MIN_DEGREES = 10.0
#: The part of a command's progress.
CHOOSING = "choosing"
BY = "fewest answers that show the behaviour (within one prompt), then least N-token KL on harmless prompts"


@dataclass(frozen=True, slots=True)
class Grid:
    """What is chosen among. layers "auto": all whose classes separate."""

    methods: tuple[Method, ...]
    positions: tuple[int | None, ...] = (None,)
    layers: tuple[int, ...] | Literal["auto"] = "auto"
    modes: tuple[Mode, ...] = ("ablate",)

    def __post_init__(self) -> None:
        empty = [name for name in ("methods", "positions", "layers", "modes") if not getattr(self, name)]
        if empty:
            raise InvalidInput([f"{name}: none is given, at least one is needed" for name in empty])


@dataclass(frozen=True, slots=True)
class Entrant:
    """A candidate, the recipe that makes it, and what was measured of it."""

    recipe: Recipe
    candidate: Candidate
    log_odds: float | None = None
    figures: Figures | None = None

    def row(self) -> dict[str, Any]:
        """As it stands in the file."""
        meta = self.candidate.direction.meta
        found: dict[str, Any] = {
            "layer": meta.source_layer,
            "method": meta.method,
            "parameters": meta.parameters,
            "mode": self.recipe.mode,
            "strength": self.recipe.strength,
            "log_odds": self.log_odds,
        }
        if (figures := self.figures) is not None:
            found |= {
                "refused": figures.shown,
                "prompts": len(figures.asked),
                "kl": figures.kl,
                "kl_prompts": len(figures.kls),
                "stopped": figures.stopped,
            }
        return found


def select(
    measurement: Measurement,
    recipe: Recipe,
    grid: Grid,
    asked: PromptSet,
    other: PromptSet,
    evaluator: MakeEvaluator,
    *,
    behaviour: Behaviour = REFUSAL,
    survivors: int = SURVIVORS,
    prompts: int = PROMPTS,
    tokens: int = TOKENS,
) -> Direction:
    """The best of `grid`; what does not vary is as in `recipe`. The file has the figures of every candidate.

    Raises InvalidInput with every part of the grid that the measurement cannot make, DegenerateError where
    none is left.
    """
    entrants = _entrants(measurement, recipe, grid)
    sets = Sets.drawn(asked.prompts, other.prompts, limits=(prompts, prompts, 0))
    tried = evaluator(max(e.candidate.direction.rank for e in entrants), tokens)
    screened = len(entrants) > survivors and bool(behaviour.openings)
    tried.progress.plan(CHOOSING, work(sets, tokens, len(entrants), survivors if screened else None))
    with tried.progress.part(CHOOSING):
        race = Race(tried, behaviour, sets)
        if screened:
            openings = first_tokens(tried.tokenizer, behaviour.openings)
            odds = race.opening_odds([e.candidate for e in entrants], openings, SCREEN_PROMPTS)
            entrants = [replace(e, log_odds=value) for e, value in zip(entrants, odds, strict=True)]
            # the place in the grid decides between equals
            through = sorted(range(len(entrants)), key=lambda i: (odds[i], i))[:survivors]
        else:
            through = list(range(len(entrants)))
        figures = race.run([entrants[i].candidate for i in through])
    for i, found in zip(through, figures, strict=True):
        entrants[i] = replace(entrants[i], figures=found)
        row = entrants[i].row()
        log.info("layer %s, %s: %.2f shown, N-token KL %.5f", row["layer"], row["method"], row["refused"], row["kl"])
    chosen = best(entrants)
    selection = {
        "by": BY,
        "behaviour": behaviour.name,
        "mode": chosen.recipe.mode,
        "prompts": len(sets.asked),
        "tokens": tokens,
        "refused_plain": race.plain.shown,
        "screened": screened,
        "candidates": [entrant.row() for entrant in entrants],
    }
    return derive(measurement, chosen.recipe, selection)


def work(sets: Sets, tokens: int, entrants: int, survivors: int | None) -> float:
    """The work of a selection; `survivors` None: all candidates answer."""
    screening = 0 if survivors is None else entrants * len(sets.asked[:SCREEN_PROMPTS])
    answering_ones = entrants if survivors is None else survivors
    return sets.plain_work(tokens) + screening + answering_ones * sets.work(tokens)


def most_work(asked: PromptSet, other: PromptSet, layers: int) -> float:
    """The work of `fit` in a model of so many layers, before it is known which are worth trying."""
    sets = Sets.drawn(asked.prompts, other.prompts, limits=(PROMPTS, PROMPTS, 0))
    return work(sets, TOKENS, layers, SURVIVORS if layers > SURVIVORS else None)


def best(entrants: Sequence[Entrant]) -> Entrant:
    """Of those that were tried to the end: the fewest answers shown, and among those within one prompt of the fewest,
    the least KL."""
    tried = [(e, e.figures) for e in entrants if e.figures is not None and e.figures.stopped is None]
    fewest = min(f.shown for _, f in tried)
    return min((pair for pair in tried if pair[1].shown <= fewest + 1 / len(pair[1].asked)), key=lambda p: p[1].kl)[0]


def _entrants(measurement: Measurement, recipe: Recipe, grid: Grid) -> list[Entrant]:
    found: list[Entrant] = []
    problems: list[str] = []
    undefined: list[str] = []
    for method in grid.methods:
        for position in grid.positions:
            base = replace(recipe, method=method, position=position, mode="ablate")
            try:
                measurement.position(position)
                check_needs(measurement, base)
                layers = layers_of(measurement, base) if grid.layers == "auto" else grid.layers
                layers = tuple(source_layer(measurement, replace(base, layer=layer)) for layer in layers)
            except DegenerateError as error:
                undefined += [f"position {position}: {problem}" for problem in error.problems]
                continue
            except InvalidInput as error:
                problems += error.problems
                continue
            for layer in layers:
                one = replace(base, layer=layer)
                try:
                    direction = derive(measurement, one)
                except DegenerateError as error:
                    undefined += error.problems
                    continue
                except InvalidInput as error:
                    problems += error.problems
                    continue
                for mode in grid.modes:
                    if mode not in direction.meta.modes:
                        problems.append(f"the mode '{mode}' needs means that were not measured at every layer")
                        continue
                    final = replace(one, mode=mode)
                    found.append(Entrant(final, Candidate(direction, mode, recipe.strength)))
    if problems:
        raise InvalidInput(list(dict.fromkeys(problems)))
    if not found:
        raise DegenerateError(list(dict.fromkeys(undefined)))
    return found


def layers_of(measurement: Measurement, recipe: Recipe) -> tuple[int, ...]:
    """The layers that are worth trying: their class means are far enough apart."""
    return tuple(layer for layer, _ in separated(measurement, recipe, MIN_DEGREES))


def fit(
    measurement: Measurement, recipe: Recipe, harmful: PromptSet, harmless: PromptSet, evaluator: MakeEvaluator
) -> Direction:
    """`derive`, with the layer chosen by measured effect on the prompts where the recipe says "auto": a selection in
    which nothing but the layer varies."""
    if recipe.layer != "auto":
        return derive(measurement, recipe)
    grid = Grid((recipe.method,), (recipe.position,), "auto", (recipe.mode,))
    return select(measurement, recipe, grid, harmful, harmless, evaluator)
