"""All that Steer knows of vLLM's internals: one function for each seam, each of which fails with a sentence.

Supported are the releases that the tests run with. An older one is refused, a newer one is warned of, and a seam that
is missing stops the start and is named.
"""

from __future__ import annotations

import asyncio
import copy
import functools
import inspect
import logging
import os
import re
import sys
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias, TypeVar

import numpy as np
import torch
from fastapi import FastAPI
from numpy.typing import NDArray
from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic_core import SchemaValidator
from starlette.applications import Starlette
from starlette.routing import BaseRoute
from torch import Tensor, nn

from steer.errors import InvalidInput, UnsupportedModel
from steer.serve import token_usage
from steer.tokenization import Decoder

if TYPE_CHECKING:
    from steer.vllm.types import (
        LLM,
        AsyncLLM,
        EngineArgs,
        EngineCoreOutput,
        EngineRequest,
        GPUModelRunner,
        InputProcessor,
        IntermediateTensors,
        KVTransferConfig,
        LLMEngine,
        ModelRunnerOutput,
        NewRequest,
        OutputProcessor,
        RequestOutput,
        RequestState,
        SamplingParams,
        SchedulerOutput,
        VllmConfig,
        Worker,
    )

T = TypeVar("T")
#: A method of vLLM's, or what goes around it.
Method: TypeAlias = Callable[..., Any]

log = logging.getLogger("steer")

#: The first and the last release of vLLM that the tests run with.
SUPPORTED = ("0.31.0", "0.32.0")
TESTED = " and ".join(SUPPORTED)
PROBE_TOKENS = 8

WORKER = "steer.vllm.worker.Worker"

#: Called with the ids of the requests of a step, in the order of their tokens, and the tokens of each.
OnBatch = Callable[[list[str], NDArray[np.int32]], None]


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
    """Raise UnsupportedModel for a vLLM older than the supported ones; warn where it is newer, or does not say."""
    first, last = (_release(text) for text in SUPPORTED)
    found = _release(version())
    if found and found < first:
        raise UnsupportedModel(f"vLLM {version()} is too old: steering is supported with vLLM {TESTED}")
    if not found or found > last:
        log.warning("vLLM %s is not among the versions that Steer was tested with: %s", version(), TESTED)


def _release(text: str) -> tuple[int, ...]:
    """(major, minor) of a version; empty where it has none."""
    found = re.match(r"(\d+)\.(\d+)", text)
    return tuple(map(int, found.groups())) if found and any(map(int, found.groups())) else ()


# -- configuration ---------------------------------------------------------------------------------------------------


#: Connectors that take KV blocks from elsewhere by vLLM's own block hashes, which contain the salt of steered requests.
HASHED_CONNECTORS = ("OffloadingConnector", "SimpleCPUOffloadConnector", "MooncakeStoreConnector")
#: Connectors between instances for prefill and for decoding: blocks go by request, and no instance knows how the
#: other steered what it sends.
DISAGGREGATED = ("NixlConnector", "NixlPullConnector", "NixlPushConnector", "MooncakeConnector", "MoRIIOConnector")
#: vLLM's variable for a front end in which nothing of ours runs.
RUST_FRONTEND = "VLLM_USE_RUST_FRONTEND"
RUST_PROBLEM = f"vLLM's Rust front end would ignore the field 'steer': unset {RUST_FRONTEND}"
#: Executors that call the worker's own methods, in the order in which the engine asked.
EXECUTORS = {"UniProcExecutor", "MultiprocExecutor"}


def check_config(config: VllmConfig, *, readout: bool) -> None:
    """Raise UnsupportedModel with every option under which the tokens of a step are not in the order of its requests,
    or not in this process, or under which workers or blocks come from where steering is not known. `config`:
    VllmConfig; `readout`: are tokens read."""
    parallel, problems = config.parallel_config, []

    def refuse(bad: object, problem: str) -> None:
        if bad:
            problems.append(problem)

    passes = getattr(getattr(config, "compilation_config", None), "pass_config", None)
    refuse(getattr(parallel, "use_ubatching", False), "microbatching (--enable-dbo, --ubatch-size) is on")
    refuse(getattr(parallel, "prefill_context_parallel_size", 1) > 1, "prefill context parallelism is on")
    refuse(
        getattr(parallel, "use_sequence_parallel_moe", False),
        "experts are run sequence-parallel, so blocks hand on a part of the tokens (tensor, data and expert "
        "parallelism together with this --all2all-backend)",
    )
    refuse(
        getattr(passes, "enable_sp", False) or getattr(passes, "fuse_gemm_comms", False),
        "sequence parallelism (pass_config.enable_sp or fuse_gemm_comms) is on, so blocks hand on a part of the tokens",
    )
    refuse(
        getattr(parallel, "enable_elastic_ep", False),
        "--enable-elastic-ep is on: workers that come later have no directions",
    )
    refuse(
        getattr(parallel, "enable_fault_tolerance", False),
        "--enable-fault-tolerance is on: workers forget requests that the front end goes on with",
    )
    refuse(*_executor_problem(getattr(parallel, "distributed_executor_backend", None)))
    refuse(_switched_on(RUST_FRONTEND), RUST_PROBLEM)
    refuse(
        _switched_on("VLLM_WEIGHT_OFFLOADING_DISABLE_UVA") and _offloads(config),
        "weights are offloaded with VLLM_WEIGHT_OFFLOADING_DISABLE_UVA, which runs a module's hooks twice; unset it",
    )
    problems += _connector_problems(getattr(config, "kv_transfer_config", None))
    refuse(getattr(config.cache_config, "kv_sharing_fast_prefill", False), "--kv-sharing-fast-prefill is on")
    refuse(getattr(config.model_config, "is_encoder_decoder", False), "the model is an encoder-decoder")
    refuse(getattr(config.model_config, "is_diffusion", False), "the model is a diffusion model")
    refuse(getattr(config.model_config, "runner_type", "generate") != "generate", "the model does not generate")
    refuse(
        readout and config.speculative_config is not None,
        "the read-out is on together with drafts (how many of them are kept is known too late)",
    )
    refuse(
        getattr(config.speculative_config, "enable_adaptive_verification", False),
        "adaptive verification of drafts is on",
    )
    refuse(
        getattr(parallel, "_api_process_count", 1) > 1,
        "there are several API server processes; use --api-server-count 1",
    )
    if problems:
        raise UnsupportedModel(f"steering cannot be right here: {'; '.join(problems)}")


