"""Direction files: bytes, header, metadata and values of a good one, changed. What is accepted can be served."""

from __future__ import annotations

import json
from random import Random
from typing import Any

import torch

from steer.direction import Direction
from steer.names import MODES
from steer.runtime.op import coefficients
from tests import models
from tests.fuzz import mutate
from tests.fuzz.surface import Surface
from tests.oracle import displacement

_MODEL = models.tiny("llama")
GOOD = [
    models.direction(_MODEL, seed=1).to_bytes(),
    models.direction(_MODEL, k=2, seed=2, embedding=True, mode="one_sided").to_bytes(),
]
DTYPES = ("F32", "F64", "F16", "BF16", "I8", "U8", "BOOL", "I64", "C64", "F8_E4M3", "F4", "X", "")


def make(rng: Random) -> bytes:
    data = rng.choice(GOOD)
    end = 8 + int.from_bytes(data[:8], "little")
    header: dict[str, Any] = json.loads(data[8:end])
    kind = rng.random()
    if kind < 0.2:
        return mutate.octets(rng, data)
    if kind < 0.3:
        at = rng.randrange(end)
        return data[:at] + mutate.octets(rng, data[at:end]) + data[end:]
    if kind < 0.6:
        meta = mutate.within(rng, json.loads(header["__metadata__"]["steer"]))
        return assemble(header | {"__metadata__": {"format": "pt", "steer": mutate.dumped(rng, meta)}}, data[end:], rng)
    if kind < 0.75:
        return assemble(_other_header(rng, header), data[end:], rng)
    body = bytearray(data[end:])  # the values
    for _ in range(rng.choice((1, 3, 500))):
        at = 4 * rng.randrange(len(body) // 4)
        number = rng.choice((0.0, -0.0, 1.0, 1e38, -3e38, 1e-45, float("nan"), float("inf"), rng.gauss(0, 1)))
        body[at : at + 4] = torch.tensor(number, dtype=torch.float32).numpy().tobytes()
    return assemble(header, bytes(body), rng)


def _other_header(rng: Random, header: dict[str, Any]) -> Any:
    name = rng.choice(list(header))
    if name == "__metadata__":
        return mutate.within(rng, header)
    tensor = dict(header[name])
    kind = rng.random()
    if kind < 0.3:
        tensor["dtype"] = rng.choice(DTYPES)
    elif kind < 0.6:
        tensor["shape"] = rng.choice(([], [0], [1, *tensor["shape"]], tensor["shape"][::-1], [2**62, 4], [2**63], [-1]))
    elif kind < 0.8:
        begin, stop = tensor["data_offsets"]
        tensor["data_offsets"] = rng.choice(([stop, begin], [begin, stop + 4], [0, 2**63], [begin + 4, stop], [0, 0]))
    else:
        return mutate.within(rng, header)
    return header | {name: tensor}


def assemble(header: Any, body: bytes, rng: Random) -> bytes:
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    if rng.random() < 0.9:
        text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + body


def feed(data: bytes) -> None:
    direction = Direction.from_bytes(data)
    shown = [direction.meta.model_dump(mode="json"), direction.profile()]
    json.dumps(shown, allow_nan=False, ensure_ascii=False).encode()
    assert Direction.from_bytes(direction.to_bytes()).meta == direction.meta
    for mode in MODES:
        if mode in direction.meta.modes:
            values = coefficients(direction, mode)
            x = torch.ones(1, direction.d_model)
            moved = displacement(x, direction.directions[0, :1], values[0, :1], torch.tensor([1.0]))
            assert not moved.isnan().any()


SURFACE = Surface("directions", make, feed)
