"""The process that creates requests, that of an LLM or of the API server: its engine, its output processor, and the
probe requests."""

from __future__ import annotations

import asyncio
import functools
import inspect
import signal
import sys
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Literal

from steer.errors import InvalidInput, RequestError, UnsupportedModel, brief
from steer.runtime.selfcheck import tensors_in
from steer.serve import metrics
from steer.tokenization import Thinking, Tokenizer, thinking_of
from steer.vllm.internals.base import ABOVE, CORRUPTED, PROBE_TOKENS, TESTED, Method, T, news_of, seam, version
from steer.vllm.internals.config import vocabulary_of

if TYPE_CHECKING:
    from steer.vllm.internals.types import (
        LLM,
        AsyncLLM,
        EngineArgs,
        EngineCoreOutput,
        EngineCoreRequest,
        LLMEngine,
        OutputProcessor,
        RequestOutput,
        Requests,
        RequestState,
        SamplingParams,
        VllmConfig,
    )


def call_workers(engine: LLMEngine, method: str, *args: object) -> list[Any]:
    """Call `method` on every worker of an `LLMEngine`, and return their answers. Call this on the thread that drives
    the engine.

    An engine in this process stops with its last request, and the workers learn of the end of a request only in the
    next step. So this makes that step first.
    """
    core = getattr(engine.engine_core, "engine_core", None)
    if core is not None and not engine.has_unfinished_requests() and core.scheduler.has_finished_requests():
        engine.step()
    return list(seam(engine, "collective_rpc")(method, args=args))


def engines_of(engine: AsyncLLM) -> int:
    """How many engines an `AsyncLLM` drives: several if it balances data parallelism itself."""
    return len(getattr(engine.engine_core, "core_engines", None) or [None])


def place_of(engine: AsyncLLM) -> tuple[int, int]:
    """The index of an `AsyncLLM` among the front ends of its engines, and their number."""
    client = engine.engine_core
    return int(seam(client, "client_index")), int(seam(client, "client_count"))


async def call_workers_async(engine: AsyncLLM, method: str, *args: object) -> list[Any]:
    """Call `method` on every worker of all engines of an `AsyncLLM`, and return their answers. If there are several
    engines (data parallelism), vLLM's own `collective_rpc` reaches all of them, but returns only the answers of the
    first."""
    client = engine.engine_core
    if engines_of(engine) > 1:
        one, many = seam(client, "_call_utility_async"), client.core_engines
        answers = await asyncio.gather(*(one("collective_rpc", method, None, args, None, engine=e) for e in many))
        return [answer for each in answers for answer in each]
    return list(await seam(engine, "collective_rpc")(method, args=args))


#: How many steps of the engine may wait while the event loop serves others. The tokens of all requests wait in them.
MAX_WAITING = 32


def serve_between(engine: AsyncLLM, counted: Collection[str]) -> None:
    """Have the event loop serve others between two steps of the engine while there are requests that are `counted`. Of
    steps that wait vLLM takes one after the other, and joins what their streams get. That saves time for any other
    stream, but joined log-probabilities take as long as single ones, and the longer the loop makes them, the more steps
    wait then."""
    client = engine.engine_core
    get, waiting = seam(client, "get_output_async"), seam(client, "outputs_queue")

    async def getting() -> object:
        if counted and waiting.qsize() < MAX_WAITING:
            await asyncio.sleep(0)
        return await get()

    client.get_output_async = getting


