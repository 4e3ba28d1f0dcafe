"""vLLM's worker process: the model runner, its batches, the model, and the outputs of a step."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from steer.errors import UnsupportedModel
from steer.runtime.token_index import Tokens
from steer.vllm.internals.base import CORRUPTED, PROBE_TOKENS, Method, news, seam
from steer.vllm.internals.config import vocabulary_of

if TYPE_CHECKING:
    from steer.vllm.internals.types import (
        GPUModelRunner,
        IntermediateTensors,
        ModelRunnerOutput,
        NewRequestData,
        Norm,
        SchedulerOutput,
        VllmConfig,
        Worker,
    )

#: Called with the ids of the requests of a step, in the order of their tokens, the number of tokens of each, the
#: position of the first token of each, and the tokens.
OnBatch = Callable[[list[str], NDArray[np.int32], NDArray[np.int32], Tokens], None]


def platform_worker() -> type:
    """The worker class that vLLM uses on this platform."""
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


#: The methods that the engine calls on workers while it serves, when nothing of ours may take time, and as it ends.
SERVING = {"execute_model", "execute_dummy_batch", "sample_tokens", "take_draft_token_ids", "check_health", "shutdown"}


def around_calls(worker: object, around: Method) -> None:
    """Have `around(method, *arguments)` called in place of every public method of this worker, vLLM's or that of a
    worker extension. Our own methods and those of `SERVING` stay as they are."""
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


def decoder_of(worker: Worker) -> nn.Module:
    """The language model that the worker runs."""
    model = worker.get_model()
    inner: Callable[[], nn.Module] | None = getattr(model, "get_language_model", None)
    return model if inner is None else inner()


def is_elsewhere(block: nn.Module) -> bool:
    """Whether this block runs on another rank of the pipeline."""
    from vllm.model_executor.models.utils import PPMissingLayer

    return isinstance(block, PPMissingLayer)


def open_norms(worker: Worker) -> list[Norm]:
    """The norms of the model that are compiled together with the code around them, and whose formula is that of vLLM's
    `fused_add_rms_norm`.

    What replaces such a norm must be as fast. It must not prevent a fusion: that with a reduction under tensor
    parallelism, or that with quantising if weights are quantised. And it must not hide a stream that is read between
    blocks (EAGLE 3).
    """
    from vllm.config.compilation import CompilationMode
    from vllm.model_executor.layers.layernorm import GemmaRMSNorm, RMSNorm

    config, modules = worker.vllm_config, list(decoder_of(worker).modules())
    compilation = config.compilation_config
    priority = getattr(getattr(config.kernel_config, "ir_op_priority", None), "fused_add_rms_norm", ())
    if (
        compilation.mode == CompilationMode.NONE
        or compilation.backend != "inductor"
        or list(priority)[:1] != ["native"]
        or config.quant_config is not None
        or config.parallel_config.tensor_parallel_size > 1
        or any(getattr(module, "aux_hidden_state_layers", ()) for module in modules)
    ):
        return []

    def is_open(module: Any) -> bool:
        if type(module) is RMSNorm:
            whole = module.pass_weight_add and module.variance_size_override is None
        else:
            whole = type(module) is GemmaRMSNorm
        # It must not run as an operator that the compiler cannot look into, and nobody may have replaced its `forward`.
        return whole and module._forward_method == module.forward_native and "forward" not in vars(module)

    return [module for module in modules if is_open(module)]


def watch_batches(runner: GPUModelRunner, on_batch: OnBatch) -> str:
    """Have `on_batch` called for every real step before its forward pass is enqueued (see `OnBatch`). Returns the kind
    of the runner, "V1" or "V2".

    V2 makes the batch in `prepare_inputs`; V1 has it in `input_batch` when `_prepare_inputs` has run.
    """
    if hasattr(runner, "prepare_inputs"):
        if getattr(runner, "adaptive_verification", None) is not None or getattr(runner, "pcp_manager", None):
            raise UnsupportedModel("the V2 runner reorders tokens here (adaptive verification or context parallelism)")
        prepare = seam(runner, "prepare_inputs", ["scheduler_output"])

        def prepare_v2(scheduler_output: SchedulerOutput, *args: object, **kwargs: object) -> object:
            batch = prepare(scheduler_output, *args, **kwargs)
            starts = getattr(batch, "num_computed_tokens_np", None)
            if starts is None:  # vLLM 0.31 may lack it
                known = starts_of(scheduler_output)
                starts = np.fromiter(map(known.__getitem__, batch.req_ids), np.int32, len(batch.req_ids))
            on_batch(batch.req_ids, batch.num_scheduled_tokens, starts, (batch.input_ids, batch.positions))
            return batch

        runner.prepare_inputs = prepare_v2
        return "V2"
    prepare = seam(runner, "_prepare_inputs", ["scheduler_output", "num_scheduled_tokens"])
    batch = seam(runner, "input_batch")
    for name in ("req_ids", "num_reqs", "num_computed_tokens_cpu"):
        seam(batch, name)
    seam(seam(runner, "input_ids"), "gpu"), seam(runner, "positions")

    def prepare_v1(scheduler_output: SchedulerOutput, num_scheduled_tokens: NDArray[np.int32]) -> object:
        out = prepare(scheduler_output, num_scheduled_tokens)
        batch = runner.input_batch  # read at each step: vLLM replaces it when the KV cache is made
        tokens = runner.input_ids.gpu, runner.positions  # with sampled tokens, which the host may not know yet
        starts = batch.num_computed_tokens_cpu[: batch.num_reqs]
        on_batch(batch.req_ids[: batch.num_reqs], num_scheduled_tokens, starts, tokens)
        return out

    runner._prepare_inputs = prepare_v1
    return "V1"


def keep_seeds(runner: GPUModelRunner) -> None:
    """On a CPU, keep requests with a seed from drawing with it at the end of a part of their prompt. vLLM's V1 runner
    undoes such a draw by setting the offset of the generator. A generator on a CPU has no offset, so the runner fails,
    and the engine ends."""
    if runner.device.type != "cpu" or hasattr(runner, "prepare_inputs"):
        return
    prepare = seam(runner, "_prepare_inputs", ["scheduler_output", "num_scheduled_tokens"])
    for owner, names in ((seam(runner, "input_batch"), ("generators", "req_id_to_index")), (runner, ("requests",))):
        for name in names:
            seam(owner, name)
    seam(seam(runner, "discard_request_mask"), "np")
    kept: list[str] = []  # the requests whose generators are not in the batch

    def preparing(scheduler_output: SchedulerOutput, num_scheduled_tokens: NDArray[np.int32]) -> object:
        batch = runner.input_batch
        for request in kept:
            if (i := batch.req_id_to_index.get(request)) is not None and (own := runner.requests[request].generator):
                batch.generators[i] = own
        out = prepare(scheduler_output, num_scheduled_tokens)
        kept[:] = [batch.req_ids[i] for i in batch.generators if runner.discard_request_mask.np[i]]
        for request in kept:
            del batch.generators[batch.req_id_to_index[request]]
        return out

    runner._prepare_inputs = preparing


def new_prompt_length(new: NewRequestData) -> int:
    """The number of prompt tokens of a request that the scheduler sends for the first time, or again after
    preemption."""
    ids = getattr(new, "prompt_token_ids", None)
    return len(ids if ids is not None else seam(new, "prompt_embeds"))


def prompt_of(new: NewRequestData) -> Sequence[object]:
    """For each position of the prompt of such a request, an object that identifies its content: a token, or a value
    that differs between embeddings or between parts of images."""
    found: list[object] = list(new.prompt_token_ids or [])
    if (embeds := getattr(new, "prompt_embeds", None)) is not None:
        rows = embeds.contiguous().view(torch.uint8).numpy()
        found = [hash((token, row.tobytes())) for token, row in zip_longest(found, rows)]
    for feature in getattr(new, "mm_features", None) or ():
        place = seam(feature, "mm_position")
        found[place.offset : place.offset + place.length] = [(feature.identifier, i) for i in range(place.length)]
    return found


def adapter_of(new: NewRequestData) -> str:
    """The name of the LoRA adapter of such a request; empty if it has none."""
    return str(getattr(getattr(new, "lora_request", None), "lora_name", ""))


#: The key of what a step has found (lost streams, conditions) among the tensors that a rank of a pipeline hands on.
FOUND = "steer.found"


def between_ranks(
    worker: Worker, entering: Callable[[IntermediateTensors | None], None], leaving: Callable[[dict[str, Tensor]], None]
) -> None:
    """In a pipeline, have `entering` called with the IntermediateTensors that the previous rank has sent for a step,
    and `leaving` with the tensors that go to the next rank."""
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
    """A step's output with `change` applied to its ModelRunnerOutput. If this output is still on its way to the host,
    `change` is applied when it is read, on the thread that reads it. None for None: a rank whose outputs are not read
    may have none."""
    if out is None:
        return None
    if not hasattr(out, "get_output"):
        return change(out)
    get = out.get_output
    out.get_output = lambda: change(get())
    return out


def with_news(output: ModelRunnerOutput, lost: Mapping[str, int], decided: Mapping[str, bool]) -> ModelRunnerOutput:
    """A ModelRunnerOutput that reports requests of its step that are lost, with the positions of their first lost
    tokens, and whether the conditions of requests hold that have decided this."""
    found = (lost.keys() | decided.keys()) & seam(output, "req_id_to_index").keys()
    if not found:
        return output
    counted = getattr(output, CORRUPTED) or {}
    reports = {request: counted.get(request, 0) + news(lost.get(request), decided.get(request)) for request in found}
    changed = copy.copy(output)  # vLLM shares one output among steps without requests
    setattr(changed, CORRUPTED, {**counted, **reports})
    return changed


def starts_of(scheduler_output: SchedulerOutput) -> dict[str, int]:
    """For each request of a step, the position of its first token in this step."""
    cached = seam(scheduler_output, "scheduled_cached_reqs")
    starts = dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
    return starts | {new.req_id: new.num_computed_tokens for new in scheduler_output.scheduled_new_reqs}


@contextmanager
def eager(config: VllmConfig, tokens: int) -> Iterator[None]:
    """A context in which the model's own Python runs, compiled or not, without KV cache and attention metadata."""
    from vllm import forward_context
    from vllm.config import set_current_vllm_config

    set_forward_context = seam(forward_context, "set_forward_context", ["skip_compiled"])
    with (
        torch.inference_mode(),
        set_current_vllm_config(config),
        set_forward_context(None, config, num_tokens=tokens, skip_compiled=True),
    ):
        yield


