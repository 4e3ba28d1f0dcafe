"""What steering costs on vLLM, compiled: stock against an engine with the plugin, idle and with every request steered.

`python -m benchmarks.overhead --rounds 20`. Two stock engines take part: what the second one shows against the first is
what this machine can tell apart at all.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from datetime import date
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.engines import Engine, Job
from benchmarks.timing import HEADER, Ratio, interleave, machine
from tests import models

LAYERS, WIDTH, VOCABULARY = 24, 896, 32000
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
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=4864,
        num_hidden_layers=LAYERS,
        num_attention_heads=14,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    models.tokenizer().save_pretrained(folder)
    return model


@contextmanager
def engines(root: Path, rank: int = 1) -> Iterator[dict[str, Engine]]:
    """Two stock engines and one with steering, which has the directions d0 to d31."""
    model, directions = make(root / "model"), root / "directions"
    directions.mkdir()
    for seed in range(32):
        models.direction(model, seed=seed).save(directions / f"d{seed}.safetensors")
    steering = dict(
        worker_cls="steer.vllm.worker.Worker",
        additional_config={"steer": {"directions": str(directions), "rank": rank, "rows": 40}},
    )
    with ExitStack() as stack:
        started = {
            name: stack.enter_context(Engine(root / "model", OPTIONS | more))
            for name, more in (("stock", {}), ("stock again", {}), ("steer", steering))
        }
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


def measure(rounds: int, batches: tuple[int, ...], kinds: tuple[str, ...]) -> dict[str, dict[str, Ratio]]:
    out: dict[str, dict[str, Ratio]] = {}
    with tempfile.TemporaryDirectory() as folder, engines(Path(folder)) as started:
        for kind in kinds:
            tokens = DECODE if kind == "decode" else PREFILL
            for batch in batches:
                title = f"{kind}, batch {batch} ({tokens[0]} + {tokens[1]} tokens)"
                out[title] = interleave(arms(started, batch, tokens), rounds, title)
                print(table(title, out[title]), flush=True)
    return out


def table(title: str, ratios: Mapping[str, Ratio]) -> str:
    return "\n".join([f"**{title}**\n", HEADER, *(ratio.row(arm) for arm, ratio in ratios.items()), ""])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--kinds", nargs="+", default=["decode"], choices=["decode", "prefill"])
    given = parser.parse_args()
    import vllm

    print(
        f"{date.today()}, {machine()}, vLLM {vllm.__version__}: random bfloat16 Llama, {LAYERS} × {WIDTH}, compiled, "
    )
    print(f"{given.rounds} interleaved rounds\n")
    measure(given.rounds, tuple(given.batches), tuple(given.kinds))
