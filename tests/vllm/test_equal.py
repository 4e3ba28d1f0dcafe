"""For every architecture: what vLLM answers, plain and in every mode, is what transformers says. Compiled, but for two
whose graphs are as those of Llama (`test_engine`) and of Mixtral, and one that `test_writers` compiles."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.vllm.conftest import IN_PROCESS
from tests.vllm.engines import PROMPTS, SPECS, Home, Reference, generate

#: A fused residual; extra norms; no fused residual; a parallel block with one; two kinds of experts.
ARCHITECTURES = ("qwen3", "gemma2", "gemma3", "gpt2", "cohere2", "mixtral", "qwen3_moe")


EAGER = {"qwen3", "qwen3_moe", "gemma3"}


def check_mixed(llm: Any, reference: Reference, end: Callable[[Any], None]) -> None:
    """Answers of one batch, then the engine's end."""
    try:
        jobs = [(prompt, spec) for spec in SPECS for prompt in PROMPTS]
        for (_, spec), output in zip(jobs, generate(llm, jobs), strict=True):
            reference.check(output, spec)
    finally:
        end(llm)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_mixed_batch_is_what_transformers_says(name: str, tmp_path: Path, in_process: Callable[[Any], None]) -> None:
    home = Home.make(name, tmp_path)
    if name == "gemma2":  # transformers' SDPA attention leaves out the soft cap of its scores
        home.model.set_attn_implementation("eager")
    reference = Reference(home)
    llm = home.start(**IN_PROCESS, enforce_eager=name in EAGER)
    check_mixed(llm, reference, in_process)


@pytest.mark.skipif(find_spec("torchvision") is None, reason="vLLM's models that take images import torchvision")
@pytest.mark.parametrize("name", ["llava", "gemma3_vision", "mistral3"])
def test_text_for_a_model_that_takes_images_is_what_transformers_says(
    name: str, tmp_path: Path, in_process: Callable[[Any], None]
) -> None:
    """With directions that were made for its text model alone."""
    home = Home.make(name, tmp_path)
    reference = Reference(home)
    llm = home.start(**IN_PROCESS, enforce_eager=True, limit_mm_per_prompt={"image": 0})
    check_mixed(llm, reference, in_process)
