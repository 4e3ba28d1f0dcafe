"""Sampling for a batch in which each request has its own parameters: functions on logits."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from steer.errors import RequestFailed
from steer.runtime.readout import Reading

T = TypeVar("T")


#: The least temperature at which a token is drawn. Below it the distribution is the argmax in float32, and the division
#: by the temperature would overflow.
MIN_TEMPERATURE = 1e-5
NO_LOGITS = (
    "the model's logits for this request are not finite: its numbers have left the range of its dtype; serve it with "
    "one of more range (bfloat16, float32)"
)


@dataclass(frozen=True, slots=True)
class Sampling:
    """The sampling parameters of one request. Temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 cut nothing.

    Attributes:
        logprobs: how many alternatives are reported besides the sampled token; None for no report at all.
        bad_words: token ids of texts that the answer must not contain.
        min_tokens: how many tokens at the answer's beginning do not end it.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    logprobs: int | None = None
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    logit_bias: tuple[tuple[int, float], ...] = ()
    bad_words: tuple[tuple[int, ...], ...] = ()
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    min_tokens: int = 0

    def ends(self, eos: Collection[int]) -> frozenset[int]:
        """The tokens that end the answer. `eos`: the model's end-of-sequence tokens."""
        return frozenset(self.stop_token_ids).union(() if self.ignore_eos else eos)

    @property
    def shapes(self) -> bool:
        """Whether the parameters change logits before a token is chosen."""
        asked = self.logit_bias, self.bad_words, self.frequency_penalty, self.presence_penalty, self.min_tokens
        return any(asked) or self.repetition_penalty != 1


class Sampler:
    """The sampling parameters of one request with its state: its own random generator if it has a seed, and the tokens
    of its answer, if its parameters shape logits (`push` must then be called with each token)."""

    def __init__(self, sampling: Sampling, prompt: Sequence[int] = (), eos: Collection[int] = ()) -> None:
        self.sampling, self.shapes = sampling, sampling.shapes
        self.generator = None if sampling.seed is None else torch.Generator().manual_seed(sampling.seed % 2**63)
        self._prompt, self._ends = prompt, sampling.ends(eos)
        self._answer: list[int] = []
        self._bias: Tensor | None = None
        self._seen: Tensor | None = None
        self._counts: Tensor | None = None

    def push(self, token: int) -> None:
        """Note that `token` is the next token of the answer."""
        self._answer.append(token)
        if self._seen is not None:
            self._seen[token] = True
        if self._counts is not None:
            self._counts[token] += 1

    def bias(self, like: Tensor) -> Tensor:
        """`[vocabulary]`: the value that is added to each logit; minus infinity for a bad word of one token."""
        if self._bias is None:
            self._bias = torch.zeros_like(like)
            for token, value in self.sampling.logit_bias:
                self._bias[token] = value
            self._bias[[word[0] for word in self.sampling.bad_words if len(word) == 1]] = -torch.inf
        return self._bias

    def seen(self, like: Tensor) -> Tensor:
        """`[vocabulary]`: whether each token is in the prompt or the answer."""
        if self._seen is None:
            self._seen = torch.zeros_like(like, dtype=torch.bool)
            self._seen[[*self._prompt, *self._answer]] = True
        return self._seen

    def counts(self, like: Tensor) -> Tensor:
        """`[vocabulary]`: how often each token is in the answer."""
        if self._counts is None:
            self._counts = torch.bincount(torch.tensor(self._answer, dtype=torch.long), minlength=len(like)).to(like)
        return self._counts

    def banned(self) -> list[int]:
        """The tokens that must not be next: tokens that would end the answer too early, and the last token of each bad
        word whose other tokens are the end of the answer."""
        early = self._ends if len(self._answer) < self.sampling.min_tokens else ()
        words = [
            word[-1]
            for word in self.sampling.bad_words
            if len(word) > 1 and tuple(self._answer[1 - len(word) :]) == word[:-1]
        ]
        return [*early, *words]


def shaped(logits: Tensor, samplers: Sequence[Sampler]) -> Tensor:
    """`logits` (`[requests, vocabulary]`) after the changes that the requests ask for: `logits` itself if no request
    asks for a change, else a copy, float32."""
    if not any(sampler.shapes for sampler in samplers):
        return logits
    out = logits.float().clone()

    def those(wanted: Callable[[Sampling], object]) -> tuple[list[int], list[Sampler]]:
        found = [(i, s) for i, s in enumerate(samplers) if wanted(s.sampling)]
        return [i for i, _ in found], [s for _, s in found]

    def column(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=out.dtype, device=out.device)[:, None]

    like = out[0]
    rows, asking = those(lambda s: s.logit_bias or any(len(word) == 1 for word in s.bad_words))
    if rows:
        out[rows] += torch.stack([s.bias(like) for s in asking])
    rows, asking = those(lambda s: s.repetition_penalty != 1)
    if rows:
        scores, penalty = out[rows], column([s.sampling.repetition_penalty for s in asking])
        penalised = torch.where(scores < 0, scores * penalty, scores / penalty)
        out[rows] = torch.where(torch.stack([s.seen(like) for s in asking]), penalised, scores)
    rows, asking = those(lambda s: s.frequency_penalty or s.presence_penalty)
    if rows:
        counts = torch.stack([s.counts(like) for s in asking])
        out[rows] -= column([s.sampling.frequency_penalty for s in asking]) * counts
        out[rows] -= column([s.sampling.presence_penalty for s in asking]) * (counts > 0)
    rows, asking = those(lambda s: s.min_tokens or s.bad_words)
    banned = [(i, token) for i, s in zip(rows, asking, strict=True) for token in s.banned()]
    if banned:
        out[tuple(torch.tensor(banned, device=out.device).T)] = -torch.inf
    return out


