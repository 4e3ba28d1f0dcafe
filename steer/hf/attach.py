"""Steering hooks on a loaded transformers model: claim every place, prove it by a probe pass, read the token index."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from steer.direction import Site
from steer.errors import UnsupportedModel
from steer.runtime import proof
from steer.runtime import sites as site_tools
from steer.runtime.index import RequestSteer, TokenIndex
from steer.runtime.readout import ReadIndex
from steer.runtime.table import EMBEDDING, Operands, Place, Table, gather, operate
from steer.spec import Spec

#: Length of the probe prompt: long enough to be more than one token, short enough for any context.
PROBE_TOKENS = 8

#: Rows of a batch up to which their vectors are kept at all places: at most 1 / (6 · d_model) of the weights for each.
KEPT = 64


class Anatomy:
    """The parts of a causal language model that steering touches: its decoder, blocks and shape."""

    def __init__(self, model: Any) -> None:
        config = model.config.get_text_config()
        self.model = model
        self.layers = int(config.num_hidden_layers)
        self.d_model = int(config.hidden_size)
        self.architecture = type(model).__name__
        self.decoder = model.get_decoder() if hasattr(model, "get_decoder") else model.base_model
        self.blocks = site_tools.find_blocks(self.decoder, self.layers)
        self.vocabulary = int(config.vocab_size)

    @property
    def device(self) -> torch.device:
        device: torch.device = next(self.model.parameters()).device
        return device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.blocks[0].parameters()).dtype

    @torch.no_grad()
    def probe(self, rows: int = 1) -> Any:
        """A short forward pass over fixed token ids, the same in each row; the model's output."""
        ids = (torch.arange(PROBE_TOKENS, device=self.device) * 7 + 11) % self.vocabulary
        return self.model(input_ids=ids.repeat(rows, 1), use_cache=False)


