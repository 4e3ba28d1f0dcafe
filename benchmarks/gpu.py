"""On a GPU: what steering costs there, in one command.

`python -m benchmarks.gpu`. Two parts: the operation in the hooks of a transformers model, under `torch.compile` and
CUDA graphs; and, where vLLM is installed, stock vLLM against an engine with steering (`benchmarks.overhead`), dummy
weights at the shapes of a 0.5 B model, a 7 B model, and eight layers of a 70 B model. The two engines share the GPU,
so that both leave a 7 B model room for 256 requests on 80 GB.
"""

from __future__ import annotations

import copy
import multiprocessing
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import results
from benchmarks.results import Result, benchmark_parser, interleave, rounds
from steer.runtime import hook_points
from steer.runtime.bank import BankSlice, DirectionBank, HookPoint, gather, operate
from steer.runtime.token_index import TokenIndex
from steer.spec import Entry, Spec
from tests import models


@dataclass(frozen=True, slots=True)
class Shape:
    layers: int
    width: int
    mlp: int
    heads: int
    kv_heads: int

    def config(self, **more: Any) -> LlamaConfig:
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
            **more,
        )


SHAPES = {
    "0.5b": Shape(24, 896, 4864, 14, 2),
    "7b": Shape(32, 4096, 11008, 32, 32),
    "70b-slice": Shape(8, 8192, 28672, 64, 8),
    "tiny": Shape(3, 128, 96, 4, 2),  # for trying this script out
}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PARTS = ["hooks", "vllm"]
WORKLOADS = [
    ("decode", 1),
    ("decode", 8),
    ("decode", 32),
    ("decode", 128),
    ("decode", 256),
    ("prefill", 8),
    ("mixed", 32),
]


# a model with hooks must never be run by a graph of the one without
torch._dynamo.config.skip_nnmodule_hook_guards = False


def hooks(shape: Shape, batches: list[int], rounds: int) -> list[results.Table]:
    """One decode step of a batch, as vLLM runs it: compiled, and replayed as a CUDA graph where there is one."""
    torch.manual_seed(0)
    with torch.device(DEVICE):
        net = LlamaForCausalLM(shape.config()).to(torch.bfloat16).eval()
    hooked, blocks = copy.deepcopy(net), net.model.layers
    bank = DirectionBank(
        [HookPoint("resid_post", i) for i in range(len(blocks))], rows=8, rank=1, d_model=shape.width, device=DEVICE
    )
    bank.load("d", models.direction(net))
    for bank_slice in bank.slices.values():
        static(bank_slice.vectors, bank_slice.coefficients)
    steer = bank.steer(Spec((Entry("d", "d", "ablate", 1.0),)))
    tables = []
    for batch in batches:
        ids = torch.ones(batch, 1, dtype=torch.int64, device=DEVICE)
        index = TokenIndex(1, batch, DEVICE)
        static(index.packed)
        plain, steered = recorded(net, ids), recorded(hooked, ids, [acting(p, index) for p in bank.slices.values()])
        check(plain, steered, index, steer)

        def filled(run: Callable[[], object], row: Any, index: TokenIndex = index) -> Callable[[], None]:
            def timed() -> None:
                index.fill_with([row] * index.max_tokens, [1] * index.max_tokens)
                run()
                if DEVICE == "cuda":
                    torch.cuda.synchronize()

            return timed

        arms = {"plain": filled(plain, None), "plain again": filled(plain, None)}
        arms |= {"on, idle": filled(steered, None), "all steered": filled(steered, steer)}
        tables.append(
            results.Table(f"transformers, one step of {batch} tokens", interleave(arms, rounds, f"step of {batch}"))
        )
    return tables


def static(*tensors: torch.Tensor) -> None:
    """Their addresses never change: a CUDA graph reads them where they are, as vLLM's does, with no copy of it."""
    for tensor in tensors:
        torch._dynamo.mark_static_address(tensor)


def acting(bank_slice: BankSlice, index: TokenIndex) -> hook_points.Transform:
    """The operation at one hook point, always: in a compiled graph there is no asking whether any token is steered."""
    return lambda x: operate(x.flatten(0, -2), gather(bank_slice, *index.first(index.max_tokens)))[0].view_as(x)


def recorded(
    net: Any, ids: torch.Tensor, transforms: Sequence[hook_points.Transform] = ()
) -> Callable[[], torch.Tensor]:
    """Logits of a forward pass, compiled with `transforms` on the blocks' outputs; a CUDA graph of it on a GPU. What it
    reads of the index are the same buffers always."""
    for block, transform in zip(net.model.layers, transforms, strict=False):
        block._forward_hooks.clear()
        hook_points.on_output(block, transform)
    compiled = torch.compile(net.forward, dynamic=False, mode="reduce-overhead" if DEVICE == "cuda" else "default")

    @torch.inference_mode()
    def run() -> torch.Tensor:
        return compiled(input_ids=ids, use_cache=False).logits

    for _ in range(3):  # compile, warm up, record
        run()
    return run


def check(
    plain: Callable[[], torch.Tensor], steered: Callable[[], torch.Tensor], index: TokenIndex, steer: Any
) -> None:
    """What is timed is what it says: idle gives the plain logits, and steering gives others."""
    index.fill_with([], [])
    torch.testing.assert_close(steered().clone(), plain().clone(), rtol=2e-2, atol=2e-2)
    index.fill_with([steer] * index.max_tokens, [1] * index.max_tokens)
    assert not torch.allclose(steered().clone(), plain().clone(), rtol=2e-2, atol=2e-2), "nothing is steered"


def in_vllm(name: str, shape: Shape, rounds: int, orders: int, workloads: list[tuple[str, int]]) -> list[results.Table]:
    from benchmarks.overhead import OPTIONS, Home, measure

    options = OPTIONS | dict(load_format="dummy") | (dict(gpu_memory_utilization=0.45) if DEVICE == "cuda" else {})
    with tempfile.TemporaryDirectory() as folder:
        home = Home(Path(folder), options)
        config = shape.config()
        config.save_pretrained(home.model)
        with torch.device("meta"):
            model = LlamaForCausalLM(config)
        home.steer(model)
        return measure(home, "pair", rounds, orders, workloads)


def in_child(function: Callable[..., Any], *arguments: Any) -> Any:
    """What it returns in a process of its own, whose end gives all memory of the GPU back."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


if __name__ == "__main__":
    parser = benchmark_parser(__doc__)
    parser.add_argument("--shapes", nargs="+", default=["0.5b", "7b", "70b-slice"], choices=SHAPES)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32, 128, 256])
    parser.add_argument("--rounds", type=rounds, default=15)
    parser.add_argument("--orders", type=int, default=2)
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    given = parser.parse_args()
    workloads = [(kind, batch) for kind, batch in WORKLOADS if batch in given.batches]
    for name in given.shapes:
        tables = in_child(hooks, SHAPES[name], given.batches, given.rounds) if "hooks" in given.parts else []
        versions = {}
        if "vllm" in given.parts and find_spec("vllm"):
            import vllm

            versions = {"vLLM": vllm.__version__}
            tables += in_vllm(name, SHAPES[name], given.rounds, given.orders, workloads)
        result = Result(f"gpu-{name}", f"On {DEVICE}: a Llama of the shape {name}", versions, tables)
        result.publish(given.out)
