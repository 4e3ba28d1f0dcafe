"""Rates: token buckets, one pair for each key, and what a request charges to them. The buckets are in the table that
all front ends share; checking and charging happen together under its lock.

A request is counted before any work is done for it, and charged all the tokens that it can use once it is read; what it
did not use is given back when it ends. So requests that run at once cannot exceed together what they could use one
after the other, and a request that fails is counted too.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from steer.serve.body import prompt_count
from steer.shared import Shared

SECONDS = 60.0
#: Bytes of a body for which one token of prompt is taken in advance.
BYTES_PER_TOKEN = 4
_MOST = 10**9


class RateLimiter:
    """One kind of rate (requests, or tokens) of all keys: buckets that hold at most a minute's amount and fill evenly.
    They may be overdrawn: an answer's cost is known at its end. `clock` is one clock of the whole machine."""

    def __init__(self, kind: str, shared: Shared, clock: Callable[[], float] = time.monotonic) -> None:
        self._kind, self._shared, self._clock = kind, shared, clock

    def wait(self, key: str, per_minute: float | None, amount: float) -> float:
        """Seconds until `key` may have `amount`; 0 where it may now, or has no such limit."""
        if per_minute is None:
            return 0.0
        missing = min(amount, per_minute) - self._level(key, per_minute, self._clock())
        return max(0.0, missing * SECONDS / per_minute)

    def charge(self, key: str, per_minute: float | None, amount: float) -> None:
        if per_minute is not None:
            with self._shared.lock():
                now = self._clock()
                self._shared.put(f"{self._kind}:{key}", self._level(key, per_minute, now) - amount, now)

    def _level(self, key: str, per_minute: float, now: float) -> float:
        """What the bucket holds now, at a rate that a new policy may have changed."""
        level, when = self._shared.get(f"{self._kind}:{key}") or (per_minute, now)
        return min(per_minute, level + (now - when) * per_minute / SECONDS)


def tokens_of(body: dict[str, object], size: int, context: int) -> int:
    """The tokens that a generation request may come to: its prompts by their bytes, and as many tokens of answers as it
    allows, of each at most `context`. Of a body whose values have not been checked."""
    named = ("max_tokens", "max_completion_tokens", "max_output_tokens")
    given = [value for name in named if type(value := body.get(name)) is int and value >= 0]
    each = min(*given, context) if given else context
    answers = max(_count(body.get("n")), _count(body.get("best_of")))
    return min(_MOST, size // BYTES_PER_TOKEN + prompt_count(body) * answers * each)


def _count(value: object) -> int:
    return min(value, _MOST) if type(value) is int and value > 0 else 1
