"""The study: what it counts is what was answered, what is there is not run again, and the theory that its text rests on
holds."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import t as student
from typer.testing import CliRunner

from experiments.slerp_study import pictures
from experiments.slerp_study.__main__ import app
from experiments.slerp_study.arms import METHODS, MODES, SLERP, TS
from experiments.slerp_study.run import subjects
from experiments.slerp_study.sets import read_sets
from experiments.slerp_study.summary import group_figures, group_of, over_seeds
from experiments.slerp_study.trial import Ledger, Trial
from steer.errors import InvalidInput
from steer.geometry import angle, linear_direction, linear_t, slerp_direction, unit
from steer.lab.evaluator import Candidate
from steer.lab.plots import picture
from steer.lab.statistics import Estimate
from tests import models

SETS = {
    "refused.train": [f"{'abc' * n}?" for n in range(1, 9)],
    "harmless.train": [f"{'xy ' * n}z" for n in range(1, 9)],
    "refused.test": ["ab", "cde", "fghi"],
    "harmless.test": ["x", "yz", "w"],
    "borderline.test": ["q", "rr"],
}


def save_prompts(folder: Path, sets: dict[str, list[str]] | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, prompts in (sets or SETS).items():
        (folder / f"{name}.txt").write_text("\n".join(prompts) + "\n")
    return folder


def saved(folder: Path, label: str, seed: int = 0) -> Path:
    """A tiny random model in `folder/label/model` with prompts beside it."""
    path = folder / label / "model"
    models.tiny("llama", seed=seed).save_pretrained(path)
    models.tokenizer().save_pretrained(path)
    save_prompts(folder / label / "prompts")
    return path


def study(*arguments: Any) -> str:
    result = CliRunner().invoke(app, [*map(str, arguments), "--max-tokens", "4"])
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(scope="module")
def studied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two seeds of one random model, studied together, with right answers that no such model gives."""
    folder = tmp_path_factory.mktemp("study")
    for seed in (1, 2):
        path = saved(folder, f"tiny-{seed}", seed)
        never = [json.dumps({"prompt": prompt, "contains": ["never said"]}) for prompt in SETS["refused.test"]]
        (path.parent / "prompts" / "expected.jsonl").write_text("\n".join(never))
    (folder / "out").mkdir()
    study(folder / "tiny-1" / "model", folder / "tiny-2" / "model", "-o", folder / "out")
    return folder


