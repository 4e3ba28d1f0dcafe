"""The tokens that one HTTP request uses, counted by the engine that serves it.

The middleware opens a usage in the request's context, and the engine adds to it. The number of tokens of an answer is
asked at its end, so nothing is counted while tokens are generated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

_open: ContextVar[Usage | None] = ContextVar("steer_usage", default=None)


@dataclass(slots=True)
class Usage:
    """`failed` is set where an answer broke off after its status had been sent."""

    prompt: int = 0
    failed: bool = False
    _answers: list[Callable[[], int]] = field(default_factory=list)

    def answer(self, made: Callable[[], int]) -> None:
        """Count one more answer; `made` gives the tokens that it has by now."""
        self._answers.append(made)

    @property
    def completion(self) -> int:
        return sum(made() for made in self._answers)


@contextmanager
def counting() -> Iterator[Usage]:
    """A new usage in this context."""
    usage = Usage()
    token = _open.set(usage)
    try:
        yield usage
    finally:
        _open.reset(token)


def current() -> Usage:
    """The request's usage, or one that nobody reads where there is no request."""
    return _open.get() or Usage()
