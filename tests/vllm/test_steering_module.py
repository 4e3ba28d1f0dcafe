"""A steering module in a traced graph: what is combined after tracing acts, and the cache of graphs knows all the
code."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import steer.runtime
from steer.names import MODES, Mode
from steer.runtime.bank import DirectionBank, HookPoint
from steer.runtime.token_index import RequestSteer, TokenIndex
from steer.spec import Condition, Entry, Spec
from steer.vllm import steering_module
from steer.vllm.steering_module import SteeringModule, attach_within
from tests import models

PLACE = HookPoint("resid_post", 0)
#: So wide that a row of the stream is more than one block of a kernel.
WIDTH = 4096


class Block(nn.Module):
    def forward(self, h: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        return h, r


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_what_is_combined_after_tracing_acts(rank: int) -> None:
    model = models.tiny("llama")
    first = models.direction(model, seed=1)
    second = models.leaning(models.direction(model, seed=2), first, 0.4)
    bank = DirectionBank([PLACE], rows=4, rank=rank, d_model=models.D_MODEL, requests=4)
    index, block = TokenIndex(rank, 16, "cpu"), Block()
    made = steering_module.SteeringModule(bank.slices[PLACE], index)
    assert "joint" in dict(made.named_buffers()) or rank == 1
    steering_module.attach_after(block, "sum", made, "resid_post")
    traced = torch.compile(lambda h, r: block(h, r), fullgraph=True, dynamic=True, backend="aot_eager")
    h, r = torch.randn(2, 5, models.D_MODEL, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(traced(h, r)[0], h)
        bank.load("first", first)
        bank.load("second", second)
        entries = Entry("first", "first", "ablate", 1.0), Entry("second", "second", "ablate", 0.5)
        index.fill_with([None, bank.steer(Spec(entries[:rank]))], [2, 3])
        new, rest = traced(h, r)
    assert torch.equal(new[:2], h[:2])
    stream, before = (new + rest)[2:], (h + r)[2:]
    assert float((stream @ first.directions[0, 0]).abs().max()) < 1e-5
    if rank > 1:
        v = second.directions[0, 0]
        torch.testing.assert_close(stream @ v, 0.5 * (before @ v), rtol=1e-4, atol=1e-5)


@pytest.fixture
def norms() -> Iterator[list[Any]]:
    """vLLM's own, as they are where its compiler looks into them."""
    pytest.importorskip("vllm")
    from vllm.config import CompilationConfig, VllmConfig, set_current_vllm_config
    from vllm.ir.op import enable_torch_wrap
    from vllm.model_executor.layers.layernorm import GemmaRMSNorm, RMSNorm

    config = VllmConfig(compilation_config=CompilationConfig(custom_ops=["none"]))
    with set_current_vllm_config(config), enable_torch_wrap(False), torch.no_grad():
        made = [RMSNorm(WIDTH, dtype=torch.bfloat16), GemmaRMSNorm(WIDTH)]
        for norm in made:
            norm.weight.copy_(torch.linspace(0.5, 1.5, WIDTH))
        yield made


