"""The one operation: what is added to a residual stream vector. Every hook, bake and test oracle calls this.

    c  = max(⟨x, v⟩ − ρ, floor)
    x' = x + s·(γ − w·c)·v

with v a unit direction, s the request's strength, and (ρ, floor, w, γ) the *coefficients* that a mode gives at a layer:

    mode        ρ                          floor   w        γ
    ablate      0                          −∞      weight   0
    one_sided   midpoint (or bisector)      0      weight   0
    affine      harmless component         −∞      weight   0
    add         0                          −∞      0        weight·‖μH − μA‖

A plain token has v = 0 and s = 0, so what is added is exactly zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: Order of the coefficients in the last dimension of a coefficient tensor.
RHO, FLOOR, WEIGHT, GAMMA = range(4)


def amount(x: Tensor, v: Tensor, coefficients: tuple[Tensor, ...], strength: Tensor | float) -> Tensor:
    """How much of `v` the operation adds to `x`. All in the dtype of `x` (the runtime gives float32).

    x: `[..., d_model]`; v: broadcasts to x, rows of unit norm or zero; coefficients: ρ, floor, w and γ, each `[...]`;
    strength: `[...]` or a number. Returns `[...]`.
    """
    rho, floor, weight, gamma = coefficients
    component = torch.maximum((x * v).sum(-1) - rho, floor)
    return strength * torch.addcmul(gamma, weight, component, value=-1)


def displacement(x: Tensor, v: Tensor, coefficients: Tensor, strength: Tensor | float) -> Tensor:
    """What the operation adds to `x`: as `amount`, with coefficients `[..., 4]`. Returns `[..., d_model]`."""
    return amount(x, v, coefficients.unbind(-1), strength).unsqueeze(-1) * v