def probe(worker: Worker) -> Tensor:
    """Run one eager pass over fixed token ids on this rank, and return what the rank hands on, `[tokens, d_model]`
    float32.

    This is collective: every rank of the engine must call it at the same time.
    """
    config, model, device = worker.vllm_config, worker.get_model(), worker.device
    vocabulary = vocabulary_of(config)
    ids = (torch.arange(PROBE_TOKENS, device=device) * 7 + 11) % vocabulary
    positions = torch.arange(PROBE_TOKENS, device=device)
    if getattr(worker.model_runner, "uses_mrope", False):
        positions = positions.expand(3, -1).contiguous()
    if config.lora_config is not None:  # layers with adapters read which tokens have one: none here
        none = (0,) * PROBE_TOKENS
        seam(worker.model_runner, "_set_active_loras")(none, none, set())
    with eager(config, PROBE_TOKENS), _repeatable_attention(model):
        out = model(input_ids=ids, positions=positions, **_from_the_rank_before(worker, model, device))
    if isinstance(out, tuple):
        out = out[0]
    if not isinstance(out, Tensor):  # IntermediateTensors: the stream is the sum of these tensors
        parts = [t.float() for t in out.tensors.values() if t.shape[0] == PROBE_TOKENS]
        out = torch.stack(parts).sum(0)
    return out.float()