def _switched_on(variable: str) -> bool:
    """Is this variable of vLLM's set to something but 0, as vLLM reads it?"""
    return os.environ.get(variable, "0") not in ("", "0")


def _offloads(config: VllmConfig) -> bool:
    offload = getattr(config, "offload_config", None)
    return bool(getattr(getattr(offload, "uva", None), "cpu_offload_gb", 0))


def _executor_problem(backend: object) -> tuple[bool, str]:
    """Does this executor go past the worker's methods? And the sentence."""
    if backend == "ray":
        old = os.environ.get("VLLM_USE_RAY_V2_EXECUTOR_BACKEND", "1") in ("", "0")
        return old, "the old Ray executor runs models past their workers; unset VLLM_USE_RAY_V2_EXECUTOR_BACKEND"
    if backend in (None, "uni", "mp", "external_launcher"):
        return False, ""
    if isinstance(backend, str):
        from vllm.utils.import_utils import resolve_obj_by_qualname

        backend = resolve_obj_by_qualname(backend)
    names = {one.__name__ for one in getattr(backend, "__mro__", ())}
    return (
        not names & EXECUTORS,
        f"the executor {backend!r} is not one of vLLM's or made from one: it may pass workers by",
    )


def _connector_problems(transfer: KVTransferConfig | None) -> list[str]:
    """What keeps steered and plain blocks apart is in their hashes, so a connector must go by those."""
    if transfer is None or transfer.kv_connector is None:
        return []
    return [
        problem
        for name, module in _connectors(
            transfer.kv_connector, transfer.kv_connector_module_path, transfer.kv_connector_extra_config
        )
        if (problem := _connector_problem(name, module))
    ]


def _connectors(name: str, module: str | None, extra: Mapping[str, Any]) -> Iterator[tuple[str, str | None]]:
    """Each connector, and the module that it is loaded from where that is not vLLM's."""
    if name != "MultiConnector" or module:
        yield name, module
        return
    for child in extra.get("connectors", ()):
        yield from _connectors(
            child.get("kv_connector", "None"),
            child.get("kv_connector_module_path"),
            child.get("kv_connector_extra_config", {}),
        )


def _connector_problem(name: str, module: str | None) -> str | None:
    if module:
        return f"the KV connector {name} comes from {module}, of which it is not known how it tells blocks apart"
    if name in HASHED_CONNECTORS:
        return None
    if name in DISAGGREGATED:
        return (
            f"the KV connector {name} hands blocks between instances by request, and no instance knows how the other "
            "steered them"
        )
    return (
        f"the KV connector {name} does not go by vLLM's block hashes, so plain and steered requests could get each "
        f"other's blocks; those that do: {', '.join(HASHED_CONNECTORS)}"
    )


def shares_blocks(config: VllmConfig) -> bool:
    """May blocks outlive this process, or come from another?"""
    transfer = getattr(config, "kv_transfer_config", None)
    return transfer is not None and transfer.kv_connector is not None


def context_of(config: VllmConfig) -> int:
    """The most tokens that a prompt with its answer can have."""
    return int(config.model_config.max_model_len)


def shape_of(config: VllmConfig) -> tuple[str, int, int]:
    """(architecture, layers of the whole model, d_model)."""
    model = config.model_config
    architectures = getattr(model.hf_config, "architectures", None) or [model.architecture]
    return str(architectures[0]), int(model.hf_text_config.num_hidden_layers), int(model.get_hidden_size())


def stream_dtype(config: VllmConfig) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, dtype_of(config))
    return dtype


def dtype_of(config: VllmConfig) -> str:
    return str(config.model_config.dtype).removeprefix("torch.")


# -- the worker process ----------------------------------------------------------------------------------------------


