"""How benchmarks time, arms by turns within each round, with ratios to the first arm; and what one found, as people
read it and as programs do: Markdown, JSON and a picture of the same figures."""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import re
import signal
import statistics
import sys
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm import tqdm

#: Where results are kept; what is committed was measured with the command that it names.
FOLDER = Path(__file__).parents[1] / "docs" / "benchmarks"


@dataclass(frozen=True, slots=True)
class Ratio:
    """An arm's time over the baseline's in the same round: median, quartiles, bootstrap interval of the median."""

    median: float
    low: float
    high: float
    interval: tuple[float, float]
    seconds: float
    ratios: tuple[float, ...]

    def row(self, name: str) -> str:
        return (
            f"| {name} | {self.median:.4f} | {self.interval[0]:.4f} – {self.interval[1]:.4f} | "
            f"{self.low:.4f} – {self.high:.4f} | {1000 * self.seconds:.2f} |"
        )


def rounds(text: str) -> int:
    """For `--rounds` of a command."""
    if not text.isdigit() or int(text) < 2:
        raise argparse.ArgumentTypeError(f"'{text}' is not a number of rounds: 2 or more, for quartiles")
    return int(text)


#: In the environment, for child processes too: `--busy` was given.
BUSY = "STEER_BENCHMARK_BUSY"
BUSY_HELP = "other work runs on this machine: count CPU time"
COUNTED = "Times are the CPU time of the process with all its threads, since other work ran on the machine."


def now() -> float:
    """Seconds, to take differences of: of a clock, or with BUSY the CPU time of this process with all its threads."""
    return time.process_time() if BUSY in os.environ else time.perf_counter()


HEADER = "| arm | median ratio | 95 % interval of the median | quartiles | median ms |\n|---|---:|---:|---:|---:|"


def interleave(arms: Mapping[str, Callable[[], float | None]], rounds: int, title: str) -> dict[str, Ratio]:
    """Time every arm once a round, in an order drawn anew each round. The first arm is the baseline.

    An arm that returns a number has taken its own time, in seconds."""
    baseline = next(iter(arms))
    times: dict[str, list[float]] = {name: [] for name in arms}
    rng = random.Random(0)
    for run in arms.values():
        run()
    for _ in tqdm(range(rounds), desc=title, leave=False):
        for name in rng.sample(list(arms), len(arms)):
            started = now()
            own = arms[name]()
            times[name].append(now() - started if own is None else own)
    return {name: _ratio(each, times[baseline], rng) for name, each in times.items()}


def median_seconds(run: Callable[[], object], repeats: int, inner: int = 1) -> float:
    """Of one call, after a first one that is not counted; `inner` calls are timed together."""
    run()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        for _ in range(inner):
            run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append((time.perf_counter() - began) / inner)
    return statistics.median(times)


def _ratio(times: list[float], baseline: list[float], rng: random.Random) -> Ratio:
    ratios = tuple(t / b for t, b in zip(times, baseline, strict=True))
    low, median, high = statistics.quantiles(ratios, n=4)
    return Ratio(median, low, high, _interval([ratios], rng), statistics.median(times), ratios)


def pooled(parts: Sequence[Ratio]) -> Ratio:
    """One ratio of several runs between which the conditions were turned around: the geometric mean of their medians,
    with a bootstrap interval of that, rounds drawn within each run."""
    everything = tuple(ratio for part in parts for ratio in part.ratios)
    low, _, high = statistics.quantiles(everything, n=4)
    middle = statistics.geometric_mean([part.median for part in parts])
    seconds = statistics.median([part.seconds for part in parts])
    interval = _interval([part.ratios for part in parts], random.Random(0))
    return Ratio(middle, low, high, interval, seconds, everything)


def _interval(runs: Sequence[Sequence[float]], rng: random.Random) -> tuple[float, float]:
    """95 % of the geometric mean of the runs' medians, by 1000 bootstrap draws."""
    drawn = sorted(
        statistics.geometric_mean([statistics.median(rng.choices(run, k=len(run))) for run in runs])
        for _ in range(1000)
    )
    return drawn[25], drawn[974]


def processor() -> str:
    """The processor's name; that of its kind where the system has no `/proc`."""
    path = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*:\s*(.*\S)", path.read_text(), re.MULTILINE) if path.exists() else []
    return names[0] if names else platform.machine()


def machine() -> str:
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return (
        f"{platform.system()} {platform.machine()}, {torch.get_num_threads()} CPU threads of {processor()}{gpu}; "
        f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}"
    )


def typed(argv: Sequence[str]) -> str:
    """A module and its options as they are typed, without the folder of results."""
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

    def save(self, folder: Path) -> None:
        """`NAME.json`, `NAME.md` and `NAME.png`."""
        folder.mkdir(parents=True, exist_ok=True)
        if self.tables:
            draw(self.tables, folder / f"{self.name}.png")
        (folder / f"{self.name}.md").write_text(self.markdown().rstrip() + "\n", encoding="utf-8")
        # last: that it is there says that the benchmark has come to its end
        (folder / f"{self.name}.json").write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    def publish(self, folder: Path) -> None:
        """Save it, and print its page."""
        self.save(folder)
        print(self.markdown())


def ended_as_by_ctrl_c() -> None:
    """Have SIGTERM end this process as Ctrl-C does, with what it has started; also where a shell ignores Ctrl-C."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.default_int_handler)


def benchmark_parser(about: str | None) -> argparse.ArgumentParser:
    """The options of a benchmark; the caller adds its own. From here on it can be ended, see `ended_as_by_ctrl_c`."""
    ended_as_by_ctrl_c()
    shown = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(typed(own_argv()[:1]), description=about, formatter_class=shown)
    parser.add_argument("--out", type=Path, default=FOLDER, help="the folder for results")
    return parser


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
