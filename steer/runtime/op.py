"""The one operation: what is added to a residual stream vector. Every hook, bake and test oracle calls this.

Each entry of a request asks for a change of its component, all of them of the same x:

    c  = ⟨x, v⟩
    δ  = s·(γ − w·(c − τ)) where c > g,  s·(γ − w·(c − f)) where c < f,  else 0

with v a unit direction, s the request's strength, and (τ, g, w, γ, f) the *coefficients* that a mode gives at a layer,
its target, gate, weight, what it adds, and its floor, which is −∞ for all modes but `clamp`:

    mode        τ                              g                w        γ
    ablate      0                              −∞               weight   0
    one_sided   the file's target              the file's ρ     weight   0
    affine      the harmless mean's component  −∞               weight   0
    add         0                              −∞               0        weight·‖μH − μA‖
    clamp       g                              ⟨μH, v⟩          weight   0              f = ⟨μA, v⟩, sorted: f ≤ g

A request may shift the gate by σ·Δ, with Δ the distance between the two class means, along v or in the angle below:

    g' = g + σ·Δ    τ' = g' where τ = g, else min(τ, g')    f' = f − σ·Δ, and neither passes the middle of f and g

so lowering the gate never makes the operation raise a component.

Two modes ask for a change of an angle in place of a component: that of x in the plane of v and the file's axis u. With
p = ⟨x, u⟩, q = ⟨x, v⟩ and α = atan2(q, p) the same formula, of α, gives the turn Δα, and δ is what that does to both:

    mode               τ                    g                  w        γ
    rotate             0                    −∞                 weight   0
    rotate_one_sided   the file's target    the file's ρ       weight   0      (angles, in radians)

    δ_v = q·(cos Δα − 1) + p·sin Δα      δ_u = p·(cos Δα − 1) − q·sin Δα

which keeps √(p² + q²), and so ‖x‖. At s = w = 1 and τ = 0 nothing is left along v. For v of the slerp family at t the
axis is cos(tω/2)·â + sin(tω/2)·e, and what x's part in the plane does is slerp towards it.

The result is x' = x + Σ aᵢ·vᵢ with a = M·δ. An entry with w ≠ 0 *sets* its component: M is made so that ⟨x', vᵢ⟩
is ⟨x, vᵢ⟩ + δᵢ for each of these, with the least displacement, whatever the angles between the directions (`joint`).
What other entries add is applied unchanged, but for its part along components that are set. M is the identity for one
entry and for orthogonal ones. The order of entries means nothing.

A plain token has v = 0 and s = 0, so what is added is exactly zero.

x' stays in the range of the model's numbers (`settled`): one that would not is not taken, and its request is *lost*. A
row with NaN or ∞ would not stay a row: attention adds −∞ to what is masked, and keeps keys and values for others.
"""

from __future__ import annotations

import torch
from torch import Tensor

from steer.direction import MAX_VALUE, Direction
from steer.names import Mode

#: Order of the coefficients in the last dimension of a coefficient tensor.
TARGET, GATE, WEIGHT, GAMMA, FLOOR, SPREAD = range(6)
COEFFICIENTS = 6
#: The inner product of two unit vectors up to which they are orthogonal: float32's rounding of them.
ORTHOGONAL = 1e-6
#: Eigenvalues of a Gram matrix below this share of the largest are none: directions that near to each other are one.
SAME = 1e-4


def limit(dtype: torch.dtype) -> float:
    """The largest ‖x'‖²: of half the dtype's largest number, so that what a block adds to x' does not overflow either,
    and no more than float32 has room for."""
    return min(torch.finfo(dtype).max / 2, 1.8e19) ** 2


