"""The token index: which rows act on each token of the running batch, and how strongly. It is on the device.

`fill` is called once for each step, on the thread that runs the model, just before the forward pass is enqueued. It
enqueues its copies on the current stream, which must be the stream of the pass, so that the copies come after the
earlier passes and before this one. A caller whose pass runs on another stream must make that stream current.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeAlias, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from steer.errors import NoRoom
from steer.names import MODES, SHIFTING, TURNING, Mode
from steer.runtime.combine import ALONE, Combination, Combinations
from steer.runtime.memory import CopyEvent, CopyQueue, copy_queue_to, lasting
from steer.runtime.op import KEEPS
from steer.spec import END
from steer.tokenization import Phase

T = TypeVar("T", bound="RequestSteer | None")
#: The number of sets of pinned memory, which steps use in turn. Steps overlap, so the copy of an earlier step may still
#: read its set.
STAGES = 3
#: The number of the entry of plain requests.
PLAIN = 0
#: The ids of the tokens of a step and their positions in their requests: integers `[tokens]` each, on the device.
Tokens: TypeAlias = "tuple[Tensor, Tensor]"
#: The number of places in the table of decisions, more than the requests that an engine runs at once; the place of
#: tokens without a condition; and the place of tokens that each decide for themselves.
DECISIONS, UNCONDITIONAL, EACH = 2**14, 0, 1

_GATES = torch.tensor([mode in SHIFTING for mode in MODES], device="cpu")


def slot(row: int, mode: Mode) -> int:
    """The number of a bank row in one mode. Each row has as many slots as there are modes, side by side."""
    return row * len(MODES) + MODES.index(mode)


def slots_of(row: int) -> slice:
    """All slots of a bank row, in the order of `MODES`."""
    return slice(row * len(MODES), (row + 1) * len(MODES))


def turns(slots: Tensor) -> Tensor:
    """Whether each of these slots is of a mode that turns, bool."""
    return slots % len(MODES) >= len(MODES) - len(TURNING)


def gates(slots: Tensor) -> Tensor:
    """Whether each of these slots, on the host, is of a mode that has a gate, bool."""
    return _GATES[slots % len(MODES)]


def bounds_of(span: tuple[int, int] | None, keeps: bool = False) -> int:
    """How an entry acts, as one number: a range of layers, which are counted from 0 for the hook point before block 0
    (layer −1), and whether the norm is kept.

    Args:
        span: the first and the last layer; None for all hook points, including the one before block 0.
        keeps: whether the norm is kept.
    """
    first, last = (0, 2**15 - 1) if span is None else (span[0] + 1, span[1] + 1)
    return first | last << 16 | keeps * KEEPS


#: The bounds of entries that act at all layers and do not keep the norm.
ANYWHERE = bounds_of(None)


class Acts(NamedTuple):
    """The entries that act on some tokens.

    Attributes:
        rows: the bank rows, `[rank, tokens]`.
        slots: the slots, `[rank, tokens]`.
        strengths: the strengths, `[rank, tokens]`.
        bounds: the layers at which each entry acts, and whether it keeps the norm (`bounds_of`), `[rank, tokens]`
            int32; None if all entries act at all layers and none keeps the norm.
        shifts: the shifts of the gates, `[rank, tokens]`; None if there are none.
        combinations: the slot of the matrix by which the entries act together (`combine`), `[tokens]`; None if each
            entry acts alone, as is always the case if the rank is 1.
    """

    rows: Tensor
    slots: Tensor
    strengths: Tensor
    bounds: Tensor | None
    shifts: Tensor | None
    combinations: Tensor | None


class Conditional(NamedTuple):
    """The conditions of some tokens, `[tokens]` each.

    Attributes:
        opened: whether the entries of the token act, bool. It is a view, written in place.
        deciding: where the token decides (`op.decided`), by the component along its last row, int32; 0 for tokens that
            do not decide.
        thresholds: the threshold by which the token decides, float32.
    """

    opened: Tensor
    deciding: Tensor
    thresholds: Tensor


def layout(rank: int) -> np.dtype[np.void]:
    """The fields of the index for one token, 4 bytes each. If the rank is above 1, they include the slot of its
    combination, the place of its decision, how it decides, and its threshold (`Probe`)."""
    acts = [("slots", np.int32), ("strengths", np.float32), ("bounds", np.int32), ("shifts", np.float32)]
    more = [("combination", np.int32), ("decision", np.int32), ("deciding", np.int32), ("threshold", np.float32)]
    return np.dtype([*((name, kind, (rank,)) for name, kind in acts), *(more if rank > 1 else ())])


def fields(rank: int) -> int:
    """The number of int32 that `layout` takes for one token on the device."""
    return layout(rank).itemsize // 4


def unpacked(packed: Tensor, rank: int, opened: Tensor | None = None) -> Acts:
    """The entries that act on tokens. All tensors are views of `packed`, except the rows, and except the strengths if
    `opened` is given.

    Args:
        packed: the fields of the tokens (`layout`), `[tokens, fields]` int32.
        rank: the rank of the index.
        opened: `[tokens]` bool. The strengths of a token are 0 if its value is False.
    """
    slots, strengths, bounds, shifts = (packed[:, part * rank : (part + 1) * rank].T for part in range(4))
    strengths, shifts = strengths.view(torch.float32), shifts.view(torch.float32)
    if opened is not None:
        strengths = torch.where(opened, strengths, 0.0)
    combinations = packed[:, 4 * rank] if rank > 1 else None
    return Acts(slots // len(MODES), slots, strengths, bounds, shifts, combinations)


def conditions(packed: Tensor, rank: int, opened: Tensor) -> Conditional:
    """The conditions of tokens, from the same `packed` as in `unpacked`. The rank must be above 1."""
    return Conditional(opened, packed[:, 4 * rank + 2], packed[:, 4 * rank + 3].view(torch.float32))


class Acting(NamedTuple):
    """A summary of the entries of a step."""

    #: How many of the `rank` entries of a token are needed, at most.
    depth: int
    #: Whether all of these act on every token.
    everywhere: bool
    #: Whether all tokens have the same entries.
    same: bool
    #: Whether any entry combines directions, has bounds, shifts a gate, has a gate, turns, keeps the norm, or has a
    #: condition.
    combined: bool
    bounded: bool
    shifting: bool
    gated: bool
    turning: bool
    keeping: bool
    conditional: bool


@dataclass(eq=False, slots=True)
class Decision:
    """The one decision of a request with a condition, or the place of a request that acts in a phase.

    Attributes:
        number: its place in `Decisions`.
        made: whether a pass has made the decision; for a phase, whether the place has its first values.
        holds: whether the condition holds; None while the host does not know.
    """

    number: int
    made: bool = False
    holds: bool | None = None


@dataclass(frozen=True, slots=True)
class Probe:
    """How a token decides, by the component along the row in its last slot.

    Attributes:
        deciding: the layer at which it decides, and on which side (`op.decided`).
        threshold: the threshold of the component.
        each: whether every token decides for itself.
    """

    deciding: int
    threshold: float
    each: bool = False


class Decisions:
    """The decisions that requests have made, on the device. This table outlives every index.

    Attributes:
        opened: whether the request at each place acts, `[DECISIONS]` bool. The first place is for requests without a
            condition; the second, which is never open, is for requests whose tokens each decide.
        windows: the positions of phases, `[4, DECISIONS]` int64: the first position of the phase, the first position
            after it (both END while they are not known), and the ids of the tokens that begin and end the phase (−1 for
            none).
    """

    def __init__(self, device: torch.device | str) -> None:
        with lasting():
            self.opened = torch.zeros(DECISIONS, dtype=torch.bool, device=device)
            self.opened[UNCONDITIONAL] = True
            self.windows = torch.tensor([[0], [END], [-1], [-1]], device=device).repeat(1, DECISIONS)
        self._free = list(range(DECISIONS - 1, EACH, -1))

    def take(self, steer: T) -> T:
        """Return the steering for one request. If it has a condition or acts in a phase, it gets a decision of its own,
        which is reserved until `give`. Raises NoRoom if no place is free."""
        if steer is None or not steer.decides:
            return steer
        if not self._free:
            raise NoRoom(
                f"{DECISIONS - 2} requests with conditions or phases are there, and no more can be: try again shortly"
            )
        decision = Decision(self._free.pop())
        then = tuple((at, replace(part, decision=part.decision and decision)) for at, part in steer.then)
        return replace(steer, decision=steer.decision and decision, then=then)

    def give(self, steer: RequestSteer | None) -> None:
        """Free the decision of a request that has ended. `steer`: what `take` returned for it."""
        if steer is not None and (decision := steer.decides):
            self._free.append(decision.number)

    def lay(self, number: int, phase: Phase | None) -> None:
        """Write the first values of a place. The writes are only enqueued."""
        if phase is not None:
            self.opened[number].fill_(True)
        began, begins, ends = (True, -1, -1) if phase is None else (phase.begun, phase.begins, phase.ends)
        for window, value in zip(self.windows, (0 if began else END, END, begins, ends), strict=True):
            window[number].fill_(value)

    def followed(self, places: Tensor) -> Tensor:
        """Whether a token begins or ends the phase of each of these places, bool."""
        return (self.windows[2:, places] >= 0).any(0)

    def follow(self, places: Tensor, tokens: Tokens) -> Tensor:
        """Whether each token is in the phase of its place, `[tokens]` bool.

        The positions of tokens that begin or end a phase are recorded in `windows`. If such a token was a draft that
        was not accepted, its position comes again with another token, and the record is removed.

        Args:
            places: the place of each token, `[tokens]`.
            tokens: the ids and positions of the tokens, `[tokens]` each.
        """
        ids, positions = tokens[0], tokens[1].long()
        at, signs = self.windows[:, places].split(2)
        known = signs >= 0
        met = known & (ids == signs)
        void = known & (at == positions) & ~met
        each, ends = places.expand(2, -1), self.windows[:2]
        ends.scatter_reduce_(1, each, torch.where(void, END, -1), "amax")
        ends.scatter_reduce_(1, each, torch.where(met, positions, END), "amin")
        return (ends[0, places] <= positions) & (positions < ends[1, places])


@dataclass(frozen=True, slots=True)
class RequestSteer:
    """The entries of one request in the index.

    Attributes:
        slots: `[rank]` int64. The slots of modes that turn come first, each followed by the slot of its axis. Zeros
            follow the request's own slots.
        strengths: `[rank]` float32, in the same order.
        combination: the matrices by which the entries act together; None if there is only one entry, or the directions
            are orthogonal.
        bounds: the layers at which each entry acts, and whether it keeps the norm (`bounds_of`), `[rank]` int32; None
            if all act at all layers and none keeps the norm.
        then: the positions, ascending, from which other entries act, each with these entries; empty if the entries here
            act on all tokens.
        decision: the decision of a request with a condition, or of a part that acts in a `phase` only. `Decisions.take`
            assigns it.
        probe: how the tokens decide, for a part in which the condition is decided.
        phase: the phase in which the entries act, if they act in a phase only.
        shifts: the shifts of the gates, `[rank]` float32; None if there are none.
    """

    slots: NDArray[np.int64]
    strengths: NDArray[np.float32]
    combination: Combination | None = None
    bounds: NDArray[np.int32] | None = None
    then: tuple[tuple[int, RequestSteer], ...] = ()
    decision: Decision | None = None
    probe: Probe | None = None
    phase: Phase | None = None
    shifts: NDArray[np.float32] | None = None

    def part(self, start: int, count: int) -> RequestSteer | None:
        """The part of `count` tokens from the position `start`; None if they are in several, or if it is decided in the
        pass which of them are steered."""
        found, stop = self, END
        for at, after in self.then:
            if start < at:
                stop = at
                break
            found = after
        decided = found.decision is not None or found.probe is not None
        return None if decided or start + count > stop else found

    @property
    def acting(self) -> RequestSteer:
        """The last part."""
        return self.then[-1][1] if self.then else self

    @property
    def decides(self) -> Decision | None:
        """The decision of the last part, which is the decision of the request."""
        return self.acting.decision

    @classmethod
    def plain(cls, rank: int, combination: Combination | None = None) -> RequestSteer:
        return cls(np.zeros(rank, np.int64), np.zeros(rank, np.float32), combination)


def applied(steer: RequestSteer | None) -> bool | None:
    """Whether the condition of a request holds. None if it has no condition, or the host does not know yet."""
    return None if steer is None or steer.decision is None else steer.decision.holds


#: What the host knows of an entry: the position at which it ends; the entry that follows there; the entry that acts
#: (itself, or PLAIN if its strengths are 0); the entry that acts in the last part of the request, and the position from
#: which it acts; and the number of its combination, or 0.
PART = np.dtype([(name, np.int64) for name in ("stop", "next", "acting", "last", "since", "combined")])
#: One number for each request of a step: how many tokens it has, or the position of the first of them.
Counts: TypeAlias = NDArray[np.int64] | NDArray[np.int32]


class _Stages:
    """The host's copies of an index that is in a device's own memory: STAGES sets, which steps use in turn."""

    def __init__(self, like: Tensor, queue: CopyQueue) -> None:
        self._queue, self._turn = queue, 0
        with lasting():
            self._sets = [
                torch.zeros(like.shape, dtype=like.dtype, device="cpu", pin_memory=queue.pinned) for _ in range(STAGES)
            ]
        self._copied: list[CopyEvent | None] = [None] * STAGES

    def next(self) -> Tensor:
        """The next set, once the copy that read it last is done."""
        self._turn = (self._turn + 1) % STAGES
        if copied := self._copied[self._turn]:
            copied.synchronize()  # waits only if steps run ahead by more than STAGES
        return self._sets[self._turn]

    def send(self, to: Tensor, end: int) -> None:
        """Enqueue a copy of the first `end` tokens of the current set to `to`."""
        self._queue.copy(to[:end], self._sets[self._turn][:end])
        self._copied[self._turn] = self._queue.record_event()


@dataclass(slots=True)
class Losses:
    """Which tokens of one pass are lost, and the decisions that were made in it. The values are being copied to the
    host."""

    _flags: Tensor
    _copied: CopyEvent | None
    _opened: Tensor | None = None
    _deciders: Sequence[tuple[Decision, int]] = ()

    def first(self, lengths: Sequence[int] | NDArray[np.int32]) -> dict[int, int]:
        """The first lost token of each request that has lost tokens. Waits for the end of the pass, and stores the
        decisions that were made in it.

        Args:
            lengths: the number of tokens of each request in the pass, in batch order.

        Returns:
            By the index of a request in the batch: which of its tokens in the pass is its first lost token.
        """
        if self._copied is not None:
            self._copied.synchronize()
            self._copied = None
        for decision, at in self._deciders:
            assert self._opened is not None
            decision.holds = bool(self._opened[at])
        found = np.flatnonzero(self._flags.numpy())
        if not found.size:
            return {}
        ends = np.cumsum(lengths)
        requests, firsts = np.unique(np.searchsorted(ends, found, side="right"), return_index=True)
        starts = ends[requests] - np.asarray(lengths)[requests]
        return dict(zip(requests.tolist(), (found[firsts] - starts).tolist(), strict=True))

    def decided(self, lengths: NDArray[np.int32]) -> dict[int, bool]:
        """By the index of each request that decided in the pass: whether its condition holds. Call `first` before."""
        if not self._deciders:
            return {}
        requests = np.searchsorted(np.cumsum(lengths), [at for _, at in self._deciders], side="right")
        return {int(i): bool(decision.holds) for i, (decision, _) in zip(requests, self._deciders, strict=True)}


class TokenIndex:
    """The rows and strengths for each token of the running batch.

    A request that steers *enters* once and gets a number. A step names its requests by number, so that `fill` makes a
    few numpy calls whatever the size of the batch.

    Args:
        rank: the most rows that one request can use.
        max_tokens: the most tokens of one step.
        device: where the index is.
        queue: the queue of copies to the device; by default the queue of `device`, which is None if the host writes its
            memory directly.
        decisions: the table of decisions; by default a new one.

    Attributes:
        packed: the entries that act on each token (`unpacked`), `[max_tokens, fields]` int32. It is always written in
            place, on a device by one copy.
        lost: which tokens are lost, `[max_tokens]` bool. Hook points write it.
        opened: whether the entries of each token act, `[max_tokens]` bool. Hook points write it. None if the rank is 1,
            which has no row for conditions.
    """

    def __init__(
        self,
        rank: int,
        max_tokens: int,
        device: torch.device | str,
        queue: CopyQueue | None = None,
        decisions: Decisions | None = None,
    ) -> None:
        self.rank, self.max_tokens = rank, max_tokens
        device = torch.device(device)
        self.decisions = decisions or Decisions(device)
        queue = queue or copy_queue_to(device)
        with lasting():
            self.packed = torch.zeros(max_tokens, fields(rank), dtype=torch.int32, device=device)
            self.lost = torch.zeros(max_tokens, dtype=torch.bool, device=device)
            self.opened = torch.ones(max_tokens, dtype=torch.bool, device=device) if rank > 1 else None
        self._stages = None if queue is None else _Stages(self.packed, queue)
        self._queue = queue
        self._used = 0
        #: The numbers and lengths that the buffers hold; None when they may hold something else.
        self._filled: tuple[NDArray[np.int64], Counts] | None = None
        self._acting = Acting(0, *[False] * 9)
        #: The steering that has entered, by number; its fields in the index; and what the host knows of it.
        self._steers: dict[int, RequestSteer] = {}
        self._entries, self._parts = np.zeros(0, layout(rank)), np.zeros(0, PART)
        self._free = list[int]()
        self._grow(16)
        self._free.remove(PLAIN)
        self._parts["stop"][PLAIN] = END
        self._home: Combinations | None = None
        #: The column of `packed` that has the place of the decision.
        self._decision = 4 * rank + 1
        #: How many entries have a condition or a phase, and whether any entry in the buffers does; how many entries act
        #: in a phase; and how many have tokens that each decide.
        self._conditional, self._speaks_of_conditions = 0, False
        self._in_phase, self._each = 0, 0
        #: The decisions that are made in this step: entry, decision and token; and the layers at which tokens decide.
        self._deciders: list[tuple[int, Decision, int]] = []
        self.deciding: frozenset[int] = frozenset()
        #: How many requests have entered whose steering is not the same at all tokens.
        self.phased = 0

    @property
    def active(self) -> bool:
        """Whether any token of this step is steered."""
        return self._used > 0

    @property
    def used(self) -> int:
        """The number of tokens of this step, 0 if none is steered."""
        return self._used

    def first(self, tokens: int, conditional: bool = False) -> Acts:
        """The entries that act on the first `tokens` of the batch. With `conditional` the strengths are 0 where the
        condition of a token does not hold."""
        opened = self.opened[:tokens] if conditional and self.opened is not None else None
        return unpacked(self.packed[:tokens], self.rank, opened)

    def enter(self, steer: RequestSteer) -> int:
        """Add a request with this steering. Returns the number by which steps name it until it `leave`s."""
        number = self._enter(steer)
        self.phased += bool(steer.then)
        last = number
        for position, after in steer.then:
            following = self._enter(after)
            self._parts["stop"][last], self._parts["next"][last] = position, following
            last = following
            self._parts["last"][number], self._parts["since"][number] = self._parts["acting"][last], position
        return number

    def _grow(self, more: int) -> None:
        """Make room for `more` entries."""
        size = len(self._entries)
        self._free += range(size + more - 1, size - 1, -1)
        self._entries = np.concatenate([self._entries, np.zeros(more, self._entries.dtype)])
        self._packed_entries = self._entries.view(np.int32).reshape(size + more, -1)  # the same memory
        self._parts = np.concatenate([self._parts, np.zeros(more, PART)])

    def _enter(self, steer: RequestSteer) -> int:
        if not self._free:
            self._grow(len(self._entries))
        number = self._free.pop()
        self._filled = None
        self._steers[number] = steer
        self._count(steer, 1)
        place, deciding, threshold = UNCONDITIONAL, 0, 0.0
        if (decision := steer.decision) is not None:
            assert decision.number != UNCONDITIONAL, "it was taken"
            place = decision.number
            if not decision.made:
                self.decisions.lay(place, steer.phase)
            decision.made |= steer.phase is not None
        elif steer.probe is not None:
            place = EACH
        if (probe := steer.probe) is not None and not (decision and decision.made):
            deciding, threshold = probe.deciding, probe.threshold
        bounds = ANYWHERE if steer.bounds is None else steer.bounds
        shifts = 0.0 if steer.shifts is None else steer.shifts
        # A combination has no slot yet. ALONE marks this, because it is never the slot of a combination.
        more = (ALONE, place, deciding, threshold) if self.rank > 1 else ()
        self._entries[number] = (steer.slots, steer.strengths, bounds, shifts, *more)
        acting, combined = number if steer.strengths.any() else PLAIN, 0
        if combination := steer.combination:
            assert self._home in (None, combination.home), "an index speaks of one bank"
            self._home, combined = combination.home, combination.number
        self._parts[number] = (END, number, acting, acting, 0, combined)
        return number

    def _count(self, steer: RequestSteer, by: int) -> None:
        each = steer.decision is None and steer.probe is not None
        self._conditional += by * (each or steer.decision is not None)
        self._in_phase += by * (steer.phase is not None)
        self._each += by * each

    def leave(self, number: int) -> RequestSteer:
        """Remove a request. Returns its steering."""
        steer = self._steers[number]
        self.phased -= bool(steer.then)
        for _ in (steer, *steer.then):
            self._count(self._steers.pop(number), -1)
            self._free.append(number)
            number = int(self._parts["next"][number])
        return steer

    def reset(self) -> None:
        """Make every token plain, whatever the buffers hold. This is for buffers whose content was lost or
        overwritten."""
        self.packed.zero_()
        self.lost.zero_()
        if self.opened is not None:
            self.opened.fill_(True)
        self._used, self._filled = 0, None

    def fill(
        self,
        numbers: NDArray[np.int64],
        lengths: Counts,
        starts: Counts | None = None,
        tokens: Tokens | None = None,
    ) -> int:
        """Write which entries act on each token of the next pass.

        Nothing is copied if the step before was the same and no request has entered since (steady decode).

        Args:
            numbers: the number under which each request entered, in batch order; PLAIN for plain requests.
            lengths: how many tokens each request has in the step. Tokens after the last of them are plain.
            starts: the position of the first of these tokens in its request. Needed if any request is `phased`.
            tokens: the tokens of the step, and perhaps more after them. Needed if any request acts in a `Phase`.

        Returns:
            How many tokens are steered.
        """
        if self.phased and numbers.any():
            assert starts is not None, "what acts depends on the position"
            if (starts >= self._parts["since"][numbers]).all():  # steady decode: all are in their last parts
                numbers = self._parts["last"][numbers]
            else:
                numbers, lengths = self._parted(numbers, lengths, starts)
        return self._fill(numbers, lengths, tokens)

    def _fill(self, numbers: NDArray[np.int64], lengths: Counts, tokens: Tokens | None) -> int:
        steered = int(lengths[numbers != PLAIN].sum()) if numbers.any() else 0
        total = int(lengths.sum()) if steered else 0
        assert total <= self.max_tokens, f"a step of {total} tokens in an index of {self.max_tokens}"
        end = max(total, self._used)
        if not end:
            return 0  # this step and the one before are plain: the buffers are zero already
        self.lost.zero_()
        moved = bool(total) and self._combine(numbers)
        if moved or not (self._filled and all(map(np.array_equal, self._filled, (numbers, lengths)))):
            array = (self.packed if self._stages is None else self._stages.next())[:end].numpy()
            if total:
                np.take(
                    self._packed_entries, np.repeat(numbers, lengths), axis=0, out=array[:total], mode="clip"
                )  # no copy
            array[total:] = 0
            if self._stages is not None:
                self._stages.send(self.packed, end)
        elif not self._in_phase and not self._each:
            return steered
        if self._conditional or self._speaks_of_conditions:
            self._open(numbers, lengths, end)
        if self._in_phase and total:
            assert self.opened is not None
            assert tokens is not None, "what acts depends on the tokens"
            places = self.packed[:total, self._decision].long()
            self.opened[:total].logical_and_(self.decisions.follow(places, (tokens[0][:total], tokens[1][:total])))
        self._used, self._filled = total, (numbers.copy(), lengths.copy())
        return steered

    def _open(self, numbers: NDArray[np.int64], lengths: Counts, end: int) -> None:
        """Write earlier decisions into `opened` for the tokens of a step, and note the decisions that are made in it.
        The last token of a part makes the decision."""
        assert self.opened is not None
        torch.index_select(self.decisions.opened, 0, self.packed[:end, self._decision], out=self.opened[:end])
        how, places = self._entries["deciding"][numbers], self._entries["decision"][numbers]
        ends, once = np.cumsum(lengths), np.flatnonzero((how != 0) & (places != EACH))
        self._deciders = [
            (number, decision, int(end) - 1)
            for number, end in zip(numbers[once].tolist(), ends[once], strict=True)
            if (decision := self._steers[number].decision)
        ]
        self.deciding = frozenset(np.abs(how[how != 0]) - 1)
        self._speaks_of_conditions = bool(places.any())

    def keep(self) -> list[tuple[Decision, int]]:
        """Store the decisions that the pass makes. Call this after the pass is enqueued. Returns the decisions, each
        with the token that makes it."""
        if not (decisions := self._deciders):
            return []
        opened, deciding, _ = self.conditional_of(self._used)
        places = self.packed[: self._used, self._decision].long()
        decided = (deciding != 0) & (places != EACH)  # all other tokens write True to UNCONDITIONAL
        places = torch.where(decided, places, UNCONDITIONAL)
        self.decisions.opened.scatter_(0, places, torch.where(decided, opened, True))
        self._deciders, self._filled = [], None
        for number, decision, _ in decisions:
            decision.made, self._entries["deciding"][number] = True, 0
        return [(decision, at) for _, decision, at in decisions]

    def found(self) -> Tensor:
        """The state of each token after the hook points so far, `[tokens]` uint8, for the rank of a pipeline that
        continues the pass: bit 0 for lost, bit 1 for opened."""
        lost = self.lost[: self._used].to(torch.uint8)
        return lost if self.opened is None else lost + 2 * self.opened[: self._used].to(torch.uint8)

    def go_on(self, found: Tensor) -> None:
        """Take over the state that `found` returned on the rank before: which tokens were lost, and for tokens that
        decide or whose phase is followed, whether they are opened."""
        self.lost[: self._used].copy_(found & 1)
        if self._deciders or self._in_phase or self._each:
            opened, deciding, _ = self.conditional_of(self._used)
            followed = self.decisions.followed(self.packed[: self._used, self._decision].long())
            opened.copy_(torch.where((deciding != 0) | followed, (found & 2) != 0, opened))

    def conditional_of(self, tokens: int) -> Conditional:
        """The conditions of the first `tokens` of the batch, as views of the buffers."""
        assert self.opened is not None
        return conditions(self.packed[:tokens], self.rank, self.opened[:tokens])

    def _parted(
        self, numbers: NDArray[np.int64], lengths: Counts, starts: Counts
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The numbers and lengths of the same tokens, with an item for each part of a request in place of one for each
        request."""
        at, ends = starts, starts + lengths
        parts: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []
        while True:
            taken = np.maximum(np.minimum(self._parts["stop"][numbers], ends) - at, 0)
            parts.append((self._parts["acting"][numbers], taken))
            at = at + taken
            if (at == ends).all():
                break
            numbers = self._parts["next"][numbers]
        flat, counts = (np.stack(each, 1).ravel() for each in zip(*parts, strict=True))
        return flat[counts > 0], counts[counts > 0]

    def losses(self) -> Losses | None:
        """The losses of the pass that was enqueued last; None if none of its tokens was steered.

        The copy to the host is enqueued after the pass, so a caller that reads it with the outputs of the pass does not
        wait longer.
        """
        if not self._used:
            return None
        decisions = self.keep()
        opened = self.opened if decisions else None
        found = [None if here is None else self._fetched(here[: self._used]) for here in (self.lost, opened)]
        assert found[0] is not None
        copied = None if self._queue is None else self._queue.record_event()
        return Losses(found[0], copied, found[1], decisions)

    def _fetched(self, here: Tensor) -> Tensor:
        """A copy of `here` on the host, which is complete once the queue has reached it."""
        if self._queue is None:
            return here.clone()
        flags = torch.empty(len(here), dtype=torch.bool, device="cpu", pin_memory=self._queue.pinned)
        self._queue.copy(flags, here)
        return flags

    def fill_with(
        self,
        steers: Sequence[RequestSteer | None],
        lengths: Sequence[int],
        starts: Sequence[int] | None = None,
        tokens: Tokens | None = None,
    ) -> int:
        """Fill the index as `fill` does, for requests that have not entered. steers: None for a plain request."""
        entered = [PLAIN if steer is None else self.enter(steer) for steer in steers]
        try:
            numbers, counts = np.array(entered, np.int64), np.array(lengths, np.int64)
            if self.phased and numbers.any():
                assert starts is not None, "what acts depends on the position"
                numbers, counts = self._parted(numbers, counts, np.array(starts, np.int64))
            taken, combined = self._packed_entries[numbers], self._parts["combined"][numbers]
            _, slots, strengths, bounds, shifts, _ = unpacked(torch.from_numpy(taken), self.rank)
            assert bounds is not None
            given = strengths != 0
            depth = max(given.any(1).nonzero().flatten().tolist(), default=-1) + 1
            same = bool((taken == taken[:1]).all() and (combined == combined[:1]).all())
            bounded = bool((given & (bounds != ANYWHERE)).any())
            shifting = bool((given & (shifts != 0)).any())
            conditional = self.rank > 1 and bool(self._entries["decision"][numbers].any())
            everywhere = bool(given[:depth].all()) and not bounded and not conditional
            same = same and not conditional
            gated = bool((given & gates(slots)).any())
            turning = bool((given & turns(slots)).any())
            keeping = bounded and bool((given & ((bounds & KEEPS) != 0)).any())
            self._acting = Acting(
                depth, everywhere, same, bool(combined.any()), bounded, shifting, gated, turning, keeping, conditional
            )
            return self._fill(numbers, counts, tokens)
        finally:
            for number in entered:
                if number != PLAIN:
                    self.leave(number)

    def acting(self, count: int) -> tuple[Acts, bool, bool, bool, bool]:
        """The entries that act on the first `count` tokens or rows that `fill_with` was called for.

        This is for eager passes. Compiled code reads the buffers themselves.

        Returns:
            The entries, `[depth, count, 1]` with combinations `[count, 1]`, or `[depth, 1]` and `[1]` if they are the
            same for all, with `depth` as in `Acting`; whether they act on every token; and whether any of them has a
            gate, turns, and keeps the norm.
        """
        depth, everywhere, same, combined, bounded, shifting, gated, turning, keeping, conditional = self._acting
        whole = self._used == count
        part = np.s_[:depth,] if same and whole else np.s_[:depth, :, None]
        acts = self.first(1 if same and whole else count, conditional)
        rows, slots, strengths, bounds, shifts, combinations = acts
        combinations = combinations[part[1:]] if combined and combinations is not None else None
        bounds = bounds[part] if bounded and bounds is not None else None
        shifts = shifts[part] if shifting and shifts is not None else None
        # indexing outside of compiled code takes int64
        acts = Acts(rows[part].long(), slots[part].long(), strengths[part], bounds, shifts, combinations)
        return acts, everywhere and whole, gated, turning, keeping

    def _combine(self, numbers: NDArray[np.int64]) -> bool:
        """Put the combinations of this step into slots of the device. In a steady step this only compares two arrays.

        Returns:
            Whether any combination was put into another slot.
        """
        if self._home is None:
            return False
        combined = numbers[self._parts["combined"][numbers] != 0]
        if not combined.size:
            return False
        slots, known = self._entries["combination"][combined], self._parts["combined"][combined]
        self._home.reserve(known)
        stale = self._home.stale(slots, known)
        missing = np.unique(combined[stale]).tolist()
        asked = [each for number in missing if (each := self._steers[number].combination)]
        self._entries["combination"][missing] = self._home.use(slots[~stale], asked)
        return bool(missing)
