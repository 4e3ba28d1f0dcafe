"""The vLLM objects that Steer touches, for type checking only: at run time only the protocols exist. Protocols describe
small objects, which are read and changed outside `internals`; large objects, which only `internals` uses, are names.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, Self, TypeAlias

import torch
from torch import nn

if TYPE_CHECKING:
    from vllm import LLM as LLM
    from vllm.config import KVTransferConfig as KVTransferConfig
    from vllm.config import ModelConfig as ModelConfig
    from vllm.config import VllmConfig as VllmConfig
    from vllm.engine.arg_utils import EngineArgs as EngineArgs
    from vllm.logprobs import Logprob as Logprob
    from vllm.outputs import CompletionOutput as CompletionOutput
    from vllm.outputs import RequestOutput as RequestOutput
    from vllm.sequence import IntermediateTensors as IntermediateTensors
    from vllm.v1.engine import EngineCoreOutput as EngineCoreOutput
    from vllm.v1.engine.async_llm import AsyncLLM as AsyncLLM
    from vllm.v1.engine.llm_engine import LLMEngine as LLMEngine
    from vllm.v1.engine.output_processor import OutputProcessor as OutputProcessor
    from vllm.v1.engine.output_processor import RequestState as RequestState
    from vllm.v1.outputs import ModelRunnerOutput as ModelRunnerOutput
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner as GPUModelRunner

    class Norm(nn.Module):
        """RMSNorm or GemmaRMSNorm."""

        weight: torch.Tensor
        variance_epsilon: float
        forward_native: Callable[..., Any]


#: Calls a method on every worker of every engine, by name, with its arguments, and waits for their answers.
Call: TypeAlias = Callable[..., list[Any]]
#: The same on the event loop that drives the engine.
CallAsync: TypeAlias = Callable[..., Awaitable[list[Any]]]


class SamplingParams(Protocol):
    extra_args: Mapping[str, object] | None

    def clone(self) -> Self: ...


class EngineRequest(Protocol):
    """An EngineCoreRequest: what the front end hands to an engine, with sampling_params where it generates."""

    request_id: str
    sampling_params: SamplingParams | None
    cache_salt: str | None
    priority: int


class NewRequest(Protocol):
    """A NewRequestData: a request that a worker meets for the first time, or again after preemption. Of one that came
    as embeddings there are no token ids."""

    req_id: str
    sampling_params: SamplingParams | None
    prompt_token_ids: Sequence[int] | None
    num_computed_tokens: int


class CachedRequests(Protocol):
    """The requests of a step that its worker knows."""

    req_ids: Sequence[str]
    num_computed_tokens: Sequence[int]


class SchedulerOutput(Protocol):
    """What the engine has scheduled for a step."""

    finished_req_ids: Iterable[str]
    scheduled_new_reqs: Sequence[NewRequest]
    scheduled_cached_reqs: CachedRequests
    total_num_scheduled_tokens: int


class Worker(Protocol):
    vllm_config: VllmConfig
    model_config: ModelConfig
    model_runner: GPUModelRunner
    device: torch.device

    def get_model(self) -> nn.Module: ...
