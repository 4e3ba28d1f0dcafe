"""Sources of activations: models that run encoded prompts in batches, and the capture of their stream.

`TransformersSource` is the source that runs in this process.
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from steer.errors import InvalidInput, SteerError, UnsupportedModel
from steer.hf.internals import longest_beside
from steer.hf.load import Loaded
from steer.hf.steering import PROBE_TOKENS, Anatomy
from steer.lab.measurement import ModelFacts
from steer.lab.progress import Progress
from steer.lab.prompts import Encoded, Prompt, Rendering, encode_all
from steer.runtime.hook_points import hooks, on_output
from steer.runtime.op import component
from steer.tokenization import Chat

T = TypeVar("T")
#: The batch size with which `auto` begins. It is halved when memory runs out.
AUTO = 64
#: Most tokens of a pass on a CPU. With fewer tokens the activations take less memory, but each pass reads all weights.
#: With blocks of 896 dimensions in float32 on two busy cores, 512 took 1.3 times and 1024 1.05 times as long as 2048.
CPU_TOKENS = 1024
#: Largest distance between the logits of a padded row and those of the row alone, as a share of the spread of the
#: logits: by the dtype of the stream, and for dtypes of 16 bits. The effect of rounding is far smaller.
APART, APART_16 = {torch.float32: 0.01}, 0.25


def in_batches(
    sequences: Sequence[Sequence[int]],
    run: Callable[[list[int]], list[T]],
    **options: Any,
) -> list[T]:
    """Call `run(indices)` on batches of `sequences`.

    Args:
        run: returns a result for each of its indices.
        options: those of `each_batch`.

    Returns:
        All results, in the order of `sequences`.
    """
    results: dict[int, T] = {}

    def kept(indices: list[int]) -> None:
        results.update(zip(indices, run(indices), strict=True))

    each_batch([len(s) for s in sequences], kept, **options)
    return [results[i] for i in range(len(sequences))]


def each_batch(
    lengths: Sequence[int],
    run: Callable[[list[int]], object],
    *,
    batch_size: int | None = None,
    tokens: int | None = None,
    progress: Progress | None = None,
    work: float = 1.0,
    longest: float = math.inf,
    start: int = 0,
    after: Callable[[int, int], None] | None = None,
) -> None:
    """Call `run(indices)` on batches of sequences of similar length, until all have run.

    The longest sequences come first, so that a too large batch fails at once; then the batch size is halved.

    Args:
        lengths: the number of tokens of each sequence.
        batch_size: the most sequences of a batch; default AUTO.
        tokens: the most tokens of a batch with its padding. A longer sequence is alone in its batch.
        progress: advances after each batch.
        work: the work of one sequence, for `progress`.
        longest: a sequence of more tokens is alone in its batch.
        start: how many sequences, in the order in which they run, are already done.
        after: called as `after(done, size)` after each batch, with the number of sequences that are done and the batch
            size. A later call with `start=done, batch_size=size` makes the same batches.

    Raises:
        SteerError: memory runs out on a single sequence.
    """
    order = sorted(range(len(lengths)), key=lambda i: lengths[i], reverse=True)
    size, at = batch_size or AUTO, start
    while at < len(order):
        fitting = size if tokens is None else max(1, min(size, tokens // max(1, lengths[order[at]])))
        fitting = fitting if lengths[order[at]] <= longest else 1
        indices = order[at : at + fitting]
        try:
            run(indices)
        except torch.OutOfMemoryError as error:
            if len(indices) == 1:
                raise SteerError(f"out of memory on a single prompt of {lengths[indices[0]]} tokens") from error
            size = len(indices) // 2
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            continue
        at += len(indices)
        if after is not None:
            after(at, size)
        if progress is not None:
            progress.advance(len(indices) * work)


def right_padded(sequences: Sequence[Sequence[int]], pad: int, device: torch.device) -> Tensor:
    """Token ids `[batch, longest]`, padded at the end. A causal model does not look ahead, so it needs no mask."""
    longest = max(map(len, sequences))
    return torch.tensor([[*s, *[pad] * (longest - len(s))] for s in sequences], device=device)


def left_padded(sequences: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids padded in front, for generation, and the attention mask, both `[batch, longest]`."""
    longest = max(map(len, sequences))
    ids = torch.tensor([[*[pad] * (longest - len(s)), *s] for s in sequences], device=device)
    mask = torch.tensor([[0] * (longest - len(s)) + [1] * len(s) for s in sequences], device=device)
    return ids, mask


