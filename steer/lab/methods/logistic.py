"""The normal of the boundary that a logistic regression draws between the classes."""

from __future__ import annotations

import warnings
from typing import ClassVar

import torch
from pydantic import Field
from scipy.linalg import LinAlgWarning
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from steer.errors import DegenerateError, SteerError
from steer.geometry import unit
from steer.lab.contrast import Contrast, towards_harmful
from steer.lab.methods.base import Method, Need

#: Newton steps at most; a handful are enough.
STEPS = 1000
#: Of the largest part of the gradient where it ends.
TOLERANCE = 1e-10


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
    root mean square length of z about 1."""
    model = LogisticRegression(C=1 / ridge, solver="newton-cholesky", tol=TOLERANCE, max_iter=STEPS)
    with warnings.catch_warnings():
        for kind in ConvergenceWarning, LinAlgWarning:
            warnings.simplefilter("error", kind)
        try:
            model.fit(z.numpy(), y.numpy(), sample_weight=share.numpy())
        except (ConvergenceWarning, LinAlgWarning) as problem:
            raise SteerError(
                f"the logistic regression did not converge in {STEPS} steps; take a larger ridge than {ridge:g}"
            ) from problem
    return torch.from_numpy(model.coef_[0])
