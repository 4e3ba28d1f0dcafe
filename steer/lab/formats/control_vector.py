"""GGUF control vectors, as llama.cpp, repeng and EasySteer write and read them: float32 tensors `direction.N`.

llama.cpp adds `direction.N` to the output of its 0-based block N, which is our layer N, for N ≥ 1. It only ever *adds*.
So the file of a direction of another mode has another effect than the direction, and a warning says so. The direction's
metadata is in the file, under `steer.meta`.

GLP files are the same with keys `glp.…` (msuiche/weightless, spec/GLP.md, versions 1 and 2): `glp.mode` is `project`
(our `ablate`) or `add`, `glp.alpha_default` is the strength, and a file of rank k has rows `direction.N.j`. A GLP file
is written if the name ends in `.glp.gguf`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steer.direction import Direction
from steer.errors import InvalidInput, brief, imported
from steer.files import replacing
from steer.lab.formats.foreign import Foreign, direction_of, width_of
from steer.names import MAX_STRENGTH, Mode
from steer.runtime.op import GAMMA, coefficients

ARCHITECTURE, GLP = "controlvector", ".glp.gguf"
#: The keys of versions 1 and 2. The keys after the hook point only describe the file.
GLP_KEYS = (
    *("glp.mode", "glp.spec_version", "glp.alpha_default", "glp.rank", "glp.orthonormal", "glp.dir_scales"),
    *("glp.layer_scales", "glp.hook_point", "glp.derived_at", "glp.content_sha256", "glp.created", "glp.method"),
    *("glp.contrast", "glp.layer_ids_zero_based"),
)


def read(path: Path, foreign: Foreign) -> Direction:
    """The vectors as a direction. Its mode is `add`, or the mode of a GLP file. A layer without vectors is
    unsteered."""
    gguf = imported("gguf", f"{path}: GGUF", "'steer-llm[gguf]'")
    try:
        reader = gguf.GGUFReader(path)
        wanted = ("general.architecture", "glp.")
        metadata = {name: field.contents() for name, field in reader.fields.items() if name.startswith(wanted)}
    except (ValueError, OSError, IndexError, KeyError) as error:
        raise InvalidInput(f"{path}: not a GGUF file: {error}") from error
    if (kind := metadata.get("general.architecture")) != ARCHITECTURE:
        raise InvalidInput(f"{path}: general.architecture is '{kind}', a control vector has '{ARCHITECTURE}'")
    found: dict[int, dict[int, Tensor]] = {}
    for tensor in reader.tensors:
        if matched := re.fullmatch(r"direction\.([0-9]{1,9})(?:\.([0-9]{1,9}))?", tensor.name):
            layer, row = (int(number or 0) for number in matched.groups())
            if row in found.get(layer, ()):
                raise InvalidInput(f"{path}: direction.{layer} and direction.{layer}.0 are the same row: keep one")
            found.setdefault(layer, {})[row] = torch.from_numpy(tensor.data.astype("float32")).flatten()
        elif tensor.name.startswith("direction."):
            raise InvalidInput(f"{path}: {brief(tensor.name)} is not direction.N or direction.N.j")
    if not found:
        raise InvalidInput(f"{path}: has no tensors direction.1, direction.2, …")
    d_model = width_of(path, (vector for vectors in found.values() for vector in vectors.values()))
    rows = {layer: torch.stack([vectors[row] for row in sorted(vectors)]) for layer, vectors in found.items()}
    if len(counts := {len(each) for each in rows.values()}) > 1:
        raise InvalidInput(
            f"{path}: its layers have {min(counts)} to {max(counts)} vectors; all layers must have the same number"
        )
    projects = metadata.get("glp.mode", "add") == "project"
    InvalidInput.raise_for(f"{path}: {problem}" for problem in _glp_problems(metadata, rows, *counts))
    facts = foreign.model(path, d_model)
    for layer in rows:
        foreign.check_layer(path, layer)
    mode: Mode = "ablate" if projects else "add"
    made = direction_of(rows, facts, source=path, method="control vector", mode=mode)
    return made.with_meta(strength=float(metadata.get("glp.alpha_default", 1.0)))


def _glp_problems(told: Mapping[str, object], layers: Collection[int], rank: int) -> Iterator[str]:
    """Yield every problem of a file: what a direction of `rank` rows cannot express (keys of GLP, or several rows of a
    layer in another control vector), and every contradiction within the file, whose tensors are of `layers`."""
    several = rank > 1
    if unknown := sorted(key for key in told if key.startswith("glp.") and key not in GLP_KEYS):
        listed = ", ".join(map(brief, unknown))
        yield f"{listed}: not known here, so it may mean anything; read are {', '.join(GLP_KEYS)}"
    if any(key.startswith("glp.") for key in told) and "glp.mode" not in told:
        yield "has keys of GLP and no glp.mode, which says whether its vectors are added or projected"
    if told.get("glp.rank", rank) != rank:
        yield f"glp.rank is {told['glp.rank']!r}, and its layers have {rank} vectors each"
    if several and told.get("glp.orthonormal", True) is not True:
        yield f"glp.orthonormal is {told['glp.orthonormal']!r}: several vectors of a layer must be orthonormal"
    accepted: dict[str, tuple[object, ...]] = {
        "glp.mode": ("add", "project"),
        "glp.spec_version": (1, 2),
        "glp.hook_point": ("residual_stream_post_layer",),
    }
    for key, values in accepted.items():
        if key in told and told[key] not in values:
            yield f"{key} is {told[key]!r}; read is {' or '.join(map(repr, values))}"
    for key in ("glp.layer_scales", "glp.dir_scales"):
        if key in told:
            yield f"{key} is not read: write a file whose scales are 1"
    if several and told.get("glp.mode") != "project":
        yield "has several vectors for a layer, which only a GLP file of the mode 'project' may have"
    # The list of layers from which the file was made. One writer says instead whether its numbers begin with 0.
    numbers = told.get("glp.layer_ids_zero_based", True)
    if numbers is not True and sorted(map(int, re.findall(r"-?[0-9]{1,9}", str(numbers)))) != sorted(layers):
        named = ",".join(map(str, sorted(layers)))
        yield (
            f"glp.layer_ids_zero_based is {brief(numbers, python=True)}, and its tensors are of the layers {named}: "
            f"one of the two is wrong, perhaps by one layer; accepted: '{named}', or no such key"
        )
    strength = told.get("glp.alpha_default", 1.0)
    if not (isinstance(strength, int | float) and abs(strength) <= MAX_STRENGTH):
        yield f"glp.alpha_default is {strength!r}; read is a number from -{MAX_STRENGTH:g} to {MAX_STRENGTH:g}"


def write(path: Path, direction: Direction) -> list[str]:
    """Write what the direction adds in the mode `add`: at its own strength if `add` is its mode, else at 1.

    Returns:
        What the file does not carry, as sentences.
    """
    meta = direction.meta
    if path.name.lower().endswith(GLP):
        return _write_glp(path, direction)
    if direction.rank != 1:
        raise InvalidInput(f"{path}: a control vector has one row for each layer, this direction has {direction.rank}")
    if "add" not in meta.modes:
        raise InvalidInput(f"{path}: a control vector is added, and this direction has no length to add with")
    gamma = coefficients(direction, "add")[:, 0, GAMMA]
    vectors = meta.strength_in("add") * gamma[:, None] * direction.directions[:, 0]
    with _written(path, direction, vectors[:, None]) as writer:
        writer.add_string("steer.mode", meta.mode)
        writer.add_string("steer.meta", meta.model_dump_json())
    missed = []
    if meta.mode != "add":
        missed.append(
            f"{path}: control vectors are added, so this is not what the direction does (its mode is {meta.mode}): "
            "readers add the difference of the class means along it, which goes towards the behaviour; a scale below 0 "
            "goes away from it"
        )
    if vectors[0].any():
        missed.append(f"{path}: layer 0 is left out, because the format has no name for it")
    return missed


@contextmanager
def _written(path: Path, direction: Direction, rows: Tensor) -> Iterator[Any]:
    """Write the file with `rows` `[layers, k, d_model]`. The `with` block adds further metadata to the writer."""
    meta = direction.meta
    if not rows[1:].any():
        raise InvalidInput(f"{path}: it would be empty: this direction acts at layer 0 alone, which has no name there")
    with replacing(path) as temporary:
        writer = imported("gguf", f"{path}: GGUF", "'steer-llm[gguf]'").GGUFWriter(temporary, ARCHITECTURE)
        writer.add_string(f"{ARCHITECTURE}.model_hint", re.sub(r"For[A-Z].*", "", meta.architecture).lower())
        writer.add_uint32(f"{ARCHITECTURE}.layer_count", meta.layers - 1)
        yield writer
        for layer in range(1, meta.layers):
            for row, vector in enumerate(rows[layer]):
                if vector.any():
                    writer.add_tensor(f"direction.{layer}" + (f".{row}" if row else ""), vector.contiguous().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def _write_glp(path: Path, direction: Direction) -> list[str]:
    """Write the direction in its own mode at its own strength. Returns what the file does not carry, as sentences.
    Raises InvalidInput with everything that GLP cannot express."""
    meta = direction.meta
    problems = []
    if meta.mode not in ("ablate", "add"):
        problems.append(f"{path}: GLP knows the modes ablate (its 'project') and add, not '{meta.mode}'")
    if meta.sites != ("resid_post",):
        problems.append(f"{path}: GLP is written for the site resid_post, not {', '.join(meta.sites)}")
    if not torch.isin(direction.weights, torch.tensor([0.0, 1.0])).all():
        problems.append(f"{path}: the weights of the layers are not all 0 or 1, and scales are not written")
    if meta.mode == "add" and direction.rank != 1:
        problems.append(f"{path}: GLP adds one row for each layer, this direction has {direction.rank}")
    InvalidInput.raise_for(problems)
    rows = direction.directions * (direction.weights != 0)[:, None, None]
    if meta.mode == "add":
        rows = rows * coefficients(direction, "add")[:, :1, GAMMA, None]
    with _written(path, direction, rows) as writer:
        writer.add_uint32("glp.spec_version", 1 if direction.rank == 1 else 2)
        writer.add_string("glp.mode", "project" if meta.mode == "ablate" else "add")
        writer.add_string("glp.hook_point", "residual_stream_post_layer")
        writer.add_float32("glp.alpha_default", meta.strength)
        if direction.rank > 1:
            writer.add_uint32("glp.rank", direction.rank)
            writer.add_bool("glp.orthonormal", True)
    missed = [f"{path}: layer 0 is left out, because the format has no name for it"] if rows[0].any() else []
    if direction.embedding is not None:
        missed.append(f"{path}: the embedding's rows are left out, because the format has no place for them")
    return missed