def platform_worker() -> type:
    """The worker class that vLLM would take on this platform."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        from vllm.v1.worker.cpu_worker import CPUWorker

        base: type = CPUWorker
    elif current_platform.is_xpu():
        from vllm.v1.worker.xpu_worker import XPUWorker

        base = XPUWorker
    elif current_platform.is_cuda_alike():
        from vllm.v1.worker.gpu_worker import Worker

        base = Worker
    else:
        raise UnsupportedModel(f"no worker is known for vLLM's platform {type(current_platform).__name__}")
    for name in ("load_model", "execute_model", "execute_dummy_batch", "get_model", "init_device"):
        seam(base, name)
    return base


#: What the engine asks of workers while it serves, where nothing of ours may take time, and as it ends.
SERVING = {"execute_model", "execute_dummy_batch", "sample_tokens", "take_draft_token_ids", "check_health", "shutdown"}


def around_calls(worker: object, around: Method) -> None:
    """Have `around(method, *arguments)` called in place of every public method of this worker that is neither asked for
    while it serves nor our own: vLLM's, and those of a worker extension."""
    for name in dir(type(worker)):
        if name.startswith(("_", "steer_")) or name in SERVING:
            continue
        if inspect.isfunction(inspect.getattr_static(type(worker), name)):
            setattr(worker, name, _around(getattr(worker, name), around))


def _around(method: Method, around: Method) -> Method:
    @functools.wraps(method)
    def calling(*args: object, **kwargs: object) -> object:
        return around(method, *args, **kwargs)

    return calling


def max_tokens(config: VllmConfig) -> int:
    """The most tokens, padding included, that one forward pass can have."""
    sizes = getattr(config.compilation_config, "cudagraph_capture_sizes", None) or [0]
    return int(max(config.scheduler_config.max_num_batched_tokens, *sizes)) + 64


def max_requests(config: VllmConfig) -> int:
    """The most requests that one forward pass can have. vLLM's compile cache knows this number."""
    return int(config.scheduler_config.max_num_seqs)


def decoder_of(worker: Worker) -> nn.Module:
    """The language model that the worker runs."""
    model = worker.get_model()
    inner: Callable[[], nn.Module] | None = getattr(model, "get_language_model", None)
    return model if inner is None else inner()


def is_elsewhere(block: nn.Module) -> bool:
    """Does this block run on another rank of the pipeline?"""
    from vllm.model_executor.models.utils import PPMissingLayer

    return isinstance(block, PPMissingLayer)


def watch_batches(runner: GPUModelRunner, on_batch: OnBatch) -> str:
    """Have `on_batch` called for every real step, before its forward pass is enqueued. Returns the runner's kind.

    V2 makes the batch in `prepare_inputs`; V1 has it in `input_batch` when `_prepare_inputs` has run.
    """
    if hasattr(runner, "prepare_inputs"):
        if getattr(runner, "adaptive_verification", None) is not None or getattr(runner, "pcp_manager", None):
            raise UnsupportedModel("the V2 runner reorders tokens here (adaptive verification or context parallelism)")
        prepare = seam(runner, "prepare_inputs", ["scheduler_output"])

        def prepare_v2(*args: object, **kwargs: object) -> object:
            batch = prepare(*args, **kwargs)
            on_batch(batch.req_ids, batch.num_scheduled_tokens)
            return batch

        runner.prepare_inputs = prepare_v2
        return "V2"
    prepare = seam(runner, "_prepare_inputs", ["scheduler_output", "num_scheduled_tokens"])
    batch = seam(runner, "input_batch")
    for name in ("req_ids", "num_reqs"):
        seam(batch, name)

    def prepare_v1(scheduler_output: SchedulerOutput, num_scheduled_tokens: NDArray[np.int32]) -> object:
        out = prepare(scheduler_output, num_scheduled_tokens)
        batch = runner.input_batch  # read anew: vLLM replaces it when the KV cache is made
        on_batch(batch.req_ids[: batch.num_reqs], num_scheduled_tokens)
        return out

    runner._prepare_inputs = prepare_v1
    return "V1"


def new_prompt_length(new: NewRequest) -> int:
    """Prompt tokens of a request that the scheduler sends for the first time, or again after preemption."""
    ids = getattr(new, "prompt_token_ids", None)
    return len(ids if ids is not None else seam(new, "prompt_embeds"))


def adapter_of(new: NewRequest) -> str:
    """The name of the LoRA adapter of such a request; empty without one."""
    return str(getattr(getattr(new, "lora_request", None), "lora_name", ""))


#: The key of lost tokens among the tensors that a rank of a pipeline hands on.
LOST = "steer.lost"
#: The field by which vLLM tells of a request whose output is corrupted. It counts NaNs in the lower bits; above them is
#: the position of the first lost token, plus one.
CORRUPTED, ABOVE = "num_nans_in_logits", 32


def between_ranks(
    worker: Worker, entering: Callable[[IntermediateTensors | None], None], leaving: Callable[[dict[str, Tensor]], None]
) -> None:
    """In a pipeline, have `entering` called with the IntermediateTensors that the rank before has sent for a step, and
    `leaving` with the tensors that go to the next."""
    if worker.vllm_config.parallel_config.pipeline_parallel_size == 1:
        return
    from vllm.sequence import IntermediateTensors

    execute = seam(worker.model_runner, "execute_model", ["scheduler_output", "intermediate_tensors"])

    def executing(
        scheduler_output: SchedulerOutput,
        intermediate_tensors: IntermediateTensors | None = None,
        *args: object,
        **kwargs: object,
    ) -> object:
        entering(intermediate_tensors)
        out = execute(scheduler_output, intermediate_tensors, *args, **kwargs)
        if isinstance(out, IntermediateTensors):
            leaving(out.tensors)
        return out

    worker.model_runner.execute_model = executing


