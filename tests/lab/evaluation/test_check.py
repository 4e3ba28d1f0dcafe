"""The check of a direction says what the model does with it: each verdict is had from a direction that deserves it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from steer.cli.check import _text
from steer.demo import PROMPTS
from steer.direction import MAX_VALUE, Dataset, Direction
from steer.lab.evaluation.arms import Arm
from steer.lab.evaluation.check import HARMFUL, CheckResult, Sign, _effect, acting
from steer.lab.evaluation.report import ArmOnSet, Difference, Rate, SetResult
from steer.lab.statistics import difference_of_rates
from steer.spec import Entry
from tests import models
from tests.servers import ROOT
from tests.test_cli import run

SHIPPED = ROOT / "directions" / "refusal.safetensors"
FEW = ("--prompts", "4", "--max-tokens", "8", "--json")


def checked(path: Path, *options: str, code: int) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run("check", str(path), *FEW, *options, code=code).stdout)
    return found


@pytest.fixture
def changed(tmp_path: Path) -> Callable[..., Path]:
    def save(**changes: Any) -> Path:
        replace(Direction.load(SHIPPED), **changes).save(tmp_path / "changed.safetensors")
        return tmp_path / "changed.safetensors"

    return save


def test_the_shipped_direction_works() -> None:
    found = checked(SHIPPED, code=0)
    assert (found["verdict"], found["layers"], found["sign"]["side"]) == ("works", list(range(8)), "right")
    harmful, harmless = ({arm["arm"]: arm["shown"]["hits"] for arm in one["arms"]} for one in found["sets"])
    assert [*harmful.values(), *harmless.values()] == [4, 0, 0, 0]
    assert 0 <= found["kl"] < 0.001
    assert found["problems"] == found["unknown"] == found["notes"] == []


def test_the_verdict_says_how_many_answers_are_broken() -> None:
    """One of few may be chance, so it does not fail the check; it is not nothing either."""
    none, one = Rate.of([False] * 8), Rate.of([True] + [False] * 7)
    arms = tuple(arm_of(broken) for broken in (none, one))
    dataset = Dataset(name="h.txt", sha256="", count=8)
    sets = tuple(SetResult(name=name, dataset=dataset, multi_turn=0, limit_tells=True, arms=arms) for name in "ab")
    found = CheckResult("ablate", 1.0, [0], Sign(0, 1.0, 0.0, "right"), sets, 0.0, [], [], [])
    assert "works: it changes the behaviour as it should; broken answers: 2 of 16, without it 0" in " ".join(
        _text(found, "d on m", 3).split()
    )


def arm_of(degenerate: Rate) -> ArmOnSet:
    none = Rate.of([False] * 8)
    outcomes: dict[str, Any] = dict.fromkeys(("shown", "late", "unanswered", "deflected", "complied"), none)
    return ArmOnSet(arm="", degenerate=degenerate, faults={}, unended=0, tokens_mean=1, tokens_median=1, **outcomes)


def test_a_sign_that_is_wrong_matters_to_the_modes_that_have_one(changed: Callable[..., Path]) -> None:
    turned = changed(directions=-Direction.load(SHIPPED).directions)
    for mode, code in (("one_sided", 1), ("ablate", 0)):
        found = checked(turned, "--mode", mode, "--strength", "1", code=code)
        assert found["sign"]["side"] == "wrong"
        assert "wrong sign" in (found["problems"] if code else found["notes"])[0]


def test_what_does_too_little_and_what_breaks_answers_fail(changed: Callable[..., Path]) -> None:
    weak = changed(weights=Direction.load(SHIPPED).weights * 1e-3)
    assert "no effect: refusal in 4 of 4 harmful answers plain, 4 steered" in checked(weak, code=1)["problems"]
    broken = checked(SHIPPED, "--mode", "ablate", "--strength", "-1", code=1)
    assert any("breaks 4 of 4 answers to harmful (plain: 0)" in problem for problem in broken["problems"])


@pytest.mark.parametrize(("gone", "verdict"), [(0, "fails"), (3, "unknown"), (8, "works")])
def test_few_prompts_that_cannot_tell_an_effect_from_chance_say_so(gone: int, verdict: str) -> None:
    shown = [[True] * 8, [False] * gone + [True] * (8 - gone)]
    none = Rate.of([False] * 8)
    arms = tuple(
        ArmOnSet(
            arm="",
            shown=Rate.of(each),
            degenerate=none,
            complied=Rate.of([not hit for hit in each]),
            late=none,
            unanswered=none,
            deflected=none,
            right=None,
            faults={},
            unended=0,
            tokens_mean=1,
            tokens_median=1,
            against_plain={"shown": Difference.of(difference_of_rates(shown[0], each))},
        )
        for each in shown
    )
    own = Direction.load(SHIPPED)
    problems: list[str] = []
    unknown: list[str] = []
    dataset = Dataset(name="", sha256="", count=8)
    one = SetResult(name=HARMFUL, dataset=dataset, multi_turn=0, limit_tells=True, arms=arms)
    _effect(Arm(own, Entry("refusal", "", "ablate", 1.0)), (one,), "refusal", problems, unknown)
    assert (bool(problems), bool(unknown)) == (verdict == "fails", verdict == "unknown")
    if unknown:
        assert "refusal in 8 of 8 harmful answers plain, 5 steered: so few prompts cannot tell" in unknown[0]


def test_prompts_that_show_nothing_cannot_tell() -> None:
    found = checked(SHIPPED, "--harmful", str(PROMPTS / "harmless.train.txt"), code=3)
    assert found["verdict"] == "unknown"
    assert found["sign"]["side"] == "none"
    assert "give other prompts with --harmful" in found["unknown"][0]


def test_what_does_not_fit_is_told_before_the_model_is_loaded(tmp_path: Path) -> None:
    models.direction(models.tiny("llama")).save(tmp_path / "other.safetensors")
    told = run("check", str(tmp_path / "other.safetensors"), code=2).stderr
    assert "made for d_model 64, this model has 192" in told
    assert "made for 3 layers, this model has 8" in told
    assert "this model is the embedded one: name yours" in told


def test_a_layer_acts_where_its_coefficients_do() -> None:
    made = models.direction(models.tiny("llama"))
    assert acting(made, "ablate") == [0, 1, 2]
    reference = made.reference.clone()
    reference[1] = MAX_VALUE  # nothing is above it
    some = replace(made, reference=reference, weights=made.weights.clone().index_fill_(0, torch.tensor([2]), 0))
    assert (acting(some, "one_sided"), acting(some, "ablate")) == ([0], [0, 1])
    assert acting(replace(made, weights=torch.zeros(3), mlp_weights=torch.tensor([0.0, 1.0, 0.0])), "ablate") == [1]


def test_what_does_harm_is_not_said_to_have_no_effect() -> None:
    """As a direction from two swapped sets: the harmful answers stay, and the harmless ones begin to refuse."""

    def on(name: str, plain: int, steered: int) -> Any:
        def rate(hits: int) -> Any:
            return SimpleNamespace(hits=hits, count=8)

        value = (steered - plain) / 8
        change = {"shown": SimpleNamespace(value=value, low=value - 0.1, high=value + 0.1)}
        before = SimpleNamespace(shown=rate(plain), complied=rate(8 - plain), degenerate=rate(0))
        after = SimpleNamespace(
            shown=rate(steered), degenerate=rate(0), against_plain=change, rises=lambda of: of == "shown" and value > 0
        )
        return SimpleNamespace(name=name, arms=(before, after))

    arm: Any = SimpleNamespace(asked=SimpleNamespace(mode="ablate", strength=1.0))
    for harmless, word in ((8, "does not lessen it"), (0, "no effect")):
        problems: list[str] = []
        _effect(arm, (on("harmful", 8, 8), on("harmless", 0, harmless)), "refusal", problems, [])
        assert problems[-1] == f"{word}: refusal in 8 of 8 harmful answers plain, 8 steered"
        assert len(problems) == (2 if harmless else 1)
