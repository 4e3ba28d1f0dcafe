"""A resolved spec on its way from the front end to the workers, inside `SamplingParams.extra_args`."""

from __future__ import annotations

import json
from typing import Any

from steer.errors import SpecError
from steer.spec import Entry, Spec

#: Its key. Requests must not bring it: only what the front end resolved and pinned goes under it.
RESOLVED = "steer.resolved"


def encode(spec: Spec) -> str:
    return spec.receipt()


def decode(text: str) -> Spec:
    return Spec(tuple(Entry(**entry) for entry in json.loads(text)))


def check_absent(extra: Any) -> None:
    """Raise SpecError for a request that brings what only the front end may write."""
    if isinstance(extra, dict) and RESOLVED in extra:
        raise SpecError(f"'{RESOLVED}' is not for requests to set; ask with 'steer'", param=RESOLVED)


def of(params: Any) -> str | None:
    """The encoded spec in SamplingParams; None for a plain request, and for one that generates nothing."""
    text: str | None = (getattr(params, "extra_args", None) or {}).get(RESOLVED)
    return text
