"""The token index: for each token of the running batch which rows act on it and how strongly, on the device.

`fill` is called once for each step, on the thread that runs the model, just before the forward pass is enqueued, with
the stream current that the pass will run on: its copies go to that stream, so they are ordered after the passes
before it and in front of this one. A caller whose pass runs on another stream must make that one current.
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
from steer.names import MODES, TURNING, Mode
from steer.runtime.combine import ALONE, Combination, Combinations
from steer.runtime.memory import CopyEvent, CopyQueue, copy_queue_to, lasting
from steer.spec import END
from steer.tokenization import Phase

T = TypeVar("T", bound="RequestSteer | None")
#: Sets of pinned memory used in turn: steps overlap, so the one before may still be read by its copy.
STAGES = 3
#: The entry of plain requests.
PLAIN = 0
#: Of the tokens of a step, on the device: their ids, and their positions in their requests, integers `[tokens]` each.
Tokens: TypeAlias = "tuple[Tensor, Tensor]"
#: Places in the table of decisions, more than an engine runs requests at once. The first is of tokens without a
#: condition, the second of tokens that decide each for itself.
DECISIONS, UNCONDITIONAL, EACH = 2**14, 0, 1


def slot(row: int, mode: Mode) -> int:
    """The number of a bank row in one mode. Each row has as many slots as there are modes, side by side."""
    return row * len(MODES) + MODES.index(mode)


def slots_of(row: int) -> slice:
    """All slots of a bank row, in the order of `MODES`."""
    return slice(row * len(MODES), (row + 1) * len(MODES))


def turns(slots: Tensor) -> Tensor:
    """Which of these slots are of modes that turn, bool."""
    return slots % len(MODES) >= len(MODES) - len(TURNING)


def bounds_of(span: tuple[int, int] | None) -> int:
    """One number for the hook points from the first to the last layer of `span`; None for all, that before block 0
    (layer −1) too. They are counted from there."""
    first, last = (0, 2**15 - 1) if span is None else (span[0] + 1, span[1] + 1)
    return first | last << 16


#: Of what acts at all layers.
ANYWHERE = bounds_of(None)


class Acts(NamedTuple):
    """What acts on some tokens: rows, slots and strengths `[rank, tokens]`; bounds `[rank, tokens]` int32, at which
    layers (`bounds_of`), None where all act at all; shifts `[rank, tokens]`, None where there are none; combinations
    `[tokens]`, the slot of the matrix by which they act together, None where each acts alone (always, where the rank is
    1)."""

    rows: Tensor
    slots: Tensor
    strengths: Tensor
    bounds: Tensor | None
    shifts: Tensor | None
    combinations: Tensor | None


class Conditional(NamedTuple):
    """Of some tokens `[tokens]` each: opened, bool, in place: where it is False nothing acts; deciding, int32, and
    thresholds, float32: how those decide (`op.decided`) that do, by their last row."""

    opened: Tensor
    deciding: Tensor
    thresholds: Tensor


def layout(rank: int) -> np.dtype[np.void]:
    """What the index has for a token, 4 bytes each: where the rank is above 1 also the slot of its combination, the
    place of its decision, how it decides, and its threshold (`Probe`)."""
    acts = [("slots", np.int32), ("strengths", np.float32), ("bounds", np.int32), ("shifts", np.float32)]
    more = [("combination", np.int32), ("decision", np.int32), ("deciding", np.int32), ("threshold", np.float32)]
    return np.dtype([*((name, kind, (rank,)) for name, kind in acts), *(more if rank > 1 else ())])


def fields(rank: int) -> int:
    """How many int32 that is on the device."""
    return layout(rank).itemsize // 4


def unpacked(packed: Tensor, rank: int, opened: Tensor | None = None) -> Acts:
    """What acts on tokens, of `packed` `[tokens, fields]` int32 (`layout`): all but the rows are views of it. `opened`
    `[tokens]` bool: where it is False all strengths are 0."""
    slots, strengths, bounds, shifts = (packed[:, part * rank : (part + 1) * rank].T for part in range(4))
    strengths, shifts = strengths.view(torch.float32), shifts.view(torch.float32)
    if opened is not None:
        strengths = torch.where(opened, strengths, 0.0)
    combinations = packed[:, 4 * rank] if rank > 1 else None
    return Acts(slots // len(MODES), slots, strengths, bounds, shifts, combinations)


def conditions(packed: Tensor, rank: int, opened: Tensor) -> Conditional:
    """How tokens decide, of the same `packed`, where the rank is above 1."""
    return Conditional(opened, packed[:, 4 * rank + 2], packed[:, 4 * rank + 3].view(torch.float32))


class Acting(NamedTuple):
    """What a step's entries do."""

    #: How many of the rank act on any token.
    depth: int
    #: Do these act on every token?
    everywhere: bool
    #: Are all entries alike?
    same: bool
    #: Does any entry combine directions, act at some layers alone, shift a gate, turn, or have a condition?
    combined: bool
    bounded: bool
    shifting: bool
    turning: bool
    conditional: bool


