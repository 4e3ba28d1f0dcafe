"""Class means as jim-plus and Orion write them: a dict of `harmful_{i}` and `harmless_{i}`, i counting block *inputs*.

The input of block i is the output of block i − 1, our layer i − 1. `harmful_0` is the embedding output, and an entry
for i = number of layers is what is after the final norm: neither is a block's output, and both are left out. So the
last layer is not in such a file. `refuse_{i}`, a direction, is made again from the means by whatever method is wanted.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steer.errors import InvalidInput
from steer.lab.formats.foreign import Foreign
from steer.lab.measurement import Measurement, MeasurementMeta, Statistics

log = logging.getLogger("steer")


def read(path: Path, values: Mapping[str, Any], foreign: Foreign) -> Measurement:
    found: dict[str, dict[int, Tensor]] = {}
    for label in ("harmful", "harmless"):
        matched = {re.fullmatch(rf"{label}_(\d+)", str(key)): value for key, value in values.items()}
        found[label] = {
            int(m.group(1)): v.double().flatten() for m, v in matched.items() if m and isinstance(v, Tensor)
        }
    indices = sorted(set(found["harmful"]) & set(found["harmless"]))
    if not indices:
        raise InvalidInput(f"{path}: has no tensors harmful_1 and harmless_1, …: no class means of jim-plus or Orion")
    sizes = {len(v) for each in found.values() for v in each.values()}
    if len(sizes) != 1:
        raise InvalidInput(f"{path}: its vectors have different numbers of dimensions: {sorted(sizes)}")
    facts = foreign.model(path, sizes.pop())
    wanted = [i for i in indices if 1 <= i < facts.layers]
    if wanted != list(range(1, len(wanted) + 1)):
        missing = sorted(set(range(1, max(wanted, default=1) + 1)) - set(wanted))
        raise InvalidInput(f"{path}: harmful and harmless have no entries {missing}: layers would be missing")
    if any(i >= facts.layers for i in indices):
        log.warning("%s: entries from %d on are behind the final norm and left out", path, facts.layers)
    mean = {label: torch.stack([each[i] for i in wanted]).unsqueeze(0) for label, each in found.items()}
    bad = [label for label, each in mean.items() if not torch.isfinite(each).all()]
    if bad:
        raise InvalidInput(f"{path}: the means of {' and '.join(bad)} are not finite")
    meta = MeasurementMeta(
        model=facts, measured=len(wanted), positions=(-1 if foreign.position is None else foreign.position,)
    )
    return Measurement(meta, Statistics(mean["harmful"]), Statistics(mean["harmless"]))
