"""Methods that need only the class means: linear, projected, slerp and biprojected."""

from __future__ import annotations

import math

import torch
from pydantic import Field
from torch import Tensor

from steer.errors import DegenerateError
from steer.geometry import MIN_ANGLE, angle, linear_direction, linear_t, orthogonal_part, slerp_direction, unit
from steer.lab.measurement import Contrast
from steer.lab.methods.base import Method


class Linear(Method):
    """The difference of the class means.

    Source: Arditi et al. 2024, "Refusal in language models is mediated by a single direction" (arXiv 2406.11717),
    section 2.3.

    v = (μH − μA) / ‖μH − μA‖, of the raw means.

    Pitfalls: where the classes' means differ in length, the direction has a part along the mean itself, which all text
    shares; outlier dimensions decide it where there are some (winsorise).
    """

    def rows(self, contrast: Contrast) -> Tensor:
        return linear_direction(contrast.harmless.mean, contrast.harmful.mean).unsqueeze(0)


class Projected(Method):
    """The part of the harmful mean that is orthogonal to the harmless one.

    Source: "Projected abliteration" (J. Lai, 2025, huggingface.co/blog/grimjim/projected-abliteration); the slerp
    family at t = 0.

    v = e, the unit part of μH orthogonal to μA. The same for the difference μH − μA, which differs from μH by a
    multiple of μA.

    Pitfalls: at the source layer harmless text has no mean component along v; at others it has (see `biprojected`).
    """

    def rows(self, contrast: Contrast) -> Tensor:
        return orthogonal_part(contrast.harmless.mean, contrast.harmful.mean).unsqueeze(0)


class Slerp(Method):
    """The chord from the harmless mean to a place `t` on the arc between the two normalised means.

    Source: the SLERP abliteration article, in closed form (`steer.geometry`).

    d(t) = cos(tω/2)·e − sin(tω/2)·â: with the means normalised to â and ĥ, ω their angle and e the unit part of ĥ
    orthogonal to â, the unit vector along slerp(â, ĥ, t) − â. t = 0 is `projected`, t = 1 the difference of the
    normalised means.

    d(t) points from the harmless mean to the harmful one, ⟨d, μH − μA⟩ > 0, for every t from 0 to 2 and beyond, up to
    half a turn from `linear`. Where it does not it is refused: what is above the harmless mean would be harmless text.

    Pitfalls: only the angle between the means counts, so a difference that is one of length alone is not seen. Which t
    is best differs between models: on Qwen2.5-Coder-0.5B-Instruct more was removed the smaller t was (down to −1), and
    t = 1 removed least and changed most; on small models trained for the study (docs/study.md) t = 0 was the better
    choice, and t > 1 made harmless text harmful. `steer fit` chooses t by what it does.
    """

    t: float = Field(default=0.0, description="place on the arc: 0 is projected, 1 the normalised difference")

    def rows(self, contrast: Contrast) -> Tensor:
        a, h = contrast.harmless.mean, contrast.harmful.mean
        row = slerp_direction(a, h, self.t)
        if not float(row @ unit(contrast.difference)) > MIN_ANGLE:
            middle, reach = linear_t(a, h), math.pi / float(angle(a, h))
            raise DegenerateError(
                f"at t = {self.t:g} slerp points from harmful to harmless; accepted here: t from "
                f"{middle - reach:.3g} to {middle + reach:.3g}, and anywhere t from 0 to 2"
            )
        return row.unsqueeze(0)

    @property
    def bisects(self) -> bool:
        return self.t == 1.0


class Biprojected(Projected):
    """As `projected`, and made orthogonal to the harmless mean of each layer.

    Source: "Norm-preserving biprojected abliteration" (J. Lai, 2025,
    huggingface.co/blog/grimjim/norm-preserving-biprojected-abliteration); here the direction alone, since keeping norms
    is a matter of weights: docs/directions.md says which norms.

    At the source layer v = e as `projected`; at each layer l then v_l = normalise(v − ⟨v, â_l⟩·â_l), in two passes of
    Gram-Schmidt, with â_l the unit harmless mean there.

    Pitfalls: the rows differ from layer to layer, so with the site `writers` a part of what one layer removed can come
    back with the next; means are of one position, and harmless text elsewhere does have components along v_l.
    """

    def onto(self, rows: Tensor, target: Contrast) -> Tensor:
        a = unit(target.harmless.mean)
        for _ in range(2):
            rows = rows - (rows @ a)[:, None] * a
        if float(torch.linalg.vector_norm(rows)) < MIN_ANGLE:
            raise DegenerateError("the direction lies along the harmless mean: nothing of it is left")
        return unit(rows)
