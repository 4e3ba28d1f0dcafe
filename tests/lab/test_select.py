"""Selecting: what is planted wins, the file says why, and a grid that cannot be made is refused as a whole."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from steer.cli.app import app
from steer.demo import MODEL, PROMPTS
from steer.direction import Direction
from steer.errors import DegenerateError, InvalidInput, NothingFound
from steer.hf.load import Loaded, load
from steer.hf.steering import Steering
from steer.lab.behaviour import REFUSAL
from steer.lab.derive import Recipe
from steer.lab.evaluator import Evaluator
from steer.lab.judge import ChatJudge
from steer.lab.measure import MeasurementOptions, measure
from steer.lab.measurement import Measurement
from steer.lab.methods import make_method
from steer.lab.probe import HFEvaluator
from steer.lab.prompts import PromptSet, read_prompts
from steer.lab.select import Action, Grid, select
from steer.lab.source import TransformersSource
from tests.lab.judges import judging

GOOD = 6
SLERP, LINEAR = make_method("slerp", {"t": 0}), make_method("linear")


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    return load(str(MODEL))


@pytest.fixture(scope="module")
def sets() -> tuple[PromptSet, PromptSet]:
    found = [read_prompts(str(PROMPTS / f"{cls}.train.txt")) for cls in ("refused", "harmless")]
    return tuple(replace(s, prompts=s.prompts[:24]) for s in found)  # type: ignore[return-value]


@pytest.fixture(scope="module")
def planted(loaded: Loaded, sets: tuple[PromptSet, PromptSet]) -> Measurement:
    """The demo model's means at layer GOOD; at the others the same in directions that mean nothing."""
    found = measure(TransformersSource(loaded), *sets, MeasurementOptions((-1, -3)))
    generator = torch.Generator().manual_seed(0)
    harmful = found.harmful.mean.clone()
    for layer in range(found.layers):
        if layer != GOOD:
            difference = torch.randn(harmful.shape[-1], generator=generator, dtype=torch.float64)
            size = found.harmless.mean[0, layer].norm()
            harmful[0, layer] = found.harmless.mean[0, layer] + difference / difference.norm() * size
    harmful[1] = found.harmless.mean[1]
    return replace(found, harmful=replace(found.harmful, mean=harmful))


@pytest.fixture(scope="module")
def evaluator(loaded: Loaded) -> Evaluator:
    return HFEvaluator(loaded, Steering(loaded.model, rows=40, rank=1), max_tokens=16)


@pytest.mark.parametrize("survivors", [4, 100])
def test_the_planted_layer_wins(
    planted: Measurement, sets: tuple[PromptSet, PromptSet], evaluator: Evaluator, survivors: int
) -> None:
    """Through the first-token evaluator, and without it."""
    grid = Grid((SLERP, LINEAR), (-1,), actions=(Action("ablate"), Action("one_sided")))
    direction = select(
        planted, Recipe(), grid, *sets, lambda _rank, _tokens: evaluator, survivors=survivors, prompts=16
    )
    assert direction.meta.source_layer == GOOD
    selection = direction.meta.selection
    rows = selection["candidates"]
    assert len(rows) == 2 * 2 * 8
    assert selection["screened"] == (survivors == 4)
    answered = [row for row in rows if "refused" in row]
    assert len(answered) == min(survivors, len(rows))
    if survivors == 4:
        assert all(row["layer"] == GOOD for row in answered)
        worst = max(row["log_odds"] for row in answered)
        assert worst < min(row["log_odds"] for row in rows if "refused" not in row)
    else:
        bad = [row for row in answered if row["layer"] != GOOD]
        assert all(row["stopped"] for row in bad if row["refused"] == 1)
        assert sum(row["prompts"] for row in bad) < 16 * len(bad)
    mine = next(
        row
        for row in answered
        if (row["layer"], row["method"], row["mode"]) == (GOOD, direction.meta.method, direction.meta.mode)
    )
    assert mine["refused"] <= 1 / 16
    assert selection["refused_plain"] == 1
    assert mine["kl"] == min(row["kl"] for row in answered if row["refused"] <= 1 / 16 and not row["stopped"])
    Direction.from_bytes(direction.to_bytes())


def test_a_behaviour_without_openings_is_not_screened(
    planted: Measurement, sets: tuple[PromptSet, PromptSet], evaluator: Evaluator
) -> None:
    blind = REFUSAL.model_copy(update={"openings": ()})
    direction = select(
        planted,
        Recipe(),
        Grid((SLERP,), (-1,), layers=(GOOD, 0)),
        *sets,
        lambda _rank, _tokens: evaluator,
        behaviour=blind,
        survivors=1,
        prompts=8,
    )
    assert direction.meta.source_layer == GOOD
    assert not direction.meta.selection["screened"]
    assert all("refused" in row for row in direction.meta.selection["candidates"])


