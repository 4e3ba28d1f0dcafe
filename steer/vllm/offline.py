"""A source of activations (see `steer.lab.source`) and an evaluator (see `steer.lab.evaluator`) on a vLLM engine. They
measure the model as it is served, with its quantised weights and its kernels, on all of its ranks."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from io import StringIO
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from steer.errors import EngineFailed, InvalidInput, SpecError
from steer.lab.evaluator import Candidate, Evaluator, Floats, each_row, named
from steer.lab.measurement import ModelFacts
from steer.lab.outcome import Answer
from steer.lab.progress import Progress, answering
from steer.lab.prompts import Encoded, Prompt, Rendering
from steer.lab.source import Activations, CapturePlan, Source
from steer.registry import Admission
from steer.spec import parse, text
from steer.vllm import frontend, internals
from steer.vllm.settings import CAPTURE, KEY, SCORED

#: How many of the likeliest tokens at a position the engine is asked for; by default it gives no more than 20.
TOP_LOGPROBS = 20
#: The mode of log-probabilities that the engine must have: those of the model's own distribution, before sampling
#: parameters change it.
LOGPROBS = "raw_logprobs"

if TYPE_CHECKING:
    from steer.vllm.internals.types import LLM, CompletionOutput, Logprob, RequestOutput


def start(model: str, options: Sequence[str] = (), *, sites: Sequence[str] = ("resid_post",), rank: int = 8) -> LLM:
    """Start an `LLM` for measuring. It is eager, since hooks in Python read the stream, and has no prefix cache, since
    no hook sees a cached token.

    Args:
        options: options of `vllm serve`.

    Raises:
        InvalidInput: an option cannot be used here.
    """
    from steer.vllm import plugin

    plugin.register()
    arguments = internals.engine.engine_arguments(model, options)
    if arguments.logprobs_mode != LOGPROBS:
        raise InvalidInput(
            f"--logprobs-mode {arguments.logprobs_mode}: what is compared here are {LOGPROBS}; leave it out"
        )
    given = {"enforce_eager": True, "enable_prefix_caching": False, "worker_cls": internals.WORKER}
    steering = {KEY: {"sites": list(sites), "rank": rank, "rows": 16 * rank}}
    return internals.engine.start_offline(arguments, given, steering)


class VllmSource(Source):
    """A source of activations on `llm`, an engine that `start` has made."""

    def __init__(self, llm: LLM, name: str, revision: str | None = None) -> None:
        self.llm, self.name, self.revision = llm, name, revision
        self.tokenizer = llm.get_tokenizer()
        self._config = llm.llm_engine.vllm_config
        self.context = internals.config.context_of(self._config) - 1  # a prompt is answered with one token

    @property
    def facts(self) -> ModelFacts:
        architecture, layers, d_model = internals.config.dimensions_of(self._config)
        return ModelFacts(
            name=self.name,
            revision=self.revision,
            architecture=architecture,
            d_model=d_model,
            layers=layers,
            dtype=internals.config.dtype_of(self._config),
            chat_template_sha256=self.template_sha256,
        )

    def fingerprint(self) -> str:
        """The SHA-256 of the stream that the engine has at every layer at the last token of a fixed prompt."""
        ids = list(range(3, 3 + internals.base.PROBE_TOKENS))
        seen = self.run([Encoded(ids, slice(0, len(ids)))], CapturePlan((-1,), self.facts.layers - 1))
        return hashlib.sha256(seen.picked.numpy().tobytes()).hexdigest()

    def run(self, batch: Sequence[Encoded], plan: CapturePlan) -> Activations:
        """Prefill `batch` and return what `plan` asks for; picked vectors are float32.

        Raises EngineFailed if the workers did not see a token of a prompt, or did not read a layer.
        """
        from vllm import SamplingParams

        asked = [([p if p >= 0 else len(e.ids) + p for p in plan.positions], e.own.start, e.own.stop) for e in batch]
        answers = self.llm.collective_rpc("steer_capture", args=(asked, plan.last_layer))
        InvalidInput.raise_for(sorted({answer["error"] for answer in answers if answer}))
        parameters = [
            SamplingParams(max_tokens=1, temperature=0, detokenize=False, extra_args={CAPTURE: number})
            for number in range(len(batch))
        ]
        self.llm.generate([{"prompt_token_ids": e.ids} for e in batch], parameters, use_tqdm=False)
        d_model = self.facts.d_model
        picked = torch.zeros(len(plan.positions), plan.layers, len(batch), d_model)
        own = torch.zeros(plan.layers, d_model, dtype=torch.float64)
        missing = set(range(plan.layers))
        for answer in self.llm.collective_rpc("steer_captured"):
            if (short := [n for n, e in enumerate(batch) if answer["seen"][n] < len(e.ids)]) and answer["layers"]:
                raise EngineFailed(f"prompts {short} of a batch were not prefilled whole")
            for layer, vectors, sums in answer["layers"]:  # tensor-parallel ranks report the same
                picked[:, layer] = _array(vectors, (len(batch), len(plan.positions), d_model)).transpose(0, 1)
                own[layer] = _array(sums, (len(batch), d_model)).sum(0)
                missing.discard(layer)
        if missing:
            raise EngineFailed(f"the layers {sorted(missing)} were read by no worker")
        return Activations(picked, own)


def _array(data: bytes, shape: tuple[int, ...]) -> Tensor:
    return torch.from_numpy(np.frombuffer(data, np.float64).copy()).reshape(shape)


@dataclass(frozen=True, slots=True)
class Place:
    """The log-probabilities of the engine at one position of a text.

    Attributes:
        own: that of the token at this position.
        top: those of the likeliest tokens, by token.
    """

    own: float
    top: dict[int, float]

    @classmethod
    def of(cls, said: Mapping[int, Logprob], token: int) -> Place:
        return cls(said[token].logprob, {each: one.logprob for each, one in said.items() if one.rank <= TOP_LOGPROBS})


@dataclass(frozen=True, slots=True)
class Sampled:
    """A plain answer at temperature 1.

    Attributes:
        ids: the token ids of the prompt and the answer.
        start: the position at which the answer begins.
        places: the log-probabilities at each position of the answer.
    """

    ids: list[int]
    start: int
    places: list[Place]

    def first(self, tokens: int) -> Sampled:
        """The same with only the first `tokens` tokens of the answer."""
        return Sampled(self.ids[: self.start + tokens], self.start, self.places[:tokens])


def estimated_divergence(token: int, plain: Place, steered: Place) -> float:
    """An unbiased estimate of KL(p ‖ q), in nats, from one token drawn from p, and the likeliest tokens of p and of q.

    KL is the sum of f = p ln(p/q) − p + q over the vocabulary, and no term is negative. For the likeliest tokens of p
    or q, f is known or has a lower bound. The sum counts this value in full, and the drawn token estimates only the
    remainder. Without the likeliest tokens (Schulman 2020, "Approximating KL divergence") a few hundred answers miss
    what steering does to tokens that are seldom drawn, and that can be most of the divergence.
    """
    p, q = plain.top, steered.top
    least_p, least_q = min(p.values(), default=-np.inf), min(q.values(), default=-np.inf)
    bounds = {each: _term(log_p, q.get(each, min(least_q, log_p))) for each, log_p in p.items()}
    bounds |= {each: _term(min(least_p, log_q), log_q) for each, log_q in q.items() if each not in p}
    rest = _term(plain.own, steered.own) - bounds.get(token, 0.0)
    return float(sum(bounds.values()) + max(rest, 0.0) * np.exp(-plain.own))


def _term(log_p: float, log_q: float) -> float:
    """p ln(p/q) − p + q."""
    difference = log_q - log_p
    return float(np.exp(log_p) * (np.expm1(difference) - difference)) if difference else 0.0


#: One text of the request language for all prompts, or a list with one for each; None means plain.
Steers: TypeAlias = str | Sequence[str | None] | None


class VllmEvaluator(Evaluator):
    def __init__(
        self, source: VllmSource, rendering: Rendering | None, max_tokens: int, progress: Progress | None = None
    ) -> None:
        super().__init__(source, rendering, max_tokens, progress)
        self.source, self.frontend, self.context = source, frontend.of(source.llm), source.context + 1

    @property
    def rank(self) -> int:
        return self.frontend.settings.rank

    @property
    def room(self) -> int:
        return self.frontend.settings.rows - self.frontend.registry.rows

    @contextmanager
    def resident(self, candidates: Sequence[Candidate]) -> Iterator[list[str | None]]:
        registry, put = self.frontend.registry, list[str]()
        directions, entries = named(candidates, self.frontend.placement.shape.thinking)
        try:
            for name, direction in directions.items():
                registry.put(name, direction.to_bytes(), store=False)
                put.append(name)
            yield [text([entry]) if entry.strength else None for entry in entries]
        finally:
            for name in put:
                registry.delete(name)

    def answers(
        self, prompts: Sequence[Prompt], steer: Steers, known: Callable[[str], bool] | None = None
    ) -> list[Answer]:
        """As in `Evaluator`, but `known` is not called: the engine ends an answer only by the parameters of its
        request, and the other requests of the batch do not wait for it."""
        options: dict[str, Any] = dict(temperature=0, max_tokens=self.max_tokens)
        encoded = self._ids(prompts)
        thinking = self._opened(encoded)
        outputs = self._generate(encoded, steer, answering(self.max_tokens), **options)
        return [Answer(_without_end(one.outputs[0]), thinking + one.outputs[0].text) for one in outputs]

    def opening_odds(self, prompts: Sequence[Prompt], steer: Steers, tokens: Sequence[int]) -> Floats:
        """As in `Evaluator`. The engine gives the float32 log-probabilities of these tokens, so the odds are exact up
        to their rounding: values above about 16 cannot be told apart, because p is 1 in float32."""
        options: dict[str, Any] = dict(temperature=0, max_tokens=1, logprob_token_ids=list(tokens), detokenize=False)
        odds = []
        for output in self._generate(self._ids(prompts), steer, 1.0, **options):
            found = output.outputs[0].logprobs[0]
            log_p = float(np.logaddexp.reduce([np.float64(found[token].logprob) for token in tokens]))
            odds.append(log_p - np.log(max(-np.expm1(log_p), np.finfo(np.float32).eps)))
        return np.array(odds)

    def continuations(self, prompts: Sequence[Prompt], plain: Sequence[Answer] | None = None) -> list[Sampled]:
        """Sampled answers, since greedy ones, such as `plain`, have no probabilities to estimate with."""
        heads = self._ids(prompts)
        sampling: dict[str, Any] = dict(temperature=1, top_p=1, top_k=0, seed=0)
        work = 0.0 if plain is not None else answering(self.max_tokens)
        sampled = []
        outputs = self._generate(heads, None, work, max_tokens=self.max_tokens, logprobs=TOP_LOGPROBS, **sampling)
        for head, output in zip(heads, outputs, strict=True):
            answer = output.outputs[0]
            places = [Place.of(entry, token) for entry, token in zip(answer.logprobs, answer.token_ids, strict=True)]
            sampled.append(Sampled(head + list(answer.token_ids), len(head), places))
        return sampled

    def divergences(self, prompts: Sequence[Prompt], plain: Sequence[Sampled], steer: Steers) -> list[Floats]:
        """KL(plain ‖ steered), estimated along sampled plain answers (`estimated_divergence`): an engine does not give
        the log-probabilities of the whole vocabulary."""
        options: dict[str, Any] = dict(temperature=0, max_tokens=1, prompt_logprobs=TOP_LOGPROBS)
        rows = []
        decided = self._decided([one.ids[: one.start] for one in plain], each_row(steer, len(plain)))
        outputs = self._generate(
            [one.ids for one in plain], decided, 1.0, scored=[one.start for one in plain], **options
        )
        for one, output in zip(plain, outputs, strict=True):
            own = [*enumerate(one.ids)][one.start :]
            places = [(token, Place.of(output.prompt_logprobs[i], token)) for i, token in own]
            both = zip(places, one.places, strict=True)
            rows.append(np.array([estimated_divergence(token, plain, steered) for (token, steered), plain in both]))
        return rows

    def _decided(self, prompts: Sequence[list[int]], steers: Sequence[str | None]) -> list[str | None]:
        """The steering of each prompt, with conditions that one token decides replaced by their result: the steering
        without the condition if the prompt meets it, and None if it does not. A pass that reads the prompt together
        with the answer would have run past the token that decides."""
        found = list(steers)
        asked = {i: parse(one) for i, one in enumerate(steers) if one}
        asked = {
            i: items for i, items in asked.items() if any(item.condition and not item.condition.each for item in items)
        }
        tickets: dict[int, frontend.Ticket] = {}
        try:
            for i, items in asked.items():
                admission = Admission.of(self.frontend.registry, items)
                tickets[i] = self.frontend.ticket(admission)
            names, begun = [ticket.name for ticket in tickets.values()], [prompts[i] for i in tickets]
            if names:
                self._generate(begun, names, 0.0, temperature=0, max_tokens=1, detokenize=False)
        finally:
            for ticket in tickets.values():
                self.frontend.forget(ticket)
                ticket.admission.release()
        for i, ticket in tickets.items():
            if len(ticket.holds) != 1:
                raise EngineFailed(f"the engine did not tell whether prompt {i} meets the condition {steers[i]}")
            (holds,) = ticket.holds.values()
            found[i] = text([replace(item, condition=None) for item in asked[i]]) if holds else None
        return found

    def log_probabilities(self, sequences: Sequence[Sequence[int]], steer: str | None) -> list[Floats]:
        if steer is not None and (tokens := parse(steer)[0].tokens):
            raise SpecError(f"tokens: '{tokens}': here it is not known where the prompt ends", param="steer.tokens")
        outputs = self._generate(
            [list(ids) for ids in sequences], steer, 1.0, temperature=0, max_tokens=1, prompt_logprobs=0
        )
        return [
            np.array([output.prompt_logprobs[i][ids[i]].logprob for i in range(1, len(ids))])
            for ids, output in zip(sequences, outputs, strict=True)
        ]

    def _generate(
        self,
        prompts: Sequence[list[int]],
        steer: Steers,
        work: float,
        *,
        scored: Sequence[int] | None = None,
        **options: Any,
    ) -> list[RequestOutput]:
        """Generate from `prompts`, and return vLLM's outputs.

        Args:
            work: how far each prompt advances the progress.
            scored: for each prompt, how many of its tokens are a prompt; the other tokens are an answer to it.
        """
        from vllm import SamplingParams

        extra: list[dict[str, object]] = [{KEY: one or "off"} for one in each_row(steer, len(prompts))]
        for one, start in zip(extra, scored or (), strict=scored is not None):
            one[SCORED] = start
        parameters = [SamplingParams(extra_args=one, **options) for one in extra]
        return self.source.llm.generate(
            [{"prompt_token_ids": ids} for ids in prompts], parameters, use_tqdm=partial(Finished, self.progress, work)
        )


class Finished(tqdm):
    """Takes the place of the engine's own bars, and advances `progress` for each request that has finished. A bar
    around an `iterable` counts requests that are being added, and does not advance `progress`."""

    def __init__(self, progress: Progress, work: float, iterable: object = None, **options: object) -> None:
        self._progress, self._work = progress, work if iterable is None else 0.0
        super().__init__(iterable, **options | {"file": StringIO()})

    def update(self, n: float | None = 1) -> bool | None:
        self._progress.advance((n or 0) * self._work)
        return super().update(n)


def _without_end(answer: CompletionOutput) -> list[int]:
    """The answer's tokens without the one that ended it."""
    ids = list(answer.token_ids)
    return ids[:-1] if answer.finish_reason == "stop" else ids
