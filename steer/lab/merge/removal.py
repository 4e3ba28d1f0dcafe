"""What is removed from a model's weights, and where: a direction at the site `writers`, and the model's own writers.
That it was removed is shown by its effect: the logits of a pass, and what is left of the direction in the stream. Both
models are streamed, so that one of any size is verified. Of files in 16 bits two things are shown, that the weights
have this effect before they are rounded, and that the files hold them rounded: rounding sends tokens to other experts,
and is as large as what a low strength does, so no writer that was missed could be told from it.

(W − λ·v·vᵀW)x = Wx − λ·v·(vᵀWx): weights orthogonalised by v write what is served with v at `writers`.

Where an RMS norm stands between the weights and the stream (Gemma 2 and 3, OLMo 2, GLM-4), what is written is
g ⊙ Wx / rms(Wx), and W is orthogonalised against u = g ⊙ v: ⟨g ⊙ W'x, v⟩ = ⟨W'x, u⟩ = 0 for every x. So v is gone from
all that is written, as where it is served; the rest differs. The server takes v from the norm's output and leaves the
rest of that as it was. The weights lack u before the norm, which then scales what is left to the size of the whole; and
g ⊙ u is not along v.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor, nn

from steer.direction import Direction, check_fits
from steer.errors import InvalidInput, UnsupportedModel
from steer.geometry import orthonormalise
from steer.hf.internals import short
from steer.hf.streamed import Change, Streamed
from steer.lab.merge.weights import Checkpoint, Term, Writer, find, find_terms
from steer.lab.progress import Progress
from steer.names import MAX_STRENGTH, acts_on_terms
from steer.runtime.bank import EMBEDDING
from steer.runtime.hook_points import hooks, on_input, on_output
from steer.runtime.op import WEIGHT, coefficients, displacements, embedding_coefficients

#: The part of a command's progress in which the writers are looked for.
LOOKING = "looking"
#: What tensors of the files, of these names, were before they were rounded; none of what was not edited.
Unrounded: TypeAlias = Callable[[Iterable[str]], dict[str, Tensor]]


@dataclass(frozen=True, slots=True)
class Removal:
    """What is removed from what each layer writes: rows `[k, d_model]` and coefficients `[k, 6]` of the operation."""

    direction: Direction
    strength: float

    def at(self, layer: int, gain: Tensor | None = None, term: int = 0) -> tuple[Tensor, Tensor] | None:
        """From one `term` of a layer (`HookPoint`); None where nothing is. With the `gain` `[d_model]` of a norm that
        comes next, what has to be removed before it."""
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
        return rows, coefficients(direction, "ablate", term)[layer]

    def taken(self, x: Tensor, layer: int, gain: Tensor | None = None, term: int = 0) -> Tensor:
        """What `x` `[..., d_model]` is after the removal, float32."""
        if (found := self.at(layer, gain, term)) is None:
            return x
        rows, coefficients_ = found
        return x + displacements(x, rows, coefficients_, [self.strength] * len(rows))

    def full(self, layer: int) -> bool:
        """Is the whole component removed there, from all terms?"""
        found = [self.at(layer, term=term) for term in (0, 1)]
        return all(
            each is not None and bool(((each[1][:, WEIGHT] * self.strength - 1).abs() < 1e-6).all()) for each in found
        )


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
    strength = meta.strength_in("ablate") if strength is None else strength
    if not abs(strength) <= MAX_STRENGTH:  # NaN too
        raise InvalidInput(
            f"strength: {strength:g} is not accepted: a number from {-MAX_STRENGTH:g} to {MAX_STRENGTH:g}"
        )
    return Removal(direction, strength)


@dataclass(frozen=True, slots=True)
class RemovalPlan:
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
        return self.removal.at(writer.layer, writer.gain, writer.term)

    def edited(self, writer: Writer, tensor: Tensor, preserve_norms: bool = False) -> Tensor:
        """`tensor` after the removal, in its own dtype; arithmetic in float32. With `preserve_norms` each vector that
        it writes keeps its length, so that only its direction changes (and stays orthogonal)."""
        if self.at(writer) is None:
            return tensor
        x = writer.written(tensor.float())
        y = self.removal.taken(x, writer.layer, writer.gain, writer.term)
        if preserve_norms:
            before, after = (torch.linalg.vector_norm(t, dim=-1, keepdim=True) for t in (x, y))
            y = torch.where(after > 0, y * (before / after.clamp_min(torch.finfo(after.dtype).tiny)), y)
        return writer.stored(y).to(tensor.dtype).contiguous()


def plan(checkpoint: Checkpoint, removal: Removal, progress: Progress | None = None) -> RemovalPlan:
    """Look at the model in `checkpoint`, in one pass over it. Raises DirectionError for a direction of another model,
    and UnsupportedModel for a model of whose writers something is not known."""
    progress = progress or Progress()
    streamed = stream(checkpoint, progress)
    anatomy, architecture = streamed.anatomy, checkpoint.architecture
    check_fits(removal.direction, d_model=anatomy.d_model, layers=anatomy.layers, architecture=architecture)
    progress.plan(LOOKING, len(streamed.becomes))
    with progress.part(LOOKING):
        try:
            terms = find_terms(streamed)
        except RuntimeError as error:  # as of RWKV, which changes its weights where it runs
            raise UnsupportedModel(
                f"{architecture}: a pass that reads one weight after the other fails ({short(error)}), so that it "
                "cannot be baked"
            ) from error
    removal.direction.check_terms({term.layer for term in terms} - {term.layer for term in terms if term.number})
    return RemovalPlan(checkpoint, removal, streamed, terms, find(checkpoint, streamed, terms))


def stream(
    checkpoint: Checkpoint, progress: Progress, change: Change | None = None, unrounded: Unrounded | None = None
) -> Streamed:
    """The model in `checkpoint`, which reads its weights as it runs; each tensor is one of `progress`."""

    def read(names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        names = list(names)
        exact = {} if unrounded is None else unrounded(names)
        for name, tensor in checkpoint.tensors(names):
            if not torch.equal(exact.get(name, tensor).to(tensor.dtype), tensor):
                raise UnsupportedModel(f"{checkpoint.folder}: {name} is not as it was written. Nothing was kept")
            yield name, exact.get(name, tensor)
            progress.advance()

    return Streamed(checkpoint.folder, checkpoint.map, read, change, trust_remote_code=checkpoint.trust_remote_code)


#: The part of a command's progress.
VERIFYING = "verifying"
#: What may differ in the logits, and be left of a component, relative: the rounding of float32.
MOST_LOGITS, MOST_LEFT = 1e-3, 1e-5


@dataclass(frozen=True, slots=True)
class Verdict:
    """How far the edited model is from what it should be, all in float32.

    logits: the largest difference from the original from which the direction is removed where the weights write,
    relative to the largest logit; where no norm comes after the weights that is the original as served with the
    direction at `writers`. None where lengths were preserved, which is another model. served: the same from the
    original as it is served, where a norm comes after (see above), else None. left: the largest share of the stream
    that is left along a removed direction; None where none was to be removed whole.
    """

    logits: float | None
    served: float | None
    left: float | None

    @property
    def found(self) -> str:
        """What was measured, in words."""
        logits = f"logits differ by {self.logits}" if self.logits is not None else ""
        return ", ".join(
            filter(None, [logits, f"{self.left} of the stream is left along it" * (self.left is not None)])
        )

    def __str__(self) -> str:
        told = []
        if self.logits is not None:
            as_served = "as served" if self.served is None else "as the original without it before its norms"
            told.append(f"logits {as_served} to {self.logits:.1e} (accepted: to {MOST_LOGITS:.0e})")
        if self.left is not None:
            told.append(f"{self.left:.1e} of the stream left along it (accepted: up to {MOST_LEFT:.0e})")
        if self.served is not None:
            told.append(
                f"from what is served, which removes it after the norms, the logits differ by {self.served:.1e}, "
                "since a norm scales what the weights leave"
            )
        return "; ".join(told)


def verify(
    plan: RemovalPlan,
    edited: Checkpoint,
    progress: Progress,
    change: Change | None = None,
    preserve_norms: bool = False,
) -> Verdict:
    """Compare `edited`, the files that were made or, with the `change` that an adapter is, the original ones, with what
    `plan` is about.

    Raises UnsupportedModel where it is something else: then some writer was missed, or files were not written as they
    should be. Raises InvalidInput where there is nothing to compare.
    """
    passes = 1 if preserve_norms else 2 + plan.normed
    progress.plan(VERIFYING, passes * len(plan.streamed.becomes))
    writers = {writer.name: writer for writer in plan.writers}

    def unrounded(names: Iterable[str]) -> dict[str, Tensor]:
        originals = plan.checkpoint.tensors(name for name in names if name in writers)
        return {name: plan.edited(writers[name], tensor.float(), preserve_norms) for name, tensor in originals}

    with progress.part(VERIFYING):
        return _verdict(plan, stream(edited, progress, change, None if change else unrounded), preserve_norms)


def _verdict(plan: RemovalPlan, edited: Streamed, preserve_norms: bool) -> Verdict:
    got, left = _without(plan, edited)
    logits = served = None
    if not preserve_norms:
        logits = _apart(got, _logits(plan, ((t.module, t, t.gain) for t in plan.terms)))
        if plan.normed:
            served = _apart(got, _logits(plan, ((t.norm or t.module, t, None) for t in plan.terms)))
    removed = {layer for layer in range(EMBEDDING, plan.removal.direction.layers) if plan.removal.at(layer) is not None}
    if logits is None and not removed <= left.keys():
        raise InvalidInput(
            "there is nothing to verify this by: lengths are kept, which no server does, and no direction is removed "
            "whole from all that is written; give --no-verify to write it unverified"
        )
    largest = float(torch.tensor(list(left.values())).max()) if left else None  # NaN, where there is one
    verdict = Verdict(logits, served, largest)
    if not ((logits or 0.0) <= MOST_LOGITS and (largest or 0.0) <= MOST_LEFT):
        raise UnsupportedModel(
            f"what was made is not the original with the direction removed from what its weights write: {verdict.found}"
            "; some writer of this architecture is not known by its name. Nothing was kept"
        )
    return verdict


def _without(plan: RemovalPlan, edited: Streamed) -> tuple[Tensor, dict[int, float]]:
    """The logits of `edited`, and what is left of the direction in its stream, by layer."""
    removal, blocks, left = plan.removal, edited.anatomy.blocks, dict[int, float]()

    def watch(layer: int, x: Tensor) -> None:
        rows, _ = removal.at(layer) or (None, None)
        if rows is not None and removal.full(layer) and _same_up_to(plan, layer):
            flat = x.reshape(-1, x.shape[-1]).float()
            share = (flat @ rows.T).abs() / torch.linalg.vector_norm(flat, dim=-1, keepdim=True)
            left[layer] = float(share.max())

    handles = [on_input(blocks[0], lambda x: watch(EMBEDDING, x))]
    handles += [on_output(block, lambda x, n=n: watch(n, x)) for n, block in enumerate(blocks)]
    with hooks(handles):
        logits = edited.anatomy.probe().logits.float()
    return logits, left


def _logits(plan: RemovalPlan, places: Iterable[tuple[nn.Module, Term, Tensor | None]]) -> Tensor:
    """The logits of the original with the direction removed from the outputs of these modules and before block 0."""
    removal, blocks = plan.removal, plan.streamed.anatomy.blocks
    handles = [on_input(blocks[0], lambda x: removal.taken(x, EMBEDDING))]
    handles += [
        on_output(m, lambda x, t=t, gain=gain: removal.taken(x, t.layer, gain, t.number)) for m, t, gain in places
    ]
    with hooks(handles):
        logits: Tensor = plan.streamed.anatomy.probe().logits.float()
    return logits


def _apart(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max())


def _same_up_to(plan: RemovalPlan, layer: int) -> bool:
    """Is one and the same direction removed from everything that was written up to `layer`? Then none of it is left."""
    removal, direction = plan.removal, plan.removal.direction
    if direction.embedding is None or not removal.full(EMBEDDING):
        return False
    return all(torch.equal(direction.directions[n], direction.embedding) and removal.full(n) for n in range(layer + 1))
