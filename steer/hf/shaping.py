"""What a request changes of its logits before a token is chosen: by a bias, by what has come before, by what must not
come yet. Pure functions on logits; requests that ask for none of it cost nothing.

In this order, which is that of transformers and of vLLM: `logit_bias`, words that may not come, the repetition penalty
(Keskar et al. 2019, over prompt and answer), then OpenAI's frequency and presence penalties (over the answer).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Shape:
    """What one request asks for. `bad_words` are token ids of texts that the answer must not have; `ends` are the
    tokens that would end it, which do not come among the first `min_tokens`."""

    logit_bias: tuple[tuple[int, float], ...] = ()
    bad_words: tuple[tuple[int, ...], ...] = ()
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    min_tokens: int = 0
    ends: tuple[int, ...] = ()


#: Of a request that asks for nothing.
PLAIN = Shape()


@dataclass(slots=True)
class Shaper:
    """One request's shape with what has come: made where there is one, and told of each token."""

    shape: Shape
    prompt: Sequence[int]
    answer: list[int] = field(default_factory=list)
    _bias: Tensor | None = None
    _seen: Tensor | None = None
    _counts: Tensor | None = None

    def push(self, token: int) -> None:
        self.answer.append(token)
        if self._seen is not None:
            self._seen[token] = True
        if self._counts is not None:
            self._counts[token] += 1

    def bias(self, like: Tensor) -> Tensor:
        """`[vocabulary]`, what is added to each logit; minus infinity for a word of one token."""
        if self._bias is None:
            self._bias = torch.zeros_like(like)
            for token, value in self.shape.logit_bias:
                self._bias[token] = value
            self._bias[[word[0] for word in self.shape.bad_words if len(word) == 1]] = -torch.inf
        return self._bias

    def seen(self, like: Tensor) -> Tensor:
        """`[vocabulary]`, whether a token is in the prompt or the answer."""
        if self._seen is None:
            self._seen = torch.zeros_like(like, dtype=torch.bool)
            self._seen[[*self.prompt, *self.answer]] = True
        return self._seen

    def counts(self, like: Tensor) -> Tensor:
        """`[vocabulary]`, how often a token is in the answer."""
        if self._counts is None:
            self._counts = torch.bincount(torch.tensor(self.answer, dtype=torch.long), minlength=len(like)).to(like)
        return self._counts

    def banned(self) -> list[int]:
        """What may not come now: ends that come too early, and the last tokens of words whose others have come."""
        early = self.shape.ends if len(self.answer) < self.shape.min_tokens else ()
        words = [
            word[-1]
            for word in self.shape.bad_words
            if len(word) > 1 and tuple(self.answer[1 - len(word) :]) == word[:-1]
        ]
        return [*early, *words]


def shaped(logits: Tensor, shapers: Sequence[Shaper | None]) -> Tensor:
    """`logits` (`[requests, vocabulary]`) as the requests want them: itself where none wants anything, else a copy."""
    rows = [i for i, shaper in enumerate(shapers) if shaper is not None]
    if not rows:
        return logits
    out = logits.float().clone()

    def those(wanted: Callable[[Shape], object]) -> tuple[list[int], list[Shaper]]:
        found = [(i, s) for i, s in enumerate(shapers) if s is not None and wanted(s.shape)]
        return [i for i, _ in found], [s for _, s in found]

    def column(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=out.dtype, device=out.device)[:, None]

    like = out[0]
    rows, asking = those(lambda s: s.logit_bias or any(len(word) == 1 for word in s.bad_words))
    if rows:
        out[rows] += torch.stack([s.bias(like) for s in asking])
    rows, asking = those(lambda s: s.repetition_penalty != 1)
    if rows:
        scores, penalty = out[rows], column([s.shape.repetition_penalty for s in asking])
        penalised = torch.where(scores < 0, scores * penalty, scores / penalty)
        out[rows] = torch.where(torch.stack([s.seen(like) for s in asking]), penalised, scores)
    rows, asking = those(lambda s: s.frequency_penalty or s.presence_penalty)
    if rows:
        counts = torch.stack([s.counts(like) for s in asking])
        out[rows] -= column([s.shape.frequency_penalty for s in asking]) * counts
        out[rows] -= column([s.shape.presence_penalty for s in asking]) * (counts > 0)
    rows, asking = those(lambda s: s.min_tokens or s.bad_words)
    banned = [(i, token) for i, s in zip(rows, asking, strict=True) for token in s.banned()]
    if banned:
        out[tuple(torch.tensor(banned, device=out.device).T)] = -torch.inf
    return out
