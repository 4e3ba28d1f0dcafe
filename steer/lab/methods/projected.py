"""The part of the harmful mean that the harmless one has not."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from steer.geometry import projected_direction
from steer.lab.contrast import Contrast
from steer.lab.methods.base import Method


class Projected(Method):
    """Source: "projected abliteration" (J. Lai, 2025); the slerp family at t = 0.

    v = e, the unit part of μH orthogonal to μA. The same for the difference μH − μA, which differs from μH by a
    multiple of μA.

    Pitfalls: at the source layer harmless text has no mean component along v; at others it has (see `biprojected`).
    """

    name: ClassVar[str] = "projected"

    def rows(self, contrast: Contrast) -> Tensor:
        return projected_direction(contrast.harmless.mean, contrast.harmful.mean).unsqueeze(0)
