"""Arms are what the options ask for, each with a name of its own, and every wrong option is named."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from steer.direction import MAX_VALUE, Direction
from steer.errors import InvalidInput, SpecError
from steer.lab.evaluation.arms import arms_of, control
from steer.names import MODES
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
    assert (arm.name, arm.mode, arm.strength) == ("one:one_sided=1.5", "one_sided", 1.5)


def test_every_file_in_every_mode_at_every_strength(files: list[Path]) -> None:
    arms = arms_of(files, ["ablate", "one_sided"], [0, 0.25, 1])
    assert len({arm.name for arm in arms}) == 12
    for arm in arms:
        (wanted,) = parse(arm.name)
        assert (wanted.direction, wanted.mode, wanted.strength) == (arm.name.partition(":")[0], arm.mode, arm.strength)
    assert len({arm.digest for arm in arms}) == 2


def test_layers_and_tokens_are_said_as_a_request_says_them(files: list[Path]) -> None:
    arms = arms_of(files[:1], None, [1], 1, ["1-2", "all"], ["not-first", "all"])
    own = [arm for arm in arms if not arm.control]
    assert [arm.name for arm in own] == [
        f"one:one_sided{where}=1" for where in ("@1-2@not-first", "@1-2", "@not-first", "")
    ]
    for arm in arms:
        (wanted,) = parse(arm.name)
        assert (wanted.layers, wanted.tokens) == (arm.layers, arm.tokens)
        assert arm.candidate.entry(wanted.direction).tokens == arm.tokens
        assert arm.at(0.5).name == arm.name.replace("=1", "=0.5")
    assert [arm.name for arm in arms if arm.control] == [arm.name.replace("one:", "one.random0:") for arm in own]
    with pytest.raises(InvalidInput) as caught:
        arms_of(files, None, None, 0, ["2-1", "x"], ["odd"])
    text = str(caught.value)
    assert all(part in text for part in ("--layers: '2-1' is not", "--layers: 'x' is not", "--tokens: 'odd' is not"))
    with pytest.raises(SpecError, match="the layers 0 to 2"):
        arms_of(files, None, None, 0, ["3"])


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
    names = [f"{name}:{mode}=1.5" for mode in ("ablate", "one_sided") for name in ("one", "one.random0", "one.random1")]
    assert [arm.name for arm in arms] == names
    assert [arm.control for arm in arms] == [False, True, True] * 2
    assert len({arm.digest for arm in arms}) == 3
    assert [arm.digest for arm in arms] == [a.digest for a in arms_of(files[:1], list(MODES[:1] + MODES[3:4]), None, 2)]


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


def test_the_plane_of_a_control_is_turned_with_its_row() -> None:
    own = models.direction(models.tiny("llama"), plane=True)
    random = Direction.from_bytes(control(own, 0).to_bytes())
    was, now = own.tensors(), random.tensors()
    before, after = (torch.cat([each["directions"][:, 0], each["axis"]]) for each in (was, now))
    assert torch.allclose(before @ before.T, after @ after.T, atol=1e-6)
    assert torch.equal(was["angles"], now["angles"])
    assert float((was["axis"] * now["axis"]).sum(-1).abs().max()) < 0.6


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
