"""The general plugin of vLLM (entry point `vllm.general_plugins`). vLLM calls it in every process, possibly more than
once.

An engine that starts with `additional_config={"steer": ...}` gets a `Frontend`, and methods of the engine's instances
are wrapped so that every request passes the front end. The plugin does nothing to any other engine.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from contextvars import ContextVar
from functools import partial
from typing import TYPE_CHECKING, Any

from steer.errors import InvalidInput, UnsupportedModel, brief
from steer.settings import KEEP_ALIVE
from steer.spec import Spec
from steer.vllm import internals, parent
from steer.vllm.frontend import ATTRIBUTE, Frontend, in_self_check, in_turn, parted
from steer.vllm.selfcheck import Job, ProbeAnswer, self_check
from steer.vllm.settings import KEY, EngineSettings
from steer.vllm.settings import read as settings_of

if TYPE_CHECKING:
    from opentelemetry.trace import Span

    from steer.vllm.internals import types


def register() -> None:
    with suppress(UnsupportedModel):  # without this a salt also separates the first block: correct, but less is shared
        internals.core.salt_later(parted)
    with suppress(UnsupportedModel):  # without this an engine may outlive its server
        internals.core.before_serving(_end_with_parent)
    internals.engine.on_engine_start(_prepare, _attach_sync, _attach_async)


def _end_with_parent(config: types.VllmConfig) -> None:
    """Have an engine core that steers end with the process that started it. vLLM's own would stay, with the device's
    memory."""
    if settings_of(config.additional_config) is not None:
        parent.end_with_parent()


def _prepare(config: types.VllmConfig) -> EngineSettings | None:
    """The settings of an engine that is about to start with this `config`; None if steering is off."""
    found = settings_of(config.additional_config)
    if found is None:
        return None
    worker = config.parallel_config.worker_cls
    if worker != internals.WORKER:
        raise UnsupportedModel(f"additional_config['{KEY}'] needs worker_cls='{internals.WORKER}', it is {worker!r}")
    internals.check_version()
    internals.config.check_config(config, readout=bool(found.readout))
    return found


def _attach_sync(engine: types.LLMEngine, settings: EngineSettings, serves: bool) -> None:
    """Switch steering on for an `LLMEngine` that has just started. Blocks until the workers are ready."""
    call = partial(internals.engine.call_workers, engine)
    thinking = internals.engine.engine_thinking(engine)
    frontend = Frontend(engine.vllm_config, settings, call, serves=serves, thinking=thinking)
    _wrap_requests(engine, frontend)
    add_request = internals.seam(engine, "add_request", ["prompt", "params"])

    def adding(
        request_id: str, prompt: object, params: types.SamplingParams, *args: object, **kwargs: object
    ) -> object:
        with frontend.admitted(params) as admitted:
            try:
                return add_request(request_id, prompt, admitted, *args, **kwargs)
            except BaseException:  # some of n answers may have started, and nobody else would end them
                if left := frontend.left_of_call():
                    internals.engine.abort(engine, left)
                raise

    def ask(jobs: Sequence[Job], _rank: int) -> list[ProbeAnswer]:
        for n, (prompt, spec) in enumerate(jobs):
            parameters = internals.engine.probe_parameters(engine.vllm_config, spec)
            engine.add_request(f"steer-probe-{n}", internals.engine.probe_prompt(prompt), parameters)
        done: dict[str, ProbeAnswer] = {}
        while engine.has_unfinished_requests():
            done |= {out.request_id: internals.engine.answer_of(out) for out in engine.step() if out.finished}
        return [done[f"steer-probe-{n}"] for n in range(len(jobs))]

    engine.add_request = adding
    setattr(engine, ATTRIBUTE, frontend)
    token = in_self_check.set(True)
    try:
        frontend.start(partial(self_check, ask=ask))
    finally:
        in_self_check.reset(token)


def _attach_async(engine: types.AsyncLLM, settings: EngineSettings, serves: bool) -> None:
    """Switch steering on for an `AsyncLLM`. Its constructor cannot wait for the workers, so the first call that needs
    them waits."""
    from steer.vllm.server import check_app

    loops: list[asyncio.AbstractEventLoop] = []

    def call(method: str, *args: object) -> list[Any]:  # call in a thread, never on the event loop, which does the work
        return asyncio.run_coroutine_threadsafe(
            internals.engine.call_workers_async(engine, method, *args), loops[0]
        ).result()

    frontend = Frontend(
        engine.vllm_config,
        settings,
        call,
        partial(internals.engine.call_workers_async, engine),
        place=internals.engine.place_of(engine),
        serves=serves,
        thinking=internals.engine.engine_thinking(engine),
    )
    internals.engine.serve_between(engine, _wrap_requests(engine, frontend))
    add_request = internals.seam(engine, "add_request", ["prompt", "params"])
    get_supported_tasks = internals.seam(engine, "get_supported_tasks")
    starting: list[asyncio.Task[None]] = []

    engines = internals.engine.engines_of(engine)

    async def asking(n: int, job: Job, rank: int) -> ProbeAnswer:
        more = {"data_parallel_rank": rank} if engines > 1 else {}
        prompt, spec = job
        parameters, name = internals.engine.probe_parameters(engine.vllm_config, spec), f"steer-probe-{rank}-{n}"
        *_, last = [
            out async for out in engine.generate(internals.engine.probe_prompt(prompt), parameters, name, **more)
        ]
        return internals.engine.answer_of(last)

    async def asking_all(jobs: Sequence[Job], rank: int) -> list[ProbeAnswer]:
        return list(await asyncio.gather(*(asking(n, job, rank) for n, job in enumerate(jobs))))

    def ask(jobs: Sequence[Job], rank: int) -> list[ProbeAnswer]:
        return asyncio.run_coroutine_threadsafe(asking_all(jobs, rank), loops[0]).result()

    def start() -> None:
        in_self_check.set(True)  # only what this thread asks of the event loop sees this value
        frontend.start(partial(self_check, ask=ask, ranks=engines))
        frontend.watch()

    async def ready() -> None:
        if in_self_check.get():
            return
        if not starting:
            loops.append(asyncio.get_running_loop())
            starting.append(asyncio.create_task(asyncio.to_thread(start)))
        await asyncio.shield(starting[0])

    async def tasks() -> object:
        """vLLM's `get_supported_tasks`, once steering has started. The server calls it before it serves anything, so a
        server whose steering cannot start does not start either."""
        await ready()
        return await get_supported_tasks()

    async def adding(
        request_id: str, prompt: object, params: types.SamplingParams, *args: object, **kwargs: object
    ) -> object:
        await ready()
        async with in_turn():
            try:
                with frontend.admitted(params) as admitted:
                    try:
                        return await add_request(request_id, prompt, admitted, *args, **kwargs)
                    except BaseException:  # as in `_attach_sync`; also if the client has left
                        if left := frontend.left_of_call():
                            await internals.engine.abort_async(engine, left)
                        raise
            except ValueError as error:  # InvalidInput, and errors of vLLM's own
                raise internals.engine.client_error(error) from error

    engine.get_supported_tasks = tasks
    engine.add_request = adding
    setattr(engine, ATTRIBUTE, frontend)
    internals.server.on_app_built(check_app)


def _wrap_requests(engine: types.LLMEngine | types.AsyncLLM, frontend: Frontend) -> Collection[str]:
    outputs = internals.seam(engine, "output_processor")
    counted = internals.engine.wrap_requests(outputs, frontend)
    _trace(outputs, frontend.applied)
    return counted


#: The spec of the request whose span is being made.
_spanned: ContextVar[Spec | None] = ContextVar("steer_spanned", default=None)


def _attributes(spec: Spec) -> dict[str, object]:
    """The attributes of a span for this spec, in the types of OpenTelemetry: texts, numbers, and lists of one type."""
    return {
        "steer.applied": spec.receipt(),
        "steer.directions": [entry.direction for entry in spec.entries],
        "steer.digests": [entry.digest for entry in spec.entries],
        "steer.modes": [entry.mode for entry in spec.entries],
        "steer.strengths": [entry.strength for entry in spec.entries],
    }


def _trace(outputs: types.OutputProcessor, spec_of: Callable[[str], Spec | None]) -> None:
    """Write what was applied to a request on vLLM's span of the request, if tracing is on (`--otlp-traces-endpoint`).

    vLLM makes the span when a request ends, from its own attributes. A span processor, OpenTelemetry's extension point
    for this, adds ours when the span starts, on the event loop.

    Args:
        spec_of: takes the id of a request, and returns its spec; None for a plain request.
    """
    if not getattr(outputs, "tracing_enabled", False):
        return
    from opentelemetry import trace as opentelemetry
    from opentelemetry.sdk.trace import SpanProcessor

    class OnSpan(SpanProcessor):
        def on_start(self, span: Span, parent_context: object = None) -> None:
            if spec := _spanned.get():
                span.set_attributes(_attributes(spec))

    provider = internals.seam(opentelemetry.get_tracer_provider(), "add_span_processor")
    provider(OnSpan())
    make = internals.seam(outputs, "do_tracing", ["req_state"])

    def making(
        engine_core_output: types.EngineCoreOutput, req_state: types.RequestState, *args: object, **kwargs: object
    ) -> object:
        token = _spanned.set(spec_of(req_state.request_id))
        try:
            return make(engine_core_output, req_state, *args, **kwargs)
        finally:
            _spanned.reset(token)

    outputs.do_tracing = making


#: Seconds that running requests have to end after SIGTERM, if the options set no time.
SHUTDOWN = 5


def serve(model: str, settings: EngineSettings, options: Sequence[str] = ()) -> None:
    """Run vLLM's OpenAI server until SIGTERM or SIGINT, in this process or in one process of vLLM for each API server.

    Args:
        options: options of `vllm serve`, as on its command line.
    """
    from steer.serve.connection import check_address
    from steer.serve.control import Control
    from steer.vllm.server import Middleware, check_door

    register()
    args = internals.server.server_arguments(model, options)
    given = args.additional_config or {}
    if not isinstance(given, dict):
        raise InvalidInput(f"--additional-config: must be a JSON object, got {brief(given)}")
    if KEY in given:
        raise InvalidInput(f"--additional-config: '{KEY}' is not accepted here: use the options of `steer serve`")
    if args.worker_cls not in ("auto", internals.WORKER):
        raise InvalidInput(f"--worker-cls: {brief(args.worker_cls)} does not steer; leave it out")
    # Check these now: the engine takes a minute to start.
    control = Control(settings.control)
    check_door(control, args)
    settings.check_folder()
    if not (getattr(args, "uds", None) or getattr(args, "headless", False)):
        check_address(args.host or "", args.port)  # vLLM would share the port with a server that listens there
    if not any(option.partition("=")[0] in ("--allowed-origins", "--allowed_origins") for option in options):
        args.allowed_origins = []  # vLLM's own default lets every web page call the server
    args.worker_cls = internals.WORKER
    args.additional_config = given | {KEY: settings.model_dump(mode="json")}
    # With a timeout of 0 running requests would break off, and several servers would not close their logs.
    args.shutdown_timeout = args.shutdown_timeout or SHUTDOWN
    ours = f"{Middleware.__module__}.{Middleware.__name__}"
    args.middleware = [*(each for each in args.middleware if each != ours), ours]
    internals.server.run_server(args, keep_alive=KEEP_ALIVE)
    if Middleware.failed is not None:
        raise Middleware.failed
