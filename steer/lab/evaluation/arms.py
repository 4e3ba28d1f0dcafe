"""The arms of an evaluation: plain, and every direction in every mode at every strength, named as a request would ask
for it; and random directions of the same shape beside them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from steer.direction import MAX_VALUE, Direction, digest, read_file
from steer.errors import InvalidInput, SpecError
from steer.geometry import orthogonal_part
from steer.lab.evaluator import Candidate, Evaluator, Steer
from steer.lab.prompts import PromptSet, Rendering
from steer.lab.source import Source, prompt_components
from steer.names import MAX_STRENGTH, MODES, TURNING
from steer.spec import NORM, Entry, RequestedDirection, parse, text

PLAIN = "plain"


@dataclass(frozen=True, slots=True)
class Arm(Candidate):
    """A candidate with a name, its text in the request language. `control`: its direction is a random one."""

    control: bool = False

    @property
    def name(self) -> str:
        return f"{self.way}={self.asked.strength:g}"

    @property
    def way(self) -> str:
        """Its name without the strength."""
        return text([self.asked]).rpartition("=")[0]


def arms_of(
    files: Sequence[Path],
    modes: Sequence[str] | None,
    strengths: Sequence[float] | None,
    controls: int = 0,
    layers: Sequence[str] = ("all",),
    tokens: Sequence[str] = ("all",),
    shifts: Sequence[float] = (0.0,),
    condition: str | None = None,
    probe: Path | None = None,
) -> list[Arm]:
    """All combinations of files, modes, strengths, layers, tokens and shifts.

    Args:
        modes, strengths: None takes those of each file. A mode may end with `spec.NORM`.
        controls: how many random directions of the same shape are tried beside each file.
        layers: like 10-20, or all.
        condition: as a request writes it, on one of `files` or on `probe`.

    Raises:
        InvalidInput: with every problem.
    """
    same = _twice([file.stem for file in files])
    problems = [f"--direction: two files are called '{name}'" for name in sorted(same)]
    ways = [(mode, keeps) for mode in MODES for keeps in (None, True) if not (keeps and mode in TURNING)]
    known = {f"{mode}{NORM if keeps else ''}": (mode, keeps) for mode, keeps in ways}
    problems += [f"--mode: '{m}' is not known; accepted: {', '.join(known)}" for m in modes or () if m not in known]
    problems += [
        f"--{'strength' if len(strengths or ()) == 1 else 'strengths'}: {s:g} is not within ±{MAX_STRENGTH:g}"
        for s in strengths or ()
        if not -MAX_STRENGTH <= s <= MAX_STRENGTH
    ]
    places: list[RequestedDirection] = []
    for at, when, shift in itertools.product(layers, tokens, shifts):
        fields = {"direction": "it", "layers": None if at == "all" else at, "tokens": None if when == "all" else when}
        try:
            places += parse(fields | {"shift": shift, "if": condition}, "")
        except SpecError as error:
            problems += [_option(problem) for problem in error.problems]
    probed = None
    if condition is not None and places and places[0].condition is not None:
        name = places[0].condition.direction
        beside = (*files, *([probe] if probe else []))
        if found := [file for file in beside if file.stem == name]:
            data = read_file(found[-1])
            probed = Direction.from_bytes(data, source=str(found[-1]))
            version = replace(places[0].condition, digest=digest(data))
            places = [replace(place, condition=version) for place in places]
        else:
            accepted = ", ".join(dict.fromkeys(file.stem for file in beside))
            problems.append(f"--condition: '{name}' is no file of --direction or --probe; accepted: {accepted}")
        if probe is not None and probe.stem != name:
            problems.append(f"--probe: {probe} is not of the condition's direction, whose name is '{name}'")
    arms: list[Arm] = []
    for file in files:
        data = read_file(file)
        own = Direction.from_bytes(data, source=str(file))
        tried = {file.stem: (own, digest(data))}
        for seed in range(controls):
            random = control(own, seed)
            tried[f"{file.stem}.random{seed}"] = random, digest(random.to_bytes())
        asked_for = [way for name, way in known.items() if name in (modes or ())]
        for mode, keeps in asked_for if modes else [(own.meta.mode, None)]:
            for place in places:
                where = (place.layers, place.tokens, place.condition, place.shift)
                asked = Entry(file.stem, "", mode, 1.0, *where, norm_preserving=keeps)
                Candidate(own, asked, probed).entry(file.stem)
                arms += [
                    Arm(
                        direction,
                        replace(asked, direction=name, digest=identity, strength=strength),
                        probed,
                        control=direction is not own,
                    )
                    for name, (direction, identity) in tried.items()
                    for strength in strengths or [own.meta.strength_in(mode)]
                ]
    if len({arm.direction.meta.sites for arm in arms}) > 1:
        problems.append("--direction: the files are for different sites: evaluate them one by one")
    repeated = _twice([arm.name for arm in arms if arm.asked.direction not in same])  # `same` is reported already
    problems += [f"the arm {name} is asked for twice" for name in sorted(repeated)]
    InvalidInput.raise_for(problems)
    return arms


def _option(problem: str) -> str:
    """The problem of a request's field as a problem of the option that sets it."""
    field, _, message = problem.removeprefix(".").partition(":")
    name = {"shift": "shifts", "if": "condition"}.get(field.partition(".")[0], field)
    return f"--{name}:{message}"


