"""The one operation, against its formula written out for single numbers."""

from __future__ import annotations

import math
from random import Random

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from steer.runtime.op import COEFFICIENTS, FLOOR, GAMMA, GATE, TARGET, WEIGHT, displacements, joint
from tests.oracle import displacement

law = settings(deadline=None, max_examples=60)
SEEDS = st.integers(0, 2**32)
NUMBERS = st.floats(-5, 5)


def drawn(seed: int, tokens: int = 5, d_model: int = 16) -> tuple[Tensor, Tensor]:
    """Random x `[tokens, d_model]` and a unit v, float64."""
    generator = torch.Generator().manual_seed(seed)
    x = 3 * torch.randn(tokens, d_model, generator=generator, dtype=torch.float64)
    v = torch.randn(d_model, generator=generator, dtype=torch.float64)
    return x, v / v.norm()


def row(*, target: float = 0.0, gate: float = -math.inf, weight: float = 0.0, gamma: float = 0.0) -> Tensor:
    out = torch.zeros(COEFFICIENTS, dtype=torch.float64)
    out[FLOOR] = -math.inf
    out[TARGET], out[GATE], out[WEIGHT], out[GAMMA] = target, gate, weight, gamma
    return out


ABLATE = row(weight=1.0)


def after(x: Tensor, v: Tensor, coefficients: Tensor, strength: float = 1.0) -> Tensor:
    return x + displacement(x, v, coefficients, strength)


@given(SEEDS, NUMBERS, NUMBERS, NUMBERS, st.sampled_from(["ablate", "one_sided", "affine", "add"]))
@law
def test_each_mode_is_its_line_of_the_table(seed: int, rho: float, weight: float, size: float, mode: str) -> None:
    """x' = x + s·(γ − w·(c − τ))·v where c = ⟨x, v⟩ is above the gate, one number at a time."""
    strength = 0.7
    coefficients, c_of, gamma = {
        "ablate": (row(weight=weight), lambda p: p, 0.0),
        "one_sided": (row(target=rho - 0.5, gate=rho, weight=weight), lambda p: p - rho + 0.5 if p > rho else 0.0, 0.0),
        "affine": (row(target=rho, weight=weight), lambda p: p - rho, 0.0),
        "add": (row(gamma=weight * size), lambda p: 0.0, weight * size),
    }[mode]
    x, v = drawn(seed)
    for given_x, made in zip(x, after(x, v, coefficients, strength), strict=True):
        component = sum(float(a) * float(b) for a, b in zip(given_x, v, strict=True))
        move = strength * (gamma - weight * c_of(component))
        expected = [float(a) + move * float(b) for a, b in zip(given_x, v, strict=True)]
        assert made.tolist() == pytest.approx(expected, abs=1e-9)


@given(SEEDS)
@law
def test_full_removal_leaves_no_component(seed: int) -> None:
    x, v = drawn(seed)
    assert float((after(x, v, ABLATE) @ v).abs().max()) < 1e-13


@given(SEEDS)
@law
def test_projecting_twice_is_projecting_once(seed: int) -> None:
    x, v = drawn(seed)
    once = after(x, v, ABLATE)
    torch.testing.assert_close(after(once, v, ABLATE), once, rtol=0, atol=1e-13)


@given(SEEDS, NUMBERS, NUMBERS)
@law
def test_strength_scales_what_is_left_and_touches_nothing_else(seed: int, strength: float, weight: float) -> None:
    x, v = drawn(seed)
    y = after(x, v, row(weight=weight), strength)
    torch.testing.assert_close(y @ v, (1 - strength * weight) * (x @ v), rtol=0, atol=1e-11)
    across = torch.eye(16, dtype=torch.float64) - torch.outer(v, v)
    torch.testing.assert_close(y @ across, x @ across, rtol=0, atol=1e-11)


@given(SEEDS, NUMBERS, NUMBERS)
@law
def test_the_sign_of_a_direction_means_nothing_to_ablate(seed: int, strength: float, weight: float) -> None:
    x, v = drawn(seed)
    assert torch.equal(after(x, v, row(weight=weight), strength), after(x, -v, row(weight=weight), strength))


@given(SEEDS, NUMBERS, NUMBERS)
@law
def test_one_sided_never_touches_what_is_not_above_rho(seed: int, rho: float, strength: float) -> None:
    x, v = drawn(seed, tokens=20)
    y = after(x, v, row(target=rho, gate=rho, weight=1.0), strength)
    below = x @ v <= rho
    assert torch.equal(y[below], x[below])
    above = after(x, v, row(target=rho, weight=1.0), strength)
    assert torch.equal(y[~below], above[~below]), "above ρ it is the two-sided removal"


