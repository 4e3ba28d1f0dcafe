"""Settings of an engine: off where they are absent, all problems in one sentence where they are wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from steer.errors import InvalidInput, UnsupportedModel
from steer.settings import ServeSettings
from steer.vllm.settings import EngineSettings, from_serve_settings, read


def test_an_engine_without_them_is_left_alone() -> None:
    assert read(None) is None
    assert read({}) is None
    assert read({"other": 1}) is None


def test_all_have_a_default() -> None:
    assert read({"steer": {}}) == EngineSettings()


def test_every_problem_is_named() -> None:
    wrong = {"rows": 0, "rank": "many", "sites": ["nowhere"], "default": "refusal=99", "colour": "red"}
    with pytest.raises(UnsupportedModel) as caught:
        read({"steer": wrong})
    for name in wrong:
        assert name in str(caught.value)


def test_only_what_is_compiled_is_in_the_graphs_key() -> None:
    one, other = EngineSettings(directions="a", default="off"), EngineSettings(directions="b", default="x")
    assert one.graph() == other.graph() != EngineSettings(rank=2).graph()


def test_a_template_for_chats_is_given_to_vllm(tmp_path: Path) -> None:
    template = tmp_path / "chat.jinja"
    template.write_text("{{ messages[0].content }}")
    _, options = from_serve_settings(ServeSettings(chat_template=template), [])
    assert options[options.index("--chat-template") :][:2] == ["--chat-template", str(template)]


def test_settings_that_vllm_would_not_see_are_refused() -> None:
    with pytest.raises(InvalidInput, match="--max-requests: not used by vLLM"):
        from_serve_settings(ServeSettings(max_requests=4), [])
    engine, options = from_serve_settings(ServeSettings(rank=2, context=64), ["--seed", "1"])
    assert engine.rank == 2
    assert options[-4:] == ["--max-model-len", "64", "--seed", "1"]
