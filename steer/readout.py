"""The read-out part of a request: the served directions along which its stream is read, and the layers.

    true                                   the directions that steer this request
    "refusal", ["refusal", "verbosity"]    served directions by name, also for a plain request
    {"directions": ..., "layers": ...}     the same with layers: "all" (the default), "source" (each named direction's
                                           source layer) or a list of numbers
    {"directions": ..., "angle": true}     also the angle in each direction's plane, which needs what the mode "rotate"
                                           needs: a file with a plane, and two rows
    false, null, "off"                     nothing, which is the default

Parsing gives a `RequestedReadout`. The registry resolves it into a `Readout` of exact file versions, which the
request's admission pins. `steer.runtime.readout` defines what is measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Final, Literal

from steer.errors import SpecError, brief, unknown_field
from steer.spec import MAX_ITEMS, OFF_TEXTS

FIELD: Final = "steer_readout"
MAX_DIRECTIONS = 4
_FIELDS = ("directions", "layers", "angle")
ACCEPTED = (
    "accepted: true for the directions that steer this request, a direction's name or a list of names, an object "
    "{'directions': true or names, 'layers': 'all', 'source' or a list of layers, 'angle': true or false}, or null, "
    "false or 'off' for none"
)
Layers = tuple[int, ...] | Literal["all", "source"]


@dataclass(frozen=True, slots=True)
class RequestedReadout:
    """The read-out that a client asked for; `names` is None for the directions of its own spec."""

    names: tuple[str, ...] | None
    layers: Layers = "all"
    angle: bool = False

    def layers_of(self, sources: Mapping[str, int | None], count: int) -> tuple[int, ...]:
        """The layers to read in a model with `count` of them. `sources`: the source layer of each direction that is
        read. Raises SpecError."""
        if self.layers == "all":
            return tuple(range(count))
        if self.layers == "source":
            if without := [name for name, source in sources.items() if source is None]:
                raise SpecError(
                    f"{FIELD}.layers: {', '.join(without)}: each layer has its own direction, so there is no source "
                    "layer; accepted: 'all' or a list of layer numbers",
                    param=FIELD,
                )
            return tuple(sorted({source for source in sources.values() if source is not None}))
        if outside := [layer for layer in self.layers if not 0 <= layer < count]:
            raise SpecError(
                f"{FIELD}.layers: {', '.join(str(layer)[:20] for layer in outside[:8])}: this model has the layers 0 "
                f"to {count - 1}",
                param=FIELD,
            )
        return self.layers


@dataclass(frozen=True, slots=True)
class Line:
    """One row of a direction to read."""

    name: str
    digest: str
    row: int


@dataclass(frozen=True, slots=True)
class Readout:
    """The read-out of one request, resolved. With `angle`, the bank row of each line is followed by the row of its
    axis."""

    lines: tuple[Line, ...]
    layers: tuple[int, ...]
    angle: bool = False

    @property
    def rows(self) -> int:
        """How many bank rows are read."""
        return len(self.lines) * (1 + self.angle)

    @property
    def digests(self) -> tuple[str, ...]:
        """The versions to read, in the order of `lines`."""
        return tuple(dict.fromkeys(line.digest for line in self.lines))


def parse(value: object) -> RequestedReadout | None:
    """Parse the body field. None means that nothing is read. Raises SpecError with every problem."""
    problems: list[str] = []
    layers: Layers = "all"
    angle = False
    if isinstance(value, dict):
        problems += [
            f"{FIELD}.{key[:40]}: {unknown_field(key, _FIELDS)}"
            for key in islice((str(key) for key in value if key not in _FIELDS), MAX_ITEMS)
        ]
        layers = _layers(value.get("layers", "all"), problems)
        if type(angle := value.get("angle", False)) is not bool:
            problems.append(f"{FIELD}.angle: {brief(angle)} is not accepted: true or false")
        value = value.get("directions", True)
    names = _names(value, problems)
    if names is not None and len(names) > MAX_DIRECTIONS:
        problems.append(f"{FIELD}: {len(names)} directions, at most {MAX_DIRECTIONS} are read at once")
    if problems:
        raise SpecError(problems, FIELD)
    return None if names == () else RequestedReadout(names, layers, angle)


def _names(value: object, problems: list[str]) -> tuple[str, ...] | None:
    if value is True:
        return None
    if value is None or value is False:
        return ()
    if isinstance(value, str):
        if value.strip().lower() in OFF_TEXTS:
            return ()
        value = [part.strip() for part in value.split(",")]
    if isinstance(value, list) and all(isinstance(name, str) for name in value):
        return tuple(dict.fromkeys(value))
    problems.append(f"{FIELD}: {brief(value)} is not understood; {ACCEPTED}")
    return ()


def _layers(value: object, problems: list[str]) -> Layers:
    if value in ("all", "source"):
        return "all" if value == "all" else "source"
    if isinstance(value, list) and value and all(type(layer) is int for layer in value):
        return tuple(sorted(set(value)))
    problems.append(f"{FIELD}.layers: {brief(value)} is not accepted: 'all', 'source' or a list of layer numbers")
    return "all"
