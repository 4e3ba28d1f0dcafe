"""Measuring in a worker: hooks on the blocks read the stream of chosen tokens while prompts are prefilled.

For an eager engine without prefix cache, on the worker's main thread. `SamplingParams.extra_args` of a request says
what to read; a prompt that comes in chunks, or again after preemption, is read once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel
from torch import Tensor, nn

from steer.runtime.hook_points import Output
from steer.vllm.settings import CAPTURE
from steer.vllm.steering_module import Form, stream


class CaptureRequest(BaseModel, extra="forbid", frozen=True):
    """Of the prompt numbered `number`: the vectors at token positions `at`, and the sum over those from `start` to
    `stop`."""

    number: int
    at: tuple[int, ...]
    start: int
    stop: int

    @classmethod
    def of(cls, params: object) -> CaptureRequest | None:
        found = (getattr(params, "extra_args", None) or {}).get(CAPTURE)
        return None if found is None else cls.model_validate(found)


class WorkerCapture:
    """Reads the outputs of `blocks`. `picked` `[prompts, positions, d_model]` and `own` `[prompts, d_model]` for each
    layer, float64; `seen` `[prompts]` counts the prompt tokens that came by."""

    def __init__(
        self, blocks: Mapping[int, nn.Module], form: Form, shape: tuple[int, int, int], device: torch.device
    ) -> None:
        prompts, positions, d_model = shape

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        self.picked = {layer: zeros(prompts, positions, d_model) for layer in blocks}
        self.own = {layer: zeros(prompts, d_model) for layer in blocks}
        self.seen = [0] * prompts
        self._form, self._device = form, device
        self._asked: dict[str, CaptureRequest] = {}
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
        if asked := CaptureRequest.of(params):
            self._asked[request_id] = asked

    def begin_step(self, requests: Sequence[str], lengths: NDArray[np.int32], starts: NDArray[np.int32]) -> None:
        """A step comes: request i has `lengths[i]` tokens, the first at position `starts[i]`."""
        picks: list[tuple[int, int, int]] = []
        owns: list[tuple[int, int]] = []
        offset = 0
        for request, length, begin in zip(requests, lengths.tolist(), starts.tolist(), strict=True):
            if asked := self._asked.get(request):
                new = range(max(begin, self.seen[asked.number]), begin + length)
                picks += [(offset + p - begin, asked.number, i) for i, p in enumerate(asked.at) if p in new]
                owned = range(max(new.start, asked.start), min(new.stop, asked.stop))
                owns += [(offset + p - begin, asked.number) for p in owned]
                self.seen[asked.number] = max(self.seen[asked.number], new.stop)
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
