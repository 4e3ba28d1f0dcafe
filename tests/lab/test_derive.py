"""Deriving: the file holds what the mathematics says."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

from steer.direction import MAX_VALUE, Direction
from steer.errors import DegenerateError, InvalidInput, SpecError
from steer.geometry import linear_direction, slerp_direction, unit
from steer.hf.load import Loaded
from steer.lab.derive import Recipe, _angles, derive
from steer.lab.measure import MeasurementOptions, measure
from steer.lab.measurement import Measurement
from steer.lab.methods import METHODS, make_method
from steer.lab.source import TransformersSource
from steer.names import MODES
from steer.runtime.op import GATE, coefficients
from steer.shape import check_mode
from tests.lab.test_measure import HARMFUL, HARMLESS


@pytest.fixture(scope="module")
def measured(loaded: Loaded) -> Measurement:
    return measure(TransformersSource(loaded), HARMFUL, HARMLESS, MeasurementOptions((-1, -2), vectors=True))


def recipe(method: str = "slerp", layer: Any = "auto", t: float | None = None, **more: Any) -> Recipe:
    return Recipe(make_method(method, {} if t is None else {"t": t}), layer, **more)


@pytest.mark.parametrize("method", list(METHODS))
@pytest.mark.parametrize("layer", ["all", 1, -1])
def test_a_derived_direction_is_a_valid_file(
    measured: Measurement, method: str, layer: int | str, tmp_path: Path
) -> None:
    direction = derive(measured, recipe(method, layer))
    direction.save(tmp_path / "d.safetensors")
    again = Direction.load(tmp_path / "d.safetensors")
    assert torch.equal(again.directions, direction.directions)
    assert again.meta.source_layer == {"all": None, 1: 1, -1: 2}[layer]
    assert again.meta.harmful is not None
    assert again.meta.harmful.count == 13
    assert again.embedding is None


def test_the_same_inputs_make_the_same_bytes_where_the_time_is_given(
    measured: Measurement, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "86400")
    first, second = (derive(measured, recipe("slerp", "all", 0.5)) for _ in range(2))
    assert first.meta.created == "1970-01-02T00:00:00+00:00"
    for name, direction in (("a", first), ("b", second)):
        direction.save(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    for wrong in ("yesterday", "9" * 30, ""):
        monkeypatch.setenv("SOURCE_DATE_EPOCH", wrong)
        with pytest.raises(InvalidInput, match=r"SOURCE_DATE_EPOCH: .* seconds since 1970"):
            derive(measured, recipe("slerp", "all", 0.5))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("method", list(METHODS))
def test_the_default_dtype_of_the_process_changes_nothing(
    measured: Measurement, method: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "86400")
    recipes = [recipe(method, layer, bootstrap=2, target=0.2) for layer in ("all", 1)] + [recipe(method, 1, mode="add")]
    expected = [derive(measured, each).to_bytes() for each in recipes]
    torch.set_default_dtype(dtype)
    try:
        assert [derive(measured, each).to_bytes() for each in recipes] == expected
    finally:
        torch.set_default_dtype(torch.float32)


def test_one_direction_for_the_writers_serves_the_embedding_too(measured: Measurement) -> None:
    direction = derive(measured, recipe(layer=1, sites=("writers",)))
    assert direction.meta.sites == ("writers",)
    assert direction.embedding is not None
    assert torch.equal(direction.embedding, direction.directions[0])


def test_rows_are_the_methods_rows(measured: Measurement) -> None:
    a, h = measured.harmless.mean[0], measured.harmful.mean[0]
    each = derive(measured, recipe("slerp", "all", 0.5)).directions[:, 0]
    torch.testing.assert_close(each[2], slerp_direction(a[2], h[2], 0.5).float())
    one = derive(measured, recipe("linear", 1)).directions[:, 0]
    torch.testing.assert_close(one[2], linear_direction(a[1], h[1]).float())


def test_reference_is_the_midpoint_of_each_layers_own_means_and_the_bisector_where_one_was_made(
    measured: Measurement,
) -> None:
    """A bisector of the source layer's means may have both means of another layer on one side."""
    middle = (measured.harmful.mean[0] + measured.harmless.mean[0]).float() / 2
    for made in (recipe("linear", 1), recipe(layer=1, t=1), recipe(layer="all", t=1)):
        direction = derive(measured, made)
        expected = (middle * direction.directions[:, 0]).sum(-1)
        if made.method.name == "slerp":
            expected[1 if made.layer == 1 else slice(None)] = 0
        torch.testing.assert_close(direction.reference[:, 0], expected)
        assert direction.target is None


