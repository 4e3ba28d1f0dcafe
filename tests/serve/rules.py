"""One table of who may do what, for every backend: a policy with a key for each rule, and what each request gets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import httpx

from steer.serve.policy import hash_of, new_secret
from tests.servers import receipt

NAMES = (
    "reader",
    "nothing",
    "mute",
    "all",
    "bound",
    "eager",
    "meter",
    "warden",
    "seer",
    "narrow",
    "dosed",
    "certain",
    "torn",
    "steady",
    "level",
)
SECRETS = {name: new_secret() for name in NAMES}
HASH = {name: hash_of(secret) for name, secret in SECRETS.items()}

#: `copy` is the file of `refusal` under another name.
POLICY = f"""
[directions.refusal]
max_strength = 2.0

[directions.verbosity]
conditions = false

[keys.reader]
hash = "{HASH["reader"]}"
directions = ["refusal"]
modes = ["ablate", "one_sided"]
max_strength = 1.0
max_shift = 0.5
conditions = true

[keys.nothing]  # of which only the hash is given
hash = "{HASH["nothing"]}"

[keys.mute]
hash = "{HASH["mute"]}"
directions = ["*"]
steer = false

[keys.all]
hash = "{HASH["all"]}"
directions = ["*"]
manage = true
conditions = true

[keys.bound]
hash = "{HASH["bound"]}"
directions = ["*"]
required = "verbosity:add=0.5"
conditions = true

[keys.level]
hash = "{HASH["level"]}"
directions = ["refusal"]
required = "verbosity:add:norm=0.5"

[keys.torn]  # whose default does not go together with what is required
hash = "{HASH["torn"]}"
directions = ["refusal"]
default = "refusal=0.5"
required = "verbosity:add?refusal@0>9=0.5"

[keys.eager]
hash = "{HASH["eager"]}"
directions = ["refusal"]
default = "refusal=0.5"

[keys.meter]
hash = "{HASH["meter"]}"
metrics = true

[keys.seer]
hash = "{HASH["seer"]}"
directions = ["refusal"]
readout = true
forms = true

[keys.narrow]
hash = "{HASH["narrow"]}"
directions = ["refusal"]
tokens = ["answer", "first-4"]
layers = "0-1"
conditions = true

norm_preserving = false

[keys.steady]
hash = "{HASH["steady"]}"
directions = ["refusal"]
norm_preserving = true

[keys.dosed]
hash = "{HASH["dosed"]}"
directions = ["refusal"]
max_strength = "calibrated"

[keys.certain]  # may not read components, so it has no conditions either
hash = "{HASH["certain"]}"
directions = ["refusal"]

