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
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from benchmarks.results import now

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
    """One batch: `specs[i % len(specs)]` steers request i; None carries nothing. Prompts are random token ids, every
    second one four times as long where `mixed`."""

    batch: int
    prompt: int
    answer: int
    specs: tuple[str | None, ...] = (None,)
    #: The folder of an adapter that every request has.
    adapter: str | None = None
    mixed: bool = False


@dataclass(frozen=True, slots=True)
class Arrival:
    """A direction file, or an adapter's folder, that comes into service anew, up to the first token that has it."""

    source: str
    prompt: int


class Process:
    """A child that loads once, and answers each line of JSON with one. It is ready when the `with` begins; `started` is
    what it said then. What else it prints goes to a log, whose end is in the error when it dies."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self.command, self.environment = list(command), dict(environment)
        self.log = tempfile.NamedTemporaryFile("w+", suffix=".log")  # noqa: SIM115

    def __enter__(self) -> Self:
        self.process = subprocess.Popen(
            self.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env=self.environment,
        )
        self.started = self._answer()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.kill()
        self.process.wait()
        self.log.close()

    def ask(self, question: object) -> dict[str, Any]:
        assert self.process.stdin
        print(json.dumps(question), file=self.process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{' '.join(self.command)} ended:\n{Path(self.log.name).read_text()[-6000:]}")
        answer: dict[str, Any] = json.loads(line)
        return answer


class Engine(Process):
    """A child with one engine on `model`. `options` go to `LLM`, `environment` to the child."""

    def __init__(self, model: Path, options: Mapping[str, Any], environment: Mapping[str, str] | None = None) -> None:
        command = [sys.executable, "-m", "benchmarks.engines", str(model), json.dumps(options)]
        super().__init__(command, os.environ | ENVIRONMENT | dict(environment or {}))

    def run(self, job: Job | Arrival) -> float:
        """Seconds that it took inside the child."""
        return float(self.ask({type(job).__name__: asdict(job)})["seconds"])

    def arm(self, job: Job | Arrival) -> Callable[[], float]:
        return lambda: self.run(job)


def main(model: str, options: dict[str, Any]) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what vLLM prints goes to the log

    from vllm import LLM

    began = time.perf_counter()
    llm = LLM(model, **options)
    mode = int(llm.llm_engine.vllm_config.compilation_config.mode or 0)
    print(json.dumps({"seconds": time.perf_counter() - began, "mode": mode}), file=answers, flush=True)
    for line in sys.stdin:
        ((kind, fields),) = json.loads(line).items()
        jobs: dict[str, Callable[..., float]] = {"Job": batch, "Arrival": arrival}
        seconds = jobs[kind](llm, **fields)
        print(json.dumps({"seconds": seconds}), file=answers, flush=True)


def batch(
    llm: Any, batch: int, prompt: int, answer: int, specs: list[str | None], adapter: str | None, mixed: bool
) -> float:
    lengths = [prompt * (4 if mixed and i % 2 else 1) for i in range(batch)]
    parameters = [_parameters(answer, specs[i % len(specs)]) for i in range(batch)]
    return _timed(llm, _prompts(llm, lengths), parameters, None if adapter is None else _adapter(adapter))


def arrival(llm: Any, source: str, prompt: int) -> float:
    path, prompts = Path(source), _prompts(llm, [prompt])
    began = time.perf_counter()
    if path.is_dir():
        _timed(llm, prompts, [_parameters(1, None)], _adapter(source))
    else:
        from steer.vllm import frontend

        frontend.of(llm).registry.put("arrived", path.read_bytes(), store=False)
        _timed(llm, prompts, [_parameters(1, "arrived")], None)
    return time.perf_counter() - began


def _timed(llm: Any, prompts: list[Any], parameters: list[Any], adapter: Any) -> float:
    began = now()
    llm.generate(prompts, parameters, use_tqdm=False, lora_request=adapter)
    return now() - began


def _prompts(llm: Any, lengths: list[int]) -> list[Any]:
    import numpy as np

    rng, vocabulary = np.random.default_rng(0), llm.llm_engine.model_config.get_vocab_size()
    return [{"prompt_token_ids": rng.integers(3, vocabulary, length).tolist()} for length in lengths]


def _parameters(answer: int, spec: str | None) -> Any:
    from vllm import SamplingParams

    extra = None if spec is None else {"steer": spec}
    return SamplingParams(temperature=0, max_tokens=answer, ignore_eos=True, detokenize=False, extra_args=extra)


def _adapter(folder: str) -> Any:
    from vllm.lora.request import LoRARequest

    # vLLM knows an adapter by its number
    return LoRARequest(folder, 1 + zlib.crc32(folder.encode()), folder)


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
