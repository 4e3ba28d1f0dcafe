"""What steering costs on transformers, prefill and decode.

`python -m benchmarks.overhead_hf` compares hooks with the plain model: idle, half and all of the rows steered. `--suite
modes` compares requests to the engine of a server that are all steered, in each mode, at some tokens and under a
condition, with plain requests to it.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from transformers import DynamicCache

import steer
from benchmarks.results import BUSY, BUSY_HELP, COUNTED, Ratio, Result, Table, benchmark_parser, interleave, rounds
from benchmarks.shapes import SMALL_LAYERS, SMALL_WIDTH, small
from steer.hf.batching import start_engine
from steer.hf.engine import Engine
from steer.hf.sampling import Sampling
from steer.hf.steering import Steering
from steer.names import MODES
from steer.registry import Registry
from steer.spec import parse
from tests.models import direction

VOCABULARY = 2048
#: Requests, prompt and answer tokens.
REQUESTS = {"decode, batch 8 (16 + 12 tokens)": (8, 16, 12), "prefill, batch 4 (128 + 1 tokens)": (4, 128, 1)}


def ways(name: str) -> dict[str, str]:
    """How a direction with a plane can act: specs by what a table calls them. A condition is one that every stream of
    a random model meets, or none does."""
    return {mode: f"{name}:{mode}" for mode in MODES} | {
        "ablate@answer": f"{name}:ablate@answer",
        "ablate@not-first": f"{name}:ablate@not-first",
        "ablate, condition met": f"{name}:ablate?{name}@2>-1000000",
        "ablate, condition not met": f"{name}:ablate?{name}@2>1000000",
    }


def prefill(net: Any, ids: torch.Tensor) -> Callable[[], None]:
    return torch.inference_mode()(lambda: net(input_ids=ids, use_cache=False) and None)


def decode(net: Any, ids: torch.Tensor, steps: int = 16) -> Callable[[], None]:
    """`steps` single-token passes after a prompt."""

    @torch.inference_mode()
    def run() -> None:
        cache = DynamicCache(config=net.config)
        net(input_ids=ids, past_key_values=cache)
        for _ in range(steps):
            net(input_ids=ids[:, :1], past_key_values=cache)

    return run


@contextmanager
def engine(tokens: int) -> Iterator[tuple[Engine, Registry]]:
    """Of a server for requests of at most `tokens` tokens together, with the direction `d`."""
    net = small(VOCABULARY)
    steering = Steering(net)
    registry = Registry(steering.placement())
    registry.put("d", direction(net, plane=True).to_bytes())
    started = start_engine(steering, [], context=tokens, capacity=8)
    try:
        yield started, registry
    finally:
        started.stop()


def measure_modes(rounds: int) -> dict[str, dict[str, Ratio]]:
    out = {}
    with engine(max(batch * (prompt + answer) for batch, prompt, answer in REQUESTS.values())) as (started, registry):
        bank = started.steering.bank
        for name, (batch, prompt, answer) in REQUESTS.items():
            generator = torch.Generator().manual_seed(1)
            prompts = torch.randint(3, VOCABULARY, (batch, prompt), generator=generator).tolist()
            sampling = Sampling(max_tokens=answer, temperature=0.0, ignore_eos=True)

            def arm(text: str, prompts: list[list[int]] = prompts, sampling: Sampling = sampling) -> Callable[[], None]:
                spec = registry.resolve(parse(text))

                async def one(ids: list[int]) -> int:
                    return len([1 async for _ in started.generate(ids, sampling, bank.steer(spec, len(ids)))])

                async def every() -> None:
                    made = await asyncio.gather(*map(one, prompts))
                    assert made == [sampling.max_tokens] * len(prompts), made

                return lambda: asyncio.run(every())

            specs = {"plain": "off", "plain again": "off"} | ways("d")
            out[name] = interleave({name: arm(spec) for name, spec in specs.items()}, rounds, name)
    return out


def measure(rounds: int = 40) -> dict[str, dict[str, Ratio]]:
    """Four arms on one model: hooks are put on and taken off around each timed run, outside of other arms' time."""
    net = small(VOCABULARY)
    attached = steer.attach(net, {"d": direction(net)})
    attached.detach()
    out = {}
    for name, work, batch, tokens in (
        ("prefill, 8 × 128 tokens", prefill, 8, 128),
        ("decode, batch 1", decode, 1, 8),
        ("decode, batch 8", decode, 8, 8),
    ):
        ids = torch.randint(0, VOCABULARY, (batch, tokens), generator=torch.Generator().manual_seed(1))
        run = work(net, ids)

        def arm(run: Callable[[], None], *specs: str) -> Callable[[], None]:
            def timed() -> None:
                with attached, attached(*specs) if specs else nullcontext():
                    run()

            return timed

        half = ["d" if i % 2 else "off" for i in range(batch)] if batch > 1 else ["d"]
        arms = {"plain": run, "attached, idle": arm(run), "half of the rows": arm(run, *half), "all": arm(run, "d")}
        out[name] = interleave(arms, rounds, name)
    return out


if __name__ == "__main__":
    parser = benchmark_parser(__doc__)
    parser.add_argument("--rounds", type=rounds, default=40)
    parser.add_argument("--suite", choices=["hooks", "modes"], default="hooks")
    parser.add_argument("--busy", action="store_true", help=BUSY_HELP)
    given = parser.parse_args()
    if given.busy:
        os.environ[BUSY] = "1"
    modes = given.suite == "modes"
    result = Result(
        given.suite,
        "What modes, tokens and conditions cost on transformers" if modes else "What hooks cost on transformers",
        {},
        [Table(name, arms) for name, arms in (measure_modes if modes else measure)(given.rounds).items()],
        f"Random float32 Llama, {SMALL_LAYERS} layers × {SMALL_WIDTH}; {given.rounds} interleaved rounds. "
        f"{COUNTED * given.busy}\n",
    )
    result.publish(given.out)
