"""Real clients against the running server: the `openai` package (sync, async, streaming) and `lm_eval`."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.servers import Server, text


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


TASK = """\
task: steer_demo
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{question}}}}"
{more}
metric_list: [{{metric: {metric}, aggregation: mean, higher_is_better: true}}]
"""


@pytest.mark.parametrize("kind", ["generate_until", "multiple_choice"])
def test_lm_eval(tiny_server: Server, tmp_path: Path, kind: str) -> None:
    """`local-completions` for both of its ways: generated answers, and log-probabilities of an echoed prompt."""
    steered = f"{tiny_server.model_name}+refusal"
    ids = [3 + ord(letter) - 32 for letter in "hello"]  # the harness sends token ids, without a BOS
    answer = text(tiny_server.complete(ids, steer="refusal", max_tokens=6)).strip()
    assert answer != text(tiny_server.complete(ids, max_tokens=6)).strip()
    (tmp_path / "data.jsonl").write_text(json.dumps({"question": "hello", "answer": answer, "choices": ["ab", "cd"]}))
    if kind == "generate_until":
        more = 'doc_to_target: "{{answer}}"\ngeneration_kwargs: {until: ["NEVER"], max_gen_toks: 6, do_sample: false}'
        metric = "exact_match"
    else:
        more, metric = 'doc_to_target: 0\ndoc_to_choice: "{{choices}}"', "acc"
    (tmp_path / "task.yaml").write_text(TASK.format(data=tmp_path / "data.jsonl", kind=kind, metric=metric, more=more))
    arguments = f"model={steered},base_url={tiny_server.url}/v1/completions,tokenizer_backend=huggingface"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "lm_eval", "run", "--model", "local-completions", "--tasks", "steer_demo"),
            *("--include_path", str(tmp_path), "--output_path", str(tmp_path / "out"), "--model_args"),
            f"{arguments},tokenizer={tokenizer_folder(tiny_server)},num_concurrent=1,max_retries=1",
        ],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=tmp_path,
        env={"HF_HOME": str(tmp_path / "hf"), "PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (results,) = (tmp_path / "out").rglob("results*.json")
    values = json.loads(results.read_text())["results"]["steer_demo"]
    if kind == "generate_until":
        assert values["exact_match,none"] == 1.0, "the harness saw the steered answer"
    else:
        assert values["acc,none"] in (0.0, 1.0)


def tokenizer_folder(server: Server) -> str:
    return server.command[server.command.index("transformers") + 1]
