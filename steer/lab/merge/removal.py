"""Plan and verify the removal of a direction from a model's weights: what is removed, and from which writers.

The direction acts at the site `writers`. The effect of a removal verifies it: the logits of a pass, and how much of the
direction is left in the stream. Both models are streamed, so that models of any size can be verified.

Files in 16 bits are verified in two steps: the weights have this effect before they are rounded, and the files hold
exactly these weights, rounded. The effect of the rounded weights would not do: rounding can send tokens to other
experts, and its effect is as large as that of a low strength, so a missed writer could not be told from it.

(W − λ·v·vᵀW)x = Wx − λ·v·(vᵀWx): weights orthogonalised by v write what is served with v at `writers`.

If there is an RMS norm between the weights and the stream (Gemma 2 and 3, OLMo 2, GLM-4), the term that is written is
g ⊙ Wx / rms(Wx), and W is orthogonalised against u = g ⊙ v: ⟨g ⊙ W'x, v⟩ = ⟨W'x, u⟩ = 0 for every x. So v is removed
from everything that is written, as in serving, but the rest differs. The server removes v from the norm's output and
leaves the rest of the output as it was. The weights lack u before the norm; the norm then scales what is left to the
size of the whole, and g ⊙ u is not along v.
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

#: The name of the part of the progress in which the writers are looked for.
LOOKING = "looking"
#: Returns the edited ones of the named tensors as they were before they were rounded for the files.
Unrounded: TypeAlias = Callable[[Iterable[str]], dict[str, Tensor]]


@dataclass(frozen=True, slots=True)
class Removal:
    """The removal of `direction` at `strength` from what each layer writes."""

    direction: Direction
    strength: float

    def at(self, layer: int, gain: Tensor | None = None, term: int = 0) -> tuple[Tensor, Tensor] | None:
        """The rows `[k, d_model]` and the coefficients `[k, 6]` of the operation at one term of a layer.

        Args:
            layer: EMBEDDING for the stream before block 0.
            gain: of the norm that comes next, `[d_model]`. With it, the rows are those to remove before the norm.
            term: the number of the term, see `HookPoint`.

        Returns:
            None if nothing is removed there.
        """
        direction = self.direction
        if layer == EMBEDDING:
            if direction.embedding is None:
                return None
            return direction.embedding, embedding_coefficients(direction, "ablate")
        rows = direction.directions[layer]
        if not rows.any():
            return None
        if gain is not None:  # the rows of a layer have equal weights, so any basis of their span has the same effect
            rows = orthonormalise(gain.double() * rows.double()).float()
        return rows, coefficients(direction, "ablate", term)[layer]

    def taken(self, x: Tensor, layer: int, gain: Tensor | None = None, term: int = 0) -> Tensor:
        """`x` `[..., d_model]` after the removal, float32; `x` itself if nothing is removed there."""
        if (found := self.at(layer, gain, term)) is None:
            return x
        rows, coefficients_ = found
        return x + displacements(x, rows, coefficients_, [self.strength] * len(rows))

    def full(self, layer: int) -> bool:
        """Whether the whole component is removed at `layer`, from all terms."""
        found = [self.at(layer, term=term) for term in (0, 1)]
        return all(
            each is not None and bool(((each[1][:, WEIGHT] * self.strength - 1).abs() < 1e-6).all()) for each in found
        )


def removal(direction: Direction, strength: float | None = None) -> Removal:
    """The removal of `direction` at the site `writers`.

    Args:
        strength: by default the direction's own strength for `ablate`.

    Raises:
        InvalidInput: no edit of weights has the direction's effect, or `strength` is out of range.
    """
    meta = direction.meta
    if not acts_on_terms(meta.sites):
        first = direction.directions[0]
        problems = []
        if not torch.equal(direction.directions, first.expand_as(direction.directions)):
            problems.append("each layer removes its own direction")
        if bool((direction.weights != 1).any()):
            problems.append("some layers remove more of it than others (weights)")
        if problems:
            raise InvalidInput(
                "no edit of weights equals what this direction does at the site 'resid_post': "
                f"{' and '.join(problems)}; accepted: one direction of weight 1 at all layers, or a file of the "
                "site 'writers' (`steer fit`, `steer search` or `steer derive` with --sites writers)"
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
    """A removal from a model.

    Attributes:
        checkpoint: the model's files.
        streamed: the model, streamed from the files.
        terms: what its blocks add to the stream.
        writers: the tensors of the files that write to the stream.
    """

    checkpoint: Checkpoint
    removal: Removal
    streamed: Streamed
    terms: list[Term]
    writers: list[Writer]

    @property
    def normed(self) -> bool:
        """Whether there is a norm between the weights of a term and the stream."""
        return any(term.norm is not None for term in self.terms)

    def at(self, writer: Writer) -> tuple[Tensor, Tensor] | None:
        """The rows and coefficients of the removal from what `writer` writes; None if nothing is removed."""
        return self.removal.at(writer.layer, writer.gain, writer.term)

    def edited(self, writer: Writer, tensor: Tensor, preserve_norms: bool = False) -> Tensor:
        """`tensor` after the removal, in its own dtype; the arithmetic is in float32. With `preserve_norms` each vector
        that it writes keeps its length: only the vector's direction changes (and stays orthogonal)."""
        if self.at(writer) is None:
            return tensor
        x = writer.written(tensor.float())
        y = self.removal.taken(x, writer.layer, writer.gain, writer.term)
        if preserve_norms:
            before, after = (torch.linalg.vector_norm(t, dim=-1, keepdim=True) for t in (x, y))
            y = torch.where(after > 0, y * (before / after.clamp_min(torch.finfo(after.dtype).tiny)), y)
        return writer.stored(y).to(tensor.dtype).contiguous()


