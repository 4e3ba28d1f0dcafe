"""The one operation: what is added to a residual stream vector. Every hook, merge and test oracle calls this.

Each entry of a request asks for a change δ of its component, all of them of the same x:

    c  = ⟨x, v⟩
    δ  = s·(γ − w·(c − τ)) where c > g,  s·(γ − w·(c − f)) where c < f,  else 0

with v a unit direction and s the request's strength. The *coefficients* of a mode at a layer are its target τ, gate g,
weight w, what it adds γ, and its floor f, which is −∞ for all modes but `clamp`:

    mode        τ                              g                w        γ
    ablate      0                              −∞               weight   0
    one_sided   the file's target              the file's ρ     weight   0
    affine      the harmless mean's component  −∞               weight   0
    add         0                              −∞               0        weight·‖μH − μA‖
    clamp       g                              ⟨μH, v⟩          weight   0              f = ⟨μA, v⟩, sorted: f ≤ g

A request may shift the gate by σ·Δ. Δ is the distance between the two class means along v (or in the angle, see below):

    g' = g + σ·Δ    τ' = g' where τ = g, else min(τ, g')    f' = f − σ·Δ, and neither passes the middle of f and g

so lowering the gate never makes the operation raise a component.

Two modes change an angle instead of a component: the angle α of x in the plane of v and the file's axis u. With
p = ⟨x, u⟩, q = ⟨x, v⟩ and α = atan2(q, p), the same formula applied to α gives the turn Δα, which changes both
components:

    mode               τ                    g                  w        γ
    rotate             0                    −∞                 weight   0
    rotate_one_sided   the file's target    the file's ρ       weight   0      (angles, in radians)

    δ_v = q·(cos Δα − 1) + p·sin Δα      δ_u = p·(cos Δα − 1) − q·sin Δα

This keeps √(p² + q²), and so ‖x‖. At s = w = 1 and τ = 0 nothing is left along v. For v of the slerp family at t the
axis is cos(tω/2)·â + sin(tω/2)·e, and the part of x in the plane moves towards it by slerp.

The result is x' = x + Σ aᵢ·vᵢ with a = M·δ. An entry with w ≠ 0 *sets* its component: M is chosen so that ⟨x', vᵢ⟩ =
⟨x, vᵢ⟩ + δᵢ for each such entry, with the least displacement, whatever the angles between the directions (`joint`).
What other entries add is applied unchanged, except for its part along components that are set. M is the identity for
one entry and for orthogonal ones. The order of entries does not matter.

An entry may ask for the norm to be kept: then x' is scaled to ‖x‖ (`restoring`), whatever its mode adds. A component
that was set to another value than 0 is scaled too.

A plain token has v = 0 and s = 0, so exactly zero is added.

x' must stay in the range of the model's dtype (`out_of_range`). If it would not, x is kept instead, and its request is
*lost*: it fails. Otherwise NaN or ∞ of one row would reach others: attention adds −∞ to masked values, and keys and
values are kept for other requests.
"""

from __future__ import annotations

import torch
from torch import Tensor

from steer.direction import MAX_VALUE, Direction
from steer.names import Mode

#: Order of the coefficients in the last dimension of a coefficient tensor.
TARGET, GATE, WEIGHT, GAMMA, FLOOR, SPREAD = range(6)
COEFFICIENTS = 6
#: Two unit vectors count as orthogonal up to this inner product, which is the rounding of float32.
ORTHOGONAL = 1e-6
#: Eigenvalues of a Gram matrix below this share of the largest count as zero, so almost equal directions are one.
SAME = 1e-4
#: In the bounds of an entry: the bits of its first layer, and the bit that says that the norm is kept.
FIRST, KEEPS = 0x7FFF, 0x8000
#: The largest factor of `restoring`. Where an entry removes nearly all of x, mostly rounding is left to be scaled.
MAX_FACTOR = 100.0


def limit(dtype: torch.dtype) -> float:
    """The largest ‖x'‖²: the square of half the dtype's largest number, so that what a block adds to x' does not
    overflow either, and at most what float32 can hold."""
    return min(torch.finfo(dtype).max / 2, 1.8e19) ** 2


