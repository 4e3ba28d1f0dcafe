"""Work over many token sequences in batches: sorted by length, halved when memory runs out."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from steer.errors import SteerError
from steer.lab.progress import Progress

T = TypeVar("T")
#: Batch size that `auto` begins with; running out of memory halves it.
AUTO = 64


def in_batches(
    sequences: Sequence[Sequence[int]],
    run: Callable[[list[int]], list[T]],
    **options: Any,
) -> list[T]:
    """The results of `run(indices)`, which returns one for each index, in the order of `sequences`; `options` are those
    of `each_batch`."""
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
    """`run(indices)` over all sequences in batches of about equal length, longest first so that too large a batch shows
    at once, each of at most `batch_size` sequences (else AUTO), and of at most `tokens` tokens with the padding, but
    for a longer sequence alone; one of more than `longest` tokens is alone too. After each batch `after(done, size)` is
    told how many are done and the batch size; beginning again with `start=done, batch_size=size` makes the same
    batches. `work` is the work of one sequence, for `progress`."""
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
    """`[batch, longest]` token ids, padded at the end. A causal model never looks there, so it needs no mask."""
    longest = max(map(len, sequences))
    return torch.tensor([[*s, *[pad] * (longest - len(s))] for s in sequences], device=device)


def left_padded(sequences: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids padded in front, for generation, and the attention mask."""
    longest = max(map(len, sequences))
    ids = torch.tensor([[*[pad] * (longest - len(s)), *s] for s in sequences], device=device)
    mask = torch.tensor([[0] * (longest - len(s)) + [1] * len(s) for s in sequences], device=device)
    return ids, mask
