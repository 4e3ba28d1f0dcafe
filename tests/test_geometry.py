"""The slerp family in closed form, against the article's own formula, exact arithmetic and constructed bases."""

from __future__ import annotations

import math
from collections.abc import Callable

import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from steer.errors import DegenerateError
from steer.geometry import (
    angle,
    linear_direction,
    linear_t,
    orthogonal_part,
    orthonormalise,
    slerp_direction,
    unit,
    winsorise,
)

#: How many examples a law is tried on.
law = settings(deadline=None, max_examples=20)
SEEDS = st.integers(0, 2**32)
SIZES = st.sampled_from([2, 3, 17, 64, 256])
NORMS = st.floats(1e-3, 1e3)
ORDINARY = st.floats(0.1, 3.0)
ANY_T = st.floats(-20, 20)


def basis(seed: int, d_model: int, k: int = 2) -> Tensor:
    """k random orthonormal rows, float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(d_model, k, generator=generator, dtype=torch.float64))[0].T


def pair(seed: int, d_model: int, omega: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Unit vectors a and h at the angle ω, and the orthonormal u and w with a = u, h = cos ω·u + sin ω·w."""
    u, w = basis(seed, d_model)
    return u, math.cos(omega) * u + math.sin(omega) * w, u, w


def article(a: Tensor, h: Tensor, t: float) -> Tensor:
    """The seed article's recipe, step by step, in the dtype of its inputs."""
    a, h = a / a.norm(), h / h.norm()
    omega = torch.acos(torch.clamp((a * h).sum(), -1.0, 1.0))
    on_arc = torch.sin((1 - t) * omega) / torch.sin(omega) * a + torch.sin(t * omega) / torch.sin(omega) * h
    direction = on_arc - a
    return direction / direction.norm()


def exact(a: Tensor, h: Tensor, t: float) -> Tensor:
    """The same recipe in 60 digits, from exactly these inputs."""
    with mpmath.workdps(60):

        def normal(v: list[mpmath.mpf]) -> list[mpmath.mpf]:
            norm = mpmath.sqrt(mpmath.fsum(x * x for x in v))
            return [x / norm for x in v]

        x, y = (normal([mpmath.mpf(value) for value in v.double().tolist()]) for v in (a, h))
        omega = mpmath.acos(mpmath.fdot(x, y))
        s, of_x, of_y = mpmath.sin(omega), mpmath.sin((1 - t) * omega), mpmath.sin(t * omega)
        values = normal([of_x / s * i + of_y / s * j - i for i, j in zip(x, y, strict=True)])
        return torch.tensor([float(value) for value in values], dtype=torch.float64)


def gap(x: Tensor, y: Tensor) -> float:
    return float(torch.linalg.vector_norm(x.double() - y.double()))


@given(SEEDS, SIZES, ORDINARY, st.sampled_from([0.25, 0.5, 0.75, 1.0, 1.5, 2.0]), NORMS, NORMS)
@law
def test_slerp_is_the_articles_recipe(seed: int, d: int, omega: float, t: float, na: float, nh: float) -> None:
    a, h, _, _ = pair(seed, d, omega)
    assert gap(slerp_direction(na * a, nh * h, t), article(na * a, nh * h, t)) < 1e-12


@given(SEEDS, SIZES, st.floats(1e-3, math.pi - 1e-3), ANY_T)
@law
def test_slerp_is_its_closed_form_in_the_plane_of_the_means(seed: int, d: int, omega: float, t: float) -> None:
    a, h, u, w = pair(seed, d, omega)
    expected = math.cos(t * omega / 2) * w - math.sin(t * omega / 2) * u
    assert gap(slerp_direction(a, h, t), expected) < 1e-11


