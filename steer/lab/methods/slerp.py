"""The slerp family: the chord of the arc from the harmless to the harmful mean."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from torch import Tensor

from steer.geometry import slerp_direction
from steer.lab.contrast import Contrast
from steer.lab.methods.base import Method


class Slerp(Method):
    """Source: the SLERP abliteration article, in closed form (`steer.geometry`).

    d(t) = cos(tω/2)·e − sin(tω/2)·â: with the means normalised to â and ĥ, ω their angle and e the unit part of ĥ
    orthogonal to â, the unit vector along slerp(â, ĥ, t) − â. t = 0 is `projected`, t = 1 the difference of the
    normalised means.

    Pitfalls: only the angle between the means counts, so a difference that is one of length alone is not seen. Plain
    removal puts both means on one ray of the arc, t/2 of the way from the harmless to the harmful one: t = 0 makes
    harmful text harmless, t = 1 puts both where the model is undecided, and t > 1 makes harmless text harmful. Measured
    on 23 small models (docs/study.md), t = 0 was the better choice, and t > 1 failed as that says.
    """

    name: ClassVar[str] = "slerp"
    t: float = Field(default=1.0, description="place on the arc: 0 is projected, 1 the normalised difference")

    def rows(self, contrast: Contrast) -> Tensor:
        return slerp_direction(contrast.harmless.mean, contrast.harmful.mean, self.t).unsqueeze(0)

    @property
    def bisects(self) -> bool:
        return self.t == 1.0
