"""The arms of an evaluation: plain, and every direction in every mode at every strength, named as a request would ask
for it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from steer.direction import Direction, digest, read_file
from steer.errors import InvalidInput
from steer.lab.activations import Reading
from steer.lab.batches import each_batch
from steer.lab.evaluator import Candidate, Evaluator, Steer
from steer.lab.prompts import PromptSet, Rendering
from steer.lab.source import Source
from steer.names import MAX_STRENGTH, MODES, Mode
from steer.runtime.op import check_mode

PLAIN = "plain"


@dataclass(frozen=True, slots=True)
class Arm:
    """One way to steer. `name` is its text in the request language."""

    name: str
    direction: Direction
    digest: str
    mode: Mode
    strength: float


def arms_of(files: Sequence[Path], modes: Sequence[str] | None, strengths: Sequence[float] | None) -> list[Arm]:
    """Each file in each of `modes` at each of `strengths`; None leaves them to the file. Raises InvalidInput with every
    problem."""
    problems = [f"--direction: two files are called '{n}'" for n in sorted(_twice([file.stem for file in files]))]
    problems += [f"--mode: '{m}' is not known; accepted: {', '.join(MODES)}" for m in modes or () if m not in MODES]
    problems += [
        f"--strengths: {s:g} is not within ±{MAX_STRENGTH:g}"
        for s in strengths or ()
        if not -MAX_STRENGTH <= s <= MAX_STRENGTH
    ]
    arms: list[Arm] = []
    for file in files:
        data = read_file(file)
        direction = Direction.from_bytes(data, source=str(file))
        for mode in [m for m in MODES if m in modes] if modes else [direction.meta.mode]:
            check_mode(direction, mode, file.stem)
            for strength in strengths or [direction.meta.strength]:
                arms.append(
                    Arm(f"{file.stem}:{mode}={strength:g}", direction, digest(data), mode, strength),
                )
    if len({arm.direction.meta.sites for arm in arms}) > 1:
        problems.append("--direction: the files are for different sites: evaluate them one by one")
    problems += [f"--strengths, --mode: the arm {name} is asked for twice" for name in _twice([a.name for a in arms])]
    if problems:
        raise InvalidInput(problems)
    return arms


def _twice(names: Sequence[str]) -> set[str]:
    return {name for name in names if names.count(name) > 1}


@contextmanager
def steering(evaluator: Evaluator, arm: Arm | None) -> Iterator[Steer]:
    """What steers `evaluator` as `arm` while it lasts; None is plain."""
    if arm is None:
        yield None
        return
    with evaluator.all_resident([Candidate(arm.direction, arm.mode, arm.strength)]) as (steer,):
        yield steer


POSITION = -1


def layer_of(direction: Direction) -> int:
    """The layer that it came from, else the last one that it steers."""
    steered = [layer for layer in range(direction.meta.layers) if direction.directions[layer].any()]
    return direction.meta.source_layer if direction.meta.source_layer in steered else steered[-1]


def projected(
    source: Source,
    direction: Direction,
    sets: Mapping[str, PromptSet],
    rendering: Rendering | None = None,
    batch_size: int | None = None,
) -> dict[str, dict[str, list[float]]]:
    """By panel title and set: the component of the last prompt token along the direction's first row, at `layer_of`."""
    layer = layer_of(direction)
    row = direction.directions[layer, 0].float()
    found = {}
    for name, prompts in sets.items():
        encoded = source.encode(prompts.prompts, rendering)
        values = [0.0] * len(encoded)

        def run(indices: list[int], encoded=encoded, values=values) -> None:  # type: ignore[no-untyped-def]
            picked = source.run([encoded[i] for i in indices], Reading((POSITION,), layer)).picked[0, layer]
            for i, value in zip(indices, (picked.float().cpu() @ row).tolist(), strict=True):
                values[i] = value

        each_batch([len(e.ids) for e in encoded], run, batch_size=batch_size, tokens=source.pass_tokens)
        found[name] = values
    return {f"layer {layer}, last prompt token": found}
