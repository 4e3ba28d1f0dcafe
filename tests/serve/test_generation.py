"""A request that says nothing gets what the model's own generation settings say, as `generate` applies them."""

from __future__ import annotations

import asyncio
import json
import logging
import shutil
import threading
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from fastapi.testclient import TestClient

from steer.hf.batching import BatchingEngine
from steer.hf.engine import Engine
from steer.hf.sampling import Token
from steer.serve import text
from steer.serve.app import build, prepare
from steer.serve.generation import AT_ONCE, dumps
from steer.settings import ServeSettings
from tests.serve.inside import post

PROMPT = [5, 6, 7, 0, 9, 11]


@contextmanager
def served(tiny: Path, folder: Path, **generation: Any) -> Iterator[tuple[TestClient, Path]]:
    """The app on the tiny model with that generation_config.json, and the model's folder."""
    made = folder / "with-settings"
    shutil.copytree(tiny, made)
    (made / "generation_config.json").write_text(json.dumps({"eos_token_id": 1, "pad_token_id": 0} | generation))
    (folder / "directions").mkdir()
    serving = prepare(str(made), ServeSettings(directions=folder / "directions", port=0))
    with TestClient(build(serving), "http://127.0.0.1", raise_server_exceptions=False) as client:
        try:
            yield client, made
        finally:
            serving.engine.stop()


