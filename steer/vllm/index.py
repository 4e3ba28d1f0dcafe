"""The token index of a worker: for each token of the running step its rows, slots and strengths, on the device.

`fill` runs on the worker's main thread, just before the step's forward pass is enqueued; its copies go to the stream
that the forward pass will run on, so they are ordered behind the passes before it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from steer.direction import MODES
from steer.runtime.table import RequestSteer

#: Sets of pinned memory used in turn: steps overlap, so the one before may still be read by its copy.
STAGES = 3


class _Stage:
    """Host side of one step: pinned on a GPU, the device buffers themselves on a CPU."""

    def __init__(self, rank: int, max_tokens: int, device: torch.device) -> None:
        def make(dtype: torch.dtype) -> Tensor:
            return torch.zeros(rank, max_tokens, dtype=dtype, pin_memory=device.type != "cpu")

        self.rows, self.slots, self.strengths = make(torch.int64), make(torch.int64), make(torch.float32)
        self.copied: torch.Event | None = None


class StagedIndex:
    """rows, slots `[rank, max_tokens]` int64, strengths `[rank, max_tokens]` float32, written in place for ever."""

    def __init__(self, rank: int, max_tokens: int, device: torch.device) -> None:
        self.rank, self.max_tokens, self.device = rank, max_tokens, device
        self.rows = torch.zeros(rank, max_tokens, dtype=torch.int64, device=device)
        self.slots = torch.zeros(rank, max_tokens, dtype=torch.int64, device=device)
        self.strengths = torch.zeros(rank, max_tokens, dtype=torch.float32, device=device)
        self._stages = [] if device.type == "cpu" else [_Stage(rank, max_tokens, device) for _ in range(STAGES)]
        self._turn = 0
        self._used = 0
        self._plain = RequestSteer.plain(rank)

    def fill(self, steers: Sequence[RequestSteer | None], lengths: NDArray[np.int64] | NDArray[np.int32]) -> int:
        """Give request i's steering to its `lengths[i]` tokens, in batch order; tokens behind the last get none.

        Returns how many tokens are steered.
        """
        steered = 0
        total = 0
        if any(steer is not None for steer in steers):
            total = int(lengths.sum())
            assert total <= self.max_tokens, f"a step of {total} tokens in an index of {self.max_tokens}"
            steered = int(sum(n for n, steer in zip(lengths, steers, strict=True) if steer is not None))
        end = max(total, self._used)
        if not end:
            return 0  # plain after plain: the buffers are zero already
        stage = self._next_stage()
        rows, slots, strengths = (t[:, :end].numpy() for t in (stage.rows, stage.slots, stage.strengths))
        if total:
            each = [steer or self._plain for steer in steers]
            slots[:, :total] = np.repeat(np.stack([s.slots for s in each], axis=1), lengths, axis=1)
            strengths[:, :total] = np.repeat(np.stack([s.strengths for s in each], axis=1), lengths, axis=1)
            np.floor_divide(slots[:, :total], len(MODES), out=rows[:, :total])
        for array in (rows, slots, strengths):
            array[:, total:] = 0
        self._send(stage, end)
        self._used = total
        return steered

    def _next_stage(self) -> StagedIndex | _Stage:
        if not self._stages:
            return self
        self._turn = (self._turn + 1) % STAGES
        stage = self._stages[self._turn]
        if stage.copied is not None:
            stage.copied.synchronize()  # done long ago, unless steps run further ahead than there are stages
        return stage

    def _send(self, stage: StagedIndex | _Stage, end: int) -> None:
        if not isinstance(stage, _Stage):
            return
        for to, source in ((self.rows, stage.rows), (self.slots, stage.slots), (self.strengths, stage.strengths)):
            for j in range(self.rank):  # row by row: each is one contiguous copy
                to[j, :end].copy_(source[j, :end], non_blocking=True)
        if stage.copied is None:
            stage.copied = torch.Event(self.device)
        stage.copied.record()