def on_output(out: Any, change: Callable[[ModelRunnerOutput], ModelRunnerOutput]) -> object:
    """A step's output with `change` applied to its ModelRunnerOutput, at once or, where that is still on its way to
    the host, when it is read, on whichever thread. A rank whose outputs nobody reads may have none."""
    if out is None:
        return None
    if not hasattr(out, "get_output"):
        return change(out)
    get = out.get_output
    out.get_output = lambda: change(get())
    return out


def with_losses(output: ModelRunnerOutput, lost: Mapping[str, int]) -> ModelRunnerOutput:
    """A ModelRunnerOutput that tells of requests of its step that are lost, by the positions of their first lost
    tokens."""
    there = seam(output, "req_id_to_index")
    found = {request: position for request, position in lost.items() if request in there}
    if not found:
        return output
    counted = getattr(output, CORRUPTED) or {}
    told = {request: counted.get(request, 0) + ((position + 1) << ABOVE) for request, position in found.items()}
    changed = copy.copy(output)  # one without requests is shared
    setattr(changed, CORRUPTED, {**counted, **told})
    return changed


def starts_of(scheduler_output: SchedulerOutput) -> dict[str, int]:
    """For each request of a step the position of its first token in it."""
    cached = seam(scheduler_output, "scheduled_cached_reqs")
    starts = dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
    return starts | {new.req_id: new.num_computed_tokens for new in scheduler_output.scheduled_new_reqs}


@contextmanager
def eager(config: VllmConfig, tokens: int) -> Iterator[None]:
    """Inside it the model's own Python runs, compiled or not, with no KV cache and no attention metadata."""
    from vllm.config import set_current_vllm_config
    from vllm.forward_context import set_forward_context

    seam(set_forward_context, "__call__")
    if "skip_compiled" not in inspect.signature(set_forward_context).parameters:
        raise UnsupportedModel(f"vLLM {version()}: set_forward_context has no skip_compiled; tested with {TESTED}")
    with (
        torch.inference_mode(),
        set_current_vllm_config(config),
        set_forward_context(None, config, num_tokens=tokens, skip_compiled=True),
    ):
        yield


def probe(worker: Worker) -> Tensor:
    """One eager pass over fixed token ids on this rank: what it hands on, `[tokens, d_model]` float32.

    Collective: every rank of the engine must call it at the same time.
    """
    config, model, device = worker.vllm_config, worker.get_model(), worker.device
    vocabulary = int(config.model_config.get_vocab_size())
    ids = (torch.arange(PROBE_TOKENS, device=device) * 7 + 11) % vocabulary
    positions = torch.arange(PROBE_TOKENS, device=device)
    if getattr(worker.model_runner, "uses_mrope", False):
        positions = positions.expand(3, -1).contiguous()
    if config.lora_config is not None:  # layers with adapters read which tokens have one: here none has
        none = (0,) * PROBE_TOKENS
        seam(worker.model_runner, "_set_active_loras")(none, none, set())
    with eager(config, PROBE_TOKENS), _repeatable_attention(model):
        out = model(input_ids=ids, positions=positions, **_from_the_rank_before(worker, model, device))
    if isinstance(out, tuple):
        out = out[0]
    if not isinstance(out, Tensor):  # IntermediateTensors: the stream is the sum of what is handed on
        parts = [t.float() for t in out.tensors.values() if t.shape[0] == PROBE_TOKENS]
        out = torch.stack(parts).sum(0)
    return out.float()


def run_eager(worker: Worker) -> Callable[[], None]:
    """From now on the model's own Python runs for every request, in place of what was compiled and captured. Returns
    what undoes it."""
    from vllm.compilation.wrapper import TorchCompileWithNoGuardsWrapper

    before: list[tuple[object, str, object]] = []

    def put(owner: object, name: str, value: object) -> None:
        before.append((owner, name, seam(owner, name)))
        setattr(owner, name, value)

    def undo() -> None:
        while before:
            setattr(*before.pop())

    try:
        runner = worker.model_runner
        for module in worker.get_model().modules():
            if isinstance(module, TorchCompileWithNoGuardsWrapper):
                put(module, "do_not_compile", True)
            if module._compiled_call_impl is not None:  # torch.compile's own, as in vLLM's mode 1
                put(module, "_compiled_call_impl", None)
        # Neither runner replays a graph, whole or in pieces, while it holds that none was captured.
        if not hasattr(runner, "prepare_inputs"):
            put(seam(runner, "cudagraph_dispatcher"), "keys_initialized", False)
        elif (graphs := getattr(runner, "cudagraph_manager", None)) is not None:
            put(graphs, "_graphs_captured", False)
        elif worker.vllm_config.compilation_config.cudagraph_mode:  # with a mode there is a manager once it serves
            seam(runner, "cudagraph_manager")
    except BaseException:
        undo()
        raise
    return undo


def replicated(stream: Tensor) -> bool:
    """Has every tensor-parallel rank this float32 tensor? Collective among them."""
    from vllm.distributed import get_tensor_model_parallel_world_size, tensor_model_parallel_all_reduce

    ranks = int(get_tensor_model_parallel_world_size())
    if ranks == 1:
        return True
    mean = tensor_model_parallel_all_reduce(stream.clone()) / ranks
    return float((mean - stream).norm()) <= 1e-3 * float(stream.norm())