@dataclass(frozen=True, slots=True)
class CapturePlan:
    """What is captured from each prompt: some positions (negative from its end) at the layers 0 to `last_layer`."""

    positions: tuple[int, ...]
    last_layer: int

    @property
    def layers(self) -> int:
        return self.last_layer + 1


@dataclass(frozen=True, slots=True)
class Activations:
    """Activations of one batch.

    Attributes:
        picked: the vectors at the plan's positions, `[positions, layers, prompts, d_model]`, in the stream's dtype.
        own: the sum over the tokens of the prompts' own text, `[layers, d_model]`, float64.
    """

    picked: Tensor
    own: Tensor


class Capture:
    """Captures the activations of one batch, padded at the end to `width` tokens, layer by layer in its forward pass.

    Only what the plan names is kept: a vector for each position, layer and prompt, and the sums of the prompts' own
    text, on the stream's device.
    """

    def __init__(self, batch: Sequence[Encoded], plan: CapturePlan, width: int) -> None:
        lengths = [len(e.ids) for e in batch]
        starts = range(0, len(batch) * width, width)
        self.plan = plan
        self._picks = torch.tensor(
            [
                [start + (p if p >= 0 else length + p) for start, length in zip(starts, lengths, strict=True)]
                for p in plan.positions
            ]
        )
        spans = [range(start + e.own.start, start + e.own.stop) for start, e in zip(starts, batch, strict=True)]
        self._own = torch.tensor([i for span in spans for i in span], dtype=torch.int64)
        # each prompt is summed in float32 and the batch in float64, so that sums hardly depend on the batches
        self._segments = torch.block_diag(*(torch.ones(1, len(span)) for span in spans))
        self._picked: list[Tensor | None] = [None] * plan.layers
        self._sums: list[Tensor | None] = [None] * plan.layers

    def take(self, layer: int, x: Tensor) -> None:
        """Keep what the plan names of `x`, the output of block `layer`: `[..., d_model]`, tokens in batch order."""
        if self._picks.device != x.device:
            self._picks, self._own = self._picks.to(x.device), self._own.to(x.device)
            self._segments = self._segments.to(x.device)
        flat = x.reshape(-1, x.shape[-1])
        self._picked[layer] = flat[self._picks]
        self._sums[layer] = self._segments @ flat[self._own].float()

    def read(self) -> Activations:
        """The activations that were taken, on the CPU, because not every device has float64."""
        picked, sums = [p for p in self._picked if p is not None], [s for s in self._sums if s is not None]
        assert len(picked) == len(sums) == self.plan.layers, "a layer did not come by"
        return Activations(torch.stack(picked, dim=1).cpu(), torch.stack(sums).cpu().double().sum(1))


class Source(Chat, ABC):
    """A model to measure.

    If memory runs out, `run` raises `torch.OutOfMemoryError`, and the batch is halved.
    """

    #: The most tokens that a prompt may have.
    context: int
    #: The number of tokens with which a pass reaches full speed; None if more are faster as long as there is memory.
    pass_tokens: int | None = None
    #: A prompt with more tokens than this is alone in its pass.
    longest: float = math.inf

    @property
    @abstractmethod
    def facts(self) -> ModelFacts: ...

    def encode(self, prompts: Sequence[Prompt], rendering: Rendering | None) -> list[Encoded]:
        """Encode the prompts with the chat template. Raises InvalidInput, also if the model has no chat template."""
        if not self.tokenizer.chat_template:
            raise InvalidInput(
                f"the model {self.facts.name} has no chat template, and prompts are measured in one: give it with "
                "--chat-template FILE"
            )
        return encode_all(self, prompts, rendering)

    @abstractmethod
    def fingerprint(self) -> str:
        """A text that is equal for equal weights and arithmetic.

        An interrupted measurement is continued only if its fingerprint is equal.
        """

    @abstractmethod
    def run(self, batch: Sequence[Encoded], plan: CapturePlan) -> Activations: ...


