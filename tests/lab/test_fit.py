"""Fitting: the file holds what the mathematics says, and `auto` takes the layer that measures best."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from steer.direction import Direction
from steer.errors import DegenerateError, InvalidInput
from steer.geometry import linear_direction, slerp_direction
from steer.hf.load import Loaded, load
from steer.lab.fit import Recipe, derive, fit
from steer.lab.measure import Measurement, measure
from tests.lab.test_measure import HARMFUL, HARMLESS


@pytest.fixture(scope="module")
def loaded(tiny_folder: Path) -> Loaded:
    return load(str(tiny_folder))


@pytest.fixture(scope="module")
def measured(loaded: Loaded) -> Measurement:
    return measure(loaded, HARMFUL, HARMLESS)


@pytest.mark.parametrize("method", ["slerp", "linear", "projected"])
@pytest.mark.parametrize("layer", ["all", 1, -1])
def test_a_derived_direction_is_a_valid_file(
    loaded: Loaded, measured: Measurement, method: str, layer: int | str, tmp_path: Path
) -> None:
    direction = derive(loaded, measured, Recipe(method, layer=layer))  # type: ignore[arg-type]
    direction.save(tmp_path / "d.safetensors")
    again = Direction.load(tmp_path / "d.safetensors")
    assert torch.equal(again.directions, direction.directions)
    assert again.meta.source_layer == {"all": None, 1: 1, -1: 2}[layer]
    assert again.meta.harmful is not None
    assert again.meta.harmful.count == 13
    assert again.embedding is None


def test_one_direction_for_the_writers_serves_the_embedding_too(loaded: Loaded, measured: Measurement) -> None:
    direction = derive(loaded, measured, Recipe(layer=1, sites=("writers",)))
    assert direction.meta.sites == ("writers",)
    assert direction.embedding is not None
    assert torch.equal(direction.embedding, direction.directions[0])


def test_rows_are_the_methods_rows(loaded: Loaded, measured: Measurement) -> None:
    a, h = measured.mean_harmless, measured.mean_harmful
    each = derive(loaded, measured, Recipe("slerp", 0.5, "all")).directions[:, 0]
    torch.testing.assert_close(each[2], slerp_direction(a[2], h[2], 0.5).float())
    one = derive(loaded, measured, Recipe("linear", layer=1)).directions[:, 0]
    torch.testing.assert_close(one[2], linear_direction(a[1], h[1]).float())


def test_reference_is_the_bisector_for_slerp_at_one_and_the_midpoint_else(
    loaded: Loaded, measured: Measurement
) -> None:
    assert not derive(loaded, measured, Recipe("slerp", 1.0, 1)).reference.any()
    direction = derive(loaded, measured, Recipe("linear", layer=1))
    middle = (measured.mean_harmful + measured.mean_harmless).float() / 2
    torch.testing.assert_close(direction.reference[:, 0], (middle * direction.directions[:, 0]).sum(-1))


def test_a_layer_without_signal_is_left_unsteered_with_all_and_an_error_alone(
    loaded: Loaded, measured: Measurement
) -> None:
    means = measured.mean_harmful.clone()
    means[1] = measured.mean_harmless[1]
    silent = replace(measured, mean_harmful=means)
    direction = derive(loaded, silent, Recipe(layer="all"))
    assert not direction.directions[1].any()
    assert direction.directions[0].any()
    assert torch.isfinite(direction.directions).all()
    with pytest.raises(DegenerateError):
        derive(loaded, silent, Recipe(layer=1))
    with pytest.raises(DegenerateError, match="at no layer"):
        derive(loaded, replace(measured, mean_harmful=measured.mean_harmless), Recipe(layer="all"))


def test_auto_takes_the_best_candidate_and_says_so(loaded: Loaded, measured: Measurement) -> None:
    direction = fit(loaded, measured, Recipe())
    selection = direction.meta.selection
    chosen = next(c for c in selection["candidates"] if c["layer"] == direction.meta.source_layer)
    fewest = min(c["refused"] for c in selection["candidates"])
    assert chosen["refused"] <= fewest + 1 / selection["prompts"]
    assert chosen["kl"] == min(
        c["kl"] for c in selection["candidates"] if c["refused"] <= fewest + 1 / selection["prompts"]
    )
    Direction.from_bytes(direction.to_bytes())


def test_bad_recipes_are_refused(loaded: Loaded, measured: Measurement) -> None:
    with pytest.raises(InvalidInput, match="accepted: slerp, linear, projected"):
        Recipe("magic")
    with pytest.raises(InvalidInput, match="finite"):
        Recipe(t=float("nan"))
    with pytest.raises(InvalidInput, match="layers 0 to 2"):
        derive(loaded, measured, Recipe(layer=7))
