"""Combinations: the matrices M (see `op`) of requests whose directions are not orthogonal, where hooks read them.

A combination has one matrix for each hook point. They are computed once, on the host. A step that needs a combination
finds it in one of the device's slots, or a copy that is enqueued before the pass writes it into a slot. There is a slot
for each request that one step can have, so no set of requests can use up the slots. A new combination takes the slot
that was not used for the longest time.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from steer.runtime.memory import copies_from_pinned, lasting

#: The slot of requests that combine no directions. It holds the identity.
ALONE = 0
_numbers = itertools.count(1)


class HasJoint(Protocol):
    """A hook point with a tensor `joint`, `[slots, rank, rank]` float32, which a hook reads."""

    joint: Tensor | None


@dataclass(frozen=True, eq=False)  # no slots: banks refer to it weakly
class Combination:
    """The matrices by which the directions of a request act together.

    Attributes:
        matrices: `[hook points, rank, rank]` float32, on the host.
        home: the slots into which the matrices are written.
        number: unique in this process, so that a slot can record which combination it holds.
    """

    matrices: Tensor
    home: Combinations
    number: int = field(default_factory=lambda: next(_numbers))


class Combinations:
    """The slots of all hook points of one bank.

    Args:
        points: the hook points. Their `joint` is allocated here.
        rank: the most rows that one request can use.
        device: where the slots are.
        capacity: the number of slots beside ALONE, fixed for ever, because compiled code reads the tensors in place.
            If None, more slots are made when a step needs them; this is for passes that look the tensors up each time.
    """

    def __init__(
        self, points: Sequence[HasJoint], rank: int, device: torch.device | str, capacity: int | None = None
    ) -> None:
        self._points, self._rank, self._fixed = points, rank, capacity is not None
        self._device = torch.device(device)
        self._make(capacity or 1)

    @property
    def capacity(self) -> int:
        return len(self._held) - 1

    def reserve(self, numbers: NDArray[np.int64]) -> None:
        """Make enough slots for a step with these combinations, several of which may be equal. With a fixed `capacity`
        there are always enough."""
        if len(numbers) > self.capacity and (count := len(np.unique(numbers))) > self.capacity:
            assert not self._fixed, f"a step of {count} combinations of directions, {self.capacity} were told"
            self._make(2 * count)

    def stale(self, slots: NDArray[np.int64], numbers: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Whether each of these combinations, given by number, is not (or no longer) in the slot that was assigned to
        it."""
        return self._held[slots] != numbers

    def use(self, slots: NDArray[np.int64], missing: Sequence[Combination] = ()) -> list[int]:
        """Mark `slots` as used by a new step, and assign a slot to each of the `missing` combinations.

        Returns:
            The slot of each of the `missing` combinations.
        """
        self._step += 1
        self._used[slots] = self._step
        self._used[ALONE] = self._step
        return [self._assign(combination) for combination in missing]

    def renew(self) -> None:
        """Write the identity again and empty all slots. This is for device memory whose content was lost."""
        self._held[:], self._used[:] = -1, 0
        self._held[ALONE] = 0
        self._slots: dict[int, int] = {}
        self._holders: list[Combination | None] = [None] * len(self._held)
        for point in self._points:
            assert point.joint is not None
            point.joint.copy_(torch.eye(self._rank))

    def _make(self, capacity: int) -> None:
        with lasting():
            for point in self._points:
                point.joint = torch.empty(
                    capacity + 1, self._rank, self._rank, dtype=torch.float32, device=self._device
                )
        self._held = np.zeros(capacity + 1, np.int64)
        self._used = np.zeros(capacity + 1, np.int64)
        self._step = 0
        self.renew()

    def _assign(self, combination: Combination) -> int:
        slot = self._slots.get(combination.number)
        if slot is None:
            slot = int(self._used.argmin())
            assert self._used[slot] < self._step, "slots were reserved"
            if (before := self._holders[slot]) is not None:
                del self._slots[before.number]
            self._write(slot, combination.matrices)
            self._held[slot] = combination.number
            self._holders[slot] = combination  # kept, so that the next request with the same directions finds it
            self._slots[combination.number] = slot
        self._used[slot] = self._step
        return slot

    def _write(self, slot: int, matrices: Tensor) -> None:
        """Enqueue the copy on the current stream, after the passes that still read the slot's previous content."""
        if copies_from_pinned(self._device):
            matrices = matrices.pin_memory()  # its allocator frees it once the copy is done
        own = matrices.to(self._device, non_blocking=True)
        torch._foreach_copy_([point.joint[slot] for point in self._points if point.joint is not None], own.unbind(0))
