"""The interface between the server and an engine: the tokens of one request as an async stream.

`SequentialEngine` serves one request at a time, as `generate` would, for models that cannot be batched.
`steer.hf.batching` has the engine on transformers' continuous batching.
"""

from __future__ import annotations

import abc
import asyncio
from collections.abc import AsyncGenerator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, AsyncExitStack, aclosing, closing, contextmanager
from dataclasses import replace
from weakref import WeakKeyDictionary

import torch

from steer.errors import EngineFailed, NoRoom, RequestError, RequestFailed, SteerError
from steer.hf.internals import Decoding, check_model, logits_in_pieces
from steer.hf.sampling import NO_LOGITS, Sampler, Sampling, Token, report, sample
from steer.hf.steering import Steering
from steer.readout import Readout
from steer.runtime.token_index import RequestSteer, applied

#: The most tokens of a scored prompt whose logits, each as long as the vocabulary, are in memory at once.
SCORED_AT_ONCE = 512


class Engine(abc.ABC):
    """Generates with a steered model: takes the ids of prompts, and returns tokens. Each request has one index entry.

    Args:
        steering: the steering of the model.
        eos_ids: the ids of end-of-sequence tokens.
        context: the most tokens that a prompt and its answer may have together.
        capacity: the most requests in flight.
    """

    description: str

    def __init__(self, steering: Steering, eos_ids: Sequence[int], *, context: int, capacity: int) -> None:
        self.steering = steering
        self.eos_ids = frozenset(eos_ids)
        self.context, self.capacity = context, capacity
        self.in_flight = 0

    async def generate(
        self,
        prompt: Sequence[int],
        sampling: Sampling,
        steer: RequestSteer | None,
        read: Readout | None = None,
        turns: AbstractAsyncContextManager[object] | None = None,
    ) -> AsyncGenerator[Token, None]:
        """Yield the tokens of the answer as they come, the end-of-sequence token included. Closing the iterator cancels
        the request.

        Args:
            prompt: the ids of the prompt.
            sampling: how tokens are sampled.
            steer: the steering of the request, None for a plain request.
            read: the read-out. If given, each token has its reading.
            turns: entered before the request begins. The request takes its place in the queue before that.

        Raises:
            NoRoom: the queue is full; nothing was queued.
            RequestFailed: this request cannot be answered (NotFinite if steering is the reason).
            EngineFailed: the engine fails.
        """
        async with AsyncExitStack() as stack:
            stack.enter_context(self._place())
            if turns is not None:
                await stack.enter_async_context(turns)
            decisions = self.steering.index.decisions
            steer, phase, met = decisions.take(steer), None if steer is None else steer.acting.phase, False
            try:
                stream = self.answer(prompt, sampling, steer, read)
                async with aclosing(stream):
                    async for token in stream:
                        if phase is not None:
                            met |= phase.begun
                            phase = phase.after(token.id)
                        held = applied(steer) if phase is None else met
                        yield token if held is None else replace(token, applied=held)
            finally:
                decisions.give(steer)

    @abc.abstractmethod
    def answer(
        self, prompt: Sequence[int], sampling: Sampling, steer: RequestSteer | None, read: Readout | None = None
    ) -> AsyncGenerator[Token, None]:
        """Answer as `generate` does, without a check of the capacity: the self-check at start makes as many requests as
        it needs."""

    def admit(self, count: int, param: str = "n") -> None:
        """Raise NoRoom if there is no place for `count` more requests now, and RequestError if there never is. `param`:
        the field that asks for them."""
        if count > self.capacity:
            message = f"{param}: prompts × n are {count} answers, and at most {self.capacity} can be in flight here"
            raise RequestError(message, param=param)
        if self.in_flight + count > self.capacity:
            raise NoRoom(
                f"{self.in_flight} requests are running or waiting and {count} more came; at most {self.capacity} can "
                "be in flight: try again shortly"
            )

    @contextmanager
    def _place(self) -> Iterator[None]:
        self.admit(1)
        self.in_flight += 1
        try:
            yield
        finally:
            self.in_flight -= 1

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold requests back: those that arrive inside begin when it ends."""
        yield

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Give the calling thread the model for itself, in the state that it has outside of any engine."""
        yield

    async def score(self, ids: Sequence[int], steer: RequestSteer | None, top: int) -> list[Token]:
        """Return `ids[1:]` with the log-probabilities that the steered model gives them. If the call is cancelled
        before its turn, it costs nothing. Raises as `generate` does."""
        with self._place():
            return await self._scored(ids, steer, top)

    @abc.abstractmethod
    async def _scored(self, ids: Sequence[int], steer: RequestSteer | None, top: int) -> list[Token]: ...

    @property
    @abc.abstractmethod
    def healthy(self) -> bool: ...

    @abc.abstractmethod
    def start(self) -> None: ...

    @abc.abstractmethod
    def stop(self) -> None: ...

    @torch.inference_mode()
    def score_alone(self, ids: Sequence[int], steer: RequestSteer | None, top: int) -> list[Token]:
        """Make the forward pass of `score`, inside `alone`. It holds the logits of SCORED_AT_ONCE tokens at once."""
        model = self.steering.anatomy.model
        tensor = torch.tensor([list(ids)], device=self.steering.anatomy.device)
        with self.steering.batch([None]):
            self.steering.anatomy.forget_lengths()
        decisions = self.steering.index.decisions
        steer = decisions.take(steer)
        tokens: list[Token] = []
        try:
            laid = self.steering.padded_batch([steer], [range(tensor.shape[1])], tensor)
            with laid, closing(logits_in_pieces(model, tensor, SCORED_AT_ONCE)) as pieces:
                for logits in pieces:
                    if not torch.isfinite(logits.amax(-1)).all():
                        raise RequestFailed(NO_LOGITS)
                    chosen = tensor[0, len(tokens) + 1 :][: len(logits)]
                    tokens += report(logits, chosen, [top] * len(logits))
        finally:
            decisions.give(steer)
        return tokens