@contextmanager
def _repeatable_attention(model: nn.Module) -> Iterator[None]:
    """Without attention metadata a backend may leave memory that it never wrote, returned or in an argument that it
    was to write; here attention gives its queries."""
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

    def repeatable(forward: Method) -> Method:
        names = list(inspect.signature(forward).parameters)

        def queries(*args: object, **kwargs: object) -> object:
            output = forward(*args, **kwargs)
            query, *rest = [
                (name, value)
                for name, value in [*zip(names, args, strict=False), *kwargs.items()]
                if isinstance(value, Tensor) and value.is_floating_point()
            ]
            if isinstance(output, Tensor):
                return _like(query[1], output)
            if output is None:
                for _, written in [one for one in rest if "out" in one[0]] or rest:
                    written.copy_(_like(query[1], written))
            return output

        return queries

    # `forward` itself, not a hook: vLLM's backend for transformers' modelling code calls it without the module's call.
    layers = [m for m in model.modules() if isinstance(m, AttentionLayerBase)]
    for layer in layers:
        layer.forward = repeatable(layer.forward)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _like(query: Tensor, output: Tensor) -> Tensor:
    """A new tensor of the shape of `output` with the values of `query`, where it has as many."""
    return query.reshape(output.shape).clone() if query.numel() == output.numel() else torch.zeros_like(output)


def _from_the_rank_before(
    worker: Worker, model: nn.Module, device: torch.device
) -> dict[str, IntermediateTensors | None]:
    from vllm.distributed import get_pp_group

    if get_pp_group().is_first_rank:
        return {"intermediate_tensors": None}
    made = seam(model, "make_empty_intermediate_tensors")(
        batch_size=PROBE_TOKENS, dtype=worker.model_config.dtype, device=device
    )
    generator = torch.Generator().manual_seed(1)
    for tensor in made.tensors.values():
        tensor.copy_(torch.randn(tensor.shape, generator=generator).to(tensor.dtype))
    return {"intermediate_tensors": made}


# -- the front end ---------------------------------------------------------------------------------------------------


def call_workers(engine: LLMEngine, method: str, *args: object) -> list[Any]:
    """Call `method` on every worker of an `LLMEngine`; their answers. On the thread that drives the engine.

    Where the engine is in this process it stops with its last request, whose end the workers hear of in the next step.
    """
    core = getattr(engine.engine_core, "engine_core", None)
    if core is not None and not engine.has_unfinished_requests() and core.scheduler.has_finished_requests():
        engine.step()
    return list(seam(engine, "collective_rpc")(method, args=args))


def engines_of(engine: AsyncLLM) -> int:
    """The engines that an `AsyncLLM` drives: several where it balances data parallelism itself."""
    return len(getattr(engine.engine_core, "core_engines", None) or [None])


async def call_workers_async(engine: AsyncLLM, method: str, *args: object) -> list[Any]:
    """The same for an `AsyncLLM`, and for every engine where there are several (data parallel): vLLM's own
    `collective_rpc` reaches all of them but answers for the first alone."""
    client = engine.engine_core
    if engines_of(engine) > 1:
        one, many = seam(client, "_call_utility_async"), client.core_engines
        answers = await asyncio.gather(*(one("collective_rpc", method, None, args, None, engine=e) for e in many))
        return [answer for each in answers for answer in each]
    return list(await seam(engine, "collective_rpc")(method, args=args))


def wrap_process_inputs(inputs: InputProcessor, change: Callable[[EngineRequest], None]) -> None:
    """Have `change` applied to every EngineCoreRequest that this InputProcessor makes, on whichever thread."""
    process = seam(inputs, "process_inputs", ["prompt", "params"])

    def processing(*args: object, **kwargs: object) -> object:
        request = process(*args, **kwargs)
        change(request)
        return request

    inputs.process_inputs = processing
    if (threaded := getattr(inputs, "process_inputs_async", None)) is not None:

        async def processing_threaded(*args: object, **kwargs: object) -> object:
            request = await threaded(*args, **kwargs)
            change(request)
            return request

        inputs.process_inputs_async = processing_threaded


def wrap_requests(
    outputs: OutputProcessor,
    adds: Callable[[EngineRequest], None],
    added: Callable[[EngineRequest, RequestState], None],
    ended: Callable[[str], None],
    watched: Mapping[str, object],
    lost: Callable[[str], Exception],
) -> None:
    """Have `adds` called with each EngineCoreRequest before the OutputProcessor takes it, `added` with it and the state
    that is kept for it afterwards, and `ended` with the id of each `watched` request that the OutputProcessor has let
    go: finished, stopped by a string, or aborted. One whose stream was lost is ended with what `lost` gives for its id:
    raised in whoever reads an AsyncLLM's answer, told by the finish reason `error` in an LLM's."""
    add, process, abort = (
        seam(outputs, "add_request"),
        seam(outputs, "process_outputs"),
        seam(outputs, "abort_requests"),
    )
    states = seam(outputs, "request_states")

    def adding(request: EngineRequest, *args: object, **kwargs: object) -> object:
        adds(request)
        try:
            out = add(request, *args, **kwargs)
        except BaseException:
            if request.request_id not in states:  # it was not taken, so nobody will end it
                ended(request.request_id)
            raise
        if (state := states.get(request.request_id)) is not None:
            added(request, state)
            token_usage.current().answer(lambda: answer_length(state))
        return out

    def processing(engine_core_outputs: Sequence[EngineCoreOutput], *args: object, **kwargs: object) -> object:
        fallen: list[str] = []
        if watched:
            engine_core_outputs, fallen = _without_lost(engine_core_outputs, states, watched, lost)
        try:
            out = process(engine_core_outputs, *args, **kwargs)
            if fallen:
                seam(out, "reqs_to_abort").extend(fallen)  # the engine goes on with them
            return out
        finally:
            if watched:
                for one in engine_core_outputs:
                    if one.request_id in watched and one.request_id not in states:
                        ended(one.request_id)

    def aborting(*args: object, **kwargs: object) -> object:
        out = abort(*args, **kwargs)
        for request_id in out:
            ended(request_id)
        return out

    outputs.add_request, outputs.process_outputs, outputs.abort_requests = adding, processing, aborting


