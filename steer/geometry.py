"""The mathematics of directions: pure functions on float64 tensors, torch and nothing else.

Notation: `a` and `h` are the harmless and harmful class means at a layer, â and ĥ their unit vectors, ω the angle
between them, e the unit part of h orthogonal to a. The slerp family is

    d(t) = cos(tω/2)·e − sin(tω/2)·â            (unit, for every t)

which is what `normalise(slerp(â, ĥ, t) − â)` is in exact arithmetic while 0 < t·ω < 2π: the chord of the arc from â to
the point at t·ω. For t < 0 that chord is −d(t), and at t·ω = 2π there is none; d goes on without a break. Its side is
that of the harmful mean, ⟨d(t), h − a⟩ > 0, while |t − linear_t|·ω < π, which holds for every t from 0 to 2. t → 0
gives *projected* abliteration (e), t = 1 the difference of the normalised means. The difference of the raw means
(*linear*, Arditi et al. 2024) is the member at `linear_t`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from steer.errors import DegenerateError

#: Two means closer than this angle (radians), or closer than this to opposite, define no direction: what is left of
#: their difference is rounding noise of the forward pass that measured them.
MIN_ANGLE = 1e-6
#: torch.quantile takes at most 2^24 elements at once.
QUANTILE_ELEMENTS = 2**24


def unit(v: Tensor) -> Tensor:
    """`v / ‖v‖` over the last dimension, in float64. `v` is `[..., d_model]`.

    Raises DegenerateError for a zero or non-finite vector.
    """
    v = v.double()
    if not torch.isfinite(v).all():
        raise DegenerateError("a vector has values that are not finite")
    norm = torch.linalg.vector_norm(v, dim=-1, keepdim=True)
    if bool((norm == 0).any()):
        raise DegenerateError("a vector is zero, so it has no direction")
    return v / norm


def angle(a: Tensor, h: Tensor) -> Tensor:
    """The angle ω between `a` and `h` (`[..., d_model]`) in radians, right to rounding at every angle.

    ω = 2·atan2(‖ĥ − â‖, ‖ĥ + â‖) (Kahan): `acos` of the dot product loses half of the digits near 0 and π.
    """
    a, h = unit(a), unit(h)
    return 2 * torch.atan2(torch.linalg.vector_norm(h - a, dim=-1), torch.linalg.vector_norm(h + a, dim=-1))


def orthogonal_part(a: Tensor, h: Tensor) -> Tensor:
    """e: the unit part of `h` (`[d_model]`) orthogonal to `a`, which is the slerp family at t = 0.

    Taken from ĥ − â or ĥ + â, whichever is shorter, because both have the same orthogonal part and the shorter one
    carries it without cancellation. Raises DegenerateError where `a` and `h` are parallel or antipodal.
    """
    a, h = unit(a), unit(h)
    omega = float(angle(a, h))
    if omega < MIN_ANGLE:
        raise DegenerateError(f"the two means point the same way (angle {omega:.1e} rad): there is no direction")
    if math.pi - omega < MIN_ANGLE:
        raise DegenerateError(f"the two means are antipodal (angle π − {math.pi - omega:.1e}): every direction fits")
    short = h - a if omega < math.pi / 2 else h + a
    e = short - (short @ a) * a
    e = e - (e @ a) * a  # a second pass of Gram-Schmidt: the first leaves rounding along `a` when e is short
    return unit(e)


def slerp_direction(a: Tensor, h: Tensor, t: float) -> Tensor:
    """d(t) of the slerp family for one layer: `[d_model]`, float64, unit. Any finite t.

    Source: the SLERP abliteration article, in closed form. Raises DegenerateError as `orthogonal_part` does.
    """
    if not math.isfinite(t):
        raise DegenerateError(f"t must be a finite number, got {t}")
    half = t * angle(a, h) / 2
    return torch.cos(half) * orthogonal_part(a, h) - torch.sin(half) * unit(a)


def linear_direction(a: Tensor, h: Tensor) -> Tensor:
    """normalise(h − a), the difference of the raw means (`[d_model]`, float64). Source: Arditi et al. 2024."""
    a, h = a.double(), h.double()
    difference = h - a
    scale = torch.linalg.vector_norm(a) + torch.linalg.vector_norm(h)
    if float(torch.linalg.vector_norm(difference)) <= MIN_ANGLE * float(scale):
        raise DegenerateError("the two means are equal to rounding: their difference has no direction")
    return unit(difference)


def linear_t(a: Tensor, h: Tensor) -> float:
    """The t at which the slerp family is the linear direction: (2/ω)·atan2(‖a‖ − ‖h‖cos ω, ‖h‖ sin ω)."""
    omega = float(angle(a, h))
    if omega < MIN_ANGLE:
        raise DegenerateError(f"the two means point the same way (angle {omega:.1e} rad): no t gives their difference")
    na, nh = (float(torch.linalg.vector_norm(v.double())) for v in (a, h))
    return 2 / omega * math.atan2(na - nh * math.cos(omega), nh * math.sin(omega))


def orthonormalise(rows: Tensor) -> Tensor:
    """An orthonormal basis with the span and order of `rows` (`[k, d_model]`), float64.

    Two passes of modified Gram-Schmidt. Raises DegenerateError when a row depends on those before it.
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
    """Clip each activation vector of `x` (`[..., d_model]`) to its own `quantile` of magnitudes.

    Done for each vector alone, so that the result never depends on how prompts were batched. Models with a few huge
    dimensions (Gemma) otherwise have those decide the means.
    """
    if not 0 < quantile <= 1:
        raise DegenerateError(f"the winsor quantile must be in (0, 1], got {quantile}")
    exact = x.abs().to(torch.promote_types(x.dtype, torch.float32))
    rows = exact.reshape(-1, x.shape[-1])
    parts = rows.split(max(1, QUANTILE_ELEMENTS // x.shape[-1]))
    limits = torch.cat([torch.quantile(part, quantile, dim=-1) for part in parts])
    limit = limits.reshape(*x.shape[:-1], 1).to(x.dtype)
    return torch.minimum(torch.maximum(x, -limit), limit)
