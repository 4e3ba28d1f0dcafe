"""What each mode gives the operation, and what that does to the stream."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from steer.direction import Direction
from steer.errors import SpecError
from steer.names import (
    MAX_STRENGTH,
    MODE_SCALES,
    MODE_SUMMARIES,
    MODES,
    SHIFTING,
    SITE_RULES,
    SITES,
    TURNING,
    Mode,
    Site,
)
from steer.runtime.bank import EMBEDDING, HookPoint
from steer.runtime.op import (
    COEFFICIENTS,
    FLOOR,
    GAMMA,
    GATE,
    SPREAD,
    TARGET,
    WEIGHT,
    coefficients,
    embedding_coefficients,
)
from steer.shape import check_mode
from tests import models
from tests.oracle import displacement

MODEL = models.tiny("llama")
WEIGHTS = torch.tensor([0.25, 1.0, 2.0])


#: Of those that act on each component alone; what turns is in `test_turning`.
STRAIGHT = [mode for mode in MODES if mode not in TURNING]


def made(k: int = 1, plane: bool = False) -> Direction:
    return replace(models.direction(MODEL, k=k, embedding=True, plane=plane), weights=WEIGHTS)


def applied(direction: Direction, mode: Mode, layer: int, x: Tensor, strength: float = 1.0) -> Tensor:
    """x after all rows of `direction` at `layer`, one after the other."""
    for k in range(direction.rank):
        x = x + displacement(x, direction.directions[layer, k], coefficients(direction, mode)[layer, k], strength)
    return x


def stream(tokens: int = 40) -> Tensor:
    return 2 * torch.randn(tokens, models.D_MODEL, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("mode", MODES)
def test_coefficients_have_a_row_for_each_layer_and_row(mode: Mode, k: int) -> None:
    direction = made(k, plane=k == 1)
    if mode in TURNING and k > 1:
        return
    rows = 2 if mode in TURNING else k
    each = coefficients(direction, mode)
    assert each.shape == (models.LAYERS, rows, COEFFICIENTS)
    assert each.dtype == torch.float32
    assert embedding_coefficients(direction, mode).shape == (rows, COEFFICIENTS)


def test_each_mode_says_what_it_does() -> None:
    assert set(MODE_SUMMARIES) == set(MODE_SCALES) == set(MODES)
    for scale in MODE_SCALES.values():
        assert -MAX_STRENGTH <= scale["low"] <= 0 < 1 <= scale["high"] <= MAX_STRENGTH, "nothing and all of it"


@pytest.mark.parametrize("site", SITES)
def test_each_site_says_what_can_be_done_there(site: Site) -> None:
    assert set(SITE_RULES) == set(SITES)
    assert "ablate" in SITE_RULES[site].modes
    after, before = HookPoint(site, 0), HookPoint(site, EMBEDDING)
    assert (after.modes, after.readable) == (SITE_RULES[site].modes, SITE_RULES[site].readable)
    assert (before.modes, before.readable) == (("ablate",), False)


def test_the_modes_before_block_0_are_those_that_have_a_weight_there() -> None:
    acting = {mode for mode in MODES if embedding_coefficients(made(), mode)[..., WEIGHT].any()}
    assert acting == set(HookPoint("resid_post", EMBEDDING).modes)


@pytest.mark.parametrize("k", [1, 3])
def test_the_table_of_coefficients(k: int) -> None:
    direction = made(k)
    of = {mode: coefficients(direction, mode) for mode in STRAIGHT}
    weights = WEIGHTS[:, None].expand(-1, k)
    nothing = torch.zeros(models.LAYERS, k)
    for mode in ("ablate", "one_sided", "affine", "clamp"):
        assert torch.equal(of[mode][..., WEIGHT], weights)
        assert torch.equal(of[mode][..., GAMMA], nothing)
    assert torch.equal(of["add"][..., WEIGHT], nothing)
    assert torch.equal(of["ablate"][..., TARGET], nothing)
    assert torch.equal(of["add"][..., TARGET], nothing)
    assert torch.equal(of["one_sided"][..., TARGET], direction.reference)
    for layer in range(models.LAYERS):
        harmless = direction.directions[layer] @ direction.mean_harmless_all[layer]
        torch.testing.assert_close(of["affine"][layer, :, TARGET], harmless)
    for mode in STRAIGHT:
        never = torch.full((models.LAYERS, k), -torch.inf)
        ends = torch.stack([direction.mean_harmless, direction.mean_harmful]).double()
        ends = torch.einsum("lkd,mld->mlk", direction.directions.double(), ends)
        spread = (ends[1] - ends[0]).abs() if mode in SHIFTING else torch.zeros_like(ends[0])
        torch.testing.assert_close(of[mode][..., SPREAD].double(), spread, rtol=1e-5, atol=1e-5)
        if mode == "clamp":
            bounds = of[mode][..., [FLOOR, GATE]].double().movedim(-1, 0)
            torch.testing.assert_close(bounds, ends.sort(0).values, rtol=1e-5, atol=1e-5)
            assert torch.equal(of[mode][..., TARGET], of[mode][..., GATE])
            continue
        assert torch.equal(of[mode][..., GATE], direction.reference if mode == "one_sided" else never)
        assert torch.equal(of[mode][..., FLOOR], never)
    lower = direction.reference - 0.25
    with_target = coefficients(replace(direction, target=lower), "one_sided")
    assert torch.equal(with_target[..., TARGET], lower)
    assert torch.equal(with_target[..., GATE], direction.reference)


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("layer", range(models.LAYERS))
def test_add_at_strength_1_moves_by_the_distance_of_the_means(layer: int, k: int) -> None:
    direction, x = made(k), stream()
    distance = float((direction.mean_harmful[layer] - direction.mean_harmless[layer]).norm())
    for strength in (1.0, -0.5):
        moved = applied(direction, "add", layer, x, strength) - x
        expected = torch.full((len(x),), distance * float(WEIGHTS[layer]) * abs(strength))
        torch.testing.assert_close(moved.norm(dim=-1), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layer", range(models.LAYERS))
def test_add_goes_along_the_one_row_or_along_the_difference_within_the_rows(layer: int) -> None:
    x = stream()
    one, many = made(1), made(3)
    moved = applied(one, "add", layer, x) - x
    cosine = torch.cosine_similarity(moved, one.directions[layer], dim=-1)
    torch.testing.assert_close(cosine, torch.ones(len(x)), rtol=0, atol=1e-5)
    rows = many.directions[layer]
    within = (many.mean_harmful[layer] - many.mean_harmless[layer]) @ rows.T @ rows
    cosine = torch.cosine_similarity(applied(many, "add", layer, x) - x, within[None], dim=-1)
    torch.testing.assert_close(cosine, torch.ones(len(x)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("mode", STRAIGHT)
def test_a_layer_with_rows_of_zeros_or_weight_0_does_nothing(mode: Mode) -> None:
    direction, x = made(2), stream()
    rows = direction.directions.clone()
    rows[0] = 0
    idle = replace(direction, directions=rows, weights=torch.tensor([1.0, 0.0, 1.0]))
    assert torch.isfinite(coefficients(idle, mode)[..., [TARGET, WEIGHT, GAMMA]]).all()
    assert torch.equal(applied(idle, mode, 0, x), x)
    assert torch.equal(applied(idle, mode, 1, x), x)
    assert not torch.equal(applied(idle, mode, 2, x), x)


@pytest.mark.parametrize("mode", STRAIGHT)
def test_a_weight_is_a_strength_of_its_layer(mode: Mode) -> None:
    direction, x = made(), stream()
    full = replace(direction, weights=torch.ones(models.LAYERS))
    for layer, weight in enumerate(WEIGHTS.tolist()):
        torch.testing.assert_close(
            applied(direction, mode, layer, x, 0.5), applied(full, mode, layer, x, 0.5 * weight), rtol=1e-5, atol=1e-5
        )


def test_affine_puts_the_harmless_component_everywhere() -> None:
    direction, x = replace(made(2), weights=torch.ones(models.LAYERS)), stream()
    for layer, rows in enumerate(direction.directions):
        expected = (rows @ direction.mean_harmless_all[layer]).expand(len(x), -1)
        torch.testing.assert_close(applied(direction, "affine", layer, x) @ rows.T, expected, rtol=0, atol=1e-4)


def test_one_sided_cuts_at_the_reference() -> None:
    direction, x = replace(made(2), weights=torch.ones(models.LAYERS)), stream()
    for layer, rows in enumerate(direction.directions):
        components = applied(direction, "one_sided", layer, x) @ rows.T
        torch.testing.assert_close(components, torch.minimum(x @ rows.T, direction.reference[layer]), rtol=0, atol=1e-4)


@pytest.mark.parametrize("mode", MODES)
def test_before_the_first_block_only_ablate_acts(mode: Mode) -> None:
    direction, x = made(2), stream()
    assert direction.embedding is not None
    y = x
    for v, each in zip(direction.embedding, embedding_coefficients(direction, mode), strict=True):
        y = y + displacement(y, v, each, 1.0)
    if mode == "ablate":
        assert float((y @ direction.embedding.T).abs().max()) < 1e-5
    else:
        assert torch.equal(y, x)


@pytest.mark.parametrize("sites", [("writers",), ("resid_post", "writers")])
def test_at_the_writers_only_ablate_has_a_meaning(sites: tuple[str, ...]) -> None:
    direction = made().with_meta(sites=sites)
    check_mode(direction, "ablate", "refusal")
    for mode in MODES:
        if mode != "ablate":
            with pytest.raises(SpecError, match=f"'refusal': .*'writers'.*'ablate'.*not '{mode}'") as caught:
                check_mode(direction, mode, "refusal")
            assert caught.value.param == "steer.mode"


@pytest.mark.parametrize("mode", MODES)
def test_at_block_outputs_every_mode_has_a_meaning(mode: Mode) -> None:
    check_mode(made(plane=True), mode, "refusal")


@pytest.mark.parametrize("mode", MODES)
def test_a_mode_that_the_file_has_no_means_for_is_refused(mode: Mode) -> None:
    """A direction that came without class means: served in another mode it would do what nobody asked for."""
    bare = made(plane=True).with_meta(modes=("ablate",))
    if mode == "ablate":
        check_mode(bare, mode, "d")
        return
    with pytest.raises(SpecError, match=f"no .* for the mode '{mode}'; its modes: ablate") as caught:
        check_mode(bare, mode, "d")
    assert caught.value.param == "steer.mode"
