"""What the modes that turn do to the stream, against slerp as the article writes it."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import steer
from steer.direction import Direction
from steer.errors import DirectionError, SpecError, UnsupportedModel
from steer.geometry import angle, orthogonal_part, slerp_direction, unit
from steer.hf.steering import Steering
from steer.lab.fit import Choice
from steer.names import TURNING, Mode
from steer.runtime import op
from steer.runtime.bank import DirectionBank, HookPoint, gather, operate
from steer.runtime.token_index import TokenIndex
from steer.shape import check_mode
from steer.spec import Entry, Spec
from tests import models

law = settings(deadline=None, max_examples=50)
MODEL = models.tiny("llama")
MADE = models.direction(MODEL, plane=True)
assert MADE.axis is not None
assert MADE.angles is not None
ROW, AXIS, ANGLES = MADE.directions[0, 0].double(), MADE.axis[0].double(), MADE.angles[0].tolist()
STRENGTHS = st.floats(-3, 3)
SEEDS = st.integers(0, 2**31)
POINT = HookPoint("resid_post", 0)


def stream(seed: int = 0, tokens: int = 20) -> Tensor:
    """With much of it in the plane."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, models.D_MODEL, generator=generator, dtype=torch.float64)
    return (x + 4 * torch.randn(tokens, 2, generator=generator, dtype=torch.float64) @ torch.stack([AXIS, ROW])).float()


def acted(x: Tensor, *entries: tuple[Mode, float], direction: Direction = MADE) -> tuple[Tensor, Tensor]:
    """x after a request with these modes of `direction`, at layer 0, and which tokens are lost."""
    bank = DirectionBank([POINT], rows=2, rank=4, d_model=models.D_MODEL)
    bank.load("d", direction)
    index = TokenIndex(4, len(x), "cpu")
    index.fill_with([bank.steer(Spec(tuple(Entry("d", "d", mode, s) for mode, s in entries)))], [len(x)])
    return operate(x, gather(bank.slices[POINT], *index.first(len(x))))


def turned(x: Tensor, strength: float = 1.0, mode: Mode = "rotate") -> Tensor:
    return acted(x, (mode, strength))[0]


def angles(x: Tensor) -> Tensor:
    return torch.atan2(x.double() @ ROW, x.double() @ AXIS)


@given(SEEDS, STRENGTHS, st.sampled_from(TURNING), st.sampled_from([torch.float32, torch.bfloat16]))
@law
def test_the_length_is_kept(seed: int, strength: float, mode: Mode, dtype: torch.dtype) -> None:
    x = stream(seed).to(dtype)
    before, after = (y.double().norm(dim=-1) for y in (x, turned(x, strength, mode)))
    torch.testing.assert_close(after, before, rtol=4 * torch.finfo(dtype).eps, atol=0)


@given(SEEDS, st.floats(0, 1))
@law
def test_it_is_slerp_of_the_part_in_the_plane(seed: int, strength: float) -> None:
    """slerp(û, axis, s) = (sin((1 − s)α)·û + sin(sα)·axis) / sin α, in float64; what is outside of the plane stays."""
    x = stream(seed)
    pair = torch.stack([x.double() @ AXIS, x.double() @ ROW], -1)
    length = pair.norm(dim=-1, keepdim=True)
    u, end = pair / length, torch.tensor([1.0, 0.0], dtype=torch.float64)
    alpha = torch.acos(u @ end).unsqueeze(-1)
    clear = (alpha.sin() > 1e-2).squeeze(-1)
    slerped = length * (((1 - strength) * alpha).sin() * u + (strength * alpha).sin() * end) / alpha.sin()
    plane = torch.stack([AXIS, ROW])
    expected = x.double() + (slerped - pair) @ plane
    torch.testing.assert_close(turned(x, strength).double()[clear], expected[clear], rtol=1e-5, atol=1e-4)


