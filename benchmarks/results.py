"""What a benchmark found, as people read it and as programs do: Markdown, JSON and a picture of the same figures."""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks.timing import HEADER, Ratio, machine

#: Where results are kept; what is committed was measured with the command that it names.
FOLDER = Path(__file__).parents[1] / "docs" / "benchmarks"


def typed(argv: Sequence[str]) -> str:
    """A module and its options as they are typed, but for the folder of results."""
    words = [word for before, word in zip(["", *argv], argv, strict=False) if "--out" not in (before, word)]
    return f"python -m {' '.join(words)}".replace(".__main__", "")


def own_argv() -> list[str]:
    """The module that runs, and its options."""
    spec = sys.modules["__main__"].__spec__
    assert spec is not None, "benchmarks run as modules: python -m benchmarks.swap"
    return [spec.name, *sys.argv[1:]]


@dataclass(frozen=True, slots=True)
class Table:
    """Arms of one workload beside each other, the first one the baseline."""

    title: str
    arms: Mapping[str, Ratio]
    notes: Sequence[str] = ()

    @property
    def baseline(self) -> str:
        return next(iter(self.arms))

    def markdown(self) -> str:
        rows = [f"**{self.title}**\n", HEADER, *(ratio.row(arm) for arm, ratio in self.arms.items()), ""]
        return "\n".join([*rows, *(f"{note}\n" for note in self.notes)])


@dataclass(frozen=True, slots=True)
class Result:
    """All that one command found. `versions` are those of what was measured beside torch and transformers."""

    name: str
    title: str
    versions: Mapping[str, str]
    tables: Sequence[Table]
    more: str = ""
    command: str = field(default_factory=lambda: typed(own_argv()))
    made: str = field(default_factory=lambda: f"{date.today()}, {machine()}")

    def markdown(self) -> str:
        versions = "".join(f", {name} {version}" for name, version in self.versions.items())
        head = f"# {self.title}\n\n`{self.command}`, {self.made}{versions}.\n"
        picture = f"![Median ratios with their 95 % intervals]({self.name}.png)\n"
        return "\n".join([head, *([picture] if self.tables else []), *(t.markdown() for t in self.tables), self.more])

    def save(self, folder: Path = FOLDER) -> None:
        """`NAME.json`, `NAME.md` and `NAME.png`."""
        folder.mkdir(parents=True, exist_ok=True)
        if self.tables:
            draw(self.tables, folder / f"{self.name}.png")
        (folder / f"{self.name}.md").write_text(self.markdown().rstrip() + "\n", encoding="utf-8")
        # last: that it is there says that the benchmark has come to its end
        (folder / f"{self.name}.json").write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")


def draw(tables: Sequence[Table], path: Path) -> None:
    """One panel for each workload: every arm's median ratio with its interval, and the baseline as a line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    alike: dict[str, list[str]] = {}  # tables with one baseline show the same arms
    for table in tables:
        shown = alike.setdefault(table.baseline, [])
        shown += [arm for arm in table.arms if arm not in shown]
    most = max(map(len, alike.values()))
    columns = min(3, len(tables))
    rows = -(-len(tables) // columns)
    figure, axes = pyplot.subplots(
        rows, columns, figsize=(4.2 * columns, (0.8 + 0.28 * most) * rows), squeeze=False, layout="constrained"
    )
    for panel, axis in enumerate(axes.flat):
        if panel >= len(tables):
            axis.set_axis_off()
            continue
        table = tables[panel]
        beside = panel % columns and table.baseline == tables[panel - 1].baseline
        _panel(axis, table, alike[table.baseline], labelled=not beside)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _panel(axis: Any, table: Table, arms: Sequence[str], labelled: bool) -> None:
    for name, ratio in table.arms.items():
        y = arms.index(name)
        low, high = ratio.interval
        color = "#888888" if name == table.baseline else "#0072b2"
        axis.plot([low, high], [y, y], color=color, linewidth=2.5, solid_capstyle="butt")
        axis.plot(ratio.median, y, "o", color=color, markersize=5)
    axis.axvline(1, color="#888888", linewidth=0.8, zorder=0)
    axis.set_yticks(range(len(arms)), arms if labelled else [""] * len(arms))
    axis.set_ylim(len(arms) - 0.5, -0.5)
    axis.set_title("\n".join(textwrap.wrap(table.title, 44)), fontsize=9)
    axis.set_xlabel("time, as a ratio to the first arm", fontsize=8)
    axis.tick_params(labelsize=8)
