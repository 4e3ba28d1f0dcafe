"""The bank: rows come and go without touching others, and each token gets exactly its own request's operation."""

from __future__ import annotations

import cmath
import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from steer.errors import NoRoom
from steer.names import MODES, SHIFTING, TURNING, Mode, Site
from steer.runtime.bank import (
    EMBEDDING,
    BankSlice,
    DirectionBank,
    HookPoint,
    decide,
    gather,
    operate,
    operate_before_norm,
)
from steer.runtime.op import GATE, amount, coefficients, component, embedding_coefficients
from steer.runtime.selfcheck import same_norm
from steer.runtime.token_index import TokenIndex, slot, slots_of
from steer.spec import Condition, Entry, Spec
from tests import models

law = settings(deadline=None, max_examples=30)
MODEL = models.tiny("llama")
#: Directions of rank 1 to 3, by digest, of which one has an axis; and the rows that each takes.
RANKS = {"a": 1, "b": 2, "c": 3, "d": 1, "e": 2}
TAKEN = RANKS | {"d": 2}
DIRECTIONS = {
    name: models.direction(MODEL, k=k, seed=seed, embedding=name in "abc", plane=name == "d")
    for seed, (name, k) in enumerate(RANKS.items())
}
POINTS = [HookPoint("resid_post", layer) for layer in (EMBEDDING, *range(models.LAYERS))]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def bank(rows: int = 6, rank: int = 4, points: Sequence[HookPoint] = POINTS) -> DirectionBank:
    return DirectionBank(points, rows=rows, rank=rank, d_model=models.D_MODEL)


def spec(*entries: tuple[str, Mode, float]) -> Spec:
    return Spec(tuple(Entry(name, name, mode, strength) for name, mode, strength in entries))


