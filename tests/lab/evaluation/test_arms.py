"""Arms are what the options ask for, each with a name of its own, and every wrong option is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from steer.errors import InvalidInput
from steer.lab.evaluation.arms import arms_of
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