def test_where_harmful_text_lies_below_there_is_no_side_and_one_sided_does_nothing(measured: Measurement) -> None:
    """What is above the reference there is harmless text."""
    rows = derive(measured, recipe("linear", 1)).directions[0, 0].double()
    mean = measured.harmful.mean.clone()
    mean[0, 0] = measured.harmless.mean[0, 0] - rows
    turned = replace(measured, harmful=replace(measured.harmful, mean=mean))
    direction = derive(turned, replace(recipe("linear", 1), threshold=0.25, target=0.0, mode="one_sided"))
    sides = ((direction.mean_harmful - direction.mean_harmless) * direction.directions[:, 0]).sum(-1)
    assert (float(sides[0]) < 0, float(sides[1]) > 0) == (True, True)
    far = direction.mean_harmless + 1e3 * direction.directions[:, 0]
    acts = (far * direction.directions[:, 0]).sum(-1) > coefficients(direction, "one_sided")[:, 0, GATE]
    assert acts.tolist() == (sides > 0).tolist()
    assert Direction.from_bytes(direction.to_bytes()).meta == direction.meta


def test_a_target_is_a_place_between_the_means_and_never_above_the_reference(measured: Measurement) -> None:
    direction = derive(measured, replace(recipe("linear", 1), threshold=0.25, target=0.0))
    assert direction.target is not None
    expected = (direction.mean_harmless * direction.directions[:, 0]).sum(-1)
    torch.testing.assert_close(direction.target[:, 0], torch.minimum(expected, direction.reference[:, 0]))
    assert direction.meta.parameters["target"] == 0
    assert Direction.from_bytes(direction.to_bytes()).target is not None
    with pytest.raises(InvalidInput, match="target must not be above the threshold"):
        Recipe(target=0.6)
    with pytest.raises(InvalidInput, match="target: nan is not accepted: a number within ±10"):
        Recipe(target=float("nan"))


def test_a_threshold_is_a_place_between_the_means(measured: Measurement) -> None:
    for share in (-0.25, 0.0, 0.5, 1.0):
        direction = derive(measured, replace(recipe(layer=1), threshold=share))
        point = direction.mean_harmless + share * (direction.mean_harmful - direction.mean_harmless)
        expected = (point * direction.directions[:, 0]).sum(-1)
        torch.testing.assert_close(direction.reference[:, 0], expected, rtol=1e-4, atol=1e-5)
        assert direction.meta.parameters["threshold"] == share
    # projected is orthogonal to harmless text at its source, so there the harmless mean is at 0
    orthogonal = derive(measured, Recipe(make_method("projected"), 1, threshold=0.0))
    assert abs(float(orthogonal.reference[1, 0])) < 1e-5
    with pytest.raises(InvalidInput, match="threshold: nan is not accepted: a number within ±10"):
        Recipe(threshold=float("nan"))


def test_a_layer_without_signal_is_left_unsteered_with_all_and_an_error_alone(measured: Measurement) -> None:
    means = measured.harmful.mean.clone()
    means[0, 1] = measured.harmless.mean[0, 1]
    silent = replace(measured, harmful=replace(measured.harmful, mean=means))
    direction = derive(silent, recipe(layer="all"))
    assert not direction.directions[1].any()
    assert direction.directions[0].any()
    assert torch.isfinite(direction.directions).all()
    with pytest.raises(DegenerateError, match="layer 1: "):
        derive(silent, recipe(layer=1))
    nothing = replace(measured, harmful=measured.harmless)
    for layer in ("all", "widest"):
        with pytest.raises(DegenerateError, match="at no layer"):
            derive(nothing, recipe(layer=layer))


