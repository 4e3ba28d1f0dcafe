"""The token index gives each token exactly its own request's rows, and clears what a longer step left."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steer.direction import MODES
from steer.runtime.index import PLAIN, RequestSteer, TokenIndex
from steer.runtime.table import Place, Table, apply, gather, operate

law = settings(deadline=None, max_examples=60)
RANK, MAX_TOKENS = 2, 24
REQUESTS = st.builds(
    lambda slots, strengths: RequestSteer(np.array(slots, np.int64), np.array(strengths, np.float32)),
    st.lists(st.integers(0, 27), min_size=RANK, max_size=RANK),
    st.lists(st.floats(-10, 10, width=32), min_size=RANK, max_size=RANK),
)
BATCHES = st.lists(st.tuples(st.none() | REQUESTS, st.integers(0, 6)), max_size=4)


@given(st.lists(BATCHES, min_size=1, max_size=6))
@law
def test_every_token_gets_its_own_requests_rows(batches: list[list[tuple[RequestSteer | None, int]]]) -> None:
    """Batch after batch in the same buffers: nothing is left of a longer one before."""
    index = TokenIndex(RANK, MAX_TOKENS, "cpu")
    where = [x.data_ptr() for x in (index.rows, index.slots, index.strengths)]
    for batch in batches:
        steered = index.fill_with([steer for steer, _ in batch], [length for _, length in batch])
        tokens = [steer for steer, length in batch for _ in range(length)]
        assert steered == sum(steer is not None for steer in tokens)
        assert index.active == (steered > 0)
        for j in range(RANK):
            expected = [
                (int(s.slots[j]), float(s.strengths[j])) if s else (0, 0.0) for s in tokens + [None] * MAX_TOKENS
            ]
            slots, strengths = zip(*expected[:MAX_TOKENS], strict=True)
            assert index.slots[j].tolist() == list(slots)
            assert index.rows[j].tolist() == [slot // len(MODES) for slot in slots]
            assert index.strengths[j].tolist() == list(strengths)
    assert [x.data_ptr() for x in (index.rows, index.slots, index.strengths)] == where


@given(st.lists(st.tuples(REQUESTS, st.booleans()), min_size=1, max_size=60), st.data())
@law
def test_a_number_means_its_request_for_as_long_as_it_is_there(
    requests: list[tuple[RequestSteer, bool]], data: st.DataObject
) -> None:
    index = TokenIndex(RANK, MAX_TOKENS, "cpu")
    there: dict[int, RequestSteer] = {}
    for steer, one_leaves in requests:
        number = index.enter(steer)
        assert number not in there
        assert number != PLAIN
        there[number] = steer
        if one_leaves:
            gone = data.draw(st.sampled_from(sorted(there)))
            index.leave(gone)
            del there[gone]
    for number, steer in there.items():
        index.fill(np.array([PLAIN, number]), np.array([2, 3]))
        assert index.slots[:, :2].any().item() is False
        for token in (2, 3, 4):
            assert index.slots[:, token].tolist() == steer.slots.tolist()
            assert index.strengths[:, token].tolist() == steer.strengths.tolist()


def test_a_step_over_the_index_is_a_failure_not_an_overwrite() -> None:
    with pytest.raises(AssertionError, match="a step of 17 tokens in an index of 16"):
        TokenIndex(1, 16, "cpu").fill_with([RequestSteer.plain(1)], [17])


@given(data=st.data())
@law
def test_what_acts_is_what_the_buffers_say(data: st.DataObject) -> None:
    """`acting` leaves out ranks that do nothing, says once what is the same for all and whether all are steered: the
    operation cannot tell."""
    rank, each = 3, data.draw(st.integers(1, 3))
    index = TokenIndex(rank, 12, "cpu")
    table = Table([Place("resid_post", 0)], rows=4, rank=rank, d_model=8)
    plate = table.plates[Place("resid_post", 0)]
    plate.vectors.normal_()
    plate.coefficients.normal_()
    steers = []
    for _ in range(data.draw(st.integers(1, 2))):
        steer = RequestSteer.plain(rank)
        for j in range(data.draw(st.integers(0, rank))):
            steer.slots[j] = data.draw(st.integers(1, 4)) * len(MODES)
            steer.strengths[j] = data.draw(st.sampled_from([0.0, 0.5, -1.0]))
        steers.append(steer)
    asked = [data.draw(st.sampled_from([*steers, None])) for _ in range(data.draw(st.integers(1, 4)))]
    for step in (asked, asked[:1]):
        index.fill_with(step, [1] * len(step))
        tokens = len(step) * each
        x = torch.randn(tokens, 8)
        whole = (t[:, : len(step)].repeat_interleave(each, dim=1) for t in (index.rows, index.slots, index.strengths))
        expected = apply(x, plate, *whole)
        if index.active:
            acting, everywhere = index.acting(len(step))
            operands = gather(plate, *acting, everywhere=everywhere)
            stream = x if acting[0].dim() == 2 else x.view(len(step), -1, 8)
            assert torch.equal(operate(stream, operands).view(tokens, 8), expected)
        else:
            assert torch.equal(x, expected)
