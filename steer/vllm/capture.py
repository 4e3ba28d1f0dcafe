"""Measuring in a worker: hooks on the blocks read the stream of chosen tokens while prompts are prefilled.

For an eager engine without prefix cache, on the worker's main thread. A prompt that comes in chunks, or again after
preemption, is read once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from steer.runtime.hook_points import Output
from steer.vllm.settings import captured_by
from steer.vllm.steering_module import Form, stream

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
