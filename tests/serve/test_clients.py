"""Real clients against the running server: the `openai` package (sync, async, streaming), those of docs/clients.md, and
`lm_eval`."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import openai
import pytest

from tests import clients, harness
from tests.servers import Server, receipt, text


@pytest.fixture
def client(tiny_server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{tiny_server.url}/v1", api_key="none", max_retries=0)


def options(server: Server, **more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": "hello"}]
    return {"model": server.model_name, "messages": messages, "max_tokens": 8, "temperature": 0, **more}


def test_chat_by_every_carrier(tiny_server: Server, client: openai.OpenAI) -> None:
    expected = text(tiny_server.chat(steer="refusal"))
    for carrier in (
        {"extra_body": {"steer": "refusal"}},
        {"extra_body": {"steer": {"direction": "refusal", "strength": 1.0}}},
        {"extra_headers": {"X-Steer": "refusal"}},
        {"model": f"{tiny_server.model_name}+refusal"},
        {"extra_body": {"vllm_xargs": {"steer": "refusal"}}},
    ):
        answer = client.chat.completions.create(**options(tiny_server, **carrier))
        assert answer.choices[0].message.content == expected, carrier
    assert client.chat.completions.create(**options(tiny_server)).choices[0].message.content != expected


def test_streams_and_their_receipts(tiny_server: Server, client: openai.OpenAI) -> None:
    with client.chat.completions.with_streaming_response.create(
        **options(tiny_server, stream=True, extra_body={"steer": "refusal=0.7"})
    ) as raw:
        assert json.loads(raw.headers["x-steer-applied"])[0]["strength"] == 0.7
    chunks = list(
        client.chat.completions.create(
            **options(tiny_server, stream=True, stream_options={"include_usage": True}, extra_body={"steer": "refusal"})
        )
    )
    whole = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert whole == text(tiny_server.chat(steer="refusal"))
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 8


def test_completions_with_logprobs(tiny_server: Server, client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model=tiny_server.model_name, prompt="hello", max_tokens=4, temperature=0, logprobs=2, echo=True
    )
    reported = answer.choices[0].logprobs
    assert reported is not None
    assert len(reported.tokens or []) == 6 + 4


def test_errors_are_the_clients_own_exceptions(tiny_server: Server, client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="direction 'nobody' is not served") as caught:
        client.chat.completions.create(**options(tiny_server, extra_body={"steer": "nobody"}))
    assert caught.value.param == "steer"
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(**options(tiny_server, model="other"))
    assert {m.id for m in client.models.list()} >= {f"{tiny_server.model_name}+refusal"}


def test_async_client_with_mixed_requests(tiny_server: Server) -> None:
    async def run() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{tiny_server.url}/v1", api_key="none") as client:
            specs = ["off", "refusal", "verbosity=0.5"] * 8
            answers = await asyncio.gather(
                *[client.chat.completions.create(**options(tiny_server, extra_body={"steer": s})) for s in specs]
            )
        return [answer.choices[0].message.content or "" for answer in answers]

    got = asyncio.run(run())
    assert len(set(got)) == 3
    for i in range(3):
        assert len(set(got[i::3])) == 1


@pytest.mark.parametrize("name", ["openai", "litellm", "langchain-openai", "llm", "inspect-ai"])
def test_a_client_of_the_page_gets_the_answers_and_the_receipt(tiny_server: Server, tmp_path: Path, name: str) -> None:
    asked = [tiny_server.chat(clients.QUESTION, max_tokens=clients.TOKENS, steer=steer) for steer in ("off", "refusal")]
    plain, steered = (text(answer).strip() for answer in asked)
    assert plain != steered
    assert clients.said(name, tiny_server, tmp_path) == (plain, steered, receipt(asked[1]))


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("openai-responses", "/v1/responses is served by the vLLM backend alone"),
        ("anthropic", "/v1/messages is served by the vLLM backend alone"),
        ("instructor", "response_format: not served by the transformers backend"),
    ],
)
def test_a_client_tells_its_user_what_the_other_backend_serves(
    tiny_server: Server, tmp_path: Path, name: str, told: str
) -> None:
    assert told in clients.refused(name, tiny_server, tmp_path)


@pytest.mark.parametrize("kind", ["generate_until", "multiple_choice"])
def test_lm_eval(tiny_server: Server, tmp_path: Path, kind: str) -> None:
    """`local-completions` for both of its ways: generated answers, and log-probabilities of an echoed prompt."""
    answer = text(tiny_server.complete(harness.HELLO, steer="refusal", max_tokens=6)).strip()
    assert answer != text(tiny_server.complete(harness.HELLO, max_tokens=6)).strip()
    steered = f"{tiny_server.model_name}+refusal"
    score = harness.evaluate(
        tiny_server.url, steered, tokenizer_folder(tiny_server), tmp_path, kind=kind, answer=answer
    )
    assert score in ((1.0,) if kind == "generate_until" else (0.0, 1.0))


def tokenizer_folder(server: Server) -> str:
    return server.command[server.command.index("transformers") + 1]
