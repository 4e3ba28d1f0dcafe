"""Greedy answers of many rows at once, each with its own steering; a row leaves the batch when its answer is known."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from steer.hf.attach import Steering
from steer.lab.batches import left_padded
from steer.runtime.index import RequestSteer


@torch.inference_mode()
def greedy(
    steering: Steering,
    prompts: Sequence[Sequence[int]],
    steers: Sequence[RequestSteer | None],
    *,
    max_tokens: int,
    ends: Sequence[int],
    pad: int,
    known: Callable[[list[int]], bool],
) -> list[list[int]]:
    """The answer to each of `prompts` under its own of `steers`: at most `max_tokens` ids, up to one of `ends`
    (which is not part of it) or to where `known(ids)` says that more would tell nothing.

    Only the last position goes through the unembedding. What a finished row holds of the cache is let go, so that
    steps become shorter with the rows that remain.
    """
    device = steering.anatomy.device
    ids, mask = left_padded(prompts, pad, device)
    answers: list[list[int]] = [[] for _ in prompts]
    rows, ending = list(range(len(prompts))), set(ends)
    cache: Any = None
    for step in range(max_tokens):
        with steering.batch([steers[row] for row in rows]):
            logits, cache = last_logits(steering.anatomy.model, ids, mask, cache)
        chosen, going = logits.argmax(-1), []
        for at, (row, token) in enumerate(zip(rows, chosen.tolist(), strict=True)):
            if token in ending:
                continue
            answers[row].append(token)
            if not known(answers[row]):
                going.append(at)
        if not going or step == max_tokens - 1:
            break
        if len(going) < len(rows):
            kept = torch.tensor(going, device=device)
            cache.batch_select_indices(kept)
            chosen, mask, rows = chosen[kept], mask[kept], [rows[at] for at in going]
        ids, mask = chosen.unsqueeze(1), torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
    return answers


def last_logits(model: Any, ids: Tensor, mask: Tensor, cache: Any = None) -> tuple[Tensor, Any]:
    """What is predicted behind each row, `[rows, vocabulary]`, and the cache. ids `[rows, positions]` are the new
    tokens, mask `[rows, all positions]` is 0 at the padding in front. Only the last position is unembedded."""
    takes = inspect.signature(model.forward).parameters
    positions = (mask.cumsum(-1) - 1).clamp_min(0)[:, -ids.shape[1] :]
    options = {"position_ids": positions, "logits_to_keep": 1}
    out = model(
        input_ids=ids,
        attention_mask=mask,
        past_key_values=cache,
        use_cache=True,
        **{name: value for name, value in options.items() if name in takes},
    )
    return out.logits[:, -1], out.past_key_values
