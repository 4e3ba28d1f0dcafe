"""The strength at which a direction costs a given KL, so that directions are compared at an equal price."""

from __future__ import annotations

import math
from collections.abc import Callable

from steer.names import MAX_STRENGTH

#: Strengths that are tried for one dose, at most; and how near the KL must come to it, as a share of it.
TRIES, NEAR = 10, 0.03
#: A share of the dose: what is further from it is no comparison at an equal price.
FAR = 0.25


def strength_at(dose: float, kl: Callable[[float], float]) -> float | None:
    """A strength of four digits up to MAX_STRENGTH whose `kl` is `dose`, the nearest of those that were tried; None
    where none comes within FAR of it, as where the KL jumps over it or stays below.

    What is kept is a bracket, with less than the dose at its lower end and more at its upper one, so that there is a
    crossing in it though the KL need not rise everywhere. The next strength is the one at which a power law through
    both ends has the dose (from 0 on a square, which the KL of a small change is), and the middle where two in a row
    fell on the same side, or that one is not inside.
    """
    low, high, tried, sides = (0.0, 0.0), (math.inf, math.inf), dict[float, float](), [0, 0]
    at = 1.0
    for _ in range(TRIES):
        at = float(f"{at:.4g}")
        if at in tried:
            break
        found = tried[at] = kl(at)
        if abs(found - dose) <= NEAR * dose:
            break
        sides = [sides[1], 1 if found > dose else -1]
        low, high = (low, (at, found)) if found > dose else ((at, found), high)
        if low[0] == MAX_STRENGTH:
            return None
        if math.isinf(high[0]):
            at = min(MAX_STRENGTH, low[0] * min(4.0, max(1.25, math.sqrt(dose / low[1]) if low[1] > 0 else 4.0)))
            continue
        if low[1] > 0:
            power = math.log(high[1] / low[1]) / math.log(high[0] / low[0])
            at = low[0] * (dose / low[1]) ** (1 / power)
        else:
            at = high[0] * math.sqrt(dose / high[1])
        if sides[0] == sides[1] or not low[0] < float(f"{at:.4g}") < high[0]:
            at = (low[0] + high[0]) / 2
    best = min(tried, key=lambda strength: abs(math.log(max(tried[strength], 1e-300) / dose)))
    return best if abs(tried[best] - dose) <= FAR * dose else None
