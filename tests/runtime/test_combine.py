"""Combinations: every request of every step has its own matrices, however many there are of them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from steer.runtime.bank import BankSlice
from steer.runtime.combine import ALONE, Combination, Combinations
from steer.runtime.token_index import PLAIN, RequestSteer, TokenIndex
from steer.spec import MAX_TOGETHER

law = settings(deadline=None, max_examples=60)
POINTS, RANK = 2, 2
STEPS = st.lists(st.lists(st.integers(0, 9), max_size=4), min_size=1, max_size=20)


def made(capacity: int | None) -> tuple[list[BankSlice], Combinations]:
    slices = [BankSlice.empty(2, 4, "cpu") for _ in range(POINTS)]
    return slices, Combinations(slices, RANK, "cpu", capacity)


def matrices(number: int) -> Tensor:
    return torch.arange(POINTS * RANK * RANK).view(POINTS, RANK, RANK) + 100.0 * number


def check(slices: list[BankSlice], index: TokenIndex, batch: list[int | None]) -> None:
    """Each token of the step reads the matrices of its own request, and padding the identity."""
    combinations = index.first(index.max_tokens).combinations
    assert combinations is not None
    for at, which in enumerate([*batch, *[None] * (index.max_tokens - len(batch))]):
        for point, bank_slice in enumerate(slices):
            assert bank_slice.joint is not None
            expected = torch.eye(RANK) if which is None else matrices(which)[point]
            assert torch.equal(bank_slice.joint[combinations[at]], expected)


@pytest.mark.parametrize("capacity", [4, None])
@given(steps=STEPS)
@law
def test_every_token_finds_its_own_requests_matrices(capacity: int | None, steps: list[list[int]]) -> None:
    """Ten requests with a combination each are there all the time, four at most in a step, and four slots."""
    slices, home = made(capacity)
    index = TokenIndex(RANK, 8, "cpu")
    numbers = [
        index.enter(RequestSteer(np.array([4, 8]), np.ones(2, np.float32), Combination(matrices(i), home)))
        for i in range(10)
    ]
    where = [bank_slice.joint.data_ptr() for bank_slice in slices if bank_slice.joint is not None]
    for step in steps:
        batch = np.array([PLAIN, *(numbers[i] for i in step)], np.int64)
        index.fill(batch, np.ones(len(batch), np.int64))
        if step:
            check(slices, index, [None, *step])
        else:
            assert not index.active
    if capacity:
        assert where == [bank_slice.joint.data_ptr() for bank_slice in slices if bank_slice.joint is not None], (
            "written in place"
        )


def test_the_parts_of_a_request_need_a_slot_for_each_combination_and_no_more() -> None:
    """Of two places, A and B: A alone, both, B alone, and A alone again, in one step of two such requests."""
    slices, home = made(2 * MAX_TOGETHER)
    index = TokenIndex(RANK, 16, "cpu")

    def request(first: int) -> int:
        one, both, other = (
            RequestSteer(np.array([4, 8]), np.ones(2, np.float32), Combination(matrices(first + i), home))
            for i in range(MAX_TOGETHER)
        )
        return index.enter(replace(one, then=((1, both), (2, other), (3, one))))

    numbers = np.array([request(1), request(11)])
    assert index.fill(numbers, np.array([4, 4]), np.zeros(2, np.int64)) == 8
    combinations = index.first(8).combinations
    assert combinations is not None
    slots = combinations.tolist()
    assert len(set(slots)) == 2 * MAX_TOGETHER
    assert slots[0] == slots[3]
    assert all(torch.equal(slices[0].joint[slots[1 + i]], matrices(2 + i)[0]) for i in range(2))  # type: ignore[index]


def test_a_steady_batch_writes_nothing_and_looks_nothing_up(monkeypatch: pytest.MonkeyPatch) -> None:
    slices, home = made(3)
    index = TokenIndex(RANK, 8, "cpu")
    numbers = np.array(
        [
            index.enter(RequestSteer(np.array([4, 8]), np.ones(2, np.float32), Combination(matrices(i), home)))
            for i in range(3)
        ]
    )
    index.fill(numbers, np.ones(3, np.int64))

    def refuse(*_: object) -> int:
        raise AssertionError("a slot is looked up again")

    monkeypatch.setattr(home, "_assign", refuse)
    for _ in range(3):
        index.fill(numbers, np.ones(3, np.int64))
    check(slices, index, [0, 1, 2])


def test_what_was_used_longest_ago_goes_and_is_written_again_when_it_comes_back() -> None:
    """A request that is preempted for long finds its slot taken."""
    slices, home = made(2)
    index = TokenIndex(RANK, 8, "cpu")
    ones = np.ones(2, np.float32)
    numbers = [index.enter(RequestSteer(np.array([4, 8]), ones, Combination(matrices(i), home))) for i in range(3)]
    for step in ([0, 1], [1], [2, 1], [0, 1], [2, 0]):
        index.fill(np.array([numbers[i] for i in step]), np.ones(len(step), np.int64))
        check(slices, index, list(step))
    index.leave(numbers[0])
    back = index.enter(RequestSteer(np.array([4, 8]), ones))
    index.fill(np.array([back, numbers[2]]), np.ones(2, np.int64))
    check(slices, index, [None, 2])


def test_requests_with_one_combination_share_a_slot() -> None:
    _, home = made(2)
    index, both = TokenIndex(RANK, 8, "cpu"), Combination(matrices(1), home)
    for _ in range(3):  # one after the other, or beside each other
        numbers = [index.enter(RequestSteer(np.array([4, 8]), np.ones(2, np.float32), both)) for _ in range(2)]
        index.fill(np.array(numbers), np.ones(2, np.int64))
        combinations = index.first(2).combinations
        assert combinations is not None
        assert combinations.tolist() == [1, 1]
        for number in numbers:
            index.leave(number)


def test_lost_memory_is_written_again() -> None:
    """What put a device's memory to sleep brings it back empty."""
    slices, home = made(2)
    index = TokenIndex(RANK, 8, "cpu")
    both = index.enter(RequestSteer(np.array([4, 8]), np.ones(2, np.float32), Combination(matrices(5), home)))
    index.fill(np.array([PLAIN, both]), np.ones(2, np.int64))
    for bank_slice in slices:
        assert bank_slice.joint is not None
        bank_slice.joint.fill_(torch.nan)
    home.renew()
    index.fill(np.array([PLAIN, both]), np.ones(2, np.int64))
    check(slices, index, [None, 5])
    assert home.capacity == 2
    assert ALONE == 0
