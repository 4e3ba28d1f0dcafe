"""A worker's directions: rows are reused when nobody runs with them, and hold what their digests say. Its steering
modules: put back where they are lost, a sentence where they cannot be."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from steer.direction import Direction, digest
from steer.errors import DirectionError, EngineFailed, NoRoom, UnsupportedModel
from steer.runtime.bank import DirectionBank, HookPoint
from steer.runtime.token_index import TokenIndex
from steer.shape import Shape
from steer.spec import Entry, Spec
from steer.vllm import placement
from steer.vllm.placement import VllmPlacement
from steer.vllm.residents import Kept, Residents, RowsInUse
from steer.vllm.steering_module import SteeringModule, attach_after, attach_within
from tests import models


@pytest.fixture(scope="module")
def files() -> list[bytes]:
    model = models.tiny("llama")
    return [models.direction(model, seed=seed).to_bytes() for seed in range(3)]


@pytest.fixture
def residents(files: list[bytes]) -> Residents:
    direction = Direction.from_bytes(files[0])
    points = [HookPoint("resid_post", layer) for layer in range(direction.meta.layers)]
    return Residents(DirectionBank(points, rows=2, rank=2, d_model=direction.meta.d_model))


def spec_of(data: bytes) -> Spec:
    return Spec((Entry("name", digest(data), "ablate", 1.0),))


def test_no_row_is_reused_while_a_request_runs_with_it(residents: Residents, files: list[bytes]) -> None:
    """Whatever the order in which unloads, loads and ends arrive: a request that was stopped by a string has ended in
    the front end, and runs here for some more steps."""
    first, second, third = files
    for data in (first, second):
        residents.load(data, digest(data))
    steer = residents.steer("stopped", spec_of(first), 1)
    residents.retire(digest(first))
    with pytest.raises(RowsInUse, match="requests that are ending"):
        residents.load(third, digest(third))
    assert residents.steer("again", spec_of(first), 1).slots.tolist() == steer.slots.tolist()
    residents.end("stopped")
    residents.end("again")
    residents.load(third, digest(third))
    with pytest.raises(UnsupportedModel, match="does not have"):
        residents.steer("late", spec_of(first), 1)


def test_a_full_table_is_no_matter_of_waiting(residents: Residents, files: list[bytes]) -> None:
    for data in files[:2]:
        residents.load(data, digest(data))
    with pytest.raises(NoRoom) as caught:
        residents.load(files[2], digest(files[2]))
    assert not isinstance(caught.value, RowsInUse)


def test_a_direction_stays_while_any_front_end_has_it(residents: Residents, files: list[bytes]) -> None:
    """However often one loads it or lets it go: it is a set of front ends, and no count."""
    first, second, third = files
    for front_end in ("0:a", "1:b", "0:a"):
        residents.load(first, digest(first), front_end)
    residents.load(second, digest(second), "0:a")
    for _ in range(3):
        residents.retire(digest(first), "0:a")
    assert residents.steer("of the other", spec_of(first), 1)
    residents.end("of the other")
    with pytest.raises(RowsInUse, match="other front ends"):
        residents.load(third, digest(third), "0:a")
    residents.retire(digest(first), "1:b")
    residents.load(third, digest(third), "0:a")
    assert residents.bank.rows_in_use == 2


def test_what_a_front_end_held_ends_with_it(residents: Residents, files: list[bytes]) -> None:
    """One that is started again comes as another with the same number; those beside it keep what they have."""
    first, second, third = files
    residents.meet("0:a")
    residents.meet("1:b")
    residents.load(first, digest(first), "0:a")
    residents.load(second, digest(second), "0:a")
    residents.load(second, digest(second), "1:b")
    residents.meet("0:again")
    residents.load(third, digest(third), "0:again")
    with pytest.raises(UnsupportedModel, match="does not have"):
        residents.steer("late", spec_of(first), 1)
    assert residents.steer("of the other", spec_of(second), 1)


def test_rows_hold_what_their_digests_say(residents: Residents, files: list[bytes]) -> None:
    for data in files[:2]:
        residents.load(data, digest(data))
    assert residents.put_back() == []
    right = [view.clone() for view in residents.bank.contents(digest(files[0]))]
    for view in residents.bank.contents(digest(files[0])):
        view.fill_(7)
    assert residents.put_back() == [digest(files[0])[:12]]
    assert all(a.equal(b) for a, b in zip(right, residents.bank.contents(digest(files[0])), strict=True))


# -- the placement on several workers ------------------------------------------------------------------------------


class Workers:
    """Answers of `steer_load`, one list for each call; an exception is raised. `told`: all that was asked."""

    def __init__(self, *answers: Any) -> None:
        self.answers, self.told = list(answers), [("", "")]

    def __call__(self, method: str, *args: Any) -> list[Any]:
        self.told.append((method, args[-2]))
        if method != "steer_load":
            return []
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return list(answer)


def placed(workers: Workers) -> VllmPlacement:
    return VllmPlacement(Shape("x", 1, 1, frozenset(), 1), workers)


GOOD: Any = {"digest": "d"}


@pytest.mark.parametrize("failure", [RuntimeError("an engine is dead"), [GOOD, {"error": "out of memory"}]])
def test_a_load_that_fails_somewhere_is_let_go_everywhere(failure: Any) -> None:
    workers = Workers(failure, [{"digest": "e"}] * 2)
    point = placed(workers)
    with pytest.raises((RuntimeError, EngineFailed)):
        point.load("d", None, b"")  # type: ignore[arg-type]
    point.load("e", None, b"")  # type: ignore[arg-type]
    assert [told for told in workers.told if told[0] == "steer_unload"] == [("steer_unload", "d")]


def test_what_a_worker_refuses_is_the_fault_of_the_file_and_not_of_the_engine() -> None:
    workers = Workers([GOOD, {"refused": "tensor 'mlp_weights' differs"}])
    with pytest.raises(DirectionError, match="'mlp_weights' differs"):
        placed(workers).load("d", None, b"")  # type: ignore[arg-type]
    assert workers.told[-1] == ("steer_unload", "d")


def test_rows_of_requests_that_are_ending_are_waited_for() -> None:
    workers = Workers([GOOD, {"in_use": "wait"}], [GOOD, GOOD])
    placed(workers).load("d", None, b"")  # type: ignore[arg-type]
    assert [method for method, _ in workers.told[1:]] == ["steer_load", "steer_unload", "steer_load"]


def test_but_not_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "END_TIMEOUT", 0.0)
    with pytest.raises(NoRoom, match="wait"):
        placed(Workers(*[[{"in_use": "wait"}]] * 3)).load("d", None, b"")  # type: ignore[arg-type]


# -- the steering modules -------------------------------------------------------------------------------------------

ROWS, RANK, D, TOKENS = 4, 2, 16, 64
POINT, INDEX = HookPoint("resid_post", 2), TokenIndex(1, TOKENS, "cpu")


@pytest.fixture
def model() -> nn.Module:
    points = [HookPoint("resid_post", layer) for layer in range(3)]
    bank, index = DirectionBank(points, rows=ROWS, rank=RANK, d_model=D), TokenIndex(RANK, TOKENS, "cpu")
    model = nn.Sequential(*(nn.Linear(D, D) for _ in points))
    for layer, point in zip(model, points, strict=True):
        attach_after(layer, "tensor", SteeringModule(bank.slices[point], index), "resid_post")
    return model


def steering_module_of(layer: nn.Module) -> Any:
    return layer.get_submodule("steer_after_resid_post")


def test_what_is_there_is_left_alone(model: Any) -> None:
    assert Kept(model).put_back(model) == []


def test_lost_buffers_and_steering_modules_are_put_back_as_they_were(model: Any) -> None:
    kept = Kept(model)
    before = {name: id(buffer) for name, buffer in model.named_buffers(remove_duplicate=False)}
    for name in [name for name, _ in steering_module_of(model[0]).named_buffers()]:
        delattr(steering_module_of(model[0]), name)
    del model[1].steer_after_resid_post
    steering_module_of(model[2]).to(torch.float64)
    assert len(kept.put_back(model)) > 2
    assert {name: id(buffer) for name, buffer in model.named_buffers(remove_duplicate=False)} == before
    assert kept.put_back(model) == []


def test_what_cannot_be_put_back_is_said(model: Any) -> None:
    kept = Kept(model)
    steering_module_of(model[0]).vectors.data = torch.zeros(ROWS + 1, D)
    with pytest.raises(UnsupportedModel, match="moved in memory"):
        kept.put_back(model)


def test_a_replaced_block_is_said(model: Any) -> None:
    kept = Kept(model)
    model[1] = nn.Linear(D, D)
    with pytest.raises(UnsupportedModel, match="has been replaced"):
        kept.put_back(model)


def test_removed_hooks_are_said(model: Any) -> None:
    kept = Kept(model)
    model[1]._forward_hooks.clear()
    with pytest.raises(UnsupportedModel, match="hooks"):
        kept.put_back(model)


def test_a_norm_that_acts_no_longer_itself_is_said(model: Any) -> None:
    attach_within(model[2], SteeringModule(DirectionBank([POINT], rows=1, rank=1, d_model=D).slices[POINT], INDEX))
    kept = Kept(model)
    assert kept.put_back(model) == []
    del model[2].forward
    with pytest.raises(UnsupportedModel, match="hooks"):
        kept.put_back(model)


def test_each_storage_is_counted_once(model: Any) -> None:
    index = TOKENS * (3 * RANK + 1) * 4
    whole = {id(buffer): buffer.nbytes for buffer in model.buffers()}
    assert index < Kept(model).nbytes == sum(whole.values())
