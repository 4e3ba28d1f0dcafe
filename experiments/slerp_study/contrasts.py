"""What the draws of one real model show: rates with intervals over prompts and draws, and the contrasts named
beforehand."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from experiments.slerp_study.draws import FITTING, PRIMARY, UNIT, VALIDATION, DrawsTrial
from experiments.slerp_study.summary import geometry
from steer._version import __version__
from steer.files import write_file
from steer.lab import tables
from steer.lab.plots import Compared, forest, picture
from steer.lab.statistics import RESAMPLES, Estimate, holm

Report = dict[str, Any]
Matrix = NDArray[np.float64]
#: The outcomes of an arm, and how each is headed.
OUTCOMES = {
    "refused": "harmful: refused",
    "harmless_refused": "harmless: refused",
    "harmless_degenerate": "harmless: degenerate",
    "kl": "KL, nats",
}
#: What is said of the means of each draw.
GEOMETRY = {"angle": "ω, °", "norm_ratio": "‖harmful‖ / ‖harmless‖", "linear_t": "linear is slerp at t ="}
#: A mean KL below this is rounding.
LEAST_KL = 1e-9


def crossed(statistic: Callable[..., Matrix], *values: Matrix) -> tuple[Estimate, float]:
    """A statistic of `values`, each `[draws, prompts]`, with its 95 % interval, and the two-sided p-value of its being
    0, by resampling draws and prompts, each for itself. Values that belong together are resampled together.

    Source: Owen 2007, "The pigeonhole bootstrap". It is a little too wide rather than too narrow.
    """
    draws, prompts = values[0].shape
    rng = np.random.default_rng(0)
    # how often each draw and each prompt stands in a resample
    rows, columns = (rng.multinomial(n, np.full(n, 1 / n), size=RESAMPLES) / n for n in (draws, prompts))
    found = statistic(*(((rows @ value) * columns).sum(axis=1) for value in values))
    low, high = np.percentile(found, [2.5, 97.5])
    value = float(statistic(*(np.array([each.mean()]) for each in values))[0])
    p = min(1.0, 2 * (1 + min(int((found <= 0).sum()), int((found >= 0).sum()))) / (RESAMPLES + 1))
    return Estimate(value, float(low), float(high)), p


def figures(trial: DrawsTrial, model: str) -> Report:
    """Everything about the model, as it stands in the report."""
    facts = trial.source.facts
    contrasts = [one for condition in trial.conditions for one in _contrasts(trial, condition)]
    for one, p in zip(contrasts, holm([one["p"] for one in contrasts]), strict=True):
        one["p_holm"] = p
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"steer": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "model": model,
        "architecture": facts.architecture,
        "layer": trial.layer,
        "layers": facts.layers,
        "draws": len(trial.draws),
        "fitting": FITTING,
        "validation": VALIDATION,
        "test": [len(trial.harmful.test), len(trial.harmless.test)],
        "max_tokens": trial.evaluator.max_tokens,
        "plain": {name: float(np.mean(bits)) for name, bits in trial.ledger["plain"].items()},
        "geometry": [geometry(trial.measurement(draw), [trial.layer])[0] for draw in trial.draws],
        "arms": [_arm(trial, name, condition) for condition in trial.conditions for name in trial.ways],
        "contrasts": contrasts,
    }


def _arm(trial: DrawsTrial, name: str, condition: str) -> Report:
    found = [trial.found(draw, name, condition) for draw in trial.draws]
    there = [each for each in found if each is not None]
    return {
        "arm": name,
        "condition": condition,
        "draws": len(there),
        "strengths": [trial.strength(draw, name, condition) for draw in trial.draws],
        **{key: asdict(crossed(lambda x: x, _matrix(there, key))[0]) for key in OUTCOMES if there},
    }


def _contrasts(trial: DrawsTrial, condition: str) -> list[Report]:
    """The difference of refusals of the two arms of each pair; at strength 1, where their damage differs, also the
    logarithm of the ratio of their KL."""
    made = []
    for first, second in PRIMARY:
        if not {first, second} <= set(trial.ways):
            continue
        pairs = [(trial.found(draw, first, condition), trial.found(draw, second, condition)) for draw in trial.draws]
        both = [(a, b) for a, b in pairs if a is not None and b is not None]
        if not both:
            continue
        ours, theirs = zip(*both, strict=True)
        found = {"refused, difference": (_difference, "refused")}
        if condition == UNIT:
            found["KL, log of the ratio"] = (_log_ratio, "kl")
        for figure, (statistic, key) in found.items():
            estimate, p = crossed(statistic, _matrix(ours, key), _matrix(theirs, key))
            made.append(
                {"first": first, "second": second, "condition": condition, "figure": figure}
                | {"draws": len(both), "p": p, **asdict(estimate)}
            )
    return made


def _matrix(found: Sequence[Mapping[str, list[float]]], key: str) -> Matrix:
    return np.array([each[key] for each in found])


def _difference(first: Matrix, second: Matrix) -> Matrix:
    return first - second


def _log_ratio(first: Matrix, second: Matrix) -> Matrix:
    logs: list[Matrix] = [np.log(np.maximum(each, LEAST_KL)) for each in (first, second)]
    return logs[0] - logs[1]


def write(report: Report, folder: Path) -> None:
    """`draws.json`, `draws.md` and `draws.png` in `folder`."""
    write_file(folder / "draws.json", (json.dumps(report, indent=1) + "\n").encode())
    write_file(folder / "draws.md", markdown(report).encode())
    conditions = list(dict.fromkeys(arm["condition"] for arm in report["arms"]))
    with picture(folder / "draws.png", len(conditions), width=3.4, height=3.4) as axes:
        for ax, condition in zip(axes, conditions, strict=True):
            rows = [
                Compared(arm["arm"], *(100 * arm["refused"][key] for key in ("value", "low", "high")))
                for arm in report["arms"]
                if arm["condition"] == condition and arm["draws"]
            ]
            forest(ax, rows, x="harmful prompts refused, %", title=condition)


def markdown(report: Report) -> str:
    plain, tested = report["plain"], report["test"]
    arms = [
        [arm["arm"], arm["condition"], _strengths(arm["strengths"]), *(_cell(arm, key) for key in OUTCOMES)]
        for arm in report["arms"]
    ]
    contrasts = [
        [
            f"{one['first']} − {one['second']}",
            one["condition"],
            one["figure"],
            _interval(one, 3),
            *(f"{one[key]:.2g}" for key in ("p", "p_holm")),
        ]
        for one in report["contrasts"]
    ]
    shape = [[str(draw), *(f"{row[key]:.3g}" for key in GEOMETRY)] for draw, row in enumerate(report["geometry"])]
    parts = [
        f"# Draws on {report['model']}",
        f"{report['architecture']}, source layer {report['layer']} of {report['layers']}; {report['draws']} disjoint "
        f"draws of {report['fitting']} prompts of each class to fit with, {report['validation']} to find doses on, "
        f"{tested[0]} harmful and {tested[1]} harmless ones to test with, at most {report['max_tokens']} tokens. "
        f"Plain: {plain['refused']:.0%} of the harmful prompts refused, {plain['harmless_refused']:.0%} of the "
        f"harmless ones, {plain['harmless_degenerate']:.0%} of these degenerate.",
        "## Geometry at the source layer",
        tables.markdown(["draw", *GEOMETRY.values()], shape),
        "## Arms",
        "Means over draws and prompts, with 95 % intervals by resampling both.",
        tables.markdown(["arm", "at", "strength", *OUTCOMES.values()], arms),
        "## Contrasts named beforehand",
        tables.markdown(["arms", "at", "figure", "value (95 %)", "p", "p (Holm)"], contrasts),
        "![Refusals of every arm](draws.png)",
        f"Made {report['created']} with "
        + ", ".join(f"{name} {version}" for name, version in report["versions"].items())
        + ".",
    ]
    return "\n\n".join(parts) + "\n"


def _strengths(found: Sequence[float | None]) -> str:
    there = [each for each in found if each is not None]
    if not there:
        return "none"
    low, high = min(there), max(there)
    said = f"{low:.3g}" if low == high else f"{low:.3g} to {high:.3g}"
    return said if len(there) == len(found) else f"{said} ({len(there)} of {len(found)} draws)"


def _cell(arm: Report, key: str) -> str:
    if not arm["draws"]:
        return "–"
    return _interval(arm[key], 4) if key == "kl" else _interval(arm[key], 3)


def _interval(found: Mapping[str, float], digits: int) -> str:
    return f"{found['value']:.{digits}f} ({found['low']:.{digits}f} – {found['high']:.{digits}f})"
