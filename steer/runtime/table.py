"""The device table: resident direction rows, and for each token of a batch which rows act on it and how strongly.

Everything here is written **in place** and read through the same storage for the life of the process, so that compiled
graphs and replayed CUDA graphs see each change of content.

A *row* is one direction vector at every place. A *slot* is a row in one mode: its four coefficients at every place
(`op`). Row 0 is all zeros and means plain.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from steer.direction import MODES, Direction, Site
from steer.errors import NoRoom
from steer.runtime.modes import coefficients, embedding_coefficients
from steer.runtime.op import FLOOR, displacement
from steer.spec import Spec

#: The stream before block 0 counts as layer −1 of its site.
EMBEDDING = -1


@dataclass(frozen=True, slots=True)
class Place:
    """Where rows act: a site at a layer (EMBEDDING for the stream before block 0)."""

    site: Site
    layer: int


@dataclass(frozen=True, slots=True)
class Plate:
    """The rows of one place. vectors `[rows, d_model]`, coefficients `[rows × modes, 4]`, float32."""

    vectors: Tensor
    coefficients: Tensor

    @classmethod
    def empty(cls, rows: int, d_model: int, device: torch.device | str) -> Plate:
        plate = cls(
            torch.zeros(rows, d_model, dtype=torch.float32, device=device),
            torch.zeros(rows * len(MODES), 4, dtype=torch.float32, device=device),
        )
        plate.clear(range(rows))
        return plate

    def write(self, row: int, vector: Tensor, by_mode: Sequence[Tensor]) -> None:
        self.vectors[row].copy_(vector)
        for mode, values in enumerate(by_mode):
            self.coefficients[row * len(MODES) + mode].copy_(values)

    def clear(self, rows: Sequence[int]) -> None:
        for row in rows:
            self.vectors[row].zero_()
            slots = self.coefficients[row * len(MODES) : (row + 1) * len(MODES)]
            slots.zero_()
            slots[:, FLOOR] = -torch.inf


class TokenIndex:
    """For each token of the running batch its rows, slots and strengths: `[rank, max_tokens]` buffers on the device.

    `fill` is called once for each step, from the thread that runs the model.
    """

    def __init__(self, rank: int, max_tokens: int, device: torch.device | str) -> None:
        self.rank, self.max_tokens = rank, max_tokens
        self.rows = torch.zeros(rank, max_tokens, dtype=torch.int64, device=device)
        self.slots = torch.zeros(rank, max_tokens, dtype=torch.int64, device=device)
        self.strengths = torch.zeros(rank, max_tokens, dtype=torch.float32, device=device)
        self.active = False
        self._used = 0

    def fill(self, steers: Sequence[RequestSteer | None], lengths: Sequence[int] | NDArray[np.int64]) -> None:
        """Give request i's steering to its `lengths[i]` tokens, in batch order; tokens behind the last get none."""
        self.active = any(steer is not None for steer in steers)
        total = int(np.sum(lengths))
        if not self.active:
            self._clear(0)
            return
        if total > self.max_tokens:
            raise AssertionError(f"a batch of {total} tokens in an index of {self.max_tokens}")
        plain = RequestSteer.plain(self.rank)
        each = [steer or plain for steer in steers]
        slots = np.repeat(np.stack([s.slots for s in each], axis=1), lengths, axis=1)
        strengths = np.repeat(np.stack([s.strengths for s in each], axis=1), lengths, axis=1)
        self.slots[:, :total].copy_(torch.from_numpy(slots))
        self.rows[:, :total].copy_(torch.from_numpy(slots // len(MODES)))
        self.strengths[:, :total].copy_(torch.from_numpy(strengths))
        self._clear(total)

    def _clear(self, start: int) -> None:
        """Zero what an earlier, longer batch left from `start` on."""
        if self._used > start:
            for buffer in (self.rows, self.slots, self.strengths):
                buffer[:, start : self._used].zero_()
        self._used = start


@dataclass(frozen=True, slots=True)
class RequestSteer:
    """One request's part of the index: slots `[rank]` int64 and strengths `[rank]` float32, zeros behind its own."""

    slots: NDArray[np.int64]
    strengths: NDArray[np.float32]

    @classmethod
    def plain(cls, rank: int) -> RequestSteer:
        return cls(np.zeros(rank, np.int64), np.zeros(rank, np.float32))


class Table:
    """Resident directions at all places of one model, and who has which rows.

    `rows` counts usable rows (a direction of rank k takes k). Loading writes rows that no request uses, so a running
    step is never disturbed.
    """

    def __init__(
        self, places: Sequence[Place], *, rows: int, rank: int, d_model: int, device: torch.device | str = "cpu"
    ) -> None:
        self.rows, self.rank = rows, rank
        self.sites: frozenset[Site] = frozenset(place.site for place in places)
        self.plates = {place: Plate.empty(rows + 1, d_model, device) for place in places}
        self._free = list(range(rows, 0, -1))
        self._resident: dict[str, list[int]] = {}

    @property
    def rows_in_use(self) -> int:
        return self.rows - len(self._free)

    def load(self, digest: str, direction: Direction) -> None:
        """Make `direction` resident. Raises NoRoom when fewer than its k rows are free; then nothing has changed."""
        if digest in self._resident:
            return
        if direction.rank > len(self._free):
            raise NoRoom(
                f"the direction needs {direction.rank} free table rows, {len(self._free)} of {self.rows} are free; "
                "delete a direction, wait for running requests to end, or start with more rows"
            )
        rows = [self._free.pop() for _ in range(direction.rank)]
        modes = [coefficients(direction, mode) for mode in MODES]
        embedding_modes = [embedding_coefficients(direction, mode) for mode in MODES]
        for place, plate in self.plates.items():
            if place.site not in direction.meta.sites:
                continue
            for k, row in enumerate(rows):
                if place.layer == EMBEDDING:
                    if direction.embedding is not None:
                        plate.write(row, direction.embedding[k], [c[k] for c in embedding_modes])
                else:
                    plate.write(row, direction.directions[place.layer, k], [c[place.layer, k] for c in modes])
        self._resident[digest] = rows

    def unload(self, digest: str) -> None:
        """Free a direction's rows. The caller guarantees that no running request uses them."""
        rows = self._resident.pop(digest, [])
        for plate in self.plates.values():
            plate.clear(rows)
        self._free += reversed(rows)

    def rows_of(self, digests: Sequence[str]) -> NDArray[np.int64]:
        """The rows of resident directions, in order."""
        return np.array([row for digest in digests for row in self._resident[digest]], np.int64)

    def steer(self, spec: Spec) -> RequestSteer | None:
        """The index entries of a request with `spec`, whose directions must be resident. None for a plain one."""
        if not spec:
            return None
        pairs = [
            (row * len(MODES) + MODES.index(entry.mode), entry.strength)
            for entry in spec.entries
            for row in self._resident[entry.digest]
        ]
        assert len(pairs) <= self.rank, "the registry admits no spec that needs more"
        out = RequestSteer.plain(self.rank)
        for i, (slot, strength) in enumerate(pairs):
            out.slots[i], out.strengths[i] = slot, strength
        return out


def apply(x: Tensor, plate: Plate, rows: Tensor, slots: Tensor, strengths: Tensor) -> Tensor:
    """x `[tokens, d_model]` after the operation for every rank in turn, in the dtype of `x`; arithmetic in float32.

    rows, slots, strengths: `[rank, tokens]`. A row of zeros gives back the same bits.
    """
    y = x.to(torch.promote_types(x.dtype, torch.float32))
    for j in range(rows.shape[0]):
        vectors, coefficient_rows = plate.vectors[rows[j]], plate.coefficients[slots[j]]
        moved = y + displacement(y, vectors, coefficient_rows, strengths[j])
        # chosen, not added: x + 0 turns −0 into 0, and 0·∞ is NaN
        y = torch.where((strengths[j] != 0).unsqueeze(-1), moved, y)
    return y.to(x.dtype)