class Steering:
    """Hooks on every claimed place of one model, reading one table through one token index.

    `index` says what acts on each token of the running forward pass, in the order in which the model sees them, and
    `reads` which of them are read.
    """

    def __init__(self, model: Any, *, sites: Iterable[Site] = ("resid_post",), rows: int = 32, rank: int = 4) -> None:
        self.anatomy = Anatomy(model)
        self.sites: tuple[Site, ...] = tuple(dict.fromkeys(sites))
        self._targets = self._find_targets()
        self.table = Table(
            list(dict.fromkeys(point.place for point, _ in self._targets)),
            rows=rows,
            rank=rank,
            d_model=self.anatomy.d_model,
            device=self.anatomy.device,
        )
        self.index = TokenIndex(rank, 1, self.anatomy.device)
        self.reads = ReadIndex(self.anatomy.layers, rank, self.anatomy.device)
        self._handles: list[Any] = []
        #: The batch rows that the index speaks of, none where it speaks of packed tokens one by one.
        self._rows: Sequence[RequestSteer | None] = ()
        #: What acts at each place, until the next `fill`: a batch is many passes.
        self._kept: dict[Place, list[Operands]] = {}
        self._turn = threading.RLock()
        self._verify()

    @property
    def attached(self) -> bool:
        return bool(self._handles)

    def attach(self) -> None:
        """Put the hooks on. Doing it twice is doing it once."""
        if not self._handles:
            self._handles = [hang(self._transform(point.place)) for point, hang in self._targets]

    def detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def resize(self, max_tokens: int) -> None:
        """Make the index large enough for batches of `max_tokens`."""
        if max_tokens > self.index.max_tokens:
            self.index = TokenIndex(self.table.rank, max_tokens, self.anatomy.device)

    @contextmanager
    def batch(self, specs: Sequence[Spec | RequestSteer | None]) -> Iterator[None]:
        """While it lasts row i of every `[rows, positions]` forward pass is steered by `specs[i]`; one spec serves
        any number of rows. A batch inside a batch ends with the outer one in force again.

        Raises RuntimeError while another thread's lasts: a model has one index, and would steer each by the other's.
        """
        if not self._turn.acquire(blocking=False):
            raise RuntimeError("another thread steers this model at this moment: let its batch end first")
        outer = self._rows
        try:
            self._lay([self.table.steer(spec) if isinstance(spec, Spec) else spec for spec in specs])
            yield
        finally:
            self._lay(outer)
            self._turn.release()

    def fill(self, steers: Sequence[RequestSteer | None], lengths: Sequence[int]) -> None:
        """Steer the `lengths[i]` tokens of the next pass that are request i's by `steers[i]`, in batch order."""
        self._kept.clear()
        self.index.fill_with(steers, lengths)

    def _lay(self, rows: Sequence[RequestSteer | None]) -> None:
        self.resize(len(rows))
        self._rows = rows
        self.fill(rows, [1] * len(rows))
        self.reads.clear()

    def _transform(self, place: Place) -> site_tools.Transform:
        plate, layer = self.table.plates[place], place.layer
        readable = place.site == "resid_post" and layer != EMBEDDING

        def transform(x: Tensor) -> Tensor | None:
            steered, read = self.index.active, readable and layer in self.reads.layers
            if not (steered or read):
                return None
            moved = self._moved(x, place) if steered else x
            if read:
                self.reads.record(layer, x.flatten(0, -2), moved.flatten(0, -2), plate.vectors)
            return moved if steered else None

        return transform

    def _moved(self, x: Tensor, place: Place) -> Tensor:
        """The stream `[..., d_model]` of all tokens after the operation."""
        operands = self._kept.get(place) or self._gathered(place, len(self._rows) or x.shape[:-1].numel())
        if not operands or operands[0].strengths.dim() == 1:
            return operate(x, operands)
        return operate(x.reshape(len(operands[0].strengths), -1, x.shape[-1]), operands).reshape(x.shape)

    def _gathered(self, place: Place, count: int) -> list[Operands]:
        acting, everywhere = self.index.acting(count)
        operands = gather(self.table.plates[place], *acting, everywhere=everywhere)
        if acting[0].shape[1] <= KEPT:
            self._kept[place] = operands
        return operands

    def _find_targets(self) -> list[tuple[proof.Point, Callable[[site_tools.Transform], Any]]]:
        """Each place with the function that hangs a transform there."""
        anatomy, blocks = self.anatomy, self.anatomy.blocks
        targets: list[tuple[proof.Point, Callable[[site_tools.Transform], Any]]] = []
        writers = site_tools.find_writers(blocks, anatomy.probe) if "writers" in self.sites else []
        for site in self.sites:
            before = proof.Point(Place(site, EMBEDDING), blocks[0], _stream_given, before=True)
            targets.append((before, _hang(site_tools.on_input, blocks[0])))
            for layer, block in enumerate(blocks):
                for module in (block,) if site == "resid_post" else writers[layer]:
                    point = proof.Point(Place(site, layer), module, site_tools.stream_of)
                    targets.append((point, _hang(site_tools.on_output, module)))
        return targets

    def _verify(self) -> None:
        """Prove that what is acted on is the stream (`runtime.proof`), with rows of a batch steered and plain ones, and
        that a plain pass is unchanged. Raises UnsupportedModel naming the places that failed."""
        anatomy = self.anatomy
        plain, again = anatomy.probe().logits, anatomy.probe().logits
        if not torch.equal(plain, again) and _drops(anatomy.model):
            raise UnsupportedModel(
                f"{anatomy.architecture}: two plain passes differ, since the model is in training mode with dropout: "
                "call model.eval() first"
            )

        def run(steers: proof.Steers) -> None:
            with self.batch(steers):
                anatomy.probe(len(steers))

        dead = proof.rest_is_dead(anatomy.blocks, lambda: anatomy.probe().logits, plain, again)
        points = [point for point, _ in self._targets]
        blocks = dict(enumerate(anatomy.blocks))
        tokens, eps = PROBE_TOKENS * len(proof.CASES), torch.finfo(anatomy.dtype).eps
        checked = proof.Proof(anatomy.model, blocks, points, self.table, run, tokens, eps, dead=dead)
        self.attach()
        try:
            bad, _ = checked.problems(self.sites)
            if not proof.same(anatomy.probe().logits, plain, again):
                bad.append("a plain pass is not the same with hooks as without")
        finally:
            self.detach()
        if bad:
            raise UnsupportedModel(f"{anatomy.architecture} cannot be steered: {'; '.join(bad)}")


def _stream_given(given: Any) -> Tensor:
    """The stream in a block's arguments and keywords."""
    args, kwargs = given
    stream: Tensor = args[0] if args else kwargs["hidden_states"]
    return stream


def _drops(model: nn.Module) -> bool:
    return any(m.training for m in model.modules() if not list(m.children()))


def _hang(
    how: Callable[[nn.Module, site_tools.Transform], Any], module: nn.Module
) -> Callable[[site_tools.Transform], Any]:
    return lambda transform: how(module, transform)
