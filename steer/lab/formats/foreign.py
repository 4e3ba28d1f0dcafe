"""What another tool's file does not say and a direction must; and the one place where a pickled file is read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steer.direction import Direction, DirectionMeta
from steer.errors import DegenerateError, InvalidInput
from steer.geometry import orthonormalise
from steer.lab.measurement import ModelFacts
from steer.names import Mode


@dataclass(frozen=True, slots=True)
class Foreign:
    """`facts` of the model that the file was made for (`--model`), and where the file has several vectors, the `layer`
    (ours), `position` and `tensor` that are meant."""

    facts: ModelFacts | None = None
    layer: int | None = None
    position: int | None = None
    tensor: str | None = None

    def refuse(self, source: object, *names: str) -> None:
        """Raise InvalidInput for each of `names` that was given although `source` leaves no choice of it."""
        given = [name for name in names if getattr(self, "facts" if name == "model" else name) is not None]
        InvalidInput.raise_for(f"--{name}: is not for {source}, which leaves no choice of it" for name in given)

    def model(self, source: object, d_model: int) -> ModelFacts:
        """The facts. Raises InvalidInput where they were not given, or are of another width."""
        if self.facts is None:
            raise InvalidInput(f"{source}: does not say which model it was made for: give --model")
        if self.facts.d_model != d_model:
            raise InvalidInput(
                f"{source}: has vectors of {d_model} dimensions, {self.facts.name} has d_model {self.facts.d_model}"
            )
        return self.facts

    def check_layer(self, source: object, layer: int) -> int:
        assert self.facts is not None
        if not 0 <= layer < self.facts.layers:
            raise InvalidInput(f"{source}: layer {layer} is not one of the model's 0 to {self.facts.layers - 1}")
        return layer


def width_of(source: object, vectors: Iterable[Tensor]) -> int:
    """The number of dimensions of `vectors` `[d_model]`. Raises InvalidInput where it is not the same for all."""
    sizes = {len(vector) for vector in vectors}
    if len(sizes) != 1:
        raise InvalidInput(f"{source}: its vectors have different numbers of dimensions: {sorted(sizes)}")
    return sizes.pop()


def direction_of(
    rows: Mapping[int, Tensor],
    facts: ModelFacts,
    *,
    source: object,
    method: str,
    mode: Mode,
    modes: tuple[Mode, ...] | None = None,
    source_layer: int | None = None,
    parameters: Mapping[str, float | int | str | None] | None = None,
) -> Direction:
    """A direction of the vectors `[k, d_model]` of some layers, the others unsteered. Their lengths are kept as the
    difference of the class means, so that `add` adds the vectors themselves; no more of the means is known, and one
    vector of a layer can be ablated and added, several can be ablated; `modes` is for vectors without a length of their
    own. Raises InvalidInput for vectors that are no direction."""
    k = max(len(each) for each in rows.values())
    directions = torch.zeros(facts.layers, k, facts.d_model)
    difference = torch.zeros(facts.layers, facts.d_model)
    problems = []
    for layer, vectors in sorted(rows.items()):
        if not vectors.any():
            continue
        try:
            directions[layer] = orthonormalise(vectors.double()).float()
            difference[layer] = vectors.double().sum(0).float()
        except DegenerateError as error:
            problems += [f"{source}: layer {layer}: {problem}" for problem in error.problems]
    InvalidInput.raise_for(problems)
    meta = DirectionMeta(
        method=method,
        parameters=dict(parameters or {}),
        source_layer=source_layer,
        **facts.as_fitted,
        mode=mode,
        modes=modes or (("ablate", "add") if k == 1 else ("ablate",)),
    )
    zeros = torch.zeros(facts.layers, facts.d_model)
    return Direction(
        meta, directions, torch.ones(facts.layers), torch.zeros(facts.layers, k), difference, zeros, zeros.clone()
    )


def imported(
    rows: Mapping[int, Tensor],
    facts: ModelFacts,
    foreign: Foreign,
    source: object,
    modes: tuple[Mode, ...] | None = None,
) -> Direction:
    """The direction of vectors by layer, each layer's own, or with --layer that layer's at all of them."""
    if (layer := foreign.layer) is not None:
        if foreign.check_layer(source, layer) not in rows:
            raise InvalidInput(f"{source}: has vectors of the layers {sorted(rows)}, not of {layer}")
        rows = dict.fromkeys(range(facts.layers), rows[layer])
    return direction_of(rows, facts, source=source, method="imported", mode="ablate", modes=modes, source_layer=layer)


def load_pickled(path: Path) -> Any:
    """What torch saved in `path`. `weights_only` refuses every file that would run code. Raises InvalidInput."""
    try:
        value = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a pickle is a program, and in a broken one any step of it may fail
        raise InvalidInput(
            f"{path}: cannot be read as a file of tensors (anything else in it is refused): {str(error)[:200]}"
        ) from error
    check_plain(path, value.values() if isinstance(value, dict) else (value,))
    return value


def check_plain(path: Path, values: Iterable[object]) -> None:
    """Raise InvalidInput where one of the tensors among `values` is not dense, or not of real numbers."""
    for tensor in values:
        if isinstance(tensor, Tensor) and (
            tensor.layout is not torch.strided
            or tensor.is_nested
            or tensor.is_quantized
            or tensor.is_meta
            or tensor.is_complex()
        ):
            raise InvalidInput(f"{path}: has a tensor of another kind; accepted: dense tensors of real numbers")
