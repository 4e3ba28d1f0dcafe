"""What measuring costs beside the usual way (`generate` with all hidden states), and deriving beside nothing.

Both arms of the first part see the same prompts, do the same arithmetic in the blocks, and end with the same class
means. The baseline runs `generate(max_new_tokens=1, output_hidden_states=True)` on left-padded batches of 32 in the
given order; the other makes its own batches of at most 32, as `steer measure` does.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import GenerationConfig

from benchmarks.results import Ratio, Result, Table, benchmark_parser, interleave, median_seconds, rounds
from benchmarks.shapes import WIDTH, llama
from steer.direction import Dataset
from steer.hf.load import Loaded
from steer.lab.derive import Recipe, derive
from steer.lab.measure import ClassSums, MeasurementOptions
from steer.lab.measurement import Measurement, MeasurementMeta, ModelFacts, Statistics
from steer.lab.methods import METHODS, make_method
from steer.lab.prompts import Encoded
from steer.lab.source import CapturePlan, TransformersSource, each_batch, left_padded

LAYERS, VOCABULARY = 24, 32000
PROMPTS, BATCH = 64, 32
#: Where source layers lie: at two thirds of the depth.
LAST_WANTED = 2 * LAYERS // 3 - 1
DERIVE_LAYERS, DERIVE_WIDTH, DERIVE_PROMPTS = 80, 8192, 64


def model() -> Any:
    return llama(LAYERS, VOCABULARY).to("cuda" if torch.cuda.is_available() else "cpu").eval()


def prompts(spread: float) -> list[list[int]]:
    """Random ids; lengths are log-normal around 40 tokens, as those of instructions, or all 40 for a spread of 0."""
    rng = random.Random(0)
    lengths = [min(512, max(8, round(40 * rng.lognormvariate(0, spread)))) for _ in range(PROMPTS)]
    return [[rng.randrange(VOCABULARY) for _ in range(length)] for length in lengths]


def with_generate(net: Any, sequences: list[list[int]]) -> Callable[[], torch.Tensor]:
    """Means `[layers, d_model]` as the usual tools take them."""
    config = GenerationConfig(
        max_new_tokens=1,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
        output_hidden_states=True,
        return_dict_in_generate=True,
    )

    @torch.inference_mode()
    def run() -> torch.Tensor:
        rows = []
        for at in range(0, len(sequences), BATCH):
            ids, mask = left_padded(sequences[at : at + BATCH], 0, net.device)
            out = net.generate(
                ids,
                attention_mask=mask,
                generation_config=config,
            )
            rows.append(torch.stack([h[:, -1] for h in out.hidden_states[0][1:]]).cpu())
        return torch.cat(rows, dim=1).double().mean(1)

    return run


def with_steer(
    net: Any, sequences: list[list[int]], last_layer: int, vectors: bool = False
) -> Callable[[], torch.Tensor]:
    tokenizer = type("NoPad", (), {"pad_token_id": 0})()
    source = TransformersSource(Loaded("random", None, net, tokenizer))
    encoded = [Encoded(ids, slice(4, len(ids) - 4)) for ids in sequences]
    plan = CapturePlan((-1,), last_layer)

    def run() -> torch.Tensor:
        own = sum(e.own.stop - e.own.start for e in encoded)
        sums = ClassSums("random", plan, WIDTH, len(encoded), own, MeasurementOptions(vectors=vectors))
        each_batch(
            [len(ids) for ids in sequences],
            lambda indices: sums.add(indices, source.run([encoded[i] for i in indices], plan)),
            batch_size=BATCH,
            tokens=source.pass_tokens,
        )
        return sums.statistics().mean[0]

    return run


def peak(run: Callable[[], torch.Tensor]) -> tuple[int, torch.Tensor]:
    """The most bytes of tensors that were alive at once during `run`, beyond those before it, and its result."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = run()
        return torch.cuda.max_memory_allocated() - before, result
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        result = run()
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    alive = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        alive += event.nbytes()
        most = max(most, alive)
    return most, result


def quietly(run: Callable[[], object]) -> Callable[[], None]:
    """What an arm returns would be taken for its own time."""

    def timed() -> None:
        run()

    return timed


SPREADS = {"uneven": 0.5, "equal": 0.0}


