"""What admitting one request costs, part by part, and whether it grows with the number of directions.

`python -m benchmarks.admission`. In process, on the real registry and bank; microseconds, medians of many.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

from starlette.datastructures import Headers

from benchmarks.results import Result, benchmark_parser, median_seconds
from steer.registry import Registry
from steer.runtime.bank import DirectionBank
from steer.serve import carriers
from steer.serve.authorise import Caller, admit
from steer.serve.body import parse_body
from steer.serve.control import Control
from steer.serve.policy import hash_of, new_secret
from steer.settings import ControlSettings
from steer.spec import Spec
from steer.vllm.frontend import salt
from tests import models

COUNTS = (1, 10, 100, 1000)
BODY = b'{"model": "tiny", "messages": [{"role": "user", "content": "%s"}], "steer": "d0=0.7"}' % (b"x" * 2000)
HEADERS = Headers({"content-type": "application/json", "user-agent": "OpenAI/Python", "accept": "*/*"})


def serving(count: int) -> tuple[Registry, DirectionBank]:
    """A registry with `count` directions, d0 and on."""
    model = models.tiny("llama")
    placement = models.placement(rows=count + 1)
    registry = Registry(placement)
    for seed in range(count):
        registry.put(f"d{seed}", models.direction(model, seed=seed).to_bytes(), store=False)
    return registry, placement.bank


def governed(folder: Path, registry: Registry) -> tuple[Control, Caller]:
    """A policy of a hundred keys, and the last of them."""
    secrets = [new_secret() for _ in range(100)]
    rules = 'directions = ["d0"]\nmax_strength = 1.0\nrequests_per_minute = 1e8\n'
    text = "".join(f'[keys.k{i}]\nhash = "{hash_of(secret)}"\n{rules}' for i, secret in enumerate(secrets))
    (folder / "policy.toml").write_text(text)
    control = Control(ControlSettings(policy=folder / "policy.toml"))
    control.start(registry, "tiny")
    assert control.in_force
    return control, Caller("k99", control.in_force.keys["k99"])


def parts(count: int, folder: Path) -> dict[str, float]:
    """Microseconds of each part with `count` directions served."""
    registry, bank = serving(count)
    control, caller = governed(folder, registry)
    body = parse_body(BODY)
    carried = carriers.read(body, HEADERS, ["tiny"])
    admission = admit(carried, registry)
    spec: Spec = admission.spec

    found = {
        "parse the body (2 kB)": micro(lambda: parse_body(BODY)),
        "read the carriers": micro(lambda: carriers.read(body, HEADERS, ["tiny"])),
        "resolve, pin and unpin": micro(lambda: admit(carried, registry).release()),
        "the same under a policy of 100 keys": micro(
            lambda: admit(carried, registry, caller=caller, rules=control.rules).release()
        ),
        "index entries": micro(lambda: bank.steer(spec)),
        "salt of the prefix cache (vLLM)": micro(lambda: salt(spec, 100)),
        "receipt": micro(spec.receipt),
    }
    control.stop()
    return found


def micro(run: Callable[[], object]) -> float:
    """Median microseconds of one call."""
    return 1e6 * median_seconds(run, repeats=25, inner=200)


def report() -> str:
    with tempfile.TemporaryDirectory() as folder:
        found = {count: parts(count, Path(folder)) for count in COUNTS}
    head = "| microseconds, by the number of directions | " + " | ".join(str(count) for count in COUNTS) + " |\n"
    rows = "".join(
        f"| {part} | " + " | ".join(f"{found[count][part]:.1f}" for count in COUNTS) + " |\n" for part in found[1]
    )
    return f"{head}|---|{'---:|' * len(COUNTS)}\n{rows}"


if __name__ == "__main__":
    parser = benchmark_parser(__doc__)
    given = parser.parse_args()
    result = Result("admission", "What admitting a request costs", {}, [], report())
    result.publish(given.out)