def steered(rank: int) -> tuple[SteeringModule, TokenIndex, DirectionBank]:
    """With a unit row, and an axis where it has one, for every slot of rank `rank`."""
    bank, index = DirectionBank([PLACE], rows=4, rank=rank, d_model=WIDTH, requests=4), TokenIndex(rank, 16, "cpu")
    rows = torch.linalg.qr(torch.randn(WIDTH, 4, generator=torch.Generator().manual_seed(1)))[0].T
    values = torch.tensor([0.0, -torch.inf, 1.0, 0.0, -torch.inf, 0.0])
    for row, vector in enumerate(rows, 1):
        bank.slices[PLACE].write(row, vector, dict.fromkeys(MODES, values))
    return SteeringModule(bank.slices[PLACE], index), index, bank


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gemma", [False, True])
def test_a_norm_that_acts_itself_is_the_norm_behind_a_hook(
    norms: list[Any], gemma: bool, dtype: torch.dtype, rank: int
) -> None:
    """To the bit for plain tokens, and to rounding, of which it has less, for others."""
    norm, (module, index, _) = norms[gemma].to(dtype), steered(rank)
    h, r = torch.randn(2, 6, WIDTH, generator=torch.Generator().manual_seed(0)).to(dtype)
    stock = norm(h, r)
    attach_within(norm, module)
    mode: Mode = "rotate" if rank > 1 else "ablate"
    steer = RequestSteer(np.arange(1, rank + 1) * len(MODES) + MODES.index(mode), np.full(rank, 0.8, np.float32))
    index.fill_with([None, steer], [2, 4])
    normed, whole = norm(h, r)
    hooked_normed, hooked_whole = norm.forward_native(steering_module.hand_on(module, h, r), r)
    for own, plain, hooked in ((normed, stock[0], hooked_normed), (whole, stock[1], hooked_whole)):
        assert torch.equal(own[:2], plain[:2])
        assert not torch.equal(own[2:], plain[2:])
        torch.testing.assert_close(own, hooked, rtol=4 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)
    assert not index.lost.any()
    assert torch.equal(norm(h), norm.forward_native(h)), "without a residual it is the norm alone"


def test_what_a_norm_loses_is_told_and_gives_zeros(norms: list[Any]) -> None:
    norm, (module, index, _) = norms[0], steered(1)
    attach_within(norm, module)
    index.fill_with([None, RequestSteer(np.array([len(MODES)]), np.array([1e38], np.float32))], [1, 2])
    h, r = torch.randn(2, 3, WIDTH, generator=torch.Generator().manual_seed(0)).bfloat16()
    h[2, 0] = torch.nan
    normed, whole = norm(h, r)
    assert index.lost.tolist() == [False, True, True, *[False] * 13]
    assert torch.equal(whole[1], (h.float() + r.float()).bfloat16()[1])
    assert torch.isfinite(whole).all()
    assert torch.isfinite(normed).all()
    assert not normed[2].any()


@pytest.mark.skipif(find_spec("triton") is None, reason="Inductor writes Triton's code by triton")
@pytest.mark.parametrize(("rank", "own", "hook"), [(1, 2, 4), (2, 3, 4)])
def test_compiled_for_a_gpu_it_is_one_kernel_of_as_many_passes_as_stock(
    norms: list[Any], rank: int, own: int, hook: int
) -> None:
    """Passes over the stream: with rank 1 those of stock. A hook in front of the norm is compiled into its kernel as
    well, and makes twice as many."""
    norm, module = norms[0], steered(rank)[0]
    h, r = torch.zeros(2, 8, WIDTH, dtype=torch.bfloat16)

    def hooked(h: Tensor, r: Tensor) -> Any:
        return norm.forward_native(steering_module.hand_on(module, h, r), r)

    assert passes(norm.forward_native, h, r) == (1, 2)
    assert passes(hooked, h, r) == (1, hook)
    attach_within(norm, module)
    assert passes(lambda h, r: norm(h, r), h, r) == (1, own)


def passes(run: Callable[..., Any], *args: Tensor) -> tuple[int, int]:
    """How many kernels Inductor writes in Triton for `run`, and how many loops over the stream are in them. Nothing of
    it is compiled or run, so no GPU is needed."""
    from torch._inductor import config
    from torch._inductor.graph import GraphLowering

    written: list[str] = []

    class Written(Exception):
        pass

    def write(graph: GraphLowering) -> None:
        written.append(graph.codegen()[0].value)
        raise Written

    torch._dynamo.reset()
    with (
        patch.object(GraphLowering, "compile_to_module", write),
        patch("torch.utils._triton.triton_hash_with_backend", lambda: ""),
        config.patch(cpu_backend="triton", fx_graph_cache=False),
        pytest.raises(Exception, match="Written"),
    ):
        torch.compile(run, dynamic=True, fullgraph=True)(*args)
    return written[0].count("@triton_heuristics"), written[0].count("for r0_offset in")


