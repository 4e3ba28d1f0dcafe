"""The study of one real model: its draws share no prompt, its intervals are over draws and prompts, it runs nothing
twice, and its report says what the model did."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from experiments.slerp_study.__main__ import app
from experiments.slerp_study.contrasts import crossed
from experiments.slerp_study.draws import FITTING, PRIMARY, SUBSET, VALIDATION, WAYS, Drawn, Rescaled, drawn
from steer.errors import InvalidInput
from steer.geometry import linear_t, slerp_direction
from steer.lab.measurement import Contrast, Sample
from steer.lab.prompts import PromptSet
from tests import models

NEEDED = 2 * FITTING + VALIDATION


def prompts(name: str, count: int) -> PromptSet:
    return PromptSet(name, "", tuple(f"{name} {number}" for number in range(count)))


def test_draws_validation_and_test_share_no_prompt_and_are_the_same_each_time() -> None:
    made = Drawn.of(prompts("a", NEEDED + 9), 2, 5)
    parts = [*made.fitting, made.validation, made.test]
    assert [len(part) for part in parts] == [FITTING, FITTING, VALIDATION, 5]
    assert len({prompt for part in parts for prompt in part.prompts}) == NEEDED + 5
    assert made == Drawn.of(prompts("a", NEEDED + 9), 2, 5)


def test_too_few_prompts_are_told_for_both_classes() -> None:
    with pytest.raises(InvalidInput) as raised:
        drawn(prompts("a", 9), prompts("b", 8), 2, 4)
    assert [problem.split(";")[0] for problem in raised.value.problems] == [
        "a: has 9 different prompts",
        "b: has 8 different prompts",
    ]
    assert str(NEEDED + 4) in raised.value.problems[0]


def test_every_arm_that_is_named_beforehand_is_run() -> None:
    assert set(SUBSET) <= set(WAYS)
    assert {name for pair in PRIMARY for name in pair} <= set(SUBSET)


def test_values_that_all_agree_have_no_interval_and_a_shift_moves_it() -> None:
    same, _ = crossed(lambda x: x, np.full((3, 5), 0.25))
    assert (same.value, same.low, same.high) == (0.25, 0.25, 0.25)
    values = np.random.default_rng(1).normal(size=(4, 40))
    one, _ = crossed(lambda x: x, values)
    moved, p = crossed(lambda x: x, values + 5)
    assert one.value == pytest.approx(values.mean())
    assert one.low < one.value < one.high
    assert np.subtract([moved.low, moved.high], [one.low, one.high]) == pytest.approx([5, 5])
    assert p < 0.001


def test_draws_that_differ_widen_the_interval_as_prompts_that_differ_do() -> None:
    """Over prompts alone the first would have no width, over draws alone the second."""
    by_draw = np.repeat([[0.0], [1.0], [0.0], [1.0]], 40, axis=1)
    for values in (by_draw, by_draw.T):
        found, _ = crossed(lambda x: x, values)
        assert found.high - found.low > 0.2


def test_an_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(50):
        draw, prompt = rng.normal(size=(8, 1)), rng.normal(size=(1, 40))
        found, _ = crossed(lambda x: x, draw + prompt + rng.normal(size=(8, 40)))
        hits += found.low <= 0 <= found.high
    assert hits >= 43


@given(st.floats(0.5, 2.0), st.integers(0, 9))
def test_a_harmful_mean_of_another_length_is_another_t_of_slerp(factor: float, seed: int) -> None:
    a, h = torch.randn(2, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).abs()
    (row,) = Rescaled(factor=factor).rows(Contrast(Sample(a), Sample(h)))
    assert torch.allclose(row, slerp_direction(a, h, linear_t(a, h * factor)), atol=1e-9)


def saved(folder: Path) -> list[str]:
    """A tiny model, and the options that name it and enough prompts."""
    models.tiny("llama").save_pretrained(folder / "model")
    models.tokenizer().save_pretrained(folder / "model")
    for name, letters in (("harmful", "abc"), ("harmless", "xyz")):
        lines = [letters * (1 + n % 5) + "?" * (n // 5) for n in range(NEEDED + 4)]
        (folder / f"{name}.txt").write_text("\n".join(lines) + "\n")
    return [str(folder / "model"), *(part for n in ("harmful", "harmless") for part in (f"--{n}", f"{folder / n}.txt"))]


def test_the_command_runs_every_arm_once_and_reports_what_it_kept(tmp_path: Path) -> None:
    arms = ["linear", "slerp 0", "slerp 1", "slerp 0 one-sided", "random"]
    command = [*saved(tmp_path), "-o", str(tmp_path / "out"), "--draws", "2", "--most", "4", "--max-tokens", "3"]
    command += ["--arms", ",".join(arms), "--kl", "0.02"]
    first = CliRunner().invoke(app, command)
    assert first.exit_code == 0, first.output
    kept = (tmp_path / "out" / "results.jsonl").read_bytes()
    report = json.loads((tmp_path / "out" / "draws.json").read_text())
    values = {line["key"]: line["value"] for line in map(json.loads, kept.decode().splitlines()[1:])}
    assert [(arm["arm"], arm["condition"]) for arm in report["arms"]] == [
        (name, condition) for condition in ("strength 1", "KL 0.02") for name in arms
    ]
    for arm in report["arms"]:
        own = [values[f"draw {draw}, {arm['arm']}, {arm['condition']}"] for draw in range(2)]
        there = [each["found"] for each in own if each["found"] is not None]
        assert arm["draws"] == len(there)
        if there:
            assert arm["kl"]["value"] == pytest.approx(np.mean([each["kl"] for each in there]))
            assert arm["refused"]["low"] <= arm["refused"]["value"] <= arm["refused"]["high"]
    contrasts = [(c["first"], c["second"]) for c in report["contrasts"] if c["condition"] == "strength 1"]
    assert contrasts == [pair for pair in PRIMARY for _ in range(2)]
    assert (tmp_path / "out" / "draws.png").stat().st_size > 1000
    again = CliRunner().invoke(app, command)
    assert again.exit_code == 0, again.output
    assert (tmp_path / "out" / "results.jsonl").read_bytes() == kept


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--arms", "linear,spherical"], "spherical: not known"),
        (["--layer", "9"], "the model has layers 0 to"),
        (["--kl", "0.02,x"], "numbers separated by commas"),
        (["--kl", "-1"], "above 0"),
        (["--prompts", "somewhere"], "--prompts: is for many models"),
        (["--source-layers", "3"], "--source-layers: is for many models"),
        (["second-model"], "2 are given"),
    ],
)
def test_what_cannot_be_run_is_refused(tmp_path: Path, more: list[str], said: str) -> None:
    found = CliRunner().invoke(
        app, [*saved(tmp_path), "-o", str(tmp_path / "out"), "--draws", "2", "--most", "4", *more]
    )
    assert found.exit_code != 0
    assert said in " ".join(found.output.split())


def test_an_option_of_one_real_model_is_not_ignored_without_its_prompts(tmp_path: Path) -> None:
    found = CliRunner().invoke(app, [saved(tmp_path)[0], "-o", str(tmp_path / "out"), "--draws", "2", "--kl", "0.1"])
    assert found.exit_code != 0
    for name in ("--draws", "--kl"):
        assert f"{name}: is for one real model" in " ".join(found.output.split())
