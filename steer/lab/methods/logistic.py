"""The normal of the boundary that a logistic regression draws between the classes."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from steer.errors import DegenerateError, SteerError
from steer.geometry import unit
from steer.lab.contrast import Contrast, towards_harmful
from steer.lab.methods.base import Method, Need

#: Newton steps. A handful are enough; a hundred times as many are more than any input was seen to take.
STEPS = 1000


class Logistic(Method):
    """Source: logistic regression with a ridge, as the probes of Alain and Bengio 2016, by Newton's method.

    v = w/‖w‖ at the minimum over (w, b) of ½·E_H[log(1 + e^−(wz+b))] + ½·E_A[log(1 + e^(wz+b))] + ½·ridge·‖w‖², where
    z = x less the midpoint of the means, divided by its root mean square length: so nothing depends on the scale of
    the activations or on the classes' sizes. w lies in the span of the vectors, so the problem has n unknowns, not d.

    Pitfalls: as `whitened`, a detector and not a cause. As the ridge grows v becomes `linear`; as it vanishes and the
    classes can be separated, v becomes the largest margin's, which hangs on few prompts.
    """

    name: ClassVar[str] = "logistic"
    needs: ClassVar[Need] = "vectors"
    prompts: ClassVar[int] = 2
    # on the embedded model's held-out half the classes stood 8.3 standard deviations apart along `linear`, 8.6 at a
    # ridge of 0.01, 8.8 at 0.001 and 9.0 at 0.00001 (layer 1; the others alike): little is won below
    ridge: float = Field(0.001, gt=0, description="the penalty on the squared weights")

    def rows(self, contrast: Contrast) -> Tensor:
        harmful, harmless = contrast.harmful.rows, contrast.harmless.rows
        middle = (harmful.mean(0) + harmless.mean(0)) / 2
        x = torch.cat([harmful, harmless]) - middle
        scale = float((x**2).sum(1).mean().sqrt())
        if not scale > 0:
            raise DegenerateError("all prompts of both classes have the same activation")
        basis, z = _in_span(x / scale)
        y = torch.cat([torch.ones(len(harmful)), -torch.ones(len(harmless))]).double()
        share = torch.where(y > 0, 0.5 / len(harmful), 0.5 / len(harmless))
        weights = fit_weights(z, y, share, self.ridge)
        return towards_harmful(unit(weights @ basis).unsqueeze(0), contrast)


def _in_span(x: Tensor) -> tuple[Tensor, Tensor]:
    """An orthonormal basis `[r, d]` of the rows of `x` `[n, d]`, and their coordinates `[n, r]`."""
    values, vectors = torch.linalg.eigh(x @ x.T)
    kept = values > values[-1] * len(x) * torch.finfo(x.dtype).eps
    roots = values[kept].sqrt()
    return (vectors[:, kept] / roots).T @ x, vectors[:, kept] * roots


def fit_weights(z: Tensor, y: Tensor, share: Tensor, ridge: float) -> Tensor:
    """The minimum of Σ share·log(1 + e^−y(z·w + b)) + ½·ridge·‖w‖² over (w, b), w returned; y is ±1, and the
    root mean square length of z about 1.

    Newton's method in a trust region (Nocedal and Wright 2006, algorithm 4.1 and theorem 4.5), which converges from
    every start on a loss that is smooth and bounded below. It ends where no step that rounding lets one see lowers the
    loss any more. The loss need not tell neighbouring points apart for that, as a search along a line needs it to.
    """
    n, r = z.shape
    design = torch.cat([z, torch.ones(n, 1, dtype=z.dtype)], dim=1)
    penalty = torch.full((r + 1,), ridge, dtype=z.dtype)
    penalty[-1] = 0.0
    eps = torch.finfo(z.dtype).eps

    def loss(theta: Tensor) -> float:
        fit = torch.nn.functional.softplus(-y * (design @ theta))
        return float((share * fit).sum() + (penalty * theta**2).sum() / 2)

    theta, radius = torch.zeros(r + 1, dtype=z.dtype), 1.0
    now = loss(theta)
    for _ in range(STEPS):
        p = torch.sigmoid(-y * (design @ theta))
        gradient = penalty * theta - design.T @ (share * p * y)
        curvature = (design.T * (share * p * (1 - p))) @ design + torch.diag(penalty)
        step = _within(gradient, curvature, radius)
        promised = -float(gradient @ step + step @ curvature @ step / 2)
        # what rounding adds to the loss is of this order: a promise below it can be neither kept nor broken
        if promised <= 4 * eps * max(now, eps):
            return (theta + step if loss(theta + step) <= now else theta)[:-1]
        then = loss(theta + step)
        kept = (now - then) / promised
        if kept > 0:
            theta, now = theta + step, then
        if kept < 0.25:
            radius = float(step.norm()) / 4
        elif kept > 0.75:
            radius = max(radius, 2 * float(step.norm()))
    raise SteerError(f"the logistic regression did not converge in {STEPS} steps; take a larger ridge than {ridge:g}")


def _within(gradient: Tensor, curvature: Tensor, radius: float) -> Tensor:
    """The step of at most `radius` that lowers gradient·step + ½·step·curvature·step most. No curvature is negative."""
    found: tuple[Tensor, Tensor] = torch.linalg.eigh(curvature)
    values, axes = found[0].clamp(min=0), found[1]
    along = axes.T @ gradient

    def step(damping: float) -> Tensor:
        return -(along / (values + damping).clamp(min=torch.finfo(values.dtype).tiny))

    low, high = 0.0, float(along.norm()) / radius
    if float(step(0.0).norm()) <= radius:
        return axes @ step(0.0)
    for _ in range(100):  # the length falls as the damping grows, and at `high` it is within
        middle = (low + high) / 2
        if float(step(middle).norm()) > radius:
            low = middle
        else:
            high = middle
        if high - low <= 1e-3 * high:
            break
    return axes @ step(high)
