"""Claim the places of a loaded vLLM model: find its blocks, learn how they hand on the stream, seat, and prove it.

Runs once in each worker, after the weights are loaded and before anything is compiled; all passes are eager, and
collective: every rank makes the same ones in the same order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from steer.direction import MODES
from steer.errors import UnsupportedModel
from steer.runtime.index import RequestSteer, TokenIndex
from steer.runtime.sites import find_blocks, hooks, summands
from steer.runtime.table import EMBEDDING, Place, Table
from steer.vllm import internals
from steer.vllm.seat import Form, Reads, Seat, Slot, sit_after, sit_before, stream
from steer.vllm.settings import EngineSettings

#: What may be left of a removed component, relative to the norm of what it was removed from.
LEFT_OVER = {torch.float64: 1e-5, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
#: How far an equal pass may be off, relative to its norm: quantised models round at every layer.
SAME = 0.1


@dataclass(frozen=True, slots=True)
class Target:
    """Where one seat sits: before block 0, or after a block or one of its children."""

    place: Place
    module: nn.Module
    form: Form
    slot: Slot | None = None

    def sit(self, seat: Seat) -> None:
        if self.slot is not None:
            sit_before(self.module, self.slot, seat, self.place.site)
        else:
            sit_after(self.module, self.form, seat, self.place.site)

    def watch(self, see: Callable[[Tensor], None]) -> Any:
        """Show `see` what the seat hands on, as `[tokens, d_model]` float32. Returns the hook's handle."""
        if (slot := self.slot) is None:
            return self.module.register_forward_hook(lambda _m, _args, output: see(stream(self.form, output)))
        return self.module.register_forward_pre_hook(
            lambda _m, args, kwargs: see(stream("tensor", slot.get(args, kwargs))), with_kwargs=True
        )


@dataclass(frozen=True, slots=True)
class Claim:
    """The claimed part of one rank: its blocks by their numbers in the whole model, the form in which they hand on the
    stream, its table, and all seats."""

    blocks: dict[int, nn.Module]
    form: Form
    table: Table
    seats: tuple[tuple[Place, Seat], ...]
    reads: Reads | None

    @property
    def reading(self) -> dict[int, Seat]:
        """The seats that read, by layer."""
        return {place.layer: seat for place, seat in self.seats if seat.reading}


def claim(worker: Any, settings: EngineSettings, index: TokenIndex) -> Claim:
    """Seat every place of this rank. Raises UnsupportedModel where that cannot be done and proved."""
    architecture, layers, d_model = internals.shape_of(worker.vllm_config)
    blocks = find_blocks(internals.decoder_of(worker), layers)
    local = {i: block for i, block in enumerate(blocks) if not internals.is_elsewhere(block)}
    if not local:
        raise UnsupportedModel(f"{architecture}: this rank has no decoder block")
    plain, form = _learn_form(worker, local)
    slot = _find_stream_argument(worker, local[0], d_model) if 0 in local else None
    targets: list[Target] = []
    for site in settings.sites:
        if slot is not None:
            targets.append(Target(Place(site, EMBEDDING), local[0], "tensor", slot))
        if site == "resid_post":
            targets += [Target(Place(site, i), block, form) for i, block in local.items()]
        else:
            targets += _find_writers(worker, local, form)
    places = list(dict.fromkeys(target.place for target in targets))
    table = Table(
        places,
        rows=settings.rows,
        rank=settings.rank,
        d_model=d_model,
        device=worker.device,
        requests=internals.max_requests(worker.vllm_config),
    )
    reads = Reads(settings.readout, settings.rank, worker.device) if settings.readout else None
    seats = []
    for target in targets:
        reader = reads if target.place.site == "resid_post" and target.place.layer != EMBEDDING else None
        seat = Seat(table.plates[target.place], index, reader)
        target.sit(seat)
        seats.append((target.place, seat))
    _prove(worker, targets, table, index, plain)
    return Claim(local, form, table, tuple(seats), reads)


def _learn_form(worker: Any, local: dict[int, nn.Module]) -> tuple[Tensor, Form]:
    """A plain pass, and the form: the one in which every block may hand on the stream without changing the pass."""
    outputs: dict[int, Any] = {}
    plain = _pass_with(worker, local, outputs.__setitem__)
    if len(outputs) != len(local):
        raise UnsupportedModel(f"blocks {sorted(set(local) - set(outputs))} did not run in the probe pass")
    if all(isinstance(out, Tensor) for out in outputs.values()):
        return plain, "tensor"
    if not all(isinstance(out, tuple) and isinstance(out[0], Tensor) for out in outputs.values()):
        raise UnsupportedModel("the decoder blocks return neither a tensor nor a tuple that begins with one")
    if not all(_is_pair(out) for out in outputs.values()):
        return plain, "first"
    as_sum = _pass_with(worker, local, lambda _i, out: (out[0] + out[1], torch.zeros_like(out[1]), *out[2:]))
    as_first = _pass_with(worker, local, lambda _i, out: (out[0], torch.zeros_like(out[1]), *out[2:]))
    errors: dict[Form, float] = {"sum": _distance(as_sum, plain), "first": _distance(as_first, plain)}
    form = min(errors, key=errors.__getitem__)
    if not errors[form] < SAME:
        raise UnsupportedModel(f"the decoder blocks return a pair in a form that is not known (errors: {errors})")
    return plain, form


def _is_pair(output: tuple[Any, ...]) -> bool:
    return len(output) > 1 and isinstance(output[1], Tensor) and output[1].shape == output[0].shape


