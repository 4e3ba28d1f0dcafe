"""What a worker keeps beside the model and restores if it is lost: its directions, with the rows that may be reused,
and the tensors of the steering modules.

While an engine runs, weights can be reloaded, put to sleep, and moved, and each of these operations treats the buffers
of unknown modules in its own way. This module need not know the operations. Whatever was called, before the next step
every tensor is restored to its place, or the step fails with a clear message.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from steer.direction import Direction
from steer.direction import digest as digest_of
from steer.errors import NoRoom, UnsupportedModel
from steer.runtime.bank import DirectionBank
from steer.runtime.token_index import RequestSteer
from steer.spec import Spec
from steer.tokenization import Phase
from steer.vllm.steering_module import SteeringModule


class RowsInUse(NoRoom):
    """No row is free now, but rows will be when requests that are ending have left the workers."""


class Residents:
    """The directions of a worker. An unloaded one stays until its rows are needed, and its rows are not reused while a
    request that may still run here uses them: a request that a stop string ends is known to the front end first.

    All ranks of an engine see the same calls and steps in the same order, so they agree.
    """

    def __init__(self, bank: DirectionBank) -> None:
        self.bank = bank
        self.retired: dict[str, None] = {}
        self._holders: dict[str, set[str]] = {}  # by digest: the front ends that may send requests with it
        self._held: dict[str, list[Tensor]] = {}  # by digest: the content of its rows, on the host
        self._users: dict[str, tuple[str, ...]] = {}  # by request: its digests

    def meet(self, front_end: str) -> None:
        """A front end `INDEX:LIFE` has connected. An earlier one with the same index is gone, and holds nothing any
        more."""
        index = front_end.partition(":")[0]
        gone = {each for holders in self._holders.values() for each in holders if each.partition(":")[0] == index}
        for digest in tuple(self._held):
            for each in gone - {front_end}:
                self.retire(digest, each)

    def load(self, data: bytes, expected: str, front_end: str = "") -> str:
        """Make `data` resident for this front end. Returns its digest. Raises DirectionError, NoRoom or RowsInUse; then
        the served directions have not changed."""
        if expected not in self._held:
            found = digest_of(data)
            if found != expected:
                raise UnsupportedModel(f"the bytes that arrived have the digest {found}, {expected} was sent")
            direction = Direction.from_bytes(data)
            while True:
                try:
                    self.bank.load(found, direction)
                    break
                except NoRoom as error:
                    self._make_room(error, front_end)
            self._held[found] = [view.to("cpu", copy=True) for view in self.bank.contents(found)]
        self._holders.setdefault(expected, set()).add(front_end)
        self.retired.pop(expected, None)
        return expected

    def _make_room(self, error: NoRoom, front_end: str) -> None:
        if not self.retired:
            if all(front_end in holders for holders in self._holders.values()):
                raise error
            raise RowsInUse(f"{error} (other front ends still hold directions that this one has deleted)")
        used = {digest for digests in self._users.values() for digest in digests}
        oldest = next((digest for digest in self.retired if digest not in used), None)
        if oldest is None:
            raise RowsInUse(f"{error} (requests that are ending still hold the rows of deleted directions)")
        del self.retired[oldest], self._held[oldest], self._holders[oldest]
        self.bank.unload(oldest)

    def retire(self, digest: str, front_end: str = "") -> None:
        """No new request of this front end will use this version. Does nothing if it is not here."""
        if digest in self._held:
            self._holders[digest].discard(front_end)
            if not self._holders[digest]:
                self.retired[digest] = None

    def steer(self, request: str, spec: Spec, prompt: int, phase: Phase | None = None) -> RequestSteer:
        """The index entries of `request`, which uses these directions until `end`. `prompt`: how many tokens its prompt
        has; `phase`: its `Spec.phase`."""
        self._use(request, [e.digest for each in spec.entries for e in (each, each.condition) if e])
        steer = self.bank.steer(spec, prompt, phase)
        assert steer is not None, "the front end sends no empty spec"
        return steer

    def rows_of(self, request: str, digests: Sequence[str], axes: bool = False) -> NDArray[np.int64]:
        """The rows that `request` reads, and uses until `end`."""
        self._use(request, digests)
        return self.bank.rows_of(digests, axes)

    def _use(self, request: str, digests: Sequence[str]) -> None:
        if missing := [digest[:12] for digest in digests if digest not in self._held]:
            raise UnsupportedModel(
                f"the request {request} needs the directions {missing}, which this worker does not have: it has lost "
                "them, or the request was not made by this engine's front end; restart the engine"
            )
        self._users[request] = (*self._users.get(request, ()), *digests)

    def end(self, request: str) -> None:
        self._users.pop(request, None)

    def put_back(self) -> list[str]:
        """Restore the rows whose content has changed. Returns the digests of these directions."""
        lost: list[str] = []
        for digest, held in self._held.items():
            views = self.bank.contents(digest)
            wrong = [(v, kept) for v, kept in zip(views, held, strict=True) if not torch.equal(v.cpu(), kept)]
            for view, kept in wrong:
                view.copy_(kept)
            if wrong:
                lost.append(digest[:12])
        return lost


@dataclass(frozen=True, slots=True)
class _Attached:
    """A steering module and its tensors, its name on the hooked module, and the hooks of that module."""

    module: nn.Module
    name: str
    steering_module: SteeringModule
    tensors: Mapping[str, Tensor]
    hooks: frozenset[object]


class Kept:
    """The steering modules of `model` as they are now."""

    def __init__(self, model: nn.Module) -> None:
        self._attached = [
            _Attached(module, name, child, dict(child.named_buffers()), _hooks(module))
            for module in model.modules()
            for name, child in module.named_children()
            if isinstance(child, SteeringModule)
        ]
        tensors = [tensor for attached in self._attached for tensor in attached.tensors.values()]
        # captured graphs read these addresses
        self._addresses = {id(tensor): tensor.data_ptr() for tensor in tensors}
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
        self.nbytes = sum(storages.values())

    def put_back(self, model: nn.Module) -> list[str]:
        """Put every steering module and buffer of `model` back. Returns the names of those that were missing.

        Raises UnsupportedModel if that is impossible: blocks or hooks are gone, or memory has moved.
        """
        there = set(model.modules())
        mended: list[str] = []
        for attached in self._attached:
            kind = type(attached.module).__name__
            if attached.module not in there:
                raise UnsupportedModel(f"a {kind} that was steered has been replaced: restart the engine")
            if not attached.hooks <= _hooks(attached.module):
                raise UnsupportedModel(f"the hooks of a {kind} have been removed: restart the engine")
            if attached.module._modules.get(attached.name) is not attached.steering_module:
                setattr(attached.module, attached.name, attached.steering_module)
                mended.append(f"{kind}.{attached.name}")
            for name, tensor in attached.tensors.items():
                if tensor.data_ptr() != self._addresses[id(tensor)]:
                    raise UnsupportedModel(f"{kind}.{attached.name}.{name} has moved in memory: restart the engine")
                if attached.steering_module._buffers.get(name) is not tensor:
                    attached.steering_module._buffers.pop(name, None)
                    attached.steering_module.register_buffer(name, tensor, persistent=False)
                    mended.append(f"{kind}.{attached.name}.{name}")
        return mended


def _hooks(module: nn.Module) -> frozenset[object]:
    return frozenset([*module._forward_hooks, *module._forward_pre_hooks, vars(module).get("forward")])
