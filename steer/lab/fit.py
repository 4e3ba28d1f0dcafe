"""Fit a direction to a loaded model: derive it from a measurement, with the source layer chosen by what it does."""

from __future__ import annotations

from steer.direction import Direction
from steer.lab.derive import Recipe, derive
from steer.lab.measurement import Measurement
from steer.lab.prompts import PromptSet
from steer.lab.screen import MakeScreen
from steer.lab.select import Grid, select


def fit(
    measurement: Measurement, recipe: Recipe, harmful: PromptSet, harmless: PromptSet, screen: MakeScreen
) -> Direction:
    """`derive`, with the layer chosen by measured effect on the prompts where the recipe says "auto": a selection in
    which nothing but the layer varies."""
    if recipe.layer != "auto":
        return derive(measurement, recipe)
    grid = Grid((recipe.method,), (recipe.position,), "auto", (recipe.mode,))
    return select(measurement, recipe, grid, harmful, harmless, screen)