def measure(rounds: int, lengths: Sequence[str]) -> dict[str, tuple[dict[str, Ratio], dict[str, int]]]:
    net, out = model(), {}
    for title, spread in ((f"{name} lengths (spread {SPREADS[name]})", SPREADS[name]) for name in lengths):
        sequences = prompts(spread)
        arms = {
            "generate, all hidden states": with_generate(net, sequences),
            "measure, every layer": with_steer(net, sequences, LAYERS - 1),
            "measure, every layer and vectors": with_steer(net, sequences, LAYERS - 1, vectors=True),
            f"measure, layers 0 to {LAST_WANTED}": with_steer(net, sequences, LAST_WANTED),
        }
        peaks = {name: peak(run) for name, run in arms.items()}
        (_, expected), (_, got), *_ = peaks.values()
        # the usual way has the final norm in its last entry, so that layer is another thing
        torch.testing.assert_close(got[:-1], expected[:-1], rtol=1e-3, atol=1e-4)
        memory = {name: most for name, (most, _) in peaks.items()}
        out[title] = interleave({name: quietly(run) for name, run in arms.items()}, rounds, title), memory
    return out


def measurement() -> Measurement:
    """Random means and vectors of a model of 80 × 8192."""
    generator = torch.Generator().manual_seed(0)
    facts = ModelFacts(name="random", architecture="Random", d_model=DERIVE_WIDTH, layers=DERIVE_LAYERS)
    sets = [Dataset(name=name, sha256="0" * 64, count=DERIVE_PROMPTS) for name in ("harmful", "harmless")]
    meta = MeasurementMeta(model=facts, measured=DERIVE_LAYERS, positions=(-1,), harmful=sets[0], harmless=sets[1])

    def one() -> Statistics:
        shape = (1, DERIVE_LAYERS, DERIVE_PROMPTS, DERIVE_WIDTH)
        vectors = torch.randn(shape, generator=generator).bfloat16() + torch.randn(DERIVE_WIDTH, generator=generator)
        return Statistics(vectors.double().mean(2), vectors[0].double().mean(1), None, vectors.bfloat16())

    return Measurement(meta, one(), one())


def deriving(rounds: int) -> dict[str, tuple[float, float]]:
    """Median milliseconds of each method with one source layer, and with each layer's own; on one thread, since the
    vectors are short, and threads that wait for each other cost more than they win."""
    measured, out, threads = measurement(), {}, torch.get_num_threads()
    torch.set_num_threads(1)
    for name in METHODS:
        method = make_method(name)
        each = rounds if method.needs == "means" else 1
        out[name] = (
            _milliseconds(partial(derive, measured, Recipe(method, DERIVE_LAYERS // 2)), rounds),
            _milliseconds(partial(derive, measured, Recipe(method, "all")), each),
        )
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "m.safetensors", Path(folder) / "d.safetensors"
        Measurement(measured.meta, *(replace(s, vectors=None) for s in (measured.harmful, measured.harmless))).save(
            source
        )
        out["slerp, from file to file"] = (
            _milliseconds(lambda: derive(Measurement.load(source), Recipe(layer=40)).save(target), rounds),
            _milliseconds(lambda: derive(Measurement.load(source), Recipe(layer="all")).save(target), rounds),
        )
    torch.set_num_threads(threads)
    return out


def _milliseconds(run: Callable[[], object], rounds: int) -> float:
    return 1000 * median_seconds(run, rounds)


def tables(rounds: int, lengths: Sequence[str]) -> list[Table]:
    found = []
    for title, (arms, memory) in measure(rounds, lengths).items():
        base = next(iter(memory.values()))
        shares = "; ".join(f"{name} {most / 2**20:.1f} ({most / base:.3f})" for name, most in memory.items())
        found.append(Table(title, arms, [f"Peak MiB of tensors, and as a share of the first: {shares}."]))
    return found


def deriving_table(rounds: int) -> str:
    rows = "".join(f"| {name} | {one:.1f} | {each:.1f} |\n" for name, (one, each) in deriving(rounds).items())
    return (
        f"Deriving, {DERIVE_LAYERS} layers × {DERIVE_WIDTH}, {DERIVE_PROMPTS} prompts a class, one thread:\n\n"
        f"| method | one source layer, median ms | each layer's own, median ms |\n|---|---:|---:|\n{rows}"
    )


if __name__ == "__main__":
    parser = benchmark_parser(__doc__)
    parser.add_argument("--rounds", type=rounds, default=10)
    parser.add_argument("--lengths", nargs="+", default=list(SPREADS), choices=SPREADS)
    given = parser.parse_args()
    result = Result(
        "measure",
        "What measuring and deriving cost",
        {},
        tables(given.rounds, given.lengths),
        f"Random float32 Llama, {LAYERS} layers × {WIDTH}, {PROMPTS} prompts in batches of {BATCH}.\n\n"
        + deriving_table(given.rounds),
    )
    result.publish(given.out)