def wrap_requests(outputs: OutputProcessor, requests: Requests) -> Collection[str]:
    """Wrap the methods of an OutputProcessor so that `requests` is told of each request. Returns the ids of those whose
    tokens it counts at the time."""
    add, process, abort = (
        seam(outputs, "add_request"),
        seam(outputs, "process_outputs"),
        seam(outputs, "abort_requests"),
    )
    states = seam(outputs, "request_states")
    formed = set[str]()  # the ids of requests whose answers are held to a form
    counted: dict[str, Callable[[int | None], Exception | None]] = {}

    def adding(request: EngineCoreRequest, *args: object, **kwargs: object) -> object:
        requests.check_added(request)
        try:
            out = add(request, *args, **kwargs)
        except BaseException:
            if request.request_id not in states:  # it was not taken, so nothing else will end it
                requests.let_go(request.request_id)
            raise
        if (state := states.get(request.request_id)) is not None:
            if (count := requests.has_added(request, state)) is not None:
                counted[request.request_id] = count
            if has_form(request.sampling_params):
                formed.add(request.request_id)
            metrics.current_usage().answer(lambda: answer_length(state))
        return out

    def processing(engine_core_outputs: Sequence[EngineCoreOutput], *args: object, **kwargs: object) -> object:
        errors: dict[str, Exception] = {}
        fallen: list[str] = []
        if formed:
            _tell_of_forms(engine_core_outputs, states, formed)
            formed.difference_update([each for each in formed if each not in states])
        if counted:
            for each in [each for each in counted if each not in states]:
                counted.pop(each)(None)
            for one in engine_core_outputs:
                if (count := counted.get(one.request_id)) and (error := count(len(one.new_token_ids))):
                    errors[one.request_id] = error
        if requests.held:
            errors |= _lost(engine_core_outputs, requests)
        if errors:
            engine_core_outputs, fallen = _with_ends(engine_core_outputs, states, errors)
        try:
            out = process(engine_core_outputs, *args, **kwargs)
            if fallen:
                seam(out, "reqs_to_abort").extend(fallen)  # otherwise the engine would go on with them
            return out
        finally:
            if requests.held:
                for one in engine_core_outputs:
                    if one.request_id in requests.held and one.request_id not in states:
                        requests.let_go(one.request_id)

    def aborting(*args: object, **kwargs: object) -> object:
        out = abort(*args, **kwargs)
        for request_id in out:
            requests.let_go(request_id)
            if (count := counted.pop(request_id, None)) is not None:
                count(None)
        return out

    outputs.add_request, outputs.process_outputs, outputs.abort_requests = adding, processing, aborting
    return counted


def _tell_of_forms(outputs: Sequence[EngineCoreOutput], states: Mapping[str, Any], formed: Set[str]) -> None:
    """Give a clear error to each request of `formed` that failed in the engine: the engine cannot compile the form, or
    the form allows no further token."""
    for one in outputs:
        if one.request_id in formed and str(one.finish_reason) == "error":
            state = states.get(one.request_id)
            if state is not None and state.queue is not None:
                # Put the error in before the output: the queue then takes no output any more.
                state.queue.put(client_error(InvalidInput("no answer can be held to the form that was asked for")))


def _lost(outputs: Sequence[EngineCoreOutput], requests: Requests) -> dict[str, Exception]:
    """The errors of the requests whose EngineCoreOutputs report a lost stream, by id."""
    errors: dict[str, Exception] = {}
    for one in [one for one in outputs if getattr(one, CORRUPTED) >> ABOVE and one.request_id in requests.held]:
        position, holds = news_of(getattr(one, CORRUPTED))
        setattr(one, CORRUPTED, getattr(one, CORRUPTED) & ((1 << ABOVE) - 1))  # keep only the bits of vLLM's own count
        if holds is not None:
            requests.decided(one.request_id, holds)
        if position is not None:
            errors[one.request_id] = requests.lost(one.request_id)
    return errors