def test_another_position_gives_another_direction(measured: Measurement) -> None:
    first, second = (derive(measured, recipe("linear", 1, position=p)) for p in (None, -2))
    assert first.meta.parameters["position"] == -1
    assert second.meta.parameters["position"] == -2
    expected = linear_direction(measured.harmless.mean[1, 1], measured.harmful.mean[1, 1])
    torch.testing.assert_close(second.directions[0, 0], expected.float())
    with pytest.raises(InvalidInput, match="position 5 was not measured; this measurement has -1, -2"):
        derive(measured, recipe(layer=1, position=5))


def test_the_widest_layer_is_the_one_with_the_widest_angle(measured: Measurement) -> None:
    direction = derive(measured, recipe(layer="widest"))
    angles = [row["angle"] for row in direction.profile()]
    assert direction.meta.source_layer == angles.index(max(angles))  # type: ignore[type-var]


def test_biprojected_is_orthogonal_to_each_layers_harmless_mean(measured: Measurement) -> None:
    direction = derive(measured, recipe("biprojected", 1))
    along = torch.einsum("lkd,ld->lk", direction.directions, unit(measured.harmless.mean[0]).float())
    assert float(along.abs().max()) <= 1e-6
    assert not torch.equal(direction.directions[0], direction.directions[1])


def test_what_is_done_around_a_method_stands_in_the_file(measured: Measurement) -> None:
    around: dict[str, Any] = dict(winsorize=0.9, sparsify=0.25, bootstrap=5, seed=3)
    direction = derive(measured, recipe("slerp", 1, **around))
    parameters = direction.meta.parameters
    assert {k: parameters[k] for k in around} == around
    assert parameters["t"] == 0.0
    assert 0 < float(parameters["bootstrap_cosine"] or 0) <= 1
    assert int((direction.directions[0] != 0).sum()) == 16
    assert direction.reference.any(), "it is no bisector any more"
    Direction.from_bytes(direction.to_bytes())


def test_what_a_measurement_lacks_is_said_with_what_would_give_it(loaded: Loaded, measured: Measurement) -> None:
    bare = measure(TransformersSource(loaded), HARMFUL, HARMLESS)
    for method in ("pca", "whitened", "logistic", "subspace", "cone"):
        with pytest.raises(InvalidInput, match="measure with --vectors"):
            derive(bare, recipe(method, 1))
    with pytest.raises(InvalidInput) as caught:
        derive(bare, recipe(layer=1, winsorize=0.9, bootstrap=3))
    assert len(caught.value.problems) == 2
    clipped = replace(measured, meta=measured.meta.model_copy(update={"winsorize": 0.99}))
    with pytest.raises(InvalidInput, match="already done"):
        derive(clipped, recipe(layer=1, winsorize=0.9))


def test_layers_that_were_not_measured_allow_only_the_modes_that_need_no_means_there(loaded: Loaded) -> None:
    part = measure(TransformersSource(loaded), HARMFUL, HARMLESS, MeasurementOptions(last_layer=1))
    direction = derive(part, recipe("linear", 1))
    assert direction.directions[2].any()
    assert direction.meta.modes == ("ablate", "rotate"), "the plane is the source layer's"
    Direction.from_bytes(direction.to_bytes())
    with pytest.raises(SpecError, match="its modes: ablate, rotate"):
        check_mode(direction, "one_sided", "d")
    with pytest.raises(InvalidInput, match="measured: 2 of 3"):
        derive(part, recipe("linear", 1, mode="one_sided"))
    with pytest.raises(InvalidInput, match="measured: 2 of 3"):
        derive(part, recipe("slerp", 1, mode="one_sided"))
    each = derive(part, recipe("linear", "all"))
    assert set(each.meta.modes) == set(MODES)
    assert not each.directions[2].any()
    with pytest.raises(InvalidInput, match="needs the harmless mean of every layer"):
        derive(part, recipe("biprojected", 1))
    with pytest.raises(InvalidInput, match="this measurement has the layers 0 to 1"):
        derive(part, recipe(layer=2))