def _without_lost(
    outputs: Sequence[EngineCoreOutput],
    states: Mapping[str, RequestState],
    watched: Mapping[str, object],
    lost: Callable[[str], Exception],
) -> tuple[Sequence[EngineCoreOutput], list[str]]:
    """EngineCoreOutputs with an end in the place of each that tells of a loss, and the requests that have it."""
    found = [one.request_id for one in outputs if getattr(one, CORRUPTED) >> ABOVE and one.request_id in watched]
    found = [request_id for request_id in found if request_id in states]
    if not found:
        return outputs, []
    from vllm.v1.engine import EngineCoreOutput, FinishReason

    fallen: dict[str, str] = {}
    for request_id in found:
        error = lost(request_id)
        fallen[request_id] = str(error)
        if (queue := getattr(states[request_id], "queue", None)) is not None:
            # before the output, which it then takes no more; other answers to the same request end with this one
            queue.put(client_error(error))
            others = (name for name, state in states.items() if getattr(state, "queue", None) is queue)
            fallen |= dict.fromkeys(others, str(error))
    ends = [
        EngineCoreOutput(
            request_id=request_id,
            new_token_ids=[],
            finish_reason=FinishReason.ERROR,
            stop_reason=why,
        )
        for request_id, why in fallen.items()
    ]
    return [*(one for one in outputs if one.request_id not in fallen), *ends], list(fallen)


def abort(engine: LLMEngine, request_ids: Sequence[str]) -> None:
    """End requests of an LLMEngine by their internal ids, in its processes as well."""
    seam(engine, "abort_request", ["request_ids", "internal"])(list(request_ids), internal=True)


async def abort_async(engine: AsyncLLM, request_ids: Sequence[str]) -> None:
    """End requests of an AsyncLLM by their internal ids, in its processes as well."""
    await seam(engine, "abort", ["request_id", "internal"])(list(request_ids), internal=True)


def prompt_length(request: EngineRequest) -> int:
    """Tokens of the prompt of an EngineCoreRequest; 0 where it came as embeddings."""
    return len(getattr(request, "prompt_token_ids", None) or ())


def answer_length(state: RequestState) -> int:
    """Tokens that a request of the OutputProcessor has by now. Its state outlives its end."""
    detokenizer = getattr(state, "detokenizer", None)
    if detokenizer is not None and hasattr(detokenizer, "num_output_tokens"):
        return int(detokenizer.num_output_tokens())
    return int(getattr(getattr(state, "stats", None), "num_generation_tokens", 0))


def answer_ids(state: RequestState) -> list[int]:
    """The same tokens themselves."""
    return list(seam(seam(state, "detokenizer"), "output_token_ids"))


def tokenizer_of(engine: AsyncLLM) -> Decoder:
    """The tokenizer of an AsyncLLM."""
    found: Decoder | None = getattr(engine, "tokenizer", None)
    if found is None:
        found = seam(seam(engine, "renderer"), "get_tokenizer")()
    return found


#: Reads a VllmConfig before an engine is constructed from it; None leaves the engine alone.
Prepare = Callable[["VllmConfig"], T | None]
#: Called with a constructed engine, what `Prepare` gave for it, and whether it is a server's.
Attach = Callable[[Any, T, bool], None]
#: For whom an engine is made, as vLLM names it: a Python program, or the batch runner. Any other is a server's.
_IN_PYTHON = frozenset({"LLM_CLASS", "ENGINE_CONTEXT"})
_BATCH = "OPENAI_BATCH_RUNNER"


def on_engine_start(prepare: Prepare[T], sync: Attach[T], asynchronous: Attach[T]) -> None:
    """Have `sync` called with every LLMEngine and `asynchronous` with every AsyncLLM that has been constructed from a
    configuration for which `prepare` gave something. Doing it twice is doing it once."""
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
        construct(self, *args, **kwargs)
        if found is None:
            return
        try:
            attach(self, found, context not in _IN_PYTHON)
        except BaseException:  # or it lives on until it is collected, and takes another engine's groups with it
            _shut_down(self)
            raise

    constructing._steer = True  # type: ignore[attr-defined]
    return constructing


def _shut_down(engine: object) -> None:
    """End an LLMEngine or AsyncLLM and the workers behind it."""
    shutdown = getattr(engine, "shutdown", None)
    (shutdown if callable(shutdown) else seam(seam(engine, "engine_core"), "shutdown"))()