def _with_ends(
    outputs: Sequence[EngineCoreOutput], states: Mapping[str, RequestState], errors: Mapping[str, Exception]
) -> tuple[Sequence[EngineCoreOutput], list[str]]:
    """The EngineCoreOutputs with an end in place of each output of a request that has an error, and the ids of the
    requests that end so."""
    from vllm.v1.engine import EngineCoreOutput, FinishReason

    fallen: dict[str, str] = {}
    for request_id, error in errors.items():
        if request_id not in states:
            continue
        fallen[request_id] = str(error)
        if (queue := getattr(states[request_id], "queue", None)) is not None:
            # Put the error in before the output: the queue then takes no output any more. The other answers to the same
            # request have the same queue, so they end with this one.
            queue.put(client_error(error))
            others = (name for name, state in states.items() if getattr(state, "queue", None) is queue)
            fallen |= dict.fromkeys(others, str(error))
    ends = [
        EngineCoreOutput(
            request_id=request_id,
            new_token_ids=[],
            finish_reason=FinishReason.ERROR,
            stop_reason=reason,
        )
        for request_id, reason in fallen.items()
    ]
    return [*(one for one in outputs if one.request_id not in fallen), *ends], list(fallen)


def choice_of(state: RequestState) -> tuple[str, int]:
    """The choice that a request of the OutputProcessor answers: the id with which the answer was requested, and the
    number of the choice among the n answers."""
    return str(seam(state, "external_req_id")), int(seam(state, "request_index"))


def of_choice(states: Mapping[tuple[str, int], RequestState], answer: str, choice: int) -> RequestState | None:
    """The state of the request that answers a choice of an HTTP request; None if it cannot be found.

    Args:
        states: the states of the requests of the HTTP request, by `choice_of`.
        answer: the id of the answer.
        choice: the number of the choice in this answer.
    """
    if (found := states.get((answer, choice))) is not None or not states:
        return found
    parent = getattr(next(iter(states.values())), "parent_req", None)
    prompt, index = divmod(choice, 1 if parent is None else int(seam(parent, "n")))
    return states.get((f"{answer}-{prompt}", index))  # a completion may have several prompts


def abort(engine: LLMEngine, request_ids: Sequence[str]) -> None:
    """End requests of an LLMEngine by their internal ids, in the engine's processes as well."""
    seam(engine, "abort_request", ["request_ids", "internal"])(list(request_ids), internal=True)


async def abort_async(engine: AsyncLLM, request_ids: Sequence[str]) -> None:
    """End requests of an AsyncLLM by their internal ids, in the engine's processes as well."""
    await seam(engine, "abort", ["request_id", "internal"])(list(request_ids), internal=True)


def has_form(params: SamplingParams | None) -> bool:
    """Whether the engine must compile a form that a client wrote, and hold the answer to it. A request for just any
    JSON has no such form."""
    form = getattr(params, "structured_outputs", None)
    return form is not None and not (form.json_object and form.whitespace_pattern is None)


def is_beam_step(params: SamplingParams) -> bool:
    """Whether these are the parameters of one step of a beam in `LLM.beam_search`: only it gives an LLM parameters that
    the LLM does not copy."""
    return bool(getattr(params, "skip_clone", False) and getattr(params, "max_tokens", None) == 1)


def prompt_length(request: EngineCoreRequest) -> int:
    """The number of tokens of the prompt of an EngineCoreRequest; 0 if the prompt came as embeddings."""
    return len(getattr(request, "prompt_token_ids", None) or ())


def logprobs_of(request: EngineCoreRequest, vocabulary: int) -> tuple[int, int]:
    """How many log-probabilities vLLM gives for the prompt of a request, and for each token of its answer."""

    def each(asked: int | None) -> int:
        return 0 if asked is None else 1 + (asked if asked >= 0 else vocabulary)

    if (params := request.sampling_params) is None:  # pooling
        return 0, 0
    return positions_of(request) * each(params.prompt_logprobs), each(params.num_logprobs)


def delivery_of(params: SamplingParams) -> Literal["whole", "stream", "beam"]:
    """How vLLM's server gives the tokens of an answer: all at once, in chunks, or one by one to a beam search, whose
    answer has them all."""
    from vllm.sampling_params import RequestOutputKind

    if params.output_kind == RequestOutputKind.DELTA:
        return "stream"
    return "whole" if params.output_kind == RequestOutputKind.FINAL_ONLY else "beam"


