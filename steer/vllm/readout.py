"""The read-out in a worker (see `steer.runtime.readout`): buffers that the steering modules of `resid_post` write,
traced into the compiled graph, and the values of each request until the front end asks for them.

Every method runs on the worker's main thread. An engine that was started without read-out has none of this.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from steer.runtime.memory import lasting
from steer.vllm.steering_module import ReadBuffers

#: Ended requests whose values nobody has asked for yet, for each request that can be read at once.
KEPT = 4


@dataclass(slots=True)
class _ReadRun:
    """One request that is read. `rows`: bank rows `[k]` int64; `values`: for each generated token, by its number, what
    was `measured` `[layers, 2 × rank + 1]`."""

    rows: NDArray[np.int64]
    prompt: int
    values: dict[int, NDArray[np.float32]] = field(default_factory=dict)


class ReadRunner:
    """The tokens that are read in a step, written in place: at `[count]`, which token; rows `[count, rank]`, which rows
    of the bank; int64. `found`, of each of `layers` `[count, 2 × rank + 1]`, is what was `measured` there. Every pass
    looks at all of them, so those that are not in use must be 0, the one token that every pass has."""

    def __init__(self, layers: Sequence[int], count: int, rank: int, device: torch.device) -> None:
        self.layers, self.count, self.rank = tuple(layers), count, rank
        with lasting():
            self.at = torch.zeros(count, dtype=torch.int64, device=device)
            self.rows = torch.zeros(count, rank, dtype=torch.int64, device=device)
            # each by itself: compiled code takes it that a tensor begins where an allocation may
            self.found = [torch.zeros(count, 2 * rank + 1, dtype=torch.float32, device=device) for _ in layers]
        self._running: dict[str, _ReadRun] = {}
        self._ended: dict[str, _ReadRun] = {}
        self._step: list[tuple[_ReadRun, int]] = []

    def of(self, layer: int) -> ReadBuffers:
        return self.at, self.rows, self.found[self.layers.index(layer)]

    @property
    def busy(self) -> bool:
        return bool(self._running)

    def meet(self, request_id: str, rows: NDArray[np.int64], prompt: int) -> None:
        """A request that reads these bank rows and has `prompt` prompt tokens comes, or comes back from preemption."""
        if request_id not in self._running:
            self._running[request_id] = _ReadRun(rows, prompt)

    def end(self, request_id: str) -> None:
        """It takes part in no step any more. What was found waits for `take`, but not for ever."""
        if run := self._running.pop(request_id, None):
            self._ended[request_id] = run
            if len(self._ended) > KEPT * self.count:
                del self._ended[next(iter(self._ended))]

    def take(self, request_id: str) -> list[tuple[int, bytes]] | None:
        """(layer, float32 `[tokens, 2 × rank + 1]`) of what was read for a request, which is then forgotten."""
        run = self._running.pop(request_id, None) or self._ended.pop(request_id, None)
        if run is None:
            return None
        whole = [run.values[n] for n in itertools.takewhile(run.values.__contains__, itertools.count())]
        return [(layer, b"".join(values[i].tobytes() for values in whole)) for i, layer in enumerate(self.layers)]

    def begin_step(self, requests: Sequence[str], lengths: NDArray[np.int32], starts: NDArray[np.int32]) -> None:
        """A step comes: read the last token of each request that is read, unless its prompt goes on after it.

        Values are kept by the number of the token that is predicted, so a step that is run again after preemption,
        whole or in chunks, says the same again.
        """
        at: list[int] = []
        self._step = []
        ends = np.cumsum(lengths)
        for i, request in enumerate(requests):
            if run := self._running.get(request):
                number = int(starts[i] + lengths[i]) - run.prompt
                if number >= 0 and len(at) < self.count:
                    at.append(int(ends[i]) - 1)
                    self._step.append((run, number))
        if at:
            rows = np.zeros((len(at), self.rank), np.int64)
            for mine, (run, _) in zip(rows, self._step, strict=True):
                mine[: len(run.rows)] = run.rows
            self.at[: len(at)].copy_(torch.tensor(at))
            self.rows[: len(at)].copy_(torch.from_numpy(rows))

    def end_step(self) -> None:
        """The forward pass has been enqueued: fetch what it finds. Waits for it, where somebody is read."""
        if not self._step:
            return
        found = torch.stack([each[: len(self._step)] for each in self.found], 1).cpu().numpy()
        for (run, number), values in zip(self._step, found, strict=True):
            run.values[number] = values.copy()
        self.at.zero_()  # the next pass may have fewer tokens than these were
        self._step = []