@given(SEEDS)
@law
def test_at_strength_1_nothing_is_left_along_the_direction(seed: int) -> None:
    x = stream(seed)
    y = turned(x).double()
    assert float(((y @ ROW).abs() / x.double().norm(dim=-1)).max()) < 1e-6
    assert bool((y @ AXIS > 0).all())
    assert bool((turned(x, 1.0, "rotate_one_sided").double() @ ROW <= 1e-5 + (x.double() @ ROW).clamp_min(0)).all())


@given(SEEDS, st.floats(0, 1), st.floats(0, 1))
@law
def test_strengths_compose(seed: int, first: float, then: float) -> None:
    x = stream(seed)
    torch.testing.assert_close(
        turned(turned(x, first), then), turned(x, 1 - (1 - first) * (1 - then)), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("t", [-1.0, 0.0, 0.5, 1.0, 2.0])
def test_each_t_of_the_slerp_family_has_its_own_end(t: float) -> None:
    """The place in the plane of the means at which d(t) has no component: at tω/2 from the harmless mean."""
    a, h = torch.randn(2, 16, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    row, half = slerp_direction(a, h, t), t * angle(a, h) / 2
    axis = orthogonal_part(row, a)
    e = orthogonal_part(a, h)
    torch.testing.assert_close(axis, torch.cos(half) * unit(a) + torch.sin(half) * e)


@given(SEEDS, st.floats(0.1, 2))
@law
def test_one_sided_leaves_what_is_not_beyond_as_it_is_and_turns_the_rest(seed: int, strength: float) -> None:
    x = stream(seed)
    y, (gate, target) = turned(x, strength, "rotate_one_sided"), ANGLES
    before = angles(x)
    beyond = before > gate
    clear = (before - gate).abs() > 1e-5
    assert torch.equal(y[~beyond & clear], x[~beyond & clear])
    wanted = before + strength * (target - before)
    apart = torch.remainder(angles(y) - wanted + math.pi, 2 * math.pi) - math.pi
    assert float((apart * (beyond & clear)).abs().max()) < 1e-4


def test_beside_another_direction_both_have_what_they_ask_for() -> None:
    other, x = models.direction(MODEL, seed=7), stream()
    bank, index = DirectionBank([POINT], rows=3, rank=3, d_model=models.D_MODEL), TokenIndex(3, len(x), "cpu")
    bank.load("d", MADE)
    bank.load("o", other)
    made = []
    entries = (Entry("o", "o", "ablate", 1.0), Entry("d", "d", "rotate", 1.0))
    for step in (1, -1):
        index.fill_with([bank.steer(Spec(entries[::step]))], [len(x)])
        made.append(operate(x, gather(bank.slices[POINT], *index.first(len(x))))[0].double())
    assert torch.equal(*made), "the order means nothing"
    pair = torch.hypot(x.double() @ AXIS, x.double() @ ROW)
    assert float((made[0] @ other.directions[0, 0].double()).abs().max()) < 1e-4
    assert float((made[0] @ ROW).abs().max()) < 1e-4
    torch.testing.assert_close(made[0] @ AXIS, pair, rtol=1e-4, atol=1e-4)


def test_tokens_that_are_not_named_keep_their_bits() -> None:
    x, bank = stream(), DirectionBank([POINT], rows=2, rank=2, d_model=models.D_MODEL)
    bank.load("d", MADE)
    index = TokenIndex(2, len(x), "cpu")
    steered = bank.steer(Spec((Entry("d", "d", "rotate", 1.0, None, "not-first"),)), len(x))
    assert steered is not None
    index.fill(np.array([index.enter(steered)]), np.array([len(x)]), np.array([0]))
    y = operate(x, gather(bank.slices[POINT], *index.first(len(x))))[0]
    assert torch.equal(y[0], x[0])
    torch.testing.assert_close(y[1:], turned(x)[1:])


def test_what_is_not_finite_is_not_taken() -> None:
    x = stream()
    y, lost = acted(x, ("rotate", 1.0), direction=replace(MADE, weights=torch.full_like(MADE.weights, math.inf)))
    assert lost.all()
    assert torch.equal(y, x)


def test_gradients_of_plain_rows_are_those_of_a_plain_pass() -> None:
    x = stream(tokens=2).requires_grad_()
    bank, index = DirectionBank([POINT], rows=2, rank=2, d_model=models.D_MODEL), TokenIndex(2, 2, "cpu")
    bank.load("d", MADE)
    index.fill_with([None, bank.steer(Spec((Entry("d", "d", "rotate", 1.0),)))], [1, 1])
    y, _ = operate(x, gather(bank.slices[POINT], *index.first(2)))
    y.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad[0], torch.ones(models.D_MODEL))
    assert torch.isfinite(x.grad).all()


def test_a_model_on_which_nothing_turns_is_not_steered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op, "turn", lambda q, p, *_: (torch.zeros_like(q), torch.zeros_like(p)))
    with pytest.raises(UnsupportedModel, match=r"at a turn by half the next module gets 0\.00 of the change"):
        Steering(models.tiny("llama"))
    Steering(models.tiny("llama"), rank=1)  # where no request can turn anything


