"""The study's report as Markdown."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.slerp_study.arms import ARTICLE, LINEAR, PROJECTED
from steer.lab import tables
from steer.lab.evaluation.report import Rate

Report = Mapping[str, Any]
#: Columns of outcomes: key, heading.
COLUMNS = (
    ("refused", "refused"),
    ("right", "right"),
    ("over_refused", "borderline refused"),
    ("harmless_refused", "harmless refused"),
    ("kept", "harmless right"),
    ("kl", "N-token KL"),
)


def markdown(report: Report) -> str:
    """The whole report: what was run, then each group over its seeds, then each model."""
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    parts = [
        "# Study",
        f"Made {report['created']} with {versions}. Layers were chosen on "
        f"{report['conditions']['choosing']} fitting prompts of each class; answers have at most "
        f"{report['conditions']['max_tokens']} tokens.",
    ]
    parts += ["## All models", _over_models(report), "At the layer whose means are the widest apart, plain ablation:"]
    parts += [_each(report)]
    for group in report["groups"]:
        parts += [f"## {group['group']}", _seeds(group), "### Each method at its own layer", _arms(group["own"])]
        parts += [
            "### All at the layer whose means are the widest apart",
            _arms(group["fixed"]),
            "### Strengths",
            _arms(group["strengths"]),
            "### One-sided with ρ = 0, at that layer",
            _arms(group["zeroed"]),
        ]
    for model in report["models"]:
        parts += [f"## {model['label']}", _geometry(model), _model(model)]
    return "\n\n".join(parts) + "\n"


def _over_models(report: Report) -> str:
    heads = ["method", "mode", "ρ = 0", "models", "refused, mean", "harmless refused, mean", "N-token KL, median"]
    return tables.markdown(
        heads,
        [
            [
                row["method"],
                row["mode"],
                "yes" if row["zeroed"] else "",
                str(row["models"]),
                f"{row['refused']:.3f}",
                f"{row['harmless_refused']:.3f}",
                f"{row['kl']:.5f}",
            ]
            for row in report["over_models"]
        ],
    )


def _each(report: Report) -> str:
    """Each model's norms and angle, and what the two ends of slerp's arc and linear did there."""
    methods = (PROJECTED, ARTICLE, LINEAR)
    heads = ["model", "layer", "ω °", "‖harmful‖ / ‖harmless‖", "linear is slerp at t ="]
    heads += [f"{name}: {what}" for what in ("refused", "KL") for name in methods]
    rows = []
    for model in report["models"]:
        arms = {arm["method"]: arm for arm in model["fixed"] if arm["mode"] == "ablate"}
        if not all(name in arms for name in methods):
            continue
        layer = arms[LINEAR]["layer"]
        place = next(row for row in model["geometry"] if row["layer"] == layer)
        rates = [arms[name]["rates"]["refused"] for name in methods]
        rows.append(
            [
                model["label"],
                str(layer),
                f"{place['angle']:.1f}",
                f"{place['norm_ratio']:.2f}",
                f"{place['linear_t']:.2f}",
                *(f"{rate['hits'] / rate['count']:.2f}" for rate in rates),
                *(f"{arms[name]['kl']:.4f}" for name in methods),
            ]
        )
    return tables.markdown(heads, rows)


def _seeds(group: Report) -> str:
    geometry = ", ".join(
        f"{name} {_mean(group['geometry'][key], bounds=(-math.inf, math.inf))}"
        for key, name in (
            ("angle", "ω °"),
            ("norm_ratio", "‖harmful‖ / ‖harmless‖"),
            ("linear_t", "linear is slerp at t ="),
            ("outlier", "largest over median entry"),
        )
    )
    plain = ", ".join(f"{name} {_mean(group['plain'][key])}" for key, name in COLUMNS if key in group["plain"])
    names = ", ".join(group["left_out"])
    left_out = f" Left out, since they refuse too little: {names}." if names else ""
    where = "At the layer whose means are the widest apart"
    return f"{len(group['models'])} models.{left_out} {where}: {geometry}. Plain: {plain}."


def _arms(arms: Sequence[Report]) -> str:
    heads = ["method", "mode", "strength", "layers", *(head for _, head in COLUMNS), "right − linear", "KL / linear"]
    return tables.markdown(heads, [_arm(arm) for arm in arms])


def _arm(arm: Report) -> list[str]:
    means, against = arm["means"], arm.get("against_linear", {})
    layers = ", ".join(f"{value:.0f}" for value in means["layer"]["values"])
    cells = [_mean(means.get(key), 4, (0, math.inf)) if key == "kl" else _mean(means.get(key)) for key, _ in COLUMNS]
    ratio = against.get("log_kl")
    return [
        arm["method"],
        arm["mode"],
        f"{arm['strength']:g}",
        layers,
        *cells,
        _mean(against.get("right", against.get("refused")), bounds=(-1, 1)),
        "–" if ratio is None else _ratio(ratio),
    ]


def _mean(found: Report | None, digits: int = 2, bounds: tuple[float, float] = (0, 1)) -> str:
    """A mean with its interval, which is cut where such a mean cannot be."""
    if found is None:
        return "–"
    if found["low"] is None:
        return f"{found['mean']:.{digits}f}"
    low, high = max(bounds[0], found["low"]), min(bounds[1], found["high"])
    return f"{found['mean']:.{digits}f} ({low:.{digits}f} – {high:.{digits}f})"


def _ratio(found: Report) -> str:
    """From logarithms to a ratio with its interval."""
    mean, low, high = (None if found[k] is None else math.exp(found[k]) for k in ("mean", "low", "high"))
    return f"{mean:.2g}" if low is None else f"{mean:.2g} ({low:.2g} – {high:.2g})"


def _geometry(model: Report) -> str:
    heads = ["layer", "ω °", "‖harmful‖ / ‖harmless‖", "linear is slerp at t =", "largest over median entry"]
    keys = ("layer", "angle", "norm_ratio", "linear_t", "outlier")
    return tables.markdown(heads, [[f"{row[key]:.4g}" for key in keys] for row in model["geometry"]])


def _model(model: Report) -> str:
    heads = ["method", "mode", "layer", *(head for _, head in COLUMNS), "p", "p (Holm)"]
    rows = []
    for arm in model["own"]:
        against = arm.get("against_linear")
        rows.append(
            [
                arm["method"],
                arm["mode"],
                str(arm["layer"]),
                *(_rate(arm["rates"].get(key)) for key, _ in COLUMNS if key != "kl"),
                f"{arm['kl']:.5f}",
                *(("–", "–") if against is None else (f"{against['p']:.2g}", f"{against['p_holm']:.2g}")),
            ]
        )
    return tables.markdown(heads, rows)


def _rate(rate: Report | None) -> str:
    return "–" if rate is None else str(Rate.model_validate(rate))
