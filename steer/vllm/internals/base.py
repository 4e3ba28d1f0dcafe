"""What all processes need: the version of vLLM, and the lookup of a part of it that must exist."""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias, TypeVar

from steer.errors import UnsupportedModel

T = TypeVar("T")
#: A method of vLLM, or a wrapper of one.
Method: TypeAlias = Callable[..., Any]
log = logging.getLogger("steer")
#: The first and the last release of vLLM that the tests run with.
SUPPORTED = ("0.31.0", "0.32.0")
TESTED = " and ".join(SUPPORTED)
PROBE_TOKENS = 8
WORKER = "steer.vllm.worker.Worker"


def seam(owner: object, name: str, parameters: Iterable[str] = ()) -> Any:
    """`owner.name`, which must take `parameters`. Raises UnsupportedModel naming what is missing."""
    found = getattr(owner, name, None)
    where = f"{getattr(owner, '__name__', type(owner).__name__)}.{name}"
    if found is None:
        raise UnsupportedModel(f"vLLM {version()}: the seam {where} is missing; tested with {TESTED}")
    if parameters:
        has = inspect.signature(found).parameters
        if missing := [p for p in parameters if p not in has]:
            raise UnsupportedModel(f"vLLM {version()}: {where} has no parameter {missing}; tested with {TESTED}")
    return found


def version() -> str:
    import vllm

    return str(getattr(vllm, "__version__", "unknown"))


def check_version() -> None:
    """Raise UnsupportedModel for a vLLM older than the supported ones; warn if it is newer or of an unknown version."""
    first, last = _release(SUPPORTED[0]), _release(SUPPORTED[-1])
    found = _release(version())
    if found and found < first:
        raise UnsupportedModel(f"vLLM {version()} is too old: steering is supported with vLLM {TESTED}")
    if not found or found > last:
        log.warning("vLLM %s is not among the versions that Steer was tested with: %s", version(), TESTED)


def _release(text: str) -> tuple[int, ...]:
    """(major, minor) of a version; empty if the text has none."""
    found = re.match(r"(\d+)\.(\d+)", text)
    return tuple(map(int, found.groups())) if found and any(map(int, found.groups())) else ()


#: The field with which a vLLM worker reports a request whose output is corrupted: the number of NaNs, in the lower 32
#: bits. The bits above carry what our worker reports of the request (`news`).
CORRUPTED, ABOVE = "num_nans_in_logits", 32


def news(lost: int | None, holds: bool | None) -> int:
    """A worker's report on a request as a value of `CORRUPTED`: the position of its first lost token, and whether its
    condition holds; None for unknown."""
    return ((0 if lost is None else lost + 1) << 2 | (0 if holds is None else 1 + holds)) << ABOVE


def news_of(value: int) -> tuple[int | None, bool | None]:
    """The inverse of `news`. It ignores the lower bits."""
    report = value >> ABOVE
    return (report >> 2) - 1 if report >> 2 else None, bool((report & 3) - 1) if report & 3 else None
