"""What the study compares: methods, and arms, which are a method with a mode, a source layer and a strength."""

from __future__ import annotations

from dataclasses import dataclass

from steer.lab.derive import Recipe
from steer.lab.methods.base import Method
from steer.lab.methods.boundaries import Whitened
from steer.lab.methods.means import Biprojected, Linear, Slerp
from steer.names import Mode

#: The slerp family's t. At 0 it is `projected`, row for row, so that is no method of its own here.
TS = tuple(n / 4 for n in range(9))
SLERP = tuple(f"slerp {t:g}" for t in TS)
PROJECTED, ARTICLE, LINEAR = "slerp 0", "slerp 1", "linear"
METHODS: dict[str, Method] = {
    **{name: Slerp(t=t) for name, t in zip(SLERP, TS, strict=True)},
    LINEAR: Linear(),
    "biprojected": Biprojected(),
    "whitened": Whitened(shrinkage="auto"),
}
MODES: tuple[Mode, ...] = ("ablate", "one_sided")
#: Whose strength is varied, and how.
SWEPT = (PROJECTED, ARTICLE, LINEAR)
#: Which are also tried one-sided with the ρ that t = 1 has by itself.
ZEROED = (PROJECTED, "slerp 0.5", LINEAR)
STRENGTHS = (1.5, 2.0)


@dataclass(frozen=True, slots=True)
class Arm:
    """One way to steer: `method` is a name of METHODS. zeroed: with ρ = 0 in place of the direction's own reference."""

    method: str
    mode: Mode
    layer: int
    strength: float = 1.0
    zeroed: bool = False

    @property
    def key(self) -> str:
        key = f"{self.method}, {self.mode}, layer {self.layer}, strength {self.strength:g}"
        return f"{key}, ρ = 0" if self.zeroed else key

    @property
    def recipe(self) -> Recipe:
        return Recipe(METHODS[self.method], self.layer, mode=self.mode, strength=self.strength)
