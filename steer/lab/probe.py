"""The evaluator for a loaded model: greedy answers, and how directions change the model's predictions.

Every prompt is a row of a batch with its own steering, so that any number of candidates are tried at once (see
`steer.lab.evaluator`).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, TypeAlias, TypeVar

import numpy as np
import torch
from torch import Tensor

from steer.errors import UnsupportedModel
from steer.hf.internals import Decoding, everywhere, longest_beside, move_back, short, whole_cache
from steer.hf.load import Loaded
from steer.hf.steering import Steering
from steer.lab.evaluator import Candidate, Evaluator, Floats, each_row, named
from steer.lab.outcome import Answer
from steer.lab.progress import Progress, answering
from steer.lab.prompts import Prompt, Rendering
from steer.lab.source import AUTO, differs, in_batches, left_padded, looks_ahead, right_padded
from steer.runtime.token_index import RequestSteer
from steer.spec import Spec

T = TypeVar("T")
#: One spec for all prompts, or one for each prompt. None is the plain model.
Steers: TypeAlias = Spec | Sequence[Spec | None] | None
#: Most bytes of cache that a batch of answers may hold. A batch of AUTO rows is tried even if it takes more.
CACHE_BYTES = 2**30
#: Least tokens that must be saved by running the shared beginning of prompts separately.
BEGUN_TOKENS = 64
#: Most rows of a batch.
MOST = 512
#: Most bytes of logits in one teacher-forced pass, and most bytes of kept log-probabilities of plain answers.
LOGIT_BYTES, KEPT_BYTES = 2**29, 2**30
#: Most tokens of a teacher-forced pass on a CPU, so that its data stays in the processor's cache.
CPU_TOKENS = 4096


@dataclass(frozen=True, slots=True)
class Continued(Answer):
    """A plain answer with the log-probabilities along it.

    Attributes:
        logprobs: `[tokens + 1, vocabulary]`, with the prediction of the end; None if they would take too much memory.
    """

    logprobs: Tensor | None = None

    def first(self, tokens: int) -> Continued:
        """The answer with only the first `tokens` predictions: `tokens - 1` ids. The text stays complete."""
        if len(self.ids) < tokens:
            return self
        kept = None if self.logprobs is None else self.logprobs[:tokens]
        return Continued(self.ids[: tokens - 1], self.text, kept)


class HFEvaluator(Evaluator):
    """Greedy answers and divergences of one loaded model.

    Raises:
        UnsupportedModel: the model cannot run batches of padded rows that continue from a cache.
    """

    def __init__(
        self,
        loaded: Loaded,
        steering: Steering,
        rendering: Rendering | None = None,
        max_tokens: int = 64,
        batch_size: int | None = None,
        progress: Progress | None = None,
    ) -> None:
        super().__init__(loaded, rendering, max_tokens, progress)
        self.loaded, self.steering, self.batch_size, self.context = loaded, steering, batch_size, loaded.context
        cache_name(loaded.model)
        eos = loaded.eos_ids
        self._pad = loaded.tokenizer.pad_token_id if loaded.tokenizer.pad_token_id is not None else (eos or [0])[0]
        steering.attach()
        self._longest = longest_beside(loaded.model.config)
        self._check_padding()

    @torch.inference_mode()
    def _check_padding(self) -> None:
        """Raise UnsupportedModel if the logits of a padded row differ from those of the row alone.

        Then the padding has an effect: the attention looks ahead, or the model makes its own mask.
        """
        anatomy = self.steering.anatomy
        long = ((torch.arange(12) * 7 + 11) % anatomy.vocabulary).tolist()
        ids, mask = left_padded([long, long[:5]], self._pad, anatomy.device)
        try:
            alone, _ = last_logits(anatomy.model, ids[1:, -5:], mask[1:, -5:])
            left, _ = last_logits(anatomy.model, ids, mask)
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise UnsupportedModel(
                f"{type(anatomy.model).__name__}: a pass over a padded batch fails ({short(error)}), so that it cannot "
                "be tried in batches; accepted: a model that transformers runs with a mask and a cache"
            ) from error
        for side, seen in (
            ("in front", differs(left[1], alone[0], anatomy.dtype)),
            ("at the end", looks_ahead(anatomy)),
        ):
            if seen:
                raise UnsupportedModel(
                    f"{type(anatomy.model).__name__}: padding {side} of a row changes its answer, so that it cannot be "
                    "tried in batches"
                )

    @property
    def rank(self) -> int:
        return self.steering.bank.rank

    @property
    def room(self) -> int:
        return self.steering.bank.rows - self.steering.bank.rows_in_use

    @contextmanager
    def resident(self, candidates: Sequence[Candidate]) -> Iterator[list[Spec | None]]:
        bank, (directions, entries) = self.steering.bank, named(candidates, self.loaded.thinking)
        try:
            for name, direction in directions.items():
                bank.load(name, direction)
            yield [Spec((entry,)) if entry.strength else None for entry in entries]
        finally:
            for name in directions:
                bank.unload(name)

    def answers(
        self, prompts: Sequence[Prompt], steer: Steers, known: Callable[[str], bool] | None = None
    ) -> list[Answer]:
        encoded, steers = self._ids(prompts), each_row(steer, len(prompts))
        thinking = self._opened(encoded)

        def decode(ids: list[int]) -> str:
            return thinking + str(self.loaded.tokenizer.decode(ids, skip_special_tokens=True))

        def enough(ids: list[int]) -> bool:
            return known is not None and known(decode(ids))

        longest = self._longest - self.max_tokens

        def run(indices: list[int]) -> list[Answer]:
            self.steering.anatomy.forget_lengths()
            rows, specs = [encoded[i] for i in indices], [steers[i] for i in indices]
            alone = len(rows[0]) > longest
            found = [self._greedy_alone(rows[0], specs[0], enough)] if alone else self._greedy(rows, specs, enough)
            return [Answer(ids, decode(ids)) for ids in found]

        size = self.batch_size or self._fitting(max(map(len, encoded), default=0) + self.max_tokens)
        work = answering(self.max_tokens)
        return in_batches(encoded, run, batch_size=size, progress=self.progress, work=work, longest=longest)

    def _fitting(self, tokens: int) -> int:
        """How many rows of `tokens` tokens a batch may have. With more rows, less of each step is overhead."""
        return max(AUTO, min(MOST, CACHE_BYTES // (cache_bytes(self.steering) * max(1, tokens))))

    def opening_odds(self, prompts: Sequence[Prompt], steer: Steers, tokens: Sequence[int]) -> Floats:
        """Run one prefill and use only the prediction at its last position."""
        encoded, specs = self._ids(prompts), each_row(steer, len(prompts))
        model, device = self.steering.anatomy.model, self.steering.anatomy.device

        @torch.inference_mode()
        def run(indices: list[int]) -> list[float]:
            self.steering.anatomy.forget_lengths()
            rows, row_specs = [encoded[i] for i in indices], [specs[i] for i in indices]
            ids, mask, spans, cache = self._remainder(rows, row_specs)
            with self._entries(rows, row_specs) as steers, self.steering.padded_batch(steers, spans, ids, left=True):
                logits = last_logits(model, ids, mask, cache)[0].double()
            inside = torch.zeros(logits.shape[-1], dtype=torch.bool, device=device)
            inside[list(tokens)] = True
            odds = logits[:, inside].logsumexp(-1) - logits[:, ~inside].logsumexp(-1)
            return [float(value) for value in odds]

        size = self.batch_size or self._fitting(max(map(len, encoded), default=1))
        found = in_batches(encoded, run, batch_size=size, progress=self.progress, longest=self._longest)
        return np.array(found)

    def continuations(self, prompts: Sequence[Prompt], plain: Sequence[Answer] | None = None) -> list[Continued]:
        """The plain model's greedy answers, or `plain` if given, with log-probabilities if there is room for them."""
        if plain is None:
            plain = self.answers(prompts, None)
        tokens = sum(len(answer.ids) + 1 for answer in plain)
        if tokens * self.steering.anatomy.vocabulary * 4 > KEPT_BYTES:
            return [Continued(answer.ids, answer.text) for answer in plain]
        kept = self._forced(prompts, plain, [None] * len(prompts), lambda _row, logprobs: logprobs.clone())
        return [Continued(answer.ids, answer.text, each) for answer, each in zip(plain, kept, strict=True)]

    def divergences(self, prompts: Sequence[Prompt], plain: Sequence[Answer], steer: Steers) -> list[Floats]:
        """Run the plain and the steered model along the plain answer (teacher forcing)."""
        expected = [answer.logprobs if isinstance(answer, Continued) else None for answer in plain]
        missing = [i for i, one in enumerate(expected) if one is None]
        tokens = sum(len(plain[i].ids) + 1 for i in missing)
        if tokens * self.steering.anatomy.vocabulary * 4 > KEPT_BYTES and len(prompts) > 1:
            steers, half = each_row(steer, len(prompts)), len(prompts) // 2
            parts = (slice(half), slice(half, None))
            return [row for at in parts for row in self.divergences(prompts[at], plain[at], steers[at])]
        if missing:
            some = [prompts[i] for i in missing], [plain[i] for i in missing], [None] * len(missing)
            for i, found in zip(missing, self._forced(*some, lambda _row, logprobs: logprobs.clone()), strict=True):
                expected[i] = found

        def kl(row: int, q: Tensor) -> Floats:
            p = expected[row]
            assert p is not None
            return kl_divergence(p, q).cpu().numpy()

        return self._forced(prompts, plain, each_row(steer, len(prompts)), kl, self.progress)

    def _forced(
        self,
        prompts: Sequence[Prompt],
        plain: Sequence[Answer],
        specs: Sequence[Spec | None],
        take: Callable[[int, Tensor], T],
        progress: Progress | None = None,
    ) -> list[T]:
        """Run the model along each row's plain answer under its spec.

        Returns:
            For each row the result of `take(row, logprobs)`, with log-probabilities `[tokens + 1, vocabulary]`.
        """
        anatomy, heads = self.steering.anatomy, self._ids(prompts)
        # an answer that ended at once still has one prediction: the end
        whole = [head + answer.ids for head, answer in zip(heads, plain, strict=True)]
        longest = max((len(answer.ids) + 1 for answer in plain), default=1)
        fitting = max(1, LOGIT_BYTES // (longest * anatomy.vocabulary * 4 * 2))
        if anatomy.device.type == "cpu":
            fitting = min(fitting, max(1, CPU_TOKENS // max(map(len, whole), default=1)))

        chosen = "logits_to_keep" in inspect.signature(anatomy.model.forward).parameters

        @torch.inference_mode()
        def run(indices: list[int]) -> list[T]:
            anatomy.forget_lengths()
            prompts, row_specs = [heads[i] for i in indices], [specs[i] for i in indices]
            shared, cache = self._shared_prefix(prompts, row_specs)
            ids = right_padded([whole[i][shared:] for i in indices], self._pad, anatomy.device)
            spans = [(len(heads[i]) - 1 - shared, len(whole[i]) - shared) for i in indices]
            kept = torch.arange(min(start for start, _ in spans), max(stop for _, stop in spans), device=anatomy.device)
            with self._entries(prompts, row_specs) as steers:
                if any(spec is not None and spec.decided_once for spec in row_specs):
                    # decide in a pass over the prompts alone: with the answers it would go past the tokens that decide
                    alone = right_padded(prompts, self._pad, anatomy.device)
                    with self.steering.padded_batch(steers, [range(len(prompt)) for prompt in prompts], alone):
                        anatomy.decoder(input_ids=alone, use_cache=False)
                with self.steering.padded_batch(steers, [range(shared, len(whole[i])) for i in indices], ids):
                    logits = anatomy.model(
                        input_ids=ids,
                        **({} if cache is None else {"past_key_values": cache}),
                        use_cache=cache is not None,
                        **({"logits_to_keep": kept} if chosen else {}),
                    ).logits
            logits = logits if chosen else logits[:, kept]
            first = int(kept[0])
            return [
                take(i, torch.log_softmax(row[start - first : stop - first].float(), -1))
                for i, row, (start, stop) in zip(indices, logits, spans, strict=True)
            ]

        size = min(self.batch_size or fitting, fitting)
        return in_batches(whole, run, batch_size=size, progress=progress, longest=self._longest)

    def log_probabilities(self, sequences: Sequence[Sequence[int]], steer: Spec | None) -> list[Floats]:
        anatomy = self.steering.anatomy
        fitting = max(1, LOGIT_BYTES // (max(map(len, sequences)) * anatomy.vocabulary * 4 * 2))

        @torch.inference_mode()
        def run(indices: list[int]) -> list[Floats]:
            anatomy.forget_lengths()
            ids = right_padded([sequences[i] for i in indices], self.loaded.tokenizer.pad_token_id or 0, anatomy.device)
            with self.steering.batch([steer]):
                logprobs = torch.log_softmax(anatomy.model(input_ids=ids, use_cache=False).logits.float(), -1)
            own = logprobs[:, :-1].gather(-1, ids[:, 1:, None])[..., 0].cpu().double().numpy()
            return [row[: len(sequences[i]) - 1] for i, row in zip(indices, own, strict=True)]

        size = min(self.batch_size or fitting, fitting)
        return in_batches(sequences, run, batch_size=size, progress=self.progress, longest=self._longest)

    @torch.inference_mode()
    def _greedy(
        self, prompts: Sequence[Sequence[int]], specs: Sequence[Spec | None], enough: Callable[[list[int]], bool]
    ) -> list[list[int]]:
        """Answer each prompt greedily under its spec.

        Only the last position goes through the unembedding. A finished row is removed from the cache, so that later
        steps run only the rows that remain.

        Args:
            enough: whether an answer may end early, because ids after these would change nothing.

        Returns:
            The ids of each answer, without the end token.
        """
        model, device = self.steering.anatomy.model, self.steering.anatomy.device
        with self._entries(prompts, specs) as steers:
            ids, mask, spans, cache = self._remainder(prompts, specs)
            answers: list[list[int]] = [[] for _ in prompts]
            rows, ending = list(range(len(prompts))), set(self.loaded.eos_ids)
            for step in range(self.max_tokens):
                with self.steering.padded_batch([steers[row] for row in rows], spans, ids, left=True):
                    logits, cache = last_logits(model, ids, mask, cache)
                chosen, going = logits.argmax(-1), []
                for at, (row, token) in enumerate(zip(rows, chosen.tolist(), strict=True)):
                    if token in ending:
                        continue
                    answers[row].append(token)
                    if not enough(answers[row]):
                        going.append(at)
                if not going or step == self.max_tokens - 1:
                    break
                if len(going) < len(rows):
                    kept = torch.tensor(going, device=device)
                    cache.reorder_cache(kept)  # unlike `batch_select_indices`, caches of states have it too
                    chosen, mask, rows = chosen[kept], mask[kept], [rows[at] for at in going]
                ids, mask = chosen.unsqueeze(1), torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
                spans = [range(at := len(prompts[row]) + step, at + 1) for row in rows]
        return answers

    @torch.inference_mode()
    def _greedy_alone(self, prompt: Sequence[int], spec: Spec | None, enough: Callable[[list[int]], bool]) -> list[int]:
        """Answer one prompt as `_greedy` does, but continue as the model's own `generate` would.

        Some models compute their cache again when a text becomes longer than `longest_beside`.
        """
        decoding, answer = Decoding(self.steering.anatomy.model, prompt, self.max_tokens), list[int]()
        with self._entries([prompt], [spec]) as steers:
            while len(answer) < self.max_tokens:
                inputs = decoding.inputs()
                ids = inputs["input_ids"]
                with self.steering.padded_batch(steers, [range(decoding.length - ids.shape[1], decoding.length)], ids):
                    token = int(decoding.logits(inputs).argmax())
                if token in self.loaded.eos_ids:
                    break
                answer.append(token)
                if enough(answer):
                    break
                decoding.append(token)
        return answer

    @contextmanager
    def _entries(
        self, prompts: Sequence[Sequence[int]], specs: Sequence[Spec | None]
    ) -> Iterator[list[RequestSteer | None]]:
        """Yield the token index entries of each prompt under its spec; each has its own decision inside the block."""
        steer, decisions = functools.cache(self.steering.bank.steer), self.steering.index.decisions
        with ExitStack() as stack:
            steers = []
            for prompt, spec in zip(prompts, specs, strict=True):
                made = steer(spec, len(prompt), spec.phase(self.loaded.thinking, prompt)) if spec else None
                steers.append(decisions.take(made))
                stack.callback(decisions.give, steers[-1])
            yield steers

    def _shared_prefix(self, prompts: Sequence[Sequence[int]], specs: Sequence[Spec | None]) -> tuple[int, Any]:
        """Run the tokens with which all `prompts` begin (the chat template's) once for each different spec.

        Specs that act in the same way on these tokens share one row.

        Returns:
            The number of these tokens, at least one fewer than each prompt has, and the cache after them with a row for
            each prompt; (0, None) if too few tokens would be saved, or if the model's cache does not hold the keys and
            values of all tokens and nothing else.
        """
        columns = zip(*(prompt[:-1] for prompt in prompts), strict=False)
        length = sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))
        acts = [
            (spec, *(min(bound, length) for each in spec.entries for bound in each.span(len(prompt)))) if spec else None
            for prompt, spec in zip(prompts, specs, strict=True)
        ]
        different = list({each: at for at, each in enumerate(acts)}.values())
        anatomy = self.steering.anatomy
        if length * (len(prompts) - len(different)) < BEGUN_TOKENS or not whole_cache(anatomy.model):
            return 0, None
        ids = torch.tensor([prompts[0][:length]] * len(different), device=anatomy.device)
        with (
            self._entries([prompts[at] for at in different], [specs[at] for at in different]) as steers,
            self.steering.padded_batch(steers, [range(length)] * len(steers), ids),
        ):
            out: Any = anatomy.decoder(input_ids=ids, use_cache=True)
        cache: Any = getattr(out, "past_key_values", None)
        if not whole_cache(anatomy.model, cache):
            return 0, None
        row = {acts[at]: number for number, at in enumerate(different)}
        cache.batch_select_indices(torch.tensor([row[each] for each in acts], device=ids.device))
        return length, cache

    def _remainder(
        self, prompts: Sequence[Sequence[int]], specs: Sequence[Spec | None]
    ) -> tuple[Tensor, Tensor, list[range], Any]:
        """Run the shared prefix of `prompts` and prepare a pass over the rest of them, padded in front.

        In the cache the prefix is moved behind the padding, so that the tokens of each row are adjacent: otherwise
        attention that counts positions (a bias, a window) would count the padding between them. A shorter row keeps
        less of the prefix, and runs the last tokens of the prefix again in place of padding.

        Returns:
            ids `[rows, positions]`, mask `[rows, all positions]`, the positions of each row in its prompt, and the
            cache (None if there is no shared prefix).
        """
        start, cache = self._shared_prefix(prompts, specs)
        ids, mask = left_padded(prompts, self._pad, self.steering.anatomy.device)
        padding = [ids.shape[1] - len(prompt) for prompt in prompts]
        if cache is not None:
            move_back(cache, padding)
        spans = [range(max(0, start - before), len(prompt)) for before, prompt in zip(padding, prompts, strict=True)]
        return ids[:, start:], mask, spans, cache


def kl_divergence(p: Tensor, q: Tensor) -> Tensor:
    """KL(p ‖ q) in nats, `[…]`, of log-probabilities `[…, vocabulary]` of any dtype.

    The log-probabilities are normalised again in float64, because the rounding error of their sums could be as large as
    a small divergence. A token with −inf in p adds nothing, whatever its value in q.
    """
    p, q = p.double().log_softmax(-1), q.double().log_softmax(-1)
    return torch.where(p.isneginf(), 0.0, p.exp() * (p - q)).sum(-1).clamp_min(0)


def cache_bytes(steering: Steering) -> int:
    """The bytes that the keys and values of one token take in all layers together."""
    anatomy = steering.anatomy
    config = anatomy.model.config.get_text_config()
    heads = everywhere(config, "num_attention_heads")
    head = everywhere(config, "head_dim") or (anatomy.d_model // heads if heads else None)
    kept = everywhere(config, "num_key_value_heads") or heads  # several heads may share their keys and values
    width = kept * head if kept and head else anatomy.d_model
    return int(2 * anatomy.layers * width * anatomy.dtype.itemsize)


def cache_name(model: Any) -> str:
    """The name of the cache among the model's arguments and in its output.

    Raises:
        UnsupportedModel: the model takes no cache, or no mask for padding.
    """
    takes = inspect.signature(model.forward).parameters
    name = next((name for name in ("past_key_values", "cache_params") if name in takes), None)
    lacking = ["past_key_values"] * (name is None) + ["attention_mask"] * ("attention_mask" not in takes)
    if name is None or lacking:
        raise UnsupportedModel(
            f"{type(model).__name__} takes no {' and no '.join(lacking)}: its answers cannot be generated in batches"
        )
    return name


def last_logits(model: Any, ids: Tensor, mask: Tensor, cache: Any = None) -> tuple[Tensor, Any]:
    """Run a pass over new tokens. Only the last position goes through the unembedding.

    Args:
        ids: the new tokens, `[rows, positions]`.
        mask: 0 at the padding in front, otherwise 1, `[rows, all positions]`.
        cache: the cache of the tokens before these; None if there are none.

    Returns:
        The logits after each row, `[rows, vocabulary]`, and the cache.

    Raises:
        UnsupportedModel: the model returns no cache.
    """
    takes, name = inspect.signature(model.forward).parameters, cache_name(model)
    positions = (mask.cumsum(-1) - 1).clamp_min(0)[:, -ids.shape[1] :]
    options = {"position_ids": positions, "logits_to_keep": 1}
    out = model(
        input_ids=ids,
        # a state has no padding: models with states take a mask of the new tokens only
        attention_mask=mask if name == "past_key_values" else mask[:, -ids.shape[1] :],
        use_cache=True,
        **{name: cache},
        **{option: value for option, value in options.items() if option in takes},
    )
    if not hasattr(out, name):
        raise UnsupportedModel(f"{type(model).__name__} returns no {name}: its answers cannot go on from a cache")
    return out.logits[:, -1], getattr(out, name)
