"""Modes: what each one gives the operation at every layer. To add a mode, add a branch here and its name in `Mode`."""

from __future__ import annotations

import torch
from torch import Tensor

from steer.direction import Direction
from steer.errors import SpecError
from steer.names import Mode
from steer.runtime.op import FLOOR, GAMMA, RHO, WEIGHT


def coefficients(direction: Direction, mode: Mode) -> Tensor:
    """The operation's (ρ, floor, w, γ) for each layer and row: `[layers, k, 4]`, float32."""
    weights = direction.weights[:, None]
    out = torch.zeros(direction.layers, direction.rank, 4)
    out[..., FLOOR] = 0.0 if mode == "one_sided" else -torch.inf
    if mode == "add":
        out[..., GAMMA] = weights * _difference_along_rows(direction)
        return out
    out[..., WEIGHT] = weights
    if mode == "one_sided":
        out[..., RHO] = direction.reference
    elif mode == "affine":
        out[..., RHO] = torch.einsum("lkd,ld->lk", direction.directions, direction.mean_harmless_all)
    return out


def embedding_coefficients(direction: Direction, mode: Mode) -> Tensor:
    """The same for the stream before block 0: `[k, 4]`. No class means are known there, so only `ablate` acts."""
    out = torch.zeros(direction.rank, 4)
    out[..., FLOOR] = -torch.inf
    out[..., WEIGHT] = 1.0 if mode == "ablate" else 0.0
    return out


def check_mode(direction: Direction, mode: Mode, name: str) -> None:
    """Raise SpecError where `mode` has no meaning for this direction: ρ and γ are values of the whole stream, so at
    the single terms that the `writers` site sees only plain removal is defined."""
    if "writers" in direction.meta.sites and mode != "ablate":
        raise SpecError(
            f"direction '{name}' acts at the site 'writers', where only the mode 'ablate' is defined, not '{mode}'",
            param="steer.mode",
        )
    if mode not in direction.meta.modes:
        raise SpecError(
            f"direction '{name}' holds no means for the mode '{mode}'; its modes: {', '.join(direction.meta.modes)}",
            param="steer.mode",
        )


def _difference_along_rows(direction: Direction) -> Tensor:
    """γ of `add` at strength 1, `[layers, k]`: ‖μH − μA‖ along the one row, or along the part of it in the k rows."""
    difference = direction.mean_harmful - direction.mean_harmless
    size: Tensor = torch.linalg.vector_norm(difference, dim=-1, keepdim=True)
    if direction.rank == 1:
        return size
    along = torch.einsum("lkd,ld->lk", direction.directions, difference)
    share: Tensor = along / torch.linalg.vector_norm(along, dim=-1, keepdim=True).clamp_min(1e-30)
    return size * share
