"""What hooks cost on transformers: plain, attached and idle, half and all rows steered; prefill and decode."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from transformers import DynamicCache

import steer
from benchmarks.results import Ratio, Result, Table, benchmark_parser, interleave, rounds
from benchmarks.shapes import SMALL_LAYERS, SMALL_WIDTH, small
from tests.models import direction

VOCABULARY = 2048


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
    given = parser.parse_args()
    result = Result(
        "hooks",
        "What hooks cost on transformers",
        {},
        [Table(name, arms) for name, arms in measure(given.rounds).items()],
        f"Random float32 Llama, {SMALL_LAYERS} layers × {SMALL_WIDTH}; {given.rounds} interleaved rounds.\n",
    )
    result.publish(given.out)