def test_bad_recipes_are_refused(measured: Measurement) -> None:
    with pytest.raises(InvalidInput) as caught:
        recipe(winsorize=2.0, sparsify=0.0, bootstrap=1)
    assert len(caught.value.problems) == 3
    with pytest.raises(InvalidInput, match="needs the model"):
        derive(measured, recipe(layer="auto"))
    with pytest.raises(InvalidInput, match="layers 0 to 2"):
        derive(measured, recipe(layer=7))


@pytest.mark.parametrize(
    ("field", "values", "says"),
    [
        ("method", ["slerp", None], "a method, which make_method makes of one of the names slerp"),
        ("layer", [True, 3.0, "3", None, np.arange(2), "Widest"], "a whole number, or one of 'auto', 'widest', 'all'"),
        ("position", ["-1", True, -1.0], "a whole number"),
        ("winsorize", ["0.9", True], "a number"),
        ("sparsify", ["0.9", True], "a number"),
        ("bootstrap", [2.5, True, "3"], "a whole number"),
        ("seed", [1.5, True, None], "a whole number"),
        ("mode", ["ablat", None, ["ablate"]], "one of 'ablate', 'add'"),
        ("strength", ["1", True, None], "a number"),
        ("sites", ["writers", (), ("foo",), [["writers"]], None], "a list of some of 'resid_post', 'writers'"),
        ("threshold", ["0.5", True], "a number"),
        ("target", ["0.5", False], "a number"),
        ("weights", [1.0, "111", (True, 1.0), ("1",), (math.nan,), torch.ones(3)], "a list of finite numbers"),
        ("mlp_weights", [1.0, (math.inf,)], "a list of finite numbers"),
    ],
)
def test_a_recipe_names_what_is_of_another_type(field: str, values: list[Any], says: str) -> None:
    for value in values:
        with pytest.raises(InvalidInput, match=f"^{field}: .* is not accepted: {re.escape(says)}"):
            Recipe(**{field: value})


def test_all_that_is_wrong_with_a_recipe_is_told_at_once() -> None:
    with pytest.raises(InvalidInput) as caught:
        Recipe(**cast(Any, dict(layer="3", position="-1", strength=99.0, winsorize=2, target=0.7, seed=-1)))
    assert list(Recipe(sites=cast(Any, ["writers"]), weights=cast(Any, [1, 0.5])).sites) == ["writers"]
    assert [problem.split(":")[0].split()[0] for problem in caught.value.problems] == [
        "layer",
        "position",
        "winsorize",
        "seed",
        "strength",
        "target",
    ]


def test_add_acts_at_the_source_layer_alone(measured: Measurement) -> None:
    """The difference of means at every layer again is many times as much."""
    one = derive(measured, recipe("linear", 1, mode="add"))
    assert one.weights.tolist() == [0, 1, 0]
    assert one.meta.modes == ("add",), "another mode would act at one layer only"
    assert derive(measured, recipe("linear", "all", mode="add")).weights.tolist() == [1, 1, 1]
    assert derive(measured, recipe("linear", 1)).weights.tolist() == [1, 1, 1]


def test_weights_of_a_recipe_are_those_of_the_file_and_must_leave_something(measured: Measurement) -> None:
    made = derive(measured, replace(recipe(layer=1), weights=(0.0, 0.5, 1.0)))
    assert made.weights.tolist() == [0.0, 0.5, 1.0]
    writers = replace(recipe("projected", layer=1), sites=("writers",))
    assert derive(measured, writers).embedding is not None
    assert derive(measured, replace(writers, weights=(1.0, 1.0, 0.0))).embedding is None
    assert derive(measured, replace(recipe(layer=1), mode="add", weights=(1.0, 0.5, 1.0))).weights.tolist() == [
        0,
        0.5,
        0,
    ]
    with pytest.raises(InvalidInput, match="2 numbers for a model of 3 layers"):
        derive(measured, replace(recipe(layer=1), weights=(0.0, 1.0)))
    for nothing in (recipe(layer=1, weights=(0.0, 0.0, 0.0)), recipe(layer=1, mode="add", weights=(1.0, 0.0, 1.0))):
        with pytest.raises(InvalidInput, match="nothing would be steered"):
            derive(measured, nothing)


