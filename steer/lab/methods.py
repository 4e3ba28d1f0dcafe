"""Methods: from the class means of one layer to its direction. A new method is one function and its line in METHODS."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from steer.geometry import linear_direction, projected_direction, slerp_direction
from steer.lab.measure import Measurement

#: (harmless mean, harmful mean, t) → unit vector `[d_model]`, float64. `t` is for slerp alone.
Method = Callable[[Tensor, Tensor, float], Tensor]

METHODS: dict[str, Method] = {
    "slerp": slerp_direction,
    "linear": lambda a, h, _t: linear_direction(a, h),
    "projected": lambda a, h, _t: projected_direction(a, h),
}


def reference(measurement: Measurement, directions: Tensor, method: str, t: float) -> Tensor:
    """ρ of `one_sided` for each layer, `[layers]`, for unit rows `directions` `[layers, d_model]`.

    0 for slerp at t = 1, where 0 is the bisector of the two means' directions and separates the classes by
    construction; else the midpoint of the two means' components at that layer.
    """
    if method == "slerp" and t == 1.0:
        return directions.new_zeros(directions.shape[0])
    middle = (measurement.mean_harmful + measurement.mean_harmless) / 2
    return (middle * directions).sum(-1)
