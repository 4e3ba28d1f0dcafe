"""Intervals and tests of what was counted."""

from __future__ import annotations

import math


def wilson(hits: int, count: int, z: float = 1.959964) -> tuple[float, float]:
    """The Wilson score interval of a rate, 95 % by default. Source: Wilson 1927."""
    if count == 0:
        return 0.0, 1.0
    p, zz = hits / count, z * z / count
    middle, half = p + zz / 2, z * math.sqrt(p * (1 - p) / count + zz / (4 * count))
    # the rate itself is always inside, which rounding could deny at 0 and 1
    return max(0.0, min(p, (middle - half) / (1 + zz))), min(1.0, max(p, (middle + half) / (1 + zz)))