@pytest.mark.parametrize(
    "settings",
    [
        {"max_new_tokens": 9},
        {"max_new_tokens": 9, "temperature": 0.6, "top_p": 0.9},
        {"max_new_tokens": 9, "repetition_penalty": 1.4},
        {"max_new_tokens": 9, "do_sample": True, "top_k": 1, "repetition_penalty": 1.4},
    ],
    ids=["nothing", "a temperature that is not used", "repetition penalty", "sampled of one"],
)
def test_a_request_that_says_nothing_gets_what_generate_makes(
    tiny_folder: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    with served(tiny_folder, tmp_path, **settings) as (client, folder):
        answer = client.post("/v1/completions", json={"model": folder.name, "prompt": PROMPT, "max_tokens": 9}).json()
    model = tf.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = tf.AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor([PROMPT])
    right = model.generate(ids, attention_mask=torch.ones_like(ids))[0, len(PROMPT) :]
    assert answer["choices"][0]["text"] == tokenizer.decode(right, skip_special_tokens=True)
    assert answer["usage"]["completion_tokens"] == len(right)


def test_what_a_request_says_goes_before(tiny_folder: Path, tmp_path: Path) -> None:
    with served(tiny_folder, tmp_path, max_new_tokens=4) as (client, folder):
        body = {"model": folder.name, "prompt": PROMPT, "ignore_eos": True}
        chat = {"model": folder.name, "messages": [{"role": "user", "content": "hello"}], "ignore_eos": True}
        short = client.post("/v1/chat/completions", json=chat).json()
        said = client.post("/v1/chat/completions", json=chat | {"max_tokens": 12}).json()
        sampled = {
            client.post("/v1/completions", json=body | {"temperature": 2, "seed": seed}).json()["choices"][0]["text"]
            for seed in range(8)
        }
    assert short["usage"]["completion_tokens"] == 4
    assert said["usage"]["completion_tokens"] == 12
    assert len(sampled) > 1


def test_settings_that_are_not_applied_are_told(
    tiny_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    more = {"no_repeat_ngram_size": 3, "do_sample": True, "typical_p": 0.5, "num_beams": 1, "min_length": 0}
    with caplog.at_level(logging.WARNING, "steer"), served(tiny_folder, tmp_path, **more):
        pass
    (told,) = [record.getMessage() for record in caplog.records if "generation_config" in record.getMessage()]
    assert told.endswith("not applied: no_repeat_ngram_size, typical_p")


def test_the_default_name_of_a_folder_is_its_last_part(tiny_folder: Path, tmp_path: Path) -> None:
    with served(tiny_folder, tmp_path) as (client, _):
        assert [model["id"] for model in client.get("/v1/models").json()["data"]][:1] == ["with-settings"]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_a_client_that_leaves_is_no_error(tiny_folder: Path, tmp_path: Path, path: str) -> None:
    asked = {"prompt": PROMPT} if path == "/v1/completions" else {"messages": [{"role": "user", "content": "0 1 2"}]}
    with served(tiny_folder, tmp_path) as (client, folder):
        body = {"model": folder.name, "max_tokens": 50} | asked
        with pytest.raises(IndexError):  # of the answer, which is none: the app itself has raised nothing
            asyncio.run(post(client.app, body, {"Host": "127.0.0.1"}, path))
        answer = client.post(path, json=body)
        assert (answer.status_code, answer.json()["usage"]["completion_tokens"]) == (200, 50)


def test_a_prompt_is_scored_once_and_not_for_a_client_that_has_left(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes: list[object] = []
    score_alone = Engine.score_alone

    def counted(self: Engine, *given: Any) -> list[Token]:
        passes.append(given)
        return score_alone(self, *given)

    with served(tiny_folder, tmp_path) as (client, folder):
        monkeypatch.setattr(Engine, "score_alone", counted)
        prompts = [PROMPT, PROMPT[:3]]
        body = {"model": folder.name, "prompt": prompts, "n": 3, "max_tokens": 0, "echo": True, "logprobs": 2}
        answer = client.post("/v1/completions", json=body).json()
        assert len(passes) == 2
        told = [choice["logprobs"]["token_logprobs"] for choice in answer["choices"]]
        assert [len(each) for each in told] == [6] * 3 + [3] * 3
        assert told[0] == told[1] == told[2]
        assert told[3] == told[4] == told[5]
        assert told[3][1:] == pytest.approx(told[0][1:3], abs=1e-4)
        assert answer["usage"]["prompt_tokens"] == 9
        with pytest.raises(IndexError):  # of the answer, which is none
            asyncio.run(post(client.app, body, {"Host": "127.0.0.1"}))
        assert len(passes) <= 3, "at most the one that had begun"


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_long_answers_are_written_off_the_event_loop(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    threads: set[str] = set()
    shown = text.token_text.__wrapped__

    def watched(*given: Any) -> str:
        threads.add(threading.current_thread().name)
        return shown(*given)

    monkeypatch.setattr("steer.serve.answers.token_text", watched)
    chat = {"messages": [{"role": "user", "content": "0"}], "logprobs": True, "top_logprobs": 20}
    asked = chat if path.endswith("chat/completions") else {"prompt": PROMPT, "logprobs": 20}
    with served(tiny_folder, tmp_path) as (client, folder):
        body = {"model": folder.name, "n": 4, "max_tokens": 16, "ignore_eos": True} | asked
        assert client.post(path, json=body).json()["usage"]["completion_tokens"] == 64
    assert {name.split("_")[0] for name in threads} == {"steer-answer-large"}


def test_what_is_written_in_pieces_is_json() -> None:
    value = {"a": [1, -2.5e-8, None, True, 'é\n"', {"b": [[[[[[[{"c": [1, {}]}]]]]]]]}], "e": {}, "f": []}
    assert dumps(value) == json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    with pytest.raises(ValueError, match="JSON"):
        dumps({"a": [float("nan")]})


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_of_many_answers_leaves_room_beside_it(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    real, running, most = BatchingEngine.answer, 0, 0

    async def counted(self: BatchingEngine, *asked: Any) -> AsyncGenerator[Token, None]:
        nonlocal running, most
        running += 1
        most = max(most, running)
        try:
            async with aclosing(real(self, *asked)) as tokens:
                async for token in tokens:
                    yield token
        finally:
            running -= 1

    with served(tiny_folder, tmp_path) as (client, folder):
        monkeypatch.setattr(BatchingEngine, "answer", counted)
        asked = {"model": folder.name, "prompt": PROMPT, "max_tokens": 3, "n": 40, "ignore_eos": True, "stream": stream}
        answer = client.post("/v1/completions", json=asked)
    pieces = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
    assert {one["index"] for each in pieces or [answer.json()] for one in each["choices"]} == set(range(40))
    assert (most, running) == (AT_ONCE, 0)
