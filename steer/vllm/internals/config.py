"""A VllmConfig: what Steer reads from it, and the options with which steering cannot be right. In every process."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from steer.errors import UnsupportedModel
from steer.hf.load import text_architecture

if TYPE_CHECKING:
    from steer.vllm.internals.types import KVTransferConfig, VllmConfig

log = logging.getLogger("steer")

#: Connectors that find KV blocks elsewhere by vLLM's own block hashes, which contain the salt of steered requests.
HASHED_CONNECTORS = ("OffloadingConnector", "SimpleCPUOffloadConnector", "MooncakeStoreConnector")
#: Connectors between instances for prefill and instances for decoding. They send blocks by request, and no instance
#: knows how the other has steered the blocks that it sends.
DISAGGREGATED = ("NixlConnector", "NixlPullConnector", "NixlPushConnector", "MooncakeConnector", "MoRIIOConnector")
#: vLLM's environment variable for a front end that is written in Rust: no code of ours runs there.
RUST_FRONTEND = "VLLM_USE_RUST_FRONTEND"
#: Executors that call the worker's own methods, in the order of the engine's calls.
EXECUTORS = {"UniProcExecutor", "MultiprocExecutor"}


def check_config(config: VllmConfig, *, readout: bool) -> None:
    """Raise UnsupportedModel with every option of `config` that makes steering wrong: with it the tokens of a step are
    not in the order of its requests, or are not in this process, or workers or blocks come from a source that does not
    know the steering.

    Args:
        readout: whether the engine is started with read-out.
    """
    parallel, model, drafts = config.parallel_config, config.model_config, config.speculative_config
    passes = getattr(getattr(config, "compilation_config", None), "pass_config", None)
    found = {
        "microbatching (--enable-dbo, --ubatch-size) is on": getattr(parallel, "use_ubatching", False),
        "prefill context parallelism is on": getattr(parallel, "prefill_context_parallel_size", 1) > 1,
        "experts are run sequence-parallel, so blocks hand on a part of the tokens (tensor, data and expert "
        "parallelism together with this --all2all-backend)": getattr(parallel, "use_sequence_parallel_moe", False),
        "sequence parallelism (pass_config.enable_sp or fuse_gemm_comms) is on, so blocks hand on a part of the "
        "tokens": getattr(passes, "enable_sp", False) or getattr(passes, "fuse_gemm_comms", False),
        "--enable-elastic-ep is on: workers that come later have no directions": getattr(
            parallel, "enable_elastic_ep", False
        ),
        "--enable-fault-tolerance is on: workers forget requests that the front end goes on with": getattr(
            parallel, "enable_fault_tolerance", False
        ),
        f"vLLM's Rust front end would ignore the field 'steer': unset {RUST_FRONTEND}": _switched_on(RUST_FRONTEND),
        "weights are offloaded with VLLM_WEIGHT_OFFLOADING_DISABLE_UVA, which runs a module's hooks twice; unset "
        "it": _switched_on("VLLM_WEIGHT_OFFLOADING_DISABLE_UVA") and _offloads(config),
        "--kv-sharing-fast-prefill is on": getattr(config.cache_config, "kv_sharing_fast_prefill", False),
        "the model is an encoder-decoder": getattr(model, "is_encoder_decoder", False),
        "the model is a diffusion model": getattr(model, "is_diffusion", False),
        "the model does not generate": getattr(model, "runner_type", "generate") != "generate",
        "--readout is given together with --speculative-config (how many drafts are kept is known too late): leave "
        "one out": readout and drafts is not None,
        "adaptive verification of drafts is on": getattr(drafts, "enable_adaptive_verification", False),
    }
    problems = [problem for problem, holds in found.items() if holds]
    problems += _executor_problems(getattr(parallel, "distributed_executor_backend", None))
    problems += _connector_problems(getattr(config, "kv_transfer_config", None))
    if problems:
        raise UnsupportedModel(f"steering cannot be right here: {'; '.join(problems)}")


def unsafe_fields(config: VllmConfig, runner: str) -> dict[str, str]:
    """The sampling parameters with which one request would harm others in its batch, each with the fault of vLLM that
    is the reason. Also logs which answers vLLM gets wrong on a CPU.

    Args:
        runner: the kind of the workers' model runner, "V1" or "V2".
    """
    found: dict[str, str] = {}
    if runner == "V1":
        found["logprob_token_ids"] = (
            "vLLM's model runner V1 would give all requests of the batch the log-probabilities of these tokens"
        )
    if config.device_config.device_type == "cpu" and config.speculative_config is not None:
        log.warning("on a CPU, vLLM's drafts give requests without a temperature wrong tokens beside sampled requests")
        found["top_k"] = (
            "with --speculative-config on a CPU it ends vLLM's engine. Without it in the request, it is the model's "
            "default: start the server with --generation-config vllm"
        )
    if config.device_config.device_type == "cpu" and config.lora_config is not None:
        log.warning("on a CPU, vLLM can give requests the LoRA adapters of others in their batch")
        found["prompt_logprobs"] = "with --enable-lora on a CPU it ends vLLM's engine"
    return found


def _switched_on(variable: str) -> bool:
    """Whether this environment variable of vLLM is set to anything but 0, as vLLM reads it."""
    return os.environ.get(variable, "0") not in ("", "0")


def _offloads(config: VllmConfig) -> bool:
    offload = getattr(config, "offload_config", None)
    return bool(getattr(getattr(offload, "uva", None), "cpu_offload_gb", 0))


def _executor_problems(backend: object) -> list[str]:
    """The problems with this executor: it must call the worker's methods."""
    if backend == "ray" and os.environ.get("VLLM_USE_RAY_V2_EXECUTOR_BACKEND", "1") in ("", "0"):
        return ["the old Ray executor runs models past their workers; unset VLLM_USE_RAY_V2_EXECUTOR_BACKEND"]
    if backend in (None, "uni", "mp", "ray", "external_launcher"):
        return []
    if isinstance(backend, str):
        from vllm.utils.import_utils import resolve_obj_by_qualname

        backend = resolve_obj_by_qualname(backend)
    if EXECUTORS & {one.__name__ for one in getattr(backend, "__mro__", ())}:
        return []
    return [f"the executor {backend!r} is not one of vLLM's or made from one: it may pass workers by"]