def rows_of(t: DirectionBank, name: str) -> list[int]:
    steer = t.steer(spec((name, "ablate", 1.0)))
    assert steer is not None
    return [int(slot) // len(MODES) for slot in steer.slots[: RANKS[name]]]


def taken_by(t: DirectionBank, name: str) -> list[int]:
    """Its own rows, and that of its axis."""
    steer = t.steer(spec((name, "rotate", 1.0))) if TAKEN[name] > RANKS[name] else None
    return rows_of(t, name) if steer is None else [int(slot) // len(MODES) for slot in steer.slots[:2]]


def check_rows(t: DirectionBank, name: str) -> None:
    """The rows of `name` hold its vectors and the coefficients of every mode that it has at every hook point."""
    direction = DIRECTIONS[name]
    modes = direction.meta.modes
    for point, bank_slice in t.slices.items():
        if direction.axis is not None and point.layer != EMBEDDING:
            assert torch.equal(bank_slice.vectors[taken_by(t, name)[-1]], direction.axis[point.layer])
        for k, row in enumerate(rows_of(t, name)):
            slots = bank_slice.coefficients[slots_of(row)][: len(modes)]
            if point.layer != EMBEDDING:
                assert torch.equal(bank_slice.vectors[row], direction.directions[point.layer, k])
                assert torch.equal(slots, torch.stack([coefficients(direction, m)[point.layer, k] for m in modes]))
            elif direction.embedding is not None:
                assert torch.equal(bank_slice.vectors[row], direction.embedding[k])
                assert torch.equal(slots, torch.stack([embedding_coefficients(direction, m)[k] for m in modes]))
            else:
                assert not bank_slice.vectors[row].any()


def contents(t: DirectionBank) -> list[Tensor]:
    return [x.clone() for bank_slice in t.slices.values() for x in (bank_slice.vectors, bank_slice.coefficients)]


def addresses(t: DirectionBank) -> list[int]:
    return [x.data_ptr() for bank_slice in t.slices.values() for x in (bank_slice.vectors, bank_slice.coefficients)]


@given(st.lists(st.tuples(st.booleans(), st.sampled_from(sorted(RANKS))), max_size=25))
@law
def test_any_sequence_of_loads_and_unloads_keeps_the_books(steps: list[tuple[bool, str]]) -> None:
    t = bank()
    where = addresses(t)
    resident: dict[str, list[int]] = {}
    for load, name in steps:
        free = t.rows - t.rows_in_use
        if not load:
            t.unload(name)
            resident.pop(name, None)
        elif name in resident or TAKEN[name] <= free:
            t.load(name, DIRECTIONS[name])
            resident.setdefault(name, taken_by(t, name))
        else:
            before = contents(t)
            with pytest.raises(NoRoom, match=f"needs {TAKEN[name]} free bank rows, {free} of {t.rows}"):
                t.load(name, DIRECTIONS[name])
            assert all(torch.equal(x, y) for x, y in zip(before, contents(t), strict=True))
        assert t.rows_in_use == sum(TAKEN[other] for other in resident)
        taken = [row for rows in resident.values() for row in rows]
        assert len(set(taken)) == len(taken)
        assert all(1 <= row <= t.rows for row in taken), "row 0 is nobody's"
        for other, rows in resident.items():
            assert taken_by(t, other) == rows, "a resident direction never moves"
            check_rows(t, other)
        for row in set(range(t.rows + 1)) - set(taken):
            for bank_slice in t.slices.values():
                assert not bank_slice.vectors[row].any()
                slots = bank_slice.coefficients[slots_of(row)]
                assert bool((slots[:, GATE] == -torch.inf).all())
                assert not slots[:, [i for i in range(4) if i != GATE]].any()
    assert addresses(t) == where, "everything is written in place"


def test_all_rows_can_be_used_and_used_again() -> None:
    t = bank(rows=6)
    for _ in range(3):
        for name in ("a", "b", "c"):
            t.load(name, DIRECTIONS[name])
        assert t.rows_in_use == 6
        for name in ("b", "a", "c"):
            t.unload(name)
        assert t.rows_in_use == 0


def test_loading_twice_is_loading_once() -> None:
    t = bank()
    t.load("b", DIRECTIONS["b"])
    before = contents(t)
    t.load("b", DIRECTIONS["b"])
    assert t.rows_in_use == 2
    assert all(torch.equal(x, y) for x, y in zip(before, contents(t), strict=True))


@pytest.mark.parametrize("sites", [("resid_post",), ("writers",), ("resid_post", "writers")])
def test_a_direction_acts_at_its_own_sites_only(sites: tuple[Site, ...]) -> None:
    both: list[Site] = ["resid_post", "writers"]
    t = bank(points=[HookPoint(site, layer) for site in both for layer in (EMBEDDING, 0, 1, 2)])
    assert t.sites == {"resid_post", "writers"}
    t.load("a", models.direction(MODEL, embedding=True, sites=sites))
    for point, bank_slice in t.slices.items():
        assert bool(bank_slice.vectors.any()) == (point.site in sites)


def test_a_plain_request_has_no_entry() -> None:
    assert bank().steer(Spec()) is None


def asked(name: str) -> st.SearchStrategy[Mode]:
    """A mode that the direction has."""
    return st.sampled_from(DIRECTIONS[name].meta.modes)


@given(asked("a"), asked("b"), st.floats(-10, 10), st.floats(-10, 10))
@law
def test_a_request_gets_the_slots_of_its_directions_in_order(x: Mode, y: Mode, s: float, u: float) -> None:
    t = bank(rank=4)
    t.load("b", DIRECTIONS["b"])
    t.load("a", DIRECTIONS["a"])
    steer = t.steer(spec(("a", x, s), ("b", y, u)))
    assert steer is not None
    expected = [(row, x) for row in rows_of(t, "a")] + [(row, y) for row in rows_of(t, "b")]
    assert steer.slots.tolist() == [slot(row, mode) for row, mode in expected] + [0]
    assert steer.strengths.tolist() == np.array([s, u, u, 0], np.float32).tolist()


def test_what_turns_comes_first_so_that_its_axis_is_behind_it() -> None:
    t = bank(rank=4)
    t.load("a", DIRECTIONS["a"])
    t.load("d", DIRECTIONS["d"])
    steer = t.steer(spec(("a", "ablate", 0.5), ("d", "rotate", 0.25)))
    assert steer is not None
    own, axis = taken_by(t, "d")
    pairs: list[tuple[int, Mode]] = [(own, "rotate"), (axis, "rotate"), (rows_of(t, "a")[0], "ablate")]
    assert steer.slots.tolist() == [*(slot(row, mode) for row, mode in pairs), 0]
    assert steer.strengths.tolist() == [0.25, 0.25, 0.5, 0]


@pytest.mark.parametrize("rank", [1, 2])
def test_an_axis_takes_a_row_only_where_a_request_could_use_it(rank: int) -> None:
    t = bank(rank=rank)
    t.load("d", DIRECTIONS["d"])
    assert t.rows_in_use == rank
    assert len(t.rows_of(["d"])) == 1, "what is read is the direction"
    assert len(t.rows_of(["d"], axes=True)) == 1 + (rank > 1)
    t.unload("d")
    assert t.rows_in_use == 0


def naive(x: Tensor, wish: Sequence[tuple[str, Mode, float, float]], layer: int) -> Tensor:
    """One token's vector after a request at one layer: the modes as the design tells them, in float64. What is added
    goes in; then the shortest step leaves each component that is set as its own mode and strength say."""
    x = x.double()
    added, sets, targets = torch.zeros_like(x), [torch.zeros(0, len(x)).double()], [torch.zeros(0).double()]
    for name, mode, strength, shift in wish:
        direction = DIRECTIONS[name]
        difference = (direction.mean_harmful[layer] - direction.mean_harmless[layer]).double()
        rows = direction.directions[layer].double()
        scale = strength * direction.weights[layer].double()
        component, along = rows @ x, rows @ difference
        if mode in TURNING:
            assert direction.axis is not None
            assert direction.angles is not None
            rows = torch.stack([direction.axis[layer].double(), rows[0]])
            pair = complex(*(rows @ x))
            gate, target = direction.angles[layer].tolist() if mode == "rotate_one_sided" else (-math.inf, 0.0)
            ends = [
                complex(*(rows @ mean[layer].double())) for mean in (direction.mean_harmful, direction.mean_harmless)
            ]
            gate += shift * abs(cmath.phase(ends[0] / ends[1]))
            target = min(target, gate) if shift else target
            alpha = cmath.phase(pair)
            turned = cmath.rect(abs(pair), alpha + float(scale) * (target - alpha) if alpha > gate else alpha)
            if np.float32(strength):
                sets.append(rows)
                targets.append(torch.tensor([turned.real, turned.imag], dtype=torch.float64))
            continue
        if mode == "add":
            share = along / along.norm() if direction.rank > 1 else torch.ones(1).double()
            added = added + scale * difference.norm() * share @ rows
            continue
        harmless = rows @ direction.mean_harmless[layer].double()
        low, high = torch.stack([harmless, harmless + along]).sort(0).values
        moved = shift * (high - low)
        narrow = torch.minimum(low - moved, (low + high) / 2), torch.maximum(high + moved, (low + high) / 2)
        change = {
            "ablate": -component,
            "clamp": torch.minimum(torch.maximum(component, narrow[0]), narrow[1]) - component,
            "one_sided": -(component - direction.reference[layer].double() - moved).clamp_min(0),
            "affine": rows @ direction.mean_harmless_all[layer].double() - component,
        }[mode]
        if np.float32(strength):
            sets.append(rows)
            targets.append(component + scale * change)
    across, wanted = torch.cat(sets), torch.cat(targets)
    return x + added + torch.linalg.pinv(across, rtol=1e-2) @ (wanted - across @ (x + added))


#: With the layers at which each acts.
WISH = st.lists(
    st.builds(
        lambda which, shift, *rest: Entry(which[0], *which, *rest, shift=shift if which[1] in SHIFTING else None),
        st.sampled_from([(name, mode) for name in sorted(RANKS) for mode in DIRECTIONS[name].meta.modes]),
        st.sampled_from([None, 0.3, -0.3, 2.0, -2.0]),
        st.floats(-2, 2),
        st.sampled_from([None, None, "0", "1-2", "0-1"]),
    ),
    max_size=2,
    unique_by=lambda entry: entry.digest,
)


@given(st.lists(st.tuples(WISH, st.integers(1, 3)), min_size=1, max_size=4), st.integers(0, 2**32))
@law
def test_a_mixed_batch_is_each_token_by_the_formula(batch: list[tuple[list[Entry], int]], seed: int) -> None:
    t, index = bank(rows=10, rank=5), TokenIndex(5, 16, "cpu")
    for name, direction in DIRECTIONS.items():
        t.load(name, direction)
    index.fill_with([t.steer(Spec(tuple(wish))) for wish, _ in batch], [length for _, length in batch])
    tokens = [wish for wish, length in batch for _ in range(length)]
    n = len(tokens)
    x = torch.randn(n, models.D_MODEL, generator=torch.Generator().manual_seed(seed))
    for layer in range(models.LAYERS):
        bank_slice = t.slices[HookPoint("resid_post", layer)]
        made, _ = operate(x, gather(bank_slice, *index.first(n)))
        for i, wish in enumerate(tokens):
            here = [
                (entry.digest, entry.mode, entry.strength, entry.shift or 0.0)
                for entry in wish
                if entry.layers is None or int(entry.layers[0]) <= layer <= int(entry.layers[-1])
            ]
            torch.testing.assert_close(made[i].double(), naive(x[i], here, layer), rtol=1e-4, atol=1e-4)
            if not here:
                assert torch.equal(made[i], x[i])


@pytest.mark.parametrize("side", ["above", "below"])
@given(st.floats(-1, 1), st.integers(0, 2**32))
@law
def test_a_token_that_passes_its_own_condition_is_changed_by_the_formula_and_others_keep_their_bits(
    side: str, number: float, seed: int
) -> None:
    t, index, n = bank(rows=10, rank=2), TokenIndex(2, 16, "cpu"), 12
    for name in "ad":
        t.load(name, DIRECTIONS[name])
    above, below = (number, None) if side == "above" else (None, number)
    condition = Condition("d", 0, above, below, "d", each=True)
    steer = t.steer(Spec((Entry("a", "a", "ablate", 1.5, "1-2", condition=condition),)), 4)
    x = torch.randn(n, models.D_MODEL, generator=torch.Generator().manual_seed(seed))
    components = x.double() @ DIRECTIONS["d"].directions[0, 0].double()
    assume((components - number).abs().min() > 1e-5)  # float32 decides alike
    passes = components > number if side == "above" else components < number
    for _ in range(2):  # nothing of a step is left for the next
        index.fill_with([steer, None, steer], [6, 2, 4])
        assert index.deciding == {0}
        for layer in range(models.LAYERS):
            bank_slice = t.slices[HookPoint("resid_post", layer)]
            if layer in index.deciding:
                decide(x, bank_slice, index.first(n).rows.long(), index.conditional_of(n))
            made, _ = operate(x, gather(bank_slice, *index.first(n, conditional=True)))
            for i in range(n):
                if layer == 0 or i in (6, 7) or not passes[i]:
                    assert torch.equal(made[i], x[i])
                else:
                    wanted = naive(x[i], [("a", "ablate", 1.5, 0.0)], layer)
                    torch.testing.assert_close(made[i].double(), wanted, rtol=1e-4, atol=1e-4)
        assert index.keep() == []
        x, passes = x.flip(0), passes.flip(0)


def test_ranges_of_layers_cost_no_matrices_of_their_own() -> None:
    """However many a client thinks of: what acts together at a hook point is one of a few sets."""
    t = bank()
    for name in "ad":
        t.load(name, models.leaning(DIRECTIONS["d"], DIRECTIONS["a"], 0.5) if name == "d" else DIRECTIONS["a"])
    steers = []
    for first in range(models.LAYERS):
        for last in range(first, models.LAYERS):
            for other in range(models.LAYERS):
                ranges = (f"{first}-{last}", str(other))
                entries = (Entry(n, n, "ablate", 1.0, r) for n, r in zip("ad", ranges, strict=True))
                steers.append(t.steer(Spec(tuple(entries))))
    assert any(steer is not None and steer.combination is not None for steer in steers)
    assert t._joined.cache_info().misses <= 4


def applied(t: DirectionBank, wish: Spec, x: Tensor, point: HookPoint = POINTS[1]) -> Tensor:
    index = TokenIndex(t.rank, len(x), "cpu")
    index.fill_with([t.steer(wish)], [len(x)])
    return operate(x, gather(t.slices[point], *index.first(len(x))))[0]


def test_both_components_go_in_either_order_and_the_order_means_nothing() -> None:
    t = bank()
    for name in ("a", "d"):
        t.load(name, DIRECTIONS[name])
    x = torch.randn(5, models.D_MODEL, generator=torch.Generator().manual_seed(0))
    lines = torch.stack([DIRECTIONS[name].directions[0, 0] for name in ("a", "d")])
    assert abs(float(lines[0] @ lines[1])) > 1e-3, "orthogonal directions would show nothing"
    forth = applied(t, spec(("a", "ablate", 1.0), ("d", "ablate", 1.0)), x)
    back = applied(t, spec(("d", "ablate", 1.0), ("a", "ablate", 1.0)), x)
    assert float((forth @ lines.T).abs().max()) < 1e-5
    torch.testing.assert_close(forth, back, rtol=0, atol=1e-6)


def test_a_version_that_takes_the_rows_of_another_is_combined_anew() -> None:
    """Rows are used again by the next direction: what acted together with the one before is not what acts now."""
    t, x = bank(rows=3), torch.randn(5, models.D_MODEL, generator=torch.Generator().manual_seed(0))
    for names in (("d", "a"), ("x", "y"), ("d", "a")):
        for seed, name in enumerate(names):
            direction = DIRECTIONS[name] if name in DIRECTIONS else models.direction(MODEL, seed=90 + seed)
            t.load(name, direction)
        rows = torch.stack([t.slices[POINTS[1]].vectors[t.rows_of([name])[0]] for name in names])
        y = applied(t, spec(*[(name, "ablate", 1.0) for name in names]), x)
        assert float((y @ rows.T).abs().max()) < 1e-5
        for name in names:
            t.unload(name)


@pytest.mark.parametrize("other", ["affine", "one_sided", "add"])
def test_where_an_entry_does_nothing_it_holds_nothing(other: Mode) -> None:
    """Before block 0 only `ablate` acts: what a request has beside it there must not change the removal."""
    t, x = bank(), torch.randn(5, models.D_MODEL, generator=torch.Generator().manual_seed(0))
    for name in ("a", "b"):
        t.load(name, DIRECTIONS[name])
    point = HookPoint("resid_post", EMBEDDING)
    beside = applied(t, spec(("a", "ablate", 1.0), ("b", other, 1.0)), x, point)
    assert torch.equal(beside, applied(t, spec(("a", "ablate", 1.0)), x, point))


@pytest.mark.parametrize("rank", [1, 4])
@pytest.mark.parametrize("mode", DIRECTIONS["a"].meta.modes)
def test_one_entry_is_the_formula_of_one_to_the_bit(mode: Mode, rank: int) -> None:
    t, x = bank(rank=rank), torch.randn(5, models.D_MODEL, generator=torch.Generator().manual_seed(0))
    t.load("a", DIRECTIONS["a"])
    for layer in range(models.LAYERS):
        v, values = DIRECTIONS["a"].directions[layer, 0], coefficients(DIRECTIONS["a"], mode)[layer, 0]
        added = amount(component(x, v), values.unbind(-1), torch.tensor(0.7)).unsqueeze(-1)
        expected = torch.addcmul(x, added, v)
        assert torch.equal(applied(t, spec(("a", mode, 0.7)), x, HookPoint("resid_post", layer)), expected)


@pytest.mark.parametrize("name", ["a", "b", "c"])
def test_all_rows_of_a_direction_are_removed(name: str) -> None:
    t = bank()
    t.load(name, DIRECTIONS[name])
    x = torch.randn(5, models.D_MODEL, generator=torch.Generator().manual_seed(0))
    wish = spec((name, "ablate", 1.0))
    for layer in range(models.LAYERS):
        y = applied(t, wish, x, HookPoint("resid_post", layer))
        assert float((y @ DIRECTIONS[name].directions[layer].T).abs().max()) < 1e-5
        torch.testing.assert_close(applied(t, wish, y, HookPoint("resid_post", layer)), y, rtol=0, atol=1e-5)
    rows = DIRECTIONS[name].embedding
    assert rows is not None
    assert float((applied(t, wish, x, HookPoint("resid_post", EMBEDDING)) @ rows.T).abs().max()) < 1e-5


def bits(x: Tensor) -> Tensor:
    return x.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def plain_beside_steered(x: Tensor) -> Tensor:
    """`x` as plain tokens of a batch in which another token is steered, after the operation."""
    t, index = bank(), TokenIndex(4, len(x) + 1, "cpu")
    t.load("c", DIRECTIONS["c"])
    index.fill_with([None, t.steer(spec(("c", "add", 1.0)))], [len(x), 1])
    together = torch.cat([x, torch.ones(1, models.D_MODEL, dtype=x.dtype)])
    y, _ = operate(together, gather(t.slices[POINTS[1]], *index.first(len(together))))
    assert y.dtype == x.dtype
    assert not torch.equal(y[-1], together[-1])
    return y[:-1]


@pytest.mark.parametrize("rank", [1, 4])
@given(data=st.data())
@law
def test_what_a_norm_reads_next_is_the_operation_with_its_mean_square(rank: int, data: st.DataObject) -> None:
    """Within the rounding of the sums that it is made of, also where most of x is taken; what is lost gives zeros."""
    alone = [spec(), *(spec(("a", mode, s)) for mode in DIRECTIONS["a"].meta.modes for s in (1.0, -0.5, 3.0))]
    together = [spec(("b", "ablate", 1.0), ("a", "add", 0.5)), spec(("d", "rotate", 0.7)), spec(("c", "affine", 1.0))]
    specs = data.draw(st.lists(st.sampled_from(alone + (together if rank > 1 else [])), min_size=1, max_size=6))
    t, index = bank(rank=rank, rows=8), TokenIndex(rank, len(specs), "cpu")
    for name in "abcd" if rank > 1 else "a":
        t.load(name, DIRECTIONS[name])
    index.fill_with([t.steer(wish) for wish in specs], [1] * len(specs))
    bank_slice, acts = t.slices[POINTS[1]], index.first(len(specs))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    x = torch.randn(len(specs), models.D_MODEL, generator=generator)
    x += data.draw(st.sampled_from([0, 1, 100])) * DIRECTIONS["a"].directions[0, 0]
    x *= data.draw(st.sampled_from([1e-3, 1.0, 1e3, 1e25]))
    x[0, 0] = data.draw(st.sampled_from([0.0, 1.0, torch.inf, torch.nan]))
    y, lost = operate(x, gather(bank_slice, *acts), torch.float32)
    z, gone, mean_square = operate_before_norm(x, gather(bank_slice, *acts), torch.float32)
    assert torch.equal(bits(y), bits(z))
    assert torch.equal(lost, gone)
    steered = (acts.strengths != 0).any(0)
    assert torch.equal(bits(mean_square[~steered]), bits(x.square().mean(-1, keepdim=True)[~steered]))
    assert torch.isfinite(z * torch.rsqrt(mean_square + 1e-6))[steered].all()
    kept, before, after = ~lost & steered, *(v.double().square().mean(-1, keepdim=True) for v in (x, y))
    allowed = 16 * torch.finfo(torch.float32).eps * (before + after)
    assert bool(((mean_square - after).abs() <= allowed)[kept].all())


@given(st.integers(0, 2**32))
@law
def test_a_norm_of_streams_as_real_models_have_passes_the_self_check(seed: int) -> None:
    """They are long, and a few of their dimensions and of the norm's weights are most of them."""
    t, index, generator = bank(rank=1, rows=8), TokenIndex(1, 64, "cpu"), torch.Generator().manual_seed(seed)
    t.load("a", DIRECTIONS["a"])
    index.fill_with([t.steer(spec(("a", "ablate", 1.0)))], [64])
    scale, weight = torch.randn(2, models.D_MODEL, generator=generator).mul(2).exp()
    x = 1e4 * scale * torch.randn(64, models.D_MODEL, generator=generator)
    y, _, mean_square = operate_before_norm(x, gather(t.slices[POINTS[1]], *index.first(64)), torch.float32)
    due = weight * y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-6)
    for eps in (torch.finfo(torch.float32).eps, torch.finfo(torch.bfloat16).eps):
        assert same_norm(weight * y * torch.rsqrt(mean_square + 1e-6), due, eps)
        assert not same_norm(due * (1 + 3 * eps + 1e-5), due, eps)


@given(st.integers(0, 2**32), st.integers(-12, 12), st.sampled_from(DTYPES))
@law
def test_a_plain_token_keeps_its_bits_in_every_dtype(seed: int, scale: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = (2.0**scale * torch.randn(4, models.D_MODEL, generator=generator, dtype=torch.float64)).to(dtype)
    x[x == 0] = 1
    assert torch.equal(bits(plain_beside_steered(x)), bits(x))


@pytest.mark.parametrize("value", [0.0, -0.0, "tiny", "max", "min", torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_plain_token_keeps_its_bits_at_the_edges_of_the_dtype(dtype: torch.dtype, value: float | str) -> None:
    edge = getattr(torch.finfo(dtype), value) if isinstance(value, str) else value
    x = torch.randn(2, models.D_MODEL, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[:, 3] = edge
    assert torch.equal(bits(plain_beside_steered(x)), bits(x))


@pytest.mark.parametrize("dtype", DTYPES)
def test_arithmetic_is_float32_at_least(dtype: torch.dtype) -> None:
    t = bank()
    t.load("a", DIRECTIONS["a"])
    x = torch.randn(5, models.D_MODEL, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    wish = spec(("a", "ablate", 1.0))
    assert torch.equal(applied(t, wish, x), applied(t, wish, x.to(torch.promote_types(dtype, torch.float32))).to(dtype))


def test_a_load_that_fails_midway_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = bank(rows=1)
    clean = [bank_slice.vectors.clone() for bank_slice in whole.slices.values()]
    write, calls = BankSlice.write, itertools.count()

    def failing(*args: Any) -> None:
        write(*args)
        if next(calls) == 1:
            raise MemoryError("no more")

    monkeypatch.setattr(BankSlice, "write", failing)
    with pytest.raises(MemoryError):
        whole.load("a", DIRECTIONS["a"])
    assert whole.rows_in_use == 0
    assert all(a.equal(bank_slice.vectors) for a, bank_slice in zip(clean, whole.slices.values(), strict=True))
    whole.load("a", DIRECTIONS["a"])
    assert whole.rows_in_use == 1


def test_free_rows_need_hold_nothing() -> None:
    """Memory that was given back and taken again, say: a load writes all of its rows, where it has nothing too."""
    fresh, spoiled = bank(rows=2), bank(rows=2)
    for bank_slice in spoiled.slices.values():
        bank_slice.vectors.fill_(3)
        bank_slice.coefficients.fill_(3)
    for one in (fresh, spoiled):
        one.load("d", DIRECTIONS["d"])  # has no embedding
    assert all(a.equal(b) for a, b in zip(fresh.contents("d"), spoiled.contents("d"), strict=True))
