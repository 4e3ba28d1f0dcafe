"""Intervals and tests of what was counted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value with the ends of its 95 % interval."""

    value: float
    low: float
    high: float


def wilson(hits: int, count: int, z: float = 1.959964) -> tuple[float, float]:
    """The Wilson score interval of a rate, 95 % by default. Source: Wilson 1927."""
    if count == 0:
        return 0.0, 1.0
    p, zz = hits / count, z * z / count
    middle, half = p + zz / 2, z * math.sqrt(p * (1 - p) / count + zz / (4 * count))
    # the rate itself is always inside, which rounding could deny at 0 and 1
    return max(0.0, min(p, (middle - half) / (1 + zz))), min(1.0, max(p, (middle + half) / (1 + zz)))


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> float:
    """The two-sided exact p-value of the hypothesis that two arms have the same rate, from their outcomes on the same
    prompts: pairs that differ are as likely to differ one way as the other. Source: McNemar 1947, with the binomial
    distribution in place of its normal limit."""
    _check_pairs(first, second)
    gained = sum(b and not a for a, b in zip(first, second, strict=True))
    lost = sum(a and not b for a, b in zip(first, second, strict=True))
    differing = gained + lost
    tail = sum(math.comb(differing, k) for k in range(min(gained, lost) + 1))
    return min(1.0, float(Fraction(2 * tail, 2**differing)))


def difference_of_rates(first: Sequence[bool], second: Sequence[bool]) -> Estimate:
    """Rate of `second` − rate of `first`, outcomes on the same prompts. The interval has a width also where all pairs
    agree, which resampling would deny. Source: Newcombe 1998, "Improved confidence intervals for the difference between
    binomial proportions based on paired data", method 10."""
    _check_pairs(first, second)
    n = len(first)
    both = sum(a and b for a, b in zip(first, second, strict=True))
    ones = sum(second), sum(first)
    (p, q), ((low_p, high_p), (low_q, high_q)) = (hits / n for hits in ones), (wilson(hits, n) for hits in ones)
    margins = math.prod((hits * (n - hits)) for hits in ones)
    cross = both * n - ones[0] * ones[1]  # equals both × neither − one way × the other
    corrected = max(0.0, cross - n / 2) if cross > 0 else cross
    correlation = corrected / math.sqrt(margins) if margins else 0.0

    def reach(one: float, other: float) -> float:
        return math.sqrt(max(0.0, one * one - 2 * correlation * one * other + other * other))

    value = p - q
    return Estimate(
        value, max(-1.0, value - reach(p - low_p, high_q - q)), min(1.0, value + reach(high_p - p, q - low_q))
    )


def difference_of_means(
    first: Sequence[float], second: Sequence[float], *, resamples: int = 10_000, seed: int = 0
) -> Estimate:
    """Mean of `second` − mean of `first`, values on the same prompts, with the percentile interval of the paired
    bootstrap. Source: Efron and Tibshirani 1993, chapter 13."""
    _check_pairs(first, second)
    differences = np.asarray(second, dtype=np.float64) - np.asarray(first, dtype=np.float64)
    generator = np.random.default_rng(seed)
    count, means = len(differences), np.empty(resamples)
    step = max(1, 2**22 // count)
    for at in range(0, resamples, step):
        drawn = generator.integers(count, size=(min(step, resamples - at), count))
        means[at : at + step] = differences[drawn].mean(axis=1)
    low, high = np.quantile(means, (0.025, 0.975))
    return Estimate(float(differences.mean()), float(low), float(high))


#: The 0.975 quantile of Student's t with 1, 2, 3 … degrees of freedom.
T_975 = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281, 2.2010, 2.1788, 2.1604,
         2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860, 2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518,
         2.0484, 2.0452, 2.0423)  # fmt: skip


def over_seeds(values: Sequence[float]) -> Estimate:
    """The mean of values that were had independently of each other, such as one of each seed, with Student's interval;
    infinitely wide where there is one value. Beyond 31 values the quantile of 31 serves, which is a little too wide.
    Source: Student 1908.

    Raises ValueError for no values.
    """
    if not values:
        raise ValueError("an interval needs at least one value")
    count, mean = len(values), math.fsum(values) / len(values)
    if count == 1:
        return Estimate(mean, -math.inf, math.inf)
    variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
    half = T_975[min(count - 1, len(T_975)) - 1] * math.sqrt(variance / count)
    return Estimate(mean, mean - half, mean + half)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values that may be compared with one level though there are several of them, in the given order: the chance of
    any false finding stays below the level. Source: Holm 1979."""
    adjusted, worst = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        worst = max(worst, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = worst
    return adjusted


def cohens_kappa(first: Sequence[bool], second: Sequence[bool]) -> float | None:
    """Agreement of two judges of the same answers beyond what their rates alone would give: 1 is full agreement and 0
    that of chance. None where both gave every answer the same verdict, which leaves no chance to be better than.
    Source: Cohen 1960."""
    _check_pairs(first, second)
    n, p, q = len(first), sum(first) / len(first), sum(second) / len(first)
    agreed = sum(bool(a) == bool(b) for a, b in zip(first, second, strict=True)) / n
    by_chance = p * q + (1 - p) * (1 - q)
    return None if by_chance == 1 else (agreed - by_chance) / (1 - by_chance)


def _check_pairs(first: Sequence[object], second: Sequence[object]) -> None:
    if len(first) != len(second) or not len(first):
        raise ValueError(f"pairs are needed, and at least one: got {len(first)} and {len(second)} outcomes")
