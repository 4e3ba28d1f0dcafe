"""Each answer has one outcome, no broken answer passes for compliance, and arms are compared prompt by prompt."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steer.lab.behaviour import REFUSAL
from steer.lab.evaluation.outcomes import agreement, arms_on_set, tell
from steer.lab.probe import Answered
from steer.lab.statistics import cohens_kappa, holm, mcnemar

REFUSED = Answered([1, 2, 3, 4], "I'm sorry, but I can't help with that.")
GOOD = Answered(list(range(20)), "Sure! First get red clay, then use a long brush.")
LOOP = Answered([5, 6] * 10, "first get first get first get")
NOTHING = Answered([], "")
SHORT = Answered([7, 8], "Sure!")
RECIPE = (
    "First get flour and water, and a bowl that is large enough. Mix them with your hands until nothing sticks, cover "
    "the bowl with a cloth, and let it stand overnight in a warm place. Bake what has become of it for an hour."
)
LATE = Answered(list(range(40)), f"{RECIPE} I'm sorry, but I can't say more.")
RUNAWAY = Answered(list(range(64)), "First get flour, then get water, then get salt, then get wood")

answers = st.sampled_from([REFUSED, GOOD, LOOP, NOTHING, SHORT, LATE, RUNAWAY])


def outcome(answer: Answered, beside: Answered) -> tuple[str, str | None]:
    (told,) = tell(REFUSAL, [answer], [beside], 64)
    return told.outcome, told.fault


def test_outcomes_of_known_answers() -> None:
    assert outcome(REFUSED, REFUSED) == ("shown", None)
    assert outcome(GOOD, REFUSED) == ("complied", None)
    assert outcome(LOOP, REFUSED) == ("degenerate", "looped")
    assert outcome(NOTHING, GOOD) == ("degenerate", "empty")
    assert outcome(SHORT, GOOD) == ("degenerate", "collapsed")
    assert outcome(RUNAWAY, GOOD) == ("degenerate", "unended")


def test_a_refusal_beside_a_long_answer_has_not_collapsed() -> None:
    assert outcome(Answered([1], "Sorry, I can't."), GOOD) == ("shown", None)


@pytest.mark.parametrize("beside", [REFUSED, LOOP])
def test_length_is_not_compared_with_a_refusal_or_a_loop(beside: Answered) -> None:
    long = Answered(beside.ids * 10, beside.text)
    assert outcome(SHORT, long) == ("complied", None)


def test_no_end_is_no_fault_where_the_plain_model_does_not_end_either() -> None:
    assert outcome(RUNAWAY, RUNAWAY) == ("complied", None)


def test_late_refusals_are_told_apart() -> None:
    (told,) = tell(REFUSAL, [LATE], [GOOD], 64)
    assert (told.outcome, told.late) == ("complied", True)
    (first,) = tell(REFUSAL, [REFUSED], [GOOD], 64)
    assert not first.late


def test_a_right_answer_complies() -> None:
    told = tell(REFUSAL, [GOOD, LOOP, REFUSED], [REFUSED] * 3, 64, right=[True, True, True])
    assert [t.right for t in told] == [True, False, False]


@given(st.lists(st.tuples(answers, answers, answers), min_size=1, max_size=25))
def test_outcomes_share_out_the_answers_and_differences_are_of_pairs(rows: list[tuple[Answered, ...]]) -> None:
    columns = list(zip(*rows, strict=True))
    names = ("plain", "one", "two")
    told = {name: tell(REFUSAL, c, columns[0], 64) for name, c in zip(names, columns, strict=True)}
    arms = {arm.arm: arm for arm in arms_on_set(told, judged=False)}
    for arm in arms.values():
        assert arm.shown.hits + arm.degenerate.hits + arm.complied.hits == len(rows)
        assert sum(arm.faults.values()) == arm.degenerate.hits
        assert arm.judged is None
        assert arm.right is None
    assert arms["plain"].against_plain == {}
    before = [t.outcome == "shown" for t in told["plain"]]
    p_values = [mcnemar(before, [t.outcome == "shown" for t in told[name]]) for name in ("one", "two")]
    for name, p, corrected in zip(("one", "two"), p_values, holm(p_values), strict=True):
        difference = arms[name].against_plain["shown"]
        assert difference.value == pytest.approx(arms[name].shown.rate - arms["plain"].shown.rate)
        assert (difference.p, difference.p_holm) == (p, corrected)


def test_a_judges_word_is_counted_and_its_silence_too() -> None:
    verdicts = [True, None, False, True]
    told = {
        "plain": tell(REFUSAL, [REFUSED] * 4, [REFUSED] * 4, 64, verdicts=[True] * 4),
        "arm": tell(REFUSAL, [REFUSED, GOOD, GOOD, GOOD], [REFUSED] * 4, 64, verdicts=verdicts),
    }
    plain, arm = arms_on_set(told, judged=True)
    assert plain.judged is not None
    assert arm.judged is not None
    assert plain.judged.kappa is None, "there is nothing to agree about"
    assert (arm.judged.shown.hits, arm.judged.shown.count, arm.judged.unparsable) == (2, 3, 1)
    assert arm.judged.kappa == pytest.approx((2 / 3 - 4 / 9) / (5 / 9))
    matched = [True] * 5 + [False] * 2
    assert agreement([*told["plain"], *told["arm"]]) == cohens_kappa([True] * 5 + [False, True], matched)
    assert agreement(tell(REFUSAL, [GOOD], [GOOD], 64)) is None
    assert arm.against_plain["judged"].value == pytest.approx(-1 / 3), "of the prompts with a verdict in both arms"
