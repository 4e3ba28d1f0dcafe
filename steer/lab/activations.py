"""What is taken from the stream of one batch: vectors at the wanted positions, and sums over the prompts' own text.

Pure torch on flattened tokens, so that it reads a padded batch `[prompts, longest, d_model]` and a packed one
`[tokens, d_model]` alike, in whichever process the model runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from steer.lab.encode import Encoded


@dataclass(frozen=True, slots=True)
class Reading:
    """What is wanted of each prompt: positions (negative from its end) at the layers 0 to `last_layer`."""

    positions: tuple[int, ...]
    last_layer: int

    @property
    def layers(self) -> int:
        return self.last_layer + 1


@dataclass(frozen=True, slots=True)
class Activations:
    """Of one batch: `picked` `[positions, layers, prompts, d_model]` in the stream's dtype, and `own`
    `[layers, d_model]`, float64: the sum over the tokens of the prompts' own text."""

    picked: Tensor
    own: Tensor


class Reader:
    """Reads one batch, layer by layer, as its forward pass comes by. `width` is the padded length, None where the
    prompts' tokens are packed without padding.

    Only what is wanted is kept: one vector for each position, layer and prompt, on the stream's device.
    """

    def __init__(self, batch: Sequence[Encoded], reading: Reading, width: int | None = None) -> None:
        lengths = [len(e.ids) for e in batch]
        starts = [sum(lengths[:i]) if width is None else i * width for i in range(len(batch))]
        self.reading = reading
        self._picks = torch.tensor(
            [
                [start + (p if p >= 0 else length + p) for start, length in zip(starts, lengths, strict=True)]
                for p in reading.positions
            ]
        )
        spans = [range(start + e.own.start, start + e.own.stop) for start, e in zip(starts, batch, strict=True)]
        self._own = torch.tensor([i for span in spans for i in span], dtype=torch.int64)
        # sums of each prompt alone in float32, and of the batch in float64: then a sum hardly depends on its batch
        self._segments = torch.zeros(len(batch), len(self._own))
        at = 0
        for row, span in zip(self._segments, spans, strict=True):
            row[at : at + len(span)] = 1.0
            at += len(span)
        self._picked: list[Tensor | None] = [None] * reading.layers
        self._sums: list[Tensor | None] = [None] * reading.layers

    def take(self, layer: int, x: Tensor) -> None:
        """The output of block `layer`, `[..., d_model]`, tokens in the order of the batch."""
        if self._picks.device != x.device:
            self._picks, self._own = self._picks.to(x.device), self._own.to(x.device)
            self._segments = self._segments.to(x.device)
        flat = x.reshape(-1, x.shape[-1])
        self._picked[layer] = flat[self._picks]
        self._sums[layer] = self._segments @ flat[self._own].float()

    def read(self) -> Activations:
        """What was taken, on the CPU (there float64 exists on every machine)."""
        picked, sums = [p for p in self._picked if p is not None], [s for s in self._sums if s is not None]
        assert len(picked) == len(sums) == self.reading.layers, "a layer did not come by"
        return Activations(torch.stack(picked, dim=1).cpu(), torch.stack(sums).cpu().double().sum(1))
