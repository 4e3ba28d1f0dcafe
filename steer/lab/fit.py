"""Fit a direction to a loaded model: derive it from a measurement, with the source layer chosen by what it does."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, Protocol

from steer.direction import Direction, Mode
from steer.errors import DegenerateError
from steer.lab.behaviour import REFUSAL
from steer.lab.derive import Recipe, derive, find, separated
from steer.lab.measurement import Measurement
from steer.lab.probe import Answered, Divergence
from steer.lab.prompts import Prompt, PromptSet

log = logging.getLogger("steer")
#: Prompts of each class that candidates for `--layer auto` are tried on, and tokens of their answers.
AUTO_PROMPTS, AUTO_TOKENS = 48, 24
#: At most so many candidate layers, spread evenly over those whose classes separate.
AUTO_CANDIDATES = 16
#: Layers whose class means are closer than this do nothing (measured on small models).
AUTO_MIN_DEGREES = 10.0


class Screen(Protocol):
    """What tries candidates out on a model. What steers is in the terms of the model's engine; None is plain."""

    def resident(self, direction: Direction, mode: Mode, strength: float) -> AbstractContextManager[Any]:
        """`direction` on the engine while it lasts; gives what steers with it."""
        ...

    def answers(self, prompts: Sequence[Prompt], steer: Any, title: str = "") -> list[Answered]: ...

    def continuations(self, prompts: Sequence[Prompt], title: str = "") -> Any:
        """Plain text along which divergences are taken."""
        ...

    def divergence(self, prompts: Sequence[Prompt], plain: Any, steer: Any, title: str = "") -> Divergence: ...


#: Makes the screen for directions of up to so many rows, and answers of so many tokens.
MakeScreen = Callable[[int, int], Screen]


def fit(
    measurement: Measurement, recipe: Recipe, harmful: PromptSet, harmless: PromptSet, screen: MakeScreen
) -> Direction:
    """`derive`, with the layer chosen by measured effect on the prompts where the recipe says "auto"."""
    if recipe.layer != "auto":
        return derive(measurement, recipe)
    layer, selection = choose_layer(measurement, recipe, harmful, harmless, screen)
    return derive(measurement, replace(recipe, layer=layer), selection)


def choose_layer(
    measurement: Measurement, recipe: Recipe, harmful: PromptSet, harmless: PromptSet, screen: MakeScreen
) -> tuple[int, dict[str, Any]]:
    """The source layer whose direction leaves the fewest refusals of harmful prompts, and among those within one prompt
    of the fewest, the least N-token KL on harmless ones. Returns it with every candidate's figures."""
    directions = {
        layer: derive(measurement, replace(recipe, layer=layer)) for layer in _candidates(measurement, recipe)
    }
    probe = screen(max(direction.rank for direction in directions.values()), AUTO_TOKENS)
    asked, other = (s.prompts[:AUTO_PROMPTS] for s in (harmful, harmless))
    plain = probe.answers(asked, None, "plain, harmful")
    continuations = probe.continuations(other, "plain, harmless")
    figures = []
    for layer, direction in directions.items():
        with probe.resident(direction, recipe.mode, recipe.strength) as steer:
            refused = REFUSAL.rate([a.text for a in probe.answers(asked, steer, f"layer {layer}, harmful")])
            kl = probe.divergence(other, continuations, steer, f"layer {layer}, harmless")
        figures.append({"layer": layer, "refused": refused, "kl": kl.mean})
        log.info("layer %d: %.2f refused, N-token KL %.5f", layer, refused, kl.mean)
    fewest = min(f["refused"] for f in figures)
    best = min((f for f in figures if f["refused"] <= fewest + 1 / len(asked)), key=lambda f: f["kl"])
    selection = {
        "by": "fewest refusals (within one prompt), then least N-token KL on harmless prompts",
        "mode": recipe.mode,
        "prompts": len(asked),
        "tokens": AUTO_TOKENS,
        "refused_plain": REFUSAL.rate([a.text for a in plain]),
        "candidates": figures,
    }
    return int(best["layer"]), selection


def _candidates(measurement: Measurement, recipe: Recipe) -> list[int]:
    usable = []
    for layer, _ in separated(measurement, recipe, AUTO_MIN_DEGREES):
        try:
            find(measurement, recipe, layer)
            usable.append(layer)
        except DegenerateError:
            continue
    if not usable:
        raise DegenerateError(f"the method '{recipe.method.name}' finds a direction at no layer")
    step = max(1, math.ceil(len(usable) / AUTO_CANDIDATES))
    return usable[::-step][::-1]
