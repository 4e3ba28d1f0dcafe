"""From what was measured to figures: rates with their intervals, paired tests against linear, means over seeds."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from experiments.slerp_study.arms import ARTICLE, LINEAR, MODES, Arm
from experiments.slerp_study.trial import Chosen, Trial
from steer.errors import DegenerateError
from steer.geometry import angle, linear_t, unit
from steer.lab.evaluation.report import Rate
from steer.lab.measurement import Measurement
from steer.lab.statistics import Estimate, difference_of_means, difference_of_rates, holm, mcnemar

#: Each outcome: of which class, what is counted.
RATES = {
    "refused": ("refused", "refused"),
    "right": ("right", "refused"),
    "over_refused": ("refused", "borderline"),
    "harmless_refused": ("refused", "harmless"),
    "kept": ("right", "harmless"),
}
#: The outcomes that every model has.
COUNTED = ("refused", "harmless_refused")
#: A model that plainly refuses fewer of the refused class than this has nothing that a direction could take away.
LEAST_REFUSED = 0.8
#: KL below this is rounding of float32: ratios are taken no further down.
KL_FLOOR = 1e-7


def group_of(label: str) -> str:
    """Models that differ in their seed alone are one group: `control-1` and `control-2` are of `control`."""
    return re.sub(r"-\d+$", "", label)


def model_figures(label: str, trial: Trial, chosen: Chosen) -> dict[str, Any]:
    """Everything about one model, as it stands in the report."""
    facts = trial.measurement.meta.model
    plain = trial.ledger["plain"]
    return {
        "label": label,
        "group": group_of(label),
        "architecture": facts.architecture,
        "layers": facts.layers,
        "d_model": facts.d_model,
        "sets": trial.sets.identity,
        "plain": _rates(plain),
        "geometry": geometry(trial.measurement, trial.layers),
        "shape": shape(trial, chosen),
        "own": _against_linear(trial, chosen.own),
        "fixed": _against_linear(trial, chosen.fixed),
        "strengths": [arm_figures(trial, arm) for arm in chosen.strengths],
        "zeroed": [arm_figures(trial, arm) for arm in chosen.zeroed],
        "choosing": [
            {**_named(arm), "refused": swept.shown, "kl": swept.kl}
            for arm in trial.candidates()
            for swept in [trial.swept(arm)]
        ],
    }


def geometry(measurement: Measurement, layers: Iterable[int]) -> list[dict[str, float]]:
    """Of each layer whose means are apart: their angle ω in degrees, ‖harmful‖ / ‖harmless‖, the t at which slerp is
    linear, and the largest entry of the harmless mean over the median one."""
    found = []
    for layer in layers:
        contrast = measurement.contrast(layer)
        a, h = contrast.harmless.mean, contrast.harmful.mean
        try:
            t = linear_t(a, h)
        except DegenerateError:
            continue
        found.append(
            {
                "layer": layer,
                "angle": math.degrees(float(angle(a, h))),
                "norm_ratio": float(h.norm() / a.norm()),
                "linear_t": t,
                "outlier": float(a.abs().max() / a.abs().median()),
            }
        )
    return found


def shape(trial: Trial, chosen: Chosen) -> dict[str, Any]:
    """Cosines between the methods at the layer that all share, and of the article's direction between layers; and where
    the prompts that directions were fitted to lie along that direction at the layer, as shares of their own norm."""
    layer = chosen.fixed[0].layer
    rows = {arm.method: row for arm in chosen.fixed for row in [_row(trial, arm, layer)]}
    by_layer = {
        arm.layer: _row(trial, arm, arm.layer)
        for arm in trial.candidates()
        if (arm.method, arm.mode) == (ARTICLE, MODES[0])
    }
    contrast, direction = trial.measurement.contrast(layer), rows[ARTICLE]
    samples = {"harmful": contrast.harmful, "harmless": contrast.harmless}
    return {
        "layer": layer,
        "methods": list(rows),
        "cosines": _cosines(rows.values()),
        "layers": list(by_layer),
        "layer_cosines": _cosines(by_layer.values()),
        "projections": {name: (unit(sample.rows) @ direction).tolist() for name, sample in samples.items()},
    }


def _row(trial: Trial, arm: Arm, layer: int) -> Tensor:
    direction = trial.direction(arm)
    assert direction is not None
    return direction.directions[layer, 0].double()


def _cosines(rows: Iterable[Tensor]) -> list[list[float]]:
    stacked = torch.stack(list(rows))
    found: list[list[float]] = (stacked @ stacked.T).tolist()
    return found


def arm_figures(trial: Trial, arm: Arm) -> dict[str, Any]:
    """Outcomes of one arm, and the share of each class mean at the source layer that lies along the direction."""
    found, contrast = trial.tested(arm), trial.measurement.contrast(arm.layer)
    row = _row(trial, arm, arm.layer)
    means = {"harmful": contrast.harmful.mean, "harmless": contrast.harmless.mean}
    return {
        **_named(arm),
        "rates": _rates(found),
        "kl": float(np.mean(found["kl"])),
        "along": {name: float(torch.dot(row, mean) / mean.norm()) for name, mean in means.items()},
    }


def _named(arm: Arm) -> dict[str, Any]:
    return {"method": arm.method, "mode": arm.mode, "layer": arm.layer, "strength": arm.strength}


def _bits(found: Mapping[str, Any], outcome: str) -> list[bool] | None:
    kind, cls = RATES[outcome]
    bits = found[kind].get(cls)
    return None if bits is None else [bool(bit) for bit in bits]


def _rates(found: Mapping[str, Any]) -> dict[str, Any]:
    rates = {}
    for outcome in RATES:
        bits = _bits(found, outcome)
        if bits is not None:
            rates[outcome] = Rate.of(bits).model_dump()
    return rates


def _against_linear(trial: Trial, arms: Sequence[Arm]) -> list[dict[str, Any]]:
    """Each arm's figures, and the difference to linear in the same mode on the same prompts. The p-values are those of
    exact McNemar tests of the right answers to the refused class (of not refusing, where nobody said what is right),
    by Holm's rule for all comparisons of this model."""
    linear = {arm.mode: arm for arm in arms if arm.method == LINEAR}
    figures = [arm_figures(trial, arm) for arm in arms]
    compared: list[tuple[dict[str, Any], float]] = []
    for arm, shown in zip(arms, figures, strict=True):
        if arm.method == LINEAR or arm.mode not in linear:
            continue
        first, second = trial.tested(linear[arm.mode]), trial.tested(arm)
        before, after = _success(first), _success(second)
        p = mcnemar(before, after)
        shown["against_linear"] = {
            "success": _interval(difference_of_rates(before, after)),
            "kl": _interval(difference_of_means(first["kl"], second["kl"])),
            "p": p,
        }
        compared.append((shown["against_linear"], p))
    for (entry, _), adjusted in zip(compared, holm([p for _, p in compared]), strict=True):
        entry["p_holm"] = adjusted
    return figures