def is_unread(state: RequestState) -> bool:
    """Whether the chunk of a stream that was made last still waits for its reader. The next is then added to it."""
    return state.queue is not None and state.queue.output is not None


def chunk_of(state: RequestState) -> int:
    """The most tokens in a chunk of a stream, by its request or the server's `--stream-interval`, if it is read."""
    return min(int(state.stream_interval), state.max_tokens_param or sys.maxsize)


def positions_of(request: EngineCoreRequest) -> int:
    """The number of positions of the prompt of an EngineCoreRequest, which may be tokens or embeddings."""
    embeds = getattr(request, "prompt_embeds", None)
    return prompt_length(request) or (0 if embeds is None else len(embeds))


#: The largest number in an embedding that a request brings. The numbers in a model's own embeddings are hundreds of
#: times smaller.
MAX_EMBEDDING = 1e4


def check_numbers(request: EngineCoreRequest) -> None:
    """Raise InvalidInput for embeddings, and for features of images and sounds, from which a model would compute NaN or
    infinity. These values would stay in blocks of the cache, and reach the requests that get these blocks next."""
    given: list[tuple[str, object]] = [("prompt_embeds", getattr(request, "prompt_embeds", None))]
    for feature in getattr(request, "mm_features", None) or ():
        given += [(name, element.data) for name, element in (feature.data or {}).items()]
    for name, value in given:
        most = MAX_EMBEDDING if name.endswith("embeds") else sys.float_info.max
        if not all(float(each.abs().max()) <= most for each in tensors_in(value)):
            what = "finite numbers" if most > MAX_EMBEDDING else f"numbers from {-most:g} to {most:g}"
            raise InvalidInput(f"{name}: holds NaN, infinity or too large a number; accepted: {what}")


#: Fields of `extra_args` that vLLM uses as objects without checking them.
TRANSFERS = ("kv_transfer_params", "ec_transfer_params")


#: The values of sampling parameters with which a request asks for nothing.
_NOTHING: Mapping[str, tuple[object, ...]] = {
    "logprob_token_ids": (None, []),
    "top_k": (None, 0, -1),
    "prompt_logprobs": (None,),
}


def check_fields(request: EngineCoreRequest, unsafe: Mapping[str, str]) -> None:
    """Raise InvalidInput for values that vLLM does not check, and with which it fails later without a message. Raise
    RequestError for the sampling parameters of `unsafe`, which has a reason for each."""
    if not -(2**63) <= request.priority < 2**63:
        raise InvalidInput(f"priority: {brief(request.priority)} is too large; accepted: whole numbers of 64 bits")
    extra = getattr(request.sampling_params, "extra_args", None) or {}
    for name in TRANSFERS:
        if not isinstance(extra.get(name) or {}, dict):
            raise InvalidInput(f"{name}: {brief(extra[name])} is not accepted; accepted: an object")
    for name, reason in unsafe.items():
        if getattr(request.sampling_params, name, None) not in _NOTHING[name]:
            raise RequestError(f"'{name}' is not served here: {reason}", param=name)


def image_spans(request: EngineCoreRequest) -> list[tuple[int, int]]:
    """(first token, number of tokens) of each image, sound or video in the prompt of an EngineCoreRequest."""
    places = (seam(feature, "mm_position") for feature in getattr(request, "mm_features", None) or ())
    return [(int(place.offset), int(place.length)) for place in places]


def answer_length(state: RequestState) -> int:
    """How many tokens the answer of a request of the OutputProcessor has so far. The state outlives the request."""
    detokenizer = getattr(state, "detokenizer", None)
    if detokenizer is not None and hasattr(detokenizer, "num_output_tokens"):
        return int(detokenizer.num_output_tokens())
    return int(getattr(getattr(state, "stats", None), "num_generation_tokens", 0))


def answer_ids(state: RequestState) -> list[int]:
    """The tokens that the answer of a request of the OutputProcessor has so far."""
    return list(seam(seam(state, "detokenizer"), "output_token_ids"))


