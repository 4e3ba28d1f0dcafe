"""Measure a model on two contrast sets: class means at every layer, from one prefill pass over each prompt.

Hooks pick the wanted positions out of each block's output and add them to float64 sums, so nothing is kept but one
vector for each layer and class. The decoder alone runs: no `generate`, no cache, no unembedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from steer.errors import InvalidInput
from steer.geometry import winsorise
from steer.hf.attach import Anatomy
from steer.hf.load import Loaded
from steer.lab.batches import in_batches, right_padded
from steer.lab.prompts import PromptSet, check_contrast
from steer.runtime.sites import hooks, on_output


@dataclass(frozen=True, slots=True)
class Conditions:
    """How prompts become activations; everything that the result depends on besides model and prompts."""

    position: int = -1
    winsorize: float | None = None
    system_prompt: str | None = None


@dataclass(frozen=True, slots=True)
class Measurement:
    """Class means of one model: `[layers, d_model]`, float64. `mean_harmless_all` is over all positions of the harmless
    prompts' own text, the others are at `conditions.position` (−1 is the last token of the chat template)."""

    conditions: Conditions
    harmful: PromptSet
    harmless: PromptSet
    mean_harmful: Tensor
    mean_harmless: Tensor
    mean_harmless_all: Tensor
    bos_count: int


@dataclass(frozen=True, slots=True)
class Encoded:
    """A prompt in the chat template: its ids, and which of them are the prompt's own text."""

    ids: list[int]
    own: slice


def encode(loaded: Loaded, prompt: str, system_prompt: str | None = None) -> Encoded:
    """The ids that the server would make of a conversation with this one user message."""
    messages = [{"role": "system", "content": system_prompt}] if system_prompt else []
    ids = loaded.chat_ids([*messages, {"role": "user", "content": prompt}])
    empty = loaded.chat_ids([*messages, {"role": "user", "content": ""}])
    start = next((i for i, (x, y) in enumerate(zip(ids, empty, strict=False)) if x != y), min(len(ids), len(empty)))
    same = zip(reversed(ids[start:]), reversed(empty[start:]), strict=False)
    behind = next((i for i, (x, y) in enumerate(same) if x != y), min(len(ids), len(empty)) - start)
    return Encoded(ids, slice(start, len(ids) - behind))


def measure(
    loaded: Loaded,
    harmful: PromptSet,
    harmless: PromptSet,
    conditions: Conditions | None = None,
    *,
    batch_size: int | None = None,
    progress: bool = False,
) -> Measurement:
    """Class means at every layer. Raises InvalidInput for sets that share prompts, prompts that do not fit the context
    or have no such position, and activations that are not finite."""
    conditions = conditions or Conditions()
    check_contrast(harmful, harmless)
    sums = {}
    bos: set[int] = set()
    for title, prompts in (("harmful", harmful), ("harmless", harmless)):
        encoded = [encode(loaded, prompt, conditions.system_prompt) for prompt in prompts.prompts]
        _check_lengths(loaded, prompts, encoded, conditions.position)
        bos |= {loaded.bos_count(e.ids) for e in encoded}
        sums[title] = _Sums(loaded, encoded, conditions)
        sums[title].run(batch_size, f"measuring {title}" if progress else "")
    if len(bos) != 1:
        raise InvalidInput(f"the chat template gives prompts different numbers of BOS tokens: {sorted(bos)}")
    return Measurement(
        conditions,
        harmful,
        harmless,
        sums["harmful"].mean(harmful),
        sums["harmless"].mean(harmless),
        sums["harmless"].mean_all(harmless),
        bos.pop(),
    )


def _check_lengths(loaded: Loaded, prompts: PromptSet, encoded: Sequence[Encoded], position: int) -> None:
    problems = []
    for number, e in enumerate(encoded):
        if len(e.ids) > loaded.context:
            problems.append(
                f"{prompts.name}: prompt {number + 1} has {len(e.ids)} tokens, the context is {loaded.context}"
            )
        if not -len(e.ids) <= position < len(e.ids):
            problems.append(f"{prompts.name}: prompt {number + 1} has {len(e.ids)} tokens, so no position {position}")
    if problems:
        raise InvalidInput(problems[:20])


class _Sums:
    """Running float64 sums over one class, `[layers, d_model]`, and the hooks that feed them."""

    def __init__(self, loaded: Loaded, encoded: Sequence[Encoded], conditions: Conditions) -> None:
        self.loaded, self.encoded, self.conditions = loaded, encoded, conditions
        self.anatomy = Anatomy(loaded.model)
        # MPS has no float64: there the picked rows are added up on the CPU
        self.device = torch.device("cpu") if self.anatomy.device.type == "mps" else self.anatomy.device
        shape = (self.anatomy.layers, self.anatomy.d_model)
        self.picked = torch.zeros(shape, dtype=torch.float64, device=self.device)
        self.all = torch.zeros(shape, dtype=torch.float64, device=self.device)
        self.positions = sum(e.own.stop - e.own.start for e in encoded)

    def run(self, batch_size: int | None, title: str) -> None:
        in_batches([e.ids for e in self.encoded], self._batch, batch_size=batch_size, title=title)

    @torch.inference_mode()
    def _batch(self, indices: list[int]) -> list[None]:
        batch = [self.encoded[i] for i in indices]
        lengths = torch.tensor([len(e.ids) for e in batch], device=self.device)
        position = self.conditions.position
        at = lengths + position if position < 0 else torch.full_like(lengths, position)
        ids = right_padded([e.ids for e in batch], self.loaded.tokenizer.pad_token_id or 0, self.anatomy.device)
        own = torch.zeros(ids.shape, dtype=torch.float64, device=self.device)
        for row, e in zip(own, batch, strict=True):
            row[e.own] = 1.0
        picked, everything = torch.zeros_like(self.picked), torch.zeros_like(self.all)

        def pick(layer: int, x: Tensor) -> None:
            x = x.to(self.device).double()
            rows = x[torch.arange(len(batch), device=self.device), at]
            if self.conditions.winsorize is not None:
                rows = winsorise(rows, self.conditions.winsorize)
            picked[layer] = rows.sum(0)
            everything[layer] = torch.einsum("bt,btd->d", own, x)

        handles = [on_output(block, lambda x, n=n: pick(n, x)) for n, block in enumerate(self.anatomy.blocks)]
        with hooks(handles):
            self.anatomy.decoder(input_ids=ids, use_cache=False)
        self.picked += picked  # only now, so that a batch that ran out of memory half-way is not counted twice
        self.all += everything
        return [None] * len(indices)

    def mean(self, prompts: PromptSet) -> Tensor:
        return self._finite(self.picked / len(self.encoded), prompts)

    def mean_all(self, prompts: PromptSet) -> Tensor:
        return self._finite(self.all / max(self.positions, 1), prompts)

    def _finite(self, mean: Tensor, prompts: PromptSet) -> Tensor:
        bad = torch.nonzero(~torch.isfinite(mean).all(dim=1)).flatten().tolist()
        if bad:
            raise InvalidInput(
                f"{prompts.name}: activations are not finite at layers {bad}; try --dtype float32 or bfloat16"
            )
        return mean.cpu()
