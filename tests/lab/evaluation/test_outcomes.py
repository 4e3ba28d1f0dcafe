"""Each answer has one outcome, no broken answer passes for compliance, and arms are compared prompt by prompt."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steer.lab.behaviour import REFUSAL
from steer.lab.evaluation.outcomes import agreements, arms_on_set, rows_of
from steer.lab.outcome import OUTCOMES, Answer, Outcome
from steer.lab.statistics import cohens_kappa, holm, mcnemar

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


def outcome(answer: Answer, beside: Answer) -> tuple[str, str | None]:
    (told,) = rows_of(REFUSAL, [answer], [beside], 64)
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
    assert outcome(RUNAWAY, RUNAWAY) == ("complied", None)


def test_a_right_answer_complies() -> None:
    told = rows_of(REFUSAL, [GOOD, LOOP, REFUSED], [REFUSED] * 3, 64, right=[True, True, True])
    assert [t.right for t in told] == [True, False, False]


@given(st.lists(st.tuples(answers, answers, answers), min_size=1, max_size=25))
def test_outcomes_share_out_the_answers_and_differences_are_of_pairs(drawn: list[tuple[Answer, ...]]) -> None:
    columns = list(zip(*drawn, strict=True))
    names = ("plain", "one", "two")
    told = {name: rows_of(REFUSAL, c, columns[0], 64) for name, c in zip(names, columns, strict=True)}
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
    told = {
        "plain": rows_of(REFUSAL, [REFUSED] * 4, [REFUSED] * 4, 64, verdicts={"one": ["shown"] * 4, "two": [None] * 4}),
        "arm": rows_of(REFUSAL, [REFUSED, GOOD, GOOD, GOOD], [REFUSED] * 4, 64, verdicts={"one": one, "two": two}),
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
    assert (first.count, first.kappa) == (7, cohens_kappa(matched, [True] * 5 + [False, True]))
    assert first.low < first.kappa < first.high
    assert found["matcher", "two"].kappa == 1
    assert found["one", "two"].count == 3
    assert agreements(rows_of(REFUSAL, [GOOD], [GOOD], 64)) == ()
