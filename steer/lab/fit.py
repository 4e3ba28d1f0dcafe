"""Fit a direction to a loaded model: derive it from a measurement, with the source layer chosen by what it does."""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from typing import Any

from steer.direction import Direction
from steer.errors import DegenerateError
from steer.hf.attach import Steering
from steer.hf.load import Loaded
from steer.lab.derive import Recipe, derive, find, separated
from steer.lab.evaluate import Probe, refusal_rate
from steer.lab.measurement import Measurement
from steer.lab.prompts import PromptSet

log = logging.getLogger("steer")
#: Prompts of each class that candidates for `--layer auto` are tried on, and tokens of their answers.
AUTO_PROMPTS, AUTO_TOKENS = 48, 24
#: At most so many candidate layers, spread evenly over those whose classes separate.
AUTO_CANDIDATES = 16
#: Layers whose class means are closer than this do nothing (measured on small models).
AUTO_MIN_DEGREES = 10.0


def fit(
    loaded: Loaded,
    measurement: Measurement,
    recipe: Recipe,
    harmful: PromptSet,
    harmless: PromptSet,
    *,
    batch_size: int | None = None,
    progress: bool = False,
) -> Direction:
    """`derive`, with the layer chosen by measured effect on the prompts where the recipe says "auto"."""
    if recipe.layer != "auto":
        return derive(measurement, recipe)
    layer, selection = choose_layer(
        loaded, measurement, recipe, harmful, harmless, batch_size=batch_size, progress=progress
    )
    return derive(measurement, replace(recipe, layer=layer), selection)


def choose_layer(
    loaded: Loaded,
    measurement: Measurement,
    recipe: Recipe,
    harmful: PromptSet,
    harmless: PromptSet,
    *,
    batch_size: int | None,
    progress: bool,
) -> tuple[int, dict[str, Any]]:
    """The source layer whose direction leaves the fewest refusals of harmful prompts, and among those within one prompt
    of the fewest, the least N-token KL on harmless ones. Returns it with every candidate's figures."""
    directions = {
        layer: derive(measurement, replace(recipe, layer=layer)) for layer in _candidates(measurement, recipe)
    }
    rank = max(direction.rank for direction in directions.values())
    steering = Steering(loaded.model, sites=recipe.sites, rank=rank)
    probe = Probe(loaded, steering, measurement.meta.system_prompt, AUTO_TOKENS, batch_size, progress)
    asked, other = (s.prompts[:AUTO_PROMPTS] for s in (harmful, harmless))
    plain = probe.answers(asked, None, "plain, harmful")
    continuations = probe.answers(other, None, "plain, harmless")
    figures = []
    for layer, direction in directions.items():
        with probe.resident(direction, recipe.mode, recipe.strength) as steer:
            refused = refusal_rate(probe.answers(asked, steer, f"layer {layer}, harmful"))
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
        "refused_plain": refusal_rate(plain),
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
