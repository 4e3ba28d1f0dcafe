"""A resolved spec on its way from the front end to the workers, inside `SamplingParams.extra_args`."""

from __future__ import annotations

from collections.abc import Sequence

from steer.errors import SpecError
from steer.spec import nearly
from steer.vllm.settings import KEY

#: Its key; the value is its receipt. Requests must not bring it: only the front end, for what it has pinned.
RESOLVED = "steer.resolved"
#: The digests of the versions whose rows are read, in this order, and whether their axes are.
READ = "steer.read"
#: What a measurement in this program has captured of its own requests; without one it means nothing.
CAPTURE = "steer.capture"


def check_absent(extra: object) -> None:
    """Raise SpecError for a request that brings what only the front end may write, or nearly the key that asks."""
    for key in extra if isinstance(extra, dict) else ():
        if key not in (KEY, CAPTURE) and isinstance(key, str) and nearly(key):
            raise SpecError(f"'{key[:100]}' is not for requests to set; ask with '{KEY}'", param=key)


def read_by(params: object) -> tuple[Sequence[str], bool]:
    """The digests in SamplingParams of what is read for a request, none where nothing is; and are their axes read?"""
    digests, axes = (getattr(params, "extra_args", None) or {}).get(READ, ((), False))
    return digests, axes


def of(params: object) -> str | None:
    """The receipt of the spec in SamplingParams; None for a plain request, and for one that generates nothing."""
    text: str | None = (getattr(params, "extra_args", None) or {}).get(RESOLVED)
    return text
