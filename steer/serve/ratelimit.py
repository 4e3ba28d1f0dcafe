"""Rates: token buckets, one pair for each key, and what one request takes of them. The event loop's alone, so without a
lock.

A request takes its place before anything is done for it, and all the tokens that it may come to once it is read; what
it did not use is given back when it ends. So requests that run at once cannot take together what one after the other
could not, and those that fail have taken a request all the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

SECONDS = 60.0
#: Bytes of a body for which one token of prompt is taken in advance.
BYTES_PER_TOKEN = 4
_MOST = 10**9


@dataclass(slots=True)
class Bucket:
    """Holds at most a minute's amount and fills evenly. It may be overdrawn: an answer's cost is known at its end."""

    per_minute: float
    level: float = field(init=False)
    when: float

    def __post_init__(self) -> None:
        self.level = self.per_minute

    def fill(self, now: float, per_minute: float) -> None:
        """Up to `now`, at a rate that a new policy may have changed."""
        self.per_minute = per_minute
        self.level = min(per_minute, self.level + (now - self.when) * per_minute / SECONDS)
        self.when = now

    def wait(self, amount: float) -> float:
        """Seconds until `amount` is there; 0 where it is."""
        missing = min(amount, self.per_minute) - self.level
        return max(0.0, missing * SECONDS / self.per_minute)


class RateLimiter:
    """One kind of rate (requests, or tokens) of all keys."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._buckets: dict[str, Bucket] = {}

    def wait(self, key: str, per_minute: float | None, amount: float) -> float:
        """Seconds until `key` may have `amount`; 0 where it may now, or has no such limit."""
        return 0.0 if per_minute is None else self._bucket(key, per_minute).wait(amount)

    def charge(self, key: str, per_minute: float | None, amount: float) -> None:
        if per_minute is not None:
            self._bucket(key, per_minute).level -= amount

    def _bucket(self, key: str, per_minute: float) -> Bucket:
        now = self._clock()
        bucket = self._buckets.get(key)
        if bucket is None:
            bucket = self._buckets[key] = Bucket(per_minute, now)
        bucket.fill(now, per_minute)
        return bucket


def tokens_of(body: dict[str, object], size: int, context: int) -> int:
    """The tokens that a generation request may come to: its prompts by their bytes, and as many tokens of answers as it
    allows, of each at most `context`. Of a body whose values have not been checked."""
    named = ("max_tokens", "max_completion_tokens", "max_output_tokens")
    given = [value for name in named if type(value := body.get(name)) is int and value >= 0]
    each = min(*given, context) if given else context
    answers = max(_count(body.get("n")), _count(body.get("best_of")))
    prompt = body.get("prompt")
    prompts = len(prompt) if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int) else 1
    return min(_MOST, size // BYTES_PER_TOKEN + prompts * answers * each)


def _count(value: object) -> int:
    return min(value, _MOST) if type(value) is int and value > 0 else 1