@given(SEEDS)
@law
def test_one_sided_with_rho_0_is_ablate_on_the_positive_side(seed: int) -> None:
    x, v = drawn(seed, tokens=20)
    y = after(x, v, row(gate=0.0, weight=1.0))
    positive = x @ v > 0
    assert torch.equal(y[positive], after(x, v, ABLATE)[positive])
    assert torch.equal(y[~positive], x[~positive])


@given(SEEDS, NUMBERS, st.floats(0, 3), st.floats(-0.5, 1))
@law
def test_what_passes_the_gate_goes_to_the_target_and_nothing_else_moves(
    seed: int, gate: float, below: float, strength: float
) -> None:
    """By its strength's share of the way, whatever the component was."""
    x, v = drawn(seed, tokens=20)
    target = gate - below
    y, c = after(x, v, row(target=target, gate=gate, weight=1.0), strength), x @ v
    expected = torch.where(c > gate, c + strength * (target - c), c)
    torch.testing.assert_close(y @ v, expected, rtol=0, atol=1e-12)
    assert torch.equal(y[c <= gate], x[c <= gate])


def test_one_sided_at_exactly_rho_changes_nothing() -> None:
    v = torch.tensor([1.0, 0.0])
    x = torch.tensor([[2.0, 5.0]])
    assert torch.equal(after(x, v, row(target=1.0, gate=2.0, weight=1.0).float()), x)


@given(SEEDS, NUMBERS)
@law
def test_affine_moves_the_component_to_rho_from_both_sides(seed: int, rho: float) -> None:
    x, v = drawn(seed, tokens=20)
    y = after(x, v, row(target=rho, weight=1.0))
    torch.testing.assert_close(y @ v, torch.full((20,), rho, dtype=torch.float64), rtol=0, atol=1e-12)


@given(SEEDS, NUMBERS, NUMBERS)
@law
def test_add_moves_every_token_by_gamma_along_v(seed: int, gamma: float, strength: float) -> None:
    x, v = drawn(seed)
    moved = displacement(x, v, row(gamma=gamma), strength)
    torch.testing.assert_close(moved, (gamma * strength * v).expand_as(x), rtol=0, atol=1e-13)


@given(SEEDS, NUMBERS, NUMBERS, NUMBERS)
@law
def test_strength_0_and_a_row_of_zeros_add_nothing(seed: int, rho: float, weight: float, gamma: float) -> None:
    x, v = drawn(seed)
    coefficients = row(target=rho, weight=weight, gamma=gamma)
    assert not displacement(x, v, coefficients, 0.0).any()
    assert not displacement(x, torch.zeros_like(v), coefficients, 0.7).any()


