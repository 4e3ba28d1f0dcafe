"""A steering module in a traced graph: what is combined after tracing acts, and the cache of graphs knows all the
code."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import steer.runtime
from steer.runtime.bank import DirectionBank, HookPoint
from steer.runtime.token_index import TokenIndex
from steer.spec import Condition, Entry, Spec
from steer.vllm import steering_module
from tests import models

PLACE = HookPoint("resid_post", 0)


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
    assert {"joint", "combinations"} <= dict(made.named_buffers()).keys() or rank == 1
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
    condition = Condition("p", 0, **{side: number}, digest="p")
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
