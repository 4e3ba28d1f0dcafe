"""Is a model with edited weights, or an adapter, what it should be? Shown by its effect: the logits of a pass, and what
is left of the direction in the stream. Both models are streamed, so that one of any size is verified.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from steer.errors import InvalidInput, UnsupportedModel
from steer.hf.streamed import Change, Streamed
from steer.lab.merge.removal import Plan, stream
from steer.lab.merge.weights import Checkpoint
from steer.lab.progress import Progress
from steer.runtime.bank import EMBEDDING
from steer.runtime.hook_points import hooks, on_input, on_output

#: The part of a command's progress.
VERIFYING = "verifying"
#: What may differ in the logits, and be left of a component, relative; by the stored dtype. In 16 bits it is the
#: rounding of the stored weights.
TOLERANCE = {torch.float32: (1e-3, 1e-5)}
TOLERANCE_16 = (5e-2, 2e-3)


@dataclass(frozen=True, slots=True)
class Verdict:
    """How far the edited model is from what it should be, all in float32.

    logits: the largest difference from the original from which the direction is removed where the weights write,
    relative to the largest logit; where no norm comes after the weights that is the original as served with the
    direction at `writers`. None where lengths were preserved, which is another model. served: the same from the
    original as it is served, where a norm comes after (see `removal`), else None. left: the largest share of the stream
    that is left along a removed direction; None where none was to be removed whole.
    """

    logits: float | None
    served: float | None
    left: float | None

    def __str__(self) -> str:
        told = []
        if self.logits is not None:
            as_served = "as served" if self.served is None else "as the original without it before its norms"
            told.append(f"logits {as_served} to {self.logits:.1e}")
        if self.left is not None:
            told.append(f"{self.left:.1e} of the stream left along it")
        if self.served is not None:
            told.append(
                f"from what is served, which removes it after the norms, the logits differ by {self.served:.1e}, "
                "since a norm scales what the weights leave"
            )
        return "; ".join(told)


def verify(
    plan: Plan,
    edited: Checkpoint,
    dtype: torch.dtype,
    progress: Progress,
    change: Change | None = None,
    preserve_norms: bool = False,
) -> Verdict:
    """Compare `edited`, whose weights are stored in `dtype`, after the `change` of a tensor, with what `plan` is about.

    Raises UnsupportedModel where it is something else: then some writer was missed, or files were not written as they
    should be. Raises InvalidInput where there is nothing to compare.
    """
    passes = 1 if preserve_norms else 2 + plan.normed
    progress.plan(VERIFYING, passes * len(plan.streamed.becomes))
    with progress.part(VERIFYING):
        return _verdict(plan, stream(edited, progress, change), dtype, preserve_norms)


def _verdict(plan: Plan, edited: Streamed, dtype: torch.dtype, preserve_norms: bool) -> Verdict:
    limit_logits, limit_left = TOLERANCE.get(dtype, TOLERANCE_16)
    got, left = _without(plan, edited)
    logits = served = None
    if not preserve_norms:
        logits = _apart(got, _logits(plan, ((t.module, t.layer, t.gain) for t in plan.terms)))
        if plan.normed:
            served = _apart(got, _logits(plan, ((t.norm or t.module, t.layer, None) for t in plan.terms)))
    removed = {layer for layer in range(EMBEDDING, plan.removal.direction.layers) if plan.removal.at(layer) is not None}
    if logits is None and not removed <= left.keys():
        raise InvalidInput(
            "there is nothing to verify this by: lengths are kept, which no server does, and no direction is removed "
            "whole from all that is written; give --no-verify to write it unverified"
        )
    largest = float(torch.tensor(list(left.values())).max()) if left else None  # NaN, where there is one
    verdict = Verdict(logits, served, largest)
    if not ((logits or 0.0) <= limit_logits and (largest or 0.0) <= limit_left):
        raise UnsupportedModel(
            "what was made is not the original with the direction removed from what its weights write: logits differ "
            f"by {logits}, {largest} of the stream is left along it; some writer of this architecture is not known by "
            "its name. Nothing was kept"
        )
    return verdict


def _without(plan: Plan, edited: Streamed) -> tuple[Tensor, dict[int, float]]:
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


def _logits(plan: Plan, places: Iterable[tuple[nn.Module, int, Tensor | None]]) -> Tensor:
    """The logits of the original with the direction removed from the outputs of these modules and before block 0."""
    removal, blocks = plan.removal, plan.streamed.anatomy.blocks
    handles = [on_input(blocks[0], lambda x: removal.taken(x, EMBEDDING))]
    handles += [on_output(m, lambda x, n=n, gain=gain: removal.taken(x, n, gain)) for m, n, gain in places]
    with hooks(handles):
        logits: Tensor = plan.streamed.anatomy.probe().logits.float()
    return logits


def _apart(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max())


def _same_up_to(plan: Plan, layer: int) -> bool:
    """Is one and the same direction removed from everything that was written up to `layer`? Then none of it is left."""
    removal, direction = plan.removal, plan.removal.direction
    if direction.embedding is None or not removal.full(EMBEDDING):
        return False
    return all(torch.equal(direction.directions[n], direction.embedding) and removal.full(n) for n in range(layer + 1))
