"""Class means as jim-plus and Orion write them: a dict of `harmful_{i}` and `harmless_{i}`, i counting block *inputs*.

The input of block i is the output of block i − 1, our layer i − 1. `harmful_0` is the embedding output, and an entry
for i = number of layers is what is after the final norm: neither is a block's output, and both are left out. So the
last layer is not in such a file. Beside the means stands a direction: `refuse_{i}`, the difference, or
`refusenorm_{i}`, at unit length. It is made again from the means by whatever method is wanted, or read as it is
(`--tensor`, or where there are no means). Means in 16 bits have lost what a small difference of them was; the direction
has not.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steer.direction import Direction
from steer.errors import InvalidInput
from steer.lab.formats.foreign import Foreign, direction_of
from steer.lab.measurement import Measurement, MeasurementMeta, Statistics
from steer.names import Mode

log = logging.getLogger("steer")


#: The directions that such a file may hold, and the modes for which they are enough.
DIRECTIONS: Mapping[str, tuple[Mode, ...]] = {"refuse": ("ablate", "add"), "refusenorm": ("ablate",)}


def read(path: Path, values: Mapping[str, Any], foreign: Foreign) -> Measurement | Direction:
    stored = [name for name in DIRECTIONS if _entries(values, name)]
    if foreign.tensor is not None and foreign.tensor not in stored:
        raise InvalidInput(
            f"{path}: has no direction '{foreign.tensor}' for --tensor; it has {', '.join(stored) or 'none'}"
        )
    found = {label: _entries(values, label) for label in ("harmful", "harmless")}
    indices = sorted(set(found["harmful"]) & set(found["harmless"]))
    if foreign.tensor is not None or (stored and not indices):
        return _direction(path, values, foreign.tensor or stored[-1], foreign)
    if not indices:
        raise InvalidInput(f"{path}: has no tensors harmful_1 and harmless_1, …: no class means of jim-plus or Orion")
    if stored and values[f"harmful_{indices[0]}"].dtype in (torch.bfloat16, torch.float16):
        log.warning(
            "%s: its means have 16 bits, too few digits for a small difference; --tensor %s takes the file's own "
            "direction",
            path,
            stored[-1],
        )
    sizes = {len(v) for each in found.values() for v in each.values()}
    if len(sizes) != 1:
        raise InvalidInput(f"{path}: its vectors have different numbers of dimensions: {sorted(sizes)}")
    facts = foreign.model(path, sizes.pop())
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


def _direction(path: Path, values: Mapping[str, Any], name: str, foreign: Foreign) -> Direction:
    """Each layer's own vector, or with --layer that layer's at all of them."""
    found = _entries(values, name)
    if len(sizes := {len(v) for v in found.values()}) != 1:
        raise InvalidInput(f"{path}: its vectors have different numbers of dimensions: {sorted(sizes)}")
    facts = foreign.model(path, sizes.pop())
    rows = {i - 1: v.unsqueeze(0) for i, v in found.items() if 1 <= i < facts.layers and v.any()}
    if not rows:
        raise InvalidInput(f"{path}: has no {name}_1, …: no direction of the output of a block")
    if foreign.layer is not None:
        if foreign.layer not in rows:
            raise InvalidInput(f"{path}: has {name} for the outputs of the blocks {sorted(rows)}, not {foreign.layer}")
        rows = dict.fromkeys(range(facts.layers), rows[foreign.layer])
    modes = DIRECTIONS[name]
    return direction_of(
        rows, facts, source=path, method="imported", mode="ablate", modes=modes, source_layer=foreign.layer
    )
