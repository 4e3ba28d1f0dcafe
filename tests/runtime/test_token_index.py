"""The token index gives each token exactly its own request's rows, and clears what a longer step left."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steer.names import MODES, SHIFTING, Mode
from steer.readout import Line, Readout
from steer.runtime.bank import DirectionBank, HookPoint, gather, operate
from steer.runtime.combine import Combination
from steer.runtime.op import FLOOR, GATE, SPREAD
from steer.runtime.readout import ReadIndex
from steer.runtime.token_index import (
    PLAIN,
    STAGES,
    UNCONDITIONAL,
    Acts,
    Decision,
    Probe,
    RequestSteer,
    TokenIndex,
    bounds_of,
    slot,
)
from steer.spec import PHASES, Entry, Spec
from steer.tokenization import Thinking
from tests.oracle import acting
from tests.runtime.copy_queues import Late

law = settings(deadline=None, max_examples=60)
RANK, MAX_TOKENS = 2, 24
REQUESTS = st.builds(
    lambda slots, strengths, shifts: RequestSteer(
        np.array(slots, np.int64), np.array(strengths, np.float32), shifts=shifts and np.array(shifts, np.float32)
    ),
    st.lists(st.integers(0, 27), min_size=RANK, max_size=RANK),
    st.lists(st.floats(-10, 10, width=32), min_size=RANK, max_size=RANK),
    st.none() | st.lists(st.floats(-2, 2, width=32), min_size=RANK, max_size=RANK),
)
BATCHES = st.lists(st.tuples(st.none() | REQUESTS, st.integers(0, 6)), max_size=4)


def whole(index: TokenIndex) -> Acts:
    return index.first(index.max_tokens)


@given(st.lists(BATCHES, min_size=1, max_size=6))
@law
def test_every_token_gets_its_own_requests_rows(batches: list[list[tuple[RequestSteer | None, int]]]) -> None:
    """Batch after batch in the same buffers: nothing is left of a longer one before."""
    index = TokenIndex(RANK, MAX_TOKENS, "cpu")
    where = index.packed.data_ptr()
    for batch in batches:
        steered = index.fill_with([steer for steer, _ in batch], [length for _, length in batch])
        tokens = [steer for steer, length in batch for _ in range(length)]
        assert steered == sum(steer is not None for steer in tokens)
        assert index.active == (steered > 0)
        acts = whole(index)
        for j in range(RANK):
            expected = [
                (int(s.slots[j]), float(s.strengths[j])) if s else (0, 0.0) for s in tokens + [None] * MAX_TOKENS
            ]
            slots, strengths = zip(*expected[:MAX_TOKENS], strict=True)
            assert acts.slots[j].tolist() == list(slots)
            assert acts.rows[j].tolist() == [slot // len(MODES) for slot in slots]
            assert acts.strengths[j].tolist() == list(strengths)
            shifts = [float(s.shifts[j]) if s and s.shifts is not None else 0.0 for s in tokens]
            assert acts.shifts is not None
            assert acts.shifts[j].tolist() == shifts + [0.0] * (MAX_TOKENS - len(tokens))
    assert index.packed.data_ptr() == where


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
        assert whole(index).slots[:, :2].any().item() is False
        for token in (2, 3, 4):
            assert whole(index).slots[:, token].tolist() == steer.slots.tolist()
            assert whole(index).strengths[:, token].tolist() == steer.strengths.tolist()


PHASED = st.builds(
    lambda first, rest: replace(first, then=tuple(sorted(rest.items()))),
    REQUESTS,
    st.dictionaries(st.integers(1, 12), REQUESTS | st.just(RequestSteer.plain(RANK)), max_size=3),
)


def part(steer: RequestSteer, position: int) -> RequestSteer:
    return [steer, *(each for start, each in steer.then if start <= position)][-1]


@given(st.lists(st.none() | PHASED, min_size=1, max_size=4), st.data())
@law
def test_each_position_has_its_own_part_however_a_request_is_cut_into_steps(
    requests: list[RequestSteer | None], data: st.DataObject
) -> None:
    index = TokenIndex(RANK, MAX_TOKENS, "cpu")
    numbers = np.array([PLAIN if steer is None else index.enter(steer) for steer in requests])
    assert index.phased == sum(steer is not None and bool(steer.then) for steer in requests)
    at = np.zeros(len(requests), np.int64)
    for _ in range(data.draw(st.integers(1, 6))):
        lengths = np.array([data.draw(st.integers(0, 5)) for _ in requests])
        index.fill(numbers, lengths, at)
        tokens = [
            part(steer, start + offset) if steer else None
            for steer, start, length in zip(requests, at.tolist(), lengths.tolist(), strict=True)
            for offset in range(length)
        ]
        for j in range(RANK):
            strengths = [float(s.strengths[j]) if s else 0.0 for s in tokens]
            assert whole(index).strengths[j].tolist() == strengths + [0.0] * (MAX_TOKENS - len(tokens))
            slots = [int(s.slots[j]) if s and s.strengths.any() else 0 for s in tokens]
            acting = (whole(index).strengths != 0).any(0)
            assert (whole(index).slots[j] * acting)[: len(tokens)].tolist() == slots
        alone = TokenIndex(RANK, MAX_TOKENS, "cpu")
        alone.fill_with(requests, lengths.tolist(), at.tolist())
        assert torch.equal(whole(alone).strengths, whole(index).strengths), "the same for a pass that is filled at once"
        at = at + lengths
    for number in numbers[numbers != PLAIN].tolist():
        index.leave(number)
    assert not index.phased
    assert sorted(index._free) == list(range(1, len(index._entries))), "every part's number is free again"


def test_a_request_that_has_passed_all_its_parts_copies_nothing_in_steady_decode() -> None:
    queue = Late()
    index = TokenIndex(1, 16, "cpu", queue=queue)
    one, nothing = RequestSteer(np.array([4]), np.ones(1, np.float32)), RequestSteer.plain(1)
    answer, prompt = index.enter(replace(nothing, then=((5, one),))), index.enter(replace(one, then=((5, nothing),)))
    numbers, sent = np.array([answer, prompt]), []
    for start, length in ((0, 4), (4, 2), (6, 1), (7, 1), (8, 1)):
        before = queue.events
        steered = index.fill(numbers, np.array([length] * 2), np.array([start] * 2))
        sent.append(queue.events > before)
        assert steered == length, "one of the two, at each position"
    assert sent == [True, True, True, False, False]


def test_a_request_that_has_passed_all_its_parts_is_not_parted_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until its positions begin anew, as after preemption."""
    index = TokenIndex(1, 16, "cpu")
    one, nothing = RequestSteer(np.array([4]), np.ones(1, np.float32)), RequestSteer.plain(1)
    numbers = np.array([index.enter(replace(nothing, then=((5, one),))), PLAIN])
    with monkeypatch.context() as patch:
        patch.setattr(index, "_parted", None)
        for start in (5, 6):
            assert index.fill(numbers, np.array([1, 1]), np.array([start, 0])) == 1
    assert index.fill(numbers, np.array([7, 1]), np.array([0, 1])) == 2


