"""Whatever mode of autograd the caller is in when something is made, it serves in every other."""

from __future__ import annotations

from contextlib import AbstractContextManager

import pytest
import torch

import steer
from steer.runtime import token_index
from tests import models
from tests.runtime.copy_queues import Prompt

IDS = torch.randint(3, models.VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(7))
OPTIONS = dict(max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)


@pytest.fixture(params=["cpu", "a device with memory of its own"])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the second one the index is written by copies, as on a GPU."""
    if request.param != "cpu":
        monkeypatch.setattr(token_index, "copy_queue_to", lambda _device: Prompt())


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("first", [torch.inference_mode, torch.no_grad, torch.enable_grad])
@pytest.mark.parametrize("attached_in", [torch.inference_mode, torch.enable_grad])
def test_a_batch_made_in_one_mode_serves_passes_in_another(
    first: type[AbstractContextManager[None]], attached_in: type[AbstractContextManager[None]]
) -> None:
    model = models.tiny("llama")
    mask = torch.ones_like(IDS)
    plain = model.generate(IDS, attention_mask=mask, **OPTIONS)
    with attached_in():
        attached = steer.attach(model, {"d": models.direction(model, seed=1), "e": models.direction(model, seed=2)})
    with attached as steering:
        with first(), steering("off", "d,e"):
            steered = model(input_ids=IDS, use_cache=False).logits
        assert torch.equal(model.generate(IDS, attention_mask=mask, **OPTIONS), plain)
        with steering("off", "d,e"):
            with first():
                model(input_ids=IDS, use_cache=False)
            again = model(input_ids=IDS, use_cache=False).logits
            again.sum().backward()  # what the pass before has looked up is kept for this one
        assert torch.equal(again.detach(), steered)
