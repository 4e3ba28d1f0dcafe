"""The read-out: components of the stream along direction rows, measured at some tokens of a running batch.

For a position of the batch and a layer l, with x the output of block l (the hook point `resid_post`) and v a unit row:

    before = ⟨x, v⟩      after = ⟨x', v⟩      norm = ‖x‖

All are in float32. x' is the stream after the operation (`op`), so for a plain token `before` and `after` are equal. x
comes from a pass that is already steered at the layers below. Reading changes nothing: the model continues with the
same tensors.

With u the axis of the direction's plane, the angle of x (and likewise of x') is

    angle = atan2(⟨x, v⟩, ⟨x, u⟩)

in degrees, -180 to 180. It is 0 along the axis, which is on the side of the harmless mean, and 90 along the direction.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from steer.errors import UnsupportedModel
from steer.readout import Readout

#: The index of each side of the operation in an array that holds both.
BEFORE, AFTER = range(2)


@dataclass(frozen=True, slots=True)
class Reading:
    """The values read at one token, or at all tokens of a pass (`[rows, positions, …]`): float32, on the host.

    Attributes:
        before: the components before the operation, `[…, layers, k]`.
        after: the components after the operation, `[…, layers, k]`.
        norms: the norms before the operation, `[…, layers]`.
        angles: the angles before and after the operation, `[2, …, layers, k]`, in degrees; NaN at a layer that is not
            steered. None if the read-out does not ask for angles.
    """

    before: NDArray[np.float32]
    after: NDArray[np.float32]
    norms: NDArray[np.float32]
    angles: NDArray[np.float32] | None = None

    @classmethod
    def of(cls, read: Readout, values: NDArray[np.float32]) -> Reading:
        """Return the reading for `read`.

        Args:
            read: the read-out.
            values: what `measured` returned at the layers of `read`, `[…, layers, 2k + 1]`. k may be larger than the
                number of rows of `read`, whose rows come first.
        """
        most = values.shape[-1] // 2
        before, after = values[..., : read.rows], values[..., most : most + read.rows]
        if not read.angle:
            return cls(before, after, values[..., -1])
        found = np.stack([before, after])
        q, p = found[..., ::2], found[..., 1::2]
        angles = np.where((q == 0) & (p == 0), np.float32(np.nan), np.degrees(np.arctan2(q, p)))
        return cls(q[BEFORE], q[AFTER], values[..., -1], angles)


def components(x: Tensor, vectors: Tensor) -> Tensor:
    """Return ⟨x, v⟩, `[reads, k]` float32, for x `[reads, d_model]` and vectors `[reads, k, d_model]`."""
    # Not a matrix product: a GPU may be configured to compute matrix products with fewer bits.
    return (x.float().unsqueeze(1) * vectors).sum(-1)


def measured(before: Tensor, after: Tensor, vectors: Tensor) -> Tensor:
    """Return ⟨x, v⟩, ⟨x', v⟩ and ‖x‖ in one tensor, `[reads, 2k + 1]` float32.

    Args:
        before: the stream at some tokens before the operation, `[reads, d_model]`.
        after: the stream at the same tokens after the operation, `[reads, d_model]`.
        vectors: the rows v, `[reads, k, d_model]`.
    """
    norms = torch.linalg.vector_norm(before.float(), dim=-1, keepdim=True)
    return torch.cat([components(before, vectors), components(after, vectors), norms], -1)


class ReadIndex:
    """Which rows are read at which tokens of the running batch, and the values that were measured there.

    Call `fill` before each pass and `collect` after it, on the thread that runs the model; hooks call `record`. When
    nothing is read, a hook only looks at `layers`.

    Args:
        device: the device of the stream.
        rows_of: returns the bank rows `[k]` int64 of resident digests, with or without their axes
            (`DirectionBank.rows_of`).
    """

    def __init__(self, device: torch.device | str, rows_of: Callable[[Sequence[str], bool], NDArray[np.int64]]) -> None:
        self.device, self._rows_of = device, rows_of
        self.layers: frozenset[int] = frozenset()
        self._reads: list[Readout] = []
        self._at = self._rows = torch.zeros(0, dtype=torch.int64)
        #: The read-outs whose bank rows `_rows` holds.
        self._written: list[Readout] = []
        #: What `measured` returned for all read-outs, by layer.
        self._found: dict[int, Tensor] = {}

    def fill(self, reads: Sequence[Readout | None], lengths: Sequence[int]) -> None:
        """Set up the next pass: `reads[i]` is read at the last of the `lengths[i]` tokens of request i, in batch order.

        A version that is no longer resident was unloaded because its request has ended, and this batch does not know
        that yet. The row of zeros is read in its place, without an error.
        """
        self._reads, self._found = [read for read in reads if read is not None], {}
        self.layers = frozenset(layer for read in self._reads for layer in read.layers)
        if not self._reads:
            return
        ends = np.cumsum(lengths) - 1
        self._at = torch.from_numpy(ends[[read is not None for read in reads]]).to(self.device)
        # Compared by identity: an equal read-out of a later request may name a version that was loaded again into
        # other rows.
        if len(self._written) != len(self._reads) or not all(map(operator.is_, self._written, self._reads)):
            rows = np.zeros((len(self._reads), max(read.rows for read in self._reads)), np.int64)
            for row, read in zip(rows, self._reads, strict=True):
                with suppress(KeyError):
                    row[: read.rows] = self._rows_of(read.digests, read.angle)
            self._rows, self._written = torch.from_numpy(rows).to(self.device), self._reads

    def clear(self) -> None:
        self.fill([], [])

    @torch.no_grad()
    def record(self, layer: int, before: Tensor, after: Tensor, vectors: Tensor) -> None:
        """Measure the stream at `layer`. The hook of the layer calls this.

        Args:
            layer: the layer.
            before: the stream of all tokens before the operation, `[tokens, d_model]`.
            after: the stream of all tokens after the operation, `[tokens, d_model]`.
            vectors: the rows of the hook point, `[rows, d_model]`.
        """
        self._found[layer] = measured(before[self._at], after[self._at], vectors[self._rows])

    def collect(self) -> list[Reading]:
        """Return a reading of the pass for each request that is read, in the order of `fill`. After this nothing is
        read until the next `fill`."""
        if not self._reads:
            return []
        places = {layer: place for place, layer in enumerate(self._found)}
        found = torch.stack(list(self._found.values()), 1).cpu().numpy()
        out = [
            Reading.of(read, values[[places[layer] for layer in read.layers]])
            for read, values in zip(self._reads, found, strict=True)
        ]
        self.clear()
        return out


class Recorder:
    """Reads all tokens of every forward pass of an attached model. The values stay on the device until `collect`.

    Args:
        rows: the bank rows of `read`, `[k]` int64.
        read: the read-out.
    """

    def __init__(self, rows: NDArray[np.int64], read: Readout) -> None:
        self._rows, self._read = torch.from_numpy(rows), read
        #: Each pass: its rows, its positions and, by layer, the `measured` values `[rows, positions, 2k + 1]`.
        self._passes: list[tuple[int, int, dict[int, Tensor]]] = []

    def begin(self, tokens: tuple[int, int] | None) -> None:
        """Begin the record of a pass over `tokens` (rows, positions). None if the decoder's inputs do not tell them."""
        self._passes.append((*(tokens or (0, 0)), {}))

    @torch.no_grad()
    def record(self, layer: int, before: Tensor, after: Tensor, vectors: Tensor) -> None:
        """Measure the output of block `layer`.

        Args:
            layer: the layer.
            before: the output before the operation, `[..., d_model]`.
            after: the output after the operation, `[..., d_model]`.
            vectors: the bank rows of the hook point, `[rows, d_model]`.
        """
        if layer not in self._read.layers:
            return
        rows, positions, found = self._passes[-1]
        x, y = (side.detach().flatten(0, -2) for side in (before, after))
        lines = vectors[self._rows.to(vectors.device)].expand(len(x), -1, -1)
        new = measured(x, y, lines).unflatten(0, (rows, -1))
        # A block may be called several times in a pass, each time for some of the positions.
        found[layer] = torch.cat([found[layer], new], 1) if layer in found else new
        if found[layer].shape[1] > positions:
            raise UnsupportedModel(f"block {layer} is called more than once in a pass, and what is read is not known")

    def collect(self) -> list[Reading]:
        """Return a reading of each pass that went through all layers of the read-out, in order."""
        layers = self._read.layers
        whole = [found for *_, found in self._passes if len(found) == len(layers)]
        return [
            Reading.of(self._read, torch.stack([found[layer] for layer in layers], 2).cpu().numpy()) for found in whole
        ]
