"""What a request's shift does to a threshold, and what `clamp` does: the laws of both, one number at a time, in
float64."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from steer.direction import MAX_VALUE, Direction
from steer.errors import SpecError, UnsupportedModel
from steer.hf.steering import Steering
from steer.names import MAX_SHIFT, SHIFTING, Mode
from steer.runtime import op
from steer.runtime.bank import DirectionBank, HookPoint, gather, operate
from steer.runtime.op import SPREAD, coefficients
from steer.runtime.token_index import TokenIndex
from steer.shape import Shape
from steer.spec import Entry, Spec
from tests import models

law = settings(deadline=None, max_examples=40)
MODEL = models.tiny("llama")
POINT = HookPoint("resid_post", 1)
SEEDS = st.integers(0, 2**31)
SHIFTS = st.floats(-MAX_SHIFT, MAX_SHIFT)


def stream(seed: int = 0, tokens: int = 30) -> Tensor:
    return 2 * torch.randn(tokens, models.D_MODEL, generator=torch.Generator().manual_seed(seed))


def acted(x: Tensor, direction: Direction, *entries: Entry) -> Tensor:
    bank = DirectionBank([POINT], rows=4, rank=4, d_model=models.D_MODEL)
    bank.load("d", direction)
    index = TokenIndex(4, len(x), "cpu")
    index.fill_with([bank.steer(Spec(entries))], [len(x)])
    packed = operate(x, gather(bank.slices[POINT], *index.first(len(x))))[0]
    acting, *how = index.acting(len(x))
    eager = operate(x, gather(bank.slices[POINT], *acting, *how))[0]
    assert torch.equal(eager, packed), "an eager pass, which leaves out what does not act"
    return packed


def entry(mode: Mode, shift: float | None = None, strength: float = 1.0) -> Entry:
    return Entry("d", "d", mode, strength, shift=shift)


def made(k: int = 1, **changes: Any) -> Direction:
    return replace(models.direction(MODEL, k=k, plane=k == 1), **changes)


def ends(direction: Direction) -> tuple[Tensor, Tensor]:
    """The components of the harmless and of the harmful mean, `[k]` each, float64."""
    rows = direction.directions[POINT.layer].double()
    return rows @ direction.mean_harmless[POINT.layer].double(), rows @ direction.mean_harmful[POINT.layer].double()


def thresholds(direction: Direction, share: float, target: float | None) -> Direction:
    """The same with the gate and the target at these shares of the way between the means."""
    means = torch.stack([direction.mean_harmless, direction.mean_harmful]).double()
    rows = direction.directions.double()
    low, high = torch.einsum("lkd,mld->mlk", rows, means)
    rows, low, high = (  # to the harmful mean
        torch.where((high < low)[..., None], -rows, rows),
        torch.where(high < low, -low, low),
        torch.where(high < low, -high, high),
    )
    reference, to = ((low + at * (high - low)).float() for at in (share, target or 0.0))
    return replace(direction, directions=rows.float(), reference=reference, target=None if target is None else to)


@given(SEEDS, SHIFTS, st.floats(0, 1.5), st.sampled_from([1, 3]), st.sampled_from([None, 0.0, -0.5]))
@law
def test_a_shifted_one_sided_is_the_file_with_another_threshold(
    seed: int, shift: float, strength: float, k: int, target: float | None
) -> None:
    """One number at a time: above ρ + σ·Δ a component goes to the least of that and the target, or, where the file has
    none, to that; by its strength's share."""
    direction, x = thresholds(made(k), 0.25, target), stream(seed)
    harmless, harmful = ends(direction)
    y = acted(x, direction, entry("one_sided", shift, strength))
    for j, row in enumerate(direction.directions[POINT.layer].double()):
        gate = float(harmless[j] + (0.25 + shift) * (harmful[j] - harmless[j]))
        goal = gate if target is None else min(gate, float(harmless[j] + target * (harmful[j] - harmless[j])))
        for before, after in zip((x.double() @ row).tolist(), (y.double() @ row).tolist(), strict=True):
            if abs(before - gate) > 1e-4:
                expected = before + strength * (goal - before) if before > gate else before
                assert math.isclose(after, expected, abs_tol=1e-3), (before, gate, goal)
                assert after <= before + 1e-3 or strength > 1, "never towards the behaviour"


@given(SEEDS, SHIFTS, st.floats(0, 1), st.sampled_from([1, 3]))
@law
def test_clamp_keeps_a_component_between_the_class_means(seed: int, shift: float, strength: float, k: int) -> None:
    """Shifted, both bounds move apart or towards each other, up to the middle. What is inside keeps its bits."""
    direction, x = made(k), stream(seed)
    y, rows = acted(x, direction, entry("clamp", shift, strength)), direction.directions[POINT.layer].double()
    low, high = torch.stack(ends(direction)).sort(0).values
    middle, by = (low + high) / 2, shift * (high - low)
    low, high = torch.minimum(low - by, middle), torch.maximum(high + by, middle)
    c = x.double() @ rows.T
    expected = c + strength * (torch.minimum(torch.maximum(c, low), high) - c)
    torch.testing.assert_close(y.double() @ rows.T, expected, rtol=0, atol=1e-3)
    inside = ((c > low + 1e-4) & (c < high - 1e-4)).all(-1)
    assert torch.equal(y[inside], x[inside])


