"""Vectors in files of other tools: the facts that a direction needs and such a file does not have, the only function
that reads a pickled file, and the kinds of files that torch pickled. In the pickled files, layer i is the *input* of
block i (resid_pre), which is our layer i − 1.

The pipeline of Arditi et al. writes `direction.pt` with `direction_metadata.json`, and `mean_diffs.pt`. A direction is
`[d_model]`, the differences are `[positions, layers, d_model]`, float64. Positions count from the prompt's end.

jim-plus and Orion write class means: a dict of `harmful_{i}` and `harmless_{i}`. `harmful_0` is the embedding output,
and an entry for i = number of layers is the stream after the final norm. Neither is a block's output, so both are left
out, and the last layer is not in such a file. The file also has a direction: `refuse_{i}`, the difference, or
`refusenorm_{i}`, at unit length. It is computed again from the means by the chosen method, or read as it is (with
`--tensor`, or if there are no means). Means in 16 bits have lost the digits of a small difference between them; the
direction has not.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steer.direction import Direction, DirectionMeta
from steer.errors import DegenerateError, InvalidInput
from steer.files import holds_model, write_file
from steer.geometry import orthonormalise
from steer.lab.measurement import Measurement, MeasurementMeta, ModelFacts, Statistics
from steer.names import Mode

log = logging.getLogger("steer")
DIRECTION, METADATA, MEAN_DIFFS = "direction.pt", "direction_metadata.json", "mean_diffs.pt"
#: The directions that a file of class means may hold, and the modes for which each is enough.
STORED: Mapping[str, tuple[Mode, ...]] = {"refuse": ("ablate", "add"), "refusenorm": ("ablate",)}


@dataclass(frozen=True, slots=True)
class Foreign:
    """What the user says about a file of another tool.

    Attributes:
        facts: of the model that the file was made for (`--model`).
        layer: which layer's vector is meant, if the file has several; counted as ours.
        position: which position's vector is meant.
        tensor: the name of the tensor that is meant.
    """

    facts: ModelFacts | None = None
    layer: int | None = None
    position: int | None = None
    tensor: str | None = None

    def refuse(self, source: object, *names: str) -> None:
        """Raise InvalidInput with each of `names` that was given although `source` leaves no choice of it."""
        given = [name for name in names if getattr(self, "facts" if name == "model" else name) is not None]
        InvalidInput.raise_for(f"--{name}: leave it out: {source} leaves no choice of it" for name in given)

    def model(self, source: object, d_model: int) -> ModelFacts:
        """The facts of the model. Raises InvalidInput if they were not given, or if the model's d_model is not
        `d_model`."""
        if self.facts is None:
            raise InvalidInput(f"{source}: does not say which model it was made for: give --model")
        if self.facts.d_model != d_model:
            raise InvalidInput(
                f"{source}: has vectors of {d_model} dimensions, {self.facts.name} has d_model {self.facts.d_model}"
            )
        return self.facts

    def check_layer(self, source: object, layer: int) -> int:
        """Return `layer`. Raises InvalidInput if the model does not have it."""
        assert self.facts is not None
        if not 0 <= layer < self.facts.layers:
            raise InvalidInput(f"{source}: layer {layer} is not one of the model's 0 to {self.facts.layers - 1}")
        return layer


def width_of(source: object, vectors: Iterable[Tensor]) -> int:
    """The number of dimensions of `vectors`, each `[d_model]`. Raises InvalidInput if it is not the same for all."""
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
    """A direction made of the vectors of some layers; the other layers are unsteered.

    The vectors' lengths are kept as the difference of the class means, so that the mode `add` adds the vectors
    themselves. Nothing else is known of the means.

    Args:
        rows: the vectors of each layer, `[k, d_model]`.
        source: the file, for errors.
        mode: the direction's default mode.
        modes: the modes that the direction allows, for vectors whose length has no meaning. By default one vector of
            a layer can be ablated and added, and several can be ablated.

    Raises:
        InvalidInput: the vectors of a layer are not a direction.
    """
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
    """A direction of vectors by layer: each layer has its own vectors, or, with --layer, all layers have the vectors of
    that layer."""
    if (layer := foreign.layer) is not None:
        if foreign.check_layer(source, layer) not in rows:
            raise InvalidInput(f"{source}: has vectors of the layers {sorted(rows)}, not of {layer}")
        rows = dict.fromkeys(range(facts.layers), rows[layer])
    return direction_of(rows, facts, source=source, method="imported", mode="ablate", modes=modes, source_layer=layer)


def read_plain(path: Path, tensors: Mapping[str, Tensor], foreign: Foreign) -> Direction:
    """The direction in any safetensors file with vectors.

    The vectors are in a tensor `[d_model]`, `[layers, d_model]` or `[layers, k, d_model]`, or in a tensor `NAME.N` for
    each layer N. One vector serves all layers; otherwise each layer has its own (row l is for the output of block l).
    The vectors are made orthonormal. If a layer has one vector, it can be added with its own length.
    """
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
    """The vectors by layer, if there are several tensors, all of them are vectors, and their names are one name with a
    number. Otherwise nothing."""
    found = [(re.fullmatch(r"(.*\D)?([0-9]{1,9})", name), tensor) for name, tensor in tensors.items()]
    named = {(match[1], int(match[2])): tensor for match, tensor in found if match and tensor.ndim == 1}
    alike = len(named) == len(tensors) > 1 and len({name for name, _ in named}) == 1
    return {layer: tensor for (_, layer), tensor in named.items()} if alike else {}


def load_pickled(path: Path) -> Any:
    """The value that torch saved in `path`. `weights_only` refuses every file that would run code. Raises InvalidInput
    if the file cannot be read, or has a tensor of a kind that `check_plain` refuses."""
    try:
        value = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a pickle is a program, and any step of a broken one may fail
        reason = str(error).rpartition("WeightsUnpickler error: ")[2].strip().partition("\n")[0]
        reason = reason.partition(". ")[0]  # the rest says how to load it without this protection
        raise InvalidInput(
            f"{path}: cannot be read as a file of tensors (anything else in it is refused): {reason[:200]}"
        ) from error
    check_plain(path, value.values() if isinstance(value, dict) else (value,))
    return value


def check_plain(path: Path, values: Iterable[object]) -> None:
    """Raise InvalidInput if a tensor among `values` is not dense, or not of real numbers."""
    for tensor in values:
        if isinstance(tensor, Tensor) and (
            tensor.layout is not torch.strided
            or tensor.is_nested
            or tensor.is_quantized
            or tensor.is_meta
            or tensor.is_complex()
        ):
            raise InvalidInput(f"{path}: has a tensor of another kind; accepted: dense tensors of real numbers")


def read_pickled(path: Path, foreign: Foreign) -> Direction | Measurement:
    """The direction or measurement that torch saved in `path`: class means, a direction for each layer, or a file of
    Arditi et al."""
    value = load_pickled(path)
    if isinstance(value, dict):
        return read_means(path, value, foreign)
    if not isinstance(value, Tensor):
        raise InvalidInput(f"{path}: holds a {type(value).__name__}; accepted: a tensor, or class means by layer")
    if value.ndim == 2:
        foreign.refuse(path, "position", "tensor")
        return read_plain(path, {"direction": value}, foreign)
    return read_arditi(path, value, foreign)


def read_arditi(path: Path, value: Tensor, foreign: Foreign) -> Direction:
    """A direction of one vector for all layers, from a file of Arditi et al. It can be ablated, and added with its own
    length."""
    if value.ndim not in (1, 3):
        raise InvalidInput(
            f"{path}: has shape {list(value.shape)}; a direction has [d_model] or [layers, d_model], mean differences "
            "have [positions, layers, d_model]"
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
        source_layer=layer,
        parameters={} if position is None else {"position": position},
    )


def write_arditi(path: Path, direction: Direction) -> list[str]:
    """Write the source layer's vector as Arditi et al. do. Its length is the length of the difference of the class
    means, or 1 if that is not known.

    Returns:
        What the file does not carry, as sentences.
    """
    source, meta = direction.meta.source_layer, direction.meta
    if source is None or direction.rank != 1:
        raise InvalidInput(f"{path}: this format holds one vector of one source layer; derive one with --layer NUMBER")
    beside = path.with_name(METADATA)
    if beside.exists() and not path.exists():
        raise InvalidInput(f"{path}: {beside} is there already, of another direction: give a folder of its own")
    row = direction.directions[source, 0].double()
    length = float((direction.mean_harmful[source] - direction.mean_harmless[source]).double().norm()) or 1.0
    buffer = BytesIO()
    torch.save(row * length, buffer)
    write_file(path, buffer.getvalue())
    described = {"pos": meta.parameters.get("position", -1), "layer": source + 1}
    write_file(beside, (json.dumps(described) + "\n").encode())
    same = all(torch.equal(each, direction.directions[source]) for each in direction.directions)
    missed = {
        f"tools that read it ablate; the direction's own mode is {meta.mode}": meta.mode != "ablate",
        f"the strength {meta.strength:g} is not in it": meta.strength != 1,
        "the layers' weights are not in it": not bool((direction.weights == 1).all()),
        f"the rows of other layers than {source} are not in it": not same,
    }
    return [f"{path}: {text}" for text, holds in missed.items() if holds]


def _single(path: Path, value: Tensor, foreign: Foreign) -> tuple[int, int | None, Tensor]:
    beside = path.with_name(METADATA)
    if foreign.layer is not None:
        return foreign.layer, foreign.position, value
    try:
        described = json.loads(beside.read_text())
        layer, position = int(described["layer"]), int(described["pos"])
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise InvalidInput(
            f"{beside}: gives no layer and pos ({error}); give --layer (the output of which of our blocks)"
        ) from error
    if layer == 0:
        raise InvalidInput(f"{beside}: layer 0 is the embedding output, which is no block's")
    return layer - 1, position, value


def _chosen(path: Path, value: Tensor, foreign: Foreign) -> tuple[int, int | None, Tensor]:
    positions, layers = value.shape[0], value.shape[1]
    position, layer = -1 if foreign.position is None else foreign.position, foreign.layer
    if layer is None or not 0 <= layer < layers - 1 or not -positions <= position < 0:
        given = "" if layer is None else f"; given: layer {layer}, position {position}"
        raise InvalidInput(
            f"{path}: has a vector of each layer and position: give --layer, from 0 to {layers - 2}, and --position, "
            f"from {-positions} to -1 (the default){given}"
        )
    return layer, position, value[position, layer + 1]


def read_means(path: Path, values: Mapping[str, Any], foreign: Foreign) -> Measurement | Direction:
    """The measurement that class means make, or the direction that the file has besides them (see the module's
    docstring)."""
    stored = [name for name in STORED if _entries(values, name)]
    if foreign.tensor is not None and foreign.tensor not in stored:
        raise InvalidInput(
            f"{path}: has no direction '{foreign.tensor}' for --tensor; it has {', '.join(stored) or 'none'}"
        )
    found = {label: _entries(values, label) for label in ("harmful", "harmless")}
    indices = sorted(set(found["harmful"]) & set(found["harmless"]))
    if foreign.tensor is not None or (stored and not indices):
        return _stored(path, values, foreign.tensor or stored[-1], foreign)
    if not indices:
        raise InvalidInput(f"{path}: has no tensors harmful_1 and harmless_1, …: no class means of jim-plus or Orion")
    if stored and values[f"harmful_{indices[0]}"].dtype in (torch.bfloat16, torch.float16):
        log.warning(
            "%s: its means have 16 bits, too few digits for a small difference; --tensor %s takes the file's own "
            "direction",
            path,
            stored[-1],
        )
    facts = foreign.model(path, width_of(path, (v for each in found.values() for v in each.values())))
    wanted = [i for i in indices if 1 <= i < facts.layers]
    if wanted != list(range(1, len(wanted) + 1)):
        missing = sorted(set(range(1, max(wanted, default=1) + 1)) - set(wanted))
        raise InvalidInput(f"{path}: harmful and harmless have no entries {missing}: layers would be missing")
    if any(i >= facts.layers for i in indices):
        log.warning("%s: entries from %d on come after the final norm and are left out", path, facts.layers)
    mean = {label: torch.stack([each[i] for i in wanted]).unsqueeze(0) for label, each in found.items()}
    bad = [label for label, each in mean.items() if not torch.isfinite(each).all()]
    if bad:
        raise InvalidInput(f"{path}: the means of {' and '.join(bad)} are not finite")
    meta = MeasurementMeta(
        model=facts, measured=len(wanted), positions=(-1 if foreign.position is None else foreign.position,)
    )
    return Measurement(meta, Statistics(mean["harmful"]), Statistics(mean["harmless"]))


def _entries(values: Mapping[str, Any], name: str) -> dict[int, Tensor]:
    """The tensors `name_{i}`, by i, float64."""
    matched = ((re.fullmatch(rf"{name}_([0-9]{{1,9}})", str(key)), value) for key, value in values.items())
    return {int(m.group(1)): v.double().flatten() for m, v in matched if m and isinstance(v, Tensor)}


def _stored(path: Path, values: Mapping[str, Any], name: str, foreign: Foreign) -> Direction:
    found = _entries(values, name)
    facts = foreign.model(path, width_of(path, found.values()))
    rows = {i - 1: v.unsqueeze(0) for i, v in found.items() if 1 <= i < facts.layers and v.any()}
    if not rows:
        raise InvalidInput(f"{path}: has no {name}_1, …: no direction of the output of a block")
    return imported(rows, facts, foreign, path, STORED[name])
