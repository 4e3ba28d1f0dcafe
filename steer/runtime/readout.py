"""The read-out: components of the stream along direction rows, taken at some tokens of a running batch.

For a position of the batch and a layer l, with x the output of block l (the hook point `resid_post`) and v a unit row:

    before = ⟨x, v⟩      after = ⟨x', v⟩      norm = ‖x‖

all in float32, where x' is the stream as the operation leaves it (`op`), so that for a plain token both are equal. x
comes from a pass that is already steered at the layers below. Reading changes nothing: the tensors that go on are the
same.

With u the axis of the direction's plane, the angle of either is

    angle = atan2(⟨x, v⟩, ⟨x, u⟩)

in degrees, -180 to 180: 0 along the axis, which is on the side of the harmless mean, 90 along the direction.
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
from steer.spec import Readout

#: Of the two sides of the operation.
BEFORE, AFTER = range(2)


@dataclass(frozen=True, slots=True)
class Reading:
    """What was read at one token, or at all of a pass (`[rows, positions, …]`). before, after: `[…, layers, k]`; norms:
    `[…, layers]`; float32, on the host. angles, where they were asked for: `[2, …, layers, k]`, before and after, in
    degrees, NaN at a layer that is not steered."""

    before: NDArray[np.float32]
    after: NDArray[np.float32]
    norms: NDArray[np.float32]
    angles: NDArray[np.float32] | None = None

    @classmethod
    def of(cls, read: Readout, values: NDArray[np.float32]) -> Reading:
        """Of what was `measured` at the layers of `read`, `[…, layers, 2k + 1]`, along at least its rows."""
        most = values.shape[-1] // 2
        before, after = values[..., : read.rows], values[..., most : most + read.rows]
        if not read.angle:
            return cls(before, after, values[..., -1])
        found = np.stack([before, after])
        q, p = found[..., ::2], found[..., 1::2]
        angles = np.where((q == 0) & (p == 0), np.float32(np.nan), np.degrees(np.arctan2(q, p)))
        return cls(q[BEFORE], q[AFTER], values[..., -1], angles)


def components(x: Tensor, vectors: Tensor) -> Tensor:
    """⟨x, v⟩ in float32. x: `[reads, d_model]`, vectors: `[reads, k, d_model]`. Returns `[reads, k]`."""
    # no matrix product, which a GPU may be told to take with fewer bits
    return (x.float().unsqueeze(1) * vectors).sum(-1)


def measured(before: Tensor, after: Tensor, vectors: Tensor) -> Tensor:
    """⟨x, v⟩, ⟨x', v⟩ and ‖x‖, `[reads, 2k + 1]` float32, of the stream at tokens `[reads, d_model]` before and after
    the operation. vectors: `[reads, k, d_model]`."""
    norms = torch.linalg.vector_norm(before.float(), dim=-1, keepdim=True)
    return torch.cat([components(before, vectors), components(after, vectors), norms], -1)


class ReadIndex:
    """Which rows are read at which tokens of the running batch, and what was found there.

    Call `fill` before each pass and `collect` after it, on the thread that runs the model; hooks call `record`. When
    nothing is read, a hook pays for one look at `layers`.

    rows_of: gives the bank rows `[k]` int64 of resident digests, with axes or without (`DirectionBank.rows_of`).
    """

    def __init__(self, device: torch.device | str, rows_of: Callable[[Sequence[str], bool], NDArray[np.int64]]) -> None:
        self.device, self._rows_of = device, rows_of
        self.layers: frozenset[int] = frozenset()
        self._reads: list[Readout] = []
        self._at = self._rows = torch.zeros(0, dtype=torch.int64)
        #: The read-outs whose rows `_rows` holds.
        self._written: list[Readout] = []
        #: By layer, of each read-out (`measured`).
        self._found: dict[int, Tensor] = {}

    def fill(self, reads: Sequence[Readout | None], lengths: Sequence[int]) -> None:
        """Read the last of request i's `lengths[i]` tokens, in batch order, as `reads[i]` says. A version that is no
        longer resident was unloaded because its request has ended, which this batch does not know yet: the row of zeros
        is read in its place, and nobody is told of it."""
        self._reads, self._found = [read for read in reads if read is not None], {}
        self.layers = frozenset(layer for read in self._reads for layer in read.layers)
        if not self._reads:
            return
        ends = np.cumsum(lengths) - 1
        self._at = torch.from_numpy(ends[[read is not None for read in reads]]).to(self.device)
        # By identity: an equal read-out of a later request may be of a version that has come back to other rows.
        if len(self._written) != len(self._reads) or not all(map(operator.is_, self._written, self._reads)):
            rows = np.zeros((len(self._reads), max(read.rows for read in self._reads)), np.int64)
            for mine, read in zip(rows, self._reads, strict=True):
                with suppress(KeyError):
                    mine[: read.rows] = self._rows_of(read.digests, read.angle)
            self._rows, self._written = torch.from_numpy(rows).to(self.device), self._reads

    def clear(self) -> None:
        self.fill([], [])

    @torch.no_grad()
    def record(self, layer: int, before: Tensor, after: Tensor, vectors: Tensor) -> None:
        """In the hook of `layer`: the stream of all tokens `[tokens, d_model]` before and after the operation, and the
        hook point's rows `[rows, d_model]`."""
        self._found[layer] = measured(before[self._at], after[self._at], vectors[self._rows])

    def collect(self) -> list[Reading]:
        """What the pass found, for each request that is read in the order of `fill`; then nothing is read any more."""
        if not self._reads:
            return []
        places = {layer: place for place, layer in enumerate(self._found)}
        found = torch.stack(list(self._found.values()), 1).cpu().numpy()
        out = [
            Reading.of(read, mine[[places[layer] for layer in read.layers]])
            for read, mine in zip(self._reads, found, strict=True)
        ]
        self.clear()
        return out


