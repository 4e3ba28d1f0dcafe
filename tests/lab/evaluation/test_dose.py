"""A strength that has the dose is found in few tries, whatever curve the KL is; where there is none, that is told."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steer.lab.evaluation.run import NEAR, TRIES, strength_at
from steer.names import MAX_STRENGTH


@given(st.floats(1e-3, 5.0), st.floats(1.0, 4.0), st.floats(1e-3, 2.0))
def test_a_power_of_the_strength_is_solved(scale: float, power: float, dose: float) -> None:
    tried: list[float] = []

    def kl(strength: float) -> float:
        tried.append(strength)
        assert 0 < strength <= MAX_STRENGTH
        return scale * strength**power

    found = strength_at(dose, kl)
    assert len(tried) == len(set(tried)) <= TRIES
    if kl(MAX_STRENGTH) < dose * (1 - NEAR):
        assert found is None
    else:
        assert found is not None
        assert kl(found) == pytest.approx(dose, rel=0.1)


@pytest.mark.parametrize("dose", [0.001, 0.01, 0.05, 0.5])
def test_curves_that_saturate_fall_or_are_not_finite_are_solved_too(dose: float) -> None:
    for curve in (
        lambda s: 0.6 * (1 - math.exp(-(s**2))),
        lambda s: 0.6 * math.sin(s) ** 2,
        lambda s: math.inf if s > 0.9 else s**2,
        lambda s: max(0.0, s - 0.4) ** 3,
    ):
        found = strength_at(dose, curve)
        assert found is not None
        assert curve(found) == pytest.approx(dose, rel=0.2)


def test_what_does_nothing_has_no_dose() -> None:
    assert strength_at(0.01, lambda _: 0.0) is None


def test_a_dose_that_is_jumped_over_or_not_reached_is_not_said_to_be_had() -> None:
    assert strength_at(0.05, lambda s: 0.001 if s < 1.3 else 5.0) is None
    assert strength_at(0.08, lambda s: 0.048 * (1 - math.exp(-s))) is None
