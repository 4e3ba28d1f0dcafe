"""The device table: resident direction rows. Which of them act on which token is the `index`'s to say.

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
from steer.runtime.index import RequestSteer
from steer.runtime.modes import coefficients, embedding_coefficients
from steer.runtime.op import FLOOR, amount
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


class Table:
    """Resident directions at all places of one model, and who has which rows.

    `rows` counts usable rows (a direction of rank k takes k). Loading writes rows that no request uses, so a running
    step is never disturbed.
    """

    def __init__(
        self, places: Sequence[Place], *, rows: int, rank: int, d_model: int, device: torch.device | str = "cpu"
    ) -> None:
        self.rows, self.rank, self.d_model = rows, rank, d_model
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
        try:
            self._write(rows, direction)
        except BaseException:
            self._give_back(rows)
            raise
        self._resident[digest] = rows

    def _write(self, rows: Sequence[int], direction: Direction) -> None:
        modes = [coefficients(direction, mode) for mode in MODES]
        embedding_modes = [embedding_coefficients(direction, mode) for mode in MODES]
        for place, plate in self.plates.items():
            plate.clear(rows)  # where the direction has nothing, whatever has become of free rows
            if place.site not in direction.meta.sites:
                continue
            for k, row in enumerate(rows):
                if place.layer == EMBEDDING:
                    if direction.embedding is not None:
                        plate.write(row, direction.embedding[k], [c[k] for c in embedding_modes])
                else:
                    plate.write(row, direction.directions[place.layer, k], [c[place.layer, k] for c in modes])

    def unload(self, digest: str) -> None:
        """Free a direction's rows. The caller guarantees that no running request uses them."""
        self._give_back(self._resident.pop(digest, []))

    def _give_back(self, rows: Sequence[int]) -> None:
        for plate in self.plates.values():
            plate.clear(rows)
        self._free += reversed(rows)

    def contents(self, digest: str) -> list[Tensor]:
        """All that is held for a resident direction, as views of the table's tensors, in the same order each time."""
        return [
            view
            for plate in self.plates.values()
            for row in self._resident[digest]
            for view in (plate.vectors[row], plate.coefficients[row * len(MODES) : (row + 1) * len(MODES)])
        ]

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


@dataclass(frozen=True, slots=True)
class Operands:
    """What acts on the stream at one place, one rank of it. vectors `[..., d_model]`, coefficients (of `op`, one tensor
    each) and strengths `[...]` broadcast to the stream; steered `[..., 1]` tells which of it is, None for all."""

    vectors: Tensor
    coefficients: tuple[Tensor, ...]
    strengths: Tensor
    steered: Tensor | None


def gather(plate: Plate, rows: Tensor, slots: Tensor, strengths: Tensor, everywhere: bool = False) -> list[Operands]:
    """Of each rank. rows, slots, strengths: `[rank, ...]`; `everywhere`: none of the strengths is zero."""
    return [
        Operands(
            plate.vectors[rows[j]],
            plate.coefficients[slots[j]].unbind(-1),
            strengths[j],
            None if everywhere else (strengths[j] != 0).unsqueeze(-1),
        )
        for j in range(rows.shape[0])
    ]


def operate(x: Tensor, operands: Sequence[Operands]) -> Tensor:
    """x `[..., d_model]` after the operation for every rank in turn, in the dtype of `x`; arithmetic in float32. What
    is not steered keeps the same bits."""
    y = x if x.dtype in (torch.float32, torch.float64) else x.float()
    for by in operands:
        added = amount(y, by.vectors, by.coefficients, by.strengths).unsqueeze(-1)
        moved = torch.addcmul(y, added, by.vectors)
        # chosen, not added: x + 0 turns −0 into 0, and 0·∞ is NaN
        y = moved if by.steered is None else torch.where(by.steered, moved, y)
    return y if y.dtype == x.dtype else y.to(x.dtype)


def apply(x: Tensor, plate: Plate, rows: Tensor, slots: Tensor, strengths: Tensor) -> Tensor:
    """x `[tokens, d_model]` after what the index says of each token. rows, slots, strengths: `[rank, tokens]`."""
    return operate(x, gather(plate, rows, slots, strengths))