class Recorder:
    """Reads all tokens of every forward pass of an attached model. rows: the bank rows `[k]` int64 of `read`. What it
    finds stays on the device until `collect`."""

    def __init__(self, rows: NDArray[np.int64], read: Readout) -> None:
        self._rows, self._read = torch.from_numpy(rows), read
        #: Of each pass its rows, its positions and, by layer, what was `measured`, `[rows, positions, 2k + 1]`.
        self._passes: list[tuple[int, int, dict[int, Tensor]]] = []

    def begin(self, tokens: tuple[int, int] | None) -> None:
        """A pass over `tokens` (rows, positions) begins; None where what the decoder was given does not say."""
        self._passes.append((*(tokens or (0, 0)), {}))

    @torch.no_grad()
    def record(self, layer: int, before: Tensor, after: Tensor, vectors: Tensor) -> None:
        """The output of block `layer`, `[..., d_model]`, before and after the operation; the hook point's bank rows."""
        if layer not in self._read.layers:
            return
        rows, positions, found = self._passes[-1]
        x, y = (side.detach().flatten(0, -2) for side in (before, after))
        lines = vectors[self._rows.to(vectors.device)].expand(len(x), -1, -1)
        new = measured(x, y, lines).unflatten(0, (rows, -1))
        # a block may be called for some positions after the others
        found[layer] = torch.cat([found[layer], new], 1) if layer in found else new
        if found[layer].shape[1] > positions:
            raise UnsupportedModel(f"block {layer} is called more than once in a pass, and what is read is not known")

    def collect(self) -> list[Reading]:
        """Of each pass that went through all layers, in order."""
        layers = self._read.layers
        whole = [found for *_, found in self._passes if len(found) == len(layers)]
        return [
            Reading.of(self._read, torch.stack([found[layer] for layer in layers], 2).cpu().numpy()) for found in whole
        ]