def _connector_problems(transfer: KVTransferConfig | None) -> list[str]:
    """The problems with the KV connectors. Only the hashes of blocks keep steered and plain blocks apart, so a
    connector must find blocks by their hashes."""
    if transfer is None or transfer.kv_connector is None:
        return []
    given = transfer.kv_connector, transfer.kv_connector_module_path, transfer.kv_connector_extra_config
    problems = [problem for each in _connectors(*given) if (problem := _connector_problem(*each))]
    if getattr(transfer, "kv_load_failure_policy", "fail") != "fail":
        problems.append(
            "the KV connector's kv_load_failure_policy is not 'fail': a step whose blocks failed to load would decide "
            "conditions, and find tokens not finite, before it is run again"
        )
    return problems


def _connectors(name: str, module: str | None, extra: Mapping[str, Any]) -> Iterator[tuple[str, str | None]]:
    """Each connector, with the module that it is loaded from; None for a connector of vLLM."""
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
    """Whether blocks may outlive this process, or come from another one."""
    transfer = getattr(config, "kv_transfer_config", None)
    return transfer is not None and transfer.kv_connector is not None


def context_of(config: VllmConfig) -> int:
    """The largest number of tokens that a prompt with its answer can have."""
    return int(config.model_config.max_model_len)


def vocabulary_of(config: VllmConfig) -> int:
    """The number of the model's tokens."""
    return int(config.model_config.get_vocab_size())


def dimensions_of(config: VllmConfig) -> tuple[str, int, int]:
    """(architecture of the text model, number of layers of the whole model, d_model)."""
    model = config.model_config
    text = model.hf_text_config
    architectures = getattr(model.hf_config, "architectures", None) or [model.architecture]
    architecture = text_architecture(text.model_type, str(architectures[0]))
    return architecture, int(text.num_hidden_layers), int(model.get_hidden_size())


def dtype_of(config: VllmConfig) -> str:
    return str(config.model_config.dtype).removeprefix("torch.")


def max_tokens(config: VllmConfig) -> int:
    """The largest number of tokens, padding included, that one forward pass can have."""
    sizes = getattr(config.compilation_config, "cudagraph_capture_sizes", None) or [0]
    return int(max(config.scheduler_config.max_num_batched_tokens, *sizes)) + 64


def max_requests(config: VllmConfig) -> int:
    """The largest number of requests that one forward pass can have. The key of vLLM's compile cache contains it."""
    return int(config.scheduler_config.max_num_seqs)
