"""Any safetensors file with a tensor of vectors: `[d_model]`, `[layers, d_model]` or `[layers, k, d_model]`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from steer.direction import Direction
from steer.errors import InvalidInput
from steer.lab.formats.foreign import Foreign, check_plain, direction_of


def read(path: Path, tensors: Mapping[str, Tensor], foreign: Foreign) -> Direction:
    """One vector serves all layers, more are each layer's own (the output of block l has row l). They are made unit and
    orthonormal. Of class means nothing is known: the direction can be ablated, no more."""
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
        raise InvalidInput(
            f"{path}: tensor '{name}' has shape {list(value.shape)}; accepted: [{facts.d_model}], "
            f"[{facts.layers}, {facts.d_model}] and [{facts.layers}, k, {facts.d_model}]"
        )
    layer = None if foreign.layer is None or value.ndim != 1 else foreign.check_layer(path, foreign.layer)
    return direction_of(
        rows, facts, source=path, method="imported", mode="ablate", modes=("ablate",), source_layer=layer
    )