def out_of_range(square: Tensor, steered: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Which tokens are lost, in the shape of `square`: the steered ones whose ‖x'‖² is beyond the `limit`, or NaN.

    Args:
        square: ‖x'‖², `[..., 1]`.
        steered: which tokens are steered, `[..., 1]` bool; None for all.
        dtype: of the stream.
    """
    lost = ~(square <= limit(dtype))
    return lost if steered is None else lost & steered


def settled(x: Tensor, moved: Tensor, lost: Tensor) -> Tensor:
    """The stream to pass on: `moved`, but x for lost tokens, with 0 where x was not finite.

    Args:
        x, moved: the stream before and after the operation, `[..., d_model]`.
        lost: which tokens are lost, `[..., 1]` bool.
    """
    return torch.where(lost, torch.nan_to_num(x, 0.0, 0.0, 0.0), moved)


def within(strengths: Tensor, bounds: Tensor, point: Tensor | int) -> Tensor:
    """The strengths at a hook point: 0 for entries that act only at other layers.

    Args:
        bounds: the first and the last layer of each entry, int32 in the shape of `strengths`
            (`token_index.bounds_of`).
        point: the layer; 0 is the stream before block 0.
    """
    return torch.where((point >= (bounds & FIRST)) & (point <= (bounds >> 16)), strengths, 0.0)


def restoring(before: Tensor, after: Tensor) -> Tensor:
    """The factor that gives x' the norm of x, at most `MAX_FACTOR`. before, after: ‖x‖² and ‖x'‖², or their means, in
    one shape."""
    tiny = torch.finfo(before.dtype).tiny
    before = before.clamp_min(tiny)
    return (before / torch.maximum(after, before / MAX_FACTOR**2).clamp_min(tiny)).sqrt()


def decided(c: Tensor, opened: Tensor, deciding: Tensor, thresholds: Tensor, point: Tensor | int) -> Tensor:
    """Which tokens are open after a hook point, `[...]` bool: those that decide here are open if their component c
    passes their threshold (NaN never does), and the others stay as they are.

    Args:
        opened: which tokens were open before.
        deciding: the layer at which each token decides, counted as in `within`, negative for "below"; 0 for none.
    """
    side = torch.where(deciding < 0, -1.0, 1.0)
    return torch.where(deciding.abs() == point, side * c > side * thresholds, opened)


def component(x: Tensor, v: Tensor) -> Tensor:
    """⟨x, v⟩ over the last dimension. v: broadcasts to x, rows of unit norm or zero."""
    return (x * v).sum(-1)


def shifted(coefficients: tuple[Tensor, ...], shift: Tensor | float) -> tuple[Tensor, ...]:
    """The coefficients, each `[...]`, with the gate shifted by `shift` (σ, `[...]` or a number); unchanged for σ = 0 or
    Δ = 0."""
    target, gate, weight, gamma, floor, spread = coefficients
    by, middle = shift * spread, (gate + floor) / 2
    moved = torch.maximum(gate + by, middle)
    below = torch.where(target == gate, moved, torch.minimum(target, moved))
    # a mode without a gate has Δ = 0; min(τ, −∞) would not be a target
    return torch.where(by == 0, target, below), moved, weight, gamma, torch.minimum(floor - by, middle), spread


def amount(c: Tensor, coefficients: tuple[Tensor, ...], strength: Tensor | float, gated: bool = True) -> Tensor:
    """δ of one entry, `[...]`: the change that it asks for of c. All in the dtype of `c` (float32 at run time).

    Args:
        c: the component along the entry's row, `[...]` (or an angle, see `turn`).
        coefficients: τ, g, w, γ, f and Δ, each `[...]`.
        strength: `[...]` or a number.
        gated: whether an entry may have a gate. Without, eager code has fewer steps; a NaN in c then goes on.
    """
    target, gate, weight, gamma, floor, _ = coefficients
    if not gated:
        return strength * torch.addcmul(gamma, weight, c - target, value=-1)
    low = c < floor
    asked = torch.addcmul(gamma, weight, c - torch.where(low, floor, target), value=-1)
    return strength * torch.where(low | (c > gate), asked, 0.0)


def turn(
    q: Tensor, p: Tensor, coefficients: tuple[Tensor, ...], strength: Tensor | float, gated: bool = True
) -> tuple[Tensor, Tensor]:
    """δ along the direction and along the axis of an entry that turns: `amount` of the angle. q and p are the
    components along direction and axis. Both results are 0 if q and p are, with finite gradients."""
    angle = torch.atan2(q, torch.where((q == 0) & (p == 0), 1.0, p))
    by = amount(angle, coefficients, strength, gated)
    sine, fall = torch.sin(by), -2 * torch.sin(by / 2).square()  # cos − 1, without its cancellation
    return q * fall + p * sine, p * fall - q * sine


def shared(asked: list[Tensor], shares: Tensor) -> Tensor:
    """a of one entry, `[...]`: its row of M (`shares`, `[..., entries]`) times δ of all entries, each `[...]`."""
    # not stacked: compiled code would write a stack to memory, and need a second kernel
    parts = [share * one for share, one in zip(shares.unbind(-1), asked, strict=True)]
    return sum(parts[1:], parts[0])


def joint(vectors: Tensor, weights: Tensor) -> Tensor:
    """M of entries that act together, `[..., entries, entries]` float32; exactly the identity if all are orthogonal.

    With G the Gram matrix, B the entries that set (w ≠ 0) and A the others: M is the identity on A and G_BB⁺ on B, and
    −G_BB⁺·G_BA removes from B what A would add there. If no x' has all components as asked (equal directions with
    different values), the pseudoinverse gives the nearest one by least squares.

    Args:
        vectors: `[..., entries, d_model]`, zero for a missing entry.
        weights: w, `[..., entries]`, zero for a missing entry.
    """
    vectors, sets = vectors.double(), weights != 0
    gram = vectors @ vectors.mT
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    # inner products only matter if a component that is set is involved
    touching = gram * (sets.unsqueeze(-1) | sets.unsqueeze(-2)) * (1 - eye)
    inverse = torch.linalg.pinv(gram * (sets.unsqueeze(-1) & sets.unsqueeze(-2)), rtol=SAME, hermitian=True)
    matrix = inverse + torch.diag_embed((~sets).to(gram.dtype)) - inverse @ (gram * ~sets.unsqueeze(-2))
    apart = (touching.abs() <= ORTHOGONAL).all(-1).all(-1)[..., None, None]
    return torch.where(apart, eye, matrix).float()


def growth(c: Tensor, a: Tensor, v: Tensor) -> Tensor:
    """‖x + a·v‖² − ‖x‖², `[...]`, from c = ⟨x, v⟩. Its rounding is that of ‖x‖², which can be much larger than
    ‖x + a·v‖² if most of x lies along v and is removed."""
    return a * (2 * c + a * component(v, v))


def displacements(x: Tensor, vectors: Tensor, coefficients: Tensor, strengths: list[float]) -> Tensor:
    """What entries that act together add to `x` `[..., d_model]`, in the same shape. vectors: `[entries, d_model]`;
    coefficients: `[entries, 6]`; strengths: one for each entry, 0 if it does not act."""
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
    """(τ, g, w, γ, f, Δ) of a direction in `mode`, for each layer and row: `[layers, k, 6]` float32. A mode that turns
    has k = 2, with the same coefficients of the angle for both rows. Δ is 0 if there is no gate to shift. `term`: the
    term of a block (`HookPoint`)."""
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
    out[..., SPREAD].masked_fill_(out[..., GATE] >= MAX_VALUE, 0)  # a row whose gate nothing passes keeps it
    return out


def embedding_coefficients(direction: Direction, mode: Mode) -> Tensor:
    """The coefficients for the stream before block 0: `[k, 6]`. There are no class means there, so only `ablate`
    acts."""
    out = torch.zeros(direction.rows_in(mode), COEFFICIENTS, dtype=torch.float32)
    out[..., [GATE, FLOOR]] = -torch.inf
    out[..., WEIGHT] = 1.0 if mode == "ablate" else 0.0
    return out


def _means_along(direction: Direction, rows: Tensor) -> tuple[Tensor, Tensor]:
    """The components of the harmless and the harmful mean along rows `[layers, k, d_model]`: `[layers, k]` each."""
    means = torch.stack([direction.mean_harmless, direction.mean_harmful])
    harmless, harmful = torch.einsum("lkd,mld->mlk", rows, means)
    return harmless, harmful


def _difference_along_rows(direction: Direction) -> Tensor:
    """γ of `add` at strength 1, `[layers, k]`: ‖μH − μA‖ along the only row, or shared over k rows in proportion to
    the components of μH − μA."""
    difference = direction.mean_harmful - direction.mean_harmless
    size: Tensor = torch.linalg.vector_norm(difference, dim=-1, keepdim=True)
    if direction.rank == 1:
        return size
    along = torch.einsum("lkd,ld->lk", direction.directions, difference)
    share: Tensor = along / torch.linalg.vector_norm(along, dim=-1, keepdim=True).clamp_min(1e-30)
    return size * share
