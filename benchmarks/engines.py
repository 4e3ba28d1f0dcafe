"""vLLM engines as child processes that take turns: each is started once, and runs a job when it is told to.

`python -m benchmarks.engines ARM` is a child: it reads one JSON job a line and answers with the seconds that it took.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


@dataclass(frozen=True, slots=True)
class Job:
    """One batch: `specs[i % len(specs)]` steers request i; None carries nothing. Prompts are random token ids."""

    batch: int
    prompt: int
    answer: int
    specs: tuple[str | None, ...] = (None,)
    lora: bool = False


class Engine:
    """A child with one engine on `model`, ready when the `with` begins. `options` go to `LLM`."""

    def __init__(self, model: Path, options: Mapping[str, Any]) -> None:
        self.command = [sys.executable, "-m", "benchmarks.engines", str(model), json.dumps(options)]
        self.log = tempfile.NamedTemporaryFile("w+", suffix=".log")  # noqa: SIM115

    def __enter__(self) -> Engine:
        self.process = subprocess.Popen(
            self.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env=os.environ | ENVIRONMENT,
        )
        self.started = self._answer()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.kill()
        self.process.wait()
        self.log.close()

    def run(self, job: Job) -> float:
        """Seconds that the batch took inside the child."""
        assert self.process.stdin
        print(json.dumps(asdict(job)), file=self.process.stdin, flush=True)
        return float(self._answer()["seconds"])

    def arm(self, job: Job) -> Callable[[], float]:
        return lambda: self.run(job)

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the engine ended:\n{Path(self.log.name).read_text()[-6000:]}")
        answer: dict[str, Any] = json.loads(line)
        return answer


def main(model: str, options: dict[str, Any]) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what vLLM prints goes to the log

    import numpy as np
    from vllm import LLM, SamplingParams

    lora = options.pop("adapter", None)
    began = time.perf_counter()
    llm = LLM(model, **options)
    vocabulary = llm.llm_engine.model_config.get_vocab_size()
    compilation = llm.llm_engine.vllm_config.compilation_config
    print(
        json.dumps({"seconds": time.perf_counter() - began, "mode": int(compilation.mode or 0)}),
        file=answers,
        flush=True,
    )
    for line in sys.stdin:
        job = json.loads(line)
        rng = np.random.default_rng(0)
        prompts = [
            {"prompt_token_ids": ids} for ids in rng.integers(3, vocabulary, (job["batch"], job["prompt"])).tolist()
        ]
        parameters = [
            SamplingParams(
                temperature=0,
                max_tokens=job["answer"],
                ignore_eos=True,
                detokenize=False,
                extra_args=None if spec is None else {"steer": spec},
            )
            for spec in (job["specs"][i % len(job["specs"])] for i in range(job["batch"]))
        ]
        more: dict[str, Any] = {}
        if job["lora"]:
            from vllm.lora.request import LoRARequest

            more["lora_request"] = LoRARequest("adapter", 1, lora)
        began = time.perf_counter()
        llm.generate(prompts, parameters, use_tqdm=False, **more)
        print(json.dumps({"seconds": time.perf_counter() - began}), file=answers, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
