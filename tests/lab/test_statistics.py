"""Intervals hold what they are of, tests agree with the published ones, corrections never make a finding of nothing."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from steer.lab.statistics import (
    cohens_kappa,
    difference_of_means,
    difference_of_rates,
    holm,
    mcnemar,
    ratio_of_means,
    signed_rank,
    wilson,
)

pairs = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=80)


def outcomes(cells: list[tuple[bool, bool]]) -> tuple[list[bool], list[bool]]:
    return [a for a, _ in cells], [b for _, b in cells]


def table(both: int, first: int, second: int, neither: int) -> tuple[list[bool], list[bool]]:
    cells = [(True, True)] * both + [(True, False)] * first + [(False, True)] * second + [(False, False)] * neither
    return outcomes(cells)


@given(st.integers(0, 500), st.integers(1, 500))
def test_wilson_holds_the_rate_and_stays_in_bounds(hits: int, more: int) -> None:
    count = hits + more
    low, high = wilson(hits, count)
    assert 0 <= low <= hits / count <= high <= 1
    assert wilson(2 * hits, 2 * count)[1] - wilson(2 * hits, 2 * count)[0] < high - low


def test_wilson_is_the_published_interval() -> None:
    # Newcombe 1998, table I: 15 of 148, and 1 of 29
    assert wilson(15, 148) == pytest.approx((0.0624, 0.1605), abs=1e-4)
    assert wilson(1, 29) == pytest.approx((0.0061, 0.1718), abs=1e-4)


@given(st.integers(0, 40), st.integers(0, 40), st.integers(0, 5))
def test_mcnemar_is_the_binomial_test_of_the_pairs_that_differ(lost: int, gained: int, same: int) -> None:
    first, second = table(same, lost, gained, same + 1)
    expected = binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
    assert mcnemar(first, second) == pytest.approx(expected, rel=1e-9)
    assert mcnemar(first, second) == mcnemar(second, first)


@given(pairs)
def test_a_difference_of_rates_turns_round_with_its_arms(cells: list[tuple[bool, bool]]) -> None:
    first, second = outcomes(cells)
    one, other = difference_of_rates(first, second), difference_of_rates(second, first)
    assert one.value == pytest.approx(np.mean(second) - np.mean(first))
    assert -1 <= one.low <= one.value + 1e-12
    assert one.value - 1e-12 <= one.high <= 1
    assert (one.low, one.high) == pytest.approx((-other.high, -other.low))
    # never the zero width that resampling gives where all pairs agree
    assert one.high > one.low


def test_a_difference_of_rates_covers_what_is_true() -> None:
    """Of correlated pairs with a known difference, 95 % of the intervals hold it, and not many more do."""
    generator, held, trials = np.random.default_rng(0), 0, 600
    for _ in range(trials):
        cells = generator.multinomial(60, (0.5, 0.25, 0.05, 0.2))
        interval = difference_of_rates(*table(*map(int, cells)))
        held += interval.low <= -0.2 <= interval.high
    assert 0.925 <= held / trials <= 0.985


def test_pairing_tells_more_than_two_separate_rates() -> None:
    together = difference_of_rates(*table(40, 10, 0, 50))
    apart = difference_of_rates(*table(20, 30, 20, 30))
    assert together.value == apart.value
    assert together.high - together.low < apart.high - apart.low


def test_a_difference_of_means_covers_what_is_true() -> None:
    generator, held, trials = np.random.default_rng(1), 0, 300
    for _ in range(trials):
        first = generator.normal(size=60)
        interval = difference_of_means(first, first + generator.normal(0.3, 1, size=60))
        held += interval.low <= 0.3 <= interval.high
    assert 0.9 <= held / trials <= 0.985


def test_a_ratio_of_means_covers_what_is_true_and_ranks_tell_a_shift_from_none() -> None:
    generator, covered, shifted, same = np.random.default_rng(3), 0, 0, 0
    for _ in range(60):
        first = np.exp(generator.normal(size=60))
        second = first * np.exp(generator.normal(0.4, 0.3, size=60))
        interval = ratio_of_means(first, second)
        covered += interval.low <= np.exp(0.4 + 0.3**2 / 2) <= interval.high
        shifted += signed_rank(np.log(first), np.log(second)) < 0.05
        same += signed_rank(first, generator.permutation(first)) < 0.05
    assert covered >= 50
    assert shifted == 60
    assert same <= 9
    double = ratio_of_means(first, first * 2)
    assert (double.low, double.value, double.high) == pytest.approx((2, 2, 2))
    assert signed_rank(first, first) == 1


def test_a_difference_of_means_is_the_same_each_time_and_shifts_with_its_arms() -> None:
    generator = np.random.default_rng(2)
    first, second = generator.normal(size=20), generator.normal(size=20)
    one = difference_of_means(first, second)
    assert one == difference_of_means(first, second)
    moved = difference_of_means(first, second + 3)
    assert (moved.value, moved.low, moved.high) == pytest.approx((one.value + 3, one.low + 3, one.high + 3))
    same = difference_of_means(first, first)
    assert (same.value, same.low, same.high) == (0, 0, 0)


def test_holm_is_the_published_example() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


@given(st.lists(st.floats(0, 1), max_size=12))
def test_holm_is_between_no_correction_and_bonferroni_and_keeps_the_order(p_values: list[float]) -> None:
    adjusted = holm(p_values)
    for before, after in zip(p_values, adjusted, strict=True):
        assert before <= after <= min(1.0, len(p_values) * before + 1e-12)
    order = np.argsort(p_values, kind="stable")
    assert all(np.diff(np.array(adjusted)[order]) >= 0)


@given(pairs)
def test_kappa_is_one_for_full_agreement_and_never_more(cells: list[tuple[bool, bool]]) -> None:
    first, second = outcomes(cells)
    kappa, full = cohens_kappa(first, second), cohens_kappa(first, first)
    assert kappa is None or -1 <= kappa.value <= 1 + 1e-12
    assert full is None or full.value == pytest.approx(1)


def test_kappa_is_zero_by_chance_and_unknown_without_any() -> None:
    chance, usual = cohens_kappa(*table(25, 25, 25, 25)), cohens_kappa(*table(20, 5, 10, 15))
    assert chance is not None
    assert usual is not None
    assert (chance.value, usual.value) == pytest.approx((0, 0.4))  # the usual worked example
    assert cohens_kappa(*table(9, 0, 0, 0)) is None


@given(pairs)
def test_the_interval_of_kappa_holds_it_and_has_a_width(cells: list[tuple[bool, bool]]) -> None:
    kappa = cohens_kappa(*outcomes(cells))
    assert kappa is None or (-1 <= kappa.low < kappa.high <= 1 and kappa.low <= kappa.value <= kappa.high)


def test_the_interval_of_kappa_narrows_with_more_answers_and_covers() -> None:
    found = [cohens_kappa(*table(20 * n, 5 * n, 10 * n, 15 * n)) for n in (1, 16)]
    few, many = (each.high - each.low for each in found if each)
    assert many == pytest.approx(few / 4, rel=0.1)
    drawn = np.random.default_rng(0).multinomial(40, (0.4, 0.1, 0.2, 0.3), 200)  # a kappa of 0.4
    held = [each.low <= 0.4 <= each.high for cells in drawn if (each := cohens_kappa(*table(*cells)))]
    assert sum(held) >= 0.9 * len(held)


@pytest.mark.parametrize("function", [mcnemar, difference_of_rates, difference_of_means, cohens_kappa])
def test_what_is_not_paired_is_refused(function) -> None:  # type: ignore[no-untyped-def]
    for first, second in (([True], [True, False]), ([], [])):
        with pytest.raises(ValueError, match="pairs"):
            function(first, second)
