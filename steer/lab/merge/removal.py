"""What is removed from a model's weights, and where: a direction at the site `writers`, and the model's own writers.

(W − λ·v·vᵀW)x = Wx − λ·v·(vᵀWx): weights orthogonalised by v write what is served with v at `writers`.

Where an RMS norm stands between the weights and the stream (Gemma 2 and 3, OLMo 2, GLM-4), what is written is
g ⊙ Wx / rms(Wx), and W is orthogonalised against u = g ⊙ v: ⟨g ⊙ W'x, v⟩ = ⟨W'x, u⟩ = 0 for every x. So v is gone from
all that is written, as where it is served; the rest differs. The server takes v from the norm's output and leaves the
rest of that as it was. The weights lack u before the norm, which then scales what is left to the size of the whole; and
g ⊙ u is not along v.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from steer.direction import Direction, check_fits
from steer.errors import InvalidInput
from steer.geometry import orthonormalise
from steer.hf.streamed import Change, Streamed
from steer.lab.merge.weights import Checkpoint
from steer.lab.merge.writers import Term, Writer, find, find_terms
from steer.lab.progress import Progress
from steer.names import acts_on_terms
from steer.runtime.bank import EMBEDDING
from steer.runtime.op import WEIGHT, coefficients, displacements, embedding_coefficients

#: The part of a command's progress in which the writers are looked for.
LOOKING = "looking"


@dataclass(frozen=True, slots=True)
class Removal:
    """What is removed from what each layer writes: rows `[k, d_model]` and coefficients `[k, 4]` of the operation."""

    direction: Direction
    strength: float

    def at(self, layer: int, gain: Tensor | None = None) -> tuple[Tensor, Tensor] | None:
        """None where nothing is. With the `gain` `[d_model]` of a norm that comes next, what has to be removed before
        it."""
        direction = self.direction
        if layer == EMBEDDING:
            if direction.embedding is None:
                return None
            return direction.embedding, embedding_coefficients(direction, "ablate")
        rows = direction.directions[layer]
        if not rows.any():
            return None
        if gain is not None:  # the weights of a layer's rows are equal, so any basis of their span will do
            rows = orthonormalise(gain.double() * rows.double()).float()
        return rows, coefficients(direction, "ablate")[layer]

    def taken(self, x: Tensor, layer: int, gain: Tensor | None = None) -> Tensor:
        """What `x` `[..., d_model]` is after the removal, float32."""
        if (found := self.at(layer, gain)) is None:
            return x
        rows, coefficients_ = found
        return x + displacements(x, rows, coefficients_, [self.strength] * len(rows))

    def full(self, layer: int) -> bool:
        """Is the whole component removed there?"""
        found = self.at(layer)
        return found is not None and bool(((found[1][:, WEIGHT] * self.strength - 1).abs() < 1e-6).all())


def removal(direction: Direction, strength: float | None = None) -> Removal:
    """`direction` at the site `writers`. Raises InvalidInput where no edit of weights has its effect."""
    meta = direction.meta
    if not acts_on_terms(meta.sites):
        first = direction.directions[0]
        shared = torch.equal(direction.directions, first.expand_as(direction.directions))
        if not (shared and bool((direction.weights == 1).all())):
            raise InvalidInput(
                "each layer removes its own direction from the whole stream (site 'resid_post'), and no edit of "
                "weights equals that; derive it with --sites writers, or with one source layer"
            )
        direction = replace(direction.with_meta(sites=("writers",), mode="ablate"), embedding=first.clone())
    return Removal(direction, meta.strength if strength is None else strength)


@dataclass(frozen=True, slots=True)
class Plan:
    """A removal from a model: its files, the model streamed from them, what its blocks add to the stream, and which
    tensors of the files write that."""

    checkpoint: Checkpoint
    removal: Removal
    streamed: Streamed
    terms: list[Term]
    writers: list[Writer]

    @property
    def normed(self) -> bool:
        """Does a norm stand between weights and the stream?"""
        return any(term.norm is not None for term in self.terms)

    def at(self, writer: Writer) -> tuple[Tensor, Tensor] | None:
        """Rows and coefficients of the removal from what `writer` writes, None where nothing is removed."""
        return self.removal.at(writer.layer, writer.gain)

    def edited(self, writer: Writer, tensor: Tensor, preserve_norms: bool = False) -> Tensor:
        """`tensor` after the removal, in its own dtype; arithmetic in float32. With `preserve_norms` each vector that
        it writes keeps its length, so that only its direction changes (and stays orthogonal)."""
        if self.at(writer) is None:
            return tensor
        x = writer.written(tensor.float())
        y = self.removal.taken(x, writer.layer, writer.gain)
        if preserve_norms:
            before, after = (torch.linalg.vector_norm(t, dim=-1, keepdim=True) for t in (x, y))
            y = torch.where(after > 0, y * (before / after.clamp_min(torch.finfo(after.dtype).tiny)), y)
        return writer.stored(y).to(tensor.dtype).contiguous()


def plan(checkpoint: Checkpoint, removal: Removal, progress: Progress | None = None) -> Plan:
    """Look at the model in `checkpoint`, in one pass over it. Raises DirectionError for a direction of another model,
    and UnsupportedModel for a model of whose writers something is not known."""
    progress = progress or Progress()
    streamed = stream(checkpoint, progress)
    anatomy, architecture = streamed.anatomy, checkpoint.architecture
    check_fits(removal.direction, d_model=anatomy.d_model, layers=anatomy.layers, architecture=architecture)
    progress.plan(LOOKING, len(streamed.becomes))
    with progress.part(LOOKING):
        terms = find_terms(streamed)
    return Plan(checkpoint, removal, streamed, terms, find(checkpoint, streamed, terms))


def stream(checkpoint: Checkpoint, progress: Progress, change: Change | None = None) -> Streamed:
    """The model in `checkpoint`, which reads its weights as it runs; each tensor is one of `progress`."""

    def read(names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        for pair in checkpoint.tensors(names):
            yield pair
            progress.advance()

    return Streamed(checkpoint.folder, checkpoint.map, read, change, trust_remote_code=checkpoint.trust_remote_code)
