"""What a method sees: the two classes at one layer and position, pure torch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from steer.errors import DegenerateError
from steer.geometry import MIN_ANGLE, winsorise


@dataclass(frozen=True, slots=True)
class Sample:
    """One class at one layer. mean `[d_model]`; where they were kept: vectors `[prompts, d_model]` (of any dtype) and
    moments E[xxᵀ] `[d_model, d_model]`, float64."""

    mean: Tensor
    count: int | None = None
    vectors: Tensor | None = None
    moments: Tensor | None = None

    @property
    def rows(self) -> Tensor:
        """The prompts' vectors `[prompts, d_model]`, float64."""
        assert self.vectors is not None, "a method that reads vectors says so in `needs`"
        return self.vectors.double()

    def deviations(self) -> Tensor:
        """`[prompts, d_model]`: each prompt's vector less the mean of the vectors."""
        rows = self.rows
        return rows - rows.mean(0)

    def covariance(self) -> Tensor:
        """`[d_model, d_model]` from the moments, divided by the count."""
        assert self.moments is not None
        return self.moments - torch.outer(self.mean, self.mean)

    def of(self, indices: Tensor) -> Sample:
        """The sample of some of its prompts (repeated as `indices` say)."""
        assert self.vectors is not None
        some = self.vectors[indices].double()
        return Sample(some.mean(0), len(indices), some)

    def winsorised(self, quantile: float) -> Sample:
        clipped = winsorise(self.rows, quantile)
        return Sample(clipped.mean(0), self.count, clipped)


@dataclass(frozen=True, slots=True)
class Contrast:
    harmless: Sample
    harmful: Sample

    @property
    def difference(self) -> Tensor:
        return self.harmful.mean - self.harmless.mean

    @property
    def vectors(self) -> bool:
        """Are the prompts' own vectors here?"""
        return self.harmful.vectors is not None and self.harmless.vectors is not None


def towards_harmful(rows: Tensor, contrast: Contrast) -> Tensor:
    """`rows` `[k, d_model]`, each with the sign that puts the harmful mean above the harmless one. Raises
    DegenerateError where the first row does not tell the means apart, so that its sign would be chance."""
    along = rows @ contrast.difference
    if float(along[0].abs()) <= MIN_ANGLE * float(torch.linalg.vector_norm(contrast.difference)):
        raise DegenerateError("what was found is orthogonal to the difference of the means: it has no sign")
    return torch.where((along < 0)[:, None], -rows, rows)


def principal(rows: Tensor, k: int, what: str) -> Tensor:
    """The k leading right singular vectors of `rows` `[n, d_model]`, `[k, d_model]`, by the n × n Gram matrix.

    Raises DegenerateError when there are not so many, or when the k-th and the next are equally strong, so that which
    one it is would be chance.
    """
    if not 1 <= k <= min(rows.shape):
        raise DegenerateError(f"{what}: rank {k} needs at least as many prompts, there are {rows.shape[0]}")
    values, vectors = torch.linalg.eigh(rows @ rows.T)
    values, vectors = values.flip(0), vectors.flip(1)
    _check_gap(values, k, what)
    return _tidied(vectors[:, :k].T @ rows)


def principal_of(matrix: Tensor, k: int, what: str) -> Tensor:
    """The same from the symmetric `[d_model, d_model]` matrix that is the Gram of the dimensions."""
    values, vectors = torch.linalg.eigh(matrix)
    _check_gap(values.flip(0), k, what)
    return _tidied(vectors.flip(1)[:, :k].T)


def _check_gap(values: Tensor, k: int, what: str) -> None:
    top, floor = float(values[0]), torch.finfo(values.dtype).eps * len(values)
    if not top > 0 or float(values[k - 1]) <= floor * top:
        raise DegenerateError(f"{what}: the activations span fewer than {k} dimensions")
    if k < len(values) and float(values[k - 1] - values[k]) <= floor * top:
        raise DegenerateError(f"{what}: component {k} is no stronger than the next: which one it is would be chance")


def _tidied(rows: Tensor) -> Tensor:
    """Orthonormal to the last bit of float64, in the same order (QR is Gram-Schmidt)."""
    q, r = torch.linalg.qr(rows.T)
    out: Tensor = (q * torch.sign(torch.diagonal(r))).T
    return out