def test_a_judge_decides_in_place_of_the_patterns(
    planted: Measurement, sets: tuple[PromptSet, PromptSet], evaluator: Evaluator
) -> None:
    grid = Grid((SLERP,), (-1,), layers=(GOOD, 0))
    asked: list[object] = []

    def verdict(body: object) -> tuple[int, str]:
        asked.append(body)
        return 200, "yes" if len(asked) <= 16 else "no"  # the plain answers come first, to 8 prompts of each set

    with judging(verdict) as (url, _, _):
        judge = ChatJudge(url, "judge", REFUSAL)
        found = select(planted, Recipe(), grid, *sets, lambda _rank, _tokens: evaluator, judge=judge, prompts=8)
    assert found.meta.selection["refused_plain"] == 1
    assert [row["refused"] for row in found.meta.selection["candidates"]] == [0, 0]


def test_nothing_is_found_where_nothing_can_be_noticed_or_nothing_is_less(
    planted: Measurement, sets: tuple[PromptSet, PromptSet], evaluator: Evaluator
) -> None:
    def tried(harmful: PromptSet, harmless: PromptSet, layer: int = GOOD, prompts: int = 8) -> Direction:
        grid = Grid((SLERP,), (-1,), layers=(layer,))
        return select(planted, Recipe(), grid, harmful, harmless, lambda _rank, _tokens: evaluator, prompts=prompts)

    harmful, harmless = sets
    with pytest.raises(NothingFound, match=r"in 0 of the 8 answers .* 8 of 8 answers to the harmless .* swapped"):
        tried(harmless, harmful)
    with pytest.raises(
        NothingFound, match=r"in 4 of the 4 answers .*: give 1\.8 times as many prompts \(and try as many\)"
    ):
        tried(harmful, harmless, prompts=4)
    with pytest.raises(NothingFound, match=r"none of 1 candidates lessens 'refusal', .* in 8 of 8 answers"):
        tried(harmful, harmless, layer=0)


def test_select_is_a_command(planted: Measurement, tmp_path: Path) -> None:
    measured, made = tmp_path / "m.safetensors", tmp_path / "d.safetensors"
    planted.save(measured)
    options = [f"--{cls}={PROMPTS / name}.test.txt" for cls, name in (("harmful", "refused"), ("harmless", "harmless"))]
    command = ["select", str(measured), str(MODEL), *options, "-o", str(made)]
    less = ["--prompts", "8", "--max-tokens", "16", "--method", "slerp", "--t", "0,1", "--survivors", "3"]
    done = CliRunner().invoke(app, [*command, *less, "--position", "-1", "--layer", f"0,{GOOD}"])
    assert done.exit_code == 0, done.output
    assert re.search(r"the plain model [ |]*1\.00", done.output)
    direction = Direction.load(made)
    assert len([row for row in direction.meta.selection["candidates"] if "refused" in row]) == 3
    assert direction.meta.mode in ("ablate", "one_sided")
    for bad, said in (
        (["--layer", "one"], "--layer: 'one' is not accepted: a whole number"),
        (["--mode", "no"], "mode"),
        (["--method", "linear", "--t", "0.5"], "--t: no method of linear has a t"),
    ):
        done = CliRunner().invoke(app, [*command, *bad])
        assert done.exit_code == 2
        assert said in done.output


def test_a_grid_that_cannot_be_made_is_refused_with_all_reasons(
    planted: Measurement, sets: tuple[PromptSet, PromptSet], evaluator: Evaluator
) -> None:
    def tried(grid: Grid) -> Direction:
        return select(planted, Recipe(), grid, *sets, lambda _rank, _tokens: evaluator)

    with pytest.raises(InvalidInput) as caught:
        tried(Grid((SLERP, make_method("pca")), (-1, 7), layers=(1, 99)))
    text = "; ".join(caught.value.problems)
    for part in ("position 7 was not measured", "layer 99 does not exist", "'pca' needs the prompts' spread"):
        assert part in text
    with pytest.raises(DegenerateError, match="position -3: at no layer"):
        tried(Grid((SLERP,), (-3,)))
    with pytest.raises(InvalidInput) as caught:
        Grid((), (), actions=())
    assert len(caught.value.problems) == 3
    bare = replace(planted, harmless=replace(planted.harmless, mean_all=None))
    with pytest.raises(InvalidInput, match="the mode 'affine' cannot be used with 'slerp'"):
        select(
            bare, Recipe(), Grid((SLERP,), (-1,), actions=(Action("affine"),)), *sets, lambda _rank, _tokens: evaluator
        )


def test_the_measurement_is_left_as_it_was(planted: Measurement, tmp_path: Path) -> None:
    planted.save(tmp_path / "m.safetensors")
    assert Measurement.load(tmp_path / "m.safetensors").meta.positions == (-1, -3)