class SequentialEngine(Engine):
    """Serves one request at a time, in order of arrival."""

    def __init__(self, steering: Steering, eos_ids: Sequence[int], *, context: int, capacity: int) -> None:
        super().__init__(steering, eos_ids, context=context, capacity=capacity)
        check_model(steering.anatomy.model)
        self.description = "one request at a time (this model cannot be batched)"
        self._turns: WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Lock] = WeakKeyDictionary()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="steer-model")

    @property
    def _turn(self) -> asyncio.Lock:
        """The lock of the running event loop. The self-check has a loop of its own, and a lock stays bound to the loop
        in which it was waited for."""
        return self._turns.setdefault(asyncio.get_running_loop(), asyncio.Lock())

    async def answer(
        self, prompt: Sequence[int], sampling: Sampling, steer: RequestSteer | None, read: Readout | None = None
    ) -> AsyncGenerator[Token, None]:
        loop = asyncio.get_running_loop()
        async with self._turn:
            sampler, ends = Sampler(sampling, prompt, self.eos_ids), sampling.ends(self.eos_ids)
            decoding = await loop.run_in_executor(self._thread, self._begin, prompt, sampling.max_tokens)
            for _ in range(sampling.max_tokens):
                token = await loop.run_in_executor(self._thread, self._step, decoding, sampler, steer, read)
                yield token
                if token.id in ends:
                    return

    @torch.inference_mode()
    def _begin(self, prompt: Sequence[int], max_tokens: int) -> Decoding:
        with _failing():
            self.steering.anatomy.forget_lengths()
            return Decoding(self.steering.anatomy.model, prompt, max_tokens)

    @torch.inference_mode()
    def _step(self, decoding: Decoding, sampler: Sampler, steer: RequestSteer | None, read: Readout | None) -> Token:
        with _failing():
            inputs = decoding.inputs()
        ids = inputs["input_ids"]
        length = ids.shape[1]
        with _failing(), self.steering.padded_batch([steer], [range(decoding.length - length, decoding.length)], ids):
            self.steering.reads.fill([read], [length])
            logits = decoding.logits(inputs)
            readings = self.steering.reads.collect()
            token = sample(logits, [sampler])[0]
            if losses := self.steering.index.losses():
                losses.first([length])  # stores decisions; the end of the batch raises for lost tokens
        if isinstance(token, RequestFailed):
            raise token
        decoding.append(token.id)
        return replace(token, reading=readings[0]) if readings else token

    async def _scored(self, ids: Sequence[int], steer: RequestSteer | None, top: int) -> list[Token]:
        async with self._turn:
            return await asyncio.get_running_loop().run_in_executor(self._thread, self.score_alone, ids, steer, top)

    @property
    def healthy(self) -> bool:
        return self.steering.attached

    def start(self) -> None:
        self.steering.attach()

    def stop(self) -> None:
        self._thread.shutdown(wait=True)
        self.steering.detach()


@contextmanager
def _failing() -> Iterator[None]:
    """Raise EngineFailed for errors inside that are not Steer's own."""
    try:
        yield
    except SteerError:
        raise
    except Exception as error:
        raise EngineFailed(f"the model failed: {error}") from error