def control(direction: Direction, seed: int) -> Direction:
    """A random direction of the same shape, to compare with: any direction of its length has such an effect.

    All rows are turned by one random isometry, which keeps norms, the angles between rows and the similarity of layers.
    Weights and means stay. A plane is again that of the row and the harmless mean. Gates and targets lie in the same
    proportion between the components of the two means, or between their angles in the plane, as before; where the
    harmful mean is not the larger one, nothing is above the gate.
    """
    rows = direction.directions.double()
    others = [] if direction.embedding is None else [direction.embedding.double()]
    whole = torch.cat([rows.flatten(0, 1), *others])
    drawn = torch.randn(
        direction.d_model, min(whole.shape), generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    turned = (torch.linalg.qr(drawn).Q @ torch.linalg.qr(whole.T.double()).R).T
    at, *rest = turned.split([rows.shape[0] * rows.shape[1], *map(len, others)])
    at = at.reshape(rows.shape)
    if (_along(at, direction.mean_harmful) - _along(at, direction.mean_harmless)).sum() < 0:
        at, rest = -at, [-each for each in rest]
    means = direction.mean_harmless, direction.mean_harmful
    was, now = ([_along(each, mean) for mean in means] for each in (rows, at))
    gate, target, axis, angles = _moved(direction.reference, was, now), direction.target, direction.axis, None
    if axis is not None and direction.angles is not None:
        source = direction.meta.source_layer
        made = [
            orthogonal_part(row, means[0][layer if source is None or (old != axis[source]).any() else source].double())
            if old.any()
            else old.double()
            for layer, (row, old) in enumerate(zip(at[:, 0], axis, strict=True))
        ]
        turns = [[_angle(each, line, mean) for mean in means] for each, line in ((rows, axis), (at, torch.stack(made)))]
        beyond, to = (_moved(each, *turns) for each in direction.angles.unbind(-1))
        to = torch.where(direction.angles[:, 1] == 0, 0, to)  # 0 is the axis
        axis, angles = torch.stack(made).float(), torch.stack([beyond, torch.minimum(to, beyond)], -1)
    return replace(
        direction.with_meta(method="random", parameters={"seed": seed}, selection={}),
        directions=at.float().contiguous(),
        reference=gate,
        target=None if target is None else torch.minimum(_moved(target, was, now), gate),
        embedding=rest[0].float().contiguous() if rest else None,
        axis=axis,
        angles=angles,
    )


def _moved(value: Tensor, was: Sequence[Tensor], now: Sequence[Tensor]) -> Tensor:
    """Return the value that lies between the two ends `now` as `value` lies between the ends `was`, float32; the ends
    are of the harmless and of the harmful mean."""
    (was_a, was_h), (a, h) = was, now
    moved = a + (value - was_a) / (was_h - was_a) * (h - a)
    sided = (was_h > was_a) & (h > a) & (value < MAX_VALUE / 2)
    return torch.where(sided, moved, MAX_VALUE).clamp(-MAX_VALUE, MAX_VALUE).float()


def _angle(rows: Tensor, axis: Tensor, means: Tensor) -> Tensor:
    """Return the angles of `means` `[layers, d_model]` from the axis, in the plane of the axis and the one row of each
    layer, in radians, `[layers]`."""
    return torch.atan2(_along(rows, means)[:, 0], _along(axis[:, None].to(rows.dtype), means)[:, 0])


def _along(rows: Tensor, means: Tensor) -> Tensor:
    """The components of `means` `[layers, d_model]` along `rows` `[layers, k, d_model]`, `[layers, k]`."""
    return torch.einsum("lkd,ld->lk", rows, means.to(rows.dtype))


def _twice(names: Sequence[str]) -> set[str]:
    return {name for name in names if names.count(name) > 1}


@contextmanager
def steering(evaluator: Evaluator, arm: Arm | None) -> Iterator[Steer]:
    """Make `arm` resident on `evaluator` during the block and give its steering; None is plain."""
    if arm is None:
        yield None
        return
    with evaluator.resident([arm]) as (steer,):
        yield steer


def layer_of(direction: Direction) -> int:
    """The layer that the direction came from, or else the last one that it steers."""
    steered = [layer for layer in range(direction.meta.layers) if direction.directions[layer].any()]
    return direction.meta.source_layer if direction.meta.source_layer in steered else steered[-1]


def projected(
    source: Source,
    direction: Direction,
    sets: Mapping[str, PromptSet],
    rendering: Rendering | None = None,
    batch_size: int | None = None,
) -> dict[str, dict[str, list[float]]]:
    """Return the components of the last prompt token along the direction's first row at `layer_of`, by panel title and
    set."""
    layer = layer_of(direction)
    rows = direction.directions[: layer + 1, 0]
    found = {
        name: prompt_components(source, rows, source.encode(prompts.prompts, rendering), batch_size)[layer].tolist()
        for name, prompts in sets.items()
    }
    return {f"layer {layer}, last prompt token": found}
