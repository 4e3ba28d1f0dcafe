"""What a right answer holds: read from data, with every problem named, and equal to what the demo language says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from experiments.demo_model import language
from steer.demo import PROMPTS
from steer.errors import InvalidInput
from steer.lab.evaluation.expected import Expected, read_expected, right
from steer.lab.prompts import Conversation, read_prompts


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
