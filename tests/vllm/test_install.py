"""Attaching to small models of every structure that blocks hand a stream on in, and on those that it must refuse. No
engine: only the pass over the model's own Python is made here in vLLM's place."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from steer.errors import UnsupportedModel
from steer.runtime.token_index import TokenIndex
from steer.vllm import install, internals, steering_module
from steer.vllm.settings import EngineSettings
from tests import bad

D_MODEL, LAYERS = 64, 3


class Norm(nn.Module):
    """A norm that adds the residual to what it is given, as vLLM's do."""

    pass_weight_add, variance_epsilon = True, 1e-6

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, D_MODEL))

    def forward_native(self, x: Tensor, r: Tensor | None = None) -> Any:
        whole = x.float() if r is None else x.float() + r.float()
        normed = whole * torch.rsqrt(whole.square().mean(-1, keepdim=True) + self.variance_epsilon)
        normed = (normed.to(self.weight.dtype) * self.weight).to(x.dtype)
        return normed if r is None else (normed, whole.to(x.dtype))

    forward = forward_native


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mlp = Norm(), nn.Linear(D_MODEL, D_MODEL)

    def forward(self, x: Tensor) -> Any:
        return x + self.mlp(self.norm(x))


class Pair(Block):
    """Hands on (h, r)."""

    def forward(self, x: Tensor, r: Tensor | None = None) -> Any:
        normed, whole = (self.norm(x), x) if r is None else self.norm(x, r)
        return self.mlp(normed), whole


class Read(Pair):
    """Whose stream is read by something else than the next norm too, though that makes no difference."""

    def forward(self, x: Tensor, r: Tensor | None = None) -> Any:
        normed, whole = super().forward(x, r)
        return normed + (0 if r is None else 0 * (x + r)), whole


class Stale(Block):
    """Hands on the stream, and beside it what nothing reads."""

    def forward(self, x: Tensor, r: Tensor | None = None) -> Any:
        return super().forward(x), x


class Needed(Block):
    """Hands on a stream, and beside it a second one of the same shape, that the next block adds to its own term."""

    def forward(self, x: Tensor, r: Tensor | None = None) -> Any:
        more = 0 if r is None else 2 * r
        return x + self.mlp(self.norm(x + more)), self.mlp(x)


class Connected(Block):
    """Hyper-connections: (last branch, four streams a token, how both mix)."""

    def forward(self, x: Tensor, r: Tensor | None = None, post: Any = None, res: Any = None) -> Any:
        wide = x.unsqueeze(1).repeat(1, 4, 1) if r is None else res @ r + post * x.unsqueeze(1)
        mix = torch.softmax(wide @ wide.transpose(1, 2), -1)
        return self.mlp(self.norm(wide.mean(1))), wide, torch.full((1, 4, 1), 0.5), mix


class Wide(Block):
    """AltUp: four streams, one behind the other."""

    def forward(self, x: Tensor) -> Any:
        x = x.expand(4, *x.shape).clone() if x.dim() == 2 else x
        return x + self.mlp(self.norm(x))


class Decoder(nn.Module):
    def __init__(self, kind: type[Block], layers: int = LAYERS) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(32, D_MODEL)
        self.layers = nn.ModuleList([kind() for _ in range(layers)])
        self.norm = Norm()

    def forward(self, ids: Tensor) -> Any:
        out: Any = self.embed(ids)
        for layer in self.layers:
            out = layer(*out) if isinstance(out, tuple) else layer(out)
        if not isinstance(out, tuple):
            return self.norm(out.mean(0) if out.dim() == 3 else out)
        if isinstance(self.layers[0], Connected):
            h, wide, post, res = out
            return self.norm((res @ wide + post * h.unsqueeze(1)).mean(1))
        return self.norm(*out)[0] if isinstance(self.layers[0], Pair) else self.norm(out[0])


@pytest.fixture(autouse=True)
def _without_an_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    def probe(worker: Any) -> Any:
        with torch.inference_mode():
            return worker.model(torch.arange(internals.base.PROBE_TOKENS)).float()

    monkeypatch.setattr(internals.worker, "probe", probe)
    monkeypatch.setattr(internals.config, "dimensions_of", lambda _config: ("Toy", LAYERS, D_MODEL))
    monkeypatch.setattr(internals.worker, "decoder_of", lambda worker: worker.model)
    monkeypatch.setattr(internals.worker, "is_elsewhere", lambda _block: False)
    monkeypatch.setattr(internals.worker, "replicated", lambda _stream: True)
    monkeypatch.setattr(internals.worker, "open_norms", lambda _worker: [])
    monkeypatch.setattr(internals.config, "max_requests", lambda _config: 4)


