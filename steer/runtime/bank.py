"""The direction bank: resident direction rows on the device. The token index says which rows act on which token.

Everything here is written **in place** and read through the same storage for the life of the process, so that compiled
graphs and replayed CUDA graphs see each change of content.

A *row* is one direction vector at every hook point. A *slot* is a row in one mode: its coefficients at every hook
point (`op`). Row 0 is all zeros and means plain. `combine` has the matrices by which the rows of one request act
together.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import TypeAlias
from weakref import WeakValueDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from steer.direction import Direction
from steer.errors import NoRoom, SpecError
from steer.names import MODES, SITE_RULES, TURNING, Mode, Site
from steer.runtime import op
from steer.runtime.combine import Combination, Combinations
from steer.runtime.memory import lasting
from steer.runtime.token_index import (
    ANYWHERE,
    UNCONDITIONAL,
    Conditional,
    Decision,
    Probe,
    RequestSteer,
    bounds_of,
    slot,
    slots_of,
    turns,
)
from steer.shape import Shape
from steer.spec import END, Condition, Entry, Spec
from steer.tokenization import Phase

#: The number of sets of entries whose matrices are kept on the host.
KNOWN = 256
#: The stream before block 0 counts as layer −1 of its site.
EMBEDDING = -1


@dataclass(frozen=True, slots=True)
class HookPoint:
    """Where rows act.

    Attributes:
        site: the site.
        layer: the layer, EMBEDDING for the stream before block 0.
        term: the number of the term in the order in which the block makes them: 0 for attention's, 1 for the MLP's.
    """

    site: Site
    layer: int
    term: int = 0

    @property
    def readable(self) -> bool:
        """Whether a read-out can be taken here."""
        return SITE_RULES[self.site].readable and self.layer != EMBEDDING

    @property
    def modes(self) -> tuple[Mode, ...]:
        """The modes that can act here. For the stream before block 0 no class means are known."""
        return ("ablate",) if self.layer == EMBEDDING else SITE_RULES[self.site].modes


@dataclass(slots=True)
class BankSlice:
    """The rows of one hook point.

    Attributes:
        vectors: `[rows, d_model]` float32.
        coefficients: `[rows × modes, 6]` float32.
        number: the layer of the hook point, counted from 0 for the stream before block 0; `[]` int32. It is a tensor so
            that the compiled code is the same for all layers.
        joint: `[combinations + 1, rank, rank]` float32 (see `combine`); None if the rank is 1.
    """

    vectors: Tensor
    coefficients: Tensor
    number: Tensor
    joint: Tensor | None = None

    @classmethod
    def empty(cls, rows: int, d_model: int, device: torch.device | str, layer: int = EMBEDDING) -> BankSlice:
        with lasting():
            bank_slice = cls(
                torch.zeros(rows, d_model, dtype=torch.float32, device=device),
                torch.zeros(rows * len(MODES), op.COEFFICIENTS, dtype=torch.float32, device=device),
                torch.tensor(layer - EMBEDDING, dtype=torch.int32, device=device),
            )
        bank_slice.clear(range(rows))
        return bank_slice

    def write(self, row: int, vector: Tensor, by_mode: Mapping[Mode, Tensor]) -> None:
        """Write one row. vector: `[d_model]`; by_mode: the coefficients `[6]` of each mode to write."""
        self.vectors[row].copy_(vector)
        for mode, values in by_mode.items():
            self.coefficients[slot(row, mode)].copy_(values)

    def clear(self, rows: Sequence[int]) -> None:
        for row in rows:
            self.vectors[row].zero_()
            slots = self.coefficients[slots_of(row)]
            slots.zero_()
            slots[:, op.GATE] = slots[:, op.FLOOR] = -torch.inf


@dataclass(frozen=True, slots=True)
class _Resident:
    """A resident direction.

    Attributes:
        rows: its bank rows, with the row of its axis last if the axis is in the bank.
        own: how many of these rows are its own, without the axis.
        direction: the direction itself if requests can combine it with others, else None.
    """

    rows: list[int]
    own: int
    direction: Direction | None

    def acting(self, mode: Mode) -> list[int]:
        """The rows that act in `mode`. Raises SpecError for a mode that turns if the axis has no row, because it would
        do nothing."""
        if mode in TURNING and len(self.rows) == self.own:
            raise SpecError(f"the mode '{mode}' needs a bank of rank 2 and a file with a plane", param="steer.mode")
        return self.rows if mode in TURNING else self.rows[: self.own]


class DirectionBank:
    """Resident directions at all hook points of one model, and which rows belong to which direction.

    Loading writes rows that no request uses, so a running step is never disturbed.

    Args:
        points: the hook points.
        rows: the number of usable rows. A direction of rank k takes k rows, and one more for its axis if `rank` is not
            1.
        rank: the most rows that one request can use.
        d_model: the width of the stream.
        device: where the rows are.
        requests: the most requests that one step can have. Compiled code that reads the bank needs this number; None if
            only eager passes read the bank.
    """

    def __init__(
        self,
        points: Sequence[HookPoint],
        *,
        rows: int,
        rank: int,
        d_model: int,
        device: torch.device | str = "cpu",
        requests: int | None = None,
    ) -> None:
        self.rows, self.rank, self.d_model = rows, rank, d_model
        self.sites: frozenset[Site] = frozenset(point.site for point in points)
        self.slices = {point: BankSlice.empty(rows + 1, d_model, device, point.layer) for point in points}
        terms = [p for p in points if not SITE_RULES[p.site].whole and p.layer != EMBEDDING]
        #: The layers whose block writes a single term.
        self._single = {p.layer for p in terms} - {p.layer for p in terms if p.term}
        self._free = list(range(rows, 0, -1))
        self._resident: dict[str, _Resident] = {}
        self.combinations = Combinations(list(self.slices.values()), rank, device, requests) if rank > 1 else None
        self._combined: WeakValueDictionary[_Key, Combination] = WeakValueDictionary()
        # an lru_cache, because requests are prepared in several threads
        self._joined = lru_cache(KNOWN)(partial(_joined, self._resident, tuple(self.slices), rank, d_model))

    @property
    def rows_in_use(self) -> int:
        return self.rows - len(self._free)

    def load(self, digest: str, direction: Direction) -> None:
        """Make `direction` resident. Nothing changes if this raises.

        Raises:
            NoRoom: fewer rows are free than the direction needs.
            DirectionError: the direction has different weights for two terms, and a block of the model writes both as a
                single term.
        """
        if digest in self._resident:
            return
        direction.check_terms(self._single)
        if (count := direction.resident(self.rank)) > len(self._free):
            raise NoRoom(
                f"the direction needs {count} free bank rows, {len(self._free)} of {self.rows} are free; "
                "delete a direction, wait for running requests to end, or start with more rows"
            )
        rows = [self._free.pop() for _ in range(count)]
        try:
            self._write(rows, direction)
        except BaseException:
            self._give_back(rows)
            raise
        self._resident[digest] = _Resident(rows, direction.rank, direction if self.rank > 1 else None)

    def _write(self, rows: Sequence[int], direction: Direction) -> None:
        usable = [mode for mode in MODES if mode not in TURNING or len(rows) > direction.rank]
        modes = {mode: _Values.of(direction, mode) for mode in usable}
        for point, bank_slice in self.slices.items():
            bank_slice.clear(rows)  # in case the direction has no vector here: free rows may hold anything
            if (vectors := _vectors(direction, point, len(rows))) is None:
                continue
            by_mode = {mode: values.at(point) for mode, values in modes.items()}
            for k, row in enumerate(rows):
                bank_slice.write(row, vectors[k], {mode: each[k] for mode, each in by_mode.items() if k < len(each)})

    def unload(self, digest: str) -> None:
        """Free a direction's rows. The caller guarantees that no running request uses them.

        No lock is needed: the registry makes one load at a time, and a row is assigned again only after it was freed.
        """
        if resident := self._resident.pop(digest, None):
            self._give_back(resident.rows)

    def _give_back(self, rows: Sequence[int]) -> None:
        for bank_slice in self.slices.values():
            bank_slice.clear(rows)
        self._free += reversed(rows)

    def renumber(self) -> None:
        """Write the numbers of the hook points again. This is for device memory whose content was lost."""
        for point, bank_slice in self.slices.items():
            bank_slice.number.fill_(point.layer - EMBEDDING)

    def contents(self, digest: str) -> list[Tensor]:
        """All values that the bank holds for a resident direction, as views of its tensors, always in the same
        order."""
        return [
            view
            for bank_slice in self.slices.values()
            for row in self._resident[digest].rows
            for view in (bank_slice.vectors[row], bank_slice.coefficients[slots_of(row)])
        ]

    @contextmanager
    def borrowed(self) -> Iterator[int]:
        """Lend a row for a trial, while no request runs: a free row, or else row 1. The content of the row is put back
        at the end."""
        free = bool(self._free)
        row = self._free.pop() if free else 1
        slots = slots_of(row)
        kept = [
            (bank_slice.vectors[row].clone(), bank_slice.coefficients[slots].clone())
            for bank_slice in self.slices.values()
        ]
        try:
            yield row
        finally:
            for bank_slice, (vector, coefficients) in zip(self.slices.values(), kept, strict=True):
                bank_slice.vectors[row].copy_(vector)
                bank_slice.coefficients[slots].copy_(coefficients)
            if free:
                self._free.append(row)

    def rows_of(self, digests: Sequence[str], axes: bool = False) -> NDArray[np.int64]:
        """The rows of resident directions in order, `[k]` int64. With `axes` each direction's own rows are followed by
        the row of its axis."""
        found = [self._resident[digest] for digest in digests]
        return np.array([row for each in found for row in each.rows[: None if axes else each.own]], np.int64)

    def steer(self, spec: Spec, prompt: int | None = None, phase: Phase | None = None) -> RequestSteer | None:
        """The index entries of a request, None for a plain request.

        Args:
            spec: the spec of the request. Its directions must be resident.
            prompt: the number of tokens of the prompt, None if it is not known.
            phase: the `Spec.phase` of the request.

        Raises:
            SpecError: `spec` acts at some tokens only or has a condition, and `prompt` is None.
        """
        if not spec:
            return None
        if spec.everywhere and spec.condition is None:
            return self._steer(spec)
        if prompt is None:
            what, param = f"the condition {spec.condition}", "steer.if"
            if spec.condition is None:
                what, param = f"tokens: '{next(e.tokens for e in spec.entries if e.tokens)}'", "steer.tokens"
            raise SpecError(
                f"{what} is for requests to a server: here it is not known where the prompt ends", param=param
            )
        spans = [(entry, *entry.span(prompt)) for entry in spec.entries]
        bounds = {bound for _, *span in spans for bound in span}
        if spec.decided_once:
            bounds.add(prompt)  # after the token that decides
        cuts = sorted(bound for bound in bounds if 0 < bound < END)
        parts = [
            self._steer(Spec(tuple(entry for entry, start, stop in spans if start <= at < stop))) for at in (0, *cuts)
        ]
        first, *rest = (
            self._deciding(
                part or RequestSteer.plain(self.rank),
                spec,
                at == prompt - 1 if spec.decided_once else part is not None,
                phase if part else None,
            )
            for part, at in zip(parts, (0, *cuts), strict=True)
        )
        return replace(first, then=tuple(zip(cuts, rest, strict=True)))

    def _deciding(self, steer: RequestSteer, spec: Spec, decides: bool, phase: Phase | None) -> RequestSteer:
        """One part of a request's steering, with its condition or the phase in which it acts.

        Args:
            steer: the part, without its condition or phase.
            spec: the spec of the request.
            decides: whether the token that decides is in this part. (Under a condition with `each`, every token
                decides.)
            phase: the phase in which the part acts, None if it acts at all its tokens.
        """
        if phase is not None:
            return replace(steer, decision=Decision(UNCONDITIONAL), phase=phase)
        if (condition := spec.condition) is None:
            return steer
        if decides:
            (row,) = self.rows_of([condition.digest])
            steer.slots[-1] = slot(int(row), "ablate")
        decision = None if condition.each else Decision(UNCONDITIONAL)
        return replace(steer, decision=decision, probe=probe_of(condition) if decides else None)

    def _steer(self, spec: Spec) -> RequestSteer | None:
        """The index entries for `spec` as if it acted at all tokens and had no condition; None if it is empty."""
        if not spec:
            return None
        entries = sorted(spec.entries, key=lambda entry: entry.mode not in TURNING)  # pairs must begin at even places
        pairs = [
            (
                slot(row, entry.mode),
                entry.strength,
                bounds_of(entry.range if entry.layers else None, bool(entry.norm_preserving)),
                entry.shift or 0,
            )
            for entry in entries
            for row in self._resident[entry.digest].acting(entry.mode)
        ]
        assert len(pairs) <= self.rank, "the registry admits no spec that needs more"
        out = RequestSteer.plain(self.rank, self._combination(entries))
        bounds, shifts = np.full(self.rank, ANYWHERE, np.int32), np.zeros(self.rank, np.float32)
        for i, pair in enumerate(pairs):
            out.slots[i], out.strengths[i], bounds[i], shifts[i] = pair
        limited = None if (bounds == ANYWHERE).all() else bounds
        return replace(out, bounds=limited, shifts=shifts if shifts.any() else None)

    def _combination(self, entries: Sequence[Entry]) -> Combination | None:
        """The combination by which `entries` act together; None if each acts as if it were alone.

        Its key is made of the digests of the files, so a direction that is loaded into the same rows later cannot find
        it. It is kept as long as a request or a slot refers to it.
        """
        acting = [entry for entry in entries if _acts(entry)]
        if self.combinations is None or sum(len(self._resident[e.digest].acting(e.mode)) for e in acting) < 2:
            return None
        key = tuple((entry.digest, entry.mode, _acts(entry), entry.layers) for entry in entries)
        if found := self._combined.get(key):
            return found
        matrices = self._matrices(entries)
        if torch.equal(matrices, torch.eye(self.rank, dtype=matrices.dtype).expand_as(matrices)):
            return None
        return self._combined.setdefault(key, Combination(matrices, self.combinations))

    def _matrices(self, entries: Sequence[Entry]) -> Tensor:
        """M of each hook point, `[hook points, rank, rank]` float32, on the host.

        Hook points at which the same entries act share one computation, so M is computed once for each such set of
        entries.
        """
        together: dict[tuple[bool, ...], list[int]] = {}
        for i, point in enumerate(self.slices):
            together.setdefault(tuple(_acts(e) and _reaches(e, point) for e in entries), []).append(i)
        out = torch.empty(len(self.slices), self.rank, self.rank, dtype=torch.float32)
        for acting, points in together.items():
            known = self._joined(tuple((e.digest, e.mode, acts) for e, acts in zip(entries, acting, strict=True)))
            out[points] = known[points]
        return out


@dataclass(slots=True)
class LocalPlacement:
    """A `Placement` (see `steer.registry`) on one bank in this process."""

    shape: Shape
    bank: DirectionBank

    def load(self, digest: str, direction: Direction, data: bytes) -> None:
        self.bank.load(digest, direction)

    def unload(self, digest: str) -> None:
        self.bank.unload(digest)


#: For each entry of a request: its digest, its mode, whether it acts, and at which layers.
_Key: TypeAlias = tuple[tuple[str, str, bool, str | None], ...]


@dataclass(frozen=True, slots=True)
class _Values:
    """The coefficients of one mode at all hook points; those of the layers are stored by term."""

    layers: tuple[Tensor, Tensor]
    embedding: Tensor

    @classmethod
    def of(cls, direction: Direction, mode: Mode) -> _Values:
        of_terms = op.coefficients(direction, mode, 0), op.coefficients(direction, mode, 1)
        return cls(of_terms, op.embedding_coefficients(direction, mode))

    def at(self, point: HookPoint) -> Tensor:
        """The coefficients at `point`, `[k, 6]`."""
        return self.embedding if point.layer == EMBEDDING else self.layers[point.term][point.layer]


def _joined(
    resident: Mapping[str, _Resident],
    points: Sequence[HookPoint],
    rank: int,
    d_model: int,
    entries: tuple[tuple[str, Mode, bool], ...],
) -> Tensor:
    """M of each of `points`, `[points, rank, rank]`, if each entry that acts does so at all layers. entries: the
    digest, the mode, and whether the entry acts."""
    vectors = torch.zeros(len(points), rank, d_model, dtype=torch.float32)
    weights = torch.zeros(len(points), rank, dtype=torch.float32)
    at = 0
    for digest, mode, acts in entries:
        direction = resident[digest].direction
        assert direction is not None, "the rank is not 1"
        values, part = _Values.of(direction, mode), slice(at, at + direction.rows_in(mode))
        at = part.stop
        for i, point in enumerate(points if acts else ()):
            if (own := _vectors(direction, point, part.stop - part.start)) is not None:
                vectors[i, part], weights[i, part] = own, values.at(point)[:, op.WEIGHT]
    return op.joint(vectors, weights)


def _acts(entry: Entry) -> bool:
    """Whether the strength of `entry` is not zero in float32."""
    return bool(np.float32(entry.strength))


def _reaches(entry: Entry, point: HookPoint) -> bool:
    """Whether the layers of `entry` include the layer of `point`."""
    return entry.layers is None or entry.range[0] <= point.layer <= entry.range[1]


def _vectors(direction: Direction, point: HookPoint, count: int) -> Tensor | None:
    """The first `count` rows of `direction` at `point`, `[count, d_model]`; None if it has none there.

    If `count` is larger than the direction's own number of rows, the last row is its axis. Before block 0 the axis is
    zero, because nothing is turned there.
    """
    if point.site not in direction.meta.sites:
        return None
    if (own := direction.embedding if point.layer == EMBEDDING else direction.directions[point.layer]) is None:
        return None
    if count == len(own):
        return own
    assert direction.axis is not None, "checked"
    axis = torch.zeros_like(direction.axis[0]) if point.layer == EMBEDDING else direction.axis[point.layer]
    return torch.cat([own, axis.unsqueeze(0)])


@dataclass(frozen=True, slots=True)
class Operands:
    """One of the `rank` entries that act on the stream at one hook point. All shapes broadcast to the stream.

    Attributes:
        vectors: the row of each token, `[..., d_model]`.
        coefficients: the coefficients of `op`, with shifted gates, one tensor `[...]` each.
        strengths: `[...]`.
        gated: whether the entry may have a gate.
        steered: which tokens are steered, `[..., 1]` bool; None for all.
        shares: this entry's row of `op`'s M, `[..., rank]`; None for the identity.
        turned: which tokens are turned by this entry and the next one, `[...]` bool; None if no token can be.
        keeps: the tokens whose norm this entry keeps, `[..., 1]` bool; None if there can be none.
    """

    vectors: Tensor
    coefficients: tuple[Tensor, ...]
    strengths: Tensor
    gated: bool
    steered: Tensor | None
    shares: Tensor | None
    turned: Tensor | None
    keeps: Tensor | None


def gather(
    bank_slice: BankSlice,
    rows: Tensor,
    slots: Tensor,
    strengths: Tensor,
    bounds: Tensor | None = None,
    shifts: Tensor | None = None,
    combinations: Tensor | None = None,
    everywhere: bool = False,
    gated: bool = True,
    turning: bool = True,
    keeping: bool = True,
) -> list[Operands]:
    """The operands of each of the `rank` entries at the hook point of `bank_slice`.

    Args:
        bank_slice: the rows of the hook point.
        rows, slots, strengths, bounds, shifts: `[rank, ...]`, as in `Acts`.
        combinations: `[...]`, as in `Acts`.
        everywhere: whether no strength is zero.
        gated: whether a slot may be of a mode that has a gate.
        turning: whether a slot may be of a mode that turns.
        keeping: whether an entry may keep the norm.
    """
    count = rows.shape[0]
    keeps = None
    if bounds is not None:
        strengths = op.within(strengths, bounds, bank_slice.number)
        if keeping:
            keeps = (strengths != 0) & (bounds & op.KEEPS != 0)
    values = [bank_slice.coefficients[slots[j]].unbind(-1) for j in range(count)]
    if shifts is not None:
        values = [op.shifted(each, shifts[j]) for j, each in enumerate(values)]
    matrices = None
    if combinations is not None and bank_slice.joint is not None and count > 1:
        matrices = bank_slice.joint[combinations]
    return [
        Operands(
            bank_slice.vectors[rows[j]],
            values[j],
            strengths[j],
            gated,
            None if everywhere else (strengths[j] != 0).unsqueeze(-1),
            None if matrices is None else matrices[..., j, :count],
            turns(slots[j]) if turning and j % 2 == 0 and j + 1 < count else None,
            None if keeps is None else keeps[j].unsqueeze(-1),
        )
        for j in range(count)
    ]


def operate(
    x: Tensor, operands: Sequence[Operands], dtype: torch.dtype | None = None, asks: bool = False
) -> tuple[Tensor, Tensor]:
    """Apply the operation of all operands together. The arithmetic is in float32. Tokens that are not steered keep the
    same bits.

    Args:
        x: the stream, `[..., d_model]`.
        operands: the entries that act.
        dtype: the dtype of the model's stream if x has more bits than it; None for the dtype of x.
        asks: whether to ask at once if any token is lost, and to leave out what is for lost tokens. On an accelerator
            this would wait for the result.

    Returns:
        The stream after the operation, in the dtype of x; and which tokens are lost (see `op.out_of_range`), `[...]`
        bool.
    """
    before = x if x.dtype in (torch.float32, torch.float64) else x.float()
    moved, _, _ = _displaced(before, operands)
    keeps = _any([by.keeps for by in operands])
    square = _square(moved.detach() if keeps is None else moved)
    if keeps is not None:
        factor = torch.where(keeps, op.restoring(_square(before), square), 1.0)
        moved, square = moved * factor, (square * factor.square()).detach()
    lost = op.out_of_range(square, _any([by.steered for by in operands]), dtype or x.dtype)
    y = moved if asks and not lost.any() else op.settled(before, moved, lost)
    return y if y.dtype == x.dtype else y.to(x.dtype), lost.squeeze(-1)


def operate_before_norm(x: Tensor, operands: Sequence[Operands], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Apply the operation as `operate` does to x in float32, for a norm that reads the result next.

    For a single entry the mean square of the result is computed from sums over x and the row (`op.growth`), so that
    compiled code needs no further pass over x' for it.

    Args:
        x: the stream, `[..., d_model]` float32.
        operands: the entries that act.
        dtype: the dtype of the model's stream.

    Returns:
        The stream after the operation; which tokens are lost, `[...]` bool; and the mean square of the stream after the
        operation, `[..., 1]`.
    """
    before, d_model = x.square().mean(-1, keepdim=True), x.shape[-1]
    moved, found, added = _displaced(x, operands)
    if len(operands) == 1:
        grown = op.growth(found[0], added[0], operands[0].vectors).unsqueeze(-1)
        after = (before + grown / d_model).clamp_min(0)
    else:
        after = moved.square().mean(-1, keepdim=True)
    if (keeps := _any([by.keeps for by in operands])) is not None:
        factor = torch.where(keeps, op.restoring(before, after), 1.0)
        moved, after = moved * factor, after * factor.square()
    steered = _any([by.steered for by in operands])
    lost = op.out_of_range(after * d_model, steered, dtype)
    y = op.settled(x, moved, lost)
    if steered is not None:
        after = torch.where(steered, after, before)
    # For a lost token it is the mean square of x, or ∞ if that is not finite: a norm then makes 0 of the token.
    return y, lost.squeeze(-1), torch.where(lost, torch.nan_to_num(before, torch.inf, torch.inf), after)


