"""Confidence intervals and hypothesis tests."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence, Sized
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from scipy import stats
from sklearn.metrics import cohen_kappa_score

T = TypeVar("T")
#: How many times a bootstrap draws.
RESAMPLES = 10_000


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value with the ends of its 95 % interval."""

    value: float
    low: float
    high: float


def undominated(candidates: Iterable[T], figures: Callable[[T], tuple[float, ...]]) -> list[T]:
    """The Pareto front for figures that should all be small: the candidates for which no other is as good in every
    figure. Sorted by their figures; of equal candidates the first."""
    found: list[T] = []
    # in this order a candidate can only be dominated by one before it
    for candidate in sorted(candidates, key=figures):
        mine = figures(candidate)
        if not any(all(a <= b for a, b in zip(figures(other), mine, strict=True)) for other in found):
            found.append(candidate)
    return found


def wilson(hits: int, count: int) -> tuple[float, float]:
    """The 95 % Wilson score interval of a rate. Source: Wilson 1927."""
    if count == 0:
        return 0.0, 1.0
    rate, interval = hits / count, stats.binomtest(hits, count).proportion_ci(method="wilson")
    # the rate is always inside the interval, but rounding could put it outside at 0 and 1
    return min(rate, float(interval.low)), max(rate, float(interval.high))


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> float:
    """The two-sided exact p-value of the hypothesis that two arms have the same rate, from their outcomes on the same
    prompts: pairs that differ are as likely to differ one way as the other. Source: McNemar 1947, with the binomial
    distribution in place of its normal limit."""
    _check_pairs(first, second)
    gained = sum(b and not a for a, b in zip(first, second, strict=True))
    lost = sum(a and not b for a, b in zip(first, second, strict=True))
    return float(stats.binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0


def rank_sum(first: Sequence[float], second: Sequence[float]) -> tuple[float, float]:
    """How often a value of `second` is above one of `first` (the area under the ROC curve; ties count half), and the
    two-sided p-value of the hypothesis that it is half of the time. Source: Mann and Whitney 1947."""
    found = stats.mannwhitneyu(second, first, alternative="two-sided")
    return float(found.statistic) / (len(first) * len(second)), float(found.pvalue)


def difference_of_rates(first: Sequence[bool], second: Sequence[bool]) -> Estimate:
    """Rate of `second` − rate of `first`, outcomes on the same prompts. Even if all pairs agree the interval has a
    width, unlike one by resampling. Source: Newcombe 1998, "Improved confidence intervals for the difference between
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


def mean_of_rates(first: Sequence[bool], second: Sequence[bool]) -> Estimate:
    """The mean of two rates of different prompts; of the right decisions in two classes it is the balanced accuracy.
    Source: Newcombe 1998, "Interval estimation for the difference between independent proportions", method 10, whose
    squares add up for a sum too."""
    (p, (low_p, high_p)), (q, (low_q, high_q)) = (
        (sum(each) / len(each), wilson(sum(each), len(each))) for each in (first, second)
    )
    value = (p + q) / 2
    return Estimate(value, value - math.hypot(p - low_p, q - low_q) / 2, value + math.hypot(high_p - p, high_q - q) / 2)


def difference_of_means(first: Sequence[float] | np.ndarray, second: Sequence[float] | np.ndarray) -> Estimate:
    """Mean of `second` − mean of `first`, values on the same prompts, with the percentile interval of the paired
    bootstrap. Source: Efron and Tibshirani 1993, chapter 13."""
    _check_pairs(first, second)
    pairs = np.asarray(second, dtype=np.float64), np.asarray(first, dtype=np.float64)
    return mean_of(pairs[0] - pairs[1])


def ratio_of_means(first: Sequence[float] | np.ndarray, second: Sequence[float] | np.ndarray) -> Estimate:
    """Mean of `second` ÷ mean of `first`, positive values on the same prompts, with the percentile interval of the
    paired bootstrap, which that of the logarithm is too. Source: Efron and Tibshirani 1993, chapter 13."""
    _check_pairs(first, second)
    pairs = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    drawn = np.random.default_rng(0).integers(len(pairs[0]), size=(RESAMPLES, len(pairs[0])))
    ratios = pairs[1][drawn].mean(axis=1) / pairs[0][drawn].mean(axis=1)
    low, high = np.percentile(ratios, [2.5, 97.5])
    return Estimate(float(pairs[1].mean() / pairs[0].mean()), float(low), float(high))


def signed_rank(first: Sequence[float] | np.ndarray, second: Sequence[float] | np.ndarray) -> float:
    """The two-sided p-value of the hypothesis that values on the same prompts differ as often and as much one way as
    the other; equal pairs are left out. Source: Wilcoxon 1945, signed ranks."""
    _check_pairs(first, second)
    differences = np.asarray(second, dtype=np.float64) - np.asarray(first, dtype=np.float64)
    return float(stats.wilcoxon(differences).pvalue) if differences.any() else 1.0


def mean_of(values: Sequence[float] | np.ndarray) -> Estimate:
    """The mean of at least one value, with the percentile interval of the bootstrap. Source: Efron and Tibshirani 1993,
    chapter 13."""
    values = np.asarray(values, dtype=np.float64)
    mean = float(values.mean())
    if np.ptp(values) == 0:  # resampling changes nothing, and scipy gives no interval
        return Estimate(mean, mean, mean)
    found = stats.bootstrap(
        (values,),
        np.mean,
        n_resamples=RESAMPLES,
        batch=max(1, 2**22 // len(values)),
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return Estimate(mean, float(found.low), float(found.high))


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for their number, in the given order: if all are compared with one level, the chance of any
    false finding stays below it. Source: Holm 1979."""
    adjusted, worst = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        worst = max(worst, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = worst
    return adjusted


def cohens_kappa(first: Sequence[bool], second: Sequence[bool]) -> Estimate | None:
    """Agreement of two judges of the same answers beyond chance: 1 is full agreement, 0 is what their rates alone would
    give. None if both gave every answer the same verdict, for which it is not defined.

    The interval is the central credible interval: the shares of the four pairs of verdicts are drawn from their
    posterior distribution with the prior of Jeffreys. It has a width even if all agree. Sources: Cohen 1960, and Basu,
    Banerjee and Sen 2000, "Bayesian inference for kappa from single and multiple studies"."""
    _check_pairs(first, second)
    pairs = [(bool(a), bool(b)) for a, b in zip(first, second, strict=True)]
    if len({verdict for pair in pairs for verdict in pair}) == 1:
        return None
    kappa = float(cohen_kappa_score(*map(list, zip(*pairs, strict=True))))
    counts = [pairs.count((a, b)) + 0.5 for a in (False, True) for b in (False, True)]
    neither, other, one, both = np.random.default_rng(0).dirichlet(counts, RESAMPLES).T
    chance = (one + both) * (other + both) + (neither + other) * (neither + one)
    low, high = np.quantile((neither + both - chance) / (1 - chance), (0.025, 0.975))
    return Estimate(kappa, min(float(low), kappa), max(float(high), kappa))


def _check_pairs(first: Sized, second: Sized) -> None:
    if len(first) != len(second) or not len(first):
        raise ValueError(f"pairs are needed, and at least one: got {len(first)} and {len(second)} outcomes")