def tokenizer_of(engine: AsyncLLM | LLMEngine) -> Tokenizer:
    found: Tokenizer | None = getattr(engine, "tokenizer", None)
    if found is None:
        found = seam(seam(engine, "renderer"), "get_tokenizer")()
    return found


def engine_thinking(engine: AsyncLLM | LLMEngine) -> Thinking | None:
    """The tokens of the model's thinking; None if the tokenizer has none or the engine has no tokenizer."""
    if seam(engine.vllm_config.model_config, "skip_tokenizer_init"):
        return None
    return thinking_of(tokenizer_of(engine))


#: Reads a VllmConfig before an engine is constructed from it. If the function returns None, the engine stays as it is.
Prepare = Callable[["VllmConfig"], T | None]
#: Called with a constructed engine, what `Prepare` returned for it, and whether a server uses the engine.
Attach = Callable[[Any, T, bool], None]
#: vLLM's names for what an engine is made for: a Python program, and the batch runner. Any other engine is a server's.
_IN_PYTHON = frozenset({"LLM_CLASS", "ENGINE_CONTEXT"})
_BATCH = "OPENAI_BATCH_RUNNER"


def on_engine_start(prepare: Prepare[T], sync: Attach[T], asynchronous: Attach[T]) -> None:
    """Have `sync` called with every LLMEngine, and `asynchronous` with every AsyncLLM, that was constructed from a
    configuration for which `prepare` did not return None. A second call of this function has no effect."""
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.llm_engine import LLMEngine

    for owner, attach in ((LLMEngine, sync), (AsyncLLM, asynchronous)):
        construct = seam(owner, "__init__", ["vllm_config"])
        if not hasattr(construct, "_steer"):
            owner.__init__ = _attaching(construct, prepare, attach)


def _attaching(construct: Method, prepare: Prepare[T], attach: Attach[T]) -> Method:
    signature = inspect.signature(construct)

    @functools.wraps(construct)
    def constructing(self: object, *args: object, **kwargs: object) -> None:
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        found = prepare(bound.arguments["vllm_config"])
        context = ""
        if found is not None:
            context = usage(bound.arguments)
            check_entry(context)
        with nullcontext() if found is None or context in _IN_PYTHON else _ended_by_signals():
            construct(self, *args, **kwargs)
        if found is None:
            return
        try:
            attach(self, found, context not in _IN_PYTHON)
        except BaseException:  # without this it lives until it is collected, and then ends another engine's groups too
            _shut_down(self)
            raise

    constructing._steer = True  # type: ignore[attr-defined]
    return constructing


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Have a signal that asks a server to stop end it while its engine starts, too: vLLM raises KeyboardInterrupt then,
    and 0.32 drops it where it waits for its engine (`zmq_socket_ctx`). A process without a handler of SIGTERM keeps
    what it has, and a signal that is ignored, or is left to a handler outside of Python, stays so."""

    def end(number: int, _frame: object) -> None:
        raise SystemExit(128 + number)

    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        yield
        return
    asked = (signal.SIGTERM, signal.SIGINT)
    kept = (None, signal.SIG_IGN)
    before = {number: signal.signal(number, end) for number in asked if signal.getsignal(number) not in kept}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _shut_down(engine: object) -> None:
    """End an LLMEngine or AsyncLLM and its workers."""
    shutdown = getattr(engine, "shutdown", None)
    (shutdown if callable(shutdown) else seam(seam(engine, "engine_core"), "shutdown"))()


def before_shutdown(engine: AsyncLLM, wait: Callable[[float], None]) -> None:
    """Have `wait(timeout)` called before this front end's engine client releases the engine: requests that run then
    break off with an error of the engine. A client that has not started the engine releases it at once, whatever the
    timeout."""
    shutdown = seam(engine, "shutdown")

    def waiting(timeout: float | None = None) -> None:
        wait(timeout or 0.0)
        shutdown(timeout=timeout)

    engine.shutdown = waiting


def usage(arguments: Mapping[str, object]) -> str:
    """What an engine is made for, from the arguments of its constructor: a name of vLLM's `UsageContext`."""
    if "usage_context" not in arguments:
        raise UnsupportedModel(f"vLLM {version()}: engines have no parameter usage_context; tested with {TESTED}")
    return str(getattr(arguments["usage_context"], "name", arguments["usage_context"]))


