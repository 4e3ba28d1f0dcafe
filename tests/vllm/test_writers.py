"""The site `writers` on vLLM: what is served equals a copy of the model whose weights were orthogonalised."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import models, oracle
from tests.vllm.conftest import IN_PROCESS
from tests.vllm.engines import PROMPTS, TOLERANCE, Home, are_likeliest, generate


@pytest.mark.parametrize("name", ["llama", "gemma3", "mixtral", "granite"])
def test_it_equals_orthogonalised_weights(name: str, tmp_path: Path, in_process: Callable[[Any], None]) -> None:
    home = Home.make(name, tmp_path)
    made = models.direction(home.model, shared=True, embedding=True, sites=("writers",))
    made.save(home.directions / "everywhere.safetensors")
    models.apart(home.model).save(home.directions / "apart.safetensors")
    v = made.directions[0, 0]
    eager = name == "mixtral"  # compiled in `test_equal`
    llm = home.start(**IN_PROCESS, enforce_eager=eager, steer={"sites": ["resid_post", "writers"]})
    try:
        jobs = [
            (prompt, spec) for prompt in PROMPTS for spec in ("everywhere", "everywhere=0.5", "apart", "off", "refusal")
        ]
        for (_, spec), output in zip(jobs, generate(llm, jobs), strict=True):
            if spec == "refusal" or (spec == "apart" and name in models.NORM_BEHIND_WRITER):
                continue
            strength = {"everywhere": 1.0, "everywhere=0.5": 0.5, "apart": 1.0, "off": 0.0}[spec]
            prompt, answer = list(output.prompt_token_ids), list(output.outputs[0].token_ids)
            ids = torch.tensor([prompt + answer])
            if name in models.NORM_BEHIND_WRITER:
                logits = oracle.reference_logits(home.model, name, v, ids, strength)
            else:
                weights = models.APART if spec == "apart" else None
                edited = oracle.orthogonalised(home.model, v, strength, weights)
                logits = edited(input_ids=ids, use_cache=False).logits.detach()
            expected = torch.log_softmax(logits[0].float(), -1)[len(prompt) - 1 : -1]
            assert are_likeliest(answer, expected)
            for position, (token, entry) in enumerate(zip(answer, output.outputs[0].logprobs, strict=True)):
                assert abs(expected[position, token].item() - entry[token].logprob) < TOLERANCE
    finally:
        in_process(llm)


def test_they_can_be_the_only_site(tmp_path: Path, in_process: Callable[[Any], None]) -> None:
    """Of blocks that hand on the stream in two parts."""
    home = Home.make("llama", tmp_path)
    for file in home.directions.iterdir():
        file.unlink()
    made = models.direction(home.model, shared=True, embedding=True, sites=("writers",))
    made.save(home.directions / "everywhere.safetensors")
    llm = home.start(**IN_PROCESS, enforce_eager=True, steer={"sites": ["writers"]})
    try:
        plain, steered = generate(llm, [(PROMPTS[0], "off"), (PROMPTS[0], "everywhere")])
        assert list(steered.outputs[0].token_ids) != list(plain.outputs[0].token_ids)
    finally:
        in_process(llm)