@pytest.mark.parametrize("side", ["above", "below"])
@pytest.mark.parametrize("holds", [True, False])
def test_a_condition_is_decided_inside_of_a_traced_graph_and_kept(side: str, holds: bool) -> None:
    """By the prompt's last token, which is the third chunk's, for it and all behind it; the neighbour and all before it
    keep their bits. Computed again, all of that comes in one step and nothing is decided again."""
    model = models.tiny("llama")
    points = [HookPoint("resid_post", layer) for layer in range(2)]
    bank = DirectionBank(points, rows=4, rank=2, d_model=models.D_MODEL, requests=4)
    index, blocks = TokenIndex(2, 16, "cpu"), nn.Sequential()
    for seed, name in enumerate("ap", 1):
        bank.load(name, models.direction(model, seed=seed))
    for point in points:
        blocks.append(block := Block())
        made = steering_module.SteeringModule(bank.slices[point], index, decides=True)
        steering_module.attach_after(block, "sum", made, "resid_post")

    def forward(h: Tensor, r: Tensor) -> Tensor:
        for block in blocks:
            h, r = block(h, r)
        return h

    traced = torch.compile(forward, fullgraph=True, dynamic=True, backend="aot_eager")
    prompt = 6
    h, r = torch.randn(2, prompt + 3, models.D_MODEL, generator=torch.Generator().manual_seed(0))
    v, probe = (bank.slices[points[n]].vectors[bank.rows_of([name])[0]] for n, name in ((1, "a"), (0, "p")))
    c = float((h + r)[prompt - 1] @ probe)
    number = c - 0.1 if (side == "above") == holds else c + 0.1
    above, below = (number, None) if side == "above" else (None, number)
    condition = Condition("p", 0, above, below, digest="p")
    steer = bank.steer(Spec((Entry("a", "a", "ablate", 1.0, "1", "answer", condition),)), prompt)
    beside = bank.steer(Spec((Entry("a", "a", "ablate", 1.0, "0"),)))
    assert steer is not None
    assert beside is not None
    steer = index.decisions.take(steer)
    request, neighbour = index.enter(steer), index.enter(beside)

    def step(start: int, stop: int) -> Tensor:
        """What is behind the blocks of the request's tokens; one of a neighbour stands in front."""
        index.fill(np.array([neighbour, request]), np.array([1, stop - start]), np.array([0, start]))
        with torch.no_grad():
            new = traced(torch.cat([h[:1], h[start:stop]]), torch.cat([r[:1], r[start:stop]]))
        losses = index.losses()
        assert losses is not None
        assert losses.first([1, stop - start]) == {}
        return torch.as_tensor(new[1:])

    def right(start: int, stop: int, new: Tensor) -> None:
        for position, token in zip(range(start, stop), new, strict=True):
            if position < prompt - 1 or not holds:
                assert torch.equal(token, h[position])
            else:
                assert abs(float((token + r[position]) @ v)) < 1e-5

    for start, stop in ((0, 2), (2, 5), (5, 6), (6, 7), (7, 9)):
        right(start, stop, step(start, stop))
        assert steer.decision is not None
        assert steer.decision.holds == (None if stop < prompt else holds)
    bank.slices[points[0]].vectors[bank.rows_of(["p"])] *= -1  # whoever decided again would decide otherwise
    right(0, 9, step(0, 9))


@pytest.mark.parametrize("name", sorted(file.name for file in Path(steer.runtime.__path__[0]).glob("*.py")))
def test_the_key_of_the_compile_cache_knows_every_file_of_the_runtime(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dtypes and layouts are in a compiled graph, whichever file decides them."""
    seen: list[bytes] = []
    real = hashlib.sha256

    class Recorder:
        def update(self, data: bytes) -> None:
            seen.append(data)

        def hexdigest(self) -> str:
            return real(b"".join(seen)).hexdigest()

    monkeypatch.setattr(hashlib, "sha256", Recorder)
    assert steering_module.code_digest.__wrapped__() == real(b"".join(seen)).hexdigest()[:16]
    here = Path(steer.runtime.__path__[0])
    vllm = Path(steering_module.__file__).parent
    for file in (here / name, vllm / "steering_module.py", vllm / "install.py"):
        assert any(file.read_bytes() in data for data in seen), file.name