def check_entry(context: str) -> None:
    """Raise UnsupportedModel in a process whose server has no layer of ours: it would drop the steering of requests."""
    if context == _BATCH:
        raise UnsupportedModel(
            "vLLM's batch runner would ignore the field 'steer' of its requests: send them to a server"
        )
    main = getattr(getattr(sys.modules.get("__main__"), "__spec__", None), "name", None)
    for name in {main, *sys.modules}:
        if name and name.startswith("vllm.entrypoints.") and name.endswith(".grpc_server"):
            raise UnsupportedModel("vLLM's gRPC server has no way to request steering: serve HTTP, without --grpc")


def probe_prompt(number: int) -> object:
    """The probe prompt with this number, in the form in which vLLM's renderer gives prompts."""
    from vllm.inputs.engine import tokens_input

    return tokens_input([3 + number + (number + 1) * i for i in range(PROBE_TOKENS)])


#: The number of log-probabilities that are compared at each token of a probe's answer, and of tokens of the answer.
PROBE_LOGPROBS, PROBE_ANSWER = 64, 3


def probe_parameters(config: VllmConfig, spec: str) -> SamplingParams:
    """The sampling parameters of a probe request: greedy, and without the prefix cache. If vLLM allows it, every answer
    has the same tokens, so that all requests have read the same, and reports the log-probabilities of the same tokens
    at every position."""
    import vllm

    vocabulary = vocabulary_of(config)
    asked = list(range(0, vocabulary, max(1, vocabulary // PROBE_LOGPROBS)))[:PROBE_LOGPROBS]
    return vllm.SamplingParams(
        max_tokens=PROBE_ANSWER,
        temperature=0,
        ignore_eos=True,
        detokenize=False,
        logprob_token_ids=asked,
        # vLLM does not accept a bias together with drafts.
        logit_bias={4: 100.0} if config.speculative_config is None else None,
        skip_reading_prefix_cache=True,
        extra_args={"steer": spec},
    )


def answer_of(output: RequestOutput) -> list[tuple[int, dict[int, float]]]:
    """For each token of an answer: the token, and the log-probabilities at its position, by token. The last tokens are
    left out if vLLM has no log-probabilities for them, as can happen with drafts."""
    one = output.outputs[0]
    pairs = zip(one.token_ids, one.logprobs or (), strict=False)
    return [(int(token), {int(t): float(entry.logprob) for t, entry in entries.items()}) for token, entries in pairs]


def client_error(error: Exception) -> Exception:
    """`error` as an exception of the class for which vLLM's server answers with status 400."""
    from vllm.exceptions import VLLMValidationError

    return VLLMValidationError(str(error), parameter=getattr(error, "param", None))


def engine_arguments(model: str, options: Sequence[str]) -> EngineArgs:
    """The `options` of `vllm serve` for an engine, as vLLM parses them. Raises InvalidInput for any other option."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = EngineArgs.add_cli_args(FlexibleArgumentParser(prog="vllm"))
    args, unknown = parser.parse_known_args(["--model", model, *options])
    if unknown:
        raise InvalidInput(f"{' '.join(unknown)}: not an option of this command, and none of vLLM's for an engine")
    return EngineArgs.from_cli_args(args)


def start_offline(arguments: EngineArgs, given: Mapping[str, object], additional: Mapping[str, object]) -> LLM:
    """Start an `LLM` with `arguments`, the options in `given`, and our part of the additional configuration."""
    from vllm import LLM

    config = dict(arguments.additional_config or {}) | dict(additional)
    return LLM(**{**vars(arguments), **given, "additional_config": config})
