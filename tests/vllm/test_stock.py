"""With the package installed but not asked for, vLLM is untouched; plain traffic on a steered engine hits the prefix
cache as it does on stock vLLM."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.vllm import device
from tests.vllm.conftest import IN_PROCESS
from tests.vllm.engines import Home, parameters

BLOCK = 32
WORDS = ("many", "prompts", "begin", "alike", "and", "so", "they", "share", "the", "blocks", "that", "hold", "them")


def conversation(seed: int) -> list[str]:
    """Prompts of which many begin like an earlier one."""
    choose = random.Random(seed)
    said: list[str] = [" ".join(choose.choices(WORDS, k=6)) for _ in range(4)]
    for _ in range(30):
        said.append(choose.choice(said) + " " + " ".join(choose.choices(WORDS, k=4)))
    return [prompt[:200] for prompt in said]


def cached(llm: Any, prompts: list[str]) -> list[int]:
    """Tokens of each prompt that were found in the cache, asked one after another."""
    return [llm.generate([p], [parameters(None, max_tokens=2)], use_tqdm=False)[0].num_cached_tokens for p in prompts]


def test_an_engine_without_our_options_is_stock_and_plain_traffic_hits_as_there(
    tmp_path: Path, in_process: Callable[[Any], None]
) -> None:
    from vllm import LLM
    from vllm.v1.engine.input_processor import InputProcessor

    from steer.vllm import plugin
    from steer.vllm.steering_module import SteeringModule

    home, prompts = Home.make("llama", tmp_path), conversation(0)
    options: dict[str, Any] = dict(dtype="float32", max_model_len=256, max_num_seqs=32, seed=0)
    options |= {"block_size": BLOCK, "enforce_eager": True}
    plugin.register()
    stock = LLM(str(home.folder), **IN_PROCESS, **options, **device.MEMORY)
    try:
        worker = stock.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
        modules = list(worker.get_model().modules())
        assert not any(isinstance(module, SteeringModule) for module in modules)
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in modules)
        assert type(worker).__module__.startswith("vllm.")
        inputs = stock.llm_engine.input_processor
        assert inputs.process_inputs.__func__ is InputProcessor.process_inputs
        key = stock.llm_engine.vllm_config.compute_hash()
        expected = cached(stock, prompts)
    finally:
        in_process(stock)
    llm = home.start(**IN_PROCESS, block_size=BLOCK, enforce_eager=True)
    try:
        assert cached(llm, prompts) == expected
        assert sum(expected) > 0
        assert llm.llm_engine.vllm_config.compute_hash() != key
    finally:
        in_process(llm)