@pytest.mark.parametrize("mode", TURNING)
def test_a_request_that_cannot_be_turned_is_refused(mode: Mode) -> None:
    model, bare = models.tiny("llama"), models.direction(MODEL)
    check_mode(MADE, mode, "d")
    with pytest.raises(SpecError, match=f"'bare' holds no plane .* for the mode '{mode}'; its modes: ablate, add"):
        check_mode(bare, mode, "bare")
    with pytest.raises(SpecError, match="at the site 'writers' only the mode 'ablate' is defined, not 'rotate"):
        check_mode(models.direction(MODEL, sites=("writers",)), mode, "d")
    with (
        steer.attach(model, {"d": MADE}, rank=1) as steering,
        pytest.raises(SpecError, match=r"needs 2 .* \(two for the mode 'rotate.*'\), .* rank here is 1: `--rank 2`"),
        steering(f"d:{mode}"),
    ):
        pass


def test_a_file_keeps_its_plane(tmp_path: Path) -> None:
    file = tmp_path / "d.safetensors"
    MADE.save(file)
    found = Direction.load(file)
    assert found.meta.schema_version == 2
    assert found.tensors().keys() == MADE.tensors().keys()
    assert all(torch.equal(found.tensors()[name], t) for name, t in MADE.tensors().items())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"axis": 2 * AXIS.float().repeat(models.LAYERS, 1)}, "tensor 'axis': not a unit vector orthogonal"),
        ({"axis": MADE.directions[:, 0]}, "tensor 'axis': not a unit vector orthogonal"),
        ({"axis": MADE.axis[:2]}, "tensor 'axis' has shape"),
        ({"angles": torch.tensor([0.0, 1.0]).repeat(models.LAYERS, 1)}, "the second is above the first"),
        ({"angles": None}, "come together"),
        ({"axis": None, "angles": None}, r"need the tensors 'axis' and 'angles'"),
        ({"meta": MADE.meta.model_copy(update={"schema_version": 1})}, "schema_version 1: it is 2 where"),
    ],
)
def test_a_file_with_a_bad_plane_is_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(DirectionError, match=message):
        replace(MADE, **changed).to_bytes()


def test_rows_that_are_several_have_no_plane() -> None:
    several = models.direction(MODEL, k=2)
    with pytest.raises(DirectionError, match="is for directions of one row, this one has 2"):
        replace(several.with_meta(schema_version=2), axis=MADE.axis, angles=MADE.angles).to_bytes()


def test_a_bank_without_room_for_axes_turns_nothing_silently() -> None:
    """As the offline commands ask it, which have no registry before the bank."""
    made = models.direction(models.tiny("llama"), plane=True)
    points = [HookPoint("resid_post", layer) for layer in range(made.meta.layers)]
    bank = DirectionBank(points, rows=4, rank=1, d_model=made.d_model)
    bank.load("digest", made)
    assert bank.steer(Spec((Entry("d", "digest", "ablate", 1.0),))) is not None
    for mode in TURNING:
        with pytest.raises(SpecError, match="needs a bank of rank 2"):
            bank.steer(Spec((Entry("d", "digest", mode, 1.0),)))
        assert Choice.of(None, "auto", mode).rank == 2
