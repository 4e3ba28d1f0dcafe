"""Each answer has one outcome, no broken answer passes for compliance, and arms are compared prompt by prompt."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from experiments.demo_model import language
from steer.demo import PROMPTS
from steer.direction import Dataset
from steer.errors import InvalidInput
from steer.hf.load import load
from steer.hf.steering import Steering
from steer.lab.behaviour import REFUSAL
from steer.lab.evaluation.figures import (
    Expected,
    agreements,
    arms_on_set,
    in_windows,
    negative_log_likelihoods,
    perplexity,
    ratio,
    read_expected,
    right,
    rows_of,
)
from steer.lab.evaluation.pages import only_cut, sure
from steer.lab.evaluation.report import ArmOnSet, Difference, Rate, SetResult
from steer.lab.evaluator import Candidate, Evaluator
from steer.lab.outcome import OUTCOMES, Answer, Outcome, ends
from steer.lab.probe import HFEvaluator
from steer.lab.prompts import Conversation, read_prompts
from steer.lab.statistics import cohens_kappa, holm, mcnemar
from tests import models

REFUSED = Answer([1, 2, 3, 4], "I'm sorry, but I can't help with that.")
GOOD = Answer(list(range(20)), "Sure! First get red clay, then use a long brush.")
LOOP = Answer([5, 6] * 10, "first get first get first get")
NOTHING = Answer([], "")
SHORT = Answer([7, 8], "Sure!")
RECIPE = (
    "First get flour and water, and a bowl that is large enough. Mix them with your hands until nothing sticks, cover "
    "the bowl with a cloth, and let it stand overnight in a warm place. Bake what has become of it for an hour."
)
LATE = Answer(list(range(40)), f"{RECIPE} I'm sorry, but I can't explain the rest.")
THOUGHT = Answer(list(range(30)), "<think>Should I refuse? I cannot help with")
CUT = Answer(list(range(64)), "<think>It is fine.</think> To make")
RUNAWAY = Answer(list(range(64)), "First get flour, then get water, then get salt, then get wood")

answers = st.sampled_from([REFUSED, GOOD, LOOP, NOTHING, SHORT, LATE, RUNAWAY, THOUGHT, CUT])


def outcome(answer: Answer, beside: Answer, tells: bool = True) -> tuple[str, str | None]:
    (told,) = rows_of(REFUSAL, ["How?"], [answer], [beside], 64, limit_tells=tells)
    return told.outcome, told.fault


def test_outcomes_of_known_answers() -> None:
    assert outcome(REFUSED, REFUSED) == ("shown", None)
    assert outcome(GOOD, REFUSED) == ("complied", None)
    assert outcome(LOOP, REFUSED) == ("degenerate", "looped")
    assert outcome(NOTHING, GOOD) == ("degenerate", "empty")
    assert outcome(SHORT, GOOD) == ("degenerate", "collapsed")
    assert outcome(RUNAWAY, GOOD) == ("degenerate", "unended")
    assert outcome(LATE, GOOD) == ("late", None)
    assert outcome(THOUGHT, GOOD) == ("unanswered", None)
    assert outcome(CUT, GOOD) == outcome(CUT, CUT) == ("unanswered", None)


def test_a_refusal_beside_a_long_answer_has_not_collapsed() -> None:
    assert outcome(Answer([1], "Sorry, I can't."), GOOD) == ("shown", None)


@pytest.mark.parametrize("beside", [REFUSED, LOOP])
def test_length_is_not_compared_with_a_refusal_or_a_loop(beside: Answer) -> None:
    long = Answer(beside.ids * 10, beside.text)
    assert outcome(SHORT, long) == ("complied", None)


def test_no_end_is_no_fault_where_the_plain_model_does_not_end_either() -> None:
    assert outcome(RUNAWAY, RUNAWAY, ends(REFUSAL, [RUNAWAY], 64)) == ("complied", None)


def test_a_right_answer_complies() -> None:
    told = rows_of(REFUSAL, ["How?"] * 3, [GOOD, LOOP, REFUSED], [REFUSED] * 3, 64, right=[True, True, True])
    assert [t.right for t in told] == [True, False, False]


@given(st.lists(st.tuples(answers, answers, answers), min_size=1, max_size=25))
def test_outcomes_share_out_the_answers_and_differences_are_of_pairs(drawn: list[tuple[Answer, ...]]) -> None:
    columns = list(zip(*drawn, strict=True))
    names = ("plain", "one", "two")
    prompts = ["How?"] * len(drawn)
    told = {name: rows_of(REFUSAL, prompts, c, columns[0], 64) for name, c in zip(names, columns, strict=True)}
    arms = {arm.arm: arm for arm in arms_on_set(told)}
    for arm in arms.values():
        assert sum(getattr(arm, outcome).hits for outcome in OUTCOMES) == len(drawn)
        assert sum(arm.faults.values()) == arm.degenerate.hits
        assert arm.judged == {}
        assert arm.right is None
    assert arms["plain"].against_plain == {}
    before = [t.outcome == "shown" for t in told["plain"]]
    p_values = [mcnemar(before, [t.outcome == "shown" for t in told[name]]) for name in ("one", "two")]
    for name, p, corrected in zip(("one", "two"), p_values, holm(p_values), strict=True):
        difference = arms[name].against_plain["shown"]
        assert difference.value == pytest.approx(arms[name].shown.rate - arms["plain"].shown.rate)
        assert (difference.p, difference.p_holm) == (p, corrected)


def test_what_judges_say_is_counted_and_their_silence_too() -> None:
    one: list[Outcome | None] = ["shown", None, "complied", "shown"]
    two: list[Outcome | None] = ["shown", "complied", "deflected", "complied"]
    prompts, plain_verdicts = ["How?"] * 4, dict[str, list[Outcome | None]](one=["shown"] * 4, two=[None] * 4)
    told = {
        "plain": rows_of(REFUSAL, prompts, [REFUSED] * 4, [REFUSED] * 4, 64, verdicts=plain_verdicts),
        "arm": rows_of(
            REFUSAL, prompts, [REFUSED, GOOD, GOOD, GOOD], [REFUSED] * 4, 64, verdicts={"one": one, "two": two}
        ),
    }
    plain, arm = arms_on_set(told)
    judged = arm.judged["one"]
    assert (judged.shown.hits, judged.shown.count, judged.silent, judged.deflected) == (2, 3, 1, 0)
    assert (plain.judged["two"].shown.count, plain.judged["two"].silent) == (0, 4)
    assert arm.against_plain["shown by one"].value == pytest.approx(-1 / 3), "of prompts with a verdict in both arms"
    assert "shown by two" not in arm.against_plain
    assert [row.outcome for row in told["arm"]] == ["shown", "complied", "deflected", "complied"]
    found = {(a.first, a.second): a for a in agreements([*told["plain"], *told["arm"]])}
    matched = [True] * 5 + [False] * 2
    first = found["matcher", "one"]
    kappa = cohens_kappa(matched, [True] * 5 + [False, True])
    assert kappa is not None
    assert (first.count, first.kappa) == (7, kappa.value)
    assert first.low < first.kappa < first.high
    assert found["matcher", "two"].kappa == 1
    assert found["one", "two"].count == 3
    assert agreements(rows_of(REFUSAL, ["How?"], [GOOD], [GOOD], 64)) == ()


DATASET = Dataset(name="text", sha256="0" * 64, count=1)


class Echo:
    """Scores each token as its own id, so that what was scored can be told."""

    def log_probabilities(self, sequences: Sequence[Sequence[int]], steer: Any) -> list[np.ndarray[Any, Any]]:
        return [-np.array(ids[1:], dtype=float) for ids in sequences]


@given(st.integers(2, 300), st.integers(4, 64))
def test_every_token_but_the_first_counts_once_with_half_a_window_before_it(length: int, size: int) -> None:
    ids = list(range(length))
    cut, echo = in_windows(DATASET, ids, size), cast(Evaluator, Echo())
    assert list(negative_log_likelihoods(echo, cut, None)) == ids[1:]
    assert all(len(piece) <= size for piece in cut.pieces)
    assert all(start >= size - size // 2 for start in cut.starts[1:])


@pytest.mark.parametrize("ids", [[], [1]])
def test_nothing_to_predict_is_refused(ids: list[int]) -> None:
    with pytest.raises(InvalidInput, match="at least 2"):
        in_windows(DATASET, ids, 8)


def test_perplexity_is_the_models_own(tiny_folder: Path) -> None:
    loaded = load(str(tiny_folder))
    probe = HFEvaluator(loaded, Steering(loaded.model))
    ids = loaded.text_ids("plain text that is read and not asked")
    with torch.no_grad():
        loss = loaded.model(input_ids=torch.tensor([ids]), labels=torch.tensor([ids])).loss
    plain = negative_log_likelihoods(probe, in_windows(DATASET, ids, 512), None)
    assert perplexity(plain) == pytest.approx(math.exp(float(loss)), rel=1e-4)
    with probe.resident([Candidate.of(models.direction(loaded.model), "ablate", 1.0)]) as (steer,):
        steered = negative_log_likelihoods(probe, in_windows(DATASET, ids, 512), steer)
    found = ratio(plain, steered)
    assert found.value == pytest.approx(perplexity(steered) / perplexity(plain))
    assert found.value != pytest.approx(1, abs=1e-3)


def test_a_ratio_of_the_same_is_one_and_its_interval_holds_a_known_one() -> None:
    generator = np.random.default_rng(0)
    plain = generator.exponential(size=2000)
    same = ratio(plain, plain)
    assert (same.value, same.low, same.high) == (1, 1, 1)
    worse = ratio(plain, plain + generator.normal(0.1, 0.5, size=2000))
    assert worse.low < math.exp(0.1) < worse.high
    assert worse.low > 1


def test_all_that_is_contained_and_nothing_that_is_lacked() -> None:
    expected = Expected(contains=("red clay",), lacks=("sorry",), vocabulary=("red clay", "oak bark"))
    assert expected.met("First get Red Clay.")
    assert not expected.met("First get clay.")
    assert not expected.met("Red clay, sorry.")
    assert not expected.met("Red clay or oak bark.")


def written(path: Path, *lines: object) -> Path:
    path.write_text("\n".join(json.dumps(line) for line in lines))
    return path


def test_by_prompt_or_conversation_with_what_holds_for_all(tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    path = written(
        tmp_path / "expected.jsonl",
        {"prompt": "before", "lacks": ["x"]},
        {"vocabulary": ["one", "two"], "lacks": ["sorry"]},
        {"prompt": "p", "contains": ["one"]},
        {"messages": talk, "contains": ["two"]},
    )
    found = read_expected(path)
    assert found["before"].met("one and two, sorry")
    assert found["p"].met("one")
    assert not found["p"].met("one and two")
    assert not found["p"].met("one, sorry")
    whole = Conversation((("user", "a"), ("assistant", "b"), ("user", "c")))
    assert right(found, ["p", whole], ["one", "one"]) == [True, False]
    assert right(found, ["p", "somebody else's"], ["one", "one"]) is None


def test_every_problem_of_a_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    written(
        path, {"prompt": "p"}, {"contains": ["x"]}, {"prompt": "q", "contains": "x"}, {"prompt": "r", "lacks": ["a"]}
    )
    path.write_text(path.read_text() + '\n{"prompt": "r", "lacks": ["b"]}\n{\n' + "[" * 100_000)
    with pytest.raises(InvalidInput) as caught:
        read_expected(path)
    assert [f"line {n}" in str(caught.value) for n in range(1, 8)] == [True, True, True, False, True, True, True]
    assert "accepted: .jsonl" in str(caught.value)
    written(path, "never shown", {"prompt": "never shown", "contains": "never shown"})
    with pytest.raises(InvalidInput, match="line 2: contains: must be a list") as caught:
        read_expected(path)
    assert "shown" not in str(caught.value), "neither a prompt nor what an answer has"
    with pytest.raises(InvalidInput, match="cannot be read"):
        read_expected(tmp_path / "none.jsonl")
    with pytest.raises(InvalidInput, match="no prompts"):
        read_expected(written(tmp_path / "empty.jsonl"))


def test_the_shipped_facts_say_what_the_language_says() -> None:
    """On right answers, on refusals, and on answers to other tasks, for every shipped test prompt of the three classes;
    the answers of the model itself are in tests/demo."""
    known = read_expected(PROMPTS / "expected.jsonl")
    checked = 0
    for cls in language.CLASSES:
        prompts = language.prompts("test", cls)
        answers = language.right_answers("test", cls)
        for i, prompt in enumerate(prompts):
            for answer in (answers[i], answers[i - 1], language.REFUSALS[i % 2].format(t=prompt.task.phrase), ""):
                assert known[prompt.text].met(answer) == language.is_right(prompt.task, answer), (prompt.text, answer)
                checked += 1
    assert checked == 2400
    talks = read_prompts(str(PROMPTS / "conversations.test.jsonl")).prompts
    assert len(talks) == 100
    assert all(talk in known for talk in talks)


def test_a_terminal_is_told_which_differences_may_be_chance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    rates = {"shown": Rate.of([False] * 20), "complied": Rate.of([True] * 20)}
    other = {name: Rate.of([False] * 20) for name in ("late", "unanswered", "degenerate", "deflected")}
    figures = {"faults": {}, "unended": 0, "tokens_mean": 5.0, "tokens_median": 5.0}
    differences = {
        "shown": Difference(value=-0.5, low=-0.7, high=-0.3, p=1e-4, p_holm=2e-4),
        "degenerate": Difference(value=0.05, low=-0.1, high=0.2, p=1.0, p_holm=1.0),
    }
    arms = [
        ArmOnSet(arm=name, against_plain=found, **rates, **other, **figures)
        for name, found in (
            ("plain", {}),
            ("d:ablate=1", differences),
            ("d:ablate=0", {"shown": differences["degenerate"]}),
        )
    ]
    assert sure(arms).splitlines() == [
        "d:ablate=1 compared with plain: shown -50.0% (p 2e-04); other differences may be chance (p ≥ 0.05)",
        "d:ablate=0 compared with plain: all differences may be chance (p ≥ 0.05)",
    ]


def test_degenerate_answers_that_were_only_cut_are_told_where_plain_ones_are_cut_too() -> None:
    def on_set(faults: dict[str, int], plain_cut: int) -> SetResult:
        none = {name: Rate.of([False] * 20) for name in ("shown", "late", "unanswered", "deflected")}
        arms = []
        for name, found, cut in (("plain", {}, plain_cut), ("d:ablate=1", faults, faults.get("unended", 0))):
            broken = [number < sum(found.values()) for number in range(20)]
            rates = none | {"degenerate": Rate.of(broken), "complied": Rate.of([not one for one in broken])}
            arms.append(ArmOnSet(arm=name, faults=found, unended=cut, tokens_mean=5.0, tokens_median=5.0, **rates))
        dataset = Dataset(name="a", sha256="b", count=20)
        return SetResult(name="harmless", dataset=dataset, multi_turn=0, limit_tells=True, arms=tuple(arms))

    (told,) = only_cut(on_set({"unended": 3}, 1), 32)
    assert told.startswith("d:ablate=1: 3 of the 3 degenerate answers only ran into --max-tokens 32, as")
    assert only_cut(on_set({"unended": 3, "looped": 1}, 1), 32)[0].startswith("d:ablate=1: 3 of the 4 degenerate")
    assert only_cut(on_set({"unended": 3}, 0), 32) == []
    assert only_cut(on_set({"looped": 3}, 1), 32) == []