@dataclass(frozen=True, slots=True)
class Token:
    """A sampled (or scored) token.

    Attributes:
        logprob: its log-probability under the model's own distribution.
        top: the most likely tokens with their log-probabilities.
        reading: the reading at the position that predicted the token, if a read-out was requested.
        applied: whether its request is steered, if the request has a condition.
    """

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    reading: Reading | None = field(default=None, compare=False)
    applied: bool | None = field(default=None, compare=False)


def sample(logits: Tensor, samplers: Sequence[Sampler]) -> list[Token | RequestFailed]:
    """One token for each row of `logits` (`[requests, vocabulary]`, float32), in the order of `samplers`. If no token
    can be chosen for a request, its error is in the token's place, and the other requests are not affected.

    A request with a seed draws from its own generator, so its tokens do not depend on the other requests of the batch.
    """
    failed: dict[int, RequestFailed] = {}
    raw, finite = logits, torch.isfinite(logits.max(dim=-1).values)
    shaping = [i for i, s in enumerate(samplers) if s.shapes]
    for rows, found in _apart(shaping, lambda rows: shaped(raw[rows], [samplers[i] for i in rows]), failed):
        logits = logits.clone() if logits is raw else logits
        logits[rows] = found
    chosen = logits.argmax(dim=-1)
    drawn = [i for i, s in enumerate(samplers) if s.sampling.temperature > MIN_TEMPERATURE]
    for rows, found in _apart(drawn, lambda rows: _draw(logits[rows], [samplers[i] for i in rows]), failed):
        chosen[rows] = found
    ids = torch.where(finite, chosen, -1).tolist()
    out: list[Token | RequestFailed] = [Token(token) for token in ids]
    reported = [i for i, s in enumerate(samplers) if s.sampling.logprobs is not None]

    def reports(rows: list[int]) -> list[Token]:
        return report(raw[rows], chosen[rows], [samplers[i].sampling.logprobs or 0 for i in rows])

    for rows, tokens in _apart(reported, reports, failed):
        for i, one in zip(rows, tokens, strict=True):
            out[i] = one
    failed |= {i: RequestFailed(NO_LOGITS) for i, token in enumerate(ids) if token < 0}
    for i, error in failed.items():
        out[i] = error
    for i in shaping:
        if isinstance(token := out[i], Token):
            samplers[i].push(token.id)
    return out


def _apart(
    rows: list[int], work: Callable[[list[int]], T], failed: dict[int, RequestFailed]
) -> list[tuple[list[int], T]]:
    """The results of `work`, with the rows of each. `work` is called with all rows at once; if it raises, it is called
    with each row alone, and the rows for which it raises again are put into `failed`."""
    if not rows:
        return []
    try:
        return [(rows, work(rows))]
    except Exception as error:
        if len(rows) > 1:
            return [pair for row in rows for pair in _apart([row], work, failed)]
        failed[rows[0]] = RequestFailed(f"no token could be chosen: {type(error).__name__}: {str(error)[:200]}")
        return []


def report(logits: Tensor, ids: Tensor, tops: Sequence[int]) -> list[Token]:
    """`ids` (`[n]`) as tokens with their log-probabilities under `logits` (`[n, vocabulary]`), each with the `tops[i]`
    most likely tokens."""
    logprobs = torch.log_softmax(logits.float(), dim=-1)
    own = logprobs.gather(1, ids[:, None]).squeeze(1).tolist()
    most = min(max(tops), logprobs.shape[-1])
    if most:
        values, indices = logprobs.topk(most, dim=-1)
        best = [list(zip(i, v, strict=True)) for i, v in zip(indices.tolist(), values.tolist(), strict=True)]
    else:
        best = [[] for _ in own]
    return [
        Token(token, logprob, tuple(row[:top]))
        for token, logprob, row, top in zip(ids.tolist(), own, best, tops, strict=True)
    ]


def _draw(logits: Tensor, samplers: Sequence[Sampler]) -> Tensor:
    """Draw a token for each row. The temperature is applied first, then top-k, top-p and min-p in one pass over the
    sorted distribution, then the exponential race argmax(p / Exp(1)), which samples p exactly."""

    def column(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=logits.device)[:, None]

    each = [s.sampling for s in samplers]
    probs, order = (logits.float() / column([s.temperature for s in each])).softmax(-1).sort(dim=-1, descending=True)
    rank = torch.arange(probs.shape[-1], device=logits.device)
    kept = rank < column([min(s.top_k, probs.shape[-1]) or probs.shape[-1] for s in each])
    before = (probs * kept).cumsum(-1) - probs
    kept &= before < column([s.top_p for s in each]) * (probs * kept).sum(-1, keepdim=True)
    kept &= probs >= column([s.min_p for s in each]) * probs[:, :1]
    kept[:, 0] = True
    race = torch.empty_like(probs).exponential_()
    for i, sampler in enumerate(samplers):
        if sampler.generator is not None:
            race[i] = torch.empty(probs.shape[-1], dtype=torch.float32).exponential_(generator=sampler.generator)
    winner = (probs * kept / race).argmax(dim=-1, keepdim=True)
    return order.gather(1, winner).squeeze(1)