@pytest.mark.parametrize("mode", SHIFTING)
def test_a_shift_of_0_is_none_and_one_beyond_everything_is_plain(mode: Mode) -> None:
    """Up to the bits; and the mode alone does something."""
    far = made().mean_harmful + 1e4 * made().directions[:, 0]
    direction, x = made(), stream()
    plain = acted(x, direction, entry(mode))
    assert not torch.equal(plain, x)
    assert torch.equal(acted(x, direction, entry(mode, 0.0)), plain)
    assert torch.equal(acted(x, direction, entry(mode, 1e-46)), plain), "nothing in float32"
    if mode == "rotate_one_sided":  # no angle is beyond half a turn
        far = made().mean_harmful
        direction = replace(direction, angles=torch.tensor([3.0, 0.0]).repeat(models.LAYERS, 1))
    assert torch.equal(acted(x, replace(direction, mean_harmful=far), entry(mode, 2.0)), x)


@pytest.mark.parametrize("k", [1, 3])
def test_a_threshold_lowered_by_its_share_stands_at_the_harmless_mean(k: int) -> None:
    x = stream()
    one, other = thresholds(made(k), 0.25, None), thresholds(made(k), 0.0, None)
    torch.testing.assert_close(
        acted(x, one, entry("one_sided", -0.25)), acted(x, other, entry("one_sided")), rtol=0, atol=1e-4
    )


@given(SEEDS, SHIFTS)
@law
def test_a_shifted_rotation_is_the_file_with_another_angle(seed: int, shift: float) -> None:
    direction, x = made(), stream(seed)
    assert direction.axis is not None
    assert direction.angles is not None
    plane = torch.stack([direction.axis[POINT.layer], direction.directions[POINT.layer, 0]]).double()
    means = (direction.mean_harmless, direction.mean_harmful)
    angles = [math.atan2(*reversed((plane @ mean[POINT.layer].double()).tolist())) for mean in means]
    gate, target = direction.angles[0].tolist()
    apart = abs(angles[1] - angles[0])
    gate += shift * min(apart, 2 * math.pi - apart)
    other = replace(direction, angles=torch.tensor([gate, min(target, gate)]).repeat(models.LAYERS, 1))
    clear = (torch.atan2(x.double() @ plane[1], x.double() @ plane[0]) - gate).abs() > 1e-4
    y, expected = acted(x, direction, entry("rotate_one_sided", shift)), acted(x, other, entry("rotate_one_sided"))
    torch.testing.assert_close(y[clear], expected[clear], rtol=0, atol=1e-3)
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1))


@given(SHIFTS)
@law
def test_a_row_without_a_side_stays_without_one(shift: float) -> None:
    no_side = torch.full((models.LAYERS, 1), MAX_VALUE)
    angles = torch.tensor([MAX_VALUE, 0.0]).repeat(models.LAYERS, 1)
    direction, x = made(reference=no_side, angles=angles), stream()
    for mode in ("one_sided", "rotate_one_sided"):
        assert torch.equal(acted(x, direction, entry(mode, shift)), x)


def test_before_block_0_a_shift_does_nothing() -> None:
    """Where a mode has no coefficients there is no gate to move."""
    direction, x, point = models.direction(MODEL, embedding=True), stream(), HookPoint("resid_post", -1)
    bank = DirectionBank([point], rows=1, rank=1, d_model=models.D_MODEL)
    bank.load("d", direction)
    for mode in ("one_sided", "clamp"):
        index = TokenIndex(1, len(x), "cpu")
        index.fill_with([bank.steer(Spec((entry(mode, -1.0),)))], [len(x)])
        y, lost = operate(x, gather(bank.slices[point], *index.first(len(x))))
        assert torch.equal(y, x)
        assert not lost.any()


@pytest.mark.parametrize(("mode", "shift"), [("clamp", None), ("one_sided", 0.5)])
def test_means_that_differ_beside_the_rows_alone_are_no_contrast(mode: Mode, shift: float | None) -> None:
    """Then there is no distance to move a threshold by, and a clamp would hold the component at one number."""
    direction, shape = made(), Shape("LlamaForCausalLM", models.LAYERS, models.D_MODEL, frozenset({"resid_post"}), 4)
    shape.check_entry(direction, entry(mode, shift))
    apart = direction.mean_harmful - direction.mean_harmless
    along = torch.einsum("lkd,ld->lk", direction.directions, apart)
    beside = direction.mean_harmful - torch.einsum("lk,lkd->ld", along, direction.directions)
    assert (beside != direction.mean_harmless).any(1).all()
    with pytest.raises(SpecError):
        shape.check_entry(replace(direction, mean_harmful=beside), entry(mode, shift))


def test_angles_on_both_sides_of_half_a_turn_are_near_each_other() -> None:
    direction = made()
    assert direction.axis is not None
    first, last = (
        math.cos(angle) * direction.axis + math.sin(angle) * direction.directions[:, 0]
        for angle in (math.pi - 0.1, 0.1 - math.pi)
    )
    values = coefficients(replace(direction, mean_harmless=first, mean_harmful=last), "rotate_one_sided")
    torch.testing.assert_close(values[..., SPREAD], torch.full_like(values[..., SPREAD], 0.2), rtol=0, atol=1e-4)


def test_a_model_on_which_nothing_is_shifted_is_not_steered(monkeypatch: pytest.MonkeyPatch) -> None:
    Steering(models.tiny("llama"), rank=1)
    monkeypatch.setattr(op, "shifted", lambda coefficients, _shift: coefficients)
    with pytest.raises(UnsupportedModel, match=r"at a shift the next module gets -?0\.00 of the change"):
        Steering(models.tiny("llama"))
