"""The proof at start that the engine steers: real requests through the real engine, so through its compiled and
captured graphs, and what every layer handed on of them.

A plain request shows what each layer hands on. A direction that has much of that at each layer is then put through
the registry like any other, and a request with it must leave nothing of it, in prefill and in decoding, on every rank.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from steer.direction import Direction, DirectionMeta, Site
from steer.errors import UnsupportedModel
from steer.runtime.table import EMBEDDING

if TYPE_CHECKING:
    from steer.vllm.frontend import Frontend

#: Makes a greedy request of this many tokens under this spec on this data-parallel rank, and waits for its end.
Ask = Callable[[str, int, int], None]
#: What may be left of a removed component relative to the stream's norm: roundings of the model's dtype.
LEFT_OVER = {"float32": 1e-4, "bfloat16": 3e-2, "float16": 5e-3}


def prove(frontend: Frontend, ask: Ask, *, dtype: str, ranks: int) -> None:
    """Raise UnsupportedModel naming the places that do not steer. Before anything is served: nothing else may run."""
    limit = LEFT_OVER.get(dtype, 3e-2)

    def on_every_rank(spec: str, tokens: int) -> list[Seen]:
        for rank in range(ranks):
            ask(spec, tokens, rank)
        return _witness(frontend)

    plain = on_every_rank("off", 2)
    if silent := [f"{one.site} of layer {one.layer}" for one in plain if not one.vector.any()]:
        raise UnsupportedModel(f"the graph that serves does not pass through the seats {', '.join(silent)}")
    for site in frontend.settings.sites:
        direction = _direction(frontend, site, plain)
        name = f"probe-{secrets.token_hex(8)}"
        frontend.registry.put(name, direction.to_bytes(), store=False)
        try:
            for phase, tokens in (("prefill", 1), ("decoding", 3)):
                _check(on_every_rank(name, tokens), direction, site, phase, limit)
        finally:
            frontend.registry.delete(name)
    for before, after in zip(plain, on_every_rank("off", 2), strict=True):
        if not torch.allclose(before.vector, after.vector, rtol=1e-2, atol=1e-3):
            raise UnsupportedModel(f"after a steered request a plain one is changed at layer {before.layer}")


@dataclass(frozen=True, slots=True)
class Seen:
    """What one seat of one worker handed on: `vector` `[d_model]` float32."""

    worker: int
    site: str
    layer: int
    vector: Tensor


def _witness(frontend: Frontend) -> list[Seen]:
    answers = frontend.call("steer_witness")
    return [
        Seen(number, site, layer, torch.from_numpy(np.frombuffer(data, np.float32).copy()))
        for number, worker in enumerate(answers)
        for site, layer, data in worker
    ]


def _direction(frontend: Frontend, site: Site, plain: list[Seen]) -> Direction:
    """Half of it what each layer hands on at this site, half of it random."""
    shape = frontend.shape
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(shape.layers + 1, shape.d_model, generator=generator)  # the last one is the embedding's
    rows /= rows.norm(dim=-1, keepdim=True)
    once = {one.layer: one.vector for one in plain if one.site == site}  # tensor-parallel ranks see the same
    for layer, vector in once.items():
        rows[layer] += vector / vector.norm()
    rows /= rows.norm(dim=-1, keepdim=True)
    meta = DirectionMeta(
        method="probe",
        model="probe",
        architecture=shape.architecture,
        d_model=shape.d_model,
        layers=shape.layers,
        source_layer=None,
        bos_count=None,
        strength=1.0,
        sites=(site,),
    )
    return Direction(
        meta,
        directions=rows[: shape.layers].unsqueeze(1).clone(),
        weights=torch.ones(shape.layers),
        reference=torch.zeros(shape.layers, 1),
        mean_harmful=torch.zeros(shape.layers, shape.d_model),
        mean_harmless=torch.zeros(shape.layers, shape.d_model),
        mean_harmless_all=torch.zeros(shape.layers, shape.d_model),
        embedding=rows[EMBEDDING].unsqueeze(0).clone(),
    )


def _check(witness: list[Seen], direction: Direction, site: Site, phase: str, limit: float) -> None:
    bad: list[str] = []
    assert direction.embedding is not None
    for one in witness:
        if one.site != site:
            continue
        v = direction.embedding[0] if one.layer == EMBEDDING else direction.directions[one.layer, 0]
        left = float((one.vector @ v).abs() / one.vector.norm().clamp_min(1e-12))
        if not left <= limit:
            bad.append(f"worker {one.worker}, layer {one.layer}: {left:.1e} is left")
    if bad:
        raise UnsupportedModel(f"the engine does not steer at the site '{site}' in {phase}: {'; '.join(bad)}")
