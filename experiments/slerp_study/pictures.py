"""The study's pictures, from its report."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.slerp_study.arms import ARTICLE, LINEAR, PROJECTED, SLERP, SWEPT, TS
from steer.lab.plots import COLOURS, MARKERS, Compared, Curve, Point, curves, forest, front, histogram, picture

Report = Mapping[str, Any]
#: What a t sweep shows, with what is written at its axis.
SHOWN = (("refused", "refused class: refused"), ("harmless_refused", "harmless: refused"), ("kl", "N-token KL, nats"))


def draw(report: Report, folder: Path) -> None:
    """Every picture that the report has figures for."""
    groups = report["groups"]
    t_sweep(groups, folder / "t-sweep.png", "ablate")
    t_sweep(groups, folder / "t-sweep-one-sided.png", "one_sided")
    arc(report["models"], folder / "arc.png")
    strengths(groups, folder / "strength.png")
    layers(report["models"], folder / "layers.png")
    fronts(groups, folder / "front.png")
    article(groups, folder / "article.png")
    shapes(report["models"][0], folder / "shapes.png")


def t_sweep(groups: Sequence[Report], path: Path, mode: str) -> None:
    """Outcomes over t, each group's mean over its seeds with its interval."""
    with picture(path, len(SHOWN), width=2.9, height=2.6) as axes:
        for ax, (outcome, title) in zip(axes, SHOWN, strict=True):
            curves(ax, list(_over_t(groups, mode, outcome)), x="t", y=title, log=outcome == "kl")
            if ax is not axes[0] and ax.get_legend() is not None:
                ax.get_legend().remove()


def _over_t(groups: Sequence[Report], mode: str, outcome: str) -> Iterator[Curve]:
    for group in groups:
        by = {arm["method"]: arm["means"].get(outcome) for arm in group["fixed"] if arm["mode"] == mode}
        found = [(t, by[name]) for t, name in zip(TS, SLERP, strict=True) if by.get(name) is not None]
        if found:
            yield _curve(group["group"], [t for t, _ in found], [mean for _, mean in found], rate=outcome != "kl")


def _curve(name: str, x: Sequence[float], means: Sequence[Report], *, rate: bool) -> Curve:
    """Means with their intervals, where there are some; an interval of a mean of rates ends where rates do."""
    values = [mean["mean"] for mean in means]
    if any(mean["low"] is None for mean in means):
        return Curve(name, x, values)
    low = [max(0.0, mean["low"]) for mean in means]
    return Curve(name, x, values, low, [min(1.0, mean["high"]) if rate else mean["high"] for mean in means])


def arc(models: Sequence[Report], path: Path) -> None:
    """Plain ablation sets both class means to one ray of the arc between them, t/2 of the way from the harmless mean.
    Whether the model refuses there, for every model; linear stands at its own t."""
    with picture(path, 2) as axes:
        for ax, (outcome, title) in zip(axes, SHOWN[:2], strict=True):
            for marker, (name, wanted) in enumerate((("slerp", SLERP), ("linear", (LINEAR,)))):
                x, y = [], []
                for model in models:
                    place = {row["layer"]: row["linear_t"] for row in model["geometry"]}
                    for arm in model["fixed"]:
                        if arm["mode"] == "ablate" and arm["method"] in wanted:
                            t = place[arm["layer"]] if name == "linear" else TS[SLERP.index(arm["method"])]
                            rate = arm["rates"][outcome]
                            x.append(t / 2)
                            y.append(rate["hits"] / rate["count"])
                ax.plot(x, y, MARKERS[marker], color=COLOURS[marker], markersize=4, alpha=0.6, label=name)
            ax.axvline(0.5, color="#555555", linewidth=1)
            ax.set_xlabel("where both means are set to: 0 harmless, 1 harmful")
            ax.set_ylabel(title)
            ax.legend(fontsize=8)


def shapes(model: Report, path: Path) -> None:
    """One model: cosines between methods and between layers, and the two sets along the article's direction."""
    shape = model["shape"]
    with picture(path, 3, width=3.4, height=2.8) as axes:
        layers = [str(layer) for layer in shape["layers"]]
        title = f"{model['label']}, layer {shape['layer']}"
        # every second t: the numbers must have room
        some = [i for i, name in enumerate(shape["methods"]) if name not in SLERP[1::2]]
        names = [shape["methods"][i] for i in some]
        cosines(axes[0], [[shape["cosines"][i][j] for j in some] for i in some], names, names, title=title)
        cosines(axes[1], shape["layer_cosines"], layers, layers, title=f"{ARTICLE}, layers")
        histogram(axes[2], shape["projections"], x=f"cosine with {ARTICLE}", title=title)


