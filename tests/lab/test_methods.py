"""Laws of every method: unit rows with a sign, no dependence on scale or order, and the planted direction is found."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from steer.errors import DegenerateError, InvalidInput
from steer.geometry import linear_direction, linear_t, unit, winsorise
from steer.lab.derive import bootstrapped, sparsified
from steer.lab.measurement import Contrast, Sample
from steer.lab.methods import METHODS, class_of, make_method, summaries
from steer.lab.methods.base import Method
from steer.lab.methods.boundaries import fit_weights, ledoit_wolf, oracle_approximation

law = settings(deadline=None, max_examples=8)
SEEDS = st.integers(0, 2**32)
EVERY = sorted(METHODS)
#: Of those that promise orthogonality to the harmless mean.
ORTHOGONAL = ("projected", "biprojected")


def sample(x: Tensor, moments: bool = True) -> Sample:
    return Sample(x.mean(0), len(x), x, x.T @ x / len(x) if moments else None)


def planted(
    seed: int, *, d_model: int = 24, count: int = 40, strength: float = 6.0, noise: float = 1.0
) -> tuple[Contrast, Tensor]:
    """Two Gaussian classes around a common mean that differ by `strength` along one unit vector orthogonal to it."""
    generator = torch.Generator().manual_seed(seed)
    base, v = torch.linalg.qr(torch.randn(d_model, 2, generator=generator, dtype=torch.float64))[0].T

    def draw(shift: float) -> Sample:
        spread = noise * torch.randn(count, d_model, generator=generator, dtype=torch.float64)
        return sample(10 * base + shift * v + spread)

    return Contrast(draw(0.0), draw(strength)), v


def changed(contrast: Contrast, change: object) -> Contrast:
    assert callable(change)
    return Contrast(*(sample(change(s.rows)) for s in (contrast.harmless, contrast.harmful)))


def cosine(x: Tensor, y: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(x, y, dim=-1).min())


@pytest.mark.parametrize("name", EVERY)
@given(seed=SEEDS)
@law
def test_rows_are_orthonormal_and_point_to_the_harmful_class(name: str, seed: int) -> None:
    contrast, _ = planted(seed)
    rows = make_method(name).rows(contrast)
    assert rows.dtype == torch.float64
    torch.testing.assert_close(rows @ rows.T, torch.eye(len(rows)).double(), rtol=0, atol=1e-12)
    assert bool((rows @ contrast.difference >= 0).all())


@pytest.mark.parametrize("name", EVERY)
@given(seed=SEEDS, scale=st.floats(1e-3, 1e3))
@law
def test_the_scale_of_the_activations_does_not_matter(name: str, seed: int, scale: float) -> None:
    contrast, _ = planted(seed)
    method = make_method(name)
    scaled = method.rows(changed(contrast, lambda x: scale * x))
    assert cosine(scaled, method.rows(contrast)) >= 1 - 1e-6


@pytest.mark.parametrize("name", EVERY)
@given(seed=SEEDS)
@law
def test_the_order_of_the_prompts_does_not_matter(name: str, seed: int) -> None:
    contrast, _ = planted(seed)
    method = make_method(name)
    flipped = method.rows(changed(contrast, lambda x: x.flip(0)))
    assert cosine(flipped, method.rows(contrast)) >= 1 - 1e-8


@pytest.mark.parametrize("name", EVERY)
@given(seed=SEEDS)
@law
def test_a_rotation_of_the_space_rotates_the_rows(name: str, seed: int) -> None:
    contrast, _ = planted(seed)
    generator = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(24, 24, generator=generator, dtype=torch.float64))[0]
    method = make_method(name)
    turned = method.rows(changed(contrast, lambda x: x @ turn))
    assert cosine(turned, method.rows(contrast) @ turn) >= 1 - 1e-6


@pytest.mark.parametrize("name", [n for n in EVERY if n != "slerp"])
@given(seed=SEEDS)
@law
def test_the_planted_direction_is_found(name: str, seed: int) -> None:
    contrast, v = planted(seed, count=200)
    rows = make_method(name).rows(contrast)
    assert float(torch.linalg.vector_norm(rows @ v)) >= 0.95, "in the span of the rows"


@given(seed=SEEDS)
@law
def test_slerp_finds_the_planted_direction_where_the_means_have_one_length(seed: int) -> None:
    contrast, v = planted(seed, count=200)
    assert float(make_method("slerp", {"t": 0}).rows(contrast)[0] @ v) >= 0.95


@given(seed=SEEDS)
@law
def test_slerp_at_its_special_places_is_projected_linear_and_the_plain_difference(seed: int) -> None:
    contrast, _ = planted(seed)
    a, h = contrast.harmless.mean, contrast.harmful.mean

    def slerp(t: float) -> Tensor:
        return make_method("slerp", {"t": t}).rows(contrast)

    torch.testing.assert_close(slerp(0), make_method("projected").rows(contrast))
    torch.testing.assert_close(slerp(linear_t(a, h)), make_method("linear").rows(contrast))
    torch.testing.assert_close(slerp(1)[0], unit(unit(h) - unit(a)))


@given(seed=SEEDS, degrees=st.floats(1, 179), t=st.floats(-30, 30), shorter=st.floats(0.2, 5), longer=st.floats(0.2, 5))
@settings(deadline=None, max_examples=200)
def test_slerp_points_to_the_harmful_class_at_every_t_or_is_refused(
    seed: int, degrees: float, t: float, shorter: float, longer: float
) -> None:
    """It does within π/ω of where the family is `linear`, so always for t from 0 to 2, and again after a whole turn."""
    generator = torch.Generator().manual_seed(seed)
    base, e = torch.linalg.qr(torch.randn(12, 2, generator=generator, dtype=torch.float64))[0].T
    omega = math.radians(degrees)
    a, h = shorter * base, longer * (math.cos(omega) * base + math.sin(omega) * e)
    contrast = Contrast(sample(a[None]), sample(h[None]))
    reach = abs(t - linear_t(a, h)) * omega / math.pi
    try:
        row = make_method("slerp", {"t": t}).rows(contrast)[0]
    except DegenerateError as error:
        assert math.cos(reach * math.pi / 2) < 1e-5
        assert not 0 <= t <= 2
        assert "points from harmful to harmless" in str(error)
        return
    assert float(row @ (h - a)) > 0
    assert math.cos(reach * math.pi / 2) > 0


@pytest.mark.parametrize("name", ORTHOGONAL)
@given(seed=SEEDS)
@law
def test_what_promises_it_is_orthogonal_to_the_harmless_mean(name: str, seed: int) -> None:
    contrast, _ = planted(seed)
    rows = make_method(name).rows(contrast)
    assert float((rows @ unit(contrast.harmless.mean)).abs().max()) <= 1e-14


@given(seed=SEEDS)
@law
def test_biprojected_is_orthogonal_to_the_harmless_mean_of_its_target_too(seed: int) -> None:
    source, target = planted(seed)[0], planted(seed + 1)[0]
    method = make_method("biprojected")
    rows = method.onto(method.rows(source), target)
    assert float(rows @ unit(target.harmless.mean)) == pytest.approx(0, abs=1e-14)
    assert float(torch.linalg.vector_norm(rows)) == pytest.approx(1, abs=1e-12)
    torch.testing.assert_close(method.onto(method.rows(source), source), method.rows(source))


@pytest.mark.parametrize("name", ["pca", "whitened"])
@given(seed=SEEDS, d_model=st.sampled_from([8, 24, 60]))
@law
def test_vectors_and_moments_say_the_same(name: str, seed: int, d_model: int) -> None:
    contrast, _ = planted(seed, d_model=d_model, count=20)
    method = make_method(name, {"shrinkage": 0.3} if name == "whitened" else {})
    bare = Contrast(*(Sample(s.mean, s.count, None, s.moments) for s in (contrast.harmless, contrast.harmful)))
    assert cosine(method.rows(bare), method.rows(contrast)) >= 1 - 1e-8


@given(seed=SEEDS, d_model=st.sampled_from([4, 30, 90]), count=st.integers(2, 30))
@law
def test_the_shrinkage_is_that_of_scikit_learn(seed: int, d_model: int, count: int) -> None:
    covariance = pytest.importorskip("sklearn.covariance")
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, d_model, generator=generator, dtype=torch.float64) * torch.linspace(0.1, 3, d_model)
    x = x - x.mean(0)
    _, expected = covariance.ledoit_wolf(x.numpy(), assume_centered=True)
    assert ledoit_wolf(x @ x.T, d_model) == pytest.approx(expected, abs=1e-9)


@given(seed=SEEDS)
@law
def test_the_oracle_approximation_shrinks_less_the_more_prompts_there_are(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(50, 10, generator=generator, dtype=torch.float64) * torch.linspace(0.1, 3, 10)
    covariance = x.T @ x / 50
    few, many = oracle_approximation(covariance, 5), oracle_approximation(covariance, 5000)
    assert 0 < many < few <= 1
    assert oracle_approximation(torch.eye(10).double(), 50) == 1


@given(seed=SEEDS)
@law
def test_full_shrinkage_and_a_large_ridge_are_the_difference_of_the_means(seed: int) -> None:
    contrast, _ = planted(seed)
    linear = make_method("linear").rows(contrast)
    assert cosine(make_method("whitened", {"shrinkage": 1}).rows(contrast), linear) >= 1 - 1e-12
    assert cosine(make_method("logistic", {"ridge": 1e4}).rows(contrast), linear) >= 1 - 1e-6
    assert cosine(make_method("cone", {"rank": 1}).rows(contrast), linear) >= 1 - 1e-12


@given(seed=SEEDS)
@law
def test_whitened_discounts_what_varies_anyway(seed: int) -> None:
    """Two dimensions separate the classes alike, one of them is noisy: LDA's exact answer is known."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.tensor([4.0, 1.0]).double()
    draws = [torch.randn(400, 2, generator=generator, dtype=torch.float64) * noise for _ in range(2)]
    contrast = Contrast(sample(draws[0] + 9), sample(draws[1] + 12))
    row = make_method("whitened", {"shrinkage": 1e-6}).rows(contrast)[0]
    assert float(row @ unit(3 / noise**2)) >= 0.99


