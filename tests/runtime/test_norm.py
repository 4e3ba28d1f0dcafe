"""Requests that keep the stream's norm: x' is x + what the modes add, scaled to ‖x‖."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from steer.errors import SpecError
from steer.names import MODES, TURNING, Mode
from steer.registry import Registry
from steer.runtime import op
from steer.runtime.bank import DirectionBank, HookPoint, LocalPlacement, gather, operate, operate_before_norm
from steer.runtime.token_index import TokenIndex
from steer.shape import Shape
from steer.spec import Entry, Spec, parse
from tests import models

law = settings(deadline=None, max_examples=40)
MODEL = models.tiny("llama")
POINT = HookPoint("resid_post", 1)
PLAIN_MODES = MODES[: -len(TURNING)]
SEEDS = st.integers(0, 2**31)
KEPT = Entry("d", "d", "ablate", 1.0, norm_preserving=True)


def stream(seed: int = 0, tokens: int = 30) -> Tensor:
    return 2 * torch.randn(tokens, models.D_MODEL, generator=torch.Generator().manual_seed(seed))


def bank_of(**directions: int) -> DirectionBank:
    """A bank with a direction of this many rows by each name."""
    bank = DirectionBank([POINT], rows=8, rank=4, d_model=models.D_MODEL)
    for seed, (name, k) in enumerate(directions.items()):
        bank.load(name, models.direction(MODEL, k=k, seed=seed, plane=k == 1))
    return bank


def acted(bank: DirectionBank, x: Tensor, *requests: tuple[Entry, ...]) -> Tensor:
    """The stream after requests that have equal parts of its tokens, by each way in which it is computed."""
    index = TokenIndex(bank.rank, len(x), "cpu")
    index.fill_with([bank.steer(Spec(each)) for each in requests], [len(x) // len(requests)] * len(requests))
    compiled = gather(bank.slices[POINT], *index.first(len(x)))
    packed, lost = operate(x, compiled)
    assert not lost.any()
    acting, *how = index.acting(len(x))
    rows = x if acting[0].dim() == 2 else x[:, None]
    eager, _ = operate(rows, gather(bank.slices[POINT], *acting, *how))
    assert torch.equal(eager.view_as(x), packed), "an eager pass"
    folded, lost, mean_square = operate_before_norm(x, compiled, torch.float32)
    assert not lost.any()
    torch.testing.assert_close(folded, packed, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mean_square[:, 0], packed.square().mean(-1), rtol=1e-5, atol=1e-6)
    return packed


ENTRY = st.builds(
    Entry,
    st.just(""),
    st.sampled_from(["one", "two", "wide"]),
    st.sampled_from(PLAIN_MODES),
    st.floats(-2, 2).filter(lambda strength: abs(strength) > 1e-3),
    st.sampled_from([None, "1", "0-1"]),
)


@given(SEEDS, st.lists(ENTRY, min_size=1, max_size=2, unique_by=lambda entry: entry.digest))
@law
def test_what_the_modes_make_is_scaled_to_the_norm_before(seed: int, entries: list[Entry]) -> None:
    bank, x = bank_of(one=1, two=1, wide=2), stream(seed)
    free = acted(bank, x, tuple(entries)).double()
    kept = acted(bank, x, tuple(replace(entry, norm_preserving=True) for entry in entries)).double()
    torch.testing.assert_close(kept.norm(dim=-1), x.double().norm(dim=-1), rtol=1e-5, atol=0)
    due = free * (x.double().norm(dim=-1) / free.norm(dim=-1))[:, None]
    torch.testing.assert_close(kept, due, rtol=1e-4, atol=1e-5)


def test_nothing_is_left_along_the_direction() -> None:
    bank, x = bank_of(d=1), stream()
    row = bank.slices[POINT].vectors[bank.rows_of(["d"])[0]]
    kept = acted(bank, x, (KEPT,))
    assert (op.component(x, row).abs() > 1e-2).any()
    assert float(op.component(kept, row).abs().max()) < 1e-5


def test_tokens_that_do_not_ask_keep_their_bits() -> None:
    """Plain tokens, tokens of requests that act elsewhere, and tokens of a request that does not ask for the norm."""
    bank, x = bank_of(d=1), stream(tokens=40)
    free, elsewhere = replace(KEPT, norm_preserving=None), replace(KEPT, layers="0")
    y = acted(bank, x, (KEPT,), (), (elsewhere,), (free,))
    assert torch.equal(y[10:30], x[10:30])
    assert torch.equal(y[30:], acted(bank, x[30:], (free,)))
    assert not torch.equal(y[:10], acted(bank, x[:10], (free,)))


def test_directions_that_turn_may_stand_beside() -> None:
    bank, x = bank_of(d=1, e=1), stream()
    turned = Entry("e", "e", "rotate", 0.5)
    kept = acted(bank, x, (KEPT, turned)).double()
    torch.testing.assert_close(kept.norm(dim=-1), x.double().norm(dim=-1), rtol=1e-5, atol=0)


def test_streams_of_which_nothing_is_left_stay_finite() -> None:
    """Zero, and streams along the direction, of which the operation leaves rounding: they are not blown up."""
    bank = bank_of(d=1)
    row = bank.slices[POINT].vectors[bank.rows_of(["d"])[0]]
    x = torch.stack([torch.zeros_like(row), 3 * row, -1e15 * row, 1e-30 * row])
    index = TokenIndex(bank.rank, len(x), "cpu")
    index.fill_with([bank.steer(Spec((KEPT,)))], [len(x)])
    operands = gather(bank.slices[POINT], *index.first(len(x)))
    for y, lost, *_ in (operate(x, operands), operate_before_norm(x, operands, torch.float32)):
        assert not lost.any()
        assert y.isfinite().all()
        assert (y.norm(dim=-1) <= 1e-3 * x.norm(dim=-1)).all()
        assert not y[0].any()


def test_gradients_are_those_of_the_formula_and_finite_for_plain_and_zero_tokens() -> None:
    bank = bank_of(d=1)
    row = bank.slices[POINT].vectors[bank.rows_of(["d"])[0]].double()
    x = stream(tokens=9).double()
    x[3] = x[7] = 0
    index = TokenIndex(bank.rank, 9, "cpu")
    index.fill_with([bank.steer(Spec((KEPT,))), None], [6, 3])
    operands = gather(bank.slices[POINT], *index.first(9))

    def own(x: Tensor) -> Tensor:
        free = x - op.component(x, row)[:, None] * row
        return free * (x.norm(dim=-1) / free.norm(dim=-1))[:, None]

    steered = [0, 1, 2, 4, 5]
    upstream = torch.randn(9, models.D_MODEL, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found, right = (x.clone().requires_grad_() for _ in range(2))
    operate(found, operands)[0].backward(upstream)
    own(right)[steered].backward(upstream[steered])
    assert found.grad is not None
    assert right.grad is not None
    torch.testing.assert_close(found.grad[steered], right.grad[steered], rtol=1e-5, atol=1e-6)
    assert found.grad.isfinite().all()
    assert torch.equal(found.grad[6:], upstream[6:])


def refused(text: str, site: bool = False) -> str:
    made = models.direction(MODEL, sites=("writers",)) if site else models.direction(MODEL, plane=True)
    a, sites = made.meta, frozenset(made.meta.sites)
    bank = DirectionBank(
        [HookPoint(made.meta.sites[0], layer) for layer in range(a.layers)], rows=8, rank=4, d_model=a.d_model
    )
    registry = Registry(LocalPlacement(Shape(a.architecture, a.layers, a.d_model, sites, 4), bank))
    for name, direction in (("d", made), ("e", made.with_meta(model="another"))):
        registry.put(name, direction.to_bytes(), store=False)
    with pytest.raises(SpecError) as caught:
        registry.resolve(parse(text))
    (problem,) = caught.value.problems
    return problem


@pytest.mark.parametrize("mode", TURNING)
def test_a_mode_that_turns_is_told_that_it_keeps_the_norm_anyway(mode: Mode) -> None:
    assert "norm_preserving: the mode" in refused(f"d:{mode}:norm=0.5")


def test_what_acts_on_terms_has_no_norm_to_keep() -> None:
    assert "only the norm of a whole stream is kept" in refused("d:norm", site=True)


def test_all_directions_of_a_request_say_the_same() -> None:
    assert refused("d:norm,e=0.5").startswith("norm_preserving: asked for with d and not with e; accepted: ")
