"""Interleaved timing: arms take turns within each round, and what is reported is ratios to the first arm."""

from __future__ import annotations

import argparse
import platform
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import transformers
from tqdm import tqdm


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
            started = time.perf_counter()
            own = arms[name]()
            times[name].append(time.perf_counter() - started if own is None else own)
    return {name: _ratio(each, times[baseline], rng) for name, each in times.items()}


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


def machine() -> str:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU threads"
    return (
        f"{platform.system()} {platform.machine()}, {device}; Python {platform.python_version()}, "
        f"torch {torch.__version__}, transformers {transformers.__version__}"
    )
