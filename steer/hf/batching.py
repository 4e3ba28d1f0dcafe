"""The engine on transformers' continuous batching. Everything that knows its internals is in this file.

Tested with transformers 5.19.0. What it relies on, checked at start:

* `ContinuousBatchProcessor.prepare_next_batch()` fills `inputs_and_outputs.requests_in_batch`, in whose order tokens
  are packed, each entry with `.state.request_id`, `.query_length` and `.has_new_token`: wrapped, to fill the index
  and the read-out;
* `ModelRunner._sample(scores, output_ids)` picks tokens from `[1, requests, vocabulary]`: replaced by our sampler,
  since its own has no per-request seed, min-p or top log-probabilities;
* results arrive through `register_result_handler`, whose entries in `output_router.result_handlers` we drop on cancel.

Its prefix sharing hashes prompt tokens only, so it would hand a plain request the blocks of a steered one: it is off.
CUDA graphs and asynchronous steps are off too, since index and sampler change between steps on the host.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from steer.errors import EngineFailed, UnsupportedModel
from steer.hf.attach import PROBE_TOKENS, Steering
from steer.hf.engine import Engine, SequentialEngine
from steer.hf.sampling import Sampler, Sampling, Token, sample
from steer.runtime.index import RequestSteer
from steer.runtime.readout import RequestRead

log = logging.getLogger("steer")
#: On a CPU the manager would otherwise take all memory for its cache.
CPU_PAGE, CPU_CACHE_TOKENS, CPU_BATCH_TOKENS = 32, 16384, 512
#: Tokens of the greedy probe that batched and plain passes must agree on.
PROBE_LENGTH = 4
#: How far their log-probabilities may be apart: rounding of other batch shapes, no more.
AGREE = {torch.float64: 1e-3, torch.float32: 1e-3}


@dataclass(slots=True)
class _Running:
    """A request inside the manager. Written by the model's thread, read by the event loop after each delivery."""

    steer: RequestSteer | None
    read: RequestRead | None
    sampler: Sampler
    tokens: list[Token]