@pytest.fixture(scope="module")
def report(studied: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((studied / "out" / "report.json").read_text())
    return found


def test_the_report_has_every_arm_of_every_model(studied: Path, report: dict[str, Any]) -> None:
    assert [model["label"] for model in report["models"]] == ["tiny-1", "tiny-2"]
    for model in report["models"]:
        arms = {(arm["method"], arm["mode"]) for arm in model["own"]}
        assert arms == {(method, mode) for method in METHODS for mode in MODES}
        assert len({arm["layer"] for arm in model["fixed"]}) == 1
        widest = max(model["geometry"], key=lambda row: row["angle"])["layer"]
        assert model["fixed"][0]["layer"] == widest
        for arm in model["own"]:
            assert arm["rates"]["right"] == {
                "hits": 0,
                "count": 3,
                "rate": 0.0,
                "low": 0.0,
                "high": pytest.approx(0.5615, abs=1e-4),
            }
            assert "kept" not in arm["rates"], "nobody said what is right for harmless prompts"
            assert arm["rates"]["refused"]["count"] == 3
            assert arm["rates"]["over_refused"]["count"] == 2
            assert arm["kl"] > 0
            assert (arm["method"] == "linear") == ("against_linear" not in arm)
    pictures = sorted(path.name for path in (studied / "out").glob("*.png"))
    assert pictures == sorted(
        f"{name}.png"
        for name in ("arc", "article", "front", "layers", "shapes", "strength", "t-sweep", "t-sweep-one-sided")
    )
    text = (studied / "out" / "report.md").read_text()
    assert "## tiny\n" in text
    assert "## tiny-2" in text
    rows = {(row["method"], row["mode"], row["zeroed"]): row for row in report["over_models"]}
    assert len(rows) == len(METHODS) * len(MODES) + 3
    values = [a["kl"] for m in report["models"] for a in m["fixed"] if (a["method"], a["mode"]) == ("linear", "ablate")]
    assert rows["linear", "ablate", False]["kl"] == pytest.approx(sum(values) / 2)


def test_seeds_are_one_group_and_the_unit(report: dict[str, Any]) -> None:
    (group,) = report["groups"]
    assert group["group"] == "tiny"
    linear = [next(a for a in model["own"] if a["method"] == "linear") for model in report["models"]]
    mean = next(arm for arm in group["own"] if (arm["method"], arm["mode"]) == ("linear", "ablate"))["means"]["kl"]
    first, second = (arm["kl"] for arm in linear)
    assert mean["mean"] == pytest.approx((first + second) / 2)
    # Student's interval of two values: half their distance times t(0.975; 1)
    assert mean["high"] - mean["mean"] == pytest.approx(12.7062 * abs(first - second) / 2, rel=1e-4)


def rounded(value: Any) -> Any:
    """Without the last bits, in which measuring again may differ."""
    return json.loads(json.dumps(value), parse_float=lambda text: float(f"{float(text):.5g}"))


def test_what_was_studied_is_not_run_again(studied: Path, report: dict[str, Any]) -> None:
    results = studied / "out" / "tiny-1" / "results.jsonl"
    before, again = results.read_text(), None
    # cut off in the middle of a line, as an interruption leaves it
    results.write_text(before[: len(before) * 3 // 4])
    study(studied / "tiny-1" / "model", "-o", studied / "out")
    assert results.read_text() == before
    again = json.loads((studied / "out" / "report.json").read_text())
    assert rounded(again["models"]) == rounded(report["models"][:1])


def test_results_of_something_else_are_refused(studied: Path) -> None:
    result = CliRunner().invoke(app, [str(studied / "tiny-1" / "model"), "-o", str(studied / "out")])
    assert result.exit_code == 2
    assert "was measured with max_tokens" in result.output
    other = saved(studied / "elsewhere", "tiny-1", seed=9)
    result = CliRunner().invoke(app, [str(other), "-o", str(studied / "out"), "--max-tokens", "4"])
    assert result.exit_code == 2
    assert "was measured with weights" in result.output


def test_source_layers_are_spread_up_to_the_last(studied: Path, tmp_path: Path) -> None:
    study(studied / "tiny-1" / "model", "-o", tmp_path, "--source-layers", "2")
    (model,) = json.loads((tmp_path / "report.json").read_text())["models"]
    assert {row["layer"] for row in model["choosing"]} == {0, 2}
    assert {arm["layer"] for arm in model["own"]} <= {0, 2}


def test_the_trial_counts_what_was_answered(studied: Path) -> None:
    """The same outcomes as answering with one arm at a time."""
    from experiments.slerp_study.arms import Arm
    from steer.hf.load import load
    from steer.hf.steering import Steering
    from steer.lab.behaviour import REFUSAL
    from steer.lab.measurement import Measurement
    from steer.lab.probe import HFEvaluator

    loaded = load(str(studied / "tiny-2" / "model"))
    measurement = Measurement.load(studied / "out" / "tiny-2" / "measurement.safetensors")
    sets = read_sets(studied / "tiny-2" / "prompts")
    probe = HFEvaluator(loaded, Steering(loaded.model, rank=1), max_tokens=4)
    stored = [json.loads(line) for line in (studied / "out" / "tiny-2" / "results.jsonl").read_text().splitlines()]
    kept = {line["key"]: line["value"] for line in stored[1:]}
    identity = stored[0]
    trial = Trial(measurement, probe, sets, REFUSAL, Ledger(studied / "out" / "tiny-2" / "results.jsonl", identity))
    arm = next(arm for arm in trial.chosen().own if (arm.method, arm.mode) == ("slerp 0.5", "one_sided"))
    direction = trial.direction(arm)
    assert direction is not None
    prompts = sets.tested["harmless"].prompts.prompts
    with probe.resident([Candidate.of(direction, "one_sided", 1.0)]) as (steer,):
        rows = probe.divergences(prompts, probe.continuations(prompts), steer)
    found = kept[f"held out: {Arm('slerp 0.5', 'one_sided', arm.layer).key}"]
    assert found["kl"] == pytest.approx([float(row.mean()) for row in rows], rel=1e-3, abs=1e-7)


# -- input -------------------------------------------------------------------------------------------------------------


def test_all_that_is_wrong_with_a_folder_is_said_at_once(tmp_path: Path) -> None:
    folder = save_prompts(tmp_path / "prompts", {"refused.train": ["a"], "refused.test": ["b", "c"]})
    (folder / "expected.jsonl").write_text('{"prompt": "b", "contains": ["x"]}\n{"prompt": "c"}\n[]\n')
    with pytest.raises(InvalidInput) as caught:
        read_sets(folder)
    text = "\n".join(caught.value.problems)
    for part in ("harmless.train.txt", "harmless.test.txt", "line 2", "line 3"):
        assert part in text


def test_prompts_that_were_fitted_to_are_not_held_out(tmp_path: Path) -> None:
    folder = save_prompts(tmp_path / "prompts", {**SETS, "harmless.test": ["x", SETS["refused.train"][0]]})
    with pytest.raises(InvalidInput, match=r"1 prompts of harmless.test stand in the sets to fit with"):
        read_sets(folder)


def test_models_are_named_and_two_of_one_name_are_refused(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        save_prompts(tmp_path / folder / "same-1" / "prompts")
    one, other = (str(tmp_path / folder / "same-1" / "model") for folder in ("a", "b"))
    assert [subject.label for subject in subjects([one], None, None)] == ["same-1"]
    with pytest.raises(InvalidInput, match="two models are called 'same-1'"):
        subjects([one, other], None, None)
    with pytest.raises(InvalidInput) as caught:
        subjects([str(tmp_path / "none" / "model"), str(tmp_path / "neither" / "model")], None, None)
    assert len(caught.value.problems) == 8


def test_at_most_so_many_held_out_prompts(tmp_path: Path) -> None:
    folder = save_prompts(tmp_path / "prompts")
    tested = read_sets(folder, most=2).tested["refused"]
    assert tested.prompts.prompts == ("ab", "cde")
    assert len(read_sets(folder, most=2).harmful) == 8


def test_what_is_right_is_known_of_all_prompts_or_not_said(tmp_path: Path) -> None:
    folder = save_prompts(tmp_path / "prompts")
    prompts = SETS["refused.test"]
    lines = [json.dumps({"prompt": prompt, "contains": ["red clay"]}) for prompt in prompts]
    (folder / "expected.jsonl").write_text("\n".join(lines))
    tested = read_sets(folder).tested
    answers = ["get red clay", *["no"] * (len(prompts) - 1)]
    assert tested["refused"].right(answers) == [True, *[False] * (len(prompts) - 1)]
    assert tested["harmless"].right(["red clay"] * len(SETS["harmless.test"])) is None


def test_a_file_that_is_no_record_is_refused(tmp_path: Path) -> None:
    (tmp_path / "results.jsonl").write_text("[1]\n")
    with pytest.raises(InvalidInput, match="is not a record of measurements"):
        Ledger(tmp_path / "results.jsonl", {})


@given(st.from_regex(r"[a-z]+(-[a-z]+)?", fullmatch=True), st.integers(0, 99))
def test_a_number_at_the_end_is_a_seed(name: str, seed: int) -> None:
    assert group_of(f"{name}-{seed}") == name
    assert group_of(name) == name


# -- over seeds, and theory --------------------------------------------------------------------------------------------


def arms(kl: float, linear: float, right: int) -> Iterator[dict[str, Any]]:
    for method, value, hits in (("slerp 1", kl, right), ("linear", linear, 5)):
        rate = {"hits": hits, "count": 10, "low": 0.0, "high": 1.0}
        yield {"method": method, "mode": "ablate", "layer": 0, "strength": 1.0, "rates": {"right": rate}, "kl": value}


REFUSES = {"refused": {"hits": 9, "count": 10, "low": 0.0, "high": 1.0}}


def test_differences_to_linear_are_taken_seed_by_seed() -> None:
    rows = [{"layer": 0, "angle": 30.0, "norm_ratio": 1.0, "linear_t": 1.0, "outlier": 3.0}]
    shared = {"group": "g", "plain": REFUSES, "geometry": rows, "fixed": [], "strengths": [], "zeroed": []}
    figures = (arms(0.2, 0.1, 7), arms(4.0, 2.0, 9))
    members = [{**shared, "label": f"g-{n}", "own": list(own)} for n, own in enumerate(figures)]
    silent = {**members[0], "label": "g-9", "plain": {"refused": {**REFUSES["refused"], "hits": 1}}}
    (group,) = group_figures([*members, silent])
    assert group["models"] == ["g-0", "g-1"]
    assert group["left_out"] == ["g-9"], "what does not refuse is named, and in no mean"
    against = next(arm for arm in group["own"] if arm["method"] == "slerp 1")["against_linear"]
    assert against["right"]["values"] == pytest.approx([0.2, 0.4])
    assert against["log_kl"]["mean"] == pytest.approx(math.log(2))
    assert against["log_kl"]["high"] - against["log_kl"]["low"] == pytest.approx(0, abs=1e-9)


def means(numbers: Sequence[float], ratio: float) -> tuple[torch.Tensor, torch.Tensor]:
    a, h = torch.tensor(numbers, dtype=torch.float64).reshape(2, 3)
    return unit(a + 0.1), ratio * unit(h + torch.tensor([0.0, 0.0, 0.3], dtype=torch.float64))


@given(
    st.lists(st.floats(0.1, 1), min_size=6, max_size=6),
    st.floats(0.3, 3),
    st.sampled_from([*TS, None]),
)
def test_ablation_sets_both_means_to_one_ray_of_their_arc(numbers: list[float], ratio: float, t: float | None) -> None:
    """What docs/study.md derives: after plain ablation both class means lie on the ray t/2 of the way from the harmless
    to the harmful one, and linear is the family at its own t."""
    a, h = means(numbers, ratio)
    omega = float(angle(a, h))
    if not 0.05 < omega < 1.5:
        return
    if t is None:
        t, d = linear_t(a, h), linear_direction(a, h)
    else:
        d = slerp_direction(a, h, t)
    assert float(d @ a) == pytest.approx(-math.sin(t * omega / 2), abs=1e-9)
    assert float(d @ unit(h)) == pytest.approx(math.sin(omega * (1 - t / 2)), abs=1e-9)
    ray = slerp_direction(a, h, 0.0) * math.sin(t * omega / 2) + a * math.cos(t * omega / 2)
    for mean in (a, h):
        left = mean - (mean @ d) * d
        assert float(torch.linalg.vector_norm(left - (left @ ray) * ray)) < 1e-9


def test_the_sweep_is_from_nothing_to_twice_the_arc() -> None:
    assert (TS[0], TS[-1]) == (0.0, 2.0)
    assert [METHODS[name].model_dump() for name in SLERP] == [{"t": t} for t in TS]


@given(st.lists(st.floats(-100, 100), min_size=2, max_size=31))
def test_the_interval_over_seeds_is_students(values: list[float]) -> None:
    estimate = over_seeds(values)
    mean, error = float(np.mean(values)), float(np.std(values, ddof=1)) / len(values) ** 0.5
    half = float(student.ppf(0.975, len(values) - 1)) * error
    assert estimate.value == pytest.approx(mean, abs=1e-9)
    assert estimate.high - estimate.value == pytest.approx(half, rel=1e-4, abs=1e-9)
    assert estimate.value - estimate.low == pytest.approx(half, rel=1e-4, abs=1e-9)


def test_one_seed_has_no_interval_and_none_no_mean() -> None:
    assert over_seeds([3.0]) == Estimate(3.0, -math.inf, math.inf)
    with pytest.raises(ValueError, match="at least one value"):
        over_seeds([])


def test_cosines_are_written_into_their_cells(tmp_path: Path) -> None:
    with picture(tmp_path / "cosines.png") as (axes,):
        pictures.cosines(axes, [[1, 0.25], [float("nan"), -1]], ["slerp", "linear"], ["0", "1"])
        assert [text.get_text() for text in axes.texts] == ["1.00", "0.25", "-1.00"]
    assert (tmp_path / "cosines.png").read_bytes()[:4] == b"\x89PNG"
