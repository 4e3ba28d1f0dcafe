"""Work over many token sequences in batches: sorted by length, halved when memory runs out, with a progress bar."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from steer.errors import SteerError

T = TypeVar("T")
#: Batch size that `auto` begins with; running out of memory halves it.
AUTO = 64


def in_batches(
    sequences: Sequence[Sequence[int]],
    run: Callable[[list[int]], list[T]],
    *,
    batch_size: int | None = None,
    title: str = "",
) -> list[T]:
    """`run(indices)` over all sequences in batches of about equal length, longest first so that too large a batch shows
    at once; the results in the order of `sequences`. `run` returns one result for each index."""
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]), reverse=True)
    results: dict[int, T] = {}
    size, at = batch_size or AUTO, 0
    with tqdm(total=len(order), desc=title, unit="prompt", disable=not title, leave=False) as bar:
        while at < len(order):
            indices = order[at : at + size]
            try:
                results.update(zip(indices, run(indices), strict=True))
            except torch.OutOfMemoryError as error:
                if len(indices) == 1:
                    raise SteerError(
                        f"out of memory on a single prompt of {len(sequences[indices[0]])} tokens"
                    ) from error
                size = len(indices) // 2
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
                continue
            at += len(indices)
            bar.update(len(indices))
    return [results[i] for i in range(len(sequences))]


def right_padded(sequences: Sequence[Sequence[int]], pad: int, device: torch.device) -> Tensor:
    """`[batch, longest]` token ids, padded behind. A causal model never looks there, so it needs no mask."""
    longest = max(map(len, sequences))
    return torch.tensor([[*s, *[pad] * (longest - len(s))] for s in sequences], device=device)


def left_padded(sequences: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids padded in front, for generation, and the attention mask."""
    longest = max(map(len, sequences))
    ids = torch.tensor([[*[pad] * (longest - len(s)), *s] for s in sequences], device=device)
    mask = torch.tensor([[0] * (longest - len(s)) + [1] * len(s) for s in sequences], device=device)
    return ids, mask