class BatchingEngine(Engine):
    """Plain and steered requests mixed in one continuous batch."""

    def __init__(
        self,
        steering: Steering,
        eos_ids: Sequence[int],
        *,
        context: int,
        capacity: int,
        cache_tokens: int | None = None,
    ) -> None:
        self.description = "continuous batching"
        self._requests: dict[str, _Running] = {}
        self._scorer = ThreadPoolExecutor(1, thread_name_prefix="steer-score")
        self._readers: list[str] = []  # the requests that the running pass reads, in its order
        anatomy = steering.anatomy
        config = ContinuousBatchingConfig(
            allow_block_sharing=False, use_cuda_graph=False, use_async_batching=False, max_queue_size=0
        )
        if anatomy.device.type == "cpu":
            config.page_size = CPU_PAGE
            tokens = cache_tokens or max(CPU_CACHE_TOKENS, context)
            config.num_blocks = -(-tokens // CPU_PAGE)
            config.max_batch_tokens = CPU_BATCH_TOKENS
        elif cache_tokens:
            config.num_blocks = -(-cache_tokens // config.page_size)
        greedy = GenerationConfig(do_sample=False, max_new_tokens=context, eos_token_id=-1, pad_token_id=0)
        self.manager = anatomy.model.init_continuous_batching(
            generation_config=greedy, continuous_batching_config=config
        )
        self.manager.warmup()
        self._processor = self.manager.batch_processor
        _check_seams(self.manager, self._processor)
        room = self._processor.cache.max_tokens_read
        super().__init__(steering, eos_ids, context=min(context, room), capacity=capacity)
        steering.resize(self._processor.max_batch_tokens)
        self._prepare_next_batch = self._processor.prepare_next_batch
        self._processor.prepare_next_batch = self._prepare
        self._processor.model_runner._sample = self._sample

    def start(self) -> None:
        self.steering.attach()
        self.manager.start()

    def stop(self) -> None:
        self._scorer.shutdown(wait=True, cancel_futures=True)
        with suppress(RuntimeError):
            self.manager.stop(block=True, timeout=10, hard_stop=True)
        self.manager.destroy()
        self.steering.detach()

    @property
    def healthy(self) -> bool:
        return bool(self.manager.is_running()) and self.manager.background_thread_status.fatal_error is None

    async def _generate(
        self,
        request_id: str,
        prompt: Sequence[int],
        sampling: Sampling,
        steer: RequestSteer | None,
        read: RequestRead | None,
    ) -> AsyncGenerator[Token, None]:
        arrivals: asyncio.Queue[Any] = asyncio.Queue()
        running = self._requests[request_id] = _Running(steer, read, Sampler.of(sampling), [])
        self.manager.register_result_handler(request_id, arrivals.put_nowait)
        done = False
        try:
            eos = -1 if sampling.ignore_eos else list(self.eos_ids) or -1
            accepted = self.manager.add_request(
                list(prompt), request_id, max_new_tokens=sampling.max_tokens, streaming=True, eos_token_id=eos
            )
            if accepted is None:
                raise EngineFailed("the engine is stopping or has failed and takes no request")
            sent = 0
            while not done:
                output = await arrivals.get()
                done = output.is_finished()
                if output.error is not None:
                    raise EngineFailed(f"the engine failed: {output.error}")
                while sent < len(output.generated_tokens):
                    yield running.tokens[sent]
                    sent += 1
        finally:
            if not done:
                self.manager.cancel_request(request_id)
            with self.manager.output_router._lock:
                self.manager.output_router.result_handlers.pop(request_id, None)
            self._requests.pop(request_id, None)

    async def score(self, ids: Sequence[int], steer: RequestSteer | None, top: int) -> list[Token]:
        def alone() -> list[Token]:
            with self.manager.pause():
                return self._score(ids, steer, top)

        # One thread: several may hold the pause at once, and there is one index.
        return await asyncio.get_running_loop().run_in_executor(self._scorer, alone)

    def _prepare(self) -> bool:
        """Model thread, before each forward pass: the token index follows the packed order of the batch."""
        if not self._prepare_next_batch():
            return False
        batch = self._processor.inputs_and_outputs.requests_in_batch
        known = [self._requests.get(entry.state.request_id) for entry in batch]
        lengths = [entry.query_length for entry in batch]
        self.steering.fill([r.steer if r else None for r in known], lengths)
        reads = [r.read if r and entry.has_new_token else None for r, entry in zip(known, batch, strict=True)]
        self.steering.reads.fill(reads, lengths)
        self._readers = [entry.state.request_id for entry, read in zip(batch, reads, strict=True) if read]
        return True

    def _sample(self, scores: Tensor, output_ids: Tensor) -> None:
        """Model thread, after each forward pass: one token for each request whose prompt is read to its end."""
        batch = [e for e in self._processor.inputs_and_outputs.requests_in_batch if e.has_new_token]
        if not batch:
            return
        running = [self._requests.get(entry.state.request_id) for entry in batch]
        idle = Sampler(Sampling(max_tokens=1, temperature=0.0))  # for a request that was cancelled during this pass
        tokens = sample(scores[0, : len(batch)], [r.sampler if r else idle for r in running])
        readings = dict(zip(self._readers, self.steering.reads.collect(), strict=True))
        for entry, request, token in zip(batch, running, tokens, strict=True):
            if request:
                reading = readings.get(entry.state.request_id)
                request.tokens.append(replace(token, reading=reading) if reading else token)
        output_ids[0, : len(tokens)].copy_(torch.tensor([t.id for t in tokens], dtype=output_ids.dtype))


def start_engine(
    steering: Steering, eos_ids: Sequence[int], *, context: int, capacity: int, cache_tokens: int | None = None
) -> Engine:
    """A started engine: batching where a probe shows that batched and plain passes agree, else one at a time."""
    try:
        engine: Engine = BatchingEngine(
            steering, eos_ids, context=context, capacity=capacity, cache_tokens=cache_tokens
        )
        engine.start()
        try:
            _verify(engine)
        except BaseException:
            engine.stop()
            raise
        return engine
    except UnsupportedModel:
        raise
    except Exception as error:
        log.warning(
            "this model cannot be batched (%s: %s): requests are served one at a time", type(error).__name__, error
        )
    engine = SequentialEngine(steering, eos_ids, context=context, capacity=capacity)
    engine.start()
    return engine


def _verify(engine: Engine) -> None:
    """Greedy tokens of two interleaved prompts of the running batch against plain forward passes."""
    anatomy = engine.steering.anatomy
    span = max(anatomy.vocabulary - 1, 1)
    prompts = [[(i * step + 5) % span for i in range(PROBE_TOKENS)] for step in (3, 7)]
    sampling = Sampling(max_tokens=PROBE_LENGTH, temperature=0.0, ignore_eos=True, logprobs=0)

    async def ask() -> list[list[Token]]:
        async def one(prompt: list[int]) -> list[Token]:
            return [token async for token in engine.generate(prompt, sampling, None)]

        answers = await asyncio.wait_for(asyncio.gather(*map(one, prompts)), timeout=120)
        whole = [p + [t.id for t in a] for p, a in zip(prompts, answers, strict=True)]
        scored = [await engine.score(ids, None, 1) for ids in whole]
        for answer, scores in zip(answers, scored, strict=True):
            for token, score in zip(answer, scores[PROBE_TOKENS - 1 :], strict=True):
                if abs((token.logprob or 0.0) - (score.logprob or 0.0)) > AGREE.get(anatomy.dtype, 0.1):
                    raise RuntimeError(f"batched log-probability {token.logprob} where {score.logprob} is right")
        return answers

    asyncio.run(ask())


def _check_seams(manager: Any, processor: Any) -> None:
    needed = {
        "ContinuousBatchingManager.register_result_handler": hasattr(manager, "register_result_handler"),
        "ContinuousBatchingManager.pause": hasattr(manager, "pause"),
        "OutputRouter.result_handlers": hasattr(getattr(manager, "output_router", None), "result_handlers"),
        "ContinuousBatchProcessor.prepare_next_batch": hasattr(processor, "prepare_next_batch"),
        "ContinuousBatchProcessor.model_runner._sample": hasattr(getattr(processor, "model_runner", None), "_sample"),
        "ContinuousBatchingIOs.requests_in_batch": hasattr(processor.inputs_and_outputs, "requests_in_batch"),
    }
    missing = [name for name, there in needed.items() if not there]
    if missing:
        raise UnsupportedModel(f"this version of transformers lacks {', '.join(missing)}, which Steer relies on")