@dataclass(eq=False, slots=True)
class Decision:
    """The one decision of a request with a condition: its place in `Decisions`, whether a pass has made it, and whether
    the condition holds, None while the host does not know. Of a request that acts in a phase: its place, and whether
    that is laid out."""

    number: int
    made: bool = False
    holds: bool | None = None


@dataclass(frozen=True, slots=True)
class Probe:
    """How a token decides, by the component along the row in its last slot: see `op.decided`. With `each` all tokens do
    so, each for itself."""

    deciding: int
    threshold: float
    each: bool = False


class Decisions:
    """What requests have decided, on the device: `opened` `[DECISIONS]` bool, the first of it for those without a
    condition, the second, which is never open, for those whose tokens decide. `windows` `[4, DECISIONS]` int64 are the
    positions of phases: the first, and the first after them, as far as they are known (END), and the ids of the tokens
    that tell them, −1 for none. It outlives every index."""

    def __init__(self, device: torch.device | str) -> None:
        with lasting():
            self.opened = torch.zeros(DECISIONS, dtype=torch.bool, device=device)
            self.opened[UNCONDITIONAL] = True
            self.windows = torch.tensor([[0], [END], [-1], [-1]], device=device).repeat(1, DECISIONS)
        self._free = list(range(DECISIONS - 1, EACH, -1))

    def take(self, steer: T) -> T:
        """The same steering for one request, with a decision of its own where it has a condition or acts in a phase,
        until `give`."""
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
        """The request of a taken decision has ended."""
        if steer is not None and (decision := steer.decides):
            self._free.append(decision.number)

    def lay(self, number: int, phase: Phase | None) -> None:
        """What a place begins with. Only enqueued."""
        if phase is not None:
            self.opened[number].fill_(True)
        began, begins, ends = (True, -1, -1) if phase is None else (phase.begun, phase.begins, phase.ends)
        for window, value in zip(self.windows, (0 if began else END, END, begins, ends), strict=True):
            window[number].fill_(value)

    def followed(self, places: Tensor) -> Tensor:
        """Of which of these places tokens tell, bool."""
        return (self.windows[2:, places] >= 0).any(0)

    def follow(self, places: Tensor, tokens: Tokens) -> Tensor:
        """Which of some tokens are in the phases of these places, `[tokens]` each; bool. Signs among them are kept. One
        that was a draft and not taken has another token at its position when that comes again."""
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
    """One request's part of the index: slots `[rank]` int64 and strengths `[rank]` float32, zeros after its own, and in
    front those that turn, each with its axis after it; bounds `[rank]` int32 (`bounds_of`), None where all act at all
    layers; shifts `[rank]` float32, None where there are none; and what makes them act together, None where they are
    orthogonal or one. A request with a condition, or with a part that acts in a `phase` only, has a decision, which
    `Decisions.take` gives; the part in which a condition is decided has a probe.

    `then`: the positions, ascending, from which on something else acts, and what; none where these are for all tokens.
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

    @property
    def acting(self) -> RequestSteer:
        """The last part."""
        return self.then[-1][1] if self.then else self

    @property
    def decides(self) -> Decision | None:
        return self.acting.decision

    @classmethod
    def plain(cls, rank: int, combination: Combination | None = None) -> RequestSteer:
        return cls(np.zeros(rank, np.int64), np.zeros(rank, np.float32), combination)


def applied(steer: RequestSteer | None) -> bool | None:
    """Does the condition of a request hold, as far as the host knows? None for one without."""
    return None if steer is None or steer.decision is None else steer.decision.holds


#: What the host knows of an entry: where it ends, the entry that goes on there, the one that acts (PLAIN for none) and
#: the one that acts in the last part, with the position from which on that is so; the number of its combination, or 0.
PART = np.dtype([(name, np.int64) for name in ("stop", "next", "acting", "last", "since", "combined")])
#: How many tokens each request of a step has, and where they begin.
Counts: TypeAlias = NDArray[np.int64] | NDArray[np.int32]


class _Stages:
    """The host's side of an index in a device's own memory: sets that steps take in turn."""

    def __init__(self, like: Tensor, queue: CopyQueue) -> None:
        self._queue, self._turn = queue, 0
        with lasting():
            self._sets = [torch.zeros(like.shape, dtype=like.dtype, pin_memory=queue.pinned) for _ in range(STAGES)]
        self._copied: list[CopyEvent | None] = [None] * STAGES

    def next(self) -> Tensor:
        self._turn = (self._turn + 1) % STAGES
        if copied := self._copied[self._turn]:
            copied.synchronize()  # done long ago, unless steps run further ahead than there are stages
        return self._sets[self._turn]

    def send(self, to: Tensor, end: int) -> None:
        self._queue.copy(to[:end], self._sets[self._turn][:end])
        self._copied[self._turn] = self._queue.record_event()


@dataclass(slots=True)
class Losses:
    """Which tokens of one pass are lost, and what those that decide have decided, on their way to the host."""

    _flags: Tensor
    _copied: CopyEvent | None
    _opened: Tensor | None = None
    _deciders: Sequence[tuple[Decision, int]] = ()

    def first(self, lengths: Sequence[int] | NDArray[np.int32]) -> dict[int, int]:
        """By the number of a request, in batch order, with lost tokens: which of its `lengths[i]` tokens in the pass is
        the first of them. Also tells the decisions that were made in the pass what they are. Waits for its end."""
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
        """After `first`: of the same requests those that decided in the pass, and whether their conditions hold."""
        if not self._deciders:
            return {}
        requests = np.searchsorted(np.cumsum(lengths), [at for _, at in self._deciders], side="right")
        return {int(i): bool(decision.holds) for i, (decision, _) in zip(requests, self._deciders, strict=True)}


class TokenIndex:
    """`packed` `[max_tokens, fields]` int32 is what acts on each token (`unpacked`), written in place for ever, on a
    device by one copy; `lost` `[max_tokens]` bool is what the hook points write, and so is `opened`, where the rank has
    a row for conditions.

    A request that steers *enters* once and gets a number; a step names its requests by number, so that filling is a few
    numpy calls whatever the size of the batch. `queue` is the queue of copies to the device, None where the host writes
    its memory.
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
        self._acting = Acting(0, False, False, False, False, False, False, False)
        #: What has entered, by number; what a token of it has in the index; and what the host knows of it.
        self._steers: dict[int, RequestSteer] = {}
        self._entries, self._parts = np.zeros(0, layout(rank)), np.zeros(0, PART)
        self._free = list[int]()
        self._grow(16)
        self._free.remove(PLAIN)
        self._parts["stop"][PLAIN] = END
        self._home: Combinations | None = None
        #: Where the buffers have the place of a decision.
        self._decision = 4 * rank + 1
        #: How many entries have a decision (and do the buffers speak of any), act in a phase, and have tokens that each
        #: decide.
        self._conditional, self._speaks_of_conditions = 0, False
        self._in_phase, self._each = 0, 0
        #: Who decides in this step: entry, decision and token; and at which layers.
        self._deciders: list[tuple[int, Decision, int]] = []
        self.deciding: frozenset[int] = frozenset()
        #: Requests that have entered and whose steering is not the same at all tokens.
        self.phased = 0

    @property
    def active(self) -> bool:
        """Is any token of this step steered?"""
        return self._used > 0

    @property
    def used(self) -> int:
        """Tokens of this step, where any is steered."""
        return self._used

    def first(self, tokens: int, conditional: bool = False) -> Acts:
        """What acts on the first `tokens` of the batch; `conditional`: where their conditions hold."""
        opened = self.opened[:tokens] if conditional and self.opened is not None else None
        return unpacked(self.packed[:tokens], self.rank, opened)

    def enter(self, steer: RequestSteer) -> int:
        """The number under which steps name a request with this steering, until it `leave`s."""
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
        """Have so many more entries."""
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
        # no slot yet of what combines: the one of those that combine nothing is never its own
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
        """What had entered."""
        steer = self._steers[number]
        self.phased -= bool(steer.then)
        for _ in (steer, *steer.then):
            self._count(self._steers.pop(number), -1)
            self._free.append(number)
            number = int(self._parts["next"][number])
        return steer

    def reset(self) -> None:
        """Make every token plain, whatever the buffers hold now: they may have been lost or overwritten."""
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
        """Give `lengths[i]` tokens, in batch order, the steering that entered as `numbers[i]` (PLAIN for none); tokens
        after the last get none. `starts[i]` is the position of the first of them in its request, which must be given
        where any is `phased`; `tokens`, of the step or more, where any acts in a `Phase`. Returns how many tokens are
        steered.

        Nothing is copied where the step before was the same and no request has entered since (steady decode)."""
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
            return 0  # plain after plain: the buffers are zero already
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
        """Lay what was decided before beside the tokens of a step, and note who decides in it: the last of a part."""
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
        """After the pass is enqueued: what was decided in it is kept. Whose decisions, and by which tokens."""
        if not (decisions := self._deciders):
            return []
        opened, deciding, _ = self.conditional_of(self._used)
        places = self.packed[: self._used, self._decision].long()
        decided = (deciding != 0) & (places != EACH)  # others write what is there
        places = torch.where(decided, places, UNCONDITIONAL)
        self.decisions.opened.scatter_(0, places, torch.where(decided, opened, True))
        self._deciders, self._filled = [], None
        for number, decision, _ in decisions:
            decision.made, self._entries["deciding"][number] = True, 0
        return [(decision, at) for _, decision, at in decisions]

    def found(self) -> Tensor:
        """What a pass has found of each token up to here, uint8, for whoever goes on with it elsewhere."""
        lost = self.lost[: self._used].to(torch.uint8)
        return lost if self.opened is None else lost + 2 * self.opened[: self._used].to(torch.uint8)

    def go_on(self, found: Tensor) -> None:
        """Take over what the pass has `found` elsewhere, of tokens that were lost, have decided or were followed."""
        self.lost[: self._used].copy_(found & 1)
        if self._deciders or self._in_phase or self._each:
            opened, deciding, _ = self.conditional_of(self._used)
            followed = self.decisions.followed(self.packed[: self._used, self._decision].long())
            opened.copy_(torch.where((deciding != 0) | followed, (found & 2) != 0, opened))

    def conditional_of(self, tokens: int) -> Conditional:
        """Of the first `tokens` of the batch, as views of the buffers."""
        assert self.opened is not None
        return conditions(self.packed[:tokens], self.rank, self.opened[:tokens])

    def _parted(
        self, numbers: NDArray[np.int64], lengths: Counts, starts: Counts
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The same tokens with a number for each part of a request, one after the other."""
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
        """What the pass that was enqueued last has lost; None where nothing of it was steered. The copy to the host is
        enqueued after it: whoever reads it with the pass's outputs does not wait for it."""
        if not self._used:
            return None
        decisions = self.keep()
        opened = self.opened if decisions else None
        found = [None if here is None else self._fetched(here[: self._used]) for here in (self.lost, opened)]
        assert found[0] is not None
        copied = None if self._queue is None else self._queue.record_event()
        return Losses(found[0], copied, found[1], decisions)

    def _fetched(self, here: Tensor) -> Tensor:
        """A copy that is on its way to the host."""
        if self._queue is None:
            return here.clone()
        flags = torch.empty(len(here), dtype=torch.bool, pin_memory=self._queue.pinned)
        self._queue.copy(flags, here)
        return flags

    def fill_with(
        self,
        steers: Sequence[RequestSteer | None],
        lengths: Sequence[int],
        starts: Sequence[int] | None = None,
        tokens: Tokens | None = None,
    ) -> int:
        """The same for requests that have not entered, None for a plain one."""
        entered = [PLAIN if steer is None else self.enter(steer) for steer in steers]
        try:
            numbers, counts = np.array(entered, np.int64), np.array(lengths, np.int64)
            if self.phased and numbers.any():
                assert starts is not None, "what acts depends on the position"
                numbers, counts = self._parted(numbers, counts, np.array(starts, np.int64))
            taken, combined = self._packed_entries[numbers], self._parts["combined"][numbers]
            _, slots, strengths, bounds, shifts, _ = unpacked(torch.from_numpy(taken), self.rank)
            given = strengths != 0
            depth = max(given.any(1).nonzero().flatten().tolist(), default=-1) + 1
            same = bool((taken == taken[:1]).all() and (combined == combined[:1]).all())
            bounded = bool((given & (bounds != ANYWHERE)).any())
            shifting = bool((given & (shifts != 0)).any())
            conditional = self.rank > 1 and bool(self._entries["decision"][numbers].any())
            everywhere = bool(given[:depth].all()) and not bounded and not conditional
            same = same and not conditional
            turning = bool((given & turns(slots)).any())
            self._acting = Acting(
                depth, everywhere, same, bool(combined.any()), bounded, shifting, turning, conditional
            )
            return self._fill(numbers, counts, tokens)
        finally:
            for number in entered:
                if number != PLAIN:
                    self.leave(number)

    def acting(self, count: int) -> tuple[Acts, bool, bool]:
        """What acts on the first `count` entries: `[depth, count, 1]` and combinations `[count, 1]`, or `[depth, 1]`
        and `[1]` where it is the same for all; whether it acts on every one of them, and whether any of it turns.
        `depth` is how many of the rank act on any. For an eager pass after `fill_with`: what is compiled reads the
        buffers themselves."""
        depth, everywhere, same, combined, bounded, shifting, turning, conditional = self._acting
        whole = self._used == count
        part = np.s_[:depth,] if same and whole else np.s_[:depth, :, None]
        acts = self.first(1 if same and whole else count, conditional)
        rows, slots, strengths, bounds, shifts, combinations = acts
        combinations = combinations[part[1:]] if combined and combinations is not None else None
        bounds = bounds[part] if bounded and bounds is not None else None
        shifts = shifts[part] if shifting and shifts is not None else None
        # int64 is what indexing takes outside of compiled code
        acts = Acts(rows[part].long(), slots[part].long(), strengths[part], bounds, shifts, combinations)
        return acts, everywhere and whole, turning

    def _combine(self, numbers: NDArray[np.int64]) -> bool:
        """Have the combinations of this step in slots of the device. In a steady step these are two looks at arrays.
        Returns whether any of them was put into another slot."""
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
