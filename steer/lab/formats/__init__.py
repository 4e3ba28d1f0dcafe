"""Files of other tools: one module for each kind, and the choice by what a file is."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from steer.direction import Direction, folder_problem, holds_model
from steer.errors import InvalidInput
from steer.lab.formats import control_vector, pickled
from steer.lab.formats.foreign import Foreign, check_plain, imported, load_pickled, width_of
from steer.lab.measurement import Measurement, load_tensors
from steer.names import MEASUREMENT_KEY, PICKLED_SUFFIXES

#: How a file of a measurement is named where its kind follows from the name.
MEASUREMENT_SUFFIX = ".measurement.safetensors"
READS = (
    "a Steer direction or measurement (.safetensors), any other .safetensors, .gguf control vectors and GLP, "
    ".pt/.refuse of class means, direction.pt or mean_diffs.pt, and the folder of one"
)
WRITES = f"DIRECTION.safetensors, NAME{MEASUREMENT_SUFFIX}, NAME.gguf, NAME.glp.gguf, FOLDER/direction.pt"


def read(path: Path, foreign: Foreign) -> Direction | Measurement:
    """What `path` holds. `foreign` says what a file of another tool does not. Raises InvalidInput."""
    if path.is_dir():
        found = [path / name for name in (pickled.DIRECTION, pickled.MEAN_DIFFS) if (path / name).exists()]
        if not found:
            has_neither = f"has neither {pickled.DIRECTION} nor {pickled.MEAN_DIFFS}"
            raise InvalidInput(f"{path}: {folder_problem(path)}, and {has_neither}; give a direction file")
        path = found[0]
    if not path.exists():
        raise InvalidInput(f"{path}: does not exist; accepted: {READS}")
    suffix = path.suffix.lower()
    if suffix == ".gguf":
        foreign.refuse(path, "layer", "position", "tensor")
        return control_vector.read(path, foreign)
    if suffix == ".safetensors":
        metadata, tensors = load_tensors(path)
        if MEASUREMENT_KEY in metadata:
            foreign.refuse(path, "model", "tensor")
            return Measurement.load(path)
        if "steer" in metadata:
            foreign.refuse(path, "model", "layer", "position", "tensor")
            return Direction.load(path)
        foreign.refuse(path, "position")
        return read_plain(path, tensors, foreign)
    if suffix in PICKLED_SUFFIXES:
        value = load_pickled(path)
        if isinstance(value, dict):
            return pickled.read_means(path, value, foreign)
        if isinstance(value, Tensor) and value.ndim == 2:
            foreign.refuse(path, "position", "tensor")
            return read_plain(path, {"direction": value}, foreign)
        if isinstance(value, Tensor):
            return pickled.read_arditi(path, value, foreign)
        raise InvalidInput(f"{path}: holds a {type(value).__name__}; accepted: {READS}")
    raise InvalidInput(f"{path}: the suffix '{suffix}' is not known; accepted: {READS}")


def read_plain(path: Path, tensors: Mapping[str, Tensor], foreign: Foreign) -> Direction:
    """The direction in any safetensors file with a tensor of vectors, `[d_model]`, `[layers, d_model]` or `[layers, k,
    d_model]`, or with a tensor `NAME.N` for each layer N. One vector serves all layers, more are each layer's own (the
    output of block l has row l). They are made unit and orthonormal; the one of a layer can be added as it is."""
    if foreign.tensor is None and holds_model(tensors):
        raise InvalidInput(f"{path}: this is a model; give a direction file, or --tensor for vectors that are in it")
    if foreign.tensor is None and (numbered := _numbered(tensors)):
        check_plain(path, numbered.values())
        facts = foreign.model(path, width_of(path, numbered.values()))
        rows = {foreign.check_layer(path, layer): vector.float()[None] for layer, vector in numbered.items()}
        return imported(rows, facts, foreign, path)
    name = foreign.tensor or (next(iter(tensors)) if len(tensors) == 1 else None)
    if name is None or name not in tensors:
        shown = ", ".join(f"{n} {list(t.shape)}" for n, t in list(tensors.items())[:8])
        raise InvalidInput(f"{path}: which tensor? Give --tensor; it has {shown or 'none'}")
    check_plain(path, (tensors[name],))
    value = tensors[name].float()
    facts = foreign.model(path, value.shape[-1] if value.ndim else 0)
    if value.ndim == 1:
        rows = dict.fromkeys(range(facts.layers), value.unsqueeze(0))
    elif value.ndim in (2, 3) and value.shape[0] == facts.layers:
        rows = {layer: each.reshape(-1, facts.d_model) for layer, each in enumerate(value)}
    else:
        more = value.ndim and value.shape[0] == facts.layers + 1
        raise InvalidInput(
            f"{path}: tensor '{name}' has shape {list(value.shape)}; accepted: [{facts.d_model}], "
            f"[{facts.layers}, {facts.d_model}] and [{facts.layers}, k, {facts.d_model}]"
            + ("; of rows for `hidden_states` leave out the first, which is the embedding's" if more else "")
        )
    return imported(rows, facts, foreign, path)


def _numbered(tensors: Mapping[str, Tensor]) -> dict[int, Tensor]:
    """The vectors by layer, where all of several tensors are vectors, and their names one name with a number."""
    found = [(re.fullmatch(r"(.*\D)?([0-9]{1,9})", name), tensor) for name, tensor in tensors.items()]
    named = {(match[1], int(match[2])): tensor for match, tensor in found if match and tensor.ndim == 1}
    alike = len(named) == len(tensors) > 1 and len({name for name, _ in named}) == 1
    return {layer: tensor for (_, layer), tensor in named.items()} if alike else {}


def write(path: Path, direction: Direction) -> list[str]:
    """Write `direction` as the kind that `path` names; what the file does not carry, as sentences to warn with."""
    if path.suffix in (".gguf", ".pt") and direction.mlp_weights is not None:
        raise InvalidInput(f"{path}: no such file can weigh attention and MLP apart; .safetensors is accepted")
    if path.suffix == ".gguf":
        return control_vector.write(path, direction)
    if path.suffix == ".pt":
        return pickled.write(path, direction)
    if path.suffix == ".safetensors":
        direction.save(path)
        return []
    raise InvalidInput(f"{path}: the suffix '{path.suffix}' is not known; accepted: {WRITES}")