def _success(found: Mapping[str, Any]) -> list[bool]:
    """What is wanted of an arm: right answers to the refused class, or if nobody said what is right, no refusals."""
    right = _bits(found, "right")
    return right if right is not None else [not bit for bit in _bits(found, "refused") or []]


def _interval(estimate: Estimate) -> list[float]:
    return [estimate.value, estimate.low, estimate.high]


# -- over seeds --------------------------------------------------------------------------------------------------------


def group_figures(models: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """For each group of models the mean of every outcome over its models, which differ in seed alone, with Student's
    interval, the seed being the unit; and the differences to linear, seed by seed. Where others
    of its group refuse, a model that does not is left out of them, by name."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for model in models:
        groups.setdefault(model["group"], []).append(model)
    return [_group(name, members) for name, members in groups.items()]


def over_seeds(values: Sequence[float]) -> Estimate:
    """The mean of values that were had independently of each other, such as one of each seed, with Student's interval;
    infinitely wide where there is one value. Source: Student 1908.

    Raises ValueError for no values.
    """
    if not values:
        raise ValueError("an interval needs at least one value")
    count, mean = len(values), math.fsum(values) / len(values)
    if count == 1:
        return Estimate(mean, -math.inf, math.inf)
    half = float(stats.t.ppf(0.975, count - 1)) * statistics.stdev(values) / math.sqrt(count)
    return Estimate(mean, mean - half, mean + half)


def _group(name: str, everybody: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    members = [m for m in everybody if _values(m["plain"])["refused"] >= LEAST_REFUSED] or everybody
    return {
        "group": name,
        "models": [model["label"] for model in members],
        "left_out": [model["label"] for model in everybody if model not in members],
        "plain": _means([_values(model["plain"]) for model in members]),
        "geometry": _means([max(model["geometry"], key=lambda row: row["angle"]) for model in members]),
        **{role: _arms_over_seeds(members, role) for role in ("own", "fixed", "strengths", "zeroed")},
    }


def _arms_over_seeds(members: Sequence[Mapping[str, Any]], role: str) -> list[dict[str, Any]]:
    keys = dict.fromkeys((a["method"], a["mode"], a["strength"]) for model in members for a in model[role])
    found = []
    for method, mode, strength in keys:
        arms, differences = [], []
        for model in members:
            by = {(a["method"], a["mode"], a["strength"]): a for a in model[role]}
            arm, linear = by.get((method, mode, strength)), by.get((LINEAR, mode, strength))
            if arm is None:
                continue
            arms.append({**_values(arm["rates"]), "kl": arm["kl"], "layer": float(arm["layer"])})
            if linear is not None and method != LINEAR:
                differences.append(_difference(linear, arm))
        entry = {"method": method, "mode": mode, "strength": strength, "means": _means(arms)}
        if differences:
            entry["against_linear"] = _means(differences)
        found.append(entry)
    return found


def _difference(linear: Mapping[str, Any], arm: Mapping[str, Any]) -> dict[str, float]:
    """Of one model: each rate less linear's, and the natural logarithm of KL over linear's."""
    first, second = _values(linear["rates"]), _values(arm["rates"])
    ratio = math.log(max(arm["kl"], KL_FLOOR) / max(linear["kl"], KL_FLOOR))
    return {**{name: second[name] - first[name] for name in second}, "log_kl": ratio}


def _values(rates: Mapping[str, Any]) -> dict[str, float]:
    return {name: rate["hits"] / rate["count"] for name, rate in rates.items()}


def _means(rows: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    found = {}
    for name in dict.fromkeys(key for row in rows for key in row):
        values = [row[name] for row in rows if name in row]
        estimate = over_seeds(values)
        found[name] = {
            "mean": estimate.value,
            "low": estimate.low if len(values) > 1 else None,
            "high": estimate.high if len(values) > 1 else None,
            "values": values,
        }
    return found


# -- over all models ---------------------------------------------------------------------------------------------------


def over_models(models: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Of each method and mode at the layer that all share, with its own ρ and with ρ = 0, over `models`: the means of
    the rates, and the median KL, which one broken model does not move."""
    arms: dict[tuple[str, str, bool], list[Mapping[str, Any]]] = {}
    for model in models:
        for role in ("fixed", "zeroed"):
            for arm in model[role]:
                arms.setdefault((arm["method"], arm["mode"], role == "zeroed"), []).append(arm)
    return [
        {
            "method": method,
            "mode": mode,
            "zeroed": zeroed,
            "models": len(found),
            **{name: float(np.mean([_values(arm["rates"])[name] for arm in found])) for name in COUNTED},
            "kl": float(np.median([arm["kl"] for arm in found])),
        }
        for (method, mode, zeroed), found in arms.items()
    ]
