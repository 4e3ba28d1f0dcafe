"""On a GPU: what steering costs on vLLM there, beside stock vLLM and beside a LoRA adapter, in one command.

`python -m benchmarks.gpu`. Dummy weights at the shapes of a 0.5 B and of a 7 B model, compiled, with CUDA graphs as
vLLM has them by default. Engines come in pairs that share the GPU, stock and another, each in a process of its own; all
pairs are started `--orders` times. What a pair has shown is kept in the folder of results: the same command goes on
with what is missing.
"""

from __future__ import annotations

import json
import multiprocessing
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.engines import Arrival, Engine, Gap, Job, Kernels, Running, Step
from benchmarks.overhead import DIRECTIONS, OPTIONS, WITHOUT, Home
from benchmarks.results import (
    Ratio,
    Result,
    Table,
    benchmark_parser,
    interleave,
    machine,
    median_seconds,
    pooled,
    rounds,
)
from tests import models


@dataclass(frozen=True, slots=True)
class Shape:
    layers: int
    width: int
    mlp: int
    heads: int
    kv_heads: int

    def config(self) -> LlamaConfig:
        return LlamaConfig(
            architectures=["LlamaForCausalLM"],
            vocab_size=32000,
            hidden_size=self.width,
            intermediate_size=self.mlp,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            max_position_embeddings=4096,
            bos_token_id=1,
            eos_token_id=2,
            dtype="bfloat16",
        )

    @property
    def token_bytes(self) -> int:
        """Of the KV cache."""
        return 4 * self.layers * self.kv_heads * (self.width // self.heads)

    @property
    def weight_bytes(self) -> int:
        """That a decode step reads: all but the embedding, of which it looks rows up."""
        own = 2 * self.width * self.width * (1 + self.kv_heads / self.heads) + 3 * self.width * self.mlp
        return int(2 * (self.layers * own + 32000 * self.width))


SHAPES = {
    "0.5b": Shape(24, 896, 4864, 14, 2),
    "7b": Shape(32, 4096, 11008, 32, 32),
    "70b-slice": Shape(8, 8192, 28672, 64, 8),
    "tiny": Shape(3, 128, 96, 4, 2),  # for trying this script out
}
GPU = torch.cuda.is_available()
BATCHES = (1, 8, 64, 256)
#: Prompts, prompt tokens and answer tokens of what is no decode step; every second prompt of the mixed one is longer.
WHOLE = {"prefill": Job(8, 512, 1), "mixed": Job(32, 128, 16, mixed=True)}
#: A batch whose kernels are looked at, and into which others come.
LOOKED_AT = 8
ARRIVALS = 6
IN_SERVICE = "a new one into service: from its file to the first token of a prompt of 32"

Arms = dict[str, Callable[[], float]]
Kept = dict[str, Any]


class Trial:
    """One shape: its engines, and what they showed, in parts that are kept in `out`."""

    def __init__(self, name: str, out: Path, batches: Sequence[int], rounds: int) -> None:
        self.name, self.shape, self.out, self.batches, self.rounds = name, SHAPES[name], out, batches, rounds
        # room for the largest batch, and as much beside it for requests that come and go
        tokens = max(batches) * 160 + 8192
        memory = {"gpu_memory_utilization": 0.45, "kv_cache_memory_bytes": tokens * self.shape.token_bytes}
        self.options = OPTIONS | dict(load_format="dummy") | (memory if GPU else {})

    @contextmanager
    def home(self) -> Iterator[Home]:
        with tempfile.TemporaryDirectory() as folder:
            home = Home(Path(folder), self.options)
            config = self.shape.config()
            config.save_pretrained(home.model)
            with torch.device("meta"):
                model = LlamaForCausalLM(config)
            home.steer(model)
            for seed in range(2 * ARRIVALS):
                arriving = models.direction(model, seed=100 + seed)
                arriving.save(home.root / "arrivals" / f"{seed:02}.safetensors")
                self.adapter(home.root / f"adapter{seed:02}", seed)
            yield home

    def adapter(self, folder: Path, seed: int) -> None:
        """A LoRA adapter of rank 1 on what blocks write, as one that removes a direction would be; of random numbers,
        since a dummy model has no weights to project."""
        made, tensors = torch.Generator().manual_seed(seed), {}
        wide = {"self_attn.o_proj": self.shape.width, "mlp.down_proj": self.shape.mlp}
        for layer in range(self.shape.layers):
            for writer, width in wide.items():
                name = f"base_model.model.model.layers.{layer}.{writer}"
                tensors[f"{name}.lora_A.weight"] = torch.randn(1, width, generator=made).bfloat16()
                tensors[f"{name}.lora_B.weight"] = torch.randn(self.shape.width, 1, generator=made).bfloat16()
        folder.mkdir()
        save_file(tensors, folder / "adapter_model.safetensors")
        facts = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": [w.split(".")[1] for w in wide]}
        (folder / "adapter_config.json").write_text(json.dumps(facts))

    def part(self, label: str, measure: Callable[[], Kept]) -> Kept:
        """What `measure` finds, or found before by the same code's command on the same machine."""
        path = self.out / f"gpu-{self.name}.{label}.samples.json"
        asked = {"batches": list(self.batches), "rounds": self.rounds, "machine": machine()}
        if path.exists() and (kept := json.loads(path.read_text()))["asked"] == asked:
            return kept
        kept = {"asked": asked, **measure()}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(kept))
        return kept

    @contextmanager
    def pair(self, home: Home, other: dict[str, Any], environment: Mapping[str, str]) -> Iterator[tuple[Engine, ...]]:
        wanted = [Engine(home.model, home.options, WITHOUT), Engine(home.model, other, environment)]
        with ExitStack() as stack, ThreadPoolExecutor() as pool:
            # with a cache of a fixed size nothing is measured at the start, so that both may start at once
            if GPU:
                yield tuple(pool.map(stack.enter_context, wanted))
            else:
                yield tuple(map(stack.enter_context, wanted))

    def steering(self) -> Kept:
        with self.home() as home, self.pair(home, home.steering(), {}) as (stock, steer):
            own = [f"d0={0.5 + 0.001 * i:.3f}" for i in range(256)]
            many = tuple(f"d{i}" for i in range(DIRECTIONS))
            found = {}
            for batch in self.batches:
                asked: dict[str, tuple[str | None, ...]] = {"on, idle": (None,), "all steered": ("d0",)}
                if batch > 1:
                    asked["each its own strength"] = tuple(own[:batch])
                if batch >= DIRECTIONS:
                    asked[f"{DIRECTIONS} directions"] = many
                arms = {name: stock.arm(Step(batch)) for name in ("stock", "stock again")}
                arms |= {name: steer.arm(Step(batch, specs)) for name, specs in asked.items()}
                found[f"a decode step of {batch}"] = self.timed(arms, f"{self.name}: step of {batch}")
            for kind, job in WHOLE.items():
                arms = {name: stock.arm(job) for name in ("stock", "stock again")}
                for name, specs in {"on, idle": (None,), "all steered": ("d0",)}.items():
                    arms[name] = steer.arm(Job(job.batch, job.prompt, job.answer, specs, mixed=job.mixed))
                title = f"{kind}: {job.batch} prompts of {'128 and 512' if job.mixed else job.prompt} + {job.answer}"
                found[title] = self.timed(arms, f"{self.name}: {kind}")
            files = iter(home.arrivals)
            arms = {
                "a plain request comes in": steer.arm(Gap(LOOKED_AT, None)),
                "one with a new direction": lambda: steer.run(Gap(LOOKED_AT, next(files))),
            }
            title = f"the longest gap between two tokens of {LOOKED_AT} running requests"
            found[title] = self.timed(arms, f"{self.name}: gap", ARRIVALS - 1)
            arms = {
                "nothing new (stock)": stock.arm(Job(1, 32, 1)),
                "a direction": lambda: steer.run(Arrival(next(files), 32)),
            }
            found[f"{IN_SERVICE} (steering)"] = self.timed(arms, f"{self.name}: arrivals", ARRIVALS - 1)
            looks = {}
            if GPU:
                looks["stock"] = stock.kernels(Kernels(LOOKED_AT))
                looks["on, idle"] = steer.kernels(Kernels(LOOKED_AT))
                looks["all steered"] = steer.kernels(Kernels(LOOKED_AT, ("d0",)))
        return {"tables": found, "kernels": looks}

    def lora(self) -> Kept:
        adapted = dict(enable_lora=True, max_lora_rank=8, max_loras=1, max_cpu_loras=2)
        with self.home() as home, self.pair(home, home.options | adapted, WITHOUT) as (stock, lora):
            one, *others = home.adapters
            found = {}
            for batch in [b for b in self.batches if b in (8, 64)]:
                arms = {name: stock.arm(Step(batch)) for name in ("stock", "stock again")}
                arms |= {"LoRA, unused": lora.arm(Step(batch)), "LoRA of rank 1": lora.arm(Step(batch, adapter=one))}
                found[f"a decode step of {batch}, with LoRA"] = self.timed(arms, f"{self.name}: LoRA, step of {batch}")
            new = iter(others)
            arms = {
                "nothing new (stock)": stock.arm(Job(1, 32, 1)),
                "a LoRA adapter": lambda: lora.run(Arrival(next(new), 32)),
            }
            found[f"{IN_SERVICE} (LoRA)"] = self.timed(arms, f"{self.name}: arrivals", ARRIVALS - 1)
        return {"tables": found}

    def timed(self, arms: Arms, title: str, rounds: int | None = None) -> dict[str, Any]:
        return {name: asdict(ratio) for name, ratio in interleave(arms, rounds or self.rounds, title).items()}


