"""A steering module in a traced graph: what is combined after tracing acts, and the cache of graphs knows all the
code."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import steer.runtime
from steer.runtime.bank import DirectionBank, HookPoint
from steer.runtime.token_index import TokenIndex
from steer.spec import Entry, Spec
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
