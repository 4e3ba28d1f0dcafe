"""What keys, policy and audit log add to a plain request: in this process, against the same app without them."""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

from benchmarks.results import Ratio, Result, Table, benchmark_parser, interleave, rounds
from steer.serve.policy import hash_of, new_secret
from tests.serve.inside import Inside, engine, post

KEYS, REQUESTS = 100, 200
BODY = {"model": "tiny", "messages": [{"role": "user", "content": "x" * 2000}], "max_tokens": 64, "temperature": 0}
#: As an HTTP client sends them.
HEADERS = {
    "host": "127.0.0.1:8000",
    "accept": "application/json",
    "accept-encoding": "gzip, deflate",
    "connection": "keep-alive",
    "user-agent": "OpenAI/Python",
    "x-stainless-lang": "python",
    "x-stainless-runtime": "CPython",
}


def measure(rounds: int = 40) -> tuple[dict[str, Ratio], float]:
    """Ratios, and the milliseconds that a plain request has on top of the bare app's: of medians of whole runs."""
    secrets = [new_secret() for _ in range(KEYS)]
    rules = 'directions = ["refusal"]\nmax_strength = 1.0\nrequests_per_minute = 1e8\ntokens_per_minute = 1e9\n'
    text = "".join(f'[keys.k{i}]\nhash = "{hash_of(secret)}"\n{rules}' for i, secret in enumerate(secrets))
    headers = HEADERS | {"authorization": f"Bearer {secrets[-1]}"}
    loop = asyncio.new_event_loop()
    with tempfile.TemporaryDirectory() as folder:
        guarded, steered = Inside(Path(folder), text), BODY | {"steer": "refusal=0.5"}
        guarded.start()

        def arm(app: object, body: dict[str, object]) -> Callable[[], None]:
            async def many() -> None:
                for _ in range(REQUESTS):
                    status, _, _ = await post(app, body, headers, "/v1/chat/completions")  # type: ignore[arg-type]
                    assert status == 200

            return lambda: loop.run_until_complete(many())

        arms = {
            "the bare app": arm(engine, BODY),
            "plain, with the control plane": arm(guarded.app, BODY),
            "steered, with its two audit lines": arm(guarded.app, steered),
        }
        ratios = interleave(arms, rounds, "control plane")
        guarded.control.stop()
    loop.close()
    bare, plain, *_ = ratios.values()
    return ratios, 1000 * (plain.seconds - bare.seconds) / REQUESTS


if __name__ == "__main__":
    parser = benchmark_parser(__doc__)
    parser.add_argument("--rounds", type=rounds, default=40)
    given = parser.parse_args()
    ratios, added = measure(given.rounds)
    result = Result(
        "control-plane",
        "What the control plane adds",
        {},
        [Table(f"{KEYS} keys, bodies of {len(json.dumps(BODY))} bytes, runs of {REQUESTS} requests", ratios)],
        f"A plain request takes {added:.4f} ms more than without it (median of {given.rounds} rounds).\n",
    )
    result.publish(given.out)
