"""What is read of the stream in a worker, on its main thread, and kept until the front end asks for it.

* The read-out (see `steer.runtime.readout`): buffers that the steering modules of `resid_post` write, traced into the
  compiled graph. An engine that was started without read-out has none of this.
* What a measurement captures: hooks on the blocks read the stream of chosen tokens while prompts are prefilled, in an
  eager engine without prefix cache. A prompt that comes in chunks, or again after preemption, is read once.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from steer.runtime.hook_points import Output
from steer.runtime.memory import lasting
from steer.vllm.settings import captured_by
from steer.vllm.steering_module import Form, ReadBuffers, stream

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


#: What is read of one prompt: the vectors at some token positions, as many of each prompt, and the sum over those from
#: a first one to a last.
Asked: TypeAlias = tuple[Sequence[int], int, int]


class WorkerCapture:
    """Reads the outputs of `blocks`, of prompts of which each request says the number. `picked` `[prompts, positions,
    d_model]` and `own` `[prompts, d_model]` for each layer, float64; `seen` `[prompts]` counts the prompt tokens that
    came by."""

    def __init__(
        self, blocks: Mapping[int, nn.Module], form: Form, asked: Sequence[Asked], d_model: int, device: torch.device
    ) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        self.picked = {layer: zeros(len(asked), len(asked[0][0]), d_model) for layer in blocks}
        self.own = {layer: zeros(len(asked), d_model) for layer in blocks}
        self.seen = [0] * len(asked)
        self._form, self._device, self._asked = form, device, asked
        self._numbers: dict[str, int] = {}
        #: Of the step that runs: (token, prompt, which of its positions) and (token, prompt), `[reads, …]` each.
        self._step: tuple[Tensor, Tensor] | None = None
        self._handles = [
            block.register_forward_hook(lambda _m, _args, output, n=layer: self._see(n, output))
            for layer, block in blocks.items()
        ]

    busy = True

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()

    def meet(self, request_id: str, params: object) -> None:
        if (number := captured_by(params)) is not None:
            self._numbers[request_id] = number

    def begin_step(self, requests: Sequence[str], lengths: NDArray[np.int32], starts: NDArray[np.int32]) -> None:
        """A step comes: request i has `lengths[i]` tokens, the first at position `starts[i]`."""
        picks: list[tuple[int, int, int]] = []
        owns: list[tuple[int, int]] = []
        offset = 0
        for request, length, begin in zip(requests, lengths.tolist(), starts.tolist(), strict=True):
            if (number := self._numbers.get(request)) is not None:
                at, start, stop = self._asked[number]
                new = range(max(begin, self.seen[number]), begin + length)
                picks += [(offset + p - begin, number, i) for i, p in enumerate(at) if p in new]
                owns += [(offset + p - begin, number) for p in range(max(new.start, start), min(new.stop, stop))]
                self.seen[number] = max(self.seen[number], new.stop)
            offset += length
        self._step = None
        if picks or owns:
            both = (torch.tensor(rows, dtype=torch.int64, device=self._device) for rows in (picks, owns))
            self._step = next(both).reshape(-1, 3), next(both).reshape(-1, 2)

    def end_step(self) -> None:
        """What runs until the next step begins is no request's."""
        self._step = None

    def _see(self, layer: int, output: Output) -> None:
        if (step := self._step) is None:
            return
        x = stream(self._form, output).double()
        (picked, prompts, positions), (owned, owners) = (part.unbind(1) for part in step)
        self.picked[layer][prompts, positions] = x[picked]
        self.own[layer].index_add_(0, owners, x[owned])
