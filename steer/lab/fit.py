"""Make a direction from a measurement, and choose its source layer by what it does."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from steer.direction import Direction, DirectionMeta, Mode, Site
from steer.errors import DegenerateError, InvalidInput
from steer.geometry import angle
from steer.hf.attach import Anatomy, Steering
from steer.hf.load import Loaded
from steer.lab.evaluate import Probe, refusal_rate
from steer.lab.measure import Measurement
from steer.lab.methods import METHODS, reference

log = logging.getLogger("steer")
#: Prompts of each class that candidates for `--layer auto` are tried on, and tokens of their answers.
AUTO_PROMPTS, AUTO_TOKENS = 48, 24
#: At most so many candidate layers, spread evenly over those whose classes separate.
AUTO_CANDIDATES = 16
#: Layers whose class means are closer than this do nothing (measured on small models).
AUTO_MIN_DEGREES = 10.0


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a direction is made from a measurement."""

    method: str = "slerp"
    t: float = 1.0
    layer: int | Literal["auto", "all"] = "auto"
    mode: Mode = "ablate"
    strength: float = 1.0
    sites: tuple[Site, ...] = ("resid_post",)

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise InvalidInput(f"method '{self.method}' is not known; accepted: {', '.join(METHODS)}")
        if not math.isfinite(self.t):
            raise InvalidInput(f"t must be a finite number, got {self.t}")


def derive(
    loaded: Loaded, measurement: Measurement, recipe: Recipe, selection: dict[str, Any] | None = None
) -> Direction:
    """The direction that `recipe` (with a layer number or "all") makes.

    With one source layer its vector serves all layers, and at the site "writers" the embedding too, without which that
    is no weight orthogonalisation. At "resid_post" the embedding output is left alone: on the embedded model plain
    ablation there took 23 of 100 harmless prompts to a refusal, and 1 without it. With "all" each layer has its own,
    and layers whose means define none are left unsteered. Raises DegenerateError where nothing is defined.
    """
    layers, d_model = measurement.mean_harmful.shape
    embedding = None
    if recipe.layer == "all":
        rows = torch.stack([_row_or_zero(measurement, recipe, layer) for layer in range(layers)])
        if not rows.any():
            raise DegenerateError("at no layer do the two class means define a direction")
    else:
        source = _layer_number(recipe.layer, layers)
        vector = _row(measurement, recipe, source)
        rows = vector.expand(layers, d_model)
        if "writers" in recipe.sites:
            embedding = vector.float().unsqueeze(0)
    anatomy = Anatomy(loaded.model)
    parameters: dict[str, float | int | str | None] = {
        "position": measurement.conditions.position,
        "winsorize": measurement.conditions.winsorize,
    }
    if recipe.method == "slerp":
        parameters["t"] = recipe.t
    meta = DirectionMeta(
        method=recipe.method,
        parameters=parameters,
        source_layer=None if recipe.layer == "all" else _layer_number(recipe.layer, layers),
        selection=selection or {},
        model=loaded.name,
        revision=loaded.revision,
        architecture=anatomy.architecture,
        d_model=d_model,
        layers=layers,
        chat_template_sha256=loaded.template_sha256,
        system_prompt=measurement.conditions.system_prompt,
        bos_count=measurement.bos_count,
        harmful=measurement.harmful.dataset,
        harmless=measurement.harmless.dataset,
        mode=recipe.mode,
        strength=recipe.strength,
        sites=recipe.sites,
    )
    return Direction(
        meta,
        directions=rows.float().unsqueeze(1).contiguous(),
        weights=torch.ones(layers),
        reference=reference(measurement, rows, recipe.method, recipe.t).float().unsqueeze(1).contiguous(),
        mean_harmful=measurement.mean_harmful.float(),
        mean_harmless=measurement.mean_harmless.float(),
        mean_harmless_all=measurement.mean_harmless_all.float(),
        embedding=embedding,
    )


