"""What steering costs on vLLM, compiled: stock against an engine with the plugin, idle and with every request steered.

`python -m benchmarks.overhead`. Two stock engines take part: what the second one shows against the first is
what this machine can tell apart at all.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from datetime import date
from pathlib import Path
from typing import Any

import torch

from benchmarks.engines import Engine, Job
from benchmarks.shapes import WIDTH, llama
from benchmarks.timing import HEADER, Ratio, interleave, machine, pooled
from tests import models

LAYERS, VOCABULARY = 24, 32000
#: Prompt and answer tokens of the decode-heavy and the prefill-heavy workload.
DECODE, PREFILL = (32, 24), (256, 1)
OPTIONS: dict[str, Any] = dict(
    dtype="bfloat16",
    max_model_len=1024,
    max_num_seqs=64,
    enable_prefix_caching=False,
    seed=0,
)


def make(folder: Path) -> Any:
    """A random bfloat16 Llama of 24 layers × 896, saved, with a tokenizer."""
    model = llama(LAYERS, VOCABULARY, tie_word_embeddings=True).to(torch.bfloat16)
    model.save_pretrained(folder)
    models.tokenizer().save_pretrained(folder)
    return model


def home(root: Path) -> tuple[Path, dict[str, dict[str, Any]]]:
    """The model in `root`, and the options of each engine: two stock ones, and one with steering that has the
    directions d0 to d31."""
    model, directions = make(root / "model"), root / "directions"
    directions.mkdir()
    for seed in range(32):
        models.direction(model, seed=seed).save(directions / f"d{seed}.safetensors")
    settings = {"steer": {"directions": str(directions), "rank": 1, "rows": 40}}
    steering = dict(worker_cls="steer.vllm.worker.Worker", additional_config=settings)
    return root / "model", {"stock": OPTIONS, "stock again": OPTIONS, "steer": OPTIONS | steering}


@contextmanager
def started_in_order(
    model: Path, options: Mapping[str, dict[str, Any]], order: Sequence[str]
) -> Iterator[dict[str, Engine]]:
    with ExitStack() as stack:
        started = {name: stack.enter_context(Engine(model, options[name])) for name in order}
        for name, engine in started.items():
            assert engine.started["mode"] > 0, f"{name} is not compiled"
        yield started


def arms(started: Mapping[str, Engine], batch: int, tokens: tuple[int, int]) -> dict[str, Any]:
    own = tuple(f"d0={0.5 + 0.01 * i}" for i in range(batch))
    many = tuple(f"d{i}" for i in range(32))
    steer = started["steer"]
    return {
        "stock": started["stock"].arm(Job(batch, *tokens)),
        "stock again": started["stock again"].arm(Job(batch, *tokens)),
        "idle": steer.arm(Job(batch, *tokens)),
        "all steered": steer.arm(Job(batch, *tokens, ("d0",))),
        **({"own strengths": steer.arm(Job(batch, *tokens, own))} if batch > 1 else {}),
        **({"32 directions": steer.arm(Job(batch, *tokens, many))} if batch >= 32 else {}),
    }


def measure(rounds: int, batches: Sequence[int], kinds: Sequence[str]) -> None:
    """Print a table for each workload. Engines are started three times over, in another order each time, since it was
    seen that which one is started first makes a difference of some percent for as long as they live."""
    runs: dict[str, list[dict[str, Ratio]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        model, options = home(Path(folder))
        names = list(options)
        for turn in range(len(names)):
            with started_in_order(model, options, names[turn:] + names[:turn]) as started:
                for kind in kinds:
                    tokens = DECODE if kind == "decode" else PREFILL
                    for batch in batches:
                        title = f"{kind}, batch {batch} ({tokens[0]} + {tokens[1]} tokens)"
                        found = interleave(arms(started, batch, tokens), rounds, title)
                        runs.setdefault(title, []).append(found)
    for title, parts in runs.items():
        print(table(title, {arm: pooled([part[arm] for part in parts]) for arm in parts[0]}), flush=True)
        each = {arm: ", ".join(f"{part[arm].median:.3f}" for part in parts) for arm in parts[0]}
        print(
            "In each order of starting: " + "; ".join(f"{arm} {said}" for arm, said in each.items()) + "\n", flush=True
        )


def table(title: str, ratios: Mapping[str, Ratio]) -> str:
    return "\n".join([f"**{title}**\n", HEADER, *(ratio.row(arm) for arm, ratio in ratios.items()), ""])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=12, help="in each order of starting")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--kinds", nargs="+", default=["decode"], choices=["decode", "prefill"])
    given = parser.parse_args()
    import vllm

    print(
        f"{date.today()}, {machine()}, vLLM {vllm.__version__}: random bfloat16 Llama, {LAYERS} × {WIDTH}, compiled, "
    )
    print(f"{given.rounds} interleaved rounds in each of three orders of starting\n")
    measure(given.rounds, given.batches, given.kinds)
