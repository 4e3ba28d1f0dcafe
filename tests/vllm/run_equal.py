"""`python -m tests.vllm.run_equal FOLDER OPTIONS`: start an engine with these options (JSON) and compare a mixed batch
with transformers, swaps in between. A process of its own, for engines that need another environment."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from steer.spec import PHASES
from tests import models
from tests.vllm import device
from tests.vllm.engines import PROMPTS, SPECS, Home, Reference, check_phases, check_told, generate

PHASED = [f"refusal@{tokens}" for tokens in PHASES]


def warm_up_as_a_gpu_does() -> None:
    """Have the CPU's worker warm up as a GPU's does under the V2 runner: with requests that it makes itself. A process
    that does this must have its engine in it."""
    import torch
    from vllm import SamplingParams
    from vllm.v1.worker.cpu_worker import CPUWorker
    from vllm.v1.worker.gpu.warmup import run_mixed_prefill_decode_warmup, warmup_kernels

    warm_up = CPUWorker.compile_or_warm_up_model
    torch.accelerator.synchronize = lambda *_args: None  # there is none, and nothing to wait for
    # Greedy and without a grammar: Triton's interpreter cannot run the kernels of the others.
    SamplingParams.for_sampler_warmup = staticmethod(lambda: SamplingParams(temperature=0))

    def warming_up(worker: Any) -> Any:
        ways = worker.model_runner, worker.execute_model, lambda _grammar: worker.sample_tokens(None)
        warmup_kernels(*ways)
        assert run_mixed_prefill_decode_warmup(*ways, num_tokens=16)
        return warm_up(worker)

    CPUWorker.compile_or_warm_up_model = warming_up


def warm_up_again(llm: Any) -> None:
    """As after the engine has slept: nothing is left behind."""
    from steer.vllm import frontend

    frontend.of(llm).call("steer_streams")  # ends reach the worker by a step, of which there is none without a call
    worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    before = worker._residents.bank.rows_in_use
    worker.compile_or_warm_up_model()
    assert worker._residents.bank.rows_in_use == before
    assert not worker._running
    assert not worker._index.packed.any()
    llm.reset_prefix_cache()  # they wrote into blocks of the cache


def wild(model: Any) -> bytes:
    """A file that every float32 model accepts, whose stream leaves float32 at layer 1 under `affine=-10`: in a pipeline
    that is not where answers come from."""
    made = models.direction(model, seed=8, shared=True)
    rows = made.directions.clone()
    rows[2:] = 0
    weights, mean = torch.full_like(made.weights, 1e15), 1e15 * made.directions[:, 0]
    return replace(made, directions=rows, weights=weights, mean_harmless_all=mean).to_bytes()


def check_lost(llm: Any, reference: Reference, data: bytes) -> None:
    """A request whose stream overflows ends with an error, each time that it comes, and its neighbours as ever."""
    from steer.vllm import frontend

    frontend.of(llm).registry.put("wild", data, store=False)
    jobs = [(prompt, spec) for spec in ("off", "refusal", "wild:affine=-10") for prompt in PROMPTS]
    for _ in range(2):
        for (_, spec), output in zip(jobs, generate(llm, jobs), strict=True):
            if spec.startswith("wild"):
                assert output.outputs[0].finish_reason == "error", output
            else:
                reference.check(output, spec)


def main(folder: Path, options: dict[str, object]) -> None:
    from steer.vllm import frontend

    name = str(options.pop("model", "llama"))
    expected = options.pop("runner", device.RUNNER)
    home = Home.make(name, folder)
    reference = Reference(home)
    warms_up = options.pop("warms_up", False)
    if warms_up:
        warm_up_as_a_gpu_does()
    llm = home.start(**options)
    workers = llm.collective_rpc("steer_hello", args=("1:looks", ""))
    assert {worker["runner"] for worker in workers} == {expected}, workers
    registries = (frontend.of(llm).registry, reference.registry)
    jobs = [(prompt, spec) for spec in (*SPECS, "swapped") for prompt in PROMPTS]
    for seed in (11, 12):
        for registry in registries:
            registry.put("swapped", models.direction(home.model, seed=seed).to_bytes(), store=False)
        for (_, spec), output in zip(jobs, generate(llm, jobs), strict=True):
            reference.check(output, spec)
        if warms_up:
            warm_up_again(llm)
    check_phases(llm, reference)
    told = check_told(llm, reference, [(p, s) for s in (*SPECS, *PHASED) for p in (*PROMPTS, f"{PROMPTS[0]}~")])
    assert told == {None, False, True}
    check_lost(llm, reference, wild(home.model))
    if "speculative_config" in options:
        assert sum(m.value for m in llm.get_metrics() if m.name == "vllm:spec_decode_num_draft_tokens") > 0
    print("EQUAL", [worker["layers"] for worker in workers])


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