def fit(
    loaded: Loaded, measurement: Measurement, recipe: Recipe, *, batch_size: int | None = None, progress: bool = False
) -> Direction:
    """`derive`, with the layer chosen by measured effect where the recipe says "auto"."""
    if recipe.layer != "auto":
        return derive(loaded, measurement, recipe)
    layer, selection = choose_layer(loaded, measurement, recipe, batch_size=batch_size, progress=progress)
    return derive(loaded, measurement, replace(recipe, layer=layer), selection)


def choose_layer(
    loaded: Loaded, measurement: Measurement, recipe: Recipe, *, batch_size: int | None, progress: bool
) -> tuple[int, dict[str, Any]]:
    """The source layer whose direction leaves the fewest refusals of harmful prompts, and among those within one prompt
    of the fewest, the least N-token KL on harmless ones. Returns it with every candidate's figures."""
    candidates = _candidates(measurement, recipe)
    with_system = measurement.conditions.system_prompt
    probe = Probe(
        loaded, Steering(loaded.model, sites=recipe.sites, rank=1), with_system, AUTO_TOKENS, batch_size, progress
    )
    harmful, harmless = (s.prompts[:AUTO_PROMPTS] for s in (measurement.harmful, measurement.harmless))
    plain = probe.answers(harmful, None, "plain, harmful")
    continuations = probe.answers(harmless, None, "plain, harmless")
    figures = []
    for layer in candidates:
        direction = derive(loaded, measurement, replace(recipe, layer=layer))
        with probe.resident(direction, recipe.mode, recipe.strength) as steer:
            refused = refusal_rate(probe.answers(harmful, steer, f"layer {layer}, harmful"))
            kl = probe.divergence(harmless, continuations, steer, f"layer {layer}, harmless")
        figures.append({"layer": layer, "refused": refused, "kl": kl.mean})
        log.info("layer %d: %.2f refused, N-token KL %.5f", layer, refused, kl.mean)
    fewest = min(f["refused"] for f in figures)
    best = min((f for f in figures if f["refused"] <= fewest + 1 / len(harmful)), key=lambda f: f["kl"])
    selection = {
        "by": "fewest refusals (within one prompt), then least N-token KL on harmless prompts",
        "mode": recipe.mode,
        "prompts": len(harmful),
        "tokens": AUTO_TOKENS,
        "refused_plain": refusal_rate(plain),
        "candidates": figures,
    }
    return int(best["layer"]), selection


def _candidates(measurement: Measurement, recipe: Recipe) -> list[int]:
    usable = []
    for layer in range(measurement.mean_harmful.shape[0]):
        a, h = measurement.mean_harmless[layer], measurement.mean_harmful[layer]
        try:
            _row(measurement, recipe, layer)
            if math.degrees(float(angle(a, h))) >= AUTO_MIN_DEGREES:
                usable.append(layer)
        except DegenerateError:
            continue
    if not usable:
        raise DegenerateError(
            f"at no layer are the class means {AUTO_MIN_DEGREES:g}° apart: this model does not tell these sets apart"
        )
    step = max(1, math.ceil(len(usable) / AUTO_CANDIDATES))
    return usable[::-step][::-1]


def _row(measurement: Measurement, recipe: Recipe, layer: int) -> Tensor:
    return METHODS[recipe.method](measurement.mean_harmless[layer], measurement.mean_harmful[layer], recipe.t)


def _row_or_zero(measurement: Measurement, recipe: Recipe, layer: int) -> Tensor:
    try:
        return _row(measurement, recipe, layer)
    except DegenerateError as error:
        log.warning("layer %d is left unsteered: %s", layer, error)
        return torch.zeros(measurement.mean_harmful.shape[1], dtype=torch.float64)


def _layer_number(layer: int | str, layers: int) -> int:
    number = int(layer)
    if not -layers <= number < layers:
        raise InvalidInput(f"layer {number} does not exist: the model has layers 0 to {layers - 1}")
    return number % layers
