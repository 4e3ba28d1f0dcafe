"""What steering costs on vLLM, compiled, beside stock vLLM and beside rank-1 LoRA adapters with the same effect.

`python -m benchmarks.overhead`. Two stock engines take part: what the second one shows against the first is what this
machine can tell apart at all. `--suite variants` compares ranks and sites with each other, `--suite modes` requests in
each mode, at some tokens and under a condition with plain ones to the same engine.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.engines import Arrival, Engine, Job
from benchmarks.overhead_hf import ways
from benchmarks.results import (
    BUSY,
    BUSY_HELP,
    COUNTED,
    Ratio,
    Result,
    Table,
    benchmark_parser,
    interleave,
    pooled,
    rounds,
)
from benchmarks.shapes import WIDTH, llama
from steer.lab.merge.model import export_adapter
from steer.lab.merge.removal import removal
from steer.lab.merge.weights import Checkpoint
from tests import models

LAYERS, VOCABULARY, DIRECTIONS = 24, 32000, 32
#: Prompt and answer tokens; every second prompt of the mixed one is four times as long.
WORKLOADS = {"decode": (32, 24), "prefill": (256, 1), "mixed": (64, 12)}
OPTIONS: dict[str, Any] = dict(
    dtype="bfloat16",
    max_model_len=1024,
    max_num_seqs=256,
    enable_prefix_caching=False,
    seed=0,
)
#: With nothing of ours in the process at all.
WITHOUT = {"VLLM_PLUGINS": ""}


@dataclass(frozen=True, slots=True)
class Home:
    """A bfloat16 Llama with a tokenizer, directions, and adapters of the same effect."""

    root: Path
    options: dict[str, Any] = field(default_factory=lambda: OPTIONS)

    @property
    def model(self) -> Path:
        return self.root / "model"

    @property
    def adapters(self) -> list[str]:
        return sorted(str(path) for path in self.root.glob("adapter*"))

    @property
    def arrivals(self) -> list[str]:
        return sorted(str(path) for path in (self.root / "arrivals").iterdir())

    def make(self, adapters: int) -> Home:
        """Random weights of 24 layers × 896, and `adapters`: the first for every request, the others to arrive one
        after the other."""
        model = llama(LAYERS, VOCABULARY, tie_word_embeddings=True).to(torch.bfloat16)
        model.save_pretrained(self.model)
        self.steer(model)
        for seed in range(adapters):
            if seed:
                arriving = models.direction(model, seed=seed, shared=True)
                arriving.save(self.root / "arrivals" / f"{seed:02}.safetensors")
            # the same vector; an adapter of vLLM removes it from what blocks write, and cannot reach the embedding
            one = models.direction(model, seed=seed, shared=True, sites=("writers",))
            folder = self.root / f"adapter{seed:02}"
            export_adapter(Checkpoint(self.model), removal(one, 1.0), folder, base=str(self.model))
        return self

    def steer(self, model: Any) -> None:
        """Tokenizer and directions for `model`, of which only the configuration is read."""
        models.tokenizer().save_pretrained(self.model)
        for name in ("directions", "writers", "plane", "arrivals"):
            (self.root / name).mkdir()
        for seed in range(DIRECTIONS):
            models.direction(model, seed=seed).save(self.root / "directions" / f"d{seed}.safetensors")
        for rank in (2, 4):
            models.direction(model, seed=rank, k=rank).save(self.root / "directions" / f"k{rank}.safetensors")
        shared = models.direction(model, shared=True, sites=("writers",))
        shared.save(self.root / "writers" / "d0.safetensors")
        models.direction(model, plane=True).save(self.root / "plane" / "d.safetensors")

    def steering(self, *, folder: str = "directions", rank: int = 1, **more: Any) -> dict[str, Any]:
        settings = {"directions": str(self.root / folder), "rank": rank, "rows": 40} | more
        return self.options | dict(worker_cls="steer.vllm.worker.Worker", additional_config={"steer": settings})


@dataclass(frozen=True, slots=True)
class RequestedDirection:
    """An engine: options of `LLM`, and what its process has in its environment."""

    options: dict[str, Any]
    environment: Mapping[str, str] = field(default_factory=dict)


Arms = dict[str, Callable[[], float]]
MakeArms = Callable[[Mapping[str, Engine], str, int], Arms]


def steered(engine: Engine, kind: str, batch: int) -> Arms:
    """Of an engine that steers: idle, half of the requests steered, all of them, and by many directions at once."""
    mixtures: dict[str, tuple[str | None, ...]] = {"on, idle": (None,), "all steered": ("d0",)}
    if batch > 1:
        mixtures["half steered"] = ("d0", None)
    if batch >= 32:
        mixtures["32 directions"] = tuple(f"d{i}" for i in range(DIRECTIONS))
    return {
        name: engine.arm(Job(batch, *WORKLOADS[kind], specs, mixed=kind == "mixed")) for name, specs in mixtures.items()
    }


def stock_suite(home: Home) -> tuple[dict[str, RequestedDirection], MakeArms]:
    """Stock vLLM twice, installed but off, steering in every mixture, and LoRA on stock."""
    engines = {
        "stock": RequestedDirection(home.options, WITHOUT),
        "stock again": RequestedDirection(home.options, WITHOUT),
        "installed, off": RequestedDirection(home.options),
        "steer": RequestedDirection(home.steering()),
    }
    if home.adapters:
        lora_options = home.options | dict(enable_lora=True, max_lora_rank=1, max_loras=1)
        engines["LoRA on stock"] = RequestedDirection(lora_options, WITHOUT)

    def arms(started: Mapping[str, Engine], kind: str, batch: int) -> Arms:
        def job(specs: Sequence[str | None] = (None,), adapter: str | None = None) -> Job:
            return Job(batch, *WORKLOADS[kind], tuple(specs), adapter, mixed=kind == "mixed")

        own = [f"d0={0.5 + 0.001 * i}" for i in range(batch)]
        steer = started["steer"]
        found = {name: started[name].arm(job()) for name in ("stock", "stock again", "installed, off")}
        found |= steered(steer, kind, batch)
        if batch > 1:
            found["each its own strength"] = steer.arm(job(own))
        if home.adapters:
            found["LoRA on stock, unused"] = started["LoRA on stock"].arm(job())
            found["LoRA of rank 1 on stock"] = started["LoRA on stock"].arm(job(adapter=home.adapters[0]))
        return found

    return engines, arms


def variants_suite(home: Home) -> tuple[dict[str, RequestedDirection], MakeArms]:
    """Ranks, sites and the read-out, each against the usual: one direction of rank 1 at `resid_post`."""
    engines = {
        "rank 1": RequestedDirection(home.steering()),
        "room for rank 4": RequestedDirection(home.steering(rank=4)),
        "writers": RequestedDirection(home.steering(folder="writers", sites=["writers"])),
        "readout": RequestedDirection(home.steering(readout=8)),
    }

    def arms(started: Mapping[str, Engine], kind: str, batch: int) -> Arms:
        def job(spec: str | None) -> Job:
            return Job(batch, *WORKLOADS[kind], (spec,), mixed=kind == "mixed")

        wide = started["room for rank 4"]
        return {
            "rank 1": started["rank 1"].arm(job("d0")),
            **{f"rank {k}, with room for 4": wide.arm(job(s)) for k, s in ((1, "d0"), (2, "k2"), (4, "k4"))},
            "writers, idle": started["writers"].arm(job(None)),
            "writers": started["writers"].arm(job("d0")),
            "with a compiled read-out, unasked": started["readout"].arm(job("d0")),
        }

    return engines, arms


def modes_suite(home: Home) -> tuple[dict[str, RequestedDirection], MakeArms]:
    """One engine with the rank that a rotation and a condition need. Its plain requests are the baseline, twice."""

    def arms(started: Mapping[str, Engine], kind: str, batch: int) -> Arms:
        specs = {"plain": None, "plain again": None} | ways("d")
        return {
            name: started["rank 2"].arm(Job(batch, *WORKLOADS[kind], (spec,), mixed=kind == "mixed"))
            for name, spec in specs.items()
        }

    return {"rank 2": RequestedDirection(home.steering(folder="plane", rank=2))}, arms


SUITES = {"stock": stock_suite, "variants": variants_suite, "modes": modes_suite}


@contextmanager
def started_in_order(
    model: Path, wanted: Mapping[str, RequestedDirection], order: Sequence[str]
) -> Iterator[dict[str, Engine]]:
    with ExitStack() as stack:
        started = {}
        for name in order:
            print(f"starting {name}", file=sys.stderr, flush=True)
            started[name] = stack.enter_context(Engine(model, wanted[name].options, wanted[name].environment))
        for name, engine in started.items():
            # vLLM does not compile with LoRA on a CPU; every other engine must be compiled
            assert engine.started["mode"] > 0 or wanted[name].options.get("enable_lora"), f"{name} is not compiled"
        yield started


def measure(home: Home, suite: str, rounds: int, orders: int, workloads: Sequence[tuple[str, int]]) -> list[Table]:
    """A table for each workload. Engines are started `orders` times over, in another order each time, since it was seen
    that which one is started first makes a difference of some percent for as long as they live."""
    runs: dict[str, list[dict[str, Ratio]]] = {}
    wanted, make_arms = SUITES[suite](home)
    names, rng = list(wanted), random.Random(0)
    for turn in range(orders):
        order = names[turn % len(names) :] + names[: turn % len(names)] if turn < 2 else rng.sample(names, len(names))
        with started_in_order(home.model, wanted, order) as started:
            for kind, batch in workloads:
                prompt, answer = WORKLOADS[kind]
                title = f"{kind}, batch {batch} ({prompt} + {answer} tokens)"
                runs.setdefault(title, []).append(interleave(make_arms(started, kind, batch), rounds, title))
            if home.arrivals:
                runs.setdefault(ARRIVING, []).append(arriving(started, home, turn))
    return [_table(title, parts) for title, parts in runs.items()]


#: New directions, or adapters, in each order of starting.
ARRIVALS = 6
ARRIVING = f"a new direction into service, up to its first token (32 tokens, {ARRIVALS} in each order)"


def arriving(started: Mapping[str, Engine], home: Home, turn: int) -> dict[str, Ratio]:
    """From file to first token: a direction beside an adapter of the same effect, each of them new."""
    mine = slice(turn * ARRIVALS, (turn + 1) * ARRIVALS)
    directions, adapters = iter(home.arrivals[mine]), iter(home.adapters[1:][mine])
    return interleave(
        {
            "LoRA of rank 1 on stock": lambda: started["LoRA on stock"].run(Arrival(next(adapters), 32)),
            "steer": lambda: started["steer"].run(Arrival(next(directions), 32)),
        },
        ARRIVALS - 1,
        "arrivals",
    )


def _table(title: str, parts: Sequence[Mapping[str, Ratio]]) -> Table:
    arms = {arm: pooled([part[arm] for part in parts]) for arm in parts[0]}
    each = (f"{arm} {', '.join(f'{part[arm].median:.3f}' for part in parts)}" for arm in list(arms)[1:])
    return Table(title, arms, [f"In each order of starting: {'; '.join(each)}"])


def workload(text: str) -> tuple[str, int]:
    kind, _, batch = text.partition(":")
    if kind not in WORKLOADS or not batch.isdigit():
        raise argparse.ArgumentTypeError(f"'{text}' is not KIND:BATCH with a kind of {', '.join(WORKLOADS)}")
    return kind, int(batch)


#: What a reader of the tables must know of them.
COMPILED = {
    "stock": "Every engine is compiled, but for the one with LoRA where vLLM does not compile with it, as on a CPU "
    "(0.32): there its arms pay for that too, which the one that no request uses shows.",
    "variants": "Every engine is compiled.",
    "modes": "The engine is compiled.",
}
DEFAULT = ("decode:1", "decode:8", "decode:64", "prefill:1", "prefill:8", "mixed:32")

if __name__ == "__main__":
    parser = benchmark_parser(__doc__)
    parser.add_argument("--suite", default="stock", choices=SUITES)
    parser.add_argument("--rounds", type=rounds, default=5, help="in each order of starting")
    parser.add_argument("--orders", type=int, default=2, help="how often all engines are started")
    parser.add_argument("--workloads", type=workload, nargs="+", default=[workload(text) for text in DEFAULT])
    parser.add_argument("--busy", action="store_true", help=BUSY_HELP)
    given = parser.parse_args()
    if given.busy:
        os.environ[BUSY] = "1"
    import vllm

    with tempfile.TemporaryDirectory() as folder:
        home = Home(Path(folder)).make(adapters=1 + given.orders * ARRIVALS if given.suite == "stock" else 0)
        tables = measure(home, given.suite, given.rounds, given.orders, given.workloads)
    result = Result(
        name="vllm" if given.suite == "stock" else f"vllm-{given.suite}",
        title="What steering costs on vLLM" + (f", {given.suite}" if given.suite != "stock" else ""),
        versions={"vLLM": vllm.__version__},
        tables=tables,
        more=f"Random bfloat16 Llama, {LAYERS} layers × {WIDTH}; {given.rounds} interleaved rounds in each of "
        f"{given.orders} orders of starting. {COMPILED[given.suite]} {COUNTED * given.busy}\n",
    )
    result.publish(given.out)