def usage(arguments: Mapping[str, object]) -> str:
    """For whom an engine is made, from the arguments of its constructor: a name of vLLM's `UsageContext`."""
    if "usage_context" not in arguments:
        raise UnsupportedModel(f"vLLM {version()}: engines have no parameter usage_context; tested with {TESTED}")
    return str(getattr(arguments["usage_context"], "name", arguments["usage_context"]))


def check_entry(context: str) -> None:
    """Raise UnsupportedModel in a process whose server has no layer of ours, and would drop what requests ask for."""
    if context == _BATCH:
        raise UnsupportedModel(
            "vLLM's batch runner would ignore the field 'steer' of its requests: send them to a server"
        )
    main = getattr(getattr(sys.modules.get("__main__"), "__spec__", None), "name", None)
    for name in {main, *sys.modules}:
        if name and name.startswith("vllm.entrypoints.") and name.endswith(".grpc_server"):
            raise UnsupportedModel("vLLM's gRPC server has no way to ask for steering: serve HTTP, without --grpc")
    check_rust()


def check_rust() -> None:
    """Raise UnsupportedModel where vLLM's front end written in Rust serves, in which nothing of ours runs."""
    if _switched_on(RUST_FRONTEND):
        raise UnsupportedModel(RUST_PROBLEM)


def probe_prompt(number: int) -> object:
    """One of several prompts, as the renderer makes it."""
    from vllm.inputs.engine import tokens_input

    return tokens_input([3 + number + (number + 1) * i for i in range(PROBE_TOKENS)])


#: Log-probabilities that are compared at each token of a probe's answer, and the answer's tokens.
PROBE_LOGPROBS, PROBE_ANSWER = 64, 3


