"""One layer's direction, made orthogonal to the harmless mean of every layer where it acts."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from steer.errors import DegenerateError
from steer.geometry import MIN_ANGLE, projected_direction, unit
from steer.lab.contrast import Contrast
from steer.lab.methods.base import Method


class Biprojected(Method):
    """Source: "norm-preserving biprojected abliteration" (J. Lai, 2025); here the direction alone, the norms being an
    option of `steer bake`.

    At the source layer v = e as `projected`; at each layer l then v_l = normalise(v − ⟨v, â_l⟩·â_l), in two passes of
    Gram-Schmidt, with â_l the unit harmless mean there.

    Pitfalls: the rows differ from layer to layer, so with the site `writers` a part of what one layer removed can come
    back with the next; means are of one position, and harmless text elsewhere does have components along v_l.
    """

    name: ClassVar[str] = "biprojected"

    def rows(self, contrast: Contrast) -> Tensor:
        return projected_direction(contrast.harmless.mean, contrast.harmful.mean).unsqueeze(0)

    def onto(self, rows: Tensor, target: Contrast) -> Tensor:
        a = unit(target.harmless.mean)
        for _ in range(2):
            rows = rows - (rows @ a)[:, None] * a
        if float(torch.linalg.vector_norm(rows)) < MIN_ANGLE:
            raise DegenerateError("the direction lies along the harmless mean: nothing of it is left")
        return unit(rows)
