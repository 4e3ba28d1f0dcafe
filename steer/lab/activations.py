"""What is taken from the stream of one batch, and running float64 sums of it over the prompts of one class.

Pure torch on flattened tokens, so that it reads a padded batch `[prompts, longest, d_model]` and a packed one
`[tokens, d_model]` alike, in whichever process the model runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from steer.errors import InvalidInput
from steer.geometry import winsorise
from steer.lab.measurement import Statistics
from steer.lab.prompts import Encoded


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


@dataclass(frozen=True, slots=True)
class Keep:
    """What is kept beside the means: the vector of every prompt (bfloat16), the second moments (float64)."""

    vectors: bool = False
    moments: bool = False


class ClassSums:
    """The sums of one class of `prompts` prompts. `add` takes a batch whole or, when it raises, not at all."""

    def __init__(
        self, name: str, reading: Reading, d_model: int, prompts: int, own_tokens: int, winsor: float | None, keep: Keep
    ) -> None:
        self.name, self.prompts, self.own_tokens, self.winsor = name, prompts, own_tokens, winsor
        shape = (len(reading.positions), reading.layers)
        self.sums = torch.zeros(*shape, d_model, dtype=torch.float64)
        self.own = torch.zeros(reading.layers, d_model, dtype=torch.float64)
        self.moments = torch.zeros(*shape, d_model, d_model, dtype=torch.float64) if keep.moments else None
        self.vectors = torch.zeros(*shape, prompts, d_model, dtype=torch.bfloat16) if keep.vectors else None

    def add(self, indices: Sequence[int], activations: Activations) -> None:
        """Add the batch of the prompts numbered `indices`. Raises InvalidInput naming layers that are not finite."""
        picked = activations.picked
        self._check(picked, activations.own)
        rows = picked.double()
        if self.winsor is not None:
            rows = winsorise(rows, self.winsor)
        self.sums += rows.sum(2)
        self.own += activations.own
        if self.moments is not None:
            for moments, each in zip(self.moments.flatten(0, 1), rows.flatten(0, 1), strict=True):
                moments.addmm_(each.T, each)
        if self.vectors is not None:
            self.vectors[:, :, list(indices)] = rows.to(torch.bfloat16)

    def statistics(self) -> Statistics:
        return Statistics(
            mean=self.sums / self.prompts,
            mean_all=self.own / max(self.own_tokens, 1),
            moments=None if self.moments is None else self.moments / self.prompts,
            vectors=self.vectors,
        )

    def tensors(self) -> dict[str, Tensor]:
        """The state: what `restore` needs to go on as if nothing had happened."""
        found = {"sums": self.sums, "own": self.own, "moments": self.moments, "vectors": self.vectors}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in self.tensors().items():
            tensor.copy_(tensors[name])

    def _check(self, picked: Tensor, own: Tensor) -> None:
        finite = torch.isfinite(picked).all(-1).all(-1).all(0) & torch.isfinite(own).all(-1)
        if bad := torch.nonzero(~finite).flatten().tolist():
            raise InvalidInput(
                f"{self.name}: activations are not finite at layers {bad}; try --dtype float32 or bfloat16"
            )
