"""Running float64 sums over the prompts of one class: what a measurement is made of, and what an interruption keeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from steer.errors import InvalidInput
from steer.geometry import winsorise
from steer.lab.activations import Activations, Reading
from steer.lab.measurement import Statistics


@dataclass(frozen=True, slots=True)
class Keep:
    """What is kept beside the means: the vector of every prompt (bfloat16), the second moments (float64)."""

    vectors: bool = False
    moments: bool = False


class Tally:
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
