"""`direction.pt` with `direction_metadata.json`, and `mean_diffs.pt`, as the pipeline of Arditi et al. writes them.

A direction is `[d_model]`, the differences are `[positions, layers, d_model]`, float64; positions count from the
prompt's end. Their layer l is the *input* of block l (resid_pre), which is our layer l − 1.
"""

from __future__ import annotations

import json
from io import BytesIO
from pathlib import Path

import torch
from torch import Tensor

from steer.direction import Direction, write_file
from steer.errors import InvalidInput
from steer.lab.formats.foreign import Foreign, direction_of

DIRECTION, METADATA, MEAN_DIFFS = "direction.pt", "direction_metadata.json", "mean_diffs.pt"


def read(path: Path, value: Tensor, foreign: Foreign) -> Direction:
    """One vector for all layers. Of class means nothing is known: the direction can be ablated, no more."""
    if value.ndim not in (1, 3):
        raise InvalidInput(
            f"{path}: has shape {list(value.shape)}; a direction has [d_model], mean differences have [positions, "
            "layers, d_model]"
        )
    foreign.model(path, value.shape[-1])
    layer, position, vector = _chosen(path, value, foreign) if value.ndim == 3 else _single(path, value, foreign)
    assert foreign.facts is not None
    foreign.check_layer(path, layer)
    return direction_of(
        dict.fromkeys(range(foreign.facts.layers), vector.unsqueeze(0)),
        foreign.facts,
        source=path,
        method="linear",
        mode="ablate",
        modes=("ablate",),
        source_layer=layer,
        parameters={} if position is None else {"position": position},
    )


def write(path: Path, direction: Direction) -> list[str]:
    """The source layer's vector, with the length of the difference of its class means where that is known."""
    source, meta = direction.meta.source_layer, direction.meta
    if source is None or direction.rank != 1:
        raise InvalidInput(f"{path}: this format holds one vector of one source layer; derive one with --layer NUMBER")
    row = direction.directions[source, 0].double()
    length = float((direction.mean_harmful[source] - direction.mean_harmless[source]).double().norm()) or 1.0
    buffer = BytesIO()
    torch.save(row * length, buffer)
    write_file(path, buffer.getvalue())
    described = {"pos": meta.parameters.get("position", -1), "layer": source + 1}
    write_file(path.with_name(METADATA), (json.dumps(described) + "\n").encode())
    if meta.mode == "ablate":
        return []
    return [f"{path}: tools that read it ablate; the direction's own mode is {meta.mode}"]


def _single(path: Path, value: Tensor, foreign: Foreign) -> tuple[int, int | None, Tensor]:
    beside = path.with_name(METADATA)
    if foreign.layer is not None:
        return foreign.layer, foreign.position, value
    try:
        described = json.loads(beside.read_text())
        theirs, position = int(described["layer"]), int(described["pos"])
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise InvalidInput(
            f"{beside}: gives no layer and pos ({error}); give --layer (the output of which of our blocks)"
        ) from error
    if theirs == 0:
        raise InvalidInput(f"{beside}: layer 0 is the embedding output, which is no block's")
    return theirs - 1, position, value


def _chosen(path: Path, value: Tensor, foreign: Foreign) -> tuple[int, int | None, Tensor]:
    if foreign.layer is None:
        raise InvalidInput(f"{path}: has the differences of every layer and position: give --layer (and --position)")
    position = -1 if foreign.position is None else foreign.position
    if not -value.shape[0] <= position < 0:
        raise InvalidInput(f"{path}: has the positions −{value.shape[0]} to −1, not {position}")
    if not 0 <= foreign.layer < value.shape[1] - 1:
        raise InvalidInput(f"{path}: has the outputs of the blocks 0 to {value.shape[1] - 2}, not of {foreign.layer}")
    return foreign.layer, position, value[position, foreign.layer + 1]