def plan(checkpoint: Checkpoint, removal: Removal, progress: Progress | None = None) -> RemovalPlan:
    """Find the terms and writers of the model in `checkpoint`, in one pass over it.

    Raises:
        DirectionError: the direction is for another model.
        UnsupportedModel: the writers of the model cannot be found.
    """
    progress = progress or Progress()
    streamed = stream(checkpoint, progress)
    anatomy, architecture = streamed.anatomy, checkpoint.architecture
    check_fits(removal.direction, d_model=anatomy.d_model, layers=anatomy.layers, architecture=architecture)
    progress.plan(LOOKING, len(streamed.becomes))
    with progress.part(LOOKING):
        try:
            terms = find_terms(streamed)
        except RuntimeError as error:  # for example RWKV, which changes its weights when it runs
            raise UnsupportedModel(
                f"{architecture}: a pass that reads one weight after the other fails ({short(error)}), so that it "
                "cannot be baked"
            ) from error
    removal.direction.check_terms({term.layer for term in terms} - {term.layer for term in terms if term.number})
    return RemovalPlan(checkpoint, removal, streamed, terms, find(checkpoint, streamed, terms))


def stream(
    checkpoint: Checkpoint, progress: Progress, change: Change | None = None, unrounded: Unrounded | None = None
) -> Streamed:
    """The model in `checkpoint`, which reads its weights as it runs. Each tensor that is read advances `progress` by
    1. `unrounded`: compute with these tensors, after a check that the files hold them rounded."""

    def read(names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        names = list(names)
        exact = {} if unrounded is None else unrounded(names)
        for name, tensor in checkpoint.tensors(names):
            written = exact.get(name)
            if written is not None and not torch.equal(written.to(tensor.dtype).nan_to_num(), tensor.nan_to_num()):
                raise UnsupportedModel(f"{checkpoint.folder}: {name} is not as it was written. Nothing was kept")
            yield name, tensor if written is None else written
            progress.advance()

    return Streamed(checkpoint.folder, checkpoint.map, read, change, trust_remote_code=checkpoint.trust_remote_code)


#: The rows of a tensor that are compared at once.
ROWS = 4096
#: The name of the part of the progress in which a merge is verified.
VERIFYING = "verifying"
#: The largest accepted difference of the logits, and the largest share that may be left of a component, relative: the
#: rounding of float32.
MOST_LOGITS, MOST_LEFT = 1e-3, 1e-5


@dataclass(frozen=True, slots=True)
class Verdict:
    """How far the edited model is from what it should be. All values are computed in float32.

    Attributes:
        logits: the largest difference from the original model with the direction removed where its weights write,
            relative to the largest logit. If no norm comes after the weights, this is the original as it is served
            with the direction at `writers`. None if lengths were preserved, which makes another model.
        served: the same difference from the original as it is served, if a norm comes after the weights (see the
            module's docstring), else None.
        left: the largest share of the stream that is left along a removed direction; None if no direction was to be
            removed whole.
        kept: the share of the change of the weights that the files hold, where they round it to 16 bits: how far it
            goes along the change that was verified. None for files in 32 bits.
    """

    logits: float | None
    served: float | None
    left: float | None
    kept: float | None = None

    @property
    def found(self) -> str:
        """The measured values, in words."""
        logits = f"logits differ by {self.logits}" if self.logits is not None else ""
        return ", ".join(
            filter(None, [logits, f"{self.left} of the stream is left along it" * (self.left is not None)])
        )

    def __str__(self) -> str:
        parts = []
        if self.logits is not None:
            as_served = "as served" if self.served is None else "as the original without it before its norms"
            parts.append(f"logits {as_served} to {self.logits:.1e} (accepted: to {MOST_LOGITS:.0e})")
        if self.left is not None:
            parts.append(f"{self.left:.1e} of the stream left along it (accepted: up to {MOST_LEFT:.0e})")
        if self.served is not None:
            parts.append(
                f"from what is served, which removes it after the norms, the logits differ by {self.served:.1e}, "
                "since a norm scales what the weights leave"
            )
        if self.kept is not None:
            parts.append(
                "all of it before the weights were rounded; the files hold exactly these, rounded to 16 bits, which "
                f"leaves {self.kept:.1%} of the change"
            )
        return "; ".join(parts)


def verify(
    plan: RemovalPlan,
    edited: Checkpoint,
    progress: Progress,
    change: Change | None = None,
    preserve_norms: bool = False,
) -> Verdict:
    """Compare `edited` with what `plan` describes.

    Args:
        edited: the files of the edited model, or the original ones with the `change` that an adapter makes.
        change: is applied to each parameter of `edited`.
        preserve_norms: whether the vectors that are written kept their lengths.

    Raises:
        UnsupportedModel: the models differ, so a writer was missed, or files were not written as they should be.
        InvalidInput: there is nothing to compare.
    """
    passes = 1 if preserve_norms else 2 + plan.normed
    progress.plan(VERIFYING, passes * len(plan.streamed.becomes))
    writers = {writer.name: writer for writer in plan.writers}

    kept = whole = 0.0

    def unrounded(names: Iterable[str]) -> dict[str, Tensor]:
        nonlocal kept, whole
        exact = {}
        for name, tensor in plan.checkpoint.tensors(name for name in names if name in writers):
            exact[name] = plan.edited(writers[name], tensor.float(), preserve_norms)
            for old, new in zip(tensor.split(ROWS), exact[name].split(ROWS), strict=True):
                wanted, got = new - old, new.to(old.dtype).float() - old
                kept += float((wanted * got).sum(dtype=torch.float64))
                whole += float(wanted.square().sum(dtype=torch.float64))
        return exact

    (_, stored), *_ = edited.tensors([plan.writers[0].name])
    rounded = change is None and stored.dtype != torch.float32
    with progress.part(VERIFYING):
        streamed = stream(edited, progress, change, None if change else unrounded)
        verdict = _verdict(plan, streamed, preserve_norms)
    return replace(verdict, kept=kept / whole) if rounded and whole else verdict


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
    largest = float(torch.tensor(list(left.values())).max()) if left else None  # NaN if one of them is NaN
    verdict = Verdict(logits, served, largest)
    if not ((logits or 0.0) <= MOST_LOGITS and (largest or 0.0) <= MOST_LEFT):
        raise UnsupportedModel(
            f"what was made is not the original with the direction removed from what its weights write: {verdict.found}"
            "; some writer of this architecture is not known by its name. Nothing was kept"
        )
    return verdict


def _without(plan: RemovalPlan, edited: Streamed) -> tuple[Tensor, dict[int, float]]:
    """The logits of `edited`, and the share of its stream that is left along the direction, by layer."""
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
    """The logits of the original model with the direction removed from the outputs of the modules of `places`, and from
    the stream before block 0."""
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
    """Whether the same direction is removed from everything that was written up to `layer`. If it is, nothing of the
    direction is left in the stream."""
    removal, direction = plan.removal, plan.removal.direction
    if direction.embedding is None or not removal.full(EMBEDDING):
        return False
    return all(torch.equal(direction.directions[n], direction.embedding) and removal.full(n) for n in range(layer + 1))
