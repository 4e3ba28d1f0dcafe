"""The engine on transformers' continuous batching, and the choice of the engine for a model. `internals` lists the
parts of transformers that this engine needs."""

from __future__ import annotations

import asyncio
import gc
import itertools
import logging
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from steer.errors import EngineFailed, NotFinite, RequestFailed
from steer.hf import internals
from steer.hf.engine import Engine, SequentialEngine
from steer.hf.sampling import Sampler, Sampling, Token, sample
from steer.hf.selfcheck import SelfCheckFailed, self_check
from steer.hf.steering import Steering
from steer.readout import Readout
from steer.runtime.readout import Reading
from steer.runtime.token_index import RequestSteer

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.generation.continuous_batching.requests import GenerationOutput

log = logging.getLogger("steer")
#: Seconds without a pass, while requests wait, after which the engine counts as stuck. No pass takes as long.
STUCK = 300.0
#: The page size, cache size and batch size on a CPU, in tokens. Without these limits the manager would take all memory
#: for its cache.
CPU_PAGE, CPU_CACHE_TOKENS, CPU_BATCH_TOKENS = 32, 16384, 512


@dataclass(slots=True)
class _Running:
    """A request inside the manager. The model's thread writes it, and the event loop reads it after each delivery."""

    steer: RequestSteer | None
    read: Readout | None
    sampler: Sampler
    tokens: list[Token]
    failed: RequestFailed | None = None

    def fail(self, error: RequestFailed) -> None:
        """End the request with `error`, unless it has failed already."""
        self.failed = self.failed or error


class BatchingEngine(Engine):
    """Serves plain and steered requests together in one continuous batch."""

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
        self._numbers = itertools.count()
        self._requests: dict[str, _Running] = {}
        self._scorer = ThreadPoolExecutor(1, thread_name_prefix="steer-score")
        self._fault: BaseException | None = None  # the error that ended the model's thread
        self._moved = time.monotonic()  # the last time at which there was a pass, or no waiting request
        self._left = False  # whether a request was cancelled since the last pass
        self._rest = 0.0  # the time until which scoring leaves the model to other requests
        self._holds: set[object] = set()  # the pauses of the manager that have not ended
        #: The requests of the running pass in its order, each with its number of tokens; and those that are read.
        self._passing: list[tuple[_Running | None, int]] = []
        self._readers: list[_Running] = []
        anatomy = steering.anatomy
        self._attention = internals.Attention(anatomy.model)
        cpu = anatomy.device.type == "cpu"
        self.manager = internals.start_manager(
            anatomy.model,
            context=context,
            page=CPU_PAGE if cpu else None,
            cache_tokens=cache_tokens or (max(CPU_CACHE_TOKENS, context) if cpu else None),
            batch_tokens=CPU_BATCH_TOKENS if cpu else None,
        )
        try:
            internals.check_seams(self.manager)
        except BaseException:
            self._attention.put_back()
            raise
        self._processor = self.manager.batch_processor
        room = self._processor.cache.max_tokens_read
        super().__init__(steering, eos_ids, context=min(context, room), capacity=capacity)
        steering.resize(self._processor.max_batch_tokens)
        self._step = self._processor._generation_step
        self._processor._generation_step = self._stepping
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
        self._attention.put_back()

    @property
    def healthy(self) -> bool:
        """Whether the engine works. False if the model's thread has ended, or if requests have waited for STUCK seconds
        without a pass while nobody holds the model."""
        running = bool(self.manager.is_running()) and self.manager.background_thread_status.fatal_error is None
        idle = not self._requests or bool(self._holds)
        return running and (idle or time.monotonic() - self._moved < STUCK)

    async def answer(
        self, prompt: Sequence[int], sampling: Sampling, steer: RequestSteer | None, read: Readout | None = None
    ) -> AsyncGenerator[Token, None]:
        request_id = f"steer-{next(self._numbers)}"
        if not self._requests:
            self._moved = time.monotonic()
        arrivals: asyncio.Queue[GenerationOutput] = asyncio.Queue()
        running = self._requests[request_id] = _Running(steer, read, Sampler(sampling, prompt, self.eos_ids), [])
        self.manager.register_result_handler(request_id, arrivals.put_nowait)
        done = False
        try:
            ends = list(sampling.ends(self.eos_ids)) or -1
            accepted = self.manager.add_request(
                list(prompt), request_id, max_new_tokens=sampling.max_tokens, streaming=True, eos_token_id=ends
            )
            if accepted is None:
                raise EngineFailed("the engine is stopping or has failed and accepts no requests") from self._fault
            sent = 0
            while not done:
                output = await arrivals.get()
                done = output.is_finished()
                if output.error is not None:
                    raise EngineFailed(f"the engine failed: {output.error}") from self._fault
                if running.failed is not None:
                    raise running.failed
                while sent < len(output.generated_tokens):
                    yield running.tokens[sent]
                    sent += 1
        finally:
            if not done:
                self.manager.cancel_request(request_id)
                self._left = True
            with self.manager.output_router._lock:
                self.manager.output_router.result_handlers.pop(request_id, None)
            self._requests.pop(request_id, None)

    async def _scored(self, ids: Sequence[int], steer: RequestSteer | None, top: int) -> list[Token]:
        def scored() -> list[Token]:
            if self._requests:  # they get as much time as scoring, however much there is to score
                time.sleep(max(0.0, self._rest - time.monotonic()))
            begun = time.monotonic()
            try:
                with self.alone():
                    return self.score_alone(ids, steer, top)
            finally:
                self._rest = 2 * time.monotonic() - begun

        # One thread only: several callers may hold the pause at once, but there is only one index.
        return await asyncio.get_running_loop().run_in_executor(self._scorer, scored)

    @contextmanager
    def held(self) -> Iterator[None]:
        try:
            pause = self.manager.pause()
            pause.__enter__()
        except RuntimeError as error:
            raise EngineFailed(f"the engine has failed: {error}") from (self._fault or error)
        self._holds.add(pause)
        try:
            yield
        finally:
            self._holds.discard(pause)
            self._moved = time.monotonic()
            pause.__exit__(None, None, None)

    @contextmanager
    def alone(self) -> Iterator[None]:
        with self.held(), self._attention.back():
            yield

    def _prepare(self) -> bool:
        """Prepare each forward pass, on the model's thread: fill the token index in the packed order of the batch.
        Returns whether there is a pass."""
        if self._left:
            self._left = False
            internals.let_in(self._processor)
        found = self._prepare_next_batch()
        if found or not self._requests:
            self._moved = time.monotonic()
        if not found:
            return False
        batch = self._processor.inputs_and_outputs.requests_in_batch
        tokens = self._processor.inputs_and_outputs.input_ids, self._processor.inputs_and_outputs.position_ids
        known = [self._requests.get(entry.state.request_id) for entry in batch]
        lengths = [entry.query_length for entry in batch]
        self._passing = list(zip(known, lengths, strict=True))
        reading = [r if r and r.read and entry.has_new_token else None for r, entry in zip(known, batch, strict=True)]
        self._readers = [request for request in reading if request]
        with internals.pass_stream(self._processor):
            starts = [entry.state.position_offset - entry.query_length for entry in batch]
            self.steering.fill([r.steer if r else None for r in known], lengths, starts, tokens)
            with self._read_out():
                self.steering.reads.fill([r.read if r else None for r in reading], lengths)
        return True

    @contextmanager
    def _read_out(self) -> Iterator[None]:
        """Let an error inside fail the requests that are read, and no others."""
        try:
            yield
        except Exception as error:
            for request in self._readers:
                request.fail(RequestFailed(f"the read-out failed: {type(error).__name__}: {str(error)[:200]}"))
            self._readers = []
            self.steering.reads.clear()

    def _stepping(self, model: PreTrainedModel) -> None:
        """Make the forward pass, on the model's thread. An error is stored before transformers ends its thread, so that
        requests can raise from it."""
        try:
            self._step(model)
        except BaseException as error:
            self._fault = error
            raise

    def _sample(self, scores: Tensor, output_ids: Tensor) -> None:
        """Sample after each forward pass, on the model's thread: one token for each request whose prompt has been read
        completely."""
        losses = self.steering.index.losses()
        batch = [e for e in self._processor.inputs_and_outputs.requests_in_batch if e.has_new_token]
        running = [self._requests.get(entry.state.request_id) for entry in batch]
        idle = Sampler(Sampling(max_tokens=1, temperature=0.0))  # for a request that was cancelled during this pass
        tokens = sample(scores[0, : len(batch)], [r.sampler if r else idle for r in running]) if batch else []
        for lost in losses.first([length for _, length in self._passing]) if losses else ():
            if request := self._passing[lost][0]:
                request.fail(NotFinite())
        readings: dict[int, Reading] = {}
        with self._read_out():
            found = self.steering.reads.collect()
            readings = {id(request): reading for request, reading in zip(self._readers, found, strict=True)}
        for request, token in zip(running, tokens, strict=True):
            if request and isinstance(token, RequestFailed):
                request.fail(token)
            elif request and isinstance(token, Token):
                reading = readings.get(id(request))
                request.tokens.append(token if reading is None else replace(token, reading=reading))
        ids = [token.id if isinstance(token, Token) else 0 for token in tokens]
        output_ids[0, : len(ids)].copy_(torch.tensor(ids, dtype=output_ids.dtype))