def run_eager(worker: Worker) -> Callable[[], None]:
    """Have the model's own Python run for every request from now on, in place of compiled code and captured graphs.
    Returns a function that undoes this."""
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
            if module._compiled_call_impl is not None:  # set by torch.compile itself, as in vLLM's mode 1
                put(module, "_compiled_call_impl", None)
        # Neither runner replays a graph, whole or in pieces, while its flags say that none was captured.
        if not hasattr(runner, "prepare_inputs"):
            put(seam(runner, "cudagraph_dispatcher"), "keys_initialized", False)
        elif (graphs := getattr(runner, "cudagraph_manager", None)) is not None:
            put(graphs, "_graphs_captured", False)
        elif worker.vllm_config.compilation_config.cudagraph_mode:  # with a mode, a runner that serves has a manager
            seam(runner, "cudagraph_manager")
    except BaseException:
        undo()
        raise
    return undo


def replicated(stream: Tensor) -> bool:
    """Whether every tensor-parallel rank has this float32 tensor. This is collective among these ranks."""
    from vllm.distributed import get_tensor_model_parallel_world_size, tensor_model_parallel_all_reduce

    ranks = int(get_tensor_model_parallel_world_size())
    if ranks == 1:
        return True
    mean = tensor_model_parallel_all_reduce(stream.clone()) / ranks
    return float((mean - stream).norm()) <= 1e-3 * float(stream.norm())


@contextmanager
def _repeatable_attention(model: nn.Module) -> Iterator[None]:
    """A context in which attention layers return their queries. Without attention metadata a backend may leave memory
    that it never wrote in its result, or in the argument that takes its result."""
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

    # This replaces `forward`, in place of a hook: vLLM's backend for transformers' modelling code calls it directly.
    layers = [m for m in model.modules() if isinstance(m, AttentionLayerBase)]
    for layer in layers:
        layer.forward = repeatable(layer.forward)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _like(query: Tensor, output: Tensor) -> Tensor:
    """A new tensor of the shape of `output`, with the values of `query` if it has as many, otherwise with zeros."""
    return query.reshape(output.shape).clone() if query.numel() == output.numel() else torch.zeros_like(output)


def _from_the_rank_before(
    worker: Worker, model: nn.Module, device: torch.device
) -> dict[str, IntermediateTensors | None]:
    """The model's keyword argument for the tensors of the previous rank: None on the first rank of a pipeline, and
    fixed random values on the others."""
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
