"""Install steering on a loaded vLLM model: find its blocks, learn how they pass on the stream, attach the steering
modules, and check them.

This runs once in each worker, after the weights are loaded and before anything is compiled. All passes are eager and
collective: every rank makes the same passes in the same order.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, assert_never

import torch
from torch import Tensor, nn

from steer.errors import UnsupportedModel
from steer.runtime import selfcheck
from steer.runtime.bank import EMBEDDING, DirectionBank, HookPoint
from steer.runtime.hook_points import Args, Kwargs, Output, find_blocks, find_writers, hooks
from steer.runtime.token_index import TokenIndex
from steer.spec import MAX_TOGETHER
from steer.vllm import internals
from steer.vllm.internals.types import Worker
from steer.vllm.readout import ReadRunner
from steer.vllm.settings import EngineSettings
from steer.vllm.steering_module import (
    Form,
    SteeringModule,
    StreamArgument,
    attach_after,
    attach_before,
    attach_within,
    stream,
)

if TYPE_CHECKING:
    from steer.vllm.internals.types import Norm


@dataclass(frozen=True, slots=True)
class Target:
    """The place of one steering module: before block 0 (with `slot`), after a block or one of its children, or in the
    `norm` that takes what a block hands on."""

    point: HookPoint
    module: nn.Module
    form: Form
    slot: StreamArgument | None = None
    norm: Norm | None = None

    def attach(self, steering_module: SteeringModule) -> None:
        if self.norm is not None:
            attach_within(self.norm, steering_module)
        elif self.slot is not None:
            attach_before(self.module, self.slot, steering_module, self.point.site)
        else:
            attach_after(self.module, self.form, steering_module, self.point.site)

    @property
    def hooked(self) -> selfcheck.HookedModule:
        if (slot := self.slot) is not None:
            return selfcheck.HookedModule(self.point, self.module, lambda given: slot.get(*given), before=True)
        if (norm := self.norm) is not None:
            return selfcheck.HookedModule(self.point, norm, _added, before=True, norm=norm.forward_native)
        return selfcheck.HookedModule(self.point, self.module, lambda output: stream(self.form, output, torch.float64))


def _added(given: tuple[tuple[Tensor, ...], object]) -> Tensor:
    """The stream that a norm adds up from its arguments, rounded as the norm hands it on."""
    (h, r, *_), _ = given
    return (h.float() + r.float()).to(h.dtype)


@dataclass(frozen=True, slots=True)
class Installation:
    """What steering has on one rank.

    Attributes:
        blocks: the blocks of this rank, by their numbers in the whole model.
        form: how the blocks hand on the stream.
        bank: the direction bank.
        steering_modules: all steering modules, each with its hook point.
        reads: runs the read-outs; None if no read-out is compiled in.
    """

    blocks: dict[int, nn.Module]
    form: Form
    bank: DirectionBank
    steering_modules: tuple[tuple[HookPoint, SteeringModule], ...]
    reads: ReadRunner | None
    #: The layers whose hook point is in the norm that comes after the block.
    folded: tuple[int, ...]
    #: A typical stream of a plain pass at each hook point, `[d_model]` float32 on the CPU (`_typical`).
    streams: dict[HookPoint, Tensor]


def attach(worker: Worker, settings: EngineSettings, index: TokenIndex) -> Installation:
    """Attach a steering module to every hook point of this rank. Raises UnsupportedModel if this fails, or if the check
    fails."""
    architecture, layers, d_model = internals.config.dimensions_of(worker.vllm_config)
    blocks = find_blocks(internals.worker.decoder_of(worker), layers)
    local = {i: block for i, block in enumerate(blocks) if not internals.worker.is_elsewhere(block)}
    if not local:
        raise UnsupportedModel(f"{architecture}: this rank has no decoder block")
    plain, again = internals.worker.probe(worker), internals.worker.probe(worker)
    form = _learn_form(worker, local, plain, again)
    slot = _find_stream_argument(worker, local[0], d_model) if 0 in local else None
    opened = internals.worker.open_norms(worker) if form == "sum" else []
    norms = _find_norms(worker, local, opened, (plain, again)) if opened else {}
    targets: list[Target] = []
    for site in settings.sites:
        if slot is not None:
            targets.append(Target(HookPoint(site, EMBEDDING), local[0], "tensor", slot))
        match site:
            case "resid_post":
                targets += [Target(HookPoint(site, i), block, form, norm=norms.get(i)) for i, block in local.items()]
            case "writers":
                targets += _find_writers(worker, local, form)
            case _:
                assert_never(site)
    points = list(dict.fromkeys(target.point for target in targets))
    bank = DirectionBank(
        points,
        rows=settings.rows,
        rank=settings.rank,
        d_model=d_model,
        device=worker.device,
        requests=MAX_TOGETHER * internals.config.max_requests(worker.vllm_config),
    )
    read = [point.layer for point in points if point.readable]
    reads = ReadRunner(read, settings.readout, settings.rank, worker.device) if settings.readout else None
    steering_modules = []
    for target in targets:
        point, readable = target.point, target.point.readable
        buffers = reads.of(point.layer) if reads and readable else None
        steering_module = SteeringModule(bank.slices[point], index, buffers, decides=readable)
        target.attach(steering_module)
        steering_modules.append((point, steering_module))
    streams = _self_check(worker, targets, local, form, bank, index, (plain, again))
    folded = tuple(target.point.layer for target in targets if target.norm is not None)
    return Installation(local, form, bank, tuple(steering_modules), reads, folded, streams)


def _learn_form(worker: Worker, local: dict[int, nn.Module], plain: Tensor, again: Tensor) -> Form:
    """How the blocks hand on the stream, as far as passes with changed outputs show it. The self-check then finds out
    whether this is right.

    Args:
        plain, again: the outputs of two plain passes.
    """
    outputs: dict[int, Output] = {}
    _pass_with(worker, local, outputs.__setitem__)
    if len(outputs) != len(local):
        raise UnsupportedModel(f"blocks {sorted(set(local) - set(outputs))} did not run in the probe pass")
    if all(isinstance(out, Tensor) for out in outputs.values()):
        return "tensor"
    if not all(isinstance(out, tuple) and isinstance(out[0], Tensor) for out in outputs.values()):
        raise UnsupportedModel("the decoder blocks return neither a tensor nor a tuple that begins with one")
    # The next rank of a pipeline reads what this rank sends on, so its own pass shows nothing about its last block.
    last = internals.config.dimensions_of(worker.vllm_config)[1] - 1
    inner = [block for i, block in local.items() if i == last or i != max(local)]
    if inner and selfcheck.rest_is_dead(inner, lambda: internals.worker.probe(worker), plain, again):
        return "first"
    if all(_is_pair(out) for out in outputs.values()):
        return "sum"
    shapes = [list(t.shape) for t in selfcheck.tensors_in(next(iter(outputs.values())))]
    raise UnsupportedModel(
        f"the decoder blocks hand on {shapes}, and more than the first of them is used: a stream "
        "wider than one vector a token (hyper-connections), or not complete in one tensor, cannot be steered"
    )


def _is_pair(output: Output) -> bool:
    return (
        isinstance(output, tuple)
        and len(output) > 1
        and isinstance(output[1], Tensor)
        and output[1].shape == output[0].shape
    )


def _find_norms(
    worker: Worker, local: dict[int, nn.Module], opened: Sequence[Norm], plain: tuple[Tensor, Tensor]
) -> dict[int, Norm]:
    """For each block the norm of `opened` that takes both parts of the stream that the block hands on. The dict is
    empty if anything else reads these parts: if a pass in which all other readers get NaN differs from a plain one.

    Args:
        plain: the outputs of two plain passes.
    """
    handed: dict[int, Output] = {}
    norms: dict[int, Norm] = {}
    called: Counter[Norm] = Counter()

    def take(norm: Norm, args: tuple[object, ...]) -> None:
        called[norm] += 1
        for i, output in handed.items():
            if len(args) == 2 and args[0] is output[0] and args[1] is output[1]:
                norms[i] = norm

    with hooks([norm.register_forward_pre_hook(take) for norm in opened]):
        _pass_with(worker, local, handed.__setitem__)
    norms = {i: norm for i, norm in norms.items() if called[norm] == 1}

    def hide(i: int, output: Output) -> Output | None:
        handed[i] = output
        return (*(torch.full_like(part, torch.nan) for part in output[:2]), *output[2:]) if i in norms else None

    with hooks([norm.register_forward_pre_hook(lambda *_, i=i: handed[i][:2]) for i, norm in norms.items()]):
        return norms if selfcheck.same(_pass_with(worker, local, hide), *plain) else {}


def _pass_with(worker: Worker, local: dict[int, nn.Module], change: Callable[[int, Output], Output | None]) -> Tensor:
    """Run a probe pass in which `change(layer, output)`, if it is not None, replaces what each block returns. Returns
    the output of the pass."""
    with hooks([block.register_forward_hook(lambda _m, _args, x, i=i: change(i, x)) for i, block in local.items()]):
        return internals.worker.probe(worker)


def _find_stream_argument(worker: Worker, block: nn.Module, d_model: int) -> StreamArgument:
    """The one argument of block 0 that is a float tensor `[tokens, d_model]`."""
    found: list[StreamArgument] = []

    def look(_module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        found.clear()  # a block that calls itself comes here twice; the self-check refuses it
        given: list[tuple[int | str, object]] = [*enumerate(args), *kwargs.items()]
        for key, value in given:
            if isinstance(value, Tensor) and value.is_floating_point() and value.shape[-1] == d_model:
                found.append(StreamArgument(key))

    with hooks([block.register_forward_pre_hook(look, with_kwargs=True)]):
        internals.worker.probe(worker)
    if len(found) != 1:
        raise UnsupportedModel(f"block 0 ({type(block).__name__}) has {len(found)} arguments that could be the stream")
    return found[0]


def _find_writers(worker: Worker, local: dict[int, nn.Module], form: Form) -> list[Target]:
    """For each block, targets at the children whose outputs add up to what the block adds to the stream. Raises
    UnsupportedModel if there are none, for example if each rank holds a part of a sum that is reduced later."""
    last: list[Tensor] = []
    width = worker.model_config.get_hidden_size()

    def entering(args: Args, kwargs: Kwargs) -> Tensor:
        if last:
            return last[-1]  # the stream that the previous block handed on
        given = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.is_floating_point()]
        given = [x.float().reshape(-1, width) for x in given if x.shape[-1] == width]
        return torch.stack(given if form == "sum" else given[:1]).sum(0)

    def leaving(output: Output) -> Tensor:
        last.append(stream(form, output).clone())
        return last[-1]

    eps = torch.finfo(worker.model_config.dtype).eps
    found = find_writers(
        list(local.values()), lambda: internals.worker.probe(worker), entering, leaving, eps, first=min(local)
    )
    return [
        Target(HookPoint("writers", i, term), writer, "tensor")
        for i, writers in zip(local, found, strict=True)
        for term, writer in enumerate(writers)
    ]


def _self_check(
    worker: Worker,
    targets: list[Target],
    local: dict[int, nn.Module],
    form: Form,
    bank: DirectionBank,
    index: TokenIndex,
    plain: tuple[Tensor, Tensor],
) -> dict[HookPoint, Tensor]:
    """Check that the steering modules act on the stream (`runtime.selfcheck`), that all tensor-parallel ranks have the
    same stream, and that a plain pass is the same with steering modules as without. Returns a typical stream of a plain
    pass at each hook point (`_typical`). Raises UnsupportedModel."""
    each = internals.base.PROBE_TOKENS // len(selfcheck.CASES)

    def run(steers: selfcheck.Steers) -> None:
        index.fill_with(steers, [each] * len(steers))
        try:
            internals.worker.probe(worker)
        finally:
            index.fill_with([], [])

    checked = selfcheck.EagerCheck(
        worker.get_model(),
        local,
        [target.hooked for target in targets],
        bank,
        run,
        internals.base.PROBE_TOKENS,
        torch.finfo(worker.model_config.dtype).eps,
        summed=form == "sum",
        dead=form == "first",
    )
    bad, watch = checked.problems()
    if not internals.worker.replicated(torch.cat([x.flatten() for x in watch.raw.values()]).float()):
        bad.append("each tensor-parallel rank has another part of the stream")
    if not selfcheck.same(internals.worker.probe(worker), *plain):
        bad.append("a plain pass is not the same with steering_modules as without")
    if bad:
        raise UnsupportedModel(f"{type(worker.get_model()).__name__} cannot be steered: {'; '.join(bad)}")
    return {targets[n].point: _typical(stream_.float()).cpu() for n, stream_ in watch.raw.items()}


def _typical(streams: Tensor) -> Tensor:
    """`[d_model]`: the mean direction of streams `[tokens, d_model]`, with their median length. A few tokens with
    enormous streams, such as the first token often has, do not decide the result."""
    mean = nn.functional.normalize(streams, dim=-1).mean(0)
    return nn.functional.normalize(mean, dim=0) * streams.norm(dim=-1).median()
