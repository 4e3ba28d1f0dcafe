"""The difference of the class means."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from steer.geometry import linear_direction
from steer.lab.contrast import Contrast
from steer.lab.methods.base import Method


class Linear(Method):
    """Source: Arditi et al. 2024, "Refusal in language models is mediated by a single direction", section 2.3.

    v = (μH − μA) / ‖μH − μA‖, of the raw means.

    Pitfalls: where the classes' means differ in length, the direction has a part along the mean itself, which all text
    shares; outlier dimensions decide it where there are some (winsorise).
    """

    name: ClassVar[str] = "linear"

    def rows(self, contrast: Contrast) -> Tensor:
        return linear_direction(contrast.harmless.mean, contrast.harmful.mean).unsqueeze(0)