def probe_parameters(config: VllmConfig, spec: str) -> SamplingParams:
    """Greedy and without the prefix cache. Where vLLM can, every answer has the same tokens, so that all have read the
    same, and tells of the same tokens in every place."""
    import vllm

    vocabulary = int(config.model_config.get_vocab_size())
    asked = list(range(0, vocabulary, max(1, vocabulary // PROBE_LOGPROBS)))[:PROBE_LOGPROBS]
    made: SamplingParams = vllm.SamplingParams(
        max_tokens=PROBE_ANSWER,
        temperature=0,
        ignore_eos=True,
        detokenize=False,
        logprob_token_ids=asked,
        # Drafts are not taken together with a bias.
        logit_bias={4: 100.0} if config.speculative_config is None else None,
        skip_reading_prefix_cache=True,
        extra_args={"steer": spec},
    )
    return made


def answer_of(output: RequestOutput) -> list[tuple[int, dict[int, float]]]:
    """Of an answer's tokens: which it is, and log-probabilities by token; as far as vLLM has them, which with drafts is
    not for every token that it gives."""
    one = output.outputs[0]
    pairs = zip(one.token_ids, one.logprobs or (), strict=False)
    return [(int(token), {int(t): float(entry.logprob) for t, entry in entries.items()}) for token, entries in pairs]


def client_error(error: Exception) -> Exception:
    """`error` as the class that vLLM's server answers with a 400."""
    from vllm.exceptions import VLLMValidationError

    made: Exception = VLLMValidationError(str(error), parameter=getattr(error, "param", None))
    return made


# -- offline ---------------------------------------------------------------------------------------------------------


def engine_arguments(model: str, options: Sequence[str]) -> EngineArgs:
    """`options` of `vllm serve` that make an engine, as vLLM parses them. Raises InvalidInput for any other."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = EngineArgs.add_cli_args(FlexibleArgumentParser(prog="vllm"))
    args, unknown = parser.parse_known_args(["--model", model, *options])
    if unknown:
        raise InvalidInput(f"{' '.join(unknown)}: not an option of this command, and none of vLLM's for an engine")
    return EngineArgs.from_cli_args(args)


def start_offline(arguments: EngineArgs, given: Mapping[str, object], additional: Mapping[str, object]) -> LLM:
    """An `LLM` from `arguments` with the options of `given` and our part of the additional configuration."""
    from vllm import LLM

    config = dict(arguments.additional_config or {}) | dict(additional)
    return LLM(**{**vars(arguments), **given, "additional_config": config})


# -- the server ------------------------------------------------------------------------------------------------------


def on_app_built(check: Callable[[FastAPI], None]) -> None:
    """Have `check` called with the app of the server that runs in this process, if one does, before it serves: in
    whichever of vLLM's modules its builder is, `__main__` among them."""
    for name, home in list(sys.modules.items()):
        if name == "__main__" or name.startswith("vllm.entrypoints."):
            build = vars(home).get("build_app") if home is not None else None
            if build is not None and not hasattr(build, "_steer"):
                vars(home)["build_app"] = _checking(build, check)


def _checking(build: Callable[..., FastAPI], check: Callable[[FastAPI], None]) -> Callable[..., FastAPI]:
    @functools.wraps(build)
    def building(*args: object, **kwargs: object) -> FastAPI:
        app = build(*args, **kwargs)
        check(app)
        return app

    building._steer = True  # type: ignore[attr-defined]
    return building


def fail_fast(route: BaseRoute) -> None:
    """Have a body for this route of FastAPI's refused at the first wrong item of a list. Items of vLLM's types are one
    of dozens, and each wrong one has a problem with every one of them: of 15 kB of empty objects a million problems are
    made, and the event loop waits for all of them."""
    field = getattr(route, "body_field", None)
    if field is not None:
        adapter = seam(field, "_type_adapter")
        adapter.validator = SchemaValidator(_fail_fast(seam(adapter, "core_schema")))


#: Parts of a schema of pydantic's that hold no schema of what is checked.
_NO_SCHEMAS = frozenset(("cls", "default", "expected", "function", "metadata", "serialization"))


def _fail_fast(schema: Any) -> Any:
    if isinstance(schema, Mapping):
        copied = {key: each if key in _NO_SCHEMAS else _fail_fast(each) for key, each in schema.items()}
        return copied | {"fail_fast": True} if schema.get("type") in ("list", "set", "frozenset", "tuple") else copied
    return [_fail_fast(each) for each in schema] if isinstance(schema, list) else schema


def problems_of(route: BaseRoute | None, body: Mapping[str, object]) -> list[dict[str, object]]:
    """What is wrong with the fields of a body for this route of FastAPI's, each looked at alone, as pydantic tells it.
    vLLM's own checks of a whole body run before its fields are, and fail in ways of their own."""
    field = getattr(route, "body_field", None)
    model = getattr(getattr(field, "field_info", None), "annotation", None)
    found: list[dict[str, object]] = []
    for name in sorted(body.keys() & getattr(model, "model_fields", {}).keys()):
        try:
            _adapter(model, name).validate_python(body[name])
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            found.append({**first, "loc": ("body", name, *first["loc"])})
        except Exception as error:  # vLLM's own, which pydantic lets through
            found.append({"type": "value_error", "loc": ("body", name), "input": None, "ctx": {"error": str(error)}})
    return found


@functools.cache
def _adapter(model: type[BaseModel], name: str) -> TypeAdapter[object]:
    field = model.model_fields[name]
    kind: Any = Annotated[field.annotation, field]
    adapter: TypeAdapter[object] = TypeAdapter(kind)
    adapter.validator = SchemaValidator(_fail_fast(adapter.core_schema))
    return adapter


#: Of a frame that runs a route's function: what is raised before one is raised by the making of its arguments.
ENDPOINT = "run_endpoint_function"


def of_the_body(error: BaseException) -> bool:
    """Was this raised in a FastAPI route before its function ran, by what reads and checks the body?"""
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_name == ENDPOINT:
            return False
        trace = trace.tb_next
    return True


def served_names(app: Starlette) -> list[str]:
    """All names under which models are served: the base model's, and adapters'."""
    models = seam(app.state, "openai_serving_models")
    names = [path.name for path in seam(models, "base_model_paths")]
    return names + list(getattr(models, "lora_requests", None) or ())


def server_arguments(model: str, options: Sequence[str]) -> Namespace:
    """`vllm serve MODEL OPTIONS` as vLLM parses it."""
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    launchers = _launchers()
    parser = launchers["make_arg_parser"](FlexibleArgumentParser(prog="steer serve --backend vllm"))
    args: Namespace = parser.parse_args([model, *options])
    if getattr(args, "model_tag", None) is not None:
        args.model = args.model_tag
    launchers["validate_parsed_serve_args"](args)
    if (getattr(args, "api_server_count", None) or 1) > 1:
        raise UnsupportedModel("steering needs one API server process: leave --api-server-count out")
    args.api_server_count = None
    return args


def run_server(args: Namespace, keep_alive: int) -> None:
    """vLLM's OpenAI server in this process; returns when it has been stopped. `keep_alive`: seconds that an idle
    connection is kept, where the environment does not say."""
    import uvloop
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup

    os.environ.setdefault("VLLM_HTTP_TIMEOUT_KEEP_ALIVE", str(keep_alive))
    cli_env_setup()
    uvloop.run(_launchers()["run_server"](args))


def _launchers() -> dict[str, Callable[..., Any]]:
    """The functions behind `vllm serve`, which moved in 0.32."""
    import importlib

    homes = {
        "make_arg_parser": ("vllm.entrypoints.launchers.cli_args", "vllm.entrypoints.openai.cli_args"),
        "validate_parsed_serve_args": ("vllm.entrypoints.launchers.cli_args", "vllm.entrypoints.openai.cli_args"),
        "run_server": ("vllm.entrypoints.launchers.api_server.entry", "vllm.entrypoints.openai.api_server"),
    }
    found: dict[str, Callable[..., Any]] = {}
    for name, modules in homes.items():
        for module in modules:
            try:
                found[name] = getattr(importlib.import_module(module), name)
                break
            except (ImportError, AttributeError):
                continue
        else:
            raise UnsupportedModel(f"vLLM {version()}: the seam {name} is in none of {modules}; tested with {TESTED}")
    return found


def serves(model: str, revision: str | None) -> bool:
    """Does vLLM know the architecture of this model? False where its configuration cannot be read."""
    from transformers import AutoConfig
    from vllm import ModelRegistry

    try:
        config = AutoConfig.from_pretrained(model, revision=revision)
    except (OSError, ValueError):
        return False
    known = set(ModelRegistry.get_supported_archs())
    return any(architecture in known for architecture in getattr(config, "architectures", None) or ())
