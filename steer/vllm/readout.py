"""Reads the stream in a worker, on its main thread, and keeps the values until the front end asks for them.

* The read-out (see `steer.runtime.readout`): the steering modules of `resid_post` write buffers, and this is traced
  into the compiled graph. An engine that was started without read-out has none of this.
* The capture of a measurement: hooks on the blocks read the stream of chosen tokens while prompts are prefilled, in an
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

#: How many ended requests whose values nobody has asked for are kept, for each request that can be read at once.
KEPT = 4


@dataclass(slots=True)
class _ReadRun:
    """One request that is read.

    Attributes:
        rows: the bank rows, `[k]` int64.
        prompt: the number of its prompt tokens.
        values: for each generated token, by its number, what was `measured`, `[layers, 2 × rank + 1]`.
    """

    rows: NDArray[np.int64]
    prompt: int
    values: dict[int, NDArray[np.float32]] = field(default_factory=dict)


class ReadRunner:
    """The tokens that are read in a step. All buffers are written in place.

    Every pass reads all entries, so entries that are not in use must be 0, the one token that every pass has.

    Attributes:
        at: the tokens, `[count]` int64.
        rows: the rows of the bank for each token, `[count, rank]` int64.
        found: for each of `layers` what was `measured` at the tokens, `[count, 2 × rank + 1]` float32.
    """

    def __init__(self, layers: Sequence[int], count: int, rank: int, device: torch.device) -> None:
        self.layers, self.count, self.rank = tuple(layers), count, rank
        with lasting():
            self.at = torch.zeros(count, dtype=torch.int64, device=device)
            self.rows = torch.zeros(count, rank, dtype=torch.int64, device=device)
            # Each tensor is allocated alone: compiled code assumes the alignment of an allocation.
            self.found = [torch.zeros(count, 2 * rank + 1, dtype=torch.float32, device=device) for _ in layers]
        self._running: dict[str, _ReadRun] = {}
        self._ended: dict[str, _ReadRun] = {}
        self._step: list[tuple[_ReadRun, int]] = []

    def of(self, layer: int) -> ReadBuffers:
        """The buffers for the steering module of `resid_post` of this layer."""
        return self.at, self.rows, self.found[self.layers.index(layer)]

    @property
    def busy(self) -> bool:
        return bool(self._running)

    def meet(self, request_id: str, rows: NDArray[np.int64], prompt: int) -> None:
        """Take in a request that reads these bank rows and has `prompt` prompt tokens. It is new, or returns from
        preemption."""
        if request_id not in self._running:
            self._running[request_id] = _ReadRun(rows, prompt)

    def end(self, request_id: str) -> None:
        """End a request: no step has it any more. Its values are kept for `take`, until too many later requests end."""
        if run := self._running.pop(request_id, None):
            self._ended[request_id] = run
            if len(self._ended) > KEPT * self.count:
                del self._ended[next(iter(self._ended))]

    def take(self, request_id: str) -> list[tuple[int, bytes]] | None:
        """What was read for a request: (layer, bytes of float32 `[tokens, 2 × rank + 1]`). The values are then deleted.
        None if there are none."""
        run = self._running.pop(request_id, None) or self._ended.pop(request_id, None)
        if run is None:
            return None
        whole = [run.values[n] for n in itertools.takewhile(run.values.__contains__, itertools.count())]
        return [(layer, b"".join(values[i].tobytes() for values in whole)) for i, layer in enumerate(self.layers)]

    def begin_step(self, requests: Sequence[str], lengths: NDArray[np.int32], starts: NDArray[np.int32]) -> None:
        """Prepare a step: have it read the last token of each request that is read, unless more of the prompt follows.

        Values are kept by the number of the predicted token, so a step that runs again after preemption, whole or in
        chunks, gives the same values again.
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
            for row, (run, _) in zip(rows, self._step, strict=True):
                row[: len(run.rows)] = run.rows
            self.at[: len(at)].copy_(torch.tensor(at))
            self.rows[: len(at)].copy_(torch.from_numpy(rows))

    def end_step(self) -> None:
        """Fetch what the forward pass, which has been enqueued, finds. If any request is read, wait for the pass."""
        if not self._step:
            return
        found = torch.stack([each[: len(self._step)] for each in self.found], 1).cpu().numpy()
        for (run, number), values in zip(self._step, found, strict=True):
            run.values[number] = values.copy()
        self.at.zero_()  # the next pass may have fewer tokens than these numbers need
        self._step = []


#: What is read of one prompt: the vectors at some token positions, the same number for each prompt, and the sum of the
#: vectors from a start position to a stop position, which is excluded.
Asked: TypeAlias = tuple[Sequence[int], int, int]


class WorkerCapture:
    """Reads the outputs of `blocks` for prompts; each request has the number of its prompt.

    Attributes:
        picked: for each layer the vectors at the positions, `[prompts, positions, d_model]` float64.
        own: for each layer the sums, `[prompts, d_model]` float64.
        seen: `[prompts]`, how many tokens of each prompt were seen.
    """

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
        #: What the running step reads: (token, prompt, index of the position) for `picked`, and (token, prompt) for
        #: `own`; `[reads, 3]` and `[reads, 2]`.
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
        """Prepare a step in which request i has `lengths[i]` tokens, the first at position `starts[i]`."""
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
        """Read nothing until the next step begins: what runs until then belongs to no request."""
        self._step = None

    def _see(self, layer: int, output: Output) -> None:
        if (step := self._step) is None:
            return
        x = stream(self._form, output).double()
        (picked, prompts, positions), (owned, owners) = (part.unbind(1) for part in step)
        self.picked[layer][prompts, positions] = x[picked]
        self.own[layer].index_add_(0, owners, x[owned])
