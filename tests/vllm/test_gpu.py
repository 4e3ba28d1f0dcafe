"""On a GPU: what is captured in CUDA graphs steers when it is replayed, in each of vLLM's graph modes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import models
from tests.vllm.conftest import IN_PROCESS
from tests.vllm.engines import PROMPTS, SPECS, Home, Reference, generate

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU: CUDA graphs exist nowhere else"),
]

STEPS = 12


@pytest.fixture
def replays() -> Iterator[list[torch.cuda.CUDAGraph]]:
    """Every graph that was replayed, once for each replay."""
    seen: list[torch.cuda.CUDAGraph] = []
    original = torch.cuda.CUDAGraph.replay

    def replay(graph: torch.cuda.CUDAGraph) -> None:
        seen.append(graph)
        original(graph)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda.CUDAGraph, "replay", replay)
        yield seen


@pytest.mark.parametrize("mode", ["FULL", "PIECEWISE", "FULL_AND_PIECEWISE"])
def test_replayed_graphs_steer(
    mode: str, tmp_path: Path, in_process: Callable[[Any], None], replays: list[torch.cuda.CUDAGraph]
) -> None:
    from steer.vllm import frontend

    home = Home.make("llama", tmp_path)
    reference = Reference(home)
    llm = home.start(**IN_PROCESS, compilation_config={"cudagraph_mode": mode}, gpu_memory_utilization=0.3)
    try:
        chosen = llm.llm_engine.vllm_config.compilation_config.cudagraph_mode
        assert chosen.name == mode, f"vLLM took {chosen.name} instead"
        jobs = [(prompt, spec) for spec in (*SPECS, "swapped") for prompt in PROMPTS]
        for seed in (11, 12):  # what was captured reads the rows that are there when it is replayed
            for registry in (frontend.of(llm).registry, reference.registry):
                registry.put("swapped", models.direction(home.model, seed=seed).to_bytes(), store=False)
            replays.clear()
            for (_, spec), output in zip(jobs, generate(llm, jobs, max_tokens=STEPS), strict=True):
                reference.check(output, spec)
            assert replays, "no graph was replayed"
            if mode.startswith("FULL"):
                assert len(replays) <= STEPS + 2, "a decode step is one graph, not one for each piece"
    finally:
        in_process(llm)
