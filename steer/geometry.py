"""The mathematics of directions: pure functions on float64 tensors, torch and nothing else.

Notation: `a` and `h` are the harmless and harmful class means at a layer, â and ĥ their unit vectors, ω the angle
between them, e the unit part of h orthogonal to a. The slerp family is

    d(t) = cos(tω/2)·e − sin(tω/2)·â            (unit, for every t)

If 0 < t·ω < 2π, then d(t) equals `normalise(slerp(â, ĥ, t) − â)` in exact arithmetic: it points along the chord of the
arc from â to the point at the angle t·ω. For t < 0 the chord points along −d(t), and at t·ω = 2π the chord has no
length; d(t) itself is continuous for every t. d(t) points to the side of the harmful mean, ⟨d(t), h − a⟩ > 0, if
|t − linear_t|·ω < π, which holds for every t from 0 to 2. The limit t → 0 gives *projected* abliteration (e), and t = 1
gives the difference of the normalised means. The difference of the raw means (*linear*, Arditi et al. 2024) is the
member at `linear_t`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from steer.errors import DegenerateError

#: Least angle (radians) between two means, and least angle from opposite, at which they define a direction. Below it
#: their difference is only rounding noise of the forward pass that measured them.
MIN_ANGLE = 1e-6
#: Most elements that torch.quantile takes at once.
QUANTILE_ELEMENTS = 2**24


def unit(v: Tensor) -> Tensor:
    """Return `v / ‖v‖` over the last dimension, in float64. `v` is `[..., d_model]`.

    Raises:
        DegenerateError: a vector is zero or not finite.
    """
    v = v.double()
    if not torch.isfinite(v).all():
        raise DegenerateError("a vector has values that are not finite")
    norm = torch.linalg.vector_norm(v, dim=-1, keepdim=True)
    if bool((norm == 0).any()):
        raise DegenerateError("a vector is zero, so it has no direction")
    return v / norm


def angle(a: Tensor, h: Tensor) -> Tensor:
    """The angle ω between `a` and `h` (`[..., d_model]`) in radians, exact up to rounding at every angle.

    The formula is ω = 2·atan2(‖ĥ − â‖, ‖ĥ + â‖) (Kahan), because `acos` of the dot product loses half of the digits
    near 0 and π.
    """
    a, h = unit(a), unit(h)
    return 2 * torch.atan2(torch.linalg.vector_norm(h - a, dim=-1), torch.linalg.vector_norm(h + a, dim=-1))


def orthogonal_part(a: Tensor, h: Tensor) -> Tensor:
    """Return e: the unit part of `h` (`[d_model]`) orthogonal to `a`, which is the slerp family at t = 0.

    e is computed from the shorter of ĥ − â and ĥ + â: both have the same orthogonal part, and the shorter one has it
    without cancellation.

    Raises:
        DegenerateError: `a` and `h` are parallel or antipodal.
    """
    a, h = unit(a), unit(h)
    omega = float(angle(a, h))
    if omega < MIN_ANGLE:
        raise DegenerateError(f"the two means point the same way (angle {omega:.1e} rad): there is no direction")
    if math.pi - omega < MIN_ANGLE:
        raise DegenerateError(f"the two means are antipodal (angle π − {math.pi - omega:.1e}): every direction fits")
    short = h - a if omega < math.pi / 2 else h + a
    e = short - (short @ a) * a
    e = e - (e @ a) * a  # again (Gram-Schmidt): if e is short, the first pass leaves rounding along `a`
    return unit(e)


def slerp_direction(a: Tensor, h: Tensor, t: float) -> Tensor:
    """Return d(t) of the slerp family for one layer, a unit vector `[d_model]`, float64. `t` is any finite number.

    Source: the SLERP abliteration article, in closed form.

    Raises:
        DegenerateError: `t` is not finite, or `a` and `h` are parallel or antipodal.
    """
    if not math.isfinite(t):
        raise DegenerateError(f"t must be a finite number, got {t}")
    half = t * angle(a, h) / 2
    return torch.cos(half) * orthogonal_part(a, h) - torch.sin(half) * unit(a)


def linear_direction(a: Tensor, h: Tensor) -> Tensor:
    """Return normalise(h − a), the difference of the raw means (`[d_model]`, float64). Source: Arditi et al. 2024.

    Raises:
        DegenerateError: the means are equal up to rounding.
    """
    a, h = a.double(), h.double()
    difference = h - a
    scale = torch.linalg.vector_norm(a) + torch.linalg.vector_norm(h)
    if float(torch.linalg.vector_norm(difference)) <= MIN_ANGLE * float(scale):
        raise DegenerateError("the two means are equal to rounding: their difference has no direction")
    return unit(difference)


def linear_t(a: Tensor, h: Tensor) -> float:
    """The t at which d(t) is the linear direction: (2/ω)·atan2(‖a‖ − ‖h‖cos ω, ‖h‖ sin ω).

    Raises:
        DegenerateError: the means point the same way.
    """
    omega = float(angle(a, h))
    if omega < MIN_ANGLE:
        raise DegenerateError(f"the two means point the same way (angle {omega:.1e} rad): no t gives their difference")
    na, nh = (float(torch.linalg.vector_norm(v.double())) for v in (a, h))
    return 2 / omega * math.atan2(na - nh * math.cos(omega), nh * math.sin(omega))


def orthonormalise(rows: Tensor) -> Tensor:
    """An orthonormal basis with the span and order of `rows` (`[k, d_model]`), float64.

    The method is modified Gram-Schmidt with two passes.

    Raises:
        DegenerateError: a row is zero or not finite, or lies in the span of the rows before it.
    """
    basis: list[Tensor] = []
    for index, row in enumerate(rows.double()):
        rest = unit(row)
        for _ in range(2):
            for b in basis:
                rest = rest - (rest @ b) * b
        if float(torch.linalg.vector_norm(rest)) < MIN_ANGLE:
            raise DegenerateError(f"row {index} lies in the span of the rows before it")
        basis.append(unit(rest))
    return torch.stack(basis)


def winsorise(x: Tensor, quantile: float) -> Tensor:
    """Clip each activation vector of `x` (`[..., d_model]`) to the `quantile` of its own magnitudes.

    Each vector is clipped alone, so that the result does not depend on how prompts were batched. Without clipping, the
    few huge dimensions of some models (Gemma) decide the means.

    Raises:
        DegenerateError: `quantile` is not in (0, 1].
    """
    if not 0 < quantile <= 1:
        raise DegenerateError(f"the winsor quantile must be in (0, 1], got {quantile}")
    exact = x.abs().to(torch.promote_types(x.dtype, torch.float32))
    rows = exact.reshape(-1, x.shape[-1])
    parts = rows.split(max(1, QUANTILE_ELEMENTS // x.shape[-1]))
    limits = torch.cat([torch.quantile(part, quantile, dim=-1) for part in parts])
    limit = limits.reshape(*x.shape[:-1], 1).to(x.dtype)
    return torch.minimum(torch.maximum(x, -limit), limit)
