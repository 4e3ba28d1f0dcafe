"""Methods that make several orthonormal rows: pca, subspace and cone."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from pydantic import Field
from sklearn.cluster import KMeans
from torch import Tensor

from steer.errors import DegenerateError
from steer.geometry import MIN_ANGLE, orthonormalise
from steer.lab.measurement import Contrast, principal, principal_of, towards_harmful
from steer.lab.methods.base import Method, Need


class Pca(Method):
    """The leading principal components of both classes together.

    Source: Zou et al. 2023, "Representation engineering" (linear artificial tomography, arXiv 2310.01405), for sets
    without pairs.

    The leading eigenvectors of M = ½·E_H[(x − m)(x − m)ᵀ] + ½·E_A[(x − m)(x − m)ᵀ] with m the midpoint of the means,
    so that either class counts half whatever its size: M = (Σ_H + Σ_A)/2 + ¼·ΔμΔμᵀ. From vectors by their n × n Gram
    matrix, else from the second moments.

    Pitfalls: the strongest variation need not be the one between the classes: then another topic of the prompts is
    removed. Look at the cosine with `linear`. From moments alone the eigenvectors of a d × d matrix are needed, which
    takes minutes where d is thousands.
    """

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


class Subspace(Method):
    """The leading singular vectors of the differences of harmful prompts from the harmless mean.

    Source: singular vectors of differences between classes, as the principal directions of Zou et al. 2023
    ("Representation engineering", arXiv 2310.01405); here without pairs of prompts.

    The k leading right singular vectors of the differences x_i − μA, i over the harmful prompts, not centred: the first
    is close to `linear` where the classes are far apart, the others are how refusals differ among each other.

    Pitfalls: further rows also hold what the harmful prompts vary in without any refusal (topic, length), and removing
    them costs more than it gives: compare with rank 1. A server needs `--rank` of k.
    """

    needs: ClassVar[Need] = "vectors"
    prompts: ClassVar[int] = 2
    rank: int = Field(2, ge=1, le=64, description="rows")

    def rows(self, contrast: Contrast) -> Tensor:
        differences = contrast.harmful.rows - contrast.harmless.mean
        return towards_harmful(principal(differences, self.rank, self.name), contrast)


#: The most iterations of Lloyd's algorithm. It ends when no prompt changes its cluster, in practice far earlier.
STEPS = 1000


class Cone(Method):
    """A basis of the differences of cluster means of harmful prompts from the harmless mean.

    Source: Wollschläger et al. 2025, "The geometry of refusal in large language models: concept cones and
    representational independence" (arXiv 2502.17420), whose cones are trained with gradients; here, from a measurement
    alone, as in Piras et al. 2025 ("SOM directions are better than one", arXiv 2511.08379), the rays are differences of
    cluster means.

    k-means splits the harmful prompts into k clusters with means c_j; the rays of the cone are c_j − μA, and the rows
    are an orthonormal basis of their span, in the order of the clusters' sizes. With k = 1 it is `linear`.

    Pitfalls: clusters are of topics where refusals do not differ among each other; then the span holds topics. The
    clusters begin with the farthest prompts (deterministic), and k-means finds a local optimum.
    """

    needs: ClassVar[Need] = "vectors"
    prompts: ClassVar[int] = 2
    rank: int = Field(2, ge=1, le=64, description="clusters, and rows")

    def rows(self, contrast: Contrast) -> Tensor:
        x = contrast.harmful.rows
        if self.rank > len(x):
            raise DegenerateError(f"{self.name}: rank {self.rank} needs as many harmful prompts, there are {len(x)}")
        rays = cluster_means(x, self.rank) - contrast.harmless.mean
        size = torch.linalg.vector_norm(contrast.harmless.mean) + torch.linalg.vector_norm(contrast.harmful.mean)
        if float(torch.linalg.vector_norm(rays, dim=1).min()) <= MIN_ANGLE * float(size):
            raise DegenerateError(f"{self.name}: a cluster's mean is the harmless mean")
        return towards_harmful(orthonormalise(rays), contrast)


def cluster_means(x: Tensor, k: int) -> Tensor:
    """The means of k clusters of the rows of `x`, `[k, d_model]`, largest cluster first.

    Lloyd's algorithm starts from the k prompts that farthest-first traversal takes; the first of them is the prompt
    farthest from the mean. Raises DegenerateError if fewer than k prompts have different activations.
    """
    centres = x[_distances(x, x.mean(0, keepdim=True)).argmax()].unsqueeze(0)
    while len(centres) < k:
        distance = _distances(x, centres).amin(1)
        if not float(distance.max()) > 0:
            raise DegenerateError(f"cone: fewer than {k} harmful prompts have different activations")
        centres = torch.cat([centres, x[distance.argmax()].unsqueeze(0)])
    found = KMeans(k, init=centres.numpy(), n_init=1, max_iter=STEPS, tol=0).fit(x.numpy())
    owner = torch.from_numpy(found.labels_).long()
    order = torch.argsort(torch.bincount(owner, minlength=k), descending=True, stable=True)
    return torch.stack([x[owner == j].mean(0) for j in order.tolist()])


def _distances(x: Tensor, centres: Tensor) -> Tensor:
    # not by dot products: they lose the digits of small differences beside an offset that all activations share
    return torch.cdist(x, centres, compute_mode="donot_use_mm_for_euclid_dist")
