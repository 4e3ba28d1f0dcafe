"""Files of other tools: one module for each kind, and functions that choose the module for a file."""

from __future__ import annotations

from pathlib import Path

from steer.direction import Direction
from steer.errors import InvalidInput
from steer.files import folder_problem, open_file
from steer.lab.formats import control_vector
from steer.lab.formats.foreign import DIRECTION, MEAN_DIFFS, Foreign, read_pickled, read_plain, write_arditi
from steer.lab.measurement import Measurement, load_tensors
from steer.names import MEASUREMENT_KEY, PICKLED_SUFFIXES

#: The suffix of a measurement's file, if the name of a file decides its kind.
MEASUREMENT_SUFFIX = ".measurement.safetensors"
READS = (
    "a Steer direction or measurement (.safetensors), any other .safetensors, .gguf control vectors and GLP, "
    ".pt/.refuse of class means, direction.pt or mean_diffs.pt, and the folder of one"
)
WRITES = f"DIRECTION.safetensors, NAME{MEASUREMENT_SUFFIX}, NAME.gguf, NAME.glp.gguf, FOLDER/direction.pt"


def read(path: Path, foreign: Foreign) -> Direction | Measurement:
    """The direction or measurement in `path`. `foreign` has the facts that a file of another tool lacks. Raises
    InvalidInput if the file is missing or of no known kind, or if `foreign` does not fit it."""
    if path.is_dir():
        found = [path / name for name in (DIRECTION, MEAN_DIFFS) if (path / name).exists()]
        if not found:
            has_neither = f"has neither {DIRECTION} nor {MEAN_DIFFS}"
            raise InvalidInput(f"{path}: {folder_problem(path)}, and {has_neither}; give a direction file")
        path = found[0]
    if not path.exists():
        raise InvalidInput(f"{path}: does not exist; accepted: {READS}")
    try:
        open_file(path).close()
    except OSError as error:
        raise InvalidInput(f"{path}: cannot be read: {error.strerror}") from error
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
        return read_pickled(path, foreign)
    raise InvalidInput(f"{path}: the suffix '{suffix}' is not known; accepted: {READS}")


def write(path: Path, direction: Direction) -> list[str]:
    """Write `direction` as the kind of file that the suffix of `path` names.

    Returns:
        What the file does not carry, as sentences for warnings.
    """
    if path.suffix in (".gguf", ".pt") and direction.mlp_weights is not None:
        raise InvalidInput(f"{path}: no such file can weigh attention and MLP apart; .safetensors is accepted")
    if path.suffix == ".gguf":
        return control_vector.write(path, direction)
    if path.suffix == ".pt":
        return write_arditi(path, direction)
    if path.suffix == ".safetensors":
        direction.save(path)
        return []
    raise InvalidInput(f"{path}: the suffix '{path.suffix}' is not known; accepted: {WRITES}")
