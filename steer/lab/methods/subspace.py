"""Several orthonormal rows: where the harmful prompts lie as seen from the harmless mean."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from torch import Tensor

from steer.lab.contrast import Contrast, principal, towards_harmful
from steer.lab.methods.base import Method, Need


class Subspace(Method):
    """Source: the singular vectors of class differences, as in LEACE's and RepE's ablations of more than one direction
    (Zou et al. 2023, appendix).

    The k leading right singular vectors of the differences x_i − μA, i over the harmful prompts, not centred: the first
    is close to `linear` where the classes are far apart, the others are how refusals differ among each other.

    Pitfalls: further rows also hold what the harmful prompts vary in without any refusal (topic, length), and removing
    them costs more than it gives: compare with rank 1. A server needs `--rank` of k.
    """

    name: ClassVar[str] = "subspace"
    needs: ClassVar[Need] = "vectors"
    prompts: ClassVar[int] = 2
    rank: int = Field(2, ge=1, le=64, description="rows")

    def rows(self, contrast: Contrast) -> Tensor:
        differences = contrast.harmful.rows - contrast.harmless.mean
        return towards_harmful(principal(differences, self.rank, self.name), contrast)
