"""A small real model, with its own template, where one is at hand: it is served as its template says and is measured,
and as it hardly refuses, a fit for refusal finds nothing."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from transformers import AutoTokenizer
from typer.testing import CliRunner

from steer.cli.app import app
from steer.demo import PROMPTS
from tests.servers import Server

VARIABLE = "STEER_TEST_SMOLLM2"
MODEL = os.environ.get(VARIABLE, "")
pytestmark = pytest.mark.skipif(not MODEL, reason=f"{VARIABLE} does not name a folder with SmolLM2-135M-Instruct")
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


def test_it_is_served_as_its_template_says() -> None:
    prompt = AutoTokenizer.from_pretrained(MODEL).apply_chat_template(
        QUESTION, tokenize=False, add_generation_prompt=True
    )
    assert prompt.count("<|im_start|>") == 3, "a system prompt of its own, the question, and the answer's beginning"
    with Server(MODEL) as server:
        model = server.client.get("/v1/models").json()["data"][0]["id"]
        asked = {"model": model, "max_tokens": 12, "temperature": 0}
        chat = server.client.post("/v1/chat/completions", json=asked | {"messages": QUESTION}).json()
        plain = server.client.post("/v1/completions", json=asked | {"prompt": prompt}).json()
    assert "Paris" in chat["choices"][0]["message"]["content"]
    assert plain["choices"][0]["text"] == chat["choices"][0]["message"]["content"]
    assert plain["usage"]["prompt_tokens"] == chat["usage"]["prompt_tokens"]


def test_a_fit_for_refusal_finds_nothing(tmp_path: Path) -> None:
    """Its prompts, which another model refuses, are measured first."""
    sets = ["--harmful", str(PROMPTS / "refused.test.txt"), "--harmless", str(PROMPTS / "harmless.test.txt")]
    output = tmp_path / "d.safetensors"
    told = CliRunner().invoke(app, ["fit", MODEL, *sets, "-o", str(output), "--limit", "16", "--max-tokens", "12"])
    assert told.exit_code == 3, told.output
    assert "the plain model shows 'refusal' in" in told.stderr
    assert list(tmp_path.iterdir()) == []
