"""Prometheus metrics, on the default registry so that they appear beside those of any engine in the process."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import Counter, Gauge, Histogram

from steer.spec import Spec

if TYPE_CHECKING:
    from steer.registry import Registry

REQUESTS = Counter("steer_requests", "Requests by what was applied to them", ["direction", "mode", "outcome"])
REFUSED = Counter("steer_refused_requests", "Requests refused before the engine saw them", ["reason"])
TOKENS = Counter("steer_generated_tokens", "Generated tokens", ["steered"])
ADMISSION = Histogram(
    "steer_admission_seconds",
    "Time to parse, resolve and pin a request's steering",
    buckets=(5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 0.1),
)
RESIDENT = Gauge("steer_resident_versions", "Direction versions resident in the table")
ROWS = Gauge("steer_rows_in_use", "Table rows in use")
SWAPS = Gauge("steer_swaps", "Times that a name was moved to another version")
FAILURES = Gauge("steer_failed_directions", "Names whose newest content is not served")
INFO = Gauge("steer_direction_info", "1 for each served direction", ["direction", "digest", "method"])


def count(spec: Spec, status: int) -> None:
    outcome = "ok" if status < 400 else "error"
    for entry in spec.entries:
        REQUESTS.labels(direction=entry.direction, mode=entry.mode, outcome=outcome).inc()
    if not spec:
        REQUESTS.labels(direction="", mode="", outcome=outcome).inc()


def watch(registry: Registry, rows_in_use: object) -> None:
    """Let the gauges read `registry` when they are scraped. `rows_in_use` is a function without arguments."""
    RESIDENT.set_function(lambda: registry.resident)
    SWAPS.set_function(lambda: registry.swaps)
    FAILURES.set_function(lambda: len(registry.failures))
    ROWS.set_function(rows_in_use)  # type: ignore[arg-type]


def refresh(registry: Registry) -> None:
    """The info metric of what is served now. What is new is there before what is old goes, so that no scrape between
    finds a served direction missing."""
    now = {(name, v.digest, v.direction.meta.method) for name, v in registry.names().items()}
    for labels in now:
        INFO.labels(*labels).set(1)
    for sample in [sample for metric in INFO.collect() for sample in metric.samples]:
        shown = (sample.labels["direction"], sample.labels["digest"], sample.labels["method"])
        if shown not in now:
            INFO.remove(*shown)
