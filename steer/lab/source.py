"""Where activations come from: a model that runs encoded prompts. `TransformersSource` is the one in this process."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import suppress
from typing import Protocol

import torch
from torch import Tensor

from steer.errors import InvalidInput
from steer.hf.load import Loaded
from steer.hf.steering import Anatomy
from steer.lab.activations import Activations, Reader, Reading
from steer.lab.batches import each_batch, right_padded
from steer.lab.measurement import ModelFacts
from steer.lab.progress import Progress
from steer.lab.prompts import Encoded, Prompt, Rendering, encode_all
from steer.runtime.hook_points import hooks, on_output
from steer.runtime.op import component

#: Tokens of a pass on a CPU: the fewer, the less memory the activations take, but each pass reads all weights. With
#: blocks of 896 dimensions in float32 on two busy cores, 512 took 1.3 times and 1024 1.05 times the time of 2048.
CPU_TOKENS = 1024


class Source(Protocol):
    """A model to measure. Out of memory in `run` is a `torch.OutOfMemoryError`: the batch is then halved."""

    @property
    def facts(self) -> ModelFacts: ...

    @property
    def context(self) -> int:
        """The most tokens that a prompt may have."""
        ...

    @property
    def pass_tokens(self) -> int | None:
        """Tokens of a pass that are enough for full speed; None where more is better as long as there is memory."""
        ...

    def encode(self, prompts: Sequence[Prompt], rendering: Rendering | None) -> list[Encoded]: ...

    def bos_count(self, ids: Sequence[int]) -> int: ...

    def text_ids(self, text: str) -> list[int]:
        """The tokens of plain text."""
        ...

    def fingerprint(self) -> str:
        """Equal for equal weights and arithmetic: what was measured before an interruption is only added to if so."""
        ...

    def run(self, batch: Sequence[Encoded], reading: Reading) -> Activations: ...


class TransformersSource:
    """A model of transformers, loaded in this process. The decoder alone runs: no `generate`, no cache, no unembedding,
    no list of hidden states, and no block above the last that is wanted."""

    def __init__(self, loaded: Loaded) -> None:
        self.loaded, self.anatomy = loaded, Anatomy(loaded.model)

    @property
    def facts(self) -> ModelFacts:
        return ModelFacts(
            name=self.loaded.name,
            revision=self.loaded.revision,
            architecture=self.anatomy.architecture,
            d_model=self.anatomy.d_model,
            layers=self.anatomy.layers,
            dtype=str(self.anatomy.dtype).removeprefix("torch."),
            chat_template_sha256=self.loaded.template_sha256,
        )

    @property
    def context(self) -> int:
        return self.loaded.context

    @property
    def pass_tokens(self) -> int | None:
        return CPU_TOKENS if self.anatomy.device.type == "cpu" else None

    def encode(self, prompts: Sequence[Prompt], rendering: Rendering | None) -> list[Encoded]:
        if not self.loaded.tokenizer.chat_template:
            raise InvalidInput(f"the model {self.loaded.name} has no chat template, and prompts are measured in one")
        return encode_all(self.loaded, prompts, rendering)

    def bos_count(self, ids: Sequence[int]) -> int:
        return self.loaded.bos_count(ids)

    def text_ids(self, text: str) -> list[int]:
        return self.loaded.text_ids(text)

    def fingerprint(self) -> str:
        return hashlib.sha256(self.anatomy.probe().logits.float().cpu().numpy().tobytes()).hexdigest()

    @torch.inference_mode()
    def run(self, batch: Sequence[Encoded], reading: Reading) -> Activations:
        ids = right_padded([e.ids for e in batch], self.loaded.tokenizer.pad_token_id or 0, self.anatomy.device)
        reader = Reader(batch, reading, width=ids.shape[1])

        def take(layer: int, x: Tensor) -> None:
            reader.take(layer, x)
            if layer == reading.last_layer < self.anatomy.layers - 1:
                raise _Enough

        wanted = enumerate(self.anatomy.blocks[: reading.layers])
        with hooks([on_output(block, lambda x, n=n: take(n, x)) for n, block in wanted]):
            with suppress(_Enough):
                self.anatomy.decoder(input_ids=ids, use_cache=False)
        return reader.read()


def prompt_components(
    source: Source,
    rows: Tensor,
    encoded: Sequence[Encoded],
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """⟨x, v⟩ at the last token of each prompt and the output of the layers from 0 on, for which `rows` `[layers,
    d_model]` are. Returns `[layers, prompts]`, float32."""
    found, reading = torch.zeros(len(rows), len(encoded)), Reading((-1,), len(rows) - 1)

    def run(indices: list[int]) -> None:
        (picked,) = source.run([encoded[i] for i in indices], reading).picked
        found[:, indices] = component(picked.float(), rows[:, None])

    tokens = source.pass_tokens if batch_size is None else None
    each_batch([len(e.ids) for e in encoded], run, batch_size=batch_size, tokens=tokens, progress=progress)
    return found


class _Enough(Exception):
    """Ends a forward pass after the last wanted block."""