[keys.warden]  # manages, and is bound all the same
hash = "{HASH["warden"]}"
manage = true
required = "verbosity:add=0.5"
"""


@dataclass(frozen=True)
class Case:
    """A key asks for `spec` (None: nothing) and `gets` (direction, mode, strength) of its receipt, or an error."""

    key: str
    spec: str | None
    gets: list[tuple[str, str, float]] | tuple[int, str]
    says: str = ""


REQUIRED = ("verbosity", "add", 0.5)
FORBIDDEN = (403, "steering_forbidden")
UNKNOWN = (400, "invalid_value")
CASES = (
    Case("reader", "refusal=0.7", [("refusal", "ablate", 0.7)]),
    Case("reader", "refusal:one_sided=-1", [("refusal", "one_sided", -1.0)]),
    Case("reader", "refusal:one_sided^0.5=1", [("refusal", "one_sided", 1.0)]),
    Case(
        "reader",
        "refusal:one_sided^-0.51=1",
        FORBIDDEN,
        "for this key the shift -0.51 is not allowed; allowed:",
    ),
    Case("all", "refusal:one_sided^-0.1", FORBIDDEN, "for this key the shift -0.1 is not allowed; allowed: none"),
    Case("reader", "refusal^0.5", UNKNOWN, "the mode 'ablate' has no threshold to shift; modes with one: clamp, "),
    Case("reader", "refusal:norm=0.7", [("refusal", "ablate", 0.7)]),
    Case("narrow", "refusal:norm@0@answer", FORBIDDEN, "for this key 'norm_preserving' is not allowed"),
    Case("steady", "refusal:norm", [("refusal", "ablate", 1.0)]),
    Case("steady", "refusal", FORBIDDEN, "'norm_preserving' is required, or one of the modes rotate, rotate_one_sided"),
    Case("bound", "refusal:norm", FORBIDDEN, "what is required for this key keeps no norm, nor may what is asked for"),
    Case("level", "refusal:norm", [("refusal", "ablate", 1.0), ("verbosity", "add", 0.5)]),
    Case("level", "refusal", FORBIDDEN, "what is required for this key keeps the norm, and so must what is asked for"),
    Case("reader", "off", []),
    Case("reader", None, []),
    Case("reader", "refusal=1.01", FORBIDDEN, "strength 1.01 is over the 1 that this key may use"),
    Case("reader", "refusal=-1.01", FORBIDDEN, "strength 1.01 (the size of -1.01) is over the 1"),
    Case("reader", "refusal:add=0.5", FORBIDDEN, "mode 'add' is not allowed for this key; allowed: ablate, one_sided"),
    Case("reader", "refusal=0.6,refusal:one_sided=0.6", FORBIDDEN, "1.2 (the size of 0.6 and 0.6) is over the 1"),
    Case("reader", "verbosity", UNKNOWN, "direction 'verbosity' is not served; served: refusal"),
    Case("reader", "nobody", UNKNOWN, "direction 'nobody' is not served; served: refusal"),
    Case("reader", "copy", UNKNOWN, "direction 'copy' is not served; served: refusal"),
    Case("reader", "refusal?refusal@0>9=0.7", [("refusal", "ablate", 0.7)]),
    Case("reader", "refusal?verbosity@0>9=0.7", UNKNOWN, "direction 'verbosity' is not served; served: refusal"),
    Case("certain", "refusal?refusal@0>9", FORBIDDEN, "for this key no condition is allowed"),
    Case("seer", "refusal?refusal@0>9=0.7", [("refusal", "ablate", 0.7)]),
    Case("certain", "refusal?each:refusal@0>9", FORBIDDEN, "for this key no condition is allowed"),
    Case("all", "refusal?each:verbosity@0>9", FORBIDDEN, "'verbosity': for any key no condition is allowed on it"),
    Case("all", "refusal?verbosity@0>9", FORBIDDEN, "'verbosity': for any key no condition is allowed on it"),
    Case("bound", "refusal?copy@0>9", FORBIDDEN, "what is required for this key does not act under the condition"),
    Case("torn", None, [REQUIRED]),
    Case("torn", "refusal", FORBIDDEN, "what is required for this key does not act under the condition"),
    Case("narrow", "refusal?refusal@0>9=0.5", FORBIDDEN, "the layers 1-2 are not within 0-1"),
    Case("nothing", "refusal", UNKNOWN, "direction 'refusal' is not served; served: none"),
    Case("nothing", "refusal=0", UNKNOWN, "direction 'refusal' is not served; served: none"),
    Case("nothing", "off", []),
    Case("nothing", None, []),
    Case("mute", "refusal", FORBIDDEN, "this key may not steer"),
    Case("mute", "nobody", FORBIDDEN, "this key may not steer"),
    Case("mute", "off", []),
    Case("mute", None, []),
    Case("all", "refusal=2", [("refusal", "ablate", 2.0)]),
    Case("all", "verbosity:affine=3", [("verbosity", "affine", 3.0)]),
    Case("all", "refusal=2.5", FORBIDDEN, "strength 2.5 is over the 2 that any key may use"),
    Case("all", "copy=2.5", FORBIDDEN, "is over the 2 that any key (by a rule on another name of the file) may use"),
    Case("all", "refusal=1.5,copy:add=1.5", FORBIDDEN, "strength 3 (the size of 1.5 and 1.5) is over the 2 that any"),
    Case("bound", None, [REQUIRED]),
    Case("bound", "off", [REQUIRED]),
    Case("bound", "refusal", [("refusal", "ablate", 1.0), REQUIRED]),
    Case("bound", "verbosity:add=0.5", [REQUIRED]),
    Case("bound", "verbosity:add=-0.5", FORBIDDEN, "direction 'verbosity' is required for this key as it is"),
    Case("bound", "verbosity", FORBIDDEN, "direction 'verbosity' is required for this key as it is"),
    Case("warden", "off", [REQUIRED]),
    Case("warden", "refusal", UNKNOWN, "direction 'refusal' is not served; served: none"),
    Case("narrow", "refusal@1@first-3=0.5", [("refusal", "ablate", 0.5)]),
    Case(
        "narrow", "refusal@1=0.5", FORBIDDEN, "for this key the tokens 'all' are not allowed; allowed: answer, first-4"
    ),
    Case("narrow", "refusal@1@first-5=0.5", FORBIDDEN, "the tokens 'first-5' are not allowed"),
    Case("narrow", "refusal@answer=0.5", FORBIDDEN, "the layers (all) are not within 0-1"),
    Case("narrow", "refusal@1-2@answer=0.5", FORBIDDEN, "the layers 1-2 are not within 0-1"),
    Case("dosed", "refusal=0.1", FORBIDDEN, "calibrated dose is allowed, and the file of 'refusal' has none"),
    Case("eager", None, [("refusal", "ablate", 0.5)]),
    Case("eager", "off", []),
    Case("eager", "refusal=2", [("refusal", "ablate", 2.0)]),
)


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {SECRETS[key]}"}


def carried(spec: str | None, model: str) -> dict[str, tuple[dict[str, Any], dict[str, str]]]:
    """`spec` in each carrier: more body, more headers. Two directions of an alias stand between plus signs."""
    if spec is None:
        return {"nothing": ({}, {})}
    return {
        "body": ({"steer": spec}, {}),
        "header": ({}, {"X-Steer": spec}),
        "model": ({"model": f"{model}+{spec.replace(',', '+')}"}, {}),
        "xargs": ({"vllm_xargs": {"steer": spec}}, {}),
    }


def check(case: Case, answer: httpx.Response, where: str) -> None:
    told = f"{case.key} {case.spec} by {where}: {answer.status_code} {answer.text[:300]}"
    if isinstance(case.gets, list):
        assert answer.status_code == 200, told
        applied = [(e["direction"], e["mode"], e["strength"]) for e in receipt(answer)]
        assert applied == case.gets, f"{told} {applied}"
        return
    assert "x-steer-applied" not in answer.headers, told
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == case.gets, told
    assert case.says in error["message"], told


def check_table(client: httpx.Client, route: str, body: dict[str, Any], *, streams: tuple[bool, ...]) -> None:
    """The whole table on one generation route: each case in each carrier."""
    for case in CASES:
        for carrier, (more, headers) in carried(case.spec, body["model"]).items():
            for stream in streams:
                whole = body | more | ({"stream": True} if stream else {})
                answer = client.post(route, json=whole, headers=bearer(case.key) | headers)
                check(case, answer, f"{carrier} on {route}, stream={stream}")
