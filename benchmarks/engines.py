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
from itertools import pairwise
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


@dataclass(frozen=True, slots=True)
class Step:
    """One decode step of `batch` requests that are all in, of `count` in a row. `specs` and `adapter` as above."""

    batch: int
    specs: tuple[str | None, ...] = (None,)
    adapter: str | None = None
    prompt: int = 32
    count: int = 32


@dataclass(frozen=True, slots=True)
class Kernels:
    """What the GPU runs in a `Step`: of each kernel by its name, how often and for how many microseconds."""

    batch: int
    specs: tuple[str | None, ...] = (None,)


@dataclass(frozen=True, slots=True)
class Gap:
    """The longest time between two tokens of `batch` running requests while one more comes in: plain, or with the
    direction in the file `source`, which is new."""

    batch: int
    source: str | None


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

    def run(self, job: Job | Arrival | Step | Gap) -> float:
        """Seconds that it took inside the child."""
        return float(self._found(job))

    def arm(self, job: Job | Arrival | Step | Gap) -> Callable[[], float]:
        return lambda: self.run(job)

    def kernels(self, job: Kernels) -> dict[str, tuple[float, float]]:
        """By name: launches and microseconds of a step."""
        return {name: (count, time) for name, (count, time) in self._found(job).items()}

    def _found(self, job: Any) -> Any:
        return self.ask({type(job).__name__: asdict(job)})["found"]


def main(model: str, options: dict[str, Any]) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what vLLM prints goes to the log

    from vllm import LLM

    llm = LLM(model, **options)
    mode = int(llm.llm_engine.vllm_config.compilation_config.mode or 0)
    print(json.dumps({"mode": mode}), file=answers, flush=True)
    for line in sys.stdin:
        ((kind, fields),) = json.loads(line).items()
        jobs: dict[str, Callable[..., Any]] = {
            "Job": batch,
            "Arrival": arrival,
            "Step": step,
            "Kernels": kernels,
            "Gap": gap,
        }
        print(json.dumps({"found": jobs[kind](llm, **fields)}), file=answers, flush=True)


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
        _put(llm, source)
        _timed(llm, prompts, [_parameters(1, ARRIVED)], None)
    return time.perf_counter() - began


#: The name of a direction that comes in while an engine runs.
ARRIVED = "arrived"


def _put(llm: Any, source: str) -> None:
    from steer.vllm import frontend

    frontend.of(llm).registry.put(ARRIVED, Path(source).read_bytes(), store=False)


class Running:
    """Requests that decode together, step by step. They are aborted where the `with` ends."""

    #: Tokens of each before anything is counted: the prompts are in, and the steps are steady.
    WARM = 6

    def __init__(self, llm: Any, batch: int, specs: Sequence[str | None], prompt: int, adapter: str | None) -> None:
        self.llm, self.engine, self.tokens = llm, llm.llm_engine, dict[str, int]()
        for i, ids in enumerate(_prompts(llm, [prompt] * batch)):
            self.add(f"{i}", ids, specs[i % len(specs)], adapter)

    def __enter__(self) -> Self:
        self.until(self.WARM)
        return self

    def __exit__(self, *_: object) -> None:
        self.engine.abort_request(list(self.tokens))
        while self.engine.has_unfinished_requests():
            self.engine.step()

    def add(self, name: str, ids: Any, spec: str | None, adapter: str | None = None) -> None:
        from vllm.sampling_params import RequestOutputKind

        parameters = _parameters(512, spec)
        parameters.output_kind = RequestOutputKind.DELTA
        lora = None if adapter is None else _adapter(adapter)
        self.engine.add_request(name, ids, parameters, lora_request=lora)
        self.tokens[name] = 0

    def step(self) -> bool:
        """Whether the first request has a token of it."""
        before = self.tokens["0"]
        for output in self.engine.step():
            self.tokens[output.request_id] += len(output.outputs[0].token_ids)
        return self.tokens["0"] > before

    def until(self, tokens: int) -> float:
        """Steps until each request has so many; the time then."""
        while min(self.tokens.values()) < tokens:
            self.step()
        return time.perf_counter()


def step(llm: Any, batch: int, specs: list[str | None], adapter: str | None, prompt: int, count: int) -> float:
    with Running(llm, batch, specs, prompt, adapter) as running:
        began = time.perf_counter()
        return (running.until(running.WARM + count) - began) / count


def kernels(llm: Any, batch: int, specs: list[str | None]) -> dict[str, tuple[float, float]]:
    import torch
    from torch.profiler import ProfilerActivity, profile

    count = 8
    with Running(llm, batch, specs, 32, None) as running:
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            running.until(running.WARM + count)
            torch.cuda.synchronize()
    return {
        each.key: (each.count / count, each.self_device_time_total / count)
        for each in seen.key_averages()
        if each.self_device_time_total
    }


def gap(llm: Any, batch: int, source: str | None) -> float:
    with Running(llm, batch, [None], 32, None) as running:
        times = [time.perf_counter()]
        if source is not None:
            _put(llm, source)
        running.add("new", _prompts(llm, [32])[0], None if source is None else ARRIVED)
        while running.tokens["new"] < 2:
            if running.step():
                times.append(time.perf_counter())
    return max(b - a for a, b in pairwise(times))


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
