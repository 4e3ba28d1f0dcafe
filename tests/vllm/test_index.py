"""The staged token index gives each token its request's rows, and clears what a longer step left."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from steer.direction import MODES
from steer.runtime.table import RequestSteer
from steer.vllm.index import StagedIndex

RANK, MAX = 2, 64

requests = st.tuples(
    st.integers(1, 8), st.none() | st.tuples(st.integers(1, 40), st.floats(-2, 2, width=32, allow_nan=False))
)
steps = st.lists(st.lists(requests, max_size=8), min_size=1, max_size=5)


@given(steps)
def test_every_step_leaves_exactly_its_own_tokens(batches: list[list[tuple[int, tuple[int, float] | None]]]) -> None:
    index = StagedIndex(RANK, MAX, torch.device("cpu"))
    storage = [t.data_ptr() for t in (index.rows, index.slots, index.strengths)]
    for batch in batches:
        steers, slots, strengths = [], torch.zeros(RANK, MAX, dtype=torch.int64), torch.zeros(RANK, MAX)
        start = 0
        for length, asked in batch:
            steer = None
            if asked is not None:
                steer = RequestSteer.plain(RANK)
                steer.slots[0], steer.strengths[0] = asked
                slots[0, start : start + length], strengths[0, start : start + length] = asked
            steers.append(steer)
            start += length
        lengths = np.array([length for length, _ in batch], np.int32)
        steered = index.fill(steers, lengths)
        assert steered == sum(length for length, asked in batch if asked is not None)
        assert torch.equal(index.slots, slots)
        assert torch.equal(index.rows, slots // len(MODES))
        assert torch.equal(index.strengths, strengths)
    assert storage == [t.data_ptr() for t in (index.rows, index.slots, index.strengths)]
