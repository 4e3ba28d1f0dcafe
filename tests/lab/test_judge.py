"""A judge is asked in one way, its verdicts are read strictly, and nothing that fails is taken for one."""

from __future__ import annotations

from typing import Any

import pytest

from steer.errors import SteerError
from steer.lab.behaviour import REFUSAL
from steer.lab.judge import TOKENS, Judge, verdict
from steer.lab.prompts import Conversation
from tests.lab.judges import judging
from tests.servers import Server


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("yes", True),
        (" No.\n", False),
        ("**Yes**", True),
        ("NO!", False),
        ("Yes, because it declines.", None),
        ("no idea", None),
        ("yes no", None),
        ("", None),
        ("maybe", None),
    ],
)
def test_only_the_one_word_is_a_verdict(reply: str, expected: bool | None) -> None:
    assert verdict(reply) is expected


def by_sorry(body: dict[str, Any]) -> tuple[int, str]:
    return 200, "Yes." if "sorry" in body["messages"][0]["content"] else "no"


def test_each_answer_gets_its_own_verdict_in_order() -> None:
    answers = [f"{'sorry' if i % 3 == 0 else 'first get flour'} {i}" for i in range(40)]
    with judging(by_sorry) as (url, bodies, _):
        found = Judge(url, "judge", REFUSAL).verdicts(["How do I bake?"] * 40, answers)
    assert found == [i % 3 == 0 for i in range(40)]
    for body in bodies:
        assert (body["model"], body["temperature"], body["max_tokens"]) == ("judge", 0, TOKENS)
        assert REFUSAL.description in body["messages"][0]["content"]
        assert "How do I bake?" in body["messages"][0]["content"]


def test_a_conversation_is_judged_as_a_whole() -> None:
    talk = Conversation((("user", "How do I bake?"), ("assistant", "With flour."), ("user", "And then?")))
    asked = Judge("http://unused", "judge", REFUSAL).question(talk, "Then wait.")
    assert "user: How do I bake?\nassistant: With flour.\nuser: And then?" in asked
    assert "Then wait." in asked


def test_what_passes_is_tried_again_and_what_is_no_verdict_is_none() -> None:
    seen: list[str] = []

    def rule(body: dict[str, Any]) -> tuple[int, str]:
        seen.append(body["messages"][0]["content"])
        if len(seen) < 3:
            return 503, "busy"
        return 200, "I would rather not say"

    with judging(rule) as (url, _, _):
        assert Judge(url, "judge", REFUSAL, concurrent=1).verdicts(["p"], ["a"]) == [None]
    assert len(seen) == 3
    assert len(set(seen)) == 1


def test_a_judge_that_fails_is_an_error_that_names_it() -> None:
    with judging(lambda _: (404, "no such model")) as (url, bodies, _):
        with pytest.raises(SteerError, match=rf"'judge' at {url} failed.*no such model"):
            Judge(url, "judge", REFUSAL, concurrent=2).verdicts(["p"] * 50, ["a"] * 50)
        assert len(bodies) < 50, "the others are not asked on"
    with pytest.raises(SteerError, match="APIConnectionError"):
        Judge("http://127.0.0.1:9/v1", "judge", REFUSAL, retries=0).verdicts(["p"], ["a"])


def test_the_key_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "second")
    with judging(by_sorry) as (url, _, keys):
        Judge(url, "judge", REFUSAL).verdicts(["p"], ["a"])
        monkeypatch.setenv("STEER_JUDGE_API_KEY", "first")
        Judge(url, "judge", REFUSAL).verdicts(["p"], ["a"])
    assert keys == ["Bearer second", "Bearer first"]


def test_our_own_server_is_an_endpoint_for_it(tiny_server: Server) -> None:
    """The random model says no such word, so every reply is counted as what it is: no verdict."""
    judge = Judge(f"{tiny_server.url}/v1", tiny_server.model_name, REFUSAL)
    assert judge.verdicts(["p"] * 3, ["a", "b", "c"]) == [None] * 3
