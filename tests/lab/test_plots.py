"""Pictures are of what they were given: every series, interval, name and the front, in a file that can be read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.image import imread

from steer.lab import plots
from steer.lab.plots import Compared, Curve, Point
from steer.lab.statistics import undominated


def saved(path: Path) -> np.ndarray[Any, Any]:
    image = np.asarray(imread(path))
    assert image.std() > 0.01, "an empty picture"
    return image


def test_curves_have_bands_and_names(tmp_path: Path) -> None:
    path = tmp_path / "curves.png"
    with plots.picture(path, 2) as (left, right):
        series = [
            Curve("slerp", [0, 1, 2], [0.1, 0.5, 0.2], [0, 0.4, 0.1], [0.2, 0.6, 0.3]),
            Curve("linear", [0, 1, 2], [0.2, 0.4, 0.6]),
        ]
        plots.curves(left, series, x="t", y="refused", title="by t")
        plots.curves(right, [Curve("KL", [0, 1], [0, 1e-3])], x="t", y="nats", log=True)
        assert [text.get_text() for text in left.get_legend().get_texts()] == ["slerp", "linear"]
        assert len(left.collections) == 1, "one band, for the one with intervals"
        assert [list(line.get_ydata()) for line in left.lines] == [list(curve.y) for curve in series]
        assert (left.get_xlabel(), left.get_ylabel(), left.get_title()) == ("t", "refused", "by t")
        assert right.get_legend() is None
        assert right.get_yscale() == "symlog", "there is a zero"
    assert saved(path).shape[1] > saved(path).shape[0]


@given(st.lists(st.builds(Point, st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=30))
def test_no_point_of_the_front_is_beaten(points: list[Point]) -> None:
    best = undominated(points, lambda point: (point.x, point.y))
    for point in points:
        beaten = any((b.x <= point.x and b.y <= point.y) and (b.x, b.y) != (point.x, point.y) for b in points)
        assert ((point.x, point.y) in [(b.x, b.y) for b in best]) != beaten


def test_the_front_names_groups_and_points(tmp_path: Path) -> None:
    with plots.picture(tmp_path / "front.png") as (axes,):
        points = [Point(0.1, 0.5, "slerp", "a"), Point(0.2, 0.1, "linear"), Point(0.3, 0.3, "linear")]
        plots.front(axes, points, x="refused", y="KL", log=True)
        assert axes.get_yscale() == "log"
        assert [text.get_text() for text in axes.get_legend().get_texts()] == ["slerp", "linear", "front"]
        assert [text.get_text() for text in axes.texts] == ["a"]
    saved(tmp_path / "front.png")


def test_a_histogram_is_in_shares_of_each_set(tmp_path: Path) -> None:
    with plots.picture(tmp_path / "histogram.png") as (axes,):
        plots.histogram(axes, {"harmful": [1.0, 2.0, 2.1], "harmless": [-1.0] * 50}, x="projection")
        for patch in axes.patches:
            assert patch.get_data().values.sum() == pytest.approx(1)
        assert [text.get_text() for text in axes.get_legend().get_texts()] == ["harmful", "harmless"]
    saved(tmp_path / "histogram.png")


def test_a_forest_has_a_row_for_each_difference_the_first_on_top(tmp_path: Path) -> None:
    with plots.picture(tmp_path / "forest.png") as (axes,):
        plots.forest(axes, [Compared("a", -0.5, -0.6, -0.4), Compared("b", 0.1, -0.1, 0.3)], x="difference")
        names = {text.get_text(): tick for text, tick in zip(axes.get_yticklabels(), axes.get_yticks(), strict=True)}
        assert names["a"] > names["b"]
        (span, a, *_) = axes.lines
        assert list(span.get_xdata()) == [-0.6, -0.4]
        assert list(a.get_xdata()) == [-0.5]
    saved(tmp_path / "forest.png")


def test_nothing_is_written_where_drawing_fails(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), plots.picture(tmp_path / "no.png"):
        raise RuntimeError
    assert not list(tmp_path.iterdir())
