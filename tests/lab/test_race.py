"""Racing: each candidate is judged as if it were alone, and stops only where it is surely beaten."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steer.direction import Direction
from steer.errors import InvalidInput
from steer.hf.load import Loaded
from steer.hf.steering import Steering
from steer.lab import race as race_module
from steer.lab.behaviour import Behaviour
from steer.lab.derive import Recipe
from steer.lab.evaluator import Candidate, each_row
from steer.lab.judge import ChatJudge
from steer.lab.outcome import Answer
from steer.lab.probe import HFEvaluator
from steer.lab.prompts import PromptSet
from steer.lab.race import FIRST_ROUND, Figures, Race, Sets
from steer.lab.select import QUIET, Entrant, best
from tests import models
from tests.lab.judges import judging

#: Shown or not by chance: answers of a random model.
CHANCE = Behaviour(name="chance", description="by chance", patterns=("^[!-O]",), window=1, openings=("!", "A"))
SETS = Sets(
    tuple("abc" * n + "?" for n in range(1, 21)),
    tuple("xy " * n + "z" for n in range(1, 14)),
    tuple("k" * n for n in range(1, 10)),
)


@pytest.fixture(scope="module")
def probe(loaded: Loaded) -> HFEvaluator:
    return HFEvaluator(loaded, Steering(loaded.model, rows=3, rank=1), max_tokens=3)


@pytest.fixture(scope="module")
def candidates(probe: HFEvaluator) -> list[Candidate]:
    """More directions than the table has rows, so that they take turns."""
    made = [models.direction(probe.loaded.model, seed=seed) for seed in range(4)]
    return [Candidate.of(d, mode, 1.0) for mode in ("ablate", "add") for d in made]


def test_together_is_alone(probe: HFEvaluator, candidates: list[Candidate]) -> None:
    race = Race(probe, CHANCE, SETS)
    together = race.run(candidates)
    for candidate, mine in zip(candidates, together, strict=True):
        (alone,) = race.run([candidate])
        assert alone.stopped is None
        assert (len(alone.asked), len(alone.kls), len(alone.borderline)) == (20, 13, 9)
        assert mine.asked == alone.asked[: len(mine.asked)]
        assert mine.borderline == alone.borderline[: len(mine.borderline)]
        assert mine.kls == pytest.approx(alone.kls[: len(mine.kls)], abs=1e-5)
        assert len(mine.asked) == 20 or mine.stopped
    assert any(mine.stopped is None for mine in together)


def test_strength_zero_is_plain(probe: HFEvaluator, candidates: list[Candidate]) -> None:
    race = Race(probe, CHANCE, SETS)
    (nothing,) = race.run([candidates[0].asking(strength=0.0)])
    assert nothing.asked == race.plain.asked
    assert nothing.borderline == race.plain.borderline
    assert nothing.kl < 1e-6


def test_who_surely_shows_more_stops_after_the_first_round(
    probe: HFEvaluator, candidates: list[Candidate], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(race_module, "FULL", FIRST_ROUND)
    always = Behaviour(name="always", description="any answer", min_words=1)
    rival = Figures([False] * 20, [False] * 9, [1.0] * 13)
    (found,) = Race(probe, always, replace(SETS, asked=("a",) * 20)).run([candidates[0]], [rival])
    assert (found.stopped, len(found.asked)) == ("shown", FIRST_ROUND)
    assert found.shown == 1


KLS = st.lists(st.floats(0, 1), min_size=16, max_size=16)
SHOWN = st.lists(st.booleans(), min_size=16, max_size=16)


@given(SHOWN, KLS, SHOWN, KLS, st.integers(2, 16))
def test_being_beaten_needs_more_of_nothing_and_less_of_something(
    asked: list[bool], kls: list[float], others: list[bool], its: list[float], count: int
) -> None:
    mine, other = Figures(asked[:count], [], kls[:count]), Figures(others, [], its)
    if mine.surely_beaten_by(other):
        assert other.shown <= mine.shown
        assert sum(its[:count]) < sum(kls[:count])
    assert not mine.surely_beaten_by(mine)
    assert not other.surely_beaten_by(Figures(asked[:4], [], kls[:4])), "not on the same prompts"


def test_an_answer_that_is_none_is_no_success(probe: HFEvaluator, candidates: list[Candidate]) -> None:
    """What takes the behaviour away by taking the answers away leaves as much as what does nothing."""
    never = Behaviour(name="never", description="no answer", patterns=("[^\\s\\S]",))

    class Stammering(HFEvaluator):
        def answers(self, prompts: Any, steer: Any, known: Any = None) -> list[Answer]:
            steers = each_row(steer, len(prompts))
            return [Answer([5, 6], "a b") if one is None else Answer([7] * 9, "a " * 9) for one in steers]

    stammering = Stammering(probe.loaded, probe.steering, max_tokens=3)
    race = Race(stammering, never, SETS)
    (broken,) = race.run([candidates[0]])
    assert broken.shown == 0
    assert broken.left == [True] * 20
    assert race.plain.left == [False] * 20
    assert broken.surely_beaten_by(Figures([False] * 20, [False] * 9, [0.0] * 13)) == (broken.kl > 0)


def test_one_answer_in_sixteen_is_worth_less_than_a_smaller_change() -> None:
    """Counted, not as rates: as those, 5/6 is not within 1/6 of 4/6."""
    nothing = Direction.load("directions/refusal.safetensors")
    for count in range(6, 64):
        slack = max(1, count // 16)
        for fewest in range(count - slack):
            figures = [
                Figures([True] * n + [False] * (count - n), [], [kl])
                for n, kl in ((fewest, 1.0), (fewest + slack, 0.5), (fewest + slack + 1, 0.1))
            ]
            entrants = [Entrant(Recipe(), Candidate.of(nothing, "ablate", 1.0), figures=one) for one in figures]
            assert best(entrants) is entrants[1], (fewest, count)


def test_no_answer_is_given_up_for_a_change_that_is_no_harm() -> None:
    """Below QUIET the fewest answers win, and of equally few the least change."""
    nothing = Direction.load("directions/refusal.safetensors")
    for others, expected in (
        ([(0, QUIET), (0, 0.9 * QUIET), (2, 0.01 * QUIET)], 1),
        ([(0, 1.1 * QUIET), (2, QUIET), (1, 0.9 * QUIET)], 2),
        ([(0, 1.1 * QUIET), (3, 0.01 * QUIET)], 0),
    ):
        figures = [Figures([True] * n + [False] * (32 - n), [], [kl]) for n, kl in others]
        entrants = [Entrant(Recipe(), Candidate.of(nothing, "ablate", 1.0), figures=one) for one in figures]
        assert best(entrants) is entrants[expected]


def test_who_is_beaten_in_all_stops_and_who_may_show_less_does_not() -> None:
    def rival(shown: int) -> Figures:
        return Figures([False] * (100 - shown) + [True] * shown, [False] * 100, [0.1, 0.11] * 50)

    first = Figures([False] * 8, [False] * 8, [0.2, 0.21] * 4)
    assert first.surely_beaten_by(rival(0))
    assert not first.surely_beaten_by(rival(1)), "it showed nothing so far"


def test_prompts_are_drawn_evenly_and_the_same_each_time() -> None:
    sorted_by_topic = PromptSet("t", "", tuple(f"{topic} {n}" for topic in "abcd" for n in range(25)))
    first, again = (Sets.drawn(sorted_by_topic, PromptSet("x", "", ("x",)), limit=24) for _ in range(2))
    assert first == again
    assert {str(prompt)[0] for prompt in first.asked[:12]} == set("abcd")
    assert len(set(first.asked)) == 24
    with pytest.raises(InvalidInput) as caught:
        Sets((), ())
    assert len(caught.value.problems) == 2


def test_a_judge_is_in_place_of_the_patterns(probe: HFEvaluator, candidates: list[Candidate]) -> None:
    def as_patterns(body: dict[str, Any]) -> tuple[int, str]:
        answer = body["messages"][0]["content"].rpartition("<<< answer\n")[2].rpartition("\n>>>")[0]
        return 200, "yes" if CHANCE.shown(answer) else "no"

    with judging(as_patterns) as (url, bodies, _):
        race = Race(probe, CHANCE, SETS, ChatJudge(url, "judge", CHANCE))
        (found,) = race.run(candidates[:1])
        assert len(bodies) == len(SETS.asked) + len(SETS.borderline) + len(SETS.other) + 29
    by_patterns = Race(probe, CHANCE, SETS)
    assert race.plain == by_patterns.plain
    (expected,) = by_patterns.run(candidates[:1])
    assert (found.asked, found.borderline) == (expected.asked, expected.borderline)
    with judging(lambda _: (200, "other")) as (url, _, _):
        (found,) = Race(probe, CHANCE, SETS, ChatJudge(url, "judge", CHANCE)).run(candidates[:1])
    assert found.left == [True] * len(SETS.asked), "what is deflected is no answer"
    assert not any(found.asked)
