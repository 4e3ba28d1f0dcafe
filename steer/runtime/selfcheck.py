"""The self-check by eager passes: whether the operation acts on the stream.

A change is never measured at the hook point that made it. It is measured where the next module takes the stream: at the
input of the next block; after the last block, at the input of the first module that follows; and if no module takes it
(a rank of a pipeline), in what the model returns.

One pass has plain tokens beside steered ones: tokens from which all of a random vector is removed, or half of it;
tokens to which some of it is added; tokens on which a mode acts only because its gate is shifted; and, if a request can
use two rows, tokens that are turned half the way in a random plane. If the operation acts twice, or not at all, or on
a part of what the block hands on, one of these shows it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from steer.names import MODES, SITE_RULES, TURNING, Mode, Site
from steer.runtime.bank import EMBEDDING, DirectionBank, HookPoint
from steer.runtime.hook_points import hooks, scales
from steer.runtime.op import amount, component, restoring, shifted, turn
from steer.runtime.token_index import RequestSteer, bounds_of, slot

#: The row that the self-check uses, and the next row, which it uses for an axis if the bank has it.
ROW, AXIS = 1, 2
#: How the tokens of the pass are steered, in equal parts one after the other: (name, mode, strength, shift, whether the
#: norm is kept).
CASES: tuple[tuple[str, Mode, float, float, bool], ...] = (
    ("plain", "ablate", 0.0, 0.0, False),
    ("strength 1", "ablate", 1.0, 0.0, False),
    ("strength 0.5", "ablate", 0.5, 0.0, False),
    ("add", "add", 1.0, 0.0, False),
    ("a shift", "one_sided", 1.0, -1.0, False),
    ("a turn by half", "rotate", 0.5, 0.0, False),
    ("the norm kept", "add", 1.0, 0.0, True),
)
#: The coefficients of `ablate` at weight 1 (see `op`).
ABLATE = torch.tensor([0.0, -torch.inf, 1.0, 0.0, -torch.inf, 0.0], dtype=torch.float32)
#: The largest error of what is handed on, in standard deviations of its rounding.
ROUNDINGS = 16
#: The largest error of a norm's output, relative to its length: NORMED times the rounding of the dtype in which the
#: stream is handed on, plus SUMMED times the rounding of float32, because the mean square comes from other sums
#: (`bank.operate_before_norm`; an error of 3 such roundings was seen). Where the norm of the stream is kept, the factor
#: has an error of SUMMED such roundings too.
NORMED, SUMMED = 2, 32

Steers = Sequence[RequestSteer | None]


@dataclass(frozen=True, slots=True)
class HookedModule:
    """A module at which the operation acts: on its output or, with `before`, on its input. The module may also be a
    norm that applies the operation to its input itself, and returns the normed stream and the stream.

    Attributes:
        point: the hook point.
        module: the module.
        read: returns the stream in the module's output or, with `before`, in the pair of its arguments and keywords.
        before: whether the operation acts on the input.
        norm: for a norm that applies the operation: returns the normed form of another stream, on which it does not
            act.
    """

    point: HookPoint
    module: nn.Module
    read: Callable[[Any], Tensor]
    before: bool = False
    norm: Callable[[Tensor], Tensor] | None = None


@dataclass(slots=True)
class Handed:
    """The tensors of one block in one pass.

    Attributes:
        given: the tensors that the block was given.
        returned: the tensors that the block returned.
        taken: the tensors that the next module was given; None if no module took any.
    """

    given: list[Tensor] = field(default_factory=list)
    returned: list[Tensor] = field(default_factory=list)
    taken: list[Tensor] | None = None


class Watch:
    """The record of one pass over `model`. `blocks` are its blocks on this rank, by layer."""

    def __init__(
        self, model: nn.Module, blocks: Mapping[int, nn.Module], hooked: Sequence[HookedModule], d_model: int
    ) -> None:
        self.model, self.blocks, self.hooked, self.d_model = model, blocks, hooked, d_model
        self.handed: dict[int, Handed] = {}
        #: By the number of the hooked module: the stream before the operation, and the stream that is handed on.
        self.raw: dict[int, Tensor] = {}
        self.acted: dict[int, Tensor] = {}
        #: By the number of the hooked module: the normed stream of norms that apply the operation themselves.
        self.normed: dict[int, Tensor] = {}
        self._pending: int | None = None

    @contextmanager
    def watching(self) -> Iterator[Watch]:
        """Record the pass that is made inside."""
        handles: list[RemovableHandle] = []
        last, inside = max(self.blocks), {id(m) for block in self.blocks.values() for m in block.modules()}
        for n, hooked in enumerate(self.hooked):
            hook = hooked.module.register_forward_pre_hook if hooked.before else hooked.module.register_forward_hook
            handles.append(hook(partial(self._read, n, hooked, self.raw, True), prepend=True, with_kwargs=True))
            handles.append(hook(partial(self._read, n, hooked, self.acted, False), with_kwargs=True))
            if hooked.norm is not None:
                handles.append(hooked.module.register_forward_hook(partial(self._norm, n, hooked.point.layer)))
        for i, block in self.blocks.items():
            handles.append(block.register_forward_pre_hook(partial(self._enter, i), with_kwargs=True))
            handles.append(block.register_forward_hook(partial(self._leave, i)))
        for module in self.model.modules():
            if id(module) not in inside and module is not self.model:
                handles.append(module.register_forward_pre_hook(partial(self._go_on, last), with_kwargs=True))
        handles.append(self.model.register_forward_hook(lambda _m, _args, out: self._take(self._wide(out))))
        with hooks(handles):
            yield self

    def _read(
        self, n: int, hooked: HookedModule, store: dict[int, Tensor], first: bool, _module: nn.Module, *given: object
    ) -> None:
        """Store the stream of a hooked module. first: whether only the first call counts. given: the arguments and
        keywords of the module, followed by its output if it has run."""
        if not (first and n in store):
            store[n] = hooked.read(given[2] if given[2:] else given).detach().double().flatten(0, -2).clone()

    def _norm(self, n: int, layer: int, _module: nn.Module, _args: object, output: tuple[Tensor, Tensor]) -> None:
        self.normed[n], stream = (t.detach().clone() for t in output)
        self.handed.setdefault(layer, Handed()).taken = [stream]

    def _enter(self, i: int, _module: nn.Module, args: object, kwargs: object) -> None:
        given = self._wide((args, kwargs))
        self._take(given)
        self.handed.setdefault(i, Handed()).given = given

    def _leave(self, i: int, _module: nn.Module, _args: object, output: object) -> None:
        self.handed.setdefault(i, Handed()).returned = self._wide(output)
        self._pending = i

    def _go_on(self, last: int, _module: nn.Module, args: object, kwargs: object) -> None:
        if self._pending == last and (taken := self._wide((args, kwargs))):
            self._take(taken)

    def _take(self, taken: list[Tensor]) -> None:
        if self._pending is not None:
            self.handed[self._pending].taken, self._pending = taken, None

    def _wide(self, value: object) -> list[Tensor]:
        """Copies of the float tensors in `value` that consist of vectors of the stream's width."""
        return [t.detach().clone() for t in tensors_in(value) if t.shape[-1] % self.d_model == 0]


