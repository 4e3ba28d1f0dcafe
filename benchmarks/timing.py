"""Interleaved timing: arms take turns within each round, and what is reported is ratios to the first arm."""

from __future__ import annotations

import platform
import random
import statistics
import time
from collections.abc import Callable, Mapping
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

    def row(self, name: str) -> str:
        return (
            f"| {name} | {self.median:.4f} | {self.interval[0]:.4f} – {self.interval[1]:.4f} | "
            f"{self.low:.4f} – {self.high:.4f} | {1000 * self.seconds:.2f} |"
        )


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
    ratios = [t / b for t, b in zip(times, baseline, strict=True)]
    medians = sorted(statistics.median(rng.choices(ratios, k=len(ratios))) for _ in range(1000))
    low, median, high = statistics.quantiles(ratios, n=4)
    return Ratio(median, low, high, (medians[25], medians[974]), statistics.median(times))


def machine() -> str:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU threads"
    return (
        f"{platform.system()} {platform.machine()}, {device}; Python {platform.python_version()}, "
        f"torch {torch.__version__}, transformers {transformers.__version__}"
    )
