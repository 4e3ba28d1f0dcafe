"""`python -m tests.vllm.run_gpu FOLDER ENGINE`: one engine, in a process of its own since one that fails takes those
behind it along. Its answers go to FOLDER/ENGINE.json, as a list of `Said`.

ENGINE is `stock NAME` for vLLM with nothing of ours, on the weights in FOLDER/NAME.stock; or a mode of CUDA graphs
(NONE for none) for an engine that steers FOLDER/model with FOLDER/directions, and swaps FOLDER/first and FOLDER/second.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.vllm import device
from tests.vllm.engines import PROMPTS, SPECS, Home, parameters

STEPS = 16
#: Of captured batches: every step of these runs is padded to one of them, prompts as well.
SIZES = [4, 32, 512]
#: The site `writers` beside the usual: removing a direction there is what a copy of the weights can say, too.
SITES = ["resid_post", "writers"]
#: For the two directions of the folder, and for both versions of what is swapped: rows are used again.
ROWS = 5
STOCK = {
    "plain": ("off", ""),
    "first": ("swapped", "first"),
    "half": ("swapped=0.5", "first"),
    "second": ("swapped", "second"),
}


@dataclass(frozen=True)
class Said:
    """An answer: by which version of `swapped`, in which part of the run. `replays`: how many graphs each step of that
    part replayed."""

    part: str
    version: str
    spec: str
    prompt: int
    ids: list[int]
    tokens: list[int]
    logprobs: list[float]
    replays: list[int]


def said(output: Any, part: str, version: str, spec: str, replays: Sequence[int] = ()) -> Said:
    answer = output.outputs[0]
    tokens = list(answer.token_ids)
    logprobs = [entry[token].logprob for entry, token in zip(answer.logprobs, tokens, strict=True)]
    prompt = PROMPTS.index(output.prompt)
    return Said(part, version, spec, prompt, list(output.prompt_token_ids), tokens, logprobs, list(replays))


@contextmanager
def counted() -> Iterator[list[None]]:
    """Grows by one for each replay of a CUDA graph."""
    import torch

    seen: list[None] = []
    original = torch.cuda.CUDAGraph.replay

    def replay(graph: Any) -> None:
        seen.append(None)
        original(graph)

    torch.cuda.CUDAGraph.replay = replay  # type: ignore[method-assign, assignment]
    try:
        yield seen
    finally:
        torch.cuda.CUDAGraph.replay = original  # type: ignore[method-assign]


class Steps:
    """Requests that are added between the steps of an engine."""

    def __init__(self, llm: Any, replays: list[None]) -> None:
        self.engine, self.seen = llm.llm_engine, replays
        self.replays: list[int] = []
        self.outputs: dict[str, Any] = {}

    def add(self, name: str, prompt: str, spec: str, tokens: int) -> None:
        self.engine.add_request(name, prompt, parameters(spec, max_tokens=tokens))

    def run(self, until: str | None = None) -> None:
        """Steps until `until` has been answered, or everybody."""
        while self.engine.has_unfinished_requests() and until not in self.outputs:
            before = len(self.seen)
            finished = [output for output in self.engine.step() if output.finished]
            self.replays.append(len(self.seen) - before)
            self.outputs |= {output.request_id: output for output in finished}


def steered(folder: Path, mode: str) -> list[Said]:
    from steer.vllm import frontend

    home = Home(None, folder / "model", folder / "directions")
    captured = {"cudagraph_mode": mode, "cudagraph_capture_sizes": SIZES}
    graphs = {} if mode == "NONE" else {"compilation_config": captured}
    with counted() as replays:
        llm = home.start(distributed_executor_backend="uni", steer={"sites": SITES, "rows": ROWS}, **graphs)
        chosen = llm.llm_engine.vllm_config.compilation_config.cudagraph_mode.name
        assert chosen == mode, f"vLLM took {chosen} instead of {mode}"
        registry = frontend.of(llm).registry
        versions = {name: (folder / name).read_bytes() for name in ("first", "second")}
        found = []

        def swap(version: str) -> None:
            registry.put("swapped", versions[version], store=False)

        for version in versions:
            swap(version)
            steps = Steps(llm, replays)
            jobs = {
                f"{i}-{spec}": (i, spec) for spec in ("swapped", "swapped=0.5", *SPECS) for i in range(len(PROMPTS))
            }
            for name, (i, spec) in jobs.items():
                steps.add(name, PROMPTS[i], spec, STEPS)
            steps.run()
            for name, (_, spec) in jobs.items():
                found.append(said(steps.outputs[name], "together", version, spec, steps.replays))
        found += changing(llm, replays, swap)
    return found


def changing(llm: Any, replays: list[None], swap: Any) -> list[Said]:
    """Two requests go on while the third place of their batch is one's that is steered by the first version, then by
    the second, then by nothing: the same graph is replayed, and what its tokens read changes."""
    steps = Steps(llm, replays)
    swap("first")
    asked = {
        "stays": (1, "off"),
        "stays too": (1, "refusal"),
        "first": (0, "swapped"),
        "second": (0, "swapped"),
        "last": (0, "off"),
    }
    for name in ("stays", "stays too", "first"):
        steps.add(name, PROMPTS[asked[name][0]], asked[name][1], 3 * STEPS if "stays" in name else STEPS // 2)
    steps.run(until="first")
    swap("second")
    steps.add("second", PROMPTS[0], "swapped", STEPS // 2)
    steps.run(until="second")
    steps.add("last", PROMPTS[0], "off", STEPS // 2)
    steps.run()
    return [
        said(steps.outputs[name], "changing", name if name in ("first", "second") else "", spec, steps.replays)
        for name, (_, spec) in asked.items()
    ]


def stock(folder: Path, name: str) -> list[Said]:
    from vllm import LLM

    options: dict[str, Any] = dict(dtype="float32", max_model_len=256, max_num_seqs=32, seed=0, enforce_eager=True)
    llm = LLM(str(folder / f"{name}.stock"), **options, **device.MEMORY)
    spec, version = STOCK[name]
    outputs = llm.generate(list(PROMPTS), parameters(None, max_tokens=3 * STEPS), use_tqdm=False)
    return [said(output, "stock", version, spec) for output in outputs]


def main(folder: Path, kind: str, name: str = "") -> None:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    found = stock(folder, name) if kind == "stock" else steered(folder, kind)
    (folder / f"{name or kind}.json").write_text(json.dumps([asdict(each) for each in found]))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