def test_weights_of_mlps_are_those_of_the_file_and_need_the_site(measured: Measurement) -> None:
    writers = replace(recipe("projected", layer=1), sites=("writers",))
    made = derive(measured, replace(writers, mlp_weights=(0.0, 0.5, 1.0)))
    assert made.mlp_weights is not None
    assert (made.weights.tolist(), made.mlp_weights.tolist()) == ([1, 1, 1], [0, 0.5, 1])
    assert made.embedding is None
    assert derive(measured, writers).mlp_weights is None
    derive(measured, replace(writers, weights=(0.0, 0.0, 0.0), mlp_weights=(0.0, 0.0, 1.0)))
    with pytest.raises(InvalidInput, match="nothing would be steered"):
        derive(measured, replace(writers, weights=(0.0, 0.0, 0.0), mlp_weights=(0.0, 0.0, 0.0)))
    with pytest.raises(InvalidInput, match="mlp_weights: 1 numbers for a model of 3 layers"):
        derive(measured, replace(writers, mlp_weights=(1.0,)))
    with pytest.raises(InvalidInput, match="mlp_weights needs the site 'writers', got resid_post"):
        replace(recipe(layer=1), mlp_weights=(1.0, 1.0, 1.0))


def test_rows_that_do_not_tell_the_classes_apart_have_no_side(measured: Measurement) -> None:
    """Whichever side of them is called harmful: `one_sided` would act on half of all text."""
    many = replace(recipe("subspace", 1), method=make_method("subspace", {"rank": 3}))
    direction = derive(measured, many)
    difference = measured.harmful.mean[0, 1] - measured.harmless.mean[0, 1]
    components = (direction.directions[1].double() @ difference).abs()
    assert components.min() < 0.2 * components.norm()
    assert "one_sided" not in direction.meta.modes
    assert "clamp" not in direction.meta.modes, "it would hold all text at a number that is of neither class"
    assert "clamp" not in Direction.from_bytes(direction.to_bytes()).meta.modes
    with pytest.raises(InvalidInput, match=r"needs a harmful side of each row, .* with it: ablate"):
        derive(measured, replace(many, mode="one_sided"))
    with pytest.raises(InvalidInput, match="hardly tells the classes apart"):
        derive(measured, replace(many, mode="clamp"))
    assert "one_sided" in derive(measured, recipe("linear", 1)).meta.modes


def test_a_gate_stands_between_angles_on_both_sides_of_half_a_turn(measured: Measurement) -> None:
    """The shorter way round, whichever mean is beyond it; where the harmful one is not the farther there is no gate."""
    direction = derive(measured, recipe(layer=1))
    assert direction.axis is not None
    rows, axis = direction.directions[:, 0].double(), direction.axis.double()
    for first, last, gate in ((3.0, -3.0, 3.1416), (-3.0, 3.0, MAX_VALUE), (0.2, 1.0, 0.6)):
        means = [math.cos(angle) * axis + math.sin(angle) * rows for angle in (first, last)]
        moved = replace(
            measured,
            harmless=replace(measured.harmless, mean=means[0].expand_as(measured.harmless.mean).clone()),
            harmful=replace(measured.harmful, mean=means[1].expand_as(measured.harmful.mean).clone()),
        )
        angles = _angles(moved, recipe(layer=1), direction.directions.double(), axis)
        torch.testing.assert_close(angles[1, 0], torch.tensor(gate, dtype=angles.dtype), rtol=1e-4, atol=1e-3)


def test_a_seed_that_no_generator_takes_is_refused() -> None:
    for seed in (-1, 2**63):
        with pytest.raises(InvalidInput, match=r"seed: .* is not accepted: a whole number from 0"):
            recipe(seed=seed)
