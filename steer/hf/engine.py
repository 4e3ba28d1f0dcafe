"""The engine that a server talks to: tokens of one request as an async stream, whatever runs behind it.

`SequentialEngine` serves one request at a time by plain forward passes, for models that cannot be batched;
`steer.hf.batching` has the engine on transformers' continuous batching.
"""

from __future__ import annotations

import abc
import asyncio
import itertools
from collections.abc import AsyncGenerator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import torch

from steer.errors import EngineFailed, NoRoom
from steer.hf.attach import Steering
from steer.hf.sampling import Sampler, Sampling, Token, report, sample
from steer.runtime.index import RequestSteer
from steer.runtime.readout import RequestRead


class Engine(abc.ABC):
    """Generates with a steered model. Prompt ids in, tokens out, one index entry a request.

    `context` is the most tokens that prompt and answer have together; `capacity` the most requests in flight.
    """

    description: str

    def __init__(self, steering: Steering, eos_ids: Sequence[int], *, context: int, capacity: int) -> None:
        self.steering = steering
        self.eos_ids = frozenset(eos_ids)
        self.context, self.capacity = context, capacity
        self.in_flight = 0
        self._numbers = itertools.count()

    async def generate(
        self, prompt: Sequence[int], sampling: Sampling, steer: RequestSteer | None, read: RequestRead | None = None
    ) -> AsyncGenerator[Token, None]:
        """Tokens as they come, the end-of-sequence token included, each with its reading where there is `read`. Closing
        the iterator cancels the request.

        Raises NoRoom when the queue is full (before anything is queued), EngineFailed when the engine fails.
        """
        self.admit(1)
        self.in_flight += 1
        try:
            stream = self._generate(f"steer-{next(self._numbers)}", prompt, sampling, steer, read)
            async with aclosing(stream):
                async for token in stream:
                    yield token
        finally:
            self.in_flight -= 1

    def admit(self, count: int) -> None:
        """Raise NoRoom if `count` more requests would not find a place."""
        if self.in_flight + count > self.capacity:
            raise NoRoom(
                f"{self.in_flight} requests are running or waiting and {count} more came; at most {self.capacity} can "
                "be in flight: try again shortly"
            )

    @abc.abstractmethod
    def _generate(
        self,
        request_id: str,
        prompt: Sequence[int],
        sampling: Sampling,
        steer: RequestSteer | None,
        read: RequestRead | None,
    ) -> AsyncGenerator[Token, None]: ...

    @abc.abstractmethod
    async def score(self, ids: Sequence[int], steer: RequestSteer | None, top: int) -> list[Token]:
        """`ids[1:]` with the log-probabilities that the steered model gives them."""

    @property
    @abc.abstractmethod
    def healthy(self) -> bool: ...

    @abc.abstractmethod
    def start(self) -> None: ...

    @abc.abstractmethod
    def stop(self) -> None: ...

    @torch.inference_mode()
    def _score(self, ids: Sequence[int], steer: RequestSteer | None, top: int) -> list[Token]:
        """The forward pass of `score`; the caller has the model for itself."""
        tensor = torch.tensor([list(ids)], device=self.steering.anatomy.device)
        with self.steering.batch([steer]):
            logits = self.steering.anatomy.model(input_ids=tensor, use_cache=False).logits[0, :-1].float()
        return report(logits, tensor[0, 1:], [top] * (len(ids) - 1))


class SequentialEngine(Engine):
    """One request at a time, in order of arrival."""

    def __init__(self, steering: Steering, eos_ids: Sequence[int], *, context: int, capacity: int) -> None:
        super().__init__(steering, eos_ids, context=context, capacity=capacity)
        self.description = "one request at a time (this model cannot be batched)"
        self._turn = asyncio.Lock()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="steer-model")

    async def _generate(
        self,
        request_id: str,
        prompt: Sequence[int],
        sampling: Sampling,
        steer: RequestSteer | None,
        read: RequestRead | None,
    ) -> AsyncGenerator[Token, None]:
        loop = asyncio.get_running_loop()
        async with self._turn:
            sampler, ids, cache = Sampler.of(sampling), list(prompt), None
            for _ in range(sampling.max_tokens):
                token, cache = await loop.run_in_executor(self._thread, self._step, ids, cache, sampler, steer, read)
                yield token
                if token.id in self.eos_ids and not sampling.ignore_eos:
                    return
                ids = [token.id]

    @torch.inference_mode()
    def _step(
        self, ids: list[int], cache: Any, sampler: Sampler, steer: RequestSteer | None, read: RequestRead | None
    ) -> tuple[Token, Any]:
        tensor = torch.tensor([ids], device=self.steering.anatomy.device)
        try:
            with self.steering.batch([steer]):
                self.steering.reads.fill([read], [len(ids)])
                out = self.steering.anatomy.model(input_ids=tensor, past_key_values=cache, use_cache=True)
                readings = self.steering.reads.collect()
        except RuntimeError as error:
            raise EngineFailed(f"the model failed: {error}") from error
        token = sample(out.logits[:, -1].float(), [sampler])[0]
        return (replace(token, reading=readings[0]) if readings else token), out.past_key_values

    async def score(self, ids: Sequence[int], steer: RequestSteer | None, top: int) -> list[Token]:
        async with self._turn:
            return await asyncio.get_running_loop().run_in_executor(self._thread, self._score, ids, steer, top)

    @property
    def healthy(self) -> bool:
        return self.steering.attached

    def start(self) -> None:
        self.steering.attach()

    def stop(self) -> None:
        self._thread.shutdown(wait=True)
        self.steering.detach()