def test_tokens_that_each_decide_are_open_again_in_every_step() -> None:
    index = TokenIndex(2, 16, "cpu")
    steer = replace(RequestSteer.plain(2), slots=np.array([4, 8]), strengths=np.array([1, 0], np.float32))
    number = index.enter(replace(steer, probe=Probe(1, 0.5, each=True)))
    assert index.opened is not None
    for _ in range(3):
        assert index.fill(np.array([number]), np.array([2]), np.array([0])) == 2
        assert index.opened[:2].tolist() == [False, False], "none of them has decided yet"
        index.opened[:2] = True  # as a pass does


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
    bank = DirectionBank([HookPoint("resid_post", 0)], rows=4, rank=rank, d_model=8)
    bank_slice = bank.slices[HookPoint("resid_post", 0)]
    bank_slice.vectors.normal_()
    bank_slice.coefficients.normal_()
    bank_slice.coefficients[:, FLOOR] = bank_slice.coefficients[:, GATE] - 1
    ungated = [slot(row, mode) for row in range(5) for mode in MODES if mode not in SHIFTING]
    for column, value in ((GATE, -torch.inf), (FLOOR, -torch.inf), (SPREAD, 0)):
        bank_slice.coefficients[ungated, column] = value
    modes: st.SearchStrategy[Mode] = st.sampled_from(["ablate", "one_sided"])
    steers = []
    for _ in range(data.draw(st.integers(1, 2))):
        steer = RequestSteer.plain(rank)
        turned = 2 * data.draw(st.integers(0, 1))
        for j in range(data.draw(st.integers(turned, rank))):
            steer.slots[j] = slot(data.draw(st.integers(1, 4)), "rotate" if j < turned else data.draw(modes))
            steer.strengths[j] = data.draw(st.sampled_from([0.0, 0.5, -1.0]))
        steer.strengths[1:turned] = steer.strengths[0]
        shifts = data.draw(st.none() | st.lists(st.sampled_from([0.0, 0.5, -1.0]), min_size=rank, max_size=rank))
        bounds = data.draw(st.none() | st.booleans().map(lambda keeps: np.full(rank, bounds_of(None, keeps), np.int32)))
        steers.append(replace(steer, shifts=None if shifts is None else np.array(shifts, np.float32), bounds=bounds))
    asked = [data.draw(st.sampled_from([*steers, None])) for _ in range(data.draw(st.integers(1, 4)))]
    for step in (asked, asked[:1]):
        index.fill_with(step, [1] * len(step))
        tokens = len(step) * each
        x = torch.randn(tokens, 8)
        spread: list[Any] = [t.repeat_interleave(each, dim=-1) for t in index.first(len(step)) if t is not None]
        expected, _ = operate(x, gather(bank_slice, *spread))
        if index.active:
            acting, *how = index.acting(len(step))
            operands = gather(bank_slice, *acting, *how)
            stream = x if acting[0].dim() == 2 else x.view(len(step), -1, 8)
            assert torch.equal(operate(stream, operands)[0].view(tokens, 8), expected)
        else:
            assert torch.equal(x, expected)


