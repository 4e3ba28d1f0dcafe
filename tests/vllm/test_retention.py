"""What is held outside of the model for the steering modules: put back where it is lost, a sentence where it cannot
be."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from steer.errors import UnsupportedModel
from steer.runtime.bank import DirectionBank, HookPoint
from steer.runtime.token_index import TokenIndex
from steer.vllm.retention import Kept
from steer.vllm.steering_module import SteeringModule, attach_after, attach_within

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