def tables(parts: Sequence[Kept]) -> list[Table]:
    """Of what every order of starting found, pooled."""
    found: dict[str, list[Mapping[str, Ratio]]] = {}
    for part in parts:
        for title, arms in part["tables"].items():
            ratios = {
                name: Ratio(**kept | {"interval": tuple(kept["interval"]), "ratios": tuple(kept["ratios"])})
                for name, kept in arms.items()
            }
            found.setdefault(title, []).append(ratios)
    return [Table(title, {arm: pooled([one[arm] for one in runs]) for arm in runs[0]}) for title, runs in found.items()]


def of_norms(kernels: Mapping[str, Sequence[float]]) -> tuple[float, float]:
    """Launches and microseconds of the norms that add the stream up."""
    own = [each for name, each in kernels.items() if "rsqrt" in name]
    return sum(count for count, _ in own), sum(time for _, time in own)


def kernel_lines(shape: Shape, kernels: Mapping[str, Mapping[str, Sequence[float]]]) -> list[str]:
    """What the GPU runs in a step, beside stock's."""
    lines = [
        f"**Kernels of a decode step of {LOOKED_AT}**, by the profiler\n",
        "| arm | launches | added in a layer | all, µs | norms, µs | the norm behind a block, × stock's |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    before = sum(count for count, _ in kernels["stock"].values())
    # half of the norms are inside of blocks, and are as they were
    inside = of_norms(kernels["stock"])[1] / 2
    for arm, found in kernels.items():
        launches, time = (sum(each[i] for each in found.values()) for i in (0, 1))
        norms = of_norms(found)[1]
        behind = (norms - inside) / inside if inside else float("nan")
        lines.append(
            f"| {arm} | {launches:.0f} | {(launches - before) / shape.layers:+.2f} | {time:.0f} | {norms:.0f} | "
            f"{behind:.2f} |"
        )
    return [*lines, ""]


def bandwidth() -> float:
    """Bytes read and written a second, of a copy from the GPU's memory to itself."""
    x = torch.empty(2**32, dtype=torch.uint8, device="cuda")
    y = torch.empty_like(x)
    return 2 * x.numel() / median_seconds(lambda: y.copy_(x), 9)


def limit_lines(shape: Shape, found: Sequence[Table], batches: Sequence[int]) -> list[str]:
    """The fewest bytes that a decode step moves, over the bandwidth."""
    rate = in_child(bandwidth)
    lines = [
        f"**Beside the limit**: a copy in the GPU's memory moves {rate / 1e12:.2f} TB/s.\n",
        "| decode step of | weights and cache, GB | at that rate, ms | stock, ms |",
        "|---:|---:|---:|---:|",
    ]
    stock = {table.title: table.arms["stock"].seconds for table in found if "stock" in table.arms}
    for batch in batches:
        # the cache holds the prompt and, in the middle of what is timed, half of its answer
        moved = shape.weight_bytes + batch * shape.token_bytes * (32 + Running.WARM + Step(1).count // 2)
        lines.append(
            f"| {batch} | {moved / 1e9:.2f} | {1e3 * moved / rate:.3f} | "
            f"{1e3 * stock[f'a decode step of {batch}']:.3f} |"
        )
    return [*lines, ""]


def in_child(function: Callable[..., Any], *arguments: Any) -> Any:
    """What it returns in a process of its own, whose end gives all memory of the GPU back."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


if __name__ == "__main__":
    parser = benchmark_parser(__doc__)
    parser.add_argument("--shapes", nargs="+", default=["0.5b", "7b"], choices=SHAPES)
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES)
    parser.add_argument("--rounds", type=rounds, default=12, help="in each order of starting")
    parser.add_argument("--orders", type=int, default=2, help="how often the engines are started")
    parser.add_argument("--without-lora", action="store_true")
    given = parser.parse_args()
    import vllm

    for name in given.shapes:
        trial = Trial(name, given.out, given.batches, given.rounds)
        steering = [trial.part(f"{turn}", trial.steering) for turn in range(given.orders)]
        lora = [] if given.without_lora else [trial.part("lora", trial.lora)]
        found = tables([*steering, *lora])
        more = []
        if GPU:
            more = kernel_lines(trial.shape, steering[0]["kernels"]) + limit_lines(trial.shape, found, given.batches)
        title = f"On a GPU: a Llama of {trial.shape.layers} layers × {trial.shape.width}"
        Result(f"gpu-{name}", title, {"vLLM": vllm.__version__}, found, "\n".join(more)).publish(given.out)
