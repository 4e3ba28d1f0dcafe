"""Linear discriminant analysis: the difference of the means, in units of how much each direction varies anyway."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from steer.errors import DegenerateError
from steer.geometry import MIN_ANGLE, unit
from steer.lab.contrast import Contrast
from steer.lab.methods.base import Method, Need

#: Deviations below this, relative to the means, are rounding.
ROUNDING = 1e-12


class Whitened(Method):
    """Source: Fisher 1936; the shrinkage of Ledoit and Wolf 2004, "A well-conditioned estimator for large-dimensional
    covariance matrices".

    v = normalise(Σ⁻¹·(μH − μA)) with Σ = (1 − s)·S + s·(tr S / d)·I, S the covariance within the classes and s the
    intensity that `shrinkage` gives: "auto" is Ledoit and Wolf's from vectors, and from second moments alone, which do
    not tell it, the oracle approximation of Chen et al. 2010. With n < d vectors Woodbury's identity leaves n × n.

    Pitfalls: this is the direction by which the classes are best *told apart*, not the one along which the model moves
    when it behaves differently (Haufe et al. 2014): good to detect with, and removing it can leave the behaviour as it
    was.
    """

    name: ClassVar[str] = "whitened"
    needs: ClassVar[Need] = "spread"
    prompts: ClassVar[int] = 2
    shrinkage: Literal["auto"] | Annotated[float, Field(gt=0, le=1)] = Field(
        "auto", description="auto, or a number above 0; 1 is linear"
    )

    def rows(self, contrast: Contrast) -> Tensor:
        size = torch.linalg.vector_norm(contrast.harmful.mean) + torch.linalg.vector_norm(contrast.harmless.mean)
        if float(torch.linalg.vector_norm(contrast.difference)) <= MIN_ANGLE * float(size):
            raise DegenerateError("the two means are equal to rounding: their difference is no direction")
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
            "the shrinkage that these prompts ask for is 0, which leaves no inverse: give a shrinkage"
        )
    if s == 1:
        return contrast.difference / ridge
    # (ridge·I + (1 − s)·XᵀX/n)⁻¹ Δ by Woodbury
    inner = gram + torch.eye(n, dtype=gram.dtype) * (n * ridge / (1 - s))
    solved: Tensor = torch.linalg.solve(inner, x @ contrast.difference)
    return (contrast.difference - x.T @ solved) / ridge


def _by_moments(contrast: Contrast, shrinkage: Literal["auto"] | float) -> Tensor:
    samples = (contrast.harmful, contrast.harmless)
    if any(s.count is None for s in samples):
        raise DegenerateError("the measurement does not say how many prompts its moments are of")
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
    solved: Tensor = torch.linalg.solve(shrunk, contrast.difference)
    return solved


def _mean_variance(value: float, contrast: Contrast) -> float:
    """`value`, where it is more than the rounding of vectors that are all the same."""
    means = torch.stack([contrast.harmful.mean, contrast.harmless.mean])
    if not value > (ROUNDING * float(means.abs().max())) ** 2:
        raise DegenerateError("the prompts of each class all have the same activation: there is no spread to divide by")
    return value


def ledoit_wolf(gram: Tensor, d: int) -> float:
    """The intensity in [0, 1] from the Gram matrix `[n, n]` of centred vectors of `d` dimensions.

    With S = XᵀX/n: δ² = ‖S − (tr S/d)·I‖², β² = Σ‖x xᵀ − S‖² / n², and the intensity is min(β², δ²)/δ²; all three are
    traces that the Gram matrix has too.
    """
    n = len(gram)
    trace, square = float(gram.trace()) / n, float((gram**2).sum()) / n**2
    spread = square - trace**2 / d
    error = (float((torch.diagonal(gram) ** 2).sum()) / n - square) / n
    return 1.0 if spread <= 0 else min(max(error, 0.0), spread) / spread


def oracle_approximation(covariance: Tensor, n: float) -> float:
    """The intensity in [0, 1] from a covariance `[d, d]` of `n` vectors, exact for Gaussian ones (Chen et al. 2010,
    equation 23)."""
    d = len(covariance)
    trace, square = float(covariance.trace()), float((covariance**2).sum())
    above = (1 - 2 / d) * square + trace**2
    below = (n + 1 - 2 / d) * (square - trace**2 / d)
    return 1.0 if below <= above else above / below