def contents(index: TokenIndex) -> list[torch.Tensor]:
    """All of the buffers, the padding behind the batch too."""
    return [tensor.clone() for tensor in whole(index) if tensor is not None]


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("ahead", [0, 1, STAGES, STAGES + 4])
@given(data=st.data())
@settings(deadline=None, max_examples=25)
def test_a_device_that_copies_late_is_given_what_a_cpu_is(rank: int, ahead: int, data: st.DataObject) -> None:
    """Bit for bit, with `ahead` steps in flight: more than there are stages, with entries that come and go and are more
    than there was room for, with batches that shrink, and with plain ones, which send nothing."""
    queue, tokens = Late(), 64
    direct, staged = TokenIndex(rank, tokens, "cpu"), TokenIndex(rank, tokens, "cpu", queue=queue)
    generator = np.random.default_rng(data.draw(st.integers(0, 99)))
    running: list[int] = []
    enqueued: list[list[torch.Tensor]] = []
    seen: list[list[torch.Tensor]] = []
    queue.seeing = lambda: seen.append(contents(staged))
    for grown in data.draw(st.lists(st.integers(0, 12), min_size=2, max_size=12)):
        for _ in range(grown):
            slots = generator.integers(0, 40, rank)
            steer = RequestSteer(slots, generator.normal(size=rank).astype(np.float32))
            number = direct.enter(steer)
            assert staged.enter(steer) == number
            running.append(number)
        for _ in range(int(generator.integers(0, len(running) + 1)) // 3):
            gone = running.pop(int(generator.integers(len(running))))
            direct.leave(gone)
            staged.leave(gone)
        batch = generator.choice([PLAIN, *running], size=int(generator.integers(0, 9)))
        lengths = generator.integers(1, 8, len(batch))
        sent = queue.events
        assert direct.fill(batch, lengths) == staged.fill(batch, lengths)
        assert direct.active == staged.active
        total = int(lengths.sum()) if direct.active else 0
        assert not any(tensor[..., total:].any() for tensor in contents(direct)), "the padding is plain"
        if queue.events > sent:
            enqueued.append(contents(direct))
        while len(enqueued) - len(seen) > ahead:
            queue.run()
    while queue.waiting:
        queue.run()
    assert len(seen) == len(enqueued)
    for these, those in zip(seen, enqueued, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(these, those, strict=True))


def test_a_stage_is_not_written_before_its_copy_is_done() -> None:
    queue = Late()
    index = TokenIndex(1, 8, "cpu", queue=queue)
    number = index.enter(RequestSteer(np.array([4]), np.array([1.0], np.float32)))
    for step in range(2 * STAGES):
        index.fill(np.array([number]), np.array([1 + step % 2]))
        assert queue.waits == max(0, step + 1 - STAGES), "and nobody waits for one that is free"


def test_a_step_like_the_last_one_copies_nothing() -> None:
    """Steady decode, until a request comes or goes, the batch is another, or the buffers were lost."""
    queue = Late()
    index = TokenIndex(2, 16, "cpu", queue=queue)

    def entered(slot: int) -> int:
        return index.enter(RequestSteer(np.array([slot, 0]), np.array([0.5, 0], np.float32)))

    def sends(numbers: list[int], lengths: list[int]) -> bool:
        events = queue.events
        steered = index.fill(np.array(numbers), np.array(lengths))
        assert steered == sum(length for number, length in zip(numbers, lengths, strict=True) if number != PLAIN)
        assert not index.lost.any(), "what the last pass has lost is its own"
        sent = queue.events > events
        assert len(queue.waiting) == 2 * sent, "one copy and the event behind it"
        while queue.waiting:
            queue.run()
        expected = [slot for number, n in zip(numbers, lengths, strict=True) for slot in [slots.get(number, 0)] * n]
        assert whole(index).slots[0].tolist() == expected + [0] * (16 - len(expected))
        index.lost.fill_(True)
        return sent

    first, second = entered(4), entered(8)
    slots = {first: 4, second: 8}
    batch = [first, PLAIN, second], [3, 2, 1]
    assert sends(*batch)
    assert not any(sends(*batch) for _ in range(3))
    assert sends([first, second, PLAIN], [3, 1, 2]), "in another order"
    assert sends([first, second, PLAIN], [3, 2, 1]), "of other lengths"
    index.leave(second)
    again = entered(12)
    assert again == second
    slots[again] = 12
    assert sends([first, again, PLAIN], [3, 2, 1]), "of another request by the same number"
    index.reset()
    assert sends([first, again, PLAIN], [3, 2, 1]), "into buffers that were lost"
    assert not sends([first, again, PLAIN], [3, 2, 1])


@pytest.mark.parametrize("queue", [None, Late()])
@pytest.mark.parametrize("made_inside", [True, False])
def test_what_is_made_in_one_mode_is_filled_in_another(made_inside: bool, queue: Late | None) -> None:
    """An index or a bank of a notebook is made and filled in whatever mode its user is in."""
    with torch.inference_mode(made_inside):
        index = TokenIndex(2, 8, "cpu", queue=queue)
        reads = ReadIndex("cpu", lambda *_: np.array([1]))
        bank = DirectionBank([HookPoint("resid_post", 0)], rows=4, rank=2, d_model=8)
    bank_slice = bank.slices[HookPoint("resid_post", 0)]
    for inside in (not made_inside, made_inside):
        with torch.inference_mode(inside):
            home = bank.combinations
            assert home is not None
            both = Combination(torch.full((1, 2, 2), 0.25), home)
            index.fill_with([None, RequestSteer(np.array([4, 8]), np.ones(2, np.float32), both)], [1, 2])
            if queue is not None:
                queue.run()
            reads.fill([Readout((Line("d", "d", 0),), (0,))] * 3, [1] * 3)
            bank_slice.write(1, torch.ones(8), dict.fromkeys(MODES, torch.zeros(6)))
        for tensor in (
            *contents(index),
            bank_slice.vectors,
            bank_slice.coefficients,
            bank_slice.joint,
        ):
            assert tensor is not None
            assert not tensor.is_inference()
        # a pass that autograd records keeps what it read
        x = torch.ones(3, 8, requires_grad=True)
        y, _ = operate(x, gather(bank_slice, *index.first(3)))
        y.sum().backward()
        reads.record(0, x, y, bank_slice.vectors)
        assert len(reads.collect()) == 3


THINKING = Thinking(8, 9, frozenset({5}))
IDS = st.lists(st.integers(5, 9), min_size=1, max_size=8)


@dataclass
class InPhase:
    """A request that acts in a phase, with all that it will ever say, and how far it is computed."""

    tokens: str
    prompt: list[int]
    answer: list[int]
    steer: RequestSteer = field(init=False)
    number: int = field(init=False)
    computed: int = 0

    def enter(self, index: TokenIndex) -> None:
        phase = THINKING.phase(self.tokens, self.prompt)
        acts = RequestSteer(np.ones(RANK, np.int64), np.ones(RANK, np.float32))
        acts = replace(acts, decision=Decision(UNCONDITIONAL), phase=phase)
        plain, at = RequestSteer.plain(RANK), len(self.prompt) - 1
        self.steer = index.decisions.take(replace(plain, then=((at, acts),)) if at else acts)
        self.number = index.enter(self.steer)

    def leave(self, index: TokenIndex) -> None:
        index.leave(self.number)
        index.decisions.give(self.steer)

    def acts(self, ids: list[int], position: int) -> bool:
        spec = Spec((Entry("a", "a", "ablate", 1.0, None, self.tokens),))
        return bool(acting(spec, len(self.prompt), position, ids, THINKING))


@given(st.data())
@law
def test_a_phase_is_where_its_tokens_are(data: st.DataObject) -> None:
    """With prompts in chunks and answers with drafts that are taken or not, in batches of any order, beside others;
    computed again from anywhere; and whoever comes after another in its place begins anew."""
    index = TokenIndex(RANK, 64, "cpu")
    beside = index.enter(RequestSteer(np.ones(RANK, np.int64), np.ones(RANK, np.float32)))
    build = st.builds(InPhase, st.sampled_from(PHASES), IDS, IDS)
    running = data.draw(st.lists(build, min_size=1, max_size=3))
    for request in running:
        request.enter(index)
    for _ in range(data.draw(st.integers(1, 12))):
        step: list[tuple[int, int, list[int], list[bool]]] = [(beside, 3, [9], [True]), (PLAIN, 4, [9, 8], [False] * 2)]
        for i, request in enumerate(running):
            said = request.prompt + request.answer
            if request.computed >= len(said):
                request.leave(index)
                running[i] = request = data.draw(build)
                request.enter(index)
                said = request.prompt + request.answer
            request.computed = data.draw(st.integers(0, request.computed) | st.just(request.computed))
            start = request.computed
            known = said[start : start + data.draw(st.integers(0, 4))]
            drafts = (
                data.draw(st.lists(st.integers(5, 9), max_size=3)) if start + len(known) > len(request.prompt) else []
            )
            ids = said[: start + len(known)] + drafts
            acts = [request.acts(ids, position) for position in range(start, len(ids))]
            if acts:
                step.append((request.number, start, ids[start:], acts))
            request.computed += len(known)
            for draft, token in zip(drafts, said[request.computed :], strict=False):
                if draft != token:
                    break
                request.computed += 1
        step = data.draw(st.permutations(step))
        lengths = np.array([len(ids) for _, _, ids, _ in step])
        told = torch.tensor([i for _, _, each, _ in step for i in each], dtype=torch.int32)
        positions = torch.cat([torch.arange(start, start + len(each)) for _, start, each, _ in step])
        numbers, starts = (np.array([one[k] for one in step], np.int64) for k in (0, 1))
        index.fill(numbers, lengths, starts, (told, positions))
        strengths = index.first(len(told), conditional=True).strengths[0]
        assert (strengths != 0).tolist() == [acts for _, _, _, each in step for acts in each]


def test_a_draft_that_is_not_taken_tells_nothing() -> None:
    """Every answer of three tokens, beside every pair of drafts for its last two, which come again where they were
    others."""
    words = list(itertools.product((7, 8, 9), repeat=5))
    running = [(InPhase(tokens, [7], [*each[:3]]), [*each[3:]]) for tokens in PHASES for each in words]
    index = TokenIndex(RANK, 3 * len(running), "cpu")
    for request, _ in running:
        request.enter(index)
    for drafted in (True, False, False):  # the drafts; all that is known then, a token at a time
        starts, each, expected = [], [], []
        for request, drafts in running:
            said = request.prompt + request.answer
            at = request.computed = request.computed or 1
            ids = said[: at + 1] + (drafts if drafted else [])
            starts.append(at)
            each.append(ids[at:])
            expected += [request.acts(ids, position) for position in range(at, len(ids))]
            taken = (d == s for d, s in zip(drafts if drafted else [], request.answer[1:], strict=False))
            request.computed = min(at + 1 + sum(itertools.takewhile(bool, taken)), len(said) - 1)
        told = torch.tensor([token for ids in each for token in ids], dtype=torch.int32)
        positions = torch.cat([torch.arange(at, at + len(ids)) for at, ids in zip(starts, each, strict=True)])
        numbers = np.array([request.number for request, _ in running])
        index.fill(numbers, np.array([*map(len, each)]), np.array(starts), (told, positions))
        assert (index.first(len(told), conditional=True).strengths[0] != 0).tolist() == expected


def test_a_wrong_call_leaves_nothing_in_the_index() -> None:
    """Where a position decides what acts, the positions are needed; without them the index is as it was."""
    index = TokenIndex(RANK, MAX_TOKENS, "cpu")
    one = RequestSteer(np.array([4, 0]), np.array([1, 0], np.float32))
    answer = replace(RequestSteer.plain(RANK), then=((3, one),))
    with pytest.raises(AssertionError):
        index.fill_with([answer], [5])
    assert index.fill_with([one, None], [2, 3]) == 2
    assert index.fill_with([answer], [5], [0]) == 2
