"""Files of other tools: one module for each kind, and the choice by what a file is."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from steer.direction import MEASUREMENT_KEY, Direction
from steer.errors import InvalidInput
from steer.lab.formats import arditi, control_vector, means, plain
from steer.lab.formats.foreign import Foreign, load_pickled
from steer.lab.measurement import Measurement, load_tensors

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
        found = [path / name for name in (arditi.DIRECTION, arditi.MEAN_DIFFS) if (path / name).exists()]
        if not found:
            raise InvalidInput(f"{path}: the folder has neither {arditi.DIRECTION} nor {arditi.MEAN_DIFFS}")
        path = found[0]
    if not path.exists():
        raise InvalidInput(f"{path}: does not exist; accepted: {READS}")
    suffix = path.suffix.lower()
    if suffix == ".gguf":
        return control_vector.read(path, foreign)
    if suffix == ".safetensors":
        metadata, tensors = load_tensors(path)
        if MEASUREMENT_KEY in metadata:
            return Measurement.load(path)
        return Direction.load(path) if "steer" in metadata else plain.read(path, tensors, foreign)
    if suffix in (".pt", ".pth", ".refuse", ".bin"):
        value = load_pickled(path)
        if isinstance(value, dict):
            return means.read(path, value, foreign)
        if isinstance(value, Tensor):
            return arditi.read(path, value, foreign)
        raise InvalidInput(f"{path}: holds a {type(value).__name__}; accepted: {READS}")
    raise InvalidInput(f"{path}: the suffix '{suffix}' is not known; accepted: {READS}")


def write(path: Path, direction: Direction) -> list[str]:
    """Write `direction` as the kind that `path` names; what the file does not carry, as sentences to warn with."""
    if path.suffix == ".gguf":
        return control_vector.write(path, direction)
    if path.suffix == ".pt":
        return arditi.write(path, direction)
    if path.suffix == ".safetensors":
        direction.save(path)
        return []
    raise InvalidInput(f"{path}: the suffix '{path.suffix}' is not known; accepted: {WRITES}")