def worker(model: nn.Module, dtype: torch.dtype = torch.float32) -> Any:
    config = SimpleNamespace(dtype=dtype, get_hidden_size=lambda: D_MODEL)
    whole = SimpleNamespace(scheduler_config=SimpleNamespace(max_num_seqs=4))
    device = torch.device("cpu")
    return SimpleNamespace(
        model=model.to(dtype), get_model=lambda: model, vllm_config=whole, model_config=config, device=device
    )


def attached(model: nn.Module, dtype: torch.dtype = torch.float32) -> install.Installation:
    return install.attach(worker(model, dtype), EngineSettings.model_validate({"rows": 2}), TokenIndex(1, 64, "cpu"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("kind", "form"), [(Block, "tensor"), (Pair, "sum"), (Stale, "first")])
def test_each_form_is_found(kind: type[Block], form: str, dtype: torch.dtype) -> None:
    found = attached(Decoder(kind), dtype)
    assert found.form == form
    assert len(found.steering_modules) == LAYERS + 1


@pytest.fixture
def open_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    """All norms can be acted in."""
    found = lambda worker: [module for module in worker.model.modules() if isinstance(module, Norm)]  # noqa: E731
    monkeypatch.setattr(internals.worker, "open_norms", found)


@pytest.mark.usefixtures("open_norms")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("kind", "folded"), [(Block, ()), (Pair, (0, 1, 2)), (Read, ()), (Stale, ())])
def test_a_norm_that_alone_reads_what_a_block_hands_on_acts_itself(
    kind: type[Block], folded: tuple[int, ...], dtype: torch.dtype
) -> None:
    found = attached(Decoder(kind), dtype)
    assert found.folded == folded
    assert len(found.steering_modules) == LAYERS + 1


@pytest.mark.usefixtures("open_norms")
@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (lambda right, norm, x, r: norm.forward_native(x, r), "gets -?0.00 of the change"),
        (lambda right, norm, x, r: right(norm, x - x, right(norm, x, r)[1]), "acts more than once"),
        (lambda right, norm, x, r: (norm.forward_native(x, r)[0], right(norm, x, r)[1]), "something else than that"),
        (lambda right, norm, x, r: (right(norm, x, r)[0], norm.forward_native(x, r)[1]), "something else than that"),
        (lambda right, norm, x, r: (1.001 * right(norm, x, r)[0], right(norm, x, r)[1]), "something else than that"),
    ],
)
def test_a_norm_that_acts_otherwise_is_refused(wrong: Any, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = steering_module.forward
    monkeypatch.setattr(
        steering_module, "forward", lambda norm, x, r=None: right(norm, x) if r is None else wrong(right, norm, x, r)
    )
    with pytest.raises(UnsupportedModel, match=f"resid_post of layer 0: .*{reason}"):
        attached(Decoder(Pair))


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Connected, "hyper-connections"),
        (Wide, "AltUp"),
        (Needed, "cannot be steered: resid_post of layer"),
    ],
)
def test_what_is_no_stream_of_one_vector_a_token_is_refused(kind: type[Block], reason: str) -> None:
    with pytest.raises(UnsupportedModel, match=reason):
        attached(Decoder(kind))


@pytest.mark.parametrize(
    ("structure", "reason"), [("branch", "takes something else"), ("functional", "more than once")]
)
def test_blocks_that_are_called_otherwise_are_refused(structure: str, reason: str) -> None:
    model = Decoder(Block)
    bad.STRUCTURES[structure](model, list(model.layers))
    with pytest.raises(UnsupportedModel, match=reason):
        attached(model)


def test_a_second_claim_is_refused() -> None:
    model = Decoder(Pair)
    attached(model)
    with pytest.raises(UnsupportedModel, match="more than once"):
        attached(model)


def test_a_block_that_is_not_called_is_named() -> None:
    model = Decoder(Block)
    model.layers[1].__class__ = type("Past", (Block,), {"__call__": lambda self, x: self.forward(x)})
    with pytest.raises(UnsupportedModel, match=r"\[1\] did not run"):
        attached(model)


def test_a_stream_that_other_ranks_have_otherwise_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(internals.worker, "replicated", lambda _stream: False)
    with pytest.raises(UnsupportedModel, match="another part of the stream"):
        attached(Decoder(Pair))


def test_passes_that_are_never_bit_equal_are_not_refused_for_that() -> None:
    model = Decoder(Pair)
    draw = torch.Generator().manual_seed(0)
    model.norm.register_forward_hook(
        lambda _m, _a, out: (out[0] + 1e-6 * torch.randn(out[0].shape, generator=draw), *out[1:])
    )
    assert attached(model).form == "sum"