@given(SEEDS)
@law
def test_tokens_are_treated_one_by_one(seed: int) -> None:
    """Every token with its own vector, coefficients and strength, in any batch shape."""
    generator = torch.Generator().manual_seed(seed)
    x, v = drawn(seed, tokens=6)[0], torch.randn(6, 16, generator=generator, dtype=torch.float64)
    coefficients = torch.randn(6, COEFFICIENTS, generator=generator, dtype=torch.float64)
    strengths = torch.randn(6, generator=generator, dtype=torch.float64)
    together = displacement(x, v, coefficients, strengths)
    for i in range(6):
        torch.testing.assert_close(
            together[i], displacement(x[i], v[i], coefficients[i], strengths[i]), rtol=0, atol=1e-12
        )
    shaped = displacement(x.view(2, 3, 16), v.view(2, 3, 16), coefficients.view(2, 3, -1), strengths.view(2, 3))
    torch.testing.assert_close(shaped.view(6, 16), together, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_dtype_is_that_of_x(dtype: torch.dtype) -> None:
    x, v = (t.to(dtype) for t in drawn(0))
    assert displacement(x, v, ABLATE.to(dtype), 1.0).dtype == dtype


def entries(draw: st.DrawFn) -> tuple[Tensor, Tensor, list[float]]:
    """Directions of rank 1 to 3 at any angle up to a cosine of 0.999, each in a mode: vectors `[n, 32]`, coefficients
    `[n, 6]`, strengths; float64."""
    generator = torch.Generator().manual_seed(draw(SEEDS))
    vectors: list[Tensor] = []
    rows, strengths = [], []
    for _ in range(draw(st.integers(1, 3))):
        new = torch.randn(draw(st.integers(1, 3)), 32, generator=generator, dtype=torch.float64)
        if vectors:
            other, cosine = vectors[-1], draw(st.floats(-0.999, 0.999))
            new[0] -= (new[0] @ other) * other
            new[0] = cosine * other + math.sqrt(1 - cosine**2) * new[0] / new[0].norm()
        basis = torch.linalg.qr(new.T)[0].T
        made = (
            row(weight=1.0),
            row(target=draw(NUMBERS), gate=draw(NUMBERS), weight=1.0),
            row(target=draw(NUMBERS), weight=1.0),
        )
        values, strength = draw(st.sampled_from([*made, row(gamma=draw(NUMBERS))])), draw(st.sampled_from(STRENGTHS))
        for v in basis:
            vectors.append(v)
            rows.append(values)
            strengths.append(strength)
    return torch.stack(vectors), torch.stack(rows), strengths


STRENGTHS = [1.0, 0.5, 0.35, -0.5, 1.7]
ENTRIES = st.composite(entries)()


@given(ENTRIES, SEEDS)
@law
def test_each_component_is_what_its_own_mode_and_strength_say(
    several: tuple[Tensor, Tensor, list[float]], seed: int
) -> None:
    vectors, values, strengths = several
    spectrum = torch.linalg.eigvalsh(vectors @ vectors.T)
    assume(float(spectrum[0]) > 2e-4 * float(spectrum[-1]))
    x = 3 * torch.randn(5, 32, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    y = x + displacements(x, vectors, values, strengths)
    for v, each, strength in zip(vectors, values, strengths, strict=True):
        if each[WEIGHT] != 0:
            torch.testing.assert_close(y @ v, after(x, v, each, strength) @ v, rtol=0, atol=2e-3)
    add = [i for i, each in enumerate(values) if each[WEIGHT] == 0]
    left = (y - x) - sum((displacement(x, vectors[i], values[i], strengths[i]) for i in add), torch.zeros_like(x))
    sets = vectors[[i for i in range(len(values)) if i not in add]]
    along = torch.linalg.pinv(sets, rtol=1e-3) @ sets if len(sets) else torch.zeros(32, 32, dtype=torch.float64)
    torch.testing.assert_close(left @ along, left, rtol=0, atol=2e-3, msg="the step is no longer than it must be")


@given(ENTRIES, SEEDS, st.randoms(use_true_random=False))
@law
def test_the_order_of_entries_means_nothing(
    several: tuple[Tensor, Tensor, list[float]], seed: int, random: Random
) -> None:
    vectors, values, strengths = several
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    order = list(range(len(strengths)))
    random.shuffle(order)
    other = displacements(x, vectors[order], values[order], [strengths[i] for i in order])
    torch.testing.assert_close(other, displacements(x, vectors, values, strengths), rtol=1e-4, atol=1e-3)


@given(SEEDS, st.floats(0, 1e-3))
@law
def test_what_is_removed_twice_is_removed_once(seed: int, angle: float) -> None:
    x, v = drawn(seed)
    near = v + angle * torch.nn.functional.normalize(drawn(seed + 1)[1], dim=0)
    twice = x + displacements(x, torch.stack([v, near / near.norm()]), torch.stack([ABLATE, ABLATE]), [1.0, 1.0])
    torch.testing.assert_close(twice, after(x, v, ABLATE), rtol=0, atol=angle * 20 + 1e-5)


@given(SEEDS, NUMBERS)
@law
def test_what_is_added_stays_out_of_what_is_removed(seed: int, gamma: float) -> None:
    x, v = drawn(seed)
    other = drawn(seed + 1)[1]
    y = x + displacements(x, torch.stack([other, v]), torch.stack([row(gamma=gamma), ABLATE]), [1.0, 1.0])
    assert float((y @ v).abs().max()) < 1e-5
    expected = after(x, v, ABLATE) + gamma * (other - (other @ v) * v)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-5)


@given(SEEDS)
@law
def test_orthogonal_entries_and_additions_take_the_identity(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.linalg.qr(torch.randn(16, 3, generator=generator, dtype=torch.float64))[0].T.float()
    assert torch.equal(joint(rows, torch.ones(3)), torch.eye(3))
    any_angle = torch.nn.functional.normalize(torch.randn(3, 16, generator=generator), dim=-1)
    assert torch.equal(joint(any_angle, torch.zeros(3)), torch.eye(3)), "additions do not disturb each other"
    assert not torch.equal(joint(any_angle, torch.ones(3)), torch.eye(3))


def test_an_entry_of_strength_0_holds_nothing() -> None:
    x, v = drawn(0)
    other = torch.nn.functional.normalize(v + drawn(1)[1], dim=0)
    beside = displacements(x, torch.stack([v, other]), torch.stack([ABLATE, ABLATE]), [1.0, 0.0])
    assert torch.equal(beside, displacement(x, v, ABLATE, 1.0))