def tensors_in(value: object) -> Iterator[Tensor]:
    """The float tensors in arguments or outputs, in order, including those in vLLM's IntermediateTensors."""
    if isinstance(value, Tensor):
        if value.is_floating_point() and value.dim() and value.numel():
            yield value
    elif isinstance(value, Mapping):
        for one in value.values():
            yield from tensors_in(one)
    elif isinstance(value, (tuple, list)):
        for one in value:
            yield from tensors_in(one)
    elif isinstance(inner := getattr(value, "tensors", None), Mapping):
        yield from tensors_in(inner)


@dataclass(frozen=True, slots=True)
class EagerCheck:
    """The check of one backend.

    Attributes:
        model: the model.
        blocks: its blocks on this rank, by layer.
        hooked: its hooked modules.
        bank: the direction bank that the hooks read.
        run: makes a pass whose tokens are steered, in equal parts, by the given steerings.
        tokens: the number of tokens of the pass.
        eps: the rounding of the stream's dtype.
        summed: whether the stream is the sum of the tensors that a block hands on.
        dead: whether nothing reads what blocks return after their first tensor.
    """

    model: nn.Module
    blocks: Mapping[int, nn.Module]
    hooked: Sequence[HookedModule]
    bank: DirectionBank
    run: Callable[[Steers], object]
    tokens: int
    eps: float
    summed: bool = False
    dead: bool = False

    @property
    def cases(self) -> tuple[tuple[str, Mode, float, float, bool], ...]:
        """`CASES`, with strength 0 for modes that turn if no request can use the two rows that they need."""
        turning = self.bank.rank > 1 and self.bank.rows > 1
        return tuple(
            (name, mode, strength if turning or mode not in TURNING else 0.0, shift, keeps)
            for name, mode, strength, shift, keeps in CASES
        )

    def watched(self, steers: Steers) -> Watch:
        """Make a pass with these steerings. Returns its record."""
        with Watch(self.model, self.blocks, self.hooked, self.bank.d_model).watching() as watch:
            self.run(steers)
        return watch

    def problems(self) -> tuple[list[str], Watch]:
        """The problems, each with its hook point (none if all is right), and the record of a plain pass."""
        plain = self.watched([None] * len(CASES))
        bad = self._wider(plain)
        if not bad:
            for site in dict.fromkeys(hooked.point.site for hooked in self.hooked):
                bad += self._at(site, plain)
        return bad, plain

    def _wider(self, watch: Watch) -> list[str]:
        """The first problem with a block that does not hand on one vector for each token. One operation cannot act on
        such a stream."""
        tokens, d_model, bad = self.tokens, self.bank.d_model, []
        for i, handed in watch.handed.items():
            new = handed.returned[: 1 if self.dead else None]
            for t in (t for t in new if not _among(t, handed.given)):
                if (rows := t.numel() // d_model) != tokens:
                    what = f"{rows} vectors of the width {d_model} for {tokens} tokens ({list(t.shape)})"
                    reason = (
                        "a stream that is wider than one vector a token (hyper-connections, AltUp) cannot be steered"
                        if rows > tokens
                        else "a part of the tokens cannot be steered"
                    )
                    bad.append(f"block {i} hands on {what}: {reason}")
        return bad[:1]

    def _at(self, site: Site, plain: Watch) -> list[str]:
        """The problems at the hook points of one site. Each hook point is checked with its own vector."""
        generator = torch.Generator().manual_seed(0)
        for n, hooked in enumerate(self.hooked):
            if hooked.point.site == site and n in plain.raw:
                v, axis = torch.linalg.qr(
                    torch.randn(self.bank.d_model, 2, dtype=torch.float32, generator=generator).double()
                )[0].T.float()
                whole = SITE_RULES[site].whole
                size = float(plain.raw[n].norm(dim=-1).mean()) if whole else self._stream_size(plain, n)
                gamma = 4 * max(size, 1e-3) / self.bank.d_model**0.5
                adding = torch.tensor([0.0, -torch.inf, 0.0, gamma, -torch.inf, 0.0], dtype=torch.float32)
                # few components pass this gate, and nearly all do once it is shifted to the other side of 0
                gated = torch.tensor([0.0, gamma, 1.0, 0.0, -torch.inf, 2 * gamma], dtype=torch.float32)
                own = dict.fromkeys(MODES, ABLATE) | {"add": adding, "one_sided": gated}
                self.bank.slices[hooked.point].write(ROW, v, own)
                if self.bank.rows > 1:
                    self.bank.slices[hooked.point].write(AXIS, axis, {})
        steers: list[RequestSteer | None] = []
        for _, mode, strength, shift, keeps in self.cases:
            shifts = np.full(self.bank.rank, shift, np.float32) if shift else None
            bounds = np.full(self.bank.rank, bounds_of(None, keeps), np.int32) if keeps else None
            steer = replace(RequestSteer.plain(self.bank.rank), shifts=shifts, bounds=bounds)
            for j, row in enumerate((ROW, AXIS) if strength and mode in TURNING else (ROW,)):
                steer.slots[j], steer.strengths[j] = slot(row, mode), strength
            steers.append(steer if strength else None)
        try:
            watch = self.watched(steers)
            if SITE_RULES[site].whole:
                return [
                    f"{site} of layer {hooked.point.layer}: {problem}"
                    for n, hooked in enumerate(self.hooked)
                    if hooked.point.site == site and (problem := self._at_stream(n, hooked, watch, plain))
                ]
            return self._at_writers(site, watch, plain)
        finally:
            for bank_slice in self.bank.slices.values():
                bank_slice.clear(range(ROW, min(AXIS, self.bank.rows) + 1))

    def _stream_size(self, plain: Watch, n: int) -> float:
        """The mean norm of the stream that the block of a writer is given. The amount that `add` adds is a multiple of
        it, so that the change shows even if the writer's term is small."""
        layer = max(self.hooked[n].point.layer, min(self.blocks))
        return float(self._whole(plain.handed[layer].given[: 2 if self.summed else 1]).norm(dim=-1).mean())

    def _whole(self, parts: Sequence[Tensor]) -> Tensor:
        """The sum of `parts`, `[tokens, d_model]` float64."""
        return torch.stack([p.double().reshape(-1, self.bank.d_model) for p in parts]).sum(0)

    def _at_stream(self, n: int, hooked: HookedModule, watch: Watch, plain: Watch) -> str | None:
        """The problem at a hook point of the whole stream, None if there is none. n: the hooked module's number."""
        if n not in watch.raw:
            return "not reached"
        layer = hooked.point.layer
        if layer == EMBEDDING:
            first = min(self.blocks)
            taken = [t for t in watch.handed[first].given if not _among(t, plain.handed[first].given)]
        else:
            handed, before = watch.handed[layer], plain.handed[layer]
            if handed.taken is None or before.taken is None:
                return "nothing takes what the block hands on"
            taken = handed.taken
            if not self.summed:
                idle = handed.given + before.taken + (handed.returned[1:] if self.dead else [])
                taken = [t for t in taken if not _among(t, idle)]
        if not taken:
            return "what is handed on does not change: the block's output is not the stream"
        if wider := [t for t in taken if t.numel() != watch.raw[n].numel()]:
            return f"{list(wider[0].shape)} is handed on for {watch.raw[n].shape[0]} tokens"
        if hooked.norm is not None and not same_norm(watch.normed[n], hooked.norm(taken[0]), self.eps):
            return "the norm gives something else than that of the stream that it hands on"
        streams = [taken] if self.summed and layer != EMBEDDING else [[t] for t in taken]
        found = [self._compare(hooked.point, watch.raw[n], self._whole(parts), parts) for parts in streams]
        return next((problem for problem in found if problem), None)

    def _at_writers(self, site: Site, watch: Watch, plain: Watch) -> list[str]:
        """The problems at writers: each writer's own output is checked, and that the block hands on their sum."""
        bad: list[str] = []
        for layer in dict.fromkeys(p.point.layer for p in self.hooked if p.point.site == site):
            at = [n for n, p in enumerate(self.hooked) if (p.point.site, p.point.layer) == (site, layer)]
            if layer == EMBEDDING:
                problems = [self._at_stream(n, self.hooked[n], watch, plain) for n in at]
            elif missing := [n for n in at if n not in watch.raw]:
                problems = [f"{len(missing)} of {len(at)} writers not reached"]
            else:
                acted = [watch.acted[n] for n in at]
                problems = [
                    self._compare(self.hooked[n].point, watch.raw[n], now, [now])
                    for n, now in zip(at, acted, strict=True)
                ]
                problems.append(self._adds_up(watch.handed[layer], acted))
            bad += [f"{site} of layer {layer}: {problem}" for problem in problems if problem]
        return bad

    def _adds_up(self, handed: Handed, acted: Sequence[Tensor]) -> str | None:
        """Check that the next module gets exactly the sum of what the block was given and what its writers wrote, each
        multiplied by one number. Returns the problem, None if there is none."""
        taken = handed.taken or []
        if not self.summed:
            taken = [t for t in taken if not _among(t, handed.given)][:1]
        given = handed.given if self.summed else [t for t in handed.given if t.numel() == acted[0].numel()][:1]
        if not taken or not given or any(t.numel() != acted[0].numel() for t in (*taken, *given)):
            return "nothing takes what the block hands on"
        total, terms = self._whole(taken), torch.stack([self._whole(given), *(t.double() for t in acted)])
        allowed = ROUNDINGS * self.eps * _size([*taken, *given, *acted], self.bank.d_model)
        for factors in (torch.ones(len(terms)), scales(total, terms)):
            if factors is not None:
                off = (total - (terms * factors.to(terms).view(-1, 1, 1)).sum(0)).norm(dim=-1)
                if bool((off <= allowed).all()):
                    return None
        return "the block hands on more than its writers wrote"

    def _compare(self, point: HookPoint, raw: Tensor, now: Tensor, parts: Sequence[Tensor]) -> str | None:
        """Check that the change from `raw` to `now` is that of the operation applied once.

        Args:
            point: the hook point.
            raw: the stream before the operation, `[tokens, d_model]`.
            now: the stream that the next module got, `[tokens, d_model]`.
            parts: the tensors that sum to `now`.

        Returns:
            The problem, None if there is none.
        """
        bank_slice = self.bank.slices[point]
        v, axis = bank_slice.vectors[[ROW, min(AXIS, self.bank.rows)]].double()
        each = raw.shape[0] // len(CASES)
        change = now - raw
        for case, (name, mode, strength, shift, keeps) in enumerate(self.cases):
            own = slice(case * each, (case + 1) * each)
            if not strength:
                if not torch.equal(now[own], raw[own]):
                    return "for plain tokens too the next module takes something else than what is handed on"
                continue
            coefficients = shifted(bank_slice.coefficients[slot(ROW, mode)].double().unbind(), shift)
            along, across = component(raw[own], v), component(raw[own], axis)
            asked = [(v, amount(along, coefficients, strength))]
            if mode in TURNING:
                asked = list(zip((v, axis), turn(along, across, coefficients, strength), strict=True))
            moved = raw[own] + torch.stack([by[:, None] * row for row, by in asked]).sum(0)
            if keeps:
                moved = moved * restoring(*(x.square().sum(-1, keepdim=True) for x in (raw[own], moved)))
            due, summed = moved - raw[own], keeps * SUMMED * torch.finfo(torch.float32).eps
            for row, _ in asked:
                weighed = torch.stack(
                    [(p.double().reshape(raw.shape)[own] * row).square().sum(-1) for p in (*parts, raw)]
                )
                allowed = ROUNDINGS * self.eps * weighed.sum(0).sqrt() + summed * (moved @ row).abs() + 1e-30
                got, wanted = change[own] @ row, due @ row
                if not bool(((got - wanted).abs() <= allowed).all()):
                    worst = int(((got - wanted).abs() / allowed).argmax())
                    share = float(got[worst] / wanted[worst])
                    reason = " (it acts more than once)" if share > 1.2 else ""
                    return f"at {name} the next module gets {share:.2f} of the change that is due{reason}"
            rest = (change[own] - due).norm(dim=-1)
            allowed = ROUNDINGS * self.eps * _size(parts, self.bank.d_model)[own] + summed * moved.norm(dim=-1)
            if not bool((rest <= allowed).all()):
                return f"at {name} more changes than is due"
        return None


def same_norm(found: Tensor, due: Tensor, eps: float) -> bool:
    """Whether the outputs `[tokens, d_model]` of a norm are as due, to the rounding of a stream with this `eps`."""
    allowed = NORMED * eps + SUMMED * torch.finfo(torch.float32).eps
    return bool(((found - due).norm(dim=-1) <= allowed * due.norm(dim=-1)).all())


def _among(t: Tensor, others: Sequence[Tensor]) -> bool:
    """Whether `t` is equal to one of `others`."""
    return any(t.shape == other.shape and torch.equal(t, other.to(t.device)) for other in others)


def _size(parts: Sequence[Tensor], d_model: int) -> Tensor:
    """The root of the sum of the squared norms of `parts` at each token, `[tokens]` float64."""
    return torch.stack([p.double().reshape(-1, d_model).square().sum(-1) for p in parts]).sum(0).sqrt()


@contextmanager
def vector(bank: DirectionBank) -> Iterator[RequestSteer]:
    """Lend the steering of a request that steers by random unit vectors, a different one at each hook point, strongly
    enough for the change to show in any dtype."""
    generator, made = torch.Generator().manual_seed(1), RequestSteer.plain(bank.rank)
    with bank.borrowed() as row:
        for bank_slice in bank.slices.values():
            v = torch.randn(bank.d_model, dtype=torch.float32, generator=generator)
            bank_slice.write(row, v / v.norm(), dict.fromkeys(MODES, ABLATE))
        made.slots[0], made.strengths[0] = slot(row, "ablate"), max(2.0, math.sqrt(bank.d_model) / 2)
        yield made


def rest_is_dead(blocks: Sequence[nn.Module], run: Callable[[], Tensor], plain: Tensor, again: Tensor) -> bool:
    """Whether a pass gives the same result when blocks hand on zeros in place of everything after their first tensor.

    Args:
        blocks: the blocks.
        run: makes a pass, and returns its result.
        plain: the result of an unchanged pass.
        again: the result of another unchanged pass.
    """

    def alone(_module: nn.Module, _args: object, output: object) -> object:
        if not isinstance(output, tuple):
            return output
        rest = (torch.zeros_like(t) if isinstance(t, Tensor) and t.is_floating_point() else t for t in output[1:])
        return (output[0], *rest)

    with hooks([block.register_forward_hook(alone) for block in blocks]):
        return same(run(), plain, again)


def distance(a: Tensor, b: Tensor) -> float:
    """How far `a` is from `b`, relative to the norm of `b`."""
    return float((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30))


def same(now: Tensor, plain: Tensor, again: Tensor) -> bool:
    """Whether `now` is equal to the plain pass, as exactly as two plain passes, `plain` and `again`, are equal to each
    other on this hardware."""
    if torch.equal(plain, again):
        return torch.equal(now, plain)
    return min(distance(now, plain), distance(now, again)) <= 4 * distance(again, plain)
