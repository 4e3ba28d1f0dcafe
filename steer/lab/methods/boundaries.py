"""Methods that draw a boundary between the classes: whitened (linear discriminant analysis) and logistic."""

from __future__ import annotations

import warnings
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from scipy.linalg import LinAlgWarning
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from steer.errors import DegenerateError, SteerError
from steer.geometry import linear_direction, unit
from steer.lab.measurement import Contrast, towards_harmful
from steer.lab.methods.base import Method, Need

#: Deviations below this share of the means' largest number are rounding.
ROUNDING = 1e-12


class Whitened(Method):
    """The difference of the class means, whitened by the spread within the classes (Fisher).

    Source: Fisher 1936, "The use of multiple measurements in taxonomic problems"; the shrinkage of Ledoit and Wolf
    2004, "A well-conditioned estimator for large-dimensional covariance matrices".

    v = normalise(Σ⁻¹·(μH − μA)) with Σ = (1 − s)·S + s·(tr S / d)·I, S the covariance within the classes and s the
    intensity that `shrinkage` gives: "auto" is Ledoit and Wolf's from vectors, and from second moments alone, which do
    not tell it, the oracle approximation of Chen et al. 2010. With n < d vectors Woodbury's identity leaves n × n.

    Pitfalls: this is the direction by which the classes are best *told apart*, not the one along which the model moves
    when it behaves differently (Haufe et al. 2014): good to detect with, and removing it can leave the behaviour as it
    was.
    """

    needs: ClassVar[Need] = "spread"
    prompts: ClassVar[int] = 2
    shrinkage: Literal["auto"] | Annotated[float, Field(gt=0, le=1)] = Field(
        "auto", description="auto, or a number above 0; 1 is linear"
    )

    def rows(self, contrast: Contrast) -> Tensor:
        linear_direction(contrast.harmless.mean, contrast.harmful.mean)  # raises if there is no difference
        solve = _by_vectors if contrast.vectors else _by_moments
        return unit(solve(contrast, self.shrinkage)).unsqueeze(0)


def _by_vectors(contrast: Contrast, shrinkage: Literal["auto"] | float) -> Tensor:
    x = torch.cat([contrast.harmful.deviations(), contrast.harmless.deviations()])
    n, d = x.shape
    gram = x @ x.T
    mean_variance = _mean_variance(float(gram.trace()) / (n * d), contrast)
    s = ledoit_wolf(gram, d) if shrinkage == "auto" else float(shrinkage)
    ridge = s * mean_variance
    if s == 0:
        raise DegenerateError(
            "the best shrinkage for these prompts is 0, and then there is no inverse: give a shrinkage"
        )
    if s == 1:
        return contrast.difference / ridge
    # (ridge·I + (1 − s)·XᵀX/n)⁻¹ Δ by Woodbury's identity
    inner = gram + torch.eye(n, dtype=gram.dtype) * (n * ridge / (1 - s))
    solved: Tensor = torch.linalg.solve(inner, x @ contrast.difference)
    return (contrast.difference - x.T @ solved) / ridge


def _by_moments(contrast: Contrast, shrinkage: Literal["auto"] | float) -> Tensor:
    samples = (contrast.harmful, contrast.harmless)
    if any(s.count is None for s in samples):
        raise DegenerateError("the measurement does not say from how many prompts its moments are")
    counts = [float(s.count or 0) for s in samples]
    n = sum(counts)
    covariance = sum(
        (c / n * s.covariance() for c, s in zip(counts, samples, strict=True)),
        torch.zeros(len(contrast.difference), len(contrast.difference), dtype=torch.float64),
    )
    d = len(covariance)
    mean_variance = _mean_variance(float(covariance.trace()) / d, contrast)
    s = oracle_approximation(covariance, n) if shrinkage == "auto" else float(shrinkage)
    shrunk = (1 - s) * covariance + s * mean_variance * torch.eye(d, dtype=covariance.dtype)
    return torch.linalg.solve(shrunk, contrast.difference)


def _mean_variance(value: float, contrast: Contrast) -> float:
    """Return `value`. Raises DegenerateError if it is no more than the rounding of vectors that are all the same."""
    means = torch.stack([contrast.harmful.mean, contrast.harmless.mean])
    if not value > (ROUNDING * float(means.abs().max())) ** 2:
        raise DegenerateError("the prompts of each class all have the same activation: there is no spread to divide by")
    return value