def _pass_with(worker: Any, local: dict[int, nn.Module], change: Callable[[int, Any], Any]) -> Tensor:
    """A probe pass in which `change(layer, output)`, unless None, replaces what each block returns."""

    def hooked(i: int) -> Any:
        return lambda _module, _args, output: change(i, output)

    with hooks([block.register_forward_hook(hooked(i)) for i, block in local.items()]):
        return internals.probe(worker)


def _distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm().clamp_min(1e-30))


def _find_stream_argument(worker: Any, block: nn.Module, d_model: int) -> Slot:
    """The one argument of block 0 that is a float tensor `[tokens, d_model]`."""
    found: list[Slot] = []

    def look(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
        for key, value in given:
            if isinstance(value, Tensor) and value.is_floating_point() and value.shape[-1] == d_model:
                found.append(Slot(key))

    with hooks([block.register_forward_pre_hook(look, with_kwargs=True)]):
        internals.probe(worker)
    if len(found) != 1:
        raise UnsupportedModel(f"block 0 ({type(block).__name__}) has {len(found)} arguments that could be the stream")
    return found[0]


def _find_writers(worker: Any, local: dict[int, nn.Module], form: Form) -> list[Target]:
    """For each block the children whose outputs add up to what it adds to the stream. Raises UnsupportedModel where
    there are none, as where ranks each hold a part of a sum that is reduced later."""
    entered: dict[int, Tensor] = {}
    left: dict[int, Tensor] = {}
    wrote: dict[int, dict[str, Tensor]] = {i: {} for i in local}
    last: list[Tensor] = []

    def before(i: int) -> Any:
        def record(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if last:
                entered[i] = last[-1]  # what the block before handed on
                return
            width = worker.model_config.get_hidden_size()
            given = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.is_floating_point()]
            given = [x.float().reshape(-1, width) for x in given if x.shape[-1] == width]
            entered[i] = torch.stack(given if form == "sum" else given[:1]).sum(0)

        return record

    def after(i: int) -> Any:
        def record(_module: nn.Module, _args: Any, output: Any) -> None:
            left[i] = stream(form, output).clone()
            last.append(left[i])

        return record

    def child(i: int, name: str) -> Any:
        def record(_module: nn.Module, _args: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.is_floating_point() and output.numel() == entered[i].numel():
                wrote[i][name] = output.detach().float().reshape(entered[i].shape).clone()

        return record

    handles = []
    for i, block in local.items():
        handles += [block.register_forward_pre_hook(before(i), with_kwargs=True), block.register_forward_hook(after(i))]
        handles += [m.register_forward_hook(child(i, name)) for name, m in block.named_children()]
    with hooks(handles):
        internals.probe(worker)
    eps = torch.finfo(worker.model_config.dtype).eps
    targets: list[Target] = []
    for i, block in local.items():
        names = summands(entered[i], left[i], wrote[i], eps)
        if names is None:
            raise UnsupportedModel(
                f"site 'writers': in block {i} ({type(block).__name__}) no one or two of the children "
                f"{sorted(wrote[i])} write what the block adds to the stream; use the site 'resid_post'"
            )
        targets += [Target(Place("writers", i), block.get_submodule(name), "tensor") for name in names]
    return targets


def _prove(worker: Any, targets: list[Target], table: Table, index: TokenIndex, plain: Tensor) -> None:
    """Remove another random vector at each place: what is handed on then has of it must be rounding, and a plain pass
    must be the same with seats as without."""
    row = 1
    vectors = torch.randn(len(table.plates), plain.shape[-1], generator=torch.Generator().manual_seed(0))
    vectors /= vectors.norm(dim=-1, keepdim=True)
    for vector, (place, plate) in zip(vectors, table.plates.items(), strict=True):
        # Two sites may act on the same tensor before block 0, so there they take the same vector.
        plate.write(row, vectors[0] if place.layer == EMBEDDING else vector, [_ABLATE] * len(MODES))
    ablate = RequestSteer.plain(table.rank)
    ablate.slots[0], ablate.strengths[0] = row * len(MODES), 1.0
    left: dict[int, float] = {}

    def measure(number: int, place: Place) -> Callable[[Tensor], None]:
        def see(x: Tensor) -> None:
            if x.shape[0] == internals.PROBE_TOKENS:  # another shape is left out, and so reported
                v = table.plates[place].vectors[row]
                left[number] = float(((x @ v).abs() / x.norm(dim=-1).clamp_min(1e-12)).max())

        return see

    try:
        with hooks([target.watch(measure(n, target.place)) for n, target in enumerate(targets)]):
            index.fill_with([ablate], [internals.PROBE_TOKENS])
            internals.probe(worker)
        index.fill_with([], [])
        again = internals.probe(worker)
    finally:
        index.fill_with([], [])
        for plate in table.plates.values():
            plate.clear([row])
    limit = LEFT_OVER.get(worker.model_config.dtype, 2e-2)
    bad = [
        f"{target.place.site} of layer {target.place.layer}: {f'{left[n]:.1e} is left' if n in left else 'not reached'}"
        for n, target in enumerate(targets)
        if not left.get(n, float("inf")) <= limit
    ]
    if not torch.equal(plain, again):
        bad.append("a plain pass is not bit-equal with seats and without")
    if bad:
        raise UnsupportedModel(f"the probe pass failed: {'; '.join(bad)}")


_ABLATE = torch.tensor([0.0, -torch.inf, 1.0, 0.0])
