"""What a search varies: method and t, source layer or each layer's own, the layers' weights, mode and strength. A point
of that space and a measurement make a direction, without the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, Protocol, cast

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from steer.errors import InvalidInput
from steer.lab.derive import Recipe, check_needs, derive
from steer.lab.measurement import Measurement
from steer.lab.methods import METHODS, make_method
from steer.lab.screen import Candidate
from steer.lab.select import layers_of
from steer.names import Mode

Parameter = str | float | int


class Suggest(Protocol):
    """The part of optuna's trial that is used here."""

    def suggest_categorical(self, name: str, choices: Any) -> Any: ...
    def suggest_int(self, name: str, low: int, high: int) -> int: ...
    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float: ...


class Space(BaseModel):
    """The bounds of a search."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    methods: Annotated[tuple[str, ...], Field(min_length=1)] = ("slerp", "projected", "linear", "whitened")
    modes: Annotated[tuple[Mode, ...], Field(min_length=1)] = ("ablate", "one_sided")
    t: tuple[float, float] = Field((0.0, 1.5), description="least and most t of slerp")
    strength: tuple[float, float] = Field(
        (0.5, 1.5), description="least and most strength; of `add` its hundredth, negative"
    )
    threshold: tuple[float, float] = Field(
        (-0.25, 0.5), description="of `one_sided`: 0 is the harmless mean, 1 the harmful one"
    )
    layers: tuple[int, ...] = Field((), description="source layers that are tried")
    depth: Annotated[int, Field(ge=1, description="layers of the model")] = 1

    def bounded(self, measurement: Measurement) -> Space:
        """With the layers of `measurement` whose classes separate. Raises InvalidInput with every problem."""
        known = [name for name in self.methods if name in METHODS]
        unknown = [name for name in self.methods if name not in known]
        problems = [f"method '{name}' is not known; accepted: {', '.join(METHODS)}" for name in unknown]
        for name in ("t", "strength", "threshold"):
            low, high = getattr(self, name)
            if not low < high:
                problems.append(f"{name}: the least, {low:g}, must be below the most, {high:g}")
        for name in known:
            try:
                check_needs(measurement, Recipe(make_method(name)))
            except InvalidInput as error:
                problems += error.problems
        if problems:
            raise InvalidInput(list(dict.fromkeys(problems)))
        layers = layers_of(measurement, Recipe(make_method(self.methods[0])))
        bounded = self.model_copy(update={"layers": layers, "depth": measurement.meta.model.layers})
        offered = derive(measurement, Recipe(make_method(self.methods[0]), layers[-1])).meta.modes
        if missing := [mode for mode in self.modes if mode not in offered]:
            raise InvalidInput(
                [f"the mode '{mode}' needs means that this measurement does not have" for mode in missing]
            )
        return bounded

    def suggest(self, trial: Suggest) -> dict[str, Parameter]:
        """A point, as optuna draws it. One without `layer` has each layer's own direction."""
        point: dict[str, Parameter] = {"method": trial.suggest_categorical("method", list(self.methods))}
        if point["method"] == "slerp":
            point["t"] = trial.suggest_float("t", *self.t)
        if trial.suggest_categorical("source", ["one layer", "each its own"]) == "one layer":
            point["layer"] = self.layers[trial.suggest_int("layer", 0, len(self.layers) - 1)]
        point["mode"] = trial.suggest_categorical("mode", list(self.modes))
        point["strength"] = trial.suggest_float("strength", *self.strength)
        if point["mode"] == "one_sided":
            point["threshold"] = trial.suggest_float("threshold", *self.threshold)
        point["peak"] = trial.suggest_float("peak", 0.0, float(max(1, self.depth - 1)))
        point["width"] = trial.suggest_float("width", 0.5, float(2 * self.depth), log=True)
        point["least"] = trial.suggest_float("least", 0.0, 1.0)
        return point


def layer_weights(depth: int, peak: float, width: float, least: float) -> Tensor:
    """Weights `[depth]` between `least` and 1, float32: a bell around the layer `peak` on a floor,

        w(l) = least + (1 − least)·exp(−(l − peak)² / 2·width²).

    Its maximum is 1, since the operation knows only the product strength · w: how much at the peak is the strength's to
    say. Removal at layers one behind the other leaves Π(1 − λ·w_l) of what stood before the first of them, so that one
    full layer is enough for that, and `least` decides about what layers write behind it.
    """
    layers = torch.arange(depth, dtype=torch.float64)
    bell = torch.exp(-((layers - peak) ** 2) / (2 * width**2))
    return (least + (1 - least) * bell).float()


def candidate(
    measurement: Measurement, point: Mapping[str, Parameter], selection: dict[str, Any] | None = None
) -> Candidate:
    """What `point` means. Given a `selection`, its direction has the mode and strength as its defaults, to be saved."""
    t, mode, strength = point.get("t"), cast(Mode, point["mode"]), float(point["strength"])
    if mode == "add":
        strength = -strength / 100  # against the behaviour, and at each layer again
    method = make_method(str(point["method"]), {} if t is None else {"t": t})
    at = float(point["threshold"]) if "threshold" in point else None
    base = derive(measurement, Recipe(method, int(point["layer"]) if "layer" in point else "all", threshold=at))
    shape = (float(point[name]) for name in ("peak", "width", "least"))
    weighted = replace(base, weights=layer_weights(base.layers, *shape))
    if selection is not None:
        weighted = weighted.with_meta(mode=mode, strength=strength, selection=selection)
    return Candidate(weighted, mode, strength)