def ledoit_wolf(gram: Tensor, d: int) -> float:
    """The shrinkage of Ledoit and Wolf, in [0, 1], from the Gram matrix `[n, n]` of centred vectors of `d` dimensions.

    With S = XᵀX/n: δ² = ‖S − (tr S/d)·I‖², β² = Σ‖x xᵀ − S‖² / n², and the shrinkage is min(β², δ²)/δ². They follow
    from traces, which are the same for the Gram matrix.
    """
    n = len(gram)
    trace, square = float(gram.trace()) / n, float((gram**2).sum()) / n**2
    spread = square - trace**2 / d
    error = (float((torch.diagonal(gram) ** 2).sum()) / n - square) / n
    return 1.0 if spread <= 0 else min(max(error, 0.0), spread) / spread


def oracle_approximation(covariance: Tensor, n: float) -> float:
    """The shrinkage of the oracle approximation, in [0, 1], from a covariance `[d, d]` of `n` vectors. It is exact for
    Gaussian vectors (Chen et al. 2010, equation 23)."""
    d = len(covariance)
    trace, square = float(covariance.trace()), float((covariance**2).sum())
    above = (1 - 2 / d) * square + trace**2
    below = (n + 1 - 2 / d) * (square - trace**2 / d)
    return 1.0 if below <= above else above / below


#: The most Newton steps; usually a few are enough.
STEPS = 1000
#: Newton's method ends when no component of the gradient is larger than this.
TOLERANCE = 1e-10


class Logistic(Method):
    """The normal of the boundary that a logistic regression draws between the classes.

    Source: logistic regression with a ridge, as the probes of Alain and Bengio 2016 ("Understanding intermediate layers
    using linear classifier probes", arXiv 1610.01644), by Newton's method.

    v = w/‖w‖ at the minimum over (w, b) of ½·E_H[log(1 + e^−(wz+b))] + ½·E_A[log(1 + e^(wz+b))] + ½·ridge·‖w‖², where
    z = x less the midpoint of the means, divided by its root mean square length: so nothing depends on the scale of
    the activations or on the classes' sizes. w lies in the span of the vectors, so the problem has n unknowns, not d.

    Pitfalls: as `whitened`, a detector and not a cause. As the ridge grows v becomes `linear`; as it vanishes and the
    classes can be separated, v becomes the largest margin's, which hangs on few prompts.
    """

    needs: ClassVar[Need] = "vectors"
    prompts: ClassVar[int] = 2
    # on the held-out half of the embedded model's prompts, the classes were 8.3 standard deviations apart along
    # `linear`, 8.6 at a ridge of 0.01, 8.8 at 0.001 and 9.0 at 0.00001 (layer 1; other layers were alike): a smaller
    # ridge gains little
    ridge: float = Field(0.001, gt=0, description="the penalty on the squared weights")

    def rows(self, contrast: Contrast) -> Tensor:
        harmful, harmless = contrast.harmful.rows, contrast.harmless.rows
        middle = (harmful.mean(0) + harmless.mean(0)) / 2
        x = torch.cat([harmful, harmless]) - middle
        scale = float((x**2).sum(1).mean().sqrt())
        if not scale > 0:
            raise DegenerateError("all prompts of both classes have the same activation")
        basis, z = _in_span(x / scale)
        counts = torch.tensor([len(harmful), len(harmless)])
        y = torch.tensor([1.0, -1.0], dtype=x.dtype).repeat_interleave(counts)
        share = (0.5 / counts.double()).float().repeat_interleave(counts)
        weights = fit_weights(z, y, share, self.ridge)
        return towards_harmful(unit(weights @ basis).unsqueeze(0), contrast)


def _in_span(x: Tensor) -> tuple[Tensor, Tensor]:
    """An orthonormal basis `[r, d]` of the rows of `x` `[n, d]`, and their coordinates `[n, r]`."""
    values, vectors = torch.linalg.eigh(x @ x.T)
    kept = values > values[-1] * len(x) * torch.finfo(x.dtype).eps
    roots = values[kept].sqrt()
    return (vectors[:, kept] / roots).T @ x, vectors[:, kept] * roots


def fit_weights(z: Tensor, y: Tensor, share: Tensor, ridge: float) -> Tensor:
    """The w at the minimum of Σ share·log(1 + e^−y(z·w + b)) + ½·ridge·‖w‖² over (w, b). y is ±1, and the root mean
    square length of z is about 1."""
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
