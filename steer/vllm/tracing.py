"""What was applied to a request, on vLLM's span of it when tracing is on (`--otlp-traces-endpoint`).

vLLM makes the span when a request ends, from its own attributes; a span processor, OpenTelemetry's extension point for
this, adds ours as the span starts. It runs in the front end's process, on the event loop.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import TYPE_CHECKING

from steer.spec import Spec
from steer.vllm import internals

if TYPE_CHECKING:
    from opentelemetry.trace import Span

    from steer.vllm.internals.types import EngineCoreOutput, OutputProcessor, RequestState

#: The spec of the request whose span is being made.
_spanned: ContextVar[Spec | None] = ContextVar("steer_spanned", default=None)


def attributes(spec: Spec) -> dict[str, object]:
    """As OpenTelemetry has them: texts, numbers, and lists of one kind."""
    return {
        "steer.applied": spec.receipt(),
        "steer.directions": [entry.direction for entry in spec.entries],
        "steer.digests": [entry.digest for entry in spec.entries],
        "steer.modes": [entry.mode for entry in spec.entries],
        "steer.strengths": [entry.strength for entry in spec.entries],
    }


def trace(outputs: OutputProcessor, spec_of: Callable[[str], Spec | None]) -> None:
    """Add attributes to the spans of this OutputProcessor's requests, where it makes any. `spec_of` takes a request's
    id, and gives None for a plain one."""
    if not getattr(outputs, "tracing_enabled", False):
        return
    from opentelemetry import trace as opentelemetry
    from opentelemetry.sdk.trace import SpanProcessor

    class Steered(SpanProcessor):
        def on_start(self, span: Span, parent_context: object = None) -> None:
            if spec := _spanned.get():
                span.set_attributes(attributes(spec))

    provider = internals.seam(opentelemetry.get_tracer_provider(), "add_span_processor")
    provider(Steered())
    make = internals.seam(outputs, "do_tracing", ["req_state"])

    def making(
        engine_core_output: EngineCoreOutput, req_state: RequestState, *args: object, **kwargs: object
    ) -> object:
        token = _spanned.set(spec_of(req_state.request_id))
        try:
            return make(engine_core_output, req_state, *args, **kwargs)
        finally:
            _spanned.reset(token)

    outputs.do_tracing = making
