"""The types of the vLLM objects that Steer touches, for type checking only. Code outside `internals` reads and changes
only small objects. If vLLM is installed, their types are checked against vLLM's own classes (see mypy's settings).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

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
    from vllm.sampling_params import SamplingParams as SamplingParams
    from vllm.sequence import IntermediateTensors as IntermediateTensors
    from vllm.v1.core.sched.output import NewRequestData as NewRequestData
    from vllm.v1.core.sched.output import SchedulerOutput as SchedulerOutput
    from vllm.v1.engine import EngineCoreOutput as EngineCoreOutput
    from vllm.v1.engine import EngineCoreRequest as EngineCoreRequest
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


#: Calls the method with this name, with these arguments, on every worker of every engine, and waits for the answers.
Call: TypeAlias = Callable[..., list[Any]]
#: The same on the event loop that drives the engine.
CallAsync: TypeAlias = Callable[..., Awaitable[list[Any]]]


class Requests(Protocol):
    """Who is told of the requests of an engine."""

    @property
    def held(self) -> Mapping[str, object]:
        """The requests, by id, of whose end it is told."""

    def check_added(self, request: EngineCoreRequest) -> None:
        """Told of each request before the OutputProcessor takes it."""

    def has_added(
        self, request: EngineCoreRequest, state: RequestState
    ) -> Callable[[int | None], Exception | None] | None:
        """Told afterwards, with the state that is kept for the request.

        Returns:
            what is then told the number of tokens of each output of the request, and None after its end. It returns
            the error with which the request has to end, or None. None if nobody counts the tokens of this request.
        """

    def let_go(self, request_id: str) -> None:
        """Told of the end of a held request: it has finished, was stopped by a string, or was aborted."""

    def lost(self, request_id: str) -> Exception:
        """Told that the stream of a held request was lost. Returns the error with which the request ends: it is raised
        where the answer of an AsyncLLM is read, and an answer of an LLM has the finish reason `error`."""

    def decided(self, request_id: str, holds: bool) -> None:
        """Told whether the condition of a held request holds, before any of its output is processed."""


class Worker(Protocol):
    """The parts of vLLM's worker that Steer uses."""

    vllm_config: VllmConfig
    model_config: ModelConfig
    model_runner: GPUModelRunner
    device: torch.device

    def get_model(self) -> nn.Module: ...