def settled(
    x: Tensor, moved: Tensor, square: Tensor, steered: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """What is handed on of `moved`, the stream x `[..., d_model]` after the operation, and which of it is lost, `[...,
    1]` bool: of those that are `steered` (`[..., 1]` bool, None for all) where `square` (`[..., 1]`, ‖moved‖²) is
    beyond the `limit` of the stream's `dtype`, or NaN. These stay as they were, with 0 for what was not finite
    before."""
    lost = ~(square <= limit(dtype))
    if steered is not None:
        lost = lost & steered
    return torch.where(lost, torch.nan_to_num(x, 0.0, 0.0, 0.0), moved), lost


def within(strengths: Tensor, bounds: Tensor, point: Tensor | int) -> Tensor:
    """The strengths of what acts at a hook point, 0 of what acts at other layers alone. bounds: int32 in the shape of
    `strengths` (`token_index.bounds_of`); point: the layer, counted from 0 for the stream before block 0."""
    return torch.where((point >= (bounds & 0xFFFF)) & (point <= (bounds >> 16)), strengths, 0.0)


def decided(c: Tensor, opened: Tensor, deciding: Tensor, thresholds: Tensor, point: Tensor | int) -> Tensor:
    """Which tokens are open after a hook point, `[...]` bool, where `opened` are before it. One that is
    `deciding` there (the layer, counted as in `within`, negative for "below"; 0 for none) is open if its component c
    passes its threshold, and NaN passes none."""
    side = torch.where(deciding < 0, -1.0, 1.0)
    return torch.where(deciding.abs() == point, side * c > side * thresholds, opened)


def component(x: Tensor, v: Tensor) -> Tensor:
    """⟨x, v⟩ over the last dimension. v: broadcasts to x, rows of unit norm or zero."""
    return (x * v).sum(-1)


def shifted(coefficients: tuple[Tensor, ...], shift: Tensor | float) -> tuple[Tensor, ...]:
    """The coefficients, each `[...]`, with the gate moved by `shift` (σ, `[...]` or a number); unchanged where nothing
    moves."""
    target, gate, weight, gamma, floor, spread = coefficients
    by, middle = shift * spread, (gate + floor) / 2
    moved = torch.maximum(gate + by, middle)
    below = torch.where(target == gate, moved, torch.minimum(target, moved))
    # a mode without a gate has no spread, and the least of its target and −∞ is none
    return torch.where(by == 0, target, below), moved, weight, gamma, torch.minimum(floor - by, middle), spread


def amount(c: Tensor, coefficients: tuple[Tensor, ...], strength: Tensor | float) -> Tensor:
    """δ of one entry: the change that it asks for of c, the component along its row (or an angle, see `turn`). All in
    the dtype of `c` (the runtime gives float32).

    c: `[...]`; coefficients: τ, g, w, γ, f and Δ, each `[...]`; strength: `[...]` or a number. Returns `[...]`.
    """
    target, gate, weight, gamma, floor, _ = coefficients
    low = c < floor
    asked = torch.addcmul(gamma, weight, c - torch.where(low, floor, target), value=-1)
    return strength * torch.where(low | (c > gate), asked, 0.0)


def turn(q: Tensor, p: Tensor, coefficients: tuple[Tensor, ...], strength: Tensor | float) -> tuple[Tensor, Tensor]:
    """δ along the direction and along the axis of an entry that turns, of the components q and p there: as `amount`,
    of the angle. Both are 0 where q and p are, with gradients that are finite."""
    angle = torch.atan2(q, torch.where((q == 0) & (p == 0), 1.0, p))
    by = amount(angle, coefficients, strength)
    sine, fall = torch.sin(by), -2 * torch.sin(by / 2).square()  # cos − 1, without its cancellation
    return q * fall + p * sine, p * fall - q * sine


def shared(asked: list[Tensor], shares: Tensor) -> Tensor:
    """a of one entry, `[...]`: its row of M, `shares` `[..., entries]`, times δ of all entries, each `[...]`."""
    # each by itself: a stack of them would be written out in compiled code, which makes a second kernel of one
    parts = [share * one for share, one in zip(shares.unbind(-1), asked, strict=True)]
    return sum(parts[1:], parts[0])


def joint(vectors: Tensor, weights: Tensor) -> Tensor:
    """M of entries that act together. vectors `[..., entries, d_model]`, weights (w) `[..., entries]`, both zero where
    there is no entry. Returns `[..., entries, entries]`, float32; exactly the identity where all are orthogonal.

    With G the Gram matrix, B the entries that set (w ≠ 0) and A the others: M is the identity on A, G_BB⁺ on B, and
    −G_BB⁺·G_BA takes from B what A would add there. Where no x' has all components as asked (equal directions with
    different values asked for) the pseudoinverse takes what is nearest, by least squares.
    """
    vectors, sets = vectors.double(), weights != 0
    gram = vectors @ vectors.mT
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    # all else is looked at only where a set component can be touched
    touching = gram * (sets.unsqueeze(-1) | sets.unsqueeze(-2)) * (1 - eye)
    inverse = torch.linalg.pinv(gram * (sets.unsqueeze(-1) & sets.unsqueeze(-2)), rtol=SAME, hermitian=True)
    matrix = inverse + torch.diag_embed((~sets).to(gram.dtype)) - inverse @ (gram * ~sets.unsqueeze(-2))
    apart = (touching.abs() <= ORTHOGONAL).all(-1).all(-1)[..., None, None]
    return torch.where(apart, eye, matrix).float()


def growth(c: Tensor, a: Tensor, v: Tensor) -> Tensor:
    """‖x + a·v‖² − ‖x‖² `[...]`, of c = ⟨x, v⟩. Rounding is that of ‖x‖², which is more than ‖x + a·v‖² where most of x
    lies along v and is taken."""
    return a * (2 * c + a * component(v, v))


def displacements(x: Tensor, vectors: Tensor, coefficients: Tensor, strengths: list[float]) -> Tensor:
    """What entries that act together add to `x` `[..., d_model]`. vectors `[entries, d_model]`, coefficients
    `[entries, 6]`, a strength each, 0 for one that does not act. Returns `[..., d_model]`."""
    acting = [i for i, strength in enumerate(strengths) if strength]
    if not acting:
        return torch.zeros_like(x)
    vectors, coefficients = vectors[acting], coefficients[acting]
    asked = [
        amount(component(x, v), each.unbind(-1), strengths[i])
        for i, v, each in zip(acting, vectors, coefficients, strict=True)
    ]
    matrix = joint(vectors, coefficients[:, WEIGHT]).to(x.dtype)
    return sum(
        (shared(asked, shares).unsqueeze(-1) * v for shares, v in zip(matrix, vectors, strict=True)),
        torch.zeros_like(x),
    )


def coefficients(direction: Direction, mode: Mode, term: int = 0) -> Tensor:
    """The operation's (τ, g, w, γ, f, Δ) for each layer and row: `[layers, k, 6]`, float32, with k = 2 for those that
    turn, which are of an angle and the same for both rows. Δ is 0 where no gate can be shifted. `term`: of which term
    of a block (`HookPoint`)."""
    weights = direction.weights_of(term)[:, None]
    out = torch.zeros(direction.layers, direction.rows_in(mode), COEFFICIENTS, dtype=torch.float32)
    out[..., [GATE, FLOOR]], out[..., WEIGHT] = -torch.inf, weights
    match mode:
        case "ablate" | "rotate":
            pass
        case "one_sided":
            out[..., GATE] = direction.reference
            out[..., TARGET] = direction.reference if direction.target is None else direction.target
            harmless, harmful = _means_along(direction, direction.directions)
            out[..., SPREAD] = (harmful - harmless).abs()
        case "affine":
            out[..., TARGET] = torch.einsum("lkd,ld->lk", direction.directions, direction.mean_harmless_all)
        case "clamp":
            ends = torch.stack(_means_along(direction, direction.directions))
            out[..., FLOOR], out[..., GATE] = ends.amin(0), ends.amax(0)
            out[..., TARGET], out[..., SPREAD] = out[..., GATE], out[..., GATE] - out[..., FLOOR]
        case "add":
            out[..., WEIGHT], out[..., GAMMA] = 0.0, weights * _difference_along_rows(direction)
        case "rotate_one_sided":
            assert direction.angles is not None, "checked"
            assert direction.axis is not None, "checked"
            out[..., GATE], out[..., TARGET] = direction.angles[:, None].unbind(-1)
            plane = torch.stack([direction.axis, direction.directions[:, 0]], 1)
            harmless, harmful = (torch.atan2(*mean.flip(-1).unbind(-1)) for mean in _means_along(direction, plane))
            apart = (harmful - harmless).abs()
            out[..., SPREAD] = torch.minimum(apart, 2 * torch.pi - apart)[:, None]
        case _:
            raise ValueError(f"the mode '{mode}' has no coefficients")
    out[..., SPREAD].masked_fill_(out[..., GATE] >= MAX_VALUE, 0)  # a row without a side stays without one
    return out


def embedding_coefficients(direction: Direction, mode: Mode) -> Tensor:
    """The same for the stream before block 0: `[k, 6]`. No class means are known there, so only `ablate` acts."""
    out = torch.zeros(direction.rows_in(mode), COEFFICIENTS, dtype=torch.float32)
    out[..., [GATE, FLOOR]] = -torch.inf
    out[..., WEIGHT] = 1.0 if mode == "ablate" else 0.0
    return out


def _means_along(direction: Direction, rows: Tensor) -> tuple[Tensor, Tensor]:
    """The components of the harmless and of the harmful mean along rows `[layers, k, d_model]`: `[layers, k]` each."""
    means = torch.stack([direction.mean_harmless, direction.mean_harmful])
    harmless, harmful = torch.einsum("lkd,mld->mlk", rows, means)
    return harmless, harmful


def _difference_along_rows(direction: Direction) -> Tensor:
    """γ of `add` at strength 1, `[layers, k]`: ‖μH − μA‖ along the one row, or along the part of it in the k rows."""
    difference = direction.mean_harmful - direction.mean_harmless
    size: Tensor = torch.linalg.vector_norm(difference, dim=-1, keepdim=True)
    if direction.rank == 1:
        return size
    along = torch.einsum("lkd,ld->lk", direction.directions, difference)
    share: Tensor = along / torch.linalg.vector_norm(along, dim=-1, keepdim=True).clamp_min(1e-30)
    return size * share
