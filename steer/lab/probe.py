"""One loaded model tried out, plain or steered: greedy answers, and what a direction does to the predictions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from steer.direction import Direction, Mode
from steer.hf.attach import Steering
from steer.hf.load import Loaded
from steer.lab.batches import in_batches, left_padded, right_padded
from steer.lab.encode import encode_all
from steer.lab.prompts import Prompt
from steer.runtime.index import RequestSteer
from steer.runtime.modes import check_mode
from steer.spec import Entry, Spec

#: Bytes of logits that one teacher-forced pass may hold.
LOGIT_BYTES = 2**29


@dataclass(frozen=True, slots=True)
class Answered:
    """One greedy answer: its token ids (without the end) and text."""

    ids: list[int]
    text: str


@dataclass(frozen=True, slots=True)
class Divergence:
    """KL(plain ‖ steered) in nats: mean, median and 95th percentile over prompts of the mean over tokens, and the same
    for the first token alone."""

    mean: float
    median: float
    p95: float
    first_mean: float
    first_median: float
    first_p95: float


class Probe:
    """Greedy answers and divergences of one loaded model, plain or steered."""

    def __init__(
        self,
        loaded: Loaded,
        steering: Steering,
        system_prompt: str | None = None,
        max_tokens: int = 64,
        batch_size: int | None = None,
        progress: bool = False,
    ) -> None:
        self.loaded, self.steering, self.system_prompt = loaded, steering, system_prompt
        self.max_tokens, self.batch_size, self.progress = max_tokens, batch_size, progress
        steering.attach()

    @contextmanager
    def resident(self, direction: Direction, mode: Mode, strength: float) -> Iterator[RequestSteer | None]:
        """`direction` in the table while it lasts, as index entries."""
        name = "candidate"
        check_mode(direction, mode, name)
        self.steering.table.load(name, direction)
        try:
            yield self.steering.table.steer(Spec((Entry(name, name, mode, strength),)))
        finally:
            self.steering.table.unload(name)

    def answers(self, prompts: Sequence[Prompt], steer: RequestSteer | None, title: str = "") -> list[Answered]:
        """Greedy answers of at most `max_tokens` tokens, in the order of `prompts`."""
        loaded, model = self.loaded, self.loaded.model
        encoded = [e.ids for e in encode_all(loaded, prompts, self.system_prompt)]
        eos = loaded.eos_ids
        pad = loaded.tokenizer.pad_token_id if loaded.tokenizer.pad_token_id is not None else (eos or [0])[0]

        @torch.inference_mode()
        def run(indices: list[int]) -> list[Answered]:
            ids, mask = left_padded([encoded[i] for i in indices], pad, self.steering.anatomy.device)
            with self.steering.batch([steer]):
                out = model.generate(
                    ids,
                    attention_mask=mask,
                    max_new_tokens=self.max_tokens,
                    do_sample=False,
                    temperature=None,
                    top_p=None,
                    top_k=None,
                    eos_token_id=eos or None,
                    pad_token_id=pad,
                )
            return [self._answered(row) for row in out[:, ids.shape[1] :].tolist()]

        return in_batches(encoded, run, batch_size=self.batch_size, title=title if self.progress else "")

    def _answered(self, ids: list[int]) -> Answered:
        end = next((i for i, token in enumerate(ids) if token in self.loaded.eos_ids), len(ids))
        return Answered(ids[:end], self.loaded.tokenizer.decode(ids[:end], skip_special_tokens=True))

    def continuations(self, prompts: Sequence[Prompt], title: str = "") -> list[Answered]:
        """The plain text along which divergences are taken: the model's own greedy answers."""
        return self.answers(prompts, None, title)

    def divergence(
        self, prompts: Sequence[Prompt], plain: Sequence[Answered], steer: RequestSteer | None, title: str = ""
    ) -> Divergence:
        """KL(plain ‖ steered) at each token of the plain answers, which both passes read (teacher forcing)."""
        loaded, anatomy = self.loaded, self.steering.anatomy
        heads = [e.ids for e in encode_all(loaded, prompts, self.system_prompt)]
        # an answer that ended at once still has its first prediction, the end itself
        whole = [head + answer.ids for head, answer in zip(heads, plain, strict=True)]
        longest = max(map(len, whole))
        fitting = max(1, LOGIT_BYTES // (longest * anatomy.vocabulary * 4 * 2))

        @torch.inference_mode()
        def run(indices: list[int]) -> list[np.ndarray[Any, Any]]:
            ids = right_padded([whole[i] for i in indices], loaded.tokenizer.pad_token_id or 0, anatomy.device)
            p = torch.log_softmax(anatomy.model(input_ids=ids, use_cache=False).logits.float(), -1)
            with self.steering.batch([steer]):
                q = torch.log_softmax(anatomy.model(input_ids=ids, use_cache=False).logits.float(), -1)
            kl = (p.exp() * (p - q)).sum(-1).clamp_min(0).cpu().double().numpy()
            spans = [slice(len(heads[i]) - 1, len(whole[i])) for i in indices]
            return [row[span] for row, span in zip(kl, spans, strict=True)]

        size = min(self.batch_size or fitting, fitting)
        rows = in_batches(whole, run, batch_size=size, title=title if self.progress else "")
        return summarised(rows)

    def log_probabilities(
        self, sequences: Sequence[Sequence[int]], steer: RequestSteer | None, title: str = ""
    ) -> list[np.ndarray[Any, Any]]:
        """The log-probability of each token but the first of each sequence, `[tokens − 1]`, in nats."""
        anatomy = self.steering.anatomy
        fitting = max(1, LOGIT_BYTES // (max(map(len, sequences)) * anatomy.vocabulary * 4 * 2))

        @torch.inference_mode()
        def run(indices: list[int]) -> list[np.ndarray[Any, Any]]:
            ids = right_padded([sequences[i] for i in indices], self.loaded.tokenizer.pad_token_id or 0, anatomy.device)
            with self.steering.batch([steer]):
                said = torch.log_softmax(anatomy.model(input_ids=ids, use_cache=False).logits.float(), -1)
            own = said[:, :-1].gather(-1, ids[:, 1:, None])[..., 0].cpu().double().numpy()
            return [row[: len(sequences[i]) - 1] for i, row in zip(indices, own, strict=True)]

        size = min(self.batch_size or fitting, fitting)
        return in_batches(sequences, run, batch_size=size, title=title if self.progress else "")


def summarised(rows: Sequence[np.ndarray[Any, Any]]) -> Divergence:
    """From the divergence at each token of each prompt's answer."""
    per_prompt, first = np.array([row.mean() for row in rows]), np.array([row[0] for row in rows])
    return Divergence(*_summary(per_prompt), *_summary(first))


def _summary(values: np.ndarray[Any, Any]) -> tuple[float, float, float]:
    return float(values.mean()), float(np.median(values)), float(np.percentile(values, 95))
