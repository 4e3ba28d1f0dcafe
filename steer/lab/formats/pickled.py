"""Files that torch pickled, of two kinds. Layer i there is the *input* of block i (resid_pre), our layer i − 1.

`direction.pt` with `direction_metadata.json`, and `mean_diffs.pt`, as the pipeline of Arditi et al. writes them: a
direction is `[d_model]`, the differences are `[positions, layers, d_model]`, float64; positions count from the prompt's
end.

Class means as jim-plus and Orion write them: a dict of `harmful_{i}` and `harmless_{i}`. `harmful_0` is the embedding
output, and an entry for i = number of layers is what is after the final norm: neither is a block's output, and both are
left out. So the last layer is not in such a file. Beside the means stands a direction: `refuse_{i}`, the difference, or
`refusenorm_{i}`, at unit length. It is made again from the means by whatever method is wanted, or read as it is
(`--tensor`, or where there are no means). Means in 16 bits have lost what a small difference of them was; the direction
has not.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steer.direction import Direction, write_file
from steer.errors import InvalidInput
from steer.lab.formats.foreign import Foreign, direction_of, imported, width_of
from steer.lab.measurement import Measurement, MeasurementMeta, Statistics
from steer.names import Mode

log = logging.getLogger("steer")
DIRECTION, METADATA, MEAN_DIFFS = "direction.pt", "direction_metadata.json", "mean_diffs.pt"
#: The directions that such a file may hold, and the modes for which they are enough.
STORED: Mapping[str, tuple[Mode, ...]] = {"refuse": ("ablate", "add"), "refusenorm": ("ablate",)}


def read_arditi(path: Path, value: Tensor, foreign: Foreign) -> Direction:
    """One vector for all layers, which can be ablated, and added as it is."""
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


def write(path: Path, direction: Direction) -> list[str]:
    """The source layer's vector, with the length of the difference of its class means where that is known."""
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
    return [f"{path}: {told}" for told, holds in missed.items() if holds]


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


def read_means(path: Path, values: Mapping[str, Any], foreign: Foreign) -> Measurement | Direction:
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
    """The tensors `name_{i}` by i."""
    matched = ((re.fullmatch(rf"{name}_([0-9]{{1,9}})", str(key)), value) for key, value in values.items())
    return {int(m.group(1)): v.double().flatten() for m, v in matched if m and isinstance(v, Tensor)}


def _stored(path: Path, values: Mapping[str, Any], name: str, foreign: Foreign) -> Direction:
    found = _entries(values, name)
    facts = foreign.model(path, width_of(path, found.values()))
    rows = {i - 1: v.unsqueeze(0) for i, v in found.items() if 1 <= i < facts.layers and v.any()}
    if not rows:
        raise InvalidInput(f"{path}: has no {name}_1, …: no direction of the output of a block")
    return imported(rows, facts, foreign, path, STORED[name])