def cosines(
    axes: Any, matrix: Sequence[Sequence[float]], rows: Sequence[str], columns: Sequence[str], *, title: str = ""
) -> None:
    """Cosines between methods, or of methods over layers, `[rows, columns]` from −1 to 1; NaN is left blank."""
    values = np.asarray(matrix, dtype=np.float64)
    image = axes.imshow(values, cmap="PuOr", vmin=-1, vmax=1, aspect="auto")
    axes.grid(False)
    axes.set_xticks(range(len(columns)), columns, rotation=45 if max(map(len, columns)) > 4 else 0, ha="center")
    axes.set_yticks(range(len(rows)), rows)
    if len(columns) <= 12:
        for (row, column), value in np.ndenumerate(values):
            if np.isfinite(value):
                ink = "white" if abs(value) > 0.7 else "black"
                axes.text(column, row, f"{value:.2f}", ha="center", va="center", color=ink, fontsize=7)
    axes.figure.colorbar(image, ax=axes, label="cosine")
    axes.set_title(title)


def strengths(groups: Sequence[Report], path: Path) -> None:
    """Refusals over strength, of the swept methods, the mean over all groups' means."""
    with picture(path, 2) as axes:
        for ax, mode in zip(axes, ("ablate", "one_sided"), strict=True):
            found = []
            for method in SWEPT:
                points: dict[float, list[float]] = {}
                for group in groups:
                    for arm in [*group["own"], *group["strengths"]]:
                        if (arm["method"], arm["mode"]) == (method, mode):
                            points.setdefault(arm["strength"], []).append(arm["means"]["refused"]["mean"])
                x = sorted(points)
                found.append(Curve(method, x, [sum(points[s]) / len(points[s]) for s in x]))
            curves(ax, found, x="strength", y="refused class: refused", title=mode)


def layers(models: Sequence[Report], path: Path) -> None:
    """Refusals of the prompts that layers are chosen on, over the source layer, the mean over models of one depth."""
    depths = sorted({model["layers"] for model in models})
    with picture(path, len(depths), width=3.6) as axes:
        for ax, depth in zip(axes, depths, strict=True):
            found = []
            for method in SWEPT:
                points: dict[int, list[float]] = {}
                for model in models:
                    for row in model["choosing"] if model["layers"] == depth else ():
                        if (row["method"], row["mode"]) == (method, "ablate"):
                            points.setdefault(row["layer"], []).append(row["refused"])
                x = sorted(points)
                found.append(Curve(method, x, [sum(points[layer]) / len(points[layer]) for layer in x]))
            curves(ax, found, x="source layer", y="refused class: refused", title=f"{depth} layers, ablate")
            ax.set_xticks(sorted({row for curve in found for row in curve.x}))


def fronts(groups: Sequence[Report], path: Path) -> None:
    """Refusals against KL of all arms, a panel for each mode."""
    with picture(path, 2) as axes:
        for ax, mode in zip(axes, ("ablate", "one_sided"), strict=True):
            points = [
                Point(arm["means"]["kl"]["mean"], arm["means"]["refused"]["mean"], arm["method"])
                for group in groups
                for arm in group["own"]
                if arm["mode"] == mode and arm["method"] in (PROJECTED, "slerp 0.5", ARTICLE, LINEAR, "whitened")
            ]
            front(ax, points, x="N-token KL, nats", y="refused class: refused", title=mode)
            ax.set_xscale("symlog", linthresh=1e-4)


def article(groups: Sequence[Report], path: Path) -> None:
    """The article's claim: slerp at t = 1 less linear, in each mode, with the interval over seeds."""
    with picture(path, 2, height=2.6) as axes:
        for ax, mode in zip(axes, ("ablate", "one_sided"), strict=True):
            rows = [
                Compared(group["group"], found["mean"], found["low"], found["high"])
                for group in groups
                for arm in group["own"]
                if (arm["method"], arm["mode"]) == (ARTICLE, mode)
                for found in [arm["against_linear"].get("right", arm["against_linear"]["refused"])]
                if found["low"] is not None
            ]
            if rows:
                forest(ax, rows, x="right answers to the refused class, slerp t = 1 − linear", title=mode)