@given(seed=SEEDS, ridge=st.sampled_from([1e-4, 1e-2, 1.0]))
@law
def test_logistic_is_at_the_minimum(seed: int, ridge: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(30, 4, generator=generator, dtype=torch.float64)
    y = torch.where(torch.arange(30) < 15, 1.0, -1.0).double()
    share = torch.full((30,), 1 / 30).double()
    w = fit_weights(z, y, share, ridge)

    def loss(w: Tensor) -> float:
        best_b = min(
            float((share * torch.nn.functional.softplus(-y * (z @ w + b))).sum()) for b in torch.linspace(-3, 3, 2001)
        )
        return best_b + ridge * float(w @ w) / 2

    for _ in range(5):
        other = w + 0.05 * torch.randn(4, generator=generator, dtype=torch.float64)
        assert loss(w) <= loss(other) + 1e-6


@given(
    seed=SEEDS,
    count=st.integers(1, 30),
    width=st.integers(1, 12),
    power=st.floats(-12, 4),
    apart=st.sampled_from([0.0, 1.0, 100.0]),
    outlier=st.sampled_from([1.0, 1e3]),
)
@settings(deadline=None, max_examples=100)
def test_logistic_converges_on_every_input(
    seed: int, count: int, width: int, power: float, apart: float, outlier: float
) -> None:
    """Few prompts or many, separable or not, at every ridge: no step lowers the loss by what can be seen."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(count + 4, width, generator=generator, dtype=torch.float64)
    y = torch.cat([torch.ones(count), -torch.ones(4)]).double()
    z[:, 0] += apart * y
    z[0] *= outlier
    z /= (z**2).sum(1).mean().sqrt()
    share = torch.where(y > 0, 0.5 / count, 0.5 / 4)
    ridge = 10**power
    w = fit_weights(z, y, share, ridge)
    assert torch.isfinite(w).all()

    def loss(w: Tensor) -> float:
        """At the best intercept, which the slope's sign finds."""
        low, high = -1e12, 1e12
        for _ in range(120):
            b = (low + high) / 2
            rising = float((share * y * torch.sigmoid(-y * (z @ w + b))).sum()) < 0
            low, high = (low, b) if rising else (b, high)
        fit = torch.nn.functional.softplus(-y * (z @ w + b))
        return float((share * fit).sum()) + ridge * float(w @ w) / 2

    least = loss(w)
    for size in (1e-4, 1e-2, 0.3):
        other = w + size * w.norm() * torch.randn(width, generator=generator, dtype=torch.float64)
        assert least <= loss(other) + 1e-9 * (1 + least)


@given(seed=SEEDS, k=st.integers(1, 4))
@law
def test_subspaces_nest_and_hold_every_planted_kind(seed: int, k: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    kinds = torch.linalg.qr(torch.randn(24, 4, generator=generator, dtype=torch.float64))[0].T
    which = torch.arange(80) % k

    def noise() -> Tensor:
        return 0.1 * torch.randn(80, 24, generator=generator, dtype=torch.float64)

    contrast = Contrast(sample(noise()), sample(5 * kinds[which] + noise()))
    for name in ("subspace", "cone"):
        rows = make_method(name, {"rank": k}).rows(contrast)
        assert rows.shape == (k, 24)
        held = torch.linalg.vector_norm(rows @ kinds[:k].T, dim=0)
        assert float(held.min()) >= 0.99, name
    if k > 1:
        smaller = make_method("subspace", {"rank": k - 1}).rows(contrast)
        torch.testing.assert_close(make_method("subspace", {"rank": k}).rows(contrast)[: k - 1], smaller)


@pytest.mark.parametrize("name", ["linear", "pca"])
def test_an_outlier_dimension_hides_what_was_planted_and_winsorising_uncovers_it(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    contrast, v = planted(3, d_model=200, count=60, strength=8.0)

    def with_outlier(x: Tensor) -> Tensor:
        huge = 300 * torch.randn(len(x), 1, generator=generator, dtype=torch.float64)
        return torch.cat([huge, x], dim=1)

    spoilt = changed(contrast, with_outlier)
    padded = torch.cat([torch.zeros(1).double(), v])
    method = make_method(name)
    clipped = Contrast(*(sample(winsorise(s.rows, 0.99)) for s in (spoilt.harmless, spoilt.harmful)))
    hidden, found = (float(method.rows(c)[0] @ padded) for c in (spoilt, clipped))
    assert hidden < 0.5
    assert found > 0.9


@pytest.mark.parametrize("name", EVERY)
def test_degenerate_classes_are_errors_and_never_nan(name: str) -> None:
    contrast, _ = planted(0)
    same = Contrast(contrast.harmless, contrast.harmless)
    if name not in ("subspace",):
        with pytest.raises(DegenerateError):
            make_method(name).rows(same)
    zero = sample(torch.zeros(40, 24).double())
    with pytest.raises(DegenerateError):
        make_method(name).rows(Contrast(zero, zero))


@pytest.mark.parametrize("name", ["pca", "whitened", "logistic", "subspace", "cone"])
def test_prompts_that_are_all_alike_are_an_error_or_a_plain_direction(name: str) -> None:
    """No spread at all: each class one point, many times."""
    contrast, _ = planted(0)
    points = changed(contrast, lambda x: x.mean(0, keepdim=True).repeat(10, 1))
    try:
        rows = make_method(name).rows(points)
    except DegenerateError:
        return
    assert torch.isfinite(rows).all()
    assert float(rows[0] @ unit(points.difference)) >= 1 - 1e-6


@given(seed=SEEDS, name=st.sampled_from(["slerp", "linear", "pca", "subspace"]))
@law
def test_a_bootstrap_is_orthonormal_reproducible_and_near_the_whole(seed: int, name: str) -> None:
    contrast, _ = planted(seed)
    method = make_method(name)
    rows, agreement = bootstrapped(method, contrast, 8, seed=1)
    torch.testing.assert_close(rows @ rows.T, torch.eye(len(rows)).double(), rtol=0, atol=1e-12)
    assert torch.equal(rows, bootstrapped(method, contrast, 8, seed=1)[0])
    assert abs(float(rows[0] @ method.rows(contrast)[0])) >= 0.9
    assert 0 < agreement <= 1 + 1e-12


@given(seed=SEEDS, share=st.floats(0.05, 1), k=st.integers(1, 3))
@law
def test_sparsified_rows_keep_the_strongest_dimensions_and_stay_orthonormal(seed: int, share: float, k: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.linalg.qr(torch.randn(64, k, generator=generator, dtype=torch.float64))[0].T
    sparse = sparsified(rows, share)
    kept = sparse.abs().amax(0) > 0
    assert int(kept.sum()) == max(1, math.ceil(share * 64))
    weight = torch.linalg.vector_norm(rows, dim=0)
    assert float(weight[kept].min()) >= (float(weight[~kept].max()) if (~kept).any() else 0)
    torch.testing.assert_close(sparse @ sparse.T, torch.eye(k).double(), rtol=0, atol=1e-12)


def test_sparsifying_by_nothing_changes_nothing() -> None:
    rows = make_method("linear").rows(planted(0)[0])
    torch.testing.assert_close(sparsified(rows, 1.0), rows)
    with pytest.raises(DegenerateError, match="leaves 1 dimensions for 2 rows"):
        sparsified(torch.eye(24)[:2].double(), 0.01)


def test_names_and_parameters_are_checked() -> None:
    with pytest.raises(InvalidInput, match="accepted: slerp, linear, projected"):
        make_method("magic")
    with pytest.raises(InvalidInput, match=r"'slerp': parameter u: unknown field; accepted: t"):
        make_method("slerp", {"u": 1})
    for unknown in ("T", "float", "constrained-t"):  # as pydantic calls types
        with pytest.raises(InvalidInput, match=f"'slerp': parameter {unknown}: unknown field.*; accepted: t"):
            make_method("slerp", {unknown: 1})
    with pytest.raises(InvalidInput, match="parameter t:"):
        make_method("slerp", {"t": "nan"})
    with pytest.raises(InvalidInput, match="parameter shrinkage:"):
        make_method("whitened", {"shrinkage": "0"})
    assert make_method("slerp", {"t": "0.5"}) == make_method("slerp", {"t": 0.5})
    told = summaries()
    assert list(told) == list(METHODS)
    for name in METHODS:
        kind = class_of(name)
        assert issubclass(kind, Method)
        assert kind.name == name
        assert (kind.__doc__ or "").startswith(f"{told[name]}\n\n")
        assert told[name].endswith("."), name
        assert "Source:" in (kind.__doc__ or ""), name
        assert "Pitfall" in (kind.__doc__ or ""), name


def test_linear_is_the_raw_difference() -> None:
    contrast, _ = planted(5)
    expected = linear_direction(contrast.harmless.mean, contrast.harmful.mean)
    assert torch.equal(make_method("linear").rows(contrast)[0], expected)
