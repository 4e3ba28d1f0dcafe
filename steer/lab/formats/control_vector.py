"""GGUF control vectors, as llama.cpp, repeng and EasySteer write and read them: float32 tensors `direction.N`.

llama.cpp adds `direction.N` to the output of its 0-based block N, which is our layer N, for N ≥ 1. It only ever *adds*:
what is exported of another mode is another thing, and that is said. The steer metadata goes along under `steer.meta`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steer.direction import Direction, replacing
from steer.errors import InvalidInput
from steer.lab.formats.foreign import Foreign, direction_of
from steer.runtime.op import GAMMA, coefficients

ARCHITECTURE = "controlvector"


def read(path: Path, foreign: Foreign) -> Direction:
    """The vectors as a direction whose mode is `add`; where a layer has none it is unsteered."""
    gguf = _library(path)
    try:
        reader = gguf.GGUFReader(path)
        field = reader.fields.get("general.architecture")
        kind = None if field is None else field.contents()
    except (ValueError, OSError, IndexError, KeyError) as error:
        raise InvalidInput(f"{path}: not a GGUF file: {error}") from error
    if kind != ARCHITECTURE:
        raise InvalidInput(f"{path}: general.architecture is '{kind}', a control vector has '{ARCHITECTURE}'")
    rows: dict[int, Tensor] = {}
    for tensor in reader.tensors:
        matched = re.fullmatch(r"direction\.(\d+)", tensor.name)
        if matched:
            rows[int(matched.group(1))] = torch.from_numpy(tensor.data.astype("float32")).reshape(1, -1)
    if not rows:
        raise InvalidInput(f"{path}: has no tensors direction.1, direction.2, …")
    if len({v.shape for v in rows.values()}) != 1:
        raise InvalidInput(f"{path}: its vectors have different numbers of dimensions")
    facts = foreign.model(path, next(iter(rows.values())).shape[1])
    for layer in rows:
        foreign.check_layer(path, layer)
    return direction_of(rows, facts, source=path, method="control vector", mode="add", modes=("ablate", "add"))


def write(path: Path, direction: Direction) -> list[str]:
    """What the direction adds in the mode `add`, at its own strength. Returns what a reader of the file would miss."""
    meta, gguf = direction.meta, _library(path)
    if direction.rank != 1:
        raise InvalidInput(f"{path}: a control vector has one row for each layer, this direction has {direction.rank}")
    if "add" not in meta.modes:
        raise InvalidInput(f"{path}: a control vector is added, and this direction has no length to add with")
    gamma = coefficients(direction, "add")[:, 0, GAMMA]
    vectors = meta.strength * gamma[:, None] * direction.directions[:, 0]
    with replacing(path) as temporary:
        writer = gguf.GGUFWriter(temporary, ARCHITECTURE)
        writer.add_string(f"{ARCHITECTURE}.model_hint", re.sub(r"For[A-Z].*", "", meta.architecture).lower())
        writer.add_uint32(f"{ARCHITECTURE}.layer_count", meta.layers - 1)
        writer.add_string("steer.mode", meta.mode)
        writer.add_string("steer.meta", meta.model_dump_json())
        for layer in range(1, meta.layers):
            if vectors[layer].any():
                writer.add_tensor(f"direction.{layer}", vectors[layer].numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    missed = []
    if meta.mode != "add":
        missed.append(
            f"{path}: control vectors are added, so this is not what the direction does (its mode is {meta.mode}): "
            "readers add the difference of the class means along it"
        )
    if vectors[0].any():
        missed.append(f"{path}: layer 0 is left out, which the format cannot name")
    return missed


def _library(path: Path) -> Any:
    try:
        import gguf
    except ImportError as error:
        raise InvalidInput(f"{path}: GGUF needs the package gguf (pip install gguf)") from error
    return gguf