@pytest.mark.parametrize("t", [0.25, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("omega", [1e-4, 3e-5, 1e-5])
def test_slerp_holds_for_nearly_parallel_means(omega: float, t: float) -> None:
    for seed in range(3):
        a, h, u, w = pair(seed, 64, omega)
        made = slerp_direction(a, h, t)
        assert gap(made, exact(a, h, t)) < 1e-9
        assert gap(made, math.cos(t * omega / 2) * w - math.sin(t * omega / 2) * u) < 1e-9


@pytest.mark.parametrize("t", [0.25, 0.5, 1.0])
@pytest.mark.parametrize("short", [1e-3, 1e-4, 1e-5])
def test_slerp_holds_for_nearly_antipodal_means(short: float, t: float) -> None:
    for seed in range(3):
        a, h, _, w = pair(seed, 64, math.pi - short)
        assert gap(slerp_direction(a, h, t), exact(a, h, t)) < 1e-9
        assert gap(orthogonal_part(a, h), w) < 1e-9


def test_bfloat16_means_keep_their_direction_where_the_recipe_in_bfloat16_loses_it() -> None:
    for seed in range(3):
        a, h, _, _ = pair(seed, 256, math.acos(0.9999))
        a, h = a.bfloat16(), h.bfloat16()
        truth = exact(a, h, 0.5)
        assert float(slerp_direction(a, h, 0.5) @ truth) > 1 - 1e-9
        lost = article(a, h, 0.5).double()
        assert not float(lost @ truth) > 0.999, "the recipe is not good enough in bfloat16 (it may even be NaN)"


@given(SEEDS, SIZES, st.floats(1e-5, math.pi - 1e-5), ANY_T)
@law
def test_slerp_is_a_unit_vector_for_every_t(seed: int, d: int, omega: float, t: float) -> None:
    a, h, _, _ = pair(seed, d, omega)
    assert abs(float(slerp_direction(a, h, t).norm()) - 1) < 1e-12


@given(SEEDS, SIZES, st.floats(1e-4, math.pi - 1e-4), NORMS, NORMS)
@law
def test_t_0_is_projected_and_orthogonal_to_the_harmless_mean(
    seed: int, d: int, omega: float, na: float, nh: float
) -> None:
    a, h, _, w = pair(seed, d, omega)
    made = slerp_direction(na * a, nh * h, 0.0)
    assert abs(float(made @ a)) < 1e-14
    assert gap(made, w) < 1e-10
    assert torch.equal(made, orthogonal_part(na * a, nh * h))


@given(SEEDS, SIZES, ORDINARY, NORMS, NORMS)
@law
def test_t_1_is_the_difference_of_the_unit_means(seed: int, d: int, omega: float, na: float, nh: float) -> None:
    a, h, _, _ = pair(seed, d, omega)
    assert gap(slerp_direction(na * a, nh * h, 1.0), (h - a) / (h - a).norm()) < 1e-12


@given(SEEDS, SIZES, ORDINARY)
@law
def test_the_component_along_t_1_has_its_zero_on_the_bisector(seed: int, d: int, omega: float) -> None:
    """Why ρ = 0 separates the classes for slerp at t = 1: the two unit means stand symmetrically on its two sides."""
    a, h, _, _ = pair(seed, d, omega)
    v = slerp_direction(a, h, 1.0)
    assert float(h @ v) == pytest.approx(-float(a @ v), abs=1e-12)
    assert float(h @ v) > 0


@given(SEEDS, SIZES, ORDINARY, NORMS, NORMS)
@law
def test_linear_is_the_slerp_family_at_linear_t(seed: int, d: int, omega: float, na: float, nh: float) -> None:
    a, h, _, _ = pair(seed, d, omega)
    a, h = na * a, nh * h
    linear = linear_direction(a, h)
    assert gap(linear, (h - a) / (h - a).norm()) < 1e-12
    assert gap(slerp_direction(a, h, linear_t(a, h)), linear) < 1e-10


@given(SEEDS, SIZES, ORDINARY, NORMS)
@law
def test_means_of_one_norm_make_linear_the_member_at_t_1(seed: int, d: int, omega: float, norm: float) -> None:
    a, h, _, _ = pair(seed, d, omega)
    assert linear_t(norm * a, norm * h) == pytest.approx(1.0, abs=1e-12)


@given(SEEDS, SIZES, ORDINARY, ANY_T, NORMS, NORMS)
@law
def test_slerp_does_not_see_the_norms(seed: int, d: int, omega: float, t: float, na: float, nh: float) -> None:
    a, h, _, _ = pair(seed, d, omega)
    assert gap(slerp_direction(na * a, nh * h, t), slerp_direction(a, h, t)) < 1e-12


@given(SEEDS, SIZES, st.floats(1e-8, 1e-3))
@law
def test_angles_near_zero_and_near_pi_keep_their_digits(seed: int, d: int, small: float) -> None:
    a, h, _, _ = pair(seed, d, small)
    assert float(angle(a, h)) == pytest.approx(small, rel=1e-6)
    assert float(angle(a, -h)) == pytest.approx(math.pi - small, abs=1e-14)


@given(SEEDS, SIZES, st.floats(0, math.pi), NORMS, NORMS)
@law
def test_angle_is_symmetric_and_does_not_see_the_norms(seed: int, d: int, omega: float, na: float, nh: float) -> None:
    a, h, _, _ = pair(seed, d, omega)
    assert float(angle(na * a, nh * h)) == pytest.approx(omega, abs=1e-13)
    assert float(angle(nh * h, na * a)) == pytest.approx(omega, abs=1e-13)


def test_angle_works_on_each_row() -> None:
    a, h = basis(0, 16, 4), torch.randn(4, 16, generator=torch.Generator().manual_seed(1))
    each = torch.stack([angle(x, y) for x, y in zip(a, h, strict=True)])
    torch.testing.assert_close(angle(a, h), each, rtol=1e-14, atol=0)


FAMILY: list[Callable[[Tensor, Tensor], object]] = [
    lambda a, h: slerp_direction(a, h, 0.5),
    lambda a, h: slerp_direction(a, h, 1.0),
    orthogonal_part,
]
V = torch.arange(1.0, 9.0)
ZERO, NAN, INFINITE = torch.zeros(8), torch.full((8,), math.nan), torch.full((8,), math.inf)


@pytest.mark.parametrize("function", FAMILY)
@pytest.mark.parametrize(
    ("a", "h"),
    [(ZERO, V), (V, ZERO), (NAN, V), (V, NAN), (INFINITE, V), (V, INFINITE), (V, V), (V, 3 * V), (V, -V), (V, -3 * V)],
    ids=["zero a", "zero h", "nan a", "nan h", "inf a", "inf h", "equal", "parallel", "opposite", "antipodal"],
)
def test_means_that_define_no_direction_are_errors(
    function: Callable[[Tensor, Tensor], object], a: Tensor, h: Tensor
) -> None:
    with pytest.raises(DegenerateError):
        function(a, h)


@pytest.mark.parametrize(("a", "h"), [(ZERO, ZERO), (V, V), (NAN, V), (V, NAN), (INFINITE, V), (INFINITE, INFINITE)])
def test_means_without_a_difference_have_no_linear_direction(a: Tensor, h: Tensor) -> None:
    with pytest.raises(DegenerateError):
        linear_direction(a, h)


@pytest.mark.parametrize(("a", "h"), [(V, V), (V, 2 * V), (ZERO, V), (V, ZERO), (NAN, V), (V, INFINITE)])
def test_means_without_an_angle_have_no_linear_t(a: Tensor, h: Tensor) -> None:
    with pytest.raises(DegenerateError):
        linear_t(a, h)


@pytest.mark.parametrize("t", [math.nan, math.inf, -math.inf])
def test_t_must_be_finite(t: float) -> None:
    with pytest.raises(DegenerateError, match="t must be a finite number"):
        slerp_direction(V, V.flip(0), t)


FLOATS = st.lists(st.floats(width=32), min_size=3, max_size=3)


@given(FLOATS, FLOATS, st.floats())
@law
def test_any_float32_means_give_a_unit_vector_or_an_error(a: list[float], h: list[float], t: float) -> None:
    x, y = torch.tensor(a, dtype=torch.float64), torch.tensor(h, dtype=torch.float64)
    for make in (lambda: slerp_direction(x, y, t), lambda: linear_direction(x, y), lambda: unit(x)):
        try:
            made = make()
        except DegenerateError:
            continue
        assert abs(float(made.norm()) - 1) < 1e-9


@given(SEEDS, st.integers(1, 6), st.integers(6, 40))
@law
def test_orthonormalise_keeps_span_and_order(seed: int, k: int, d: int) -> None:
    rows = torch.randn(k, d, generator=torch.Generator().manual_seed(seed))
    made = orthonormalise(rows)
    torch.testing.assert_close(made @ made.T, torch.eye(k, dtype=torch.float64), rtol=0, atol=1e-12)
    parts = rows.double() @ made.T
    torch.testing.assert_close(parts @ made, rows.double(), rtol=0, atol=1e-10)
    assert float(parts.triu(1).abs().max()) < 1e-10, "row i needs the first i vectors only"
    assert float(parts.diagonal().min()) > 0


@given(SEEDS, st.floats(1e-5, 1e-2))
@law
def test_orthonormalise_holds_for_nearly_dependent_rows(seed: int, small: float) -> None:
    u, w, z = basis(seed, 32, 3)
    made = orthonormalise(torch.stack([u, u + small * w, u + small * z]))
    torch.testing.assert_close(made @ made.T, torch.eye(3, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(made, torch.stack([u, w, z]), rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    "rows",
    [
        torch.stack([V, 2 * V]),
        torch.stack([V, V.flip(0), V + V.flip(0)]),
        torch.stack([V, ZERO]),
        torch.stack([V, NAN]),
        torch.randn(5, 4, generator=torch.Generator().manual_seed(0)),
    ],
    ids=["parallel", "sum", "zero", "nan", "more rows than dimensions"],
)
def test_dependent_rows_are_an_error(rows: Tensor) -> None:
    with pytest.raises(DegenerateError):
        orthonormalise(rows)


DTYPES = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16])
QUANTILES = st.floats(0.5, 1.0)


@given(SEEDS, st.integers(1, 7), st.integers(1, 7), QUANTILES, DTYPES)
@law
def test_winsorise_does_not_see_the_batch(seed: int, n: int, m: int, quantile: float, dtype: torch.dtype) -> None:
    x = torch.randn(n, m, 33, generator=torch.Generator().manual_seed(seed)).to(dtype)
    each = torch.stack([torch.stack([winsorise(v, quantile) for v in row]) for row in x])
    assert torch.equal(winsorise(x, quantile), each)


@given(SEEDS, QUANTILES, DTYPES)
@law
def test_winsorise_only_lowers_the_largest_magnitudes(seed: int, quantile: float, dtype: torch.dtype) -> None:
    x = torch.randn(64, generator=torch.Generator().manual_seed(seed)).to(dtype)
    x[7] = 100.0
    y = winsorise(x, quantile)
    assert y.dtype == dtype
    assert bool((y.abs() <= x.abs()).all())
    assert bool((y.sign() == x.sign()).all())
    changed = y != x
    assert int(changed.sum()) <= math.ceil((1 - quantile) * 64) + 1
    if changed.any():
        limit = y[changed].abs()
        assert bool((limit == limit[0]).all()), "all that is clipped is clipped to one value"
        assert bool((x[~changed].abs() <= limit[0]).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_winsorise_at_quantile_1_changes_nothing(dtype: torch.dtype) -> None:
    x = torch.randn(5, 40, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(dtype)
    assert torch.equal(winsorise(x, 1.0), x)


@pytest.mark.parametrize("quantile", [0.0, -0.1, 1.1, math.nan])
def test_a_quantile_outside_its_range_is_an_error(quantile: float) -> None:
    with pytest.raises(DegenerateError, match="quantile"):
        winsorise(V, quantile)
