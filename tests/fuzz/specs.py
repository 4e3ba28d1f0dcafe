"""What a request asks for, by every carrier, and its body as bytes."""

from __future__ import annotations

import json
from random import Random
from typing import Any

from starlette.datastructures import Headers

from steer import readout, spec
from steer.serve import carriers
from steer.serve.body import parse_body
from tests.fuzz import mutate
from tests.fuzz.surface import Surface

TEXTS = (
    "refusal",
    "refusal=0.7",
    "refusal:one_sided=0.7",
    "refusal=1,verbosity=-0.5",
    "refusal:one_sided^-0.25@answer=1",
    "off",
    '["a", {"direction": "b"}]',
)
OBJECTS: tuple[Any, ...] = (
    {"direction": "refusal", "strength": 0.7, "mode": "one_sided"},
    ["refusal", {"direction": "verbosity", "mode": "add"}],
    *TEXTS,
)
READS: tuple[Any, ...] = (
    True,
    "refusal",
    ["refusal"],
    {"directions": ["refusal"], "layers": [0, 1]},
    {"layers": "all"},
)


def make_carriers(rng: Random) -> tuple[bytes, list[tuple[bytes, bytes]]]:
    body: dict[str, Any] = {"model": "tiny", "prompt": "x"}
    headers: list[tuple[bytes, bytes]] = []
    for _ in range(rng.choice((1, 1, 2))):
        carrier = rng.randrange(5)
        if carrier == 0:
            body["steer"] = mutate.within(rng, rng.choice(OBJECTS))
        elif carrier == 1:
            written = mutate.characters(rng, rng.choice(TEXTS)).encode("utf-8", "surrogatepass")
            headers.append((rng.choice((b"x-steer", b"X-Steer")), written))
        elif carrier == 2:
            body["model"] = "tiny+" + mutate.characters(rng, rng.choice(TEXTS))
        elif carrier == 3:
            body["vllm_xargs"] = mutate.within(rng, {"steer": rng.choice(TEXTS)})
        else:
            body["steer_readout"] = mutate.within(rng, rng.choice(READS))
    if rng.random() < 0.1:
        body = mutate.within(rng, body)
    data = mutate.dumped(rng, body).encode("utf-8", "surrogatepass")
    return (mutate.octets(rng, data) if rng.random() < 0.1 else data), headers


def feed_carriers(source: tuple[bytes, list[tuple[bytes, bytes]]]) -> None:
    data, headers = source
    body = parse_body(data)
    carried = carriers.read(body, Headers(raw=headers), ["tiny", "tiny+more"])
    readout.parse(body.get(readout.FIELD))
    for wanted in carried.found.values():
        assert spec.parse(spec.text(wanted)) == wanted
    json.dumps(body)


def make_text(rng: Random) -> str:
    return mutate.characters(rng, rng.choice(TEXTS))


def feed_text(source: str) -> None:
    wanted = spec.parse(source)
    assert spec.parse(spec.text(wanted)) == wanted


def make_readout(rng: Random) -> Any:
    return mutate.within(rng, rng.choice(READS))


def feed_readout(source: Any) -> None:
    readout.parse(source)


SURFACES = (
    Surface("specs", make_text, feed_text),
    Surface("carriers", make_carriers, feed_carriers),
    Surface("readouts", make_readout, feed_readout),
)
