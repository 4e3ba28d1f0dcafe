"""Arms are what the options ask for, each with a name of its own, and every wrong option is named."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from steer.direction import MAX_VALUE, Direction
from steer.errors import InvalidInput, SpecError
from steer.geometry import orthogonal_part
from steer.lab.evaluation.arms import arms_of, control
from steer.spec import parse
from tests import models


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    model = models.tiny("llama")
    made = [tmp_path / "one.safetensors", tmp_path / "two.safetensors"]
    for seed, path in enumerate(made, 1):
        models.direction(model, seed=seed, mode="one_sided", strength=1.5).save(path)
    return made


def test_a_file_says_what_no_option_does(files: list[Path]) -> None:
    (arm,) = arms_of(files[:1], None, None)
    assert (arm.name, arm.asked.mode, arm.asked.strength) == ("one:one_sided=1.5", "one_sided", 1.5)


def test_every_file_in_every_mode_at_every_strength(files: list[Path]) -> None:
    arms = arms_of(files, ["ablate", "one_sided"], [0, 0.25, 1])
    assert len({arm.name for arm in arms}) == 12
    for arm in arms:
        (wanted,) = parse(arm.name)
        asked = arm.asked
        assert (wanted.direction, wanted.mode, wanted.strength) == (asked.direction, asked.mode, asked.strength)
    assert len({arm.asked.digest for arm in arms}) == 2


def test_layers_and_tokens_are_said_as_a_request_says_them(files: list[Path]) -> None:
    arms = arms_of(files[:1], None, [1], 1, ["1-2", "all"], ["not-first", "all"])
    own = [arm for arm in arms if not arm.control]
    assert [arm.name for arm in own] == [
        f"one:one_sided{where}=1" for where in ("@1-2@not-first", "@1-2", "@not-first", "")
    ]
    for arm in arms:
        (wanted,) = parse(arm.name)
        assert (wanted.layers, wanted.tokens) == (arm.asked.layers, arm.asked.tokens)
        assert arm.entry(wanted.direction).tokens == arm.asked.tokens
        assert arm.asking(strength=0.5).name == arm.name.replace("=1", "=0.5")
    assert [arm.name for arm in arms if arm.control] == [arm.name.replace("one:", "one.random0:") for arm in own]
    with pytest.raises(InvalidInput) as caught:
        arms_of(files, None, None, 0, ["2-1", "x"], ["odd"])
    text = str(caught.value)
    assert all(part in text for part in ("--layers: '2-1' is not", "--layers: 'x' is not", "--tokens: 'odd' is not"))
    with pytest.raises(SpecError, match="the layers 0 to 2"):
        arms_of(files, None, None, 0, ["3"])


def test_shifts_and_conditions_are_said_as_a_request_says_them(files: list[Path]) -> None:
    arms = arms_of(files[:1], None, [1], 1, shifts=[0, -0.5], condition="each:two@0>0.25", probe=files[1])
    assert [arm.name for arm in arms if not arm.control] == [
        f"one:one_sided{shift}?each:two@0>0.25=1" for shift in ("", "^-0.5")
    ]
    for arm in arms:
        (wanted,) = parse(arm.name)
        assert (wanted.shift, str(wanted.condition)) == (arm.asked.shift, str(arm.asked.condition))
        assert arm.rows == 2
        entry = arm.entry("one", "two")
        assert entry.shift == arm.asked.shift
        assert entry.layers == "1-2", "after the layer of the condition"
        assert arm.probe is not None
        assert torch.equal(arm.probe.directions, Direction.load(files[1]).directions)
        assert arm.way == arm.name.removesuffix("=1")
    assert {arm.asked.condition.digest for arm in arms if arm.asked.condition} == {
        arms_of(files[1:], None, None)[0].asked.digest
    }
    for condition, told in (
        ("three@0>0.25", "--condition: 'three' is no file of --direction or --probe"),
        ("two@0", "--condition: 'two@0' is not a condition"),
        ("one@0>0.25", "is not of the condition's direction, whose name is 'one'"),
    ):
        with pytest.raises(InvalidInput, match=told):
            arms_of(files, None, None, condition=condition, probe=files[1])
    for wrong, told in (({"condition": "two@2>0"}, "one must come after it"), ({"shifts": [9.0]}, "--shifts: 9.0")):
        with pytest.raises((InvalidInput, SpecError), match=told):
            arms_of(files, None, None, **wrong)


def test_a_mode_with_the_norm_kept_is_an_arm_of_its_own(files: list[Path]) -> None:
    arms = arms_of(files[:1], ["ablate:norm", "ablate", "add:norm"], [0.5, 1])
    assert [arm.name for arm in arms] == [
        f"one:{way}={strength}" for way in ("ablate", "ablate:norm", "add:norm") for strength in ("0.5", "1")
    ]
    assert [arm.entry("one").norm_preserving for arm in arms[::2]] == [None, True, True]
    with pytest.raises(InvalidInput, match=r"'rotate:norm' is not known; accepted: ablate, ablate:norm, add, "):
        arms_of(files[:1], ["rotate:norm"], None)


def test_every_problem_is_named(files: list[Path], tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    same = tmp_path / "other" / "one.safetensors"
    same.write_bytes(files[0].read_bytes())
    with pytest.raises(InvalidInput) as caught:
        arms_of([*files, same], ["ablate", "melt"], [1, 99, 1])
    text = str(caught.value)
    assert all(part in text for part in ("called 'one'", "'melt'", "99 is not within", "asked for twice"))


def test_files_for_different_sites_are_not_mixed(files: list[Path], tmp_path: Path) -> None:
    writers = tmp_path / "writers.safetensors"
    models.direction(models.tiny("llama"), shared=True, sites=("writers",)).save(writers)
    with pytest.raises(InvalidInput, match="different sites"):
        arms_of([files[0], writers], None, None)


def test_controls_stand_beside_each_file_in_each_mode(files: list[Path]) -> None:
    arms = arms_of(files[:1], ["ablate", "one_sided"], None, controls=2)
    ways = ("ablate=1", "one_sided=1.5")  # the file's strength is of its own mode
    names = [f"{name}:{way}" for way in ways for name in ("one", "one.random0", "one.random1")]
    assert [arm.name for arm in arms] == names
    assert [arm.control for arm in arms] == [False, True, True] * 2
    assert len({arm.asked.digest for arm in arms}) == 3
    assert [arm.asked.digest for arm in arms] == [
        a.asked.digest for a in arms_of(files[:1], ["ablate", "one_sided"], None, 2)
    ]


@pytest.mark.parametrize("rank", [1, 2])
def test_a_control_has_the_shape_of_its_direction_and_nothing_of_its_content(rank: int) -> None:
    model = models.tiny("llama")
    own = models.direction(model, k=rank, embedding=True)
    own.directions[1] = 0
    random, other = control(own, 0), control(own, 1)
    assert Direction.from_bytes(random.to_bytes()).meta.method == "random"
    assert torch.equal(random.directions, control(own, 0).directions)

    def gram(direction: Direction) -> torch.Tensor:
        assert direction.embedding is not None
        rows = torch.cat([direction.directions.flatten(0, 1), direction.embedding])
        return rows @ rows.T

    for one in (random, other):
        assert torch.allclose(gram(one), gram(own), atol=1e-6), "norms, angles between rows, and layers that are left"
        assert float((one.directions * own.directions).sum(-1).abs().max()) < 0.6
    assert float((random.directions * other.directions).sum(-1).abs().max()) < 0.6
    assert torch.equal(random.weights, own.weights)
    for name in ("mean_harmful", "mean_harmless", "mean_harmless_all"):
        assert torch.equal(getattr(random, name), getattr(own, name))


@pytest.mark.parametrize("to", [0.0, None])
def test_a_control_turns_in_the_plane_of_its_own_row_by_the_angles_of_its_own_means(to: float | None) -> None:
    """The gate stands a quarter of the way from the harmless to the harmful mean; without `to`, which is the axis, the
    target is the harmless mean."""

    def turns(direction: Direction) -> list[torch.Tensor]:
        assert direction.axis is not None
        plane = torch.stack([direction.axis, direction.directions[:, 0]], 1).double()
        means = direction.mean_harmless.double(), direction.mean_harmful.double()
        each = [(plane @ mean[..., None])[..., 0] for mean in means]
        assert torch.allclose(each[0].norm(dim=-1), means[0].norm(dim=-1)), "the harmless mean lies in the plane"
        return [torch.atan2(q, p).float() for p, q in (one.unbind(-1) for one in each)]

    own = models.direction(models.tiny("llama"), plane=True)
    rows = own.directions[:, 0]
    axis = torch.stack(list(map(orthogonal_part, rows, own.mean_harmless))).float()
    means = (own.mean_harmless * axis).sum(-1, keepdim=True) * axis
    own = replace(own, axis=axis, mean_harmless=means + rows, mean_harmful=means + 4 * rows)
    a, h = turns(own)
    gate = a + 0.25 * (h - a)
    target = torch.full_like(a, to) if to is not None else a
    own = replace(own, angles=torch.stack([gate, torch.minimum(target, gate)], -1))
    assert (h > a).all()
    seen = set()
    for seed in range(4):
        random = Direction.from_bytes(control(own, seed).to_bytes())
        assert random.angles is not None
        assert float((rows * random.directions[:, 0]).sum(-1).abs().max()) < 0.6
        b, g = turns(random)
        gate, target = random.angles.unbind(-1)
        seen |= set((sided := g > b).tolist())
        assert torch.allclose(gate[sided], (b + 0.25 * (g - b))[sided], atol=1e-3)
        expected = torch.minimum(b if to is None else torch.full_like(b, to), gate)
        assert torch.allclose(target[sided], expected[sided], atol=1e-3)
        assert (gate[~sided] == MAX_VALUE).all(), "where no side is the harmful one, nothing is beyond the gate"
    assert seen == {True, False}


def test_the_gate_of_a_control_stands_between_the_means_where_it_stood() -> None:
    own = models.direction(models.tiny("llama"), mode="one_sided")

    def along(direction: Direction) -> tuple[torch.Tensor, torch.Tensor]:
        rows = direction.directions[:, 0]
        return (rows * direction.mean_harmless).sum(-1)[:, None], (rows * direction.mean_harmful).sum(-1)[:, None]

    a, h = along(own)
    own = replace(own, reference=a + 0.25 * (h - a), target=torch.minimum(a, a + 0.25 * (h - a)))
    random = control(own, 3)
    b, g = along(random)
    assert (g - b).sum() > 0, "it points to the harmful side"
    sided = (h > a) & (g > b)
    assert sided.any()
    assert random.target is not None
    assert torch.allclose(random.reference[sided], (b + 0.25 * (g - b))[sided], atol=1e-4)
    assert torch.allclose(random.target[sided], b[sided], atol=1e-4)
    assert (random.reference[~sided] == MAX_VALUE).all(), "where no side is the harmful one, nothing is above the gate"
