"""Trying candidates out on a vLLM engine (a `Screen` of `steer.lab.fit`): candidates are versions of one name in its
registry, like any other direction."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from steer.direction import Direction, Mode
from steer.lab.encode import encode_all
from steer.lab.probe import Answered, Divergence, summarised
from steer.lab.prompts import Prompt
from steer.vllm import frontend
from steer.vllm.settings import KEY
from steer.vllm.source import VllmSource

CANDIDATE = "candidate"


@dataclass(frozen=True, slots=True)
class Sampled:
    """A plain answer at temperature 1: prompt and answer ids, and the log-probability of each of its tokens."""

    ids: list[int]
    start: int
    logprobs: np.ndarray[Any, Any]


class VllmScreen:
    """What steers is a text of the request language."""

    def __init__(self, source: VllmSource, system_prompt: str | None, max_tokens: int, progress: bool = False) -> None:
        self.source, self.system_prompt, self.max_tokens, self.progress = source, system_prompt, max_tokens, progress
        self.registry = frontend.of(source.llm).registry

    @contextmanager
    def resident(self, direction: Direction, mode: Mode, strength: float) -> Iterator[str]:
        """Raises DirectionError where the engine's rank or rows are too few for `direction`."""
        self.registry.put(CANDIDATE, direction.to_bytes(), store=False)
        try:
            yield f"{CANDIDATE}:{mode}={strength!r}"
        finally:
            self.registry.delete(CANDIDATE)

    def answers(self, prompts: Sequence[Prompt], steer: str | None, title: str = "") -> list[Answered]:
        """Greedy answers of at most `max_tokens` tokens, in the order of `prompts`."""
        outputs = self._generate(self._encode(prompts), steer, title, temperature=0, max_tokens=self.max_tokens)
        return [Answered(_without_end(output.outputs[0]), output.outputs[0].text) for output in outputs]

    def continuations(self, prompts: Sequence[Prompt], title: str = "") -> list[Sampled]:
        heads = self._encode(prompts)
        options = dict(temperature=1, top_p=1, top_k=0, seed=0, max_tokens=self.max_tokens, logprobs=0)
        sampled = []
        for head, output in zip(heads, self._generate(heads, None, title, **options), strict=True):
            answer = output.outputs[0]
            said = [entry[token].logprob for entry, token in zip(answer.logprobs, answer.token_ids, strict=True)]
            sampled.append(Sampled(head + list(answer.token_ids), len(head), np.array(said)))
        return sampled

    def divergence(
        self, prompts: Sequence[Prompt], plain: Sequence[Sampled], steer: str, title: str = ""
    ) -> Divergence:
        """KL(plain ‖ steered), estimated along sampled plain answers: an engine hands out the log-probability of each
        token and not of the whole vocabulary. With r = q/p for a token drawn from p, (r − 1) − ln r has the KL as its
        expectation and is never negative. Source: Schulman 2020, "Approximating KL divergence"."""
        options = dict(temperature=0, max_tokens=1, prompt_logprobs=0)
        rows = []
        outputs = self._generate([one.ids for one in plain], steer, title, **options)
        for one, output in zip(plain, outputs, strict=True):
            said = [output.prompt_logprobs[i][one.ids[i]].logprob for i in range(one.start, len(one.ids))]
            difference = np.array(said) - one.logprobs
            rows.append(np.expm1(difference) - difference)
        return summarised(rows)

    def log_probabilities(
        self, sequences: Sequence[Sequence[int]], steer: str | None, title: str = ""
    ) -> list[np.ndarray[Any, Any]]:
        """The log-probability of each token but the first of each sequence, `[tokens − 1]`, in nats."""
        outputs = self._generate(
            [list(ids) for ids in sequences], steer, title, temperature=0, max_tokens=1, prompt_logprobs=0
        )
        return [
            np.array([output.prompt_logprobs[i][ids[i]].logprob for i in range(1, len(ids))])
            for ids, output in zip(sequences, outputs, strict=True)
        ]

    def _encode(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        return [e.ids for e in encode_all(self.source, prompts, self.system_prompt)]

    def _generate(self, prompts: Sequence[list[int]], steer: str | None, title: str, **options: Any) -> list[Any]:
        from vllm import SamplingParams

        parameters = SamplingParams(extra_args={KEY: steer or "off"}, **options)
        bar = self.progress and bool(title)
        outputs: list[Any] = self.source.llm.generate(
            [{"prompt_token_ids": ids} for ids in prompts], parameters, use_tqdm=bar
        )
        return outputs


def _without_end(answer: Any) -> list[int]:
    """The answer's tokens without the one that ended it."""
    ids = list(answer.token_ids)
    return ids[:-1] if answer.finish_reason == "stop" else ids
