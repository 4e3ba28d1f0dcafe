"""The token index: for each token of the running batch which rows act on it and how strongly, on the device.

`fill` is called once for each step, on the thread that runs the model, just before the forward pass is enqueued. Its
copies go to the stream that the pass will run on, so they are ordered behind the passes before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from steer.direction import MODES

#: Sets of pinned memory used in turn: steps overlap, so the one before may still be read by its copy.
STAGES = 3
#: The entry of plain requests.
PLAIN = 0
#: rows, slots and strengths of some tokens.
Buffers: TypeAlias = tuple[Tensor, Tensor, Tensor]


class Acting(NamedTuple):
    """Of a step's entries: how many of the rank act on any, whether these act on each, whether all are alike."""

    depth: int
    everywhere: bool
    same: bool


@dataclass(frozen=True, slots=True)
class RequestSteer:
    """One request's part of the index: slots `[rank]` int64 and strengths `[rank]` float32, zeros behind its own."""

    slots: NDArray[np.int64]
    strengths: NDArray[np.float32]

    @classmethod
    def plain(cls, rank: int) -> RequestSteer:
        return cls(np.zeros(rank, np.int64), np.zeros(rank, np.float32))


class _Stage:
    """Host side of one step on a device with memory of its own."""

    def __init__(self, rank: int, max_tokens: int, device: torch.device) -> None:
        def make(dtype: torch.dtype) -> Tensor:
            return torch.zeros(rank, max_tokens, dtype=dtype, pin_memory=device.type in ("cuda", "xpu"))

        self.rows, self.slots, self.strengths = make(torch.int64), make(torch.int64), make(torch.float32)
        self.copied: torch.Event | None = None


class TokenIndex:
    """rows, slots `[rank, max_tokens]` int64 and strengths `[rank, max_tokens]` float32, written in place for ever.

    A request that steers *enters* once and gets a number; a step names its requests by number, so that filling is a few
    numpy calls whatever the size of the batch.
    """

    def __init__(self, rank: int, max_tokens: int, device: torch.device | str) -> None:
        self.rank, self.max_tokens = rank, max_tokens
        device = torch.device(device)
        self.rows = torch.zeros(rank, max_tokens, dtype=torch.int64, device=device)
        self.slots = torch.zeros(rank, max_tokens, dtype=torch.int64, device=device)
        self.strengths = torch.zeros(rank, max_tokens, dtype=torch.float32, device=device)
        self._stages = [] if device.type == "cpu" else [_Stage(rank, max_tokens, device) for _ in range(STAGES)]
        self._turn = 0
        self._used = 0
        self._acting = Acting(0, False, False)
        self._entry_slots = np.zeros((rank, 16), np.int64)
        self._entry_strengths = np.zeros((rank, 16), np.float32)
        self._free = list(range(15, PLAIN, -1))

    @property
    def active(self) -> bool:
        """Is any token of this step steered?"""
        return self._used > 0

    def enter(self, steer: RequestSteer) -> int:
        """The number under which steps name a request with this steering, until it `leave`s."""
        if not self._free:
            size = self._entry_slots.shape[1]
            self._free = list(range(2 * size - 1, size - 1, -1))
            self._entry_slots = np.pad(self._entry_slots, ((0, 0), (0, size)))
            self._entry_strengths = np.pad(self._entry_strengths, ((0, 0), (0, size)))
        number = self._free.pop()
        self._entry_slots[:, number], self._entry_strengths[:, number] = steer.slots, steer.strengths
        return number

    def leave(self, number: int) -> None:
        self._free.append(number)

    def reset(self) -> None:
        """Make every token plain, whatever the buffers hold now: they may have been lost or overwritten."""
        for tensor in (self.rows, self.slots, self.strengths):
            tensor.zero_()
        self._used = 0

    def fill(self, numbers: NDArray[np.int64], lengths: NDArray[np.int64] | NDArray[np.int32]) -> int:
        """Give `lengths[i]` tokens, in batch order, the steering that entered as `numbers[i]` (PLAIN for none); tokens
        behind the last get none. Returns how many tokens are steered."""
        steered = int(lengths[numbers != PLAIN].sum()) if numbers.any() else 0
        total = int(lengths.sum()) if steered else 0
        assert total <= self.max_tokens, f"a step of {total} tokens in an index of {self.max_tokens}"
        end = max(total, self._used)
        if not end:
            return 0  # plain after plain: the buffers are zero already
        stage = self._next_stage()
        rows, slots, strengths = (t[:, :end].numpy() for t in (stage.rows, stage.slots, stage.strengths))
        if total:
            tokens = np.repeat(numbers, lengths)
            np.take(self._entry_slots, tokens, axis=1, out=slots[:, :total])
            np.take(self._entry_strengths, tokens, axis=1, out=strengths[:, :total])
            np.floor_divide(slots[:, :total], len(MODES), out=rows[:, :total])
        for array in (rows, slots, strengths):
            array[:, total:] = 0
        self._send(stage, end)
        self._used = total
        return steered

    def fill_with(self, steers: Sequence[RequestSteer | None], lengths: Sequence[int]) -> int:
        """The same for requests that have not entered, None for a plain one."""
        numbers = [PLAIN if steer is None else self.enter(steer) for steer in steers]
        entries = np.array(numbers, np.int64)
        slots, strengths = self._entry_slots[:, entries], self._entry_strengths[:, entries]
        given = strengths != 0
        depth = int(np.flatnonzero(given.any(axis=1)).max(initial=-1)) + 1
        same = (slots == slots[:, :1]).all() and (strengths == strengths[:, :1]).all()
        self._acting = Acting(depth, bool(given[:depth].all()), bool(same))
        try:
            return self.fill(entries, np.array(lengths, np.int64))
        finally:
            for number in numbers:
                if number != PLAIN:
                    self.leave(number)

    def acting(self, count: int) -> tuple[Buffers, bool]:
        """rows, slots and strengths `[depth, count, 1]` of the first `count` entries, `[depth, 1]` where all are the
        same, and whether every one of them acts. `depth` is how many of the rank act on any. For an eager pass behind
        `fill_with`: what is compiled reads the buffers themselves."""
        depth, everywhere, same = self._acting
        whole = self._used == count
        part = np.s_[:depth, :1] if same and whole else np.s_[:depth, :count, None]
        rows, slots, strengths = (t[part] for t in (self.rows, self.slots, self.strengths))
        return (rows, slots, strengths), everywhere and whole

    def _next_stage(self) -> TokenIndex | _Stage:
        if not self._stages:
            return self  # a CPU's host side is the buffers themselves
        self._turn = (self._turn + 1) % STAGES
        stage = self._stages[self._turn]
        if stage.copied is not None:
            stage.copied.synchronize()  # done long ago, unless steps run further ahead than there are stages
        return stage

    def _send(self, stage: TokenIndex | _Stage, end: int) -> None:
        if not isinstance(stage, _Stage):
            return
        for to, source in ((self.rows, stage.rows), (self.slots, stage.slots), (self.strengths, stage.strengths)):
            for j in range(self.rank):  # row by row: each is one contiguous copy
                to[j, :end].copy_(source[j, :end], non_blocking=True)
        if stage.copied is None:
            stage.copied = torch.Event(self.rows.device)
        stage.copied.record()
