"""Work in batches: the results do not depend on the batches, and running out of memory makes them smaller."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steer.errors import SteerError
from steer.lab.progress import Progress
from steer.lab.source import AUTO, each_batch, in_batches, left_padded, right_padded

law = settings(deadline=None, max_examples=60)
LENGTHS = st.lists(st.integers(0, 30), max_size=100)
SEQUENCES = st.lists(st.lists(st.integers(1, 99), max_size=8), min_size=1, max_size=6)
CPU = torch.device("cpu")


def sequences(lengths: list[int]) -> list[list[int]]:
    return [[i] * length for i, length in enumerate(lengths)]


@given(LENGTHS, st.none() | st.integers(1, 120))
@law
def test_results_come_in_the_order_of_the_sequences(lengths: list[int], size: int | None) -> None:
    seen: list[int] = []

    def run(indices: list[int]) -> list[str]:
        seen.extend(indices)
        return [f"result {i}" for i in indices]

    made = in_batches(sequences(lengths), run, batch_size=size)
    assert made == [f"result {i}" for i in range(len(lengths))]
    assert sorted(seen) == list(range(len(lengths))), "each exactly once"


@given(LENGTHS, st.none() | st.integers(1, 120))
@law
def test_batches_are_full_and_go_from_long_to_short(lengths: list[int], size: int | None) -> None:
    batches: list[list[int]] = []

    def run(indices: list[int]) -> list[None]:
        batches.append(indices)
        return [None] * len(indices)

    in_batches(sequences(lengths), run, batch_size=size)
    assert all(len(batch) == (size or AUTO) for batch in batches[:-1])
    order = [lengths[i] for batch in batches for i in batch]
    assert order == sorted(order, reverse=True)


@given(LENGTHS, st.integers(1, 40), st.integers(1, 200))
@law
def test_tokens_bound_a_batch_with_its_padding_and_none_is_lost(lengths: list[int], size: int, tokens: int) -> None:
    batches: list[list[int]] = []
    each_batch(lengths, batches.append, batch_size=size, tokens=tokens)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) <= size
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= tokens


@given(LENGTHS, st.integers(1, 40), st.integers(1, 200), st.data())
@law
def test_beginning_again_makes_the_batches_that_were_left(
    lengths: list[int], size: int, tokens: int, data: st.DataObject
) -> None:
    whole: list[list[int]] = []
    states: list[tuple[int, int]] = [(0, size)]
    each_batch(lengths, whole.append, batch_size=size, tokens=tokens, after=lambda *state: states.append(state))
    at = data.draw(st.integers(0, len(states) - 1))
    rest: list[list[int]] = []
    each_batch(lengths, rest.append, start=states[at][0], batch_size=states[at][1], tokens=tokens)
    assert rest == whole[at:]


@given(LENGTHS, st.integers(1, 40), st.none() | st.integers(1, 120))
@law
def test_memory_that_runs_out_changes_no_result(lengths: list[int], room: int, size: int | None) -> None:
    tried: list[int] = []

    def run(indices: list[int]) -> list[int]:
        tried.append(len(indices))
        if len(indices) > room:
            raise torch.OutOfMemoryError("no room")
        return [10 * i for i in indices]

    assert in_batches(sequences(lengths), run, batch_size=size) == [10 * i for i in range(len(lengths))]
    for failed, following in pairwise(tried):
        assert following < failed or failed <= room, "what did not fit is not tried again at the same size"


@given(st.lists(st.integers(1, 30), min_size=1, max_size=20))
@law
def test_one_prompt_that_does_not_fit_is_an_error_with_its_length(lengths: list[int]) -> None:
    tried: list[int] = []

    def run(indices: list[int]) -> list[None]:
        tried.append(len(indices))
        raise torch.OutOfMemoryError("no room")

    with pytest.raises(SteerError, match=f"single prompt of {max(lengths)} tokens") as caught:
        in_batches(sequences(lengths), run)
    assert isinstance(caught.value.__cause__, torch.OutOfMemoryError)
    assert tried.count(1) == 1


def test_other_errors_are_not_hidden() -> None:
    def run(indices: list[int]) -> list[None]:
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        in_batches(sequences([3, 4]), run)


def test_a_result_for_each_index_is_demanded() -> None:
    with pytest.raises(ValueError, match="zip"):
        in_batches(sequences([3, 4]), lambda indices: [1])


def test_progress_is_told_of_each_sequence_once() -> None:
    progress = Progress()
    with progress.part("reading"):
        in_batches(sequences([1, 2, 3]), lambda indices: indices, batch_size=2, progress=progress, work=0.5)
    assert progress.done == 1.5


@given(SEQUENCES)
@law
def test_padding_is_behind_or_in_front_and_the_mask_tells_it(rows: list[list[int]]) -> None:
    longest = max(map(len, rows))
    behind = right_padded(rows, 0, CPU)
    front, mask = left_padded(rows, 0, CPU)
    assert behind.shape == front.shape == mask.shape == (len(rows), longest)
    assert behind.tolist() == [row + [0] * (longest - len(row)) for row in rows]
    assert front.tolist() == [[0] * (longest - len(row)) + row for row in rows]
    for ids, kept, row in zip(front, mask, rows, strict=True):
        assert ids[kept.bool()].tolist() == row
