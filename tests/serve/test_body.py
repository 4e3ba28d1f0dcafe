"""What a body may hold is bounded before anything is made of it, in time that is linear in its size."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from starlette.types import Message

from steer.errors import RequestError
from steer.serve import body
from steer.serve.body import (
    MAX_DEPTH,
    MAX_FORM,
    MAX_KEY,
    MAX_KEYS,
    MAX_VALUES,
    check_size,
    check_structure,
    parse_body,
    replay,
)
from steer.serve.errors import Code, HTTPProblem

law = settings(deadline=None, max_examples=200)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(alphabet='ab"\\,:[]{}\né', max_size=6),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(alphabet='k"\\,[', max_size=3), inner, max_size=4)
    ),
    max_leaves=12,
)


def counted(value: Any) -> int:
    """The values in it, an empty list or object twice."""
    inner = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else None
    return 1 + (0 if inner is None else sum(map(counted, inner)) if inner else 1)


def refused(data: bytes, code: Code = Code.BODY_TOO_COMPLEX) -> str:
    with pytest.raises(HTTPProblem) as caught:
        parse_body(data)
    assert caught.value.code is code
    assert len(str(caught.value)) < 400
    return str(caught.value)


@given(VALUES, st.sampled_from([1, 2, 3, 7, 64]), st.booleans())
@example('\\"', 2, True)
@law
def test_values_are_counted_as_the_parser_makes_them(value: Any, window: int, ascii: bool) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(body, "_WINDOW", window)  # every window of a large body begins somewhere
        assert check_structure(json.dumps(value, ensure_ascii=ascii).encode()) == counted(value)


@pytest.mark.parametrize(
    ("data", "limit"),
    [
        (b"[" * 200_000, f"{MAX_DEPTH} levels"),
        (b'{"a":' * 200_000, f"{MAX_DEPTH} levels"),
        (b'{"a":[' + b"1," * MAX_VALUES + b"1]}", f"{MAX_VALUES} values"),
        (b'{"a":[' + b'"",' * MAX_VALUES, f"{MAX_VALUES} values"),
        (b'{"a":[' + b"[]," * MAX_VALUES, f"{MAX_VALUES} values"),
        (b"[" + b'{"a":1}' * (MAX_KEYS + 1), f"{MAX_KEYS} keys"),
    ],
    ids=["lists", "objects", "numbers", "texts", "empty lists", "keys"],
)
def test_too_much_structure_is_refused_before_it_is_parsed(data: bytes, limit: str) -> None:
    """Most of these are no JSON, which nobody found out."""
    assert limit in refused(data)


def test_a_long_text_is_no_structure() -> None:
    text = '",[{:' * 200_000
    assert parse_body(json.dumps({"prompt": text}).encode()) == {"prompt": text}


def test_a_key_that_is_longer_than_any_is_refused() -> None:
    assert "characters" in refused(b'{"' + b"_" * (MAX_KEY + 1) + b'steer": 1}')


def test_keys_that_stand_twice_are_found_in_one_pass() -> None:
    class Key(str):
        compared = 0

        def __eq__(self, other: object) -> bool:
            Key.compared += 1
            return str.__eq__(self, other)

        __hash__ = str.__hash__

    pairs: list[tuple[str, Any]] = [(Key(f"k{number // 2}"), 0) for number in range(4000)]
    with pytest.raises(HTTPProblem, match="a key twice: k0"):
        body._unique(pairs)
    assert Key.compared < 4 * len(pairs)


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        ({"stop": ["a"] * 65}, "stop"),
        ({"stop": "a" * 8193}, "stop"),
        ({"stop_sequences": ["a" * 5000] * 2}, "stop_sequences"),
        ({"bad_words": ["a"] * 100_000}, "bad_words"),
        ({"n": 1025}, "n"),
        ({"best_of": 10**30}, "best_of"),
        ({"prompt": ["a"] * 17, "n": 64}, "prompt"),
        ({"prompt": [[1]] * 1025}, "prompt"),
        ({"prompt": ["a"] * 17, "best_of": 64}, "prompt"),
        ({"messages": [[{"role": "user", "content": "a"}]] * 1025}, "messages"),
        ({"prompt": "a", "prompt_embeds": ["a"] * 1024}, "prompt_embeds"),
        ({"messages": [{"role": "user", "content": "a"}] * 2049}, "messages"),
        ({"messages": [[{"role": "user", "content": "a"}] * 3] * 700}, "messages"),
        ({"input": [{"role": "user", "content": "a"}] * 2049}, "input"),
        ({"prompt": ["a"] * 1024, "logit_bias": {str(i): 1 for i in range(100)}}, "logit_bias"),
        ({"prompt": ["a"] * 1024, "stop_token_ids": [1] * 65}, "stop_token_ids"),
        ({"prompt": ["a"] * 1024, "vllm_xargs": {str(i): "x" for i in range(3000)}}, "vllm_xargs"),
        ({"prompt": ["a"] * 1024, "response_format": {"json_schema": "a" * 20_000}}, "response_format"),
        ({"n": 64, "allowed_token_ids": list(range(100_000))}, "allowed_token_ids"),
        ({"prompt_embeds": "a", "n": 1025}, "n"),
        ({"prompt_embeds": "a", "prompt": "a", "n": 600}, "prompt"),  # the first of two fields with as many
        ({"prompt_embeds": ["a"] * 1025}, "prompt_embeds"),
        ({"prompt_embeds": ["a"] * 2, "prompt": [1] * 5000, "n": 500}, "prompt_embeds"),
        ({"messages": [[{}]] * 40, "tools": [{}] * 50, "n": 32}, "messages"),
        ({"query": "a", "items": ["a"] * 1025}, "items"),
        ({"n": "16"}, "n"),  # which engines take for 16
        ({"n": 16.0}, "n"),
        ({"best_of": True}, "best_of"),
        ({"stop_token_ids": [1] * 100_000}, "stop_token_ids"),
        ({"logit_bias": {str(i): 1 for i in range(20_000)}, "n": 4}, "logit_bias"),
    ],
)
def test_what_is_too_much_for_any_engine_is_refused_at_the_door(asked: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as caught:
        check_size(asked)
    assert caught.value.param == param


def test_what_is_not_too_much_is_left_to_the_app() -> None:
    bodies: list[dict[str, object]] = [
        {"stop": ["a"] * 64, "bad_words": "a" * 8192, "prompt": ["a"] * 16, "n": 16},
        {"n": 1024, "messages": [{"role": "user", "content": "a" * 10_000}], "tools": [{"name": "a" * 10_000}]},
        {"prompt": [1] * 100_000, "n": 64, "allowed_token_ids": list(range(8000))},
        {"allowed_token_ids": list(range(100_000))},
        {"messages": [{"role": "user", "content": "a"}] * 1025},
        {"messages": [[]] * 1024, "n": None},
        {"prompt": [1] * 100_000, "n": 64},
        {"prompt": [], "n": -1, "best_of": 0, "stop": 7, "bad_words": {"x": 1}},
        {"prompt": None, "stop": None, "stop_token_ids": 5, "logit_bias": None},
        {"stop_token_ids": [1] * 1024, "logit_bias": {"1": 5}, "n": 64},
        {"prompt_embeds": ["a"] * 1024},
        {"prompt_embeds": "a", "n": 1024},
        {"prompt_embeds": "a", "logit_bias": {str(i): 1 for i in range(40_000)}},
        {"prompt": ["a"] * 100, "chat_template": "é" * 4000},  # bytes as they are sent
    ]
    for asked in bodies:
        check_size(asked)


@pytest.mark.parametrize(
    "value",
    ["NaN", "-Infinity", "1e999", "-1e400", "9" * 20, "9" * 5000, str(-(2**63) - 1), '"\\ud800"', '{"\\udfff": 1}'],
)
@pytest.mark.parametrize("around", ["{}", "[1, {}]", '{{"x": [{}]}}'])
def test_what_no_engine_could_be_told_of_is_named_by_its_field(value: str, around: str) -> None:
    with pytest.raises(HTTPProblem) as caught:
        parse_body(f'{{"model": "m", "field": {around.format(value)}, "last": 1}}'.encode())
    assert (caught.value.code, caught.value.param) == (Code.INVALID_VALUE, "field")
    assert len(str(caught.value)) < 400


def test_what_is_at_the_limits_of_numbers_and_texts_is_taken() -> None:
    for value in (2**64 - 1, -(2**63), 1e308, 1e-320, -0.0, "\U0001d54a", "\ufffd"):
        assert parse_body(json.dumps({"field": value}).encode()) == {"field": value}
    assert refused(b'{"field": 1, "\\u00e9": 2, "\\u00e9": 3}', Code.INVALID_JSON).endswith("é")


def test_who_asks_for_more_of_a_body_is_told_when_the_client_leaves() -> None:
    left: list[bool] = []

    async def gone() -> Message:
        return {"type": "http.disconnect"}

    async def run() -> None:
        receive = replay(b"{}", gone, lambda: left.append(True))
        assert (await receive())["body"] == b"{}"
        assert not left
        assert (await receive())["type"] == "http.disconnect"

    asyncio.run(run())
    assert left == [True]


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        ({"structured_outputs": {"regex": "a" * MAX_FORM}}, "structured_outputs"),
        ({"response_format": {"json_schema": {"schema": {"title": "é" * 17_000}}}}, "response_format"),
        ({"text": {"format": {"schema": {"enum": ["a" * 100] * 400}}}}, "text"),
        ({"output_config": {"format": {"schema": {"enum": ["a" * 100] * 400}}}}, "output_config"),
        ({"guided_grammar": "a" * 40_000}, "guided_grammar"),
        ({"guided_json": "a" * 20_000, "structured_outputs": {"json": "a" * 20_000}}, "guided_json"),
        ({"guided_choice": ["a"] * MAX_FORM}, "guided_choice"),
    ],
)
def test_a_form_that_is_too_much_is_refused(asked: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError, match=f"bytes of JSON or more, at most {MAX_FORM}") as caught:
        check_size(asked)
    assert caught.value.param == param


def test_any_other_form_is_left_to_the_engine() -> None:
    for asked in (
        {"structured_outputs": {"choice": ["a"] * 1024}, "response_format": {"type": "json_object"}},
        {"guided_json": "no JSON", "text": "a" * 100_000, "output_config": 7},
        {"structured_outputs": 7, "response_format": [], "guided_choice": "a", "text": {"format": None}},
    ):
        check_size(asked)
