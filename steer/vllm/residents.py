"""The directions of one worker: its bank, which rows may be freed for others, and what each row must hold."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from steer.direction import Direction
from steer.direction import digest as digest_of
from steer.errors import NoRoom, UnsupportedModel
from steer.runtime.bank import DirectionBank
from steer.runtime.token_index import RequestSteer
from steer.spec import Spec
from steer.tokenization import Phase


class RowsInUse(NoRoom):
    """Rows will be free when requests that are ending have left the workers."""


class Residents:
    """What was unloaded stays until its rows are needed, and no row is given to another direction while a request that
    may still run here uses it: a request stopped by a string ends in the front end before it ends here.

    All ranks of an engine see the same calls and steps in the same order, so they agree.
    """

    def __init__(self, bank: DirectionBank) -> None:
        self.bank = bank
        self.retired: dict[str, None] = {}
        self._holders: dict[str, set[str]] = {}  # by digest: the front ends that may send requests with it
        self._held: dict[str, list[Tensor]] = {}  # by digest: what its rows hold, on the host
        self._users: dict[str, tuple[str, ...]] = {}  # by request: digests

    def meet(self, front_end: str) -> None:
        """A front end is there, `INDEX:LIFE`. What one with the same index held before it has ended with that."""
        index = front_end.partition(":")[0]
        gone = {each for holders in self._holders.values() for each in holders if each.partition(":")[0] == index}
        for digest in tuple(self._held):
            for each in gone - {front_end}:
                self.retire(digest, each)

    def load(self, data: bytes, expected: str, front_end: str = "") -> str:
        """Make `data` resident for this front end. Returns its digest; raises DirectionError, NoRoom or RowsInUse, then
        nothing that is served has changed."""
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
        """No new request of this front end will use it. One that never got here is nothing to retire."""
        if digest in self._held:
            self._holders[digest].discard(front_end)
            if not self._holders[digest]:
                self.retired[digest] = None

    def steer(self, request: str, spec: Spec, prompt: int, phase: Phase | None = None) -> RequestSteer:
        """The index entries of `request`, of `prompt` tokens and in this `Spec.phase`, which uses these directions
        until it `ends`."""
        self._use(request, [e.digest for each in spec.entries for e in (each, each.condition) if e])
        steer = self.bank.steer(spec, prompt, phase)
        assert steer is not None, "the front end sends no empty spec"
        return steer

    def rows_of(self, request: str, digests: Sequence[str], axes: bool = False) -> NDArray[np.int64]:
        """The rows that `request` reads, which it uses until it `ends`."""
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
        """Write what a direction's rows should hold wherever they do not; the digests of those."""
        lost: list[str] = []
        for digest, held in self._held.items():
            views = self.bank.contents(digest)
            wrong = [(v, kept) for v, kept in zip(views, held, strict=True) if not torch.equal(v.cpu(), kept)]
            for view, kept in wrong:
                view.copy_(kept)
            if wrong:
                lost.append(digest[:12])
        return lost
