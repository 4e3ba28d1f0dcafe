"""Prometheus metrics, on the default registry, so that they appear together with those of the engine.

If a server has several front ends, vLLM has prometheus_client keep all values in files, and the front end that is
scraped adds them up. Each gauge says how the values of several front ends are combined.

`Usage` counts the tokens of one HTTP request. The middleware opens one in the request's context, and the engine adds to
it. The tokens of an answer are counted at its end, so that nothing is counted while tokens are generated.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from prometheus_client import Counter, Gauge, Histogram

from steer.spec import Spec

if TYPE_CHECKING:
    from steer.registry import Registry

REQUESTS = Counter("steer_requests", "Requests by what was applied to them", ["direction", "mode", "outcome"])
REFUSED = Counter("steer_refused_requests", "Requests refused by Steer", ["reason"])
TOKENS = Counter("steer_generated_tokens", "Generated tokens", ["steered"])
POLICY_REFUSED = Counter("steer_policy_refusals", "Requests refused by keys and policy", ["rule"])
POLICY_RELOADS = Counter("steer_policy_reloads", "Policy files that were read anew", ["result"])
AUDIT_LINES = Counter("steer_audit_lines", "Lines written to the audit log", ["event"])
AUDIT_FAILURES = Counter("steer_audit_failures", "Times that the audit log could not be written")
AUDIT_OK = Gauge(
    "steer_audit_ok", "1 while the audit log can be written, or none is kept", multiprocess_mode="mostrecent"
)
STEERING = Gauge("steer_steering_enabled", "0 while the kill switch has steering off", multiprocess_mode="mostrecent")
STEERED_RUNNING = Gauge("steer_steered_running", "Steered requests that are running", multiprocess_mode="livesum")
ADMISSION = Histogram(
    "steer_admission_seconds",
    "Time to parse, resolve and pin a request's steering",
    buckets=(5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 0.1),
)
SWAP = Histogram(
    "steer_swap_seconds",
    "Time from a direction's bytes to its being served: checks, placement on all workers, the move of the name",
    buckets=(1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1, 0.2, 0.5, 1, 2, 5, 10),
)
RESIDENT = Gauge("steer_resident_versions", "Direction versions resident in the bank", multiprocess_mode="livemax")
ROWS = Gauge("steer_rows_in_use", "DirectionBank rows in use", multiprocess_mode="livemax")
ROW_CAPACITY = Gauge("steer_row_capacity", "DirectionBank rows that directions can have", multiprocess_mode="livemax")
SWAPS = Gauge("steer_swaps", "Times that a name was moved to another version", multiprocess_mode="livemax")
FAILURES = Gauge("steer_failed_directions", "Names whose newest content is not served", multiprocess_mode="livemax")
INFO = Gauge(
    "steer_direction_info",
    "1 for each served direction",
    ["direction", "digest", "method"],
    multiprocess_mode="livemax",
)
#: Gauges that read the registry.
_OF_REGISTRY: dict[Gauge, Callable[[Registry], float]] = {
    RESIDENT: lambda registry: registry.resident,
    ROWS: lambda registry: registry.rows,
    SWAPS: lambda registry: registry.swaps,
    FAILURES: lambda registry: len(registry.failures),
}
#: Whether values are kept in files. Then labels cannot be removed.
_IN_FILES = "PROMETHEUS_MULTIPROC_DIR" in os.environ
for _result in ("ok", "failed"):
    POLICY_RELOADS.labels(result=_result)  # starts at 0, or the first count would not be an increase
_open: ContextVar[Usage | None] = ContextVar("steer_usage", default=None)


@dataclass(slots=True)
class Usage:
    """The tokens of one request.

    Attributes:
        prompt: tokens of its prompts.
        again: tokens of prompts that were computed again, for further answers.
        failed: whether an answer failed after its status had been sent.
        prompts: how many prompts are still to be counted; None for all. Beam search asks the engine for one at each
            step of each beam, and only the request's own count.
    """

    prompt: int = 0
    again: int = 0
    failed: bool = False
    prompts: int | None = None
    _answers: list[Callable[[], int]] = field(default_factory=list)

    def read(self, tokens: int, times: int = 1) -> None:
        """Count a prompt with this many tokens, which is computed `times` times."""
        if self.prompts == 0:
            return
        if self.prompts is not None:
            self.prompts -= 1
        self.prompt += tokens
        self.again += tokens * (times - 1)

    def answer(self, made: Callable[[], int]) -> None:
        """Count one more answer; `made` returns how many tokens it has by now."""
        self._answers.append(made)

    @property
    def completion(self) -> int:
        return sum(made() for made in self._answers)


@contextmanager
def counting_usage() -> Iterator[Usage]:
    """Open a new usage in this context."""
    usage = Usage()
    token = _open.set(usage)
    try:
        yield usage
    finally:
        _open.reset(token)


def current_usage() -> Usage:
    """The request's usage; outside a request one that nobody reads."""
    return _open.get() or Usage()


def count(spec: Spec, outcome: str, usage: Usage) -> None:
    """Count a request that has ended."""
    if made := usage.completion:
        TOKENS.labels(steered=str(bool(spec)).lower()).inc(made)
    for entry in spec.entries:
        REQUESTS.labels(direction=entry.direction, mode=entry.mode, outcome=outcome).inc()
    if not spec:
        REQUESTS.labels(direction="", mode="", outcome=outcome).inc()


def watch(registry: Registry, capacity: int) -> None:
    """Let the gauges read `registry` when they are scraped."""
    ROW_CAPACITY.set(capacity)
    for gauge, read in _OF_REGISTRY.items():
        gauge.set_function(partial(read, registry))


def refresh(registry: Registry) -> None:
    """Bring the info metric up to date with the served directions. New labels are added before old ones are removed, so
    that no scrape misses a served direction. If values are kept in files, this sets the gauges of `watch` too."""
    if _IN_FILES:
        for gauge, read in _OF_REGISTRY.items():
            gauge.set(read(registry))
    now = {(name, v.digest, v.direction.meta.method) for name, v in registry.names().items()}
    for labels in now:
        INFO.labels(*labels).set(1)
    for sample in [sample for metric in INFO.collect() for sample in metric.samples]:
        shown = (sample.labels["direction"], sample.labels["digest"], sample.labels["method"])
        if shown not in now and _IN_FILES:
            INFO.labels(*shown).set(0)
        elif shown not in now:
            INFO.remove(*shown)