def _displaced(x: Tensor, operands: Sequence[Operands]) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Return x', which may be out of range; and for each entry the component of x along its row, and the amount that is
    added along this row, `[...]` each."""
    found = [op.component(x, by.vectors) for by in operands]
    asked = [op.amount(c, by.coefficients, by.strengths, by.gated) for c, by in zip(found, operands, strict=True)]
    for j, by in enumerate(operands):
        if by.turned is not None:
            both = op.turn(found[j], found[j + 1], by.coefficients, by.strengths, by.gated)
            asked[j : j + 2] = [torch.where(by.turned, new, c) for new, c in zip(both, asked[j : j + 2], strict=True)]
    added = [own if by.shares is None else op.shared(asked, by.shares) for own, by in zip(asked, operands, strict=True)]
    for a, by in zip(added, operands, strict=True):
        moved = torch.addcmul(x, a.unsqueeze(-1), by.vectors)
        # `where`, because adding zero is not enough for plain tokens: x + 0 turns −0 into 0, and 0·∞ is NaN
        x = moved if by.steered is None else torch.where(by.steered, moved, x)
    return x, found, added


def _square(x: Tensor) -> Tensor:
    """‖x‖², `[..., 1]`."""
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True).square()


def _any(flags: Sequence[Tensor | None]) -> Tensor | None:
    """Which tokens have any of these flags, `[..., 1]` bool; None if one of them is None."""
    found = None
    for each in flags:
        if each is None:
            return None
        found = each if found is None else found | each
    return found


def probe_of(condition: Condition) -> Probe:
    """The probe for `condition`: how the tokens that decide it compare their component."""
    point, number, each = condition.layer - EMBEDDING, condition.above, bool(condition.each)
    return Probe(-point, condition.below or 0.0, each) if number is None else Probe(point, number, each)


def decide(x: Tensor, bank_slice: BankSlice, rows: Tensor, conditional: Conditional) -> None:
    """Write into `conditional.opened` what tokens decide at the hook point of `bank_slice`.

    Args:
        x: the stream, `[tokens, d_model]`.
        bank_slice: the rows of the hook point.
        rows: the bank rows of each token, `[rank, tokens]`. A token decides by the last of them.
        conditional: how the tokens decide.
    """
    c = op.component(x.float(), bank_slice.vectors[rows[-1]])
    conditional.opened.copy_(op.decided(c, *conditional, bank_slice.number))
