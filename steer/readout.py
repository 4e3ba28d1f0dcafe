"""The read-out part of a request: the served directions along which its stream is read, and the layers.

    true                                   the directions that steer this request
    "refusal", ["refusal", "verbosity"]    served directions by name, also for a plain request
    {"directions": ..., "layers": ...}     the same with layers: "all" (the default), "source" (each named direction's
                                           source layer) or a list of numbers
    {"directions": ..., "angle": true}     also the angle in each direction's plane, which needs what the mode "rotate"
                                           needs: a file with a plane, and two rows
    false, null, "off"                     nothing, which is the default

Parsing gives a `RequestedReadout`. `resolve` turns it into a `Readout` of exact file versions, which the request's
admission pins. `steer.runtime.readout` defines what is measured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Final, Literal

from steer.errors import SpecError, brief
from steer.names import SITE_RULES, SITES, readable
from steer.registry import Registry
from steer.spec import MAX_ITEMS, OFF_TEXTS, Line, Readout, RequestedDirection, Spec

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


def parse(value: object) -> RequestedReadout | None:
    """Parse the body field. None means that nothing is read. Raises SpecError with every problem."""
    problems: list[str] = []
    layers: Layers = "all"
    angle = False
    if isinstance(value, dict):
        problems += [
            f"{FIELD}.{str(key)[:40]}: unknown field; accepted: {', '.join(_FIELDS)}"
            for key in islice((key for key in value if key not in _FIELDS), MAX_ITEMS)
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


def resolve(
    wanted: RequestedReadout,
    spec: Spec,
    registry: Registry,
    layers: int,
    may_use: Callable[[str], bool] = lambda _: True,
) -> Readout:
    """Resolve `wanted` to the versions that it means now.

    Args:
        spec: of the same request. Call this in the `registry.steady()` in which it was resolved.
        layers: how many the model has.
        may_use: whether the caller may use a direction. Those in `spec` can be read in any case.

    Raises:
        SpecError: with every problem.
    """
    own = dict.fromkeys(entry.direction for entry in spec.entries)
    names = tuple(own) if wanted.names is None else wanted.names
    if not names:
        raise SpecError(
            f"{FIELD}: true means the directions that steer this request, but none does; name the directions",
            param=FIELD,
        )
    if len(names) > MAX_DIRECTIONS:
        raise SpecError(f"{FIELD}: {len(names)} directions, at most {MAX_DIRECTIONS} are read at once", param=FIELD)
    try:
        registry.resolve(
            [RequestedDirection(name, "rotate" if wanted.angle else None, strength=1.0) for name in names],
            lambda name: name in own or may_use(name),
        )
    except SpecError as error:
        raise type(error)([f"{FIELD}: {problem}" for problem in error.problems], param=FIELD) from None
    return Readout(_lines(names, registry), _resolved(wanted.layers, names, registry, layers), wanted.angle)


def _lines(names: Sequence[str], registry: Registry) -> tuple[Line, ...]:
    problems, lines = [], []
    for name in names:
        version = registry.get(name)
        lines += [Line(name, version.digest, row) for row in range(version.direction.rank)]
        if not readable(version.direction.meta.sites):
            sites = ", ".join(version.direction.meta.sites)
            can = ", ".join(f"'{site}'" for site in SITES if SITE_RULES[site].readable)
            problems.append(f"{FIELD}: direction '{name}' acts at the site '{sites}'; what is read is {can}")
    SpecError.raise_for(problems, FIELD)
    return tuple(lines)


def _resolved(wanted: Layers, names: Sequence[str], registry: Registry, layers: int) -> tuple[int, ...]:
    if wanted == "all":
        return tuple(range(layers))
    if wanted == "source":
        sources = {name: registry.get(name).direction.meta.source_layer for name in names}
        if without := [name for name, source in sources.items() if source is None]:
            raise SpecError(
                f"{FIELD}.layers: {', '.join(without)}: each layer has its own direction, so there is no source layer; "
                "accepted: 'all' or a list of layer numbers",
                param=FIELD,
            )
        return tuple(sorted({source for source in sources.values() if source is not None}))
    if outside := [layer for layer in wanted if not 0 <= layer < layers]:
        raise SpecError(
            f"{FIELD}.layers: {', '.join(str(layer)[:20] for layer in outside[:8])}: this model has the layers 0 to "
            f"{layers - 1}",
            param=FIELD,
        )
    return wanted
