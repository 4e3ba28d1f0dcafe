"""Pictures of results: one function for each kind, which draws on the axes that `picture` gives.

They can be read in print and by colour-blind readers (palette of Okabe and Ito 2008; the series also differ in marker
and line), and they show intervals.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from steer.errors import imported
from steer.files import replacing
from steer.lab.statistics import undominated

#: The palette of Okabe and Ito, without yellow, which is hardly visible on white paper.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LINES = ("-", "--", "-.", ":")
STYLE = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
}


@dataclass(frozen=True, slots=True)
class Curve:
    """A series of values over x. `low` and `high` are the ends of the values' intervals."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None


@dataclass(frozen=True, slots=True)
class Point:
    """One candidate, as a point of two figures that are both better when they are smaller. Points of one `group` look
    alike, and `name` is written beside the point."""

    x: float
    y: float
    group: str = ""
    name: str = ""


@dataclass(frozen=True, slots=True)
class Compared:
    """A difference and the ends of its interval."""

    name: str
    value: float
    low: float
    high: float


@contextmanager
def picture(path: Path, columns: int = 1, *, width: float = 4.6, height: float = 3.2) -> Iterator[list[Any]]:
    """Draw a picture: yield the axes of its panels, and write `path` if the `with` block ends without an error.

    Args:
        path: .png, .svg or .pdf; the suffix decides the format.
        columns: the number of panels, which are side by side.
        width: of a panel, in inches.
        height: of a panel, in inches.
    """
    needed = "drawing", "'steer-llm[lab]'"
    with imported("matplotlib", *needed).rc_context(STYLE):
        figure = imported("matplotlib.figure", *needed).Figure(figsize=(width * columns, height), layout="constrained")
        yield list(figure.subplots(1, columns, squeeze=False)[0])
        with replacing(path) as temporary:
            figure.savefig(temporary, dpi=160, format=path.suffix[1:])


def curves(axes: Any, series: Sequence[Curve], *, x: str, y: str, title: str = "", log: bool = False) -> None:
    """Draw values over layer, t or strength, with their intervals as bands. With `log` the y axis is logarithmic, and
    has room for zero if a value is not above 0."""
    for number, curve in enumerate(series):
        colour = COLOURS[number % len(COLOURS)]
        if curve.low is not None and curve.high is not None:
            axes.fill_between(curve.x, curve.low, curve.high, color=colour, alpha=0.16, linewidth=0)
        axes.plot(
            curve.x,
            curve.y,
            color=colour,
            linestyle=LINES[number % len(LINES)],
            marker=MARKERS[number % len(MARKERS)],
            markersize=4,
            linewidth=1.4,
            label=curve.name,
        )
    if log:
        _logarithmic(axes, [value for curve in series for value in curve.y])
    _finish(axes, x, y, title, legend=len(series) > 1)


def front(axes: Any, points: Sequence[Point], *, x: str, y: str, title: str = "", log: bool = False) -> None:
    """Draw candidates as points of two figures that should both be small. A staircase joins the candidates that no
    other candidate beats in both figures. `log` means the same as for `curves`."""
    for number, group in enumerate(dict.fromkeys(point.group for point in points)):
        inside = [point for point in points if point.group == group]
        axes.scatter(
            [point.x for point in inside],
            [point.y for point in inside],
            s=22,
            color=COLOURS[number % len(COLOURS)],
            marker=MARKERS[number % len(MARKERS)],
            label=group or None,
            clip_on=False,
            zorder=3,
        )
    best = undominated(points, lambda point: (point.x, point.y))
    axes.step([p.x for p in best], [p.y for p in best], where="post", color="#555555", linewidth=1, label="front")
    if log:
        _logarithmic(axes, [point.y for point in points])
    for point in points:
        if point.name:
            axes.annotate(point.name, (point.x, point.y), xytext=(4, 4), textcoords="offset points", fontsize=7)
    _finish(axes, x, y, title, legend=True)


def histogram(axes: Any, sets: Mapping[str, Sequence[float]], *, x: str, title: str = "") -> None:
    """Draw how the projections of two or more sets are spread: over the same bins for all sets, and each bin as a share
    of its set."""
    everything = np.concatenate([np.asarray(values, dtype=np.float64) for values in sets.values()])
    edges = np.histogram_bin_edges(everything, bins=30)
    for number, (name, values) in enumerate(sets.items()):
        colour, line = COLOURS[number % len(COLOURS)], LINES[number % len(LINES)]
        shares = np.histogram(values, bins=edges)[0] / len(values)
        axes.stairs(shares, edges, fill=True, color=colour, alpha=0.25)
        axes.stairs(shares, edges, color=colour, linestyle=line, linewidth=1.4, label=name)
    _finish(axes, x, "share of the set", title, legend=True)


def forest(axes: Any, rows: Sequence[Compared], *, x: str, title: str = "") -> None:
    """Draw differences with their intervals, the first on top. The line at 0 stands for no difference."""
    heights = list(range(len(rows)))[::-1]
    for height, row in zip(heights, rows, strict=True):
        # the marker is filled if the interval does not contain 0
        inside = row.low <= 0 <= row.high
        axes.plot((row.low, row.high), (height, height), color=COLOURS[0], linewidth=1.6)
        axes.plot(row.value, height, "o", markersize=5, color=COLOURS[0], markerfacecolor="white" if inside else None)
    axes.axvline(0, color="#555555", linewidth=1)
    axes.set_yticks(heights, [row.name for row in rows])
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.grid(axis="y", visible=False)
    _finish(axes, x, "", title, legend=False)


def _logarithmic(axes: Any, values: Sequence[float]) -> None:
    positive = [value for value in values if value > 0]
    if len(positive) == len(values):
        axes.set_yscale("log")
    else:
        axes.set_yscale("symlog", linthresh=min(positive, default=1.0))
        axes.set_ylim(bottom=0)


def _finish(axes: Any, x: str, y: str, title: str, *, legend: bool) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.set_title(title)
    if legend:
        axes.legend(fontsize=8)
