"""The measurement file: what is written is read, and every broken rule is told at once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch

from steer.direction import Dataset, Direction
from steer.errors import DirectionError, InvalidInput
from steer.lab.measurement import Measurement, MeasurementMeta, ModelFacts, Statistics
from steer.names import MEASUREMENT_KEY
from tests import models

D, LAYERS, POSITIONS = 6, 3, (-1, -4)
COUNTS = {"harmful": 5, "harmless": 7}


def statistics(count: int, seed: int, whole: bool) -> Statistics:
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(len(POSITIONS), LAYERS, count, D, generator=generator).bfloat16()
    rows = vectors.double()
    return Statistics(
        rows.mean(2),
        torch.randn(LAYERS, D, generator=generator).double(),
        torch.einsum("plnd,plne->plde", rows, rows) / count if whole else None,
        vectors if whole else None,
    )


def measurement(whole: bool = True) -> Measurement:
    sets = {c: Dataset(name=c, sha256="0" * 64, count=n) for c, n in COUNTS.items()}
    facts = ModelFacts(name="m", architecture="A", d_model=D, layers=LAYERS + 1)
    meta = MeasurementMeta(model=facts, measured=LAYERS, positions=POSITIONS, bos_count=1, **sets)
    return Measurement(meta, *(statistics(n, n, whole) for n in COUNTS.values()))


@pytest.mark.parametrize("whole", [False, True])
def test_what_is_saved_is_loaded_and_saving_again_gives_the_same_bytes(tmp_path: Path, whole: bool) -> None:
    path, again = tmp_path / "m.safetensors", tmp_path / "n.safetensors"
    made = measurement(whole)
    made.save(path)
    loaded = Measurement.load(path)
    assert loaded.meta == made.meta
    assert loaded.tensors().keys() == made.tensors().keys()
    for name, tensor in made.tensors().items():
        assert torch.equal(loaded.tensors()[name], tensor)
    for _ in range(10):  # safetensors itself writes metadata in any order
        loaded.save(again)
        assert again.read_bytes() == path.read_bytes()
    assert list(tmp_path.glob(".*")) == []


def test_a_contrast_is_one_layer_at_one_position() -> None:
    made = measurement()
    contrast = made.contrast(2, -4)
    assert torch.equal(contrast.harmful.mean, made.harmful.mean[1, 2])
    assert contrast.harmless.count == 7
    assert contrast.vectors
    torch.testing.assert_close(contrast.harmless.rows.mean(0), contrast.harmless.mean)
    deviations = contrast.harmless.deviations()
    torch.testing.assert_close(contrast.harmless.covariance(), deviations.T @ deviations / 7)


def test_every_problem_is_told_with_its_tensor(tmp_path: Path) -> None:
    made = measurement()
    bad = made.harmful.mean.clone()
    bad[0, 1, 2] = torch.nan
    broken = replace(
        made,
        harmful=replace(made.harmful, mean=bad, mean_all=torch.zeros(1, D).double()),
        harmless=replace(made.harmless, mean=made.harmless.mean.float(), vectors=made.harmless.vectors[:, :, :2]),  # type: ignore[index]
    )
    with pytest.raises(InvalidInput) as caught:
        broken.save(tmp_path / "m.safetensors")
    told = "\n".join(caught.value.problems)
    for part in (
        "'harmful_mean' has values that are not finite",
        "'harmful_mean_all' has shape [1, 6], it must be [3, 6]",
        "'harmless_mean' has dtype float32, it must be float64",
        "'harmless_vectors' has shape [2, 3, 2, 6], it must be [2, 3, 7, 6]",
    ):
        assert part in told
    assert not list(tmp_path.iterdir())


def test_files_of_another_kind_are_named(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    with pytest.raises(InvalidInput, match="cannot be read"):
        Measurement.load(path)
    path.write_bytes(b"x" * 100)
    with pytest.raises(InvalidInput, match="not a safetensors file"):
        Measurement.load(path)
    models.direction(models.tiny("llama")).save(path)
    with pytest.raises(InvalidInput, match="this is a direction; give a measurement"):
        Measurement.load(path)
    measurement().save(path)
    with pytest.raises(DirectionError, match="this is a measurement: `steer derive`"):
        Direction.load(path)


def test_metadata_and_tensors_are_checked_together(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    made = measurement()
    tensors = {n: t for n, t in made.tensors().items() if n != "harmless_mean"} | {"other": torch.zeros(1)}
    text = made.meta.model_dump_json().replace('"measured":3', '"measured":0')
    safetensors.torch.save_file(tensors, path, {MEASUREMENT_KEY: text})
    with pytest.raises(InvalidInput) as caught:
        Measurement.load(path)
    assert len(caught.value.problems) == 3
    assert all(str(path) in problem for problem in caught.value.problems)
