"""Every field that a client may send is served, refused by its own name, or asks for nothing."""

from __future__ import annotations

import asyncio
import json
from typing import Any, get_type_hints

import pytest
from fastapi import Request
from fastapi.exceptions import RequestValidationError
from openai.types import completion_create_params as completion
from openai.types.chat import completion_create_params as chat
from pydantic import ValidationError
from pydantic_core._pydantic_core import list_all_errors

from steer.serve import errors, protocol
from steer.serve.protocol import ChatRequest, CompletionRequest
from tests.fuzz.fields import FOREIGN
from tests.fuzz.life import Life, by_field
from tests.fuzz.surface import Outcome
from tests.servers import Server

OPENAI = [
    *((ChatRequest, name) for name in sorted(get_type_hints(chat.CompletionCreateParamsStreaming))),
    *((CompletionRequest, name) for name in sorted(get_type_hints(completion.CompletionCreateParamsStreaming))),
]
BODY: dict[type, dict[str, Any]] = {
    ChatRequest: {"model": "m", "messages": [{"role": "user", "content": "x"}]},
    CompletionRequest: {"model": "m", "prompt": "x"},
}


@pytest.mark.parametrize(("request_type", "name"), OPENAI)
def test_every_field_of_openais_requests_is_known_and_null_passes(request_type: Any, name: str) -> None:
    assert name in {*request_type.model_fields, *protocol.IGNORED, *protocol.NOT_SERVED}
    if name not in BODY[request_type]:
        request_type.model_validate(BODY[request_type] | {name: None})


@pytest.mark.parametrize("request_type", [ChatRequest, CompletionRequest])
def test_what_is_not_served_is_refused_by_its_name_and_what_asks_for_nothing_passes(request_type: Any) -> None:
    for name, neutral in protocol.NOT_SERVED.items():
        for value in (None, "", [], {}, *neutral):
            request_type.model_validate(BODY[request_type] | {name: value})
        for value in (7, "much", ["x"], {"x": 1}):
            with pytest.raises(ValidationError, match=f"{name}: not served by the transformers"):
                request_type.model_validate(BODY[request_type] | {name: value})
    for name in protocol.IGNORED:
        for value in (None, 7, "much", ["x"], {"x": 1}):
            request_type.model_validate(BODY[request_type] | {name: value})


def test_only_a_model_may_have_said_nothing() -> None:
    for said in ({}, {"content": None}):
        ChatRequest.model_validate({"model": "m", "messages": [{"role": "assistant", **said}]})
        with pytest.raises(ValidationError, match="content: missing; accepted: a text, or a list"):
            ChatRequest.model_validate({"model": "m", "messages": [{"role": "user", **said}]})
    with pytest.raises(
        ValidationError, match=r"'x' is not accepted: a list, like \[{'role': 'user', 'content': 'x'}\]"
    ):
        ChatRequest.model_validate({"model": "m", "messages": "x"})


def test_true_is_not_1() -> None:
    for name, value in {"repeat_penalty": True, "top_a": False, "skip_special_tokens": 1}.items():
        with pytest.raises(ValidationError, match=name):
            ChatRequest.model_validate(BODY[ChatRequest] | {name: value})


def test_an_unknown_field_is_refused_with_the_nearest_known_one() -> None:
    with pytest.raises(ValidationError, match=r"temprature: unknown field \(did you mean temperature\?\)"):
        ChatRequest.model_validate(BODY[ChatRequest] | {"temprature": 0.5})
    for wrong, right in {
        "stear": "steer",
        "steeer": "steer",
        "ster": "steer",
        "steer_readuot": "steer_readout",
        "vllm_xarg": "vllm_xargs",
    }.items():
        with pytest.raises(ValidationError, match=rf"{wrong}: unknown field \(did you mean {right}\?\)"):
            ChatRequest.model_validate(BODY[ChatRequest] | {wrong: "refusal"})
    with pytest.raises(ValidationError) as caught:
        ChatRequest.model_validate(BODY[ChatRequest] | {f"unknown{number}": 1 for number in range(1000)})
    assert len(str(caught.value)) < 2000


def test_a_field_of_the_other_route_is_told_with_that_route() -> None:
    chat, completion = BODY[ChatRequest], BODY[CompletionRequest]
    with pytest.raises(ValidationError, match="prompt: not of this route: /v1/completions takes it"):
        ChatRequest.model_validate({"model": "m", "prompt": completion["prompt"]})
    with pytest.raises(ValidationError, match="messages: not of this route: /v1/chat/completions takes it"):
        CompletionRequest.model_validate({"model": "m", "messages": chat["messages"]})


def test_the_neutral_values_of_a_route_are_its_own() -> None:
    CompletionRequest.model_validate(BODY[CompletionRequest] | {"add_special_tokens": True})
    ChatRequest.model_validate(BODY[ChatRequest] | {"add_special_tokens": False, "echo": False})
    for request_type, value in ((CompletionRequest, False), (ChatRequest, True)):
        with pytest.raises(ValidationError, match="add_special_tokens: not served"):
            request_type.model_validate(BODY[request_type] | {"add_special_tokens": value})


def test_whatever_pydantic_finds_is_told_without_its_words() -> None:
    """Every kind of problem that it knows, as an item and in the text that an engine may hand on."""
    for known in list_all_errors():
        item: dict[str, Any] = {
            "type": known["type"],
            "loc": ("body", "function-wrap[x()]", "field", "list[int]", 0),
            "input": 7,
        }
        item |= {"ctx": known.get("example_context") or {}, "msg": known["message_template_python"]}
        answer = asyncio.run(errors.on_validation_error(Request({"type": "http"}), RequestValidationError([item])))
        told = json.loads(bytes(answer.body))["error"]
        assert told["param"] == "field"
        assert not FOREIGN.search(told["message"]), told
    with pytest.raises(ValidationError) as caught:
        CompletionRequest.model_validate(BODY[CompletionRequest] | {"n": "x" * 999, "stream": [], "top_p": 7})
    told = errors.pydantic_text(str(caught.value))
    assert told
    message, param = told
    assert (param, FOREIGN.search(message)) == ("stream", None), message
    assert "n: 'xxx" in message
    assert "a whole number" in message


def test_no_value_of_any_field_gets_past_its_row(tiny_server: Server) -> None:
    """Each is served or refused by its name, and the server is what it was: `make fuzz` has all of the values."""
    assert tiny_server.directions
    outcome = Outcome()
    life = Life(tiny_server, [(tiny_server.directions / "refusal.safetensors").read_bytes()], outcome)
    by_field(life, 2500)
    life.look()
    assert not outcome.findings, "\n".join(f"{kind}: {what}" for kind, what in outcome.findings.items())
    assert set(outcome.counts) >= {"200", "400"}


@pytest.mark.parametrize(
    ("field", "wrong", "right"),
    [
        ("max_tokens", ["5", True, 5.5], 5.0),
        ("n", ["2", True, 2.5], 2),
        ("seed", ["7", False], 7),
        ("temperature", ["0.5", True], 1),  # a whole number is a number
        ("top_p", ["1", True], 1),
        ("stream", ["true", 1, 1.0], True),
        ("stop_token_ids", [[True], ["5"]], [5]),
    ],
)
def test_a_value_of_another_type_is_not_taken_for_what_it_looks_like(field: str, wrong: list[Any], right: Any) -> None:
    body = {"model": "m", "prompt": "x"}
    assert getattr(CompletionRequest.model_validate(body | {field: right}), field) == right
    for value in wrong:
        with pytest.raises(ValidationError, match=field):
            CompletionRequest.model_validate(body | {field: value})