class TransformersSource(Source):
    """A model of transformers, loaded in this process.

    Only the decoder runs, up to the last layer of the plan: no `generate`, no cache, no unembedding and no list of
    hidden states.
    """

    def __init__(self, loaded: Loaded) -> None:
        self.loaded, self.anatomy = loaded, Anatomy(loaded.model)
        _check_stream(self.anatomy)
        self.tokenizer, self.context = loaded.tokenizer, loaded.context
        # if padding has an effect, each prompt runs alone
        self.longest = 0 if looks_ahead(self.anatomy) else longest_beside(loaded.model.config)
        if self.anatomy.device.type == "cpu":
            self.pass_tokens = CPU_TOKENS

    @property
    def facts(self) -> ModelFacts:
        return ModelFacts(
            name=self.loaded.name,
            revision=self.loaded.revision,
            architecture=self.anatomy.architecture,
            d_model=self.anatomy.d_model,
            layers=self.anatomy.layers,
            dtype=str(self.anatomy.dtype).removeprefix("torch."),
            chat_template_sha256=self.template_sha256,
        )

    def fingerprint(self) -> str:
        return hashlib.sha256(self.anatomy.probe().logits.float().cpu().numpy().tobytes()).hexdigest()

    @torch.inference_mode()
    def run(self, batch: Sequence[Encoded], plan: CapturePlan) -> Activations:
        ids = right_padded([e.ids for e in batch], self.tokenizer.pad_token_id or 0, self.anatomy.device)
        self.anatomy.forget_lengths()
        capture = Capture(batch, plan, ids.shape[1])

        def take(layer: int, x: Tensor) -> None:
            capture.take(layer, x)
            if layer == plan.last_layer < self.anatomy.layers - 1:
                raise _Enough

        wanted = enumerate(self.anatomy.blocks[: plan.layers])
        with hooks([on_output(block, lambda x, n=n: take(n, x)) for n, block in wanted]):
            with suppress(_Enough):
                self.anatomy.decoder(input_ids=ids, use_cache=False)
        return capture.read()


def prompt_components(
    source: Source,
    rows: Tensor,
    encoded: Sequence[Encoded],
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """Measure the component ⟨x, v⟩ at the last token of each prompt and at each layer.

    Args:
        rows: v of each layer from 0 on, `[layers, d_model]`.

    Returns:
        The components, `[layers, prompts]`, float32.
    """
    found, plan = torch.zeros(len(rows), len(encoded)), CapturePlan((-1,), len(rows) - 1)

    def run(indices: list[int]) -> None:
        (picked,) = source.run([encoded[i] for i in indices], plan).picked
        found[:, indices] = component(picked.float(), rows[:, None])

    tokens = source.pass_tokens if batch_size is None else None
    lengths = [len(e.ids) for e in encoded]
    each_batch(lengths, run, batch_size=batch_size, tokens=tokens, progress=progress, longest=source.longest)
    return found


def differs(found: Tensor, alone: Tensor, dtype: torch.dtype) -> bool:
    """Whether `found`, the logits of a row in a batch, differ from `alone`, those of the row alone, beyond rounding."""
    found, alone = found.float(), alone.float()
    return not bool((found - alone).norm() <= APART.get(dtype, APART_16) * (alone - alone.mean()).norm())


@torch.inference_mode()
def looks_ahead(anatomy: Anatomy) -> bool:
    """Whether tokens after a token change its logits; then padding at the end changes them too."""
    ids = ((torch.arange(12, device=anatomy.device) * 7 + 11) % anatomy.vocabulary)[None]
    whole, begun = (anatomy.model(input_ids=part, use_cache=False).logits[0, 4] for part in (ids, ids[:, :5]))
    return differs(whole, begun, anatomy.dtype)


def _check_stream(anatomy: Anatomy) -> None:
    """Raise UnsupportedModel unless each block outputs one vector for each token.

    Otherwise a direction that was measured could not steer the model.
    """
    rows, seen = 2, dict[int, torch.Size]()

    def see(layer: int, x: Tensor) -> None:
        seen[layer] = x.shape

    with hooks([on_output(block, lambda x, n=n: see(n, x)) for n, block in enumerate(anatomy.blocks)]):
        anatomy.probe(rows)
    tokens = rows * PROBE_TOKENS
    for layer in range(anatomy.layers):
        if layer not in seen:
            problem = f"block {layer} does not run in a pass over text"
        elif (shape := seen[layer])[0] not in (rows, tokens) or shape.numel() != tokens * anatomy.d_model:
            problem = f"block {layer} hands on {list(shape)} for {rows} rows of {PROBE_TOKENS} tokens"
            if shape.numel() > tokens * anatomy.d_model:
                problem += ", a stream that is wider than one vector a token (hyper-connections, AltUp)"
        else:
            continue
        raise UnsupportedModel(
            f"{anatomy.architecture} cannot be steered, so it is not measured: {problem}; accepted: a model whose "
            f"blocks hand on [rows, positions, {anatomy.d_model}]"
        )


class _Enough(Exception):
    """Ends a forward pass after the last block of the plan."""
