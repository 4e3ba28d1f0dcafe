"""The study's report as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

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
    for group in report["groups"]:
        parts += [f"## {group['group']}", _seeds(group), "### Each method at its own layer", _arms(group["own"])]
        parts += [
            "### All at the layer whose means are the widest apart",
            _arms(group["fixed"]),
            "### Strengths",
            _arms(group["strengths"]),
        ]
    for model in report["models"]:
        parts += [f"## {model['label']}", _geometry(model), _model(model)]
    return "\n\n".join(parts) + "\n"


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def _seeds(group: Report) -> str:
    geometry = ", ".join(
        f"{name} {_mean(group['geometry'][key])}"
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
    return f"{len(group['models'])} models.{left_out} At the layer whose means are the widest apart: {geometry}. Plain: {plain}."


def _arms(arms: Sequence[Report]) -> str:
    heads = ["method", "mode", "strength", "layers", *(head for _, head in COLUMNS), "right − linear", "KL / linear"]
    return table(heads, (_arm(arm) for arm in arms))


def _arm(arm: Report) -> list[str]:
    means, against = arm["means"], arm.get("against_linear", {})
    layers = ", ".join(f"{value:.0f}" for value in means["layer"]["values"])
    cells = [_mean(means.get(key), digits=4 if key == "kl" else 2) for key, _ in COLUMNS]
    ratio = against.get("log_kl")
    return [
        arm["method"],
        arm["mode"],
        f"{arm['strength']:g}",
        layers,
        *cells,
        _mean(against.get("right", against.get("refused"))),
        "–" if ratio is None else _ratio(ratio),
    ]


def _mean(found: Report | None, digits: int = 2) -> str:
    if found is None:
        return "–"
    if found["low"] is None:
        return f"{found['mean']:.{digits}f}"
    return f"{found['mean']:.{digits}f} ({found['low']:.{digits}f} – {found['high']:.{digits}f})"


def _ratio(found: Report) -> str:
    """From logarithms to a ratio with its interval."""
    mean, low, high = (None if found[k] is None else 2.718281828459045 ** found[k] for k in ("mean", "low", "high"))
    return f"{mean:.2g}" if low is None else f"{mean:.2g} ({low:.2g} – {high:.2g})"


def _geometry(model: Report) -> str:
    heads = ["layer", "ω °", "‖harmful‖ / ‖harmless‖", "linear is slerp at t =", "largest over median entry"]
    keys = ("layer", "angle", "norm_ratio", "linear_t", "outlier")
    return table(heads, ([f"{row[key]:.4g}" for key in keys] for row in model["geometry"]))


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
    return table(heads, rows)


def _rate(rate: Report | None) -> str:
    if rate is None:
        return "–"
    return f"{rate['hits']} of {rate['count']} ({rate['low']:.0%} – {rate['high']:.0%})"