def start_engine(
    steering: Steering, eos_ids: Sequence[int], *, context: int, capacity: int, cache_tokens: int | None = None
) -> Engine:
    """Start an engine, and check that its answers are those of `generate`.

    The engine is the batching one if transformers can batch the model and the check passes, else the one that serves
    one request at a time. Raises UnsupportedModel if neither passes. Other errors are raised as they are.
    """
    try:
        _check_lengths(steering, context)
        return _checked(
            BatchingEngine(steering, eos_ids, context=context, capacity=capacity, cache_tokens=cache_tokens)
        )
    except (internals.CannotBatch, SelfCheckFailed) as reason:
        log.warning("this model cannot be batched (%s): requests are served one at a time", reason)
    gc.collect()  # frees the cache of the attempt, which takes most of an accelerator's memory
    return _checked(SequentialEngine(steering, eos_ids, context=context, capacity=capacity))


def _checked(engine: Engine) -> Engine:
    """Start `engine` and check it. The engine is stopped if this raises."""
    try:
        engine.start()
        self_check(engine)
    except BaseException:
        engine.stop()
        raise
    return engine


def _check_lengths(steering: Steering, context: int) -> None:
    """Raise CannotBatch if the answer to a short request would depend on the lengths of other requests in its batch."""
    found = internals.length_dependent(steering.anatomy.model.config)
    if found and context > found[1]:
        kind, limit = found
        raise internals.CannotBatch(
            f"its rotary embedding '{kind}' depends on the longest request of a batch from {limit} tokens on; a "
            f"context of at most {limit} would make it possible"
        )
