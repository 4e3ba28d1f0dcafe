"""What vLLM's request types have is known to the transformers backend, and their defaults ask it for nothing."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from fastapi import FastAPI
from pydantic_core import PydanticUndefined

from steer.serve import protocol
from steer.serve.protocol import ChatRequest, CompletionRequest
from steer.vllm import answers, internals

chat = pytest.importorskip("vllm.entrypoints.openai.chat_completion.protocol")
completion = pytest.importorskip("vllm.entrypoints.openai.completion.protocol")
responses = pytest.importorskip("vllm.entrypoints.openai.responses.protocol")
MESSAGES = [{"role": "user", "content": "x"}]
#: Made anew for each request.
VOLATILE = {"request_id"}


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [(ChatRequest, chat.ChatCompletionRequest), (CompletionRequest, completion.CompletionRequest)],
)
def test_defaults_of_vllms_requests_pass(ours: Any, theirs: Any) -> None:
    needed = {"model": "m", "messages": [{"role": "user", "content": "x"}], "prompt": "x"}
    body = {name: value for name, value in needed.items() if name in ours.model_fields}
    known = {*ours.model_fields, *protocol.IGNORED, *protocol.NOT_SERVED, *ours.neutral}
    assert set(theirs.model_fields) <= known
    for name, field in theirs.model_fields.items():
        if name not in body and field.default is not PydanticUndefined:
            ours.model_validate(body | {name: field.default})


@pytest.mark.parametrize(
    ("theirs", "name", "right", "wrong"),
    [
        (chat.ChatCompletionRequest, "messages", MESSAGES, [{"role": 0}]),
        (completion.CompletionRequest, "prompt", ["x"], [0.5, {}]),
        (responses.ResponsesRequest, "input", MESSAGES, [0, {}, {"role": "user", "content": [{}] * 50}]),
    ],
)
def test_a_long_list_has_no_more_problems_than_a_short_one(theirs: Any, name: str, right: Any, wrong: Any) -> None:
    """Else a small body of wrong items holds the event loop for minutes. What is right is read as before."""

    async def route(body: Any) -> None: ...

    route.__annotations__["body"] = theirs
    app = FastAPI()
    app.add_api_route("/", route, methods=["POST"])
    [made] = [each for each in app.routes if getattr(each, "path", "") == "/"]

    def read(value: Any) -> tuple[Any, Any]:
        found: tuple[Any, Any] = made.body_field.validate({"model": "m", name: value}, {}, loc=("body",))  # type: ignore[attr-defined]
        return found

    before = read(right * 3)
    assert not before[1]
    internals.server.fail_fast(made)
    after = read(right * 3)
    assert (after[0].model_dump(exclude=VOLATILE), after[1]) == (before[0].model_dump(exclude=VOLATILE), before[1])
    for item in wrong:
        assert 0 < len(read([item] * 900)[1]) <= len(read([item] * 2)[1]) < 900


@pytest.mark.parametrize(
    ("message", "param", "found"),
    [
        ("min_tokens must be less than or equal to max_tokens=2, got 9.", None, "min_tokens"),
        ("stop cannot contain an empty string.", None, "stop_sequences"),
        ("you passed 'n' twice", None, "n"),
        ("The model `x` does not exist.", None, "model"),
        ("this model has no such thing to stop", None, None),
        ("x" * 5000 + " min_tokens", None, "min_tokens"),
        ("Min tokens are too many", None, "min_tokens"),
        ("of `frequency`, min_tokens_more and nmin_tokens", None, None),
        ("max_completion_tokens=9 is too much (parameter=max_completion_tokens, value=9)", None, "max_tokens"),
        ("too long (parameter=input_tokens, value=[1, 2])", "input_tokens", "messages"),
        ("Cannot apply it to an empty conversation", None, "messages"),
        ("bad top_p (parameter=top_p, value=7)", "top_p", "top_p"),
    ],
)
def test_the_field_that_vllm_speaks_of_is_found(message: str, param: str | None, found: str | None) -> None:
    sent = ["model", "n", "stop_sequences", "max_tokens", "min_tokens", "messages", "x" * 5000]
    told, named = answers.plainly(message, param, sent)
    assert (named, len(told) <= 1000, "parameter=" in told) == (found, True, False)


def test_a_text_that_looks_like_the_end_of_a_stream_ends_none() -> None:
    """The end is a line of its own; in a text its line end is escaped."""
    sent: list[bytes] = []

    async def send(message: Any) -> None:
        sent.append(message.get("body", b""))

    async def fetch() -> Any:
        return {"tokens": []}

    chunk = b'data: {"id":"x","choices":[{"index":0,"text":"\\ndata: [DONE]","finish_reason":"stop"}]}\n\n'
    sending = answers.with_fields(send, lambda _answer, _choice: True, fetch)

    async def run() -> None:
        headers = [(b"content-type", b"text/event-stream")]
        await sending({"type": "http.response.start", "status": 200, "headers": headers})
        for body in (chunk, b"data: [DONE]\n\n"):
            await sending({"type": "http.response.body", "body": body, "more_body": True})

    asyncio.run(run())
    first, last = sent[1:]
    assert json.loads(first[6:])["choices"][0]["text"] == "\ndata: [DONE]"
    assert last.endswith(b"\n\ndata: [DONE]\n\n")
    assert json.loads(last.splitlines()[0][6:])["choices"][0]["steer_readout"] == {"tokens": []}


def test_an_answer_without_choices_goes_on_as_it_is() -> None:
    """As for a client that has left: vLLM's routes then answer nothing."""
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def fetch() -> Any:
        raise AssertionError

    async def answering() -> None:
        sending = answers.with_fields(send, lambda _answer, _choice: None, fetch)
        await sending(
            {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/json")]}
        )
        await sending({"type": "http.response.body", "body": b"null"})

    asyncio.run(answering())
    assert sent[-1]["body"] == b"null"
