"""The dimensions along which the two classes together vary most."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from steer.lab.contrast import Contrast, principal, principal_of, towards_harmful
from steer.lab.methods.base import Method, Need


class Pca(Method):
    """Source: Zou et al. 2023, "Representation engineering" (linear artificial tomography), for sets without pairs.

    The leading eigenvectors of M = ½·E_H[(x − m)(x − m)ᵀ] + ½·E_A[(x − m)(x − m)ᵀ] with m the midpoint of the means,
    so that either class counts half whatever its size: M = (Σ_H + Σ_A)/2 + ¼·ΔμΔμᵀ. From vectors by their n × n Gram
    matrix, else from the second moments.

    Pitfalls: the strongest variation need not be the one between the classes: then another topic of the prompts is
    removed. Look at the cosine with `linear`. From moments alone the eigenvectors of a d × d matrix are needed, which
    takes minutes where d is thousands.
    """

    name: ClassVar[str] = "pca"
    needs: ClassVar[Need] = "spread"
    prompts: ClassVar[int] = 2
    rank: int = Field(1, ge=1, le=64, description="how many components")

    def rows(self, contrast: Contrast) -> Tensor:
        middle = (contrast.harmful.mean + contrast.harmless.mean) / 2
        samples = (contrast.harmful, contrast.harmless)
        if contrast.vectors:
            centred = [s.rows - middle for s in samples]
            found = principal(torch.cat([c / math.sqrt(2 * len(c)) for c in centred]), self.rank, self.name)
        else:
            half = contrast.difference / 2
            within = sum((s.covariance() for s in samples), torch.zeros_like(torch.outer(half, half))) / 2
            found = principal_of(within + torch.outer(half, half), self.rank, self.name)
        return towards_harmful(found, contrast)
