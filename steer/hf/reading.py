"""The read-out of forward passes in Python: the components of `steer.runtime.readout` at every position."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from steer.readout import Line
from steer.runtime.readout import Reading, components

_Found = tuple[Tensor, Tensor, Tensor]


class Readings:
    """What `with steering.read(...)` has read, complete when the block ends.

    `lines` names the k rows of directions in the arrays' last dimension, `layers` their layers, and `passes` has a
    `Reading` of each forward pass, `[rows, positions, …]`. `before`, `after` and `norms` are those of all passes one
    after the other along the positions: after `generate` that is the prompt, with its padding, and each new token but
    the last, which no pass has seen.
    """

    def __init__(self, lines: Sequence[Line], layers: Sequence[int]) -> None:
        self.lines, self.layers = tuple(lines), tuple(layers)
        self.passes: list[Reading] = []

    @property
    def before(self) -> NDArray[np.float32]:
        """⟨x, v⟩ before the operation, `[rows, positions, layers, k]`."""
        return self._joined(lambda one: one.before)

    @property
    def after(self) -> NDArray[np.float32]:
        """⟨x', v⟩ after it, `[rows, positions, layers, k]`; where nothing steers, equal to `before`."""
        return self._joined(lambda one: one.after)

    @property
    def norms(self) -> NDArray[np.float32]:
        """‖x‖ before it, `[rows, positions, layers]`."""
        return self._joined(lambda one: one.norms)

    def __repr__(self) -> str:
        names = ", ".join(f"{line.name}[{line.row}]" for line in self.lines)
        shapes = [one.before.shape for one in self.passes]
        return f"<Readings of {names} at {len(self.layers)} layers: {len(shapes)} passes{shapes and f', {shapes[0]}'}>"

    def _joined(self, side: Callable[[Reading], NDArray[np.float32]]) -> NDArray[np.float32]:
        if not self.passes:
            raise ValueError("nothing was read: no forward pass of the attached model has ended in the block")
        if len(rows := {len(one.norms) for one in self.passes}) > 1:
            raise ValueError(f"the passes have {sorted(rows)} rows: take them one by one, from `passes`")
        return np.concatenate([side(one) for one in self.passes], axis=1)


class Recorder:
    """A watcher of passes (`steer.hf.steering`). rows: bank rows `[k]` int64 to read at `layers`. What it finds stays
    on the device until `collect`."""

    def __init__(self, rows: NDArray[np.int64], layers: Sequence[int]) -> None:
        self._rows, self._layers = torch.from_numpy(rows), tuple(layers)
        self._passes: list[tuple[int, dict[int, _Found]]] = []

    def begin(self, tokens: tuple[int, int] | None) -> None:
        self._passes.append((tokens[0] if tokens else 0, {}))

    @torch.no_grad()
    def record(self, layer: int, before: Tensor, after: Tensor, vectors: Tensor) -> None:
        if layer not in self._layers:
            return
        rows, found = self._passes[-1]
        x, y = (side.detach().flatten(0, -2) for side in (before, after))
        lines = vectors[self._rows.to(vectors.device)].expand(len(x), -1, -1)
        norms = torch.linalg.vector_norm(x.float(), dim=-1)
        found[layer] = tuple(t.unflatten(0, (rows, -1)) for t in (components(x, lines), components(y, lines), norms))

    def collect(self) -> list[Reading]:
        """Of each pass that went through all layers, in order."""
        whole = [found for _, found in self._passes if len(found) == len(self._layers)]
        return [
            Reading(*(torch.stack([found[n][side] for n in self._layers], 2).cpu().numpy() for side in range(3)))
            for found in whole
        ]
