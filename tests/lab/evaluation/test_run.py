"""The evaluation on a real tiny model: nothing from nothing, the plain arm once, and the same again after a break."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from steer.errors import InvalidInput
from steer.hf.load import Loaded
from steer.hf.steering import Steering
from steer.lab.behaviour import REFUSAL
from steer.lab.evaluation.arms import Arm, arms_of, projected
from steer.lab.evaluation.figures import in_windows
from steer.lab.evaluation.pages import draw, render, tables
from steer.lab.evaluation.report import Report, RunSettings, SteeredArm
from steer.lab.evaluation.run import NEAR, TRIES, Evaluation, EvaluationPlan, Measured, strength_at
from steer.lab.judge import ChatJudge, Judge
from steer.lab.outcome import OUTCOMES, Answer
from steer.lab.probe import HFEvaluator
from steer.lab.prompts import Conversation, Prompt, PromptSet, encode_all
from steer.lab.resume import Cache
from steer.lab.source import TransformersSource
from steer.names import MAX_STRENGTH
from tests import models
from tests.lab.judges import judging

TALK = Conversation((("user", "ab"), ("assistant", "cd"), ("user", "ef")))
SETS = {
    "harmful": PromptSet("harmful.txt", "1", ("ab", "cde", "fgh")),
    "harmless": PromptSet("harmless.txt", "2", ("x", "yz", "w", "uv")),
    "multi-turn": PromptSet("talks.jsonl", "3", (TALK,)),
}


class Watched(HFEvaluator):
    """A probe that notes what it was asked for."""

    asked: list[tuple[str, int]]

    def answers(self, prompts: Sequence[Prompt], steer: Any, known: Any = None) -> list[Answer]:
        self.asked.append((self.progress.current, len(prompts)))
        return super().answers(prompts, steer, known)


@pytest.fixture(scope="module")
def arms(loaded: Loaded, tmp_path_factory: pytest.TempPathFactory) -> list[Arm]:
    path = tmp_path_factory.mktemp("directions") / "d.safetensors"
    models.direction(loaded.model).save(path)
    return arms_of([path], None, [0, 0.5, 1])


@pytest.fixture
def probe(loaded: Loaded) -> Watched:
    watched = Watched(loaded, Steering(loaded.model), max_tokens=6)
    watched.asked = []
    return watched


def plan(arms: list[Arm], loaded: Loaded, judges: tuple[Judge, ...] = ()) -> EvaluationPlan:
    ids = loaded.text_ids("plain text of some length that is read in windows")
    text = in_windows(SETS["harmful"].dataset, ids, 16)
    return EvaluationPlan(arms, SETS, 6, REFUSAL, judges, {}, text)


def report_of(found: Measured, arms: list[Arm]) -> Report:
    asked = RunSettings(
        model="tiny",
        revision=None,
        backend="transformers",
        dtype="auto",
        system_prompt=None,
        max_tokens=6,
        behaviour="refusal",
        software={"torch": "2"},
    )
    steered = [
        SteeredArm(
            name=a.name, file="d", digest=a.asked.digest, method="random", mode=a.asked.mode, strength=a.asked.strength
        )
        for a in arms
    ]
    return Report(
        conditions=asked, arms=tuple(steered), sets=found.sets, divergence=found.divergence, text=found.text, tasks=()
    )


def test_prompts_that_do_not_fit_with_their_answers_are_told_before_anything_runs(
    probe: Watched, arms: list[Arm], loaded: Loaded
) -> None:
    longest = probe.context - 6 - len(encode_all(loaded, [""])[0].ids)
    fitting, long = (PromptSet("long.txt", "4", ("a" * (longest + more), "b")) for more in (0, 1))
    planned = plan(arms[:1], loaded)
    probe.check_room([fitting])
    with pytest.raises(InvalidInput, match=r"long.txt, line 1: has \d+ tokens, and its answer may have 6; the context"):
        Evaluation(probe, replace(planned, sets=SETS | {"harmful": long}), Cache(None, {})).run()
    assert probe.asked == []


def test_strength_0_changes_nothing_and_1_does(probe: Watched, arms: list[Arm], loaded: Loaded) -> None:
    found = Evaluation(probe, plan(arms, loaded), Cache(None, {})).run()
    for one in found.sets:
        plain, nothing, *_ = one.arms
        assert nothing.model_copy(update={"arm": "plain", "against_plain": {}}) == plain
        assert nothing.against_plain["shown"].value == 0
        assert found.rows[one.name, "plain"] == found.rows[one.name, arms[0].name]
    zero, _, full = found.divergence
    assert zero.mean == pytest.approx(0, abs=1e-6)
    assert full.mean > 1e-3
    assert found.text is not None
    plain_text, same, *_, other = found.text.arms
    assert same.perplexity == pytest.approx(plain_text.perplexity)
    assert other.ratio is not None
    assert other.ratio.value == pytest.approx(other.perplexity / plain_text.perplexity)
    assert not probe.steering.bank.rows_in_use
    assert [one.multi_turn for one in found.sets] == [0, 0, 1]


def test_the_plain_arm_is_asked_once(probe: Watched, arms: list[Arm], loaded: Loaded) -> None:
    Evaluation(probe, plan(arms, loaded), Cache(None, {})).run()
    assert sorted(probe.asked) == sorted(
        (f"{name}, {arm}", len(prompts))
        for name, prompts in SETS.items()
        for arm in ("plain", *(arm.name for arm in arms))
    )


def test_a_broken_run_goes_on_to_the_same_report(
    probe: Watched, arms: list[Arm], loaded: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Evaluation(probe, plan(arms, loaded), Cache(None, {})).run()

    def breaks(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as broken:
        broken.setattr(HFEvaluator, "divergences", breaks)
        with pytest.raises(KeyboardInterrupt):
            Evaluation(probe, plan(arms, loaded), Cache(tmp_path, {})).run()
    probe.asked.clear()
    again = Evaluation(probe, plan(arms, loaded), Cache(tmp_path, {})).run()
    assert again == whole
    assert probe.asked
    assert not any(title.endswith((", plain", f", {arms[0].name}")) for title, _ in probe.asked)
    probe.asked.clear()
    assert Evaluation(probe, plan(arms, loaded), Cache(tmp_path, {})).run() == whole
    assert not probe.asked


def test_doses_are_found_on_the_model_and_kept(
    probe: Watched, arms: list[Arm], loaded: Loaded, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = replace(plan(arms[2:], loaded), doses=(0.01, 0.02, 50.0))
    found = Evaluation(probe, wanted, Cache(tmp_path, {})).run()
    assert [(one.way, one.kl) for one in found.doses] == [("d:ablate", kl) for kl in (0.01, 0.02, 50.0)]
    assert [one.strength is None for one in found.doses] == [False, False, True]
    assert [arm.name for arm in found.arms] == [f"d:ablate={one.strength:g}" for one in found.doses[:2]]
    for one, dose in zip(found.divergence, found.doses, strict=False):
        assert one.mean == pytest.approx(dose.kl, rel=0.05)
        assert one.low <= one.mean <= one.high
    assert "0.02 is asked for" in capsys.readouterr().err
    page = tables(report_of(found, list(found.arms)).model_copy(update={"doses": found.doses}))
    assert "d:ablate: not reached" in page
    probe.asked.clear()
    passes = probe.steering.passes
    assert Evaluation(probe, wanted, Cache(tmp_path, {})).run() == found
    assert (probe.steering.passes, probe.asked) == (passes, []), "nothing is asked of the model again"


def test_arms_are_compared_with_each_other_prompt_by_prompt(
    probe: Watched, arms: list[Arm], loaded: Loaded, tmp_path: Path
) -> None:
    """With one arm, or with the arms of one way at the same strength or dose; what an arm is to itself is told by an
    equal one under another name."""
    assert Evaluation(probe, plan(arms, loaded), Cache(tmp_path, {})).run().comparisons == ()
    same = [arm.asking(direction="e") for arm in arms]
    wanted = replace(plan([*arms, *same], loaded), against=arms[2].name)
    found = Evaluation(probe, wanted, Cache(tmp_path, {})).run()
    others = [arm.name for arm in (*arms, *same) if arm.name != arms[2].name]
    assert [(one.arm, one.against) for one in found.comparisons] == [(name, arms[2].name) for name in others]
    kl = {one.arm: one.mean for one in found.divergence}
    for one in found.comparisons:
        assert one.kl is not None
        assert one.kl.value == pytest.approx(max(kl[one.arm], 1e-9) / kl[arms[2].name], rel=0.01)
        assert one.kl.low <= one.kl.value <= one.kl.high
        assert one.sets.keys() == SETS.keys()
        for title, figures in one.sets.items():
            shown = [
                sum(told.outcome == "shown" for told in found.rows[title, name]) for name in (one.arm, one.against)
            ]
            assert figures["shown"].value * len(SETS[title]) == pytest.approx(shown[0] - shown[1])
    equal = next(one for one in found.comparisons if one.arm == same[2].name)
    assert equal.kl is not None
    assert (equal.kl.value, equal.kl.low, equal.kl.high, equal.kl.p_holm) == (1, 1, 1, 1)
    assert all(figures["shown"].p == 1 for figures in equal.sets.values())
    page = tables(report_of(found, list(found.arms)).model_copy(update={"comparisons": found.comparisons}))
    assert "Arms beside each other" in page
    paired = Evaluation(probe, replace(wanted, against="d:ablate"), Cache(tmp_path, {})).run().comparisons
    assert [(one.arm, one.against) for one in paired] == [(b.name, a.name) for a, b in zip(arms, same, strict=True)]
    assert [one.kl is None for one in paired] == [True, False, False], "strength 0 costs nothing to be a multiple of"
    dosed = replace(plan([arms[2], same[2]], loaded), doses=(0.01, 0.02), against="d:ablate")
    found = Evaluation(probe, dosed, Cache(tmp_path, {})).run()
    strengths = {(one.way, one.kl): one.strength for one in found.doses}
    assert [(one.arm, one.against) for one in found.comparisons] == [
        (f"e:ablate={strengths['e:ablate', kl]:g}", f"d:ablate={strengths['d:ablate', kl]:g}") for kl in (0.01, 0.02)
    ]


def test_report_pictures_and_page_hold_every_figure(
    probe: Watched, arms: list[Arm], loaded: Loaded, tmp_path: Path
) -> None:
    with judging(lambda body: (200, "yes" if "zzz" in body["messages"][0]["content"] else "No")) as (url, bodies, _):
        judge = ChatJudge(url, "judge", REFUSAL)
        found = Evaluation(probe, plan(arms, loaded, (judge,)), Cache(tmp_path, {})).run()
    assert len(bodies) == 8 * 4, "each prompt in each arm"
    report = report_of(found, arms)
    assert Report.model_validate_json(json.dumps(report.model_dump(mode="json"))) == report
    for one in report.sets:
        for arm in one.arms:
            assert arm.judged["judge"].shown.count + arm.judged["judge"].silent == one.dataset.count
    two = {name: SETS[name] for name in ("harmful", "harmless")}
    projections = projected(TransformersSource(loaded), arms[0].direction, two)
    pictures = draw(report, tmp_path, projections)
    assert {"strength-d-ablate.png", "differences.png", "front.png", "projections.png"} == set(pictures.values())
    page = render(report, pictures)
    for file in pictures.values():
        assert (tmp_path / file).stat().st_size > 5000
        assert f"({file})" in page
    assert tables(report) in page
    heads = [
        re.findall(r"[a-z]+", line)
        for line in page.splitlines()
        if line.startswith(("| arm ", "| compared with plain"))
    ]
    seen, paired = ([o for o in OUTCOMES if o in head] for head in heads[1:3])
    assert paired == seen, "an outcome that no answer has has no column"
    assert "deflected" not in seen
    assert all(one.name in page for one in arms)
    assert f"{found.divergence[-1].mean:.5f}" in page


def test_verdicts_are_those_of_the_answers_that_were_judged(probe: Watched, loaded: Loaded, tmp_path: Path) -> None:
    """Answers that are made anew, of other lengths here, are not given the verdicts of the old ones."""
    with judging(lambda body: (200, "No")) as (url, bodies, _):
        judge = ChatJudge(url, "judge", REFUSAL)
        one = EvaluationPlan([], {"harmful": SETS["harmful"]}, 6, REFUSAL, (judge,))
        Evaluation(probe, one, Cache(tmp_path, {})).run()
        judged = len(bodies)
        for file in (tmp_path / "measured").glob("*.answers.jsonl"):
            file.unlink()
        probe.max_tokens = 3
        with pytest.raises(InvalidInput, match=r"verdicts-judge.*: was measured with answers = "):
            Evaluation(probe, replace(one, max_tokens=3), Cache(tmp_path, {})).run()
    assert len(bodies) == judged == 3


def test_projections_are_the_components_at_the_last_token(loaded: Loaded, arms: list[Arm]) -> None:
    layer = 1
    direction = replace(arms[0].direction, meta=arms[0].direction.meta.model_copy(update={"source_layer": layer}))
    source = TransformersSource(loaded)
    (panel,) = projected(source, direction, {"harmless": SETS["harmless"]}).values()
    for prompt, value in zip(SETS["harmless"].prompts, panel["harmless"], strict=True):
        (encoded,) = source.encode([prompt], None)
        with torch.no_grad():
            ids = torch.tensor([encoded.ids])
            stream = loaded.model(input_ids=ids, output_hidden_states=True).hidden_states[layer + 1]
        assert value == pytest.approx(float(stream[0, -1] @ direction.directions[layer, 0]), abs=1e-4)


@given(st.floats(1e-3, 5.0), st.floats(1.0, 4.0), st.floats(1e-3, 2.0))
def test_a_power_of_the_strength_is_solved(scale: float, power: float, dose: float) -> None:
    tried: list[float] = []

    def kl(strength: float) -> float:
        tried.append(strength)
        assert 0 < strength <= MAX_STRENGTH
        return scale * strength**power

    found = strength_at(dose, kl)
    assert len(tried) == len(set(tried)) <= TRIES
    if kl(MAX_STRENGTH) < dose * (1 - NEAR):
        assert found is None
    else:
        assert found is not None
        assert kl(found) == pytest.approx(dose, rel=0.1)


@pytest.mark.parametrize("dose", [0.001, 0.01, 0.05, 0.5])
def test_curves_that_saturate_fall_or_are_not_finite_are_solved_too(dose: float) -> None:
    for curve in (
        lambda s: 0.6 * (1 - math.exp(-(s**2))),
        lambda s: 0.6 * math.sin(s) ** 2,
        lambda s: math.inf if s > 0.9 else s**2,
        lambda s: max(0.0, s - 0.4) ** 3,
    ):
        found = strength_at(dose, curve)
        assert found is not None
        assert curve(found) == pytest.approx(dose, rel=0.2)


def test_what_does_nothing_has_no_dose() -> None:
    assert strength_at(0.01, lambda _: 0.0) is None


def test_a_dose_that_is_jumped_over_or_not_reached_is_not_said_to_be_had() -> None:
    assert strength_at(0.05, lambda s: 0.001 if s < 1.3 else 5.0) is None
    assert strength_at(0.08, lambda s: 0.048 * (1 - math.exp(-s))) is None
