"""What vLLM's request types have is known to the transformers backend, and their defaults ask it for nothing."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic_core import PydanticUndefined

from steer.serve import fields
from steer.serve.protocol import ChatRequest, CompletionRequest

chat = pytest.importorskip("vllm.entrypoints.openai.chat_completion.protocol")
completion = pytest.importorskip("vllm.entrypoints.openai.completion.protocol")


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [(ChatRequest, chat.ChatCompletionRequest), (CompletionRequest, completion.CompletionRequest)],
)
def test_defaults_of_vllms_requests_pass(ours: Any, theirs: Any) -> None:
    needed = {"model": "m", "messages": [{"role": "user", "content": "x"}], "prompt": "x"}
    body = {name: value for name, value in needed.items() if name in ours.model_fields}
    known = {*ours.model_fields, *fields.IGNORED, *fields.NOT_SERVED, *ours.neutral}
    assert set(theirs.model_fields) <= known
    for name, field in theirs.model_fields.items():
        if name not in body and field.default is not PydanticUndefined:
            ours.model_validate(body | {name: field.default})
