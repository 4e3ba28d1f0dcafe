"""A placement refuses what the served model, its sites or its rank cannot take, with every reason at once."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import pytest
import torch

from steer.errors import DirectionError, NoRoom, SpecError
from steer.names import SHIFTING, Site
from steer.runtime.bank import BankSlice, DirectionBank, HookPoint, LocalPlacement
from steer.shape import Shape
from steer.spec import Condition, Entry
from tests import models

DIRECTION = models.direction(models.tiny("llama"), k=2, sites=("writers",))


def shape(
    architecture: str = "LlamaForCausalLM", layers: int = 3, d_model: int = 64, site: Site = "writers", rank: int = 2
) -> Shape:
    return Shape(architecture, layers, d_model, frozenset({site}), rank)


def test_a_direction_of_this_model_fits() -> None:
    shape().check(DIRECTION)
    shape(rank=5).check(DIRECTION)


def test_every_reason_is_listed() -> None:
    with pytest.raises(DirectionError) as caught:
        shape("Other", 4, 32, "resid_post", 1).check(DIRECTION)
    reasons = (
        "d_model 64, this model has 32",
        "3 layers",
        "made for LlamaForCausalLM",
        "sites ['writers']",
        "has 2 rows",
    )
    assert len(caught.value.problems) == len(reasons)
    for problem, reason in zip(caught.value.problems, reasons, strict=True):
        assert reason in problem


def test_a_missing_site_is_told_with_the_option_that_gives_it() -> None:
    with pytest.raises(DirectionError, match="--sites resid_post,writers"):
        shape(site="resid_post").check(DIRECTION)


def test_a_local_placement_passes_everything_to_its_table() -> None:
    bank = DirectionBank([HookPoint("writers", layer) for layer in range(3)], rows=3, rank=2, d_model=64)
    placement = LocalPlacement(shape(), bank)
    placement.load("a", DIRECTION, b"")
    assert bank.rows_in_use == 2
    with pytest.raises(NoRoom):
        placement.load("b", DIRECTION, b"")
    with pytest.raises(SpecError):
        shape().check_entry(DIRECTION, Entry("d", "a", "add", 1.0))
    shape().check_entry(DIRECTION, Entry("d", "a", "ablate", 1.0))
    shape().check_entry(DIRECTION, Entry("d", "a", "ablate", 1.0, "0-1"))
    idle = replace(DIRECTION, weights=torch.zeros_like(DIRECTION.weights))
    for direction, layers, told in ((idle, "0-1", "does nothing"), (DIRECTION, "0-99", "has the layers 0 to")):
        with pytest.raises(SpecError, match=told):
            shape().check_entry(direction, Entry("d", "a", "ablate", 1.0, layers))
    placement.unload("a")
    assert bank.rows_in_use == 0


def test_what_would_add_nothing_is_refused() -> None:
    served = Shape("LlamaForCausalLM", 3, models.D_MODEL, frozenset({"resid_post"}), 2)
    made = models.direction(models.tiny("llama"))
    means = made.mean_harmful.clone()
    means[1] = made.mean_harmless[1]
    served.check_entry(made, Entry("d", "a", "add", 1.0))
    one = replace(made, mean_harmful=means)
    served.check_entry(one, Entry("d", "a", "add", 1.0, "0-1"))
    with pytest.raises(SpecError, match="does nothing at the layers 1"):
        served.check_entry(one, Entry("d", "a", "add", 1.0, "1"))
    served.check_entry(one, Entry("d", "a", "ablate", 1.0, "1"))
    with pytest.raises(SpecError, match="holds no class means that differ for the mode 'add'; its modes: ablate, aff"):
        served.check_entry(replace(made, mean_harmful=made.mean_harmless), Entry("d", "a", "add", 1.0))


def test_a_threshold_is_shifted_where_there_is_one_and_the_distance_is_known() -> None:
    served = Shape("LlamaForCausalLM", 3, models.D_MODEL, frozenset({"resid_post"}), 2)
    made = models.direction(models.tiny("llama"), plane=True)
    no_means = replace(made, mean_harmful=made.mean_harmless)
    for mode in made.meta.modes:
        entry = Entry("d", "a", mode, 1.0, shift=0.25)
        if mode not in SHIFTING:
            with pytest.raises(SpecError, match=f"'{mode}' has no threshold to shift; modes with one: clamp"):
                served.check_entry(made, entry)
            continue
        served.check_entry(made, entry)
        with pytest.raises(SpecError, match=r"holds no (class )?means"):
            served.check_entry(no_means, entry)


def test_a_condition_is_decided_by_one_row_in_front_of_what_it_decides() -> None:
    """Every reason why not is told at once; without layers what is meant is all behind it."""
    probe = models.direction(models.tiny("llama"), seed=3)
    rows = probe.directions.clone()
    rows[0] = 0
    served = shape(site="resid_post")

    def entry(layer: int, layers: str | None = None) -> Entry:
        return Entry("d", "a", "ablate", 1.0, layers, "answer", Condition("p", layer, above=1.0, digest="b"))

    assert served.after_condition(probe, entry(0)).layers == "1-2"
    assert served.after_condition(probe, entry(1)).layers == "2"
    assert served.after_condition(probe, entry(0, "2")).layers == "2"
    for direction, wrong, told in (
        (DIRECTION, entry(0), ("has 2 rows", "the sites writers: what is read is 'resid_post'")),
        (replace(probe, directions=rows), entry(0), ("has no row at that layer",)),
        (probe, entry(2), ("one must come after it: 0 to 1 are accepted",)),
        (probe, entry(1, "1-2"), ("'d' is to act at the layers 1-2: layers from 2 on are accepted",)),
    ):
        with pytest.raises(SpecError) as caught:
            served.after_condition(direction, wrong)
        assert caught.value.param == "steer.if"
        for problem, reason in zip(caught.value.problems, told, strict=True):
            assert reason in problem


def test_a_request_that_ends_waits_for_no_load(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests end on the event loop, and a load takes its time on another thread."""
    bank = DirectionBank([HookPoint("writers", layer) for layer in range(3)], rows=4, rank=2, d_model=64)
    placement = LocalPlacement(shape(), bank)
    placement.load("a", DIRECTION, b"")
    write, loading, ending = BankSlice.write, threading.Event(), threading.Event()

    def slow(*given: Any) -> None:
        loading.set()
        assert ending.wait(10), "the unload waited"
        write(*given)

    monkeypatch.setattr(BankSlice, "write", slow)
    thread = threading.Thread(target=placement.load, args=("b", DIRECTION, b""))
    thread.start()
    assert loading.wait(10)
    unloading = threading.Thread(target=placement.unload, args=("a",))
    unloading.start()
    unloading.join(5)
    waited = unloading.is_alive()
    ending.set()
    thread.join(10)
    assert not waited
    assert bank.rows_in_use == 2


@pytest.mark.parametrize(
    ("dtype", "weight", "fits"),
    [
        (torch.float16, 2.0, True),
        (torch.float16, -2.0, True),
        (torch.float16, 15.0, True),  # 10 · 14³ = 27440
        (torch.float16, 1000.0, False),
        (torch.bfloat16, 1000.0, True),
        (torch.bfloat16, 1e15, False),
        (torch.float32, 1e12, True),
        (torch.float32, -1e15, False),
    ],
)
def test_weights_that_must_overflow_the_models_dtype_are_refused(dtype: torch.dtype, weight: float, fits: bool) -> None:
    direction = replace(DIRECTION, weights=torch.full_like(DIRECTION.weights, weight))
    if fits:
        replace(shape(), dtype=dtype).check(direction)
    else:
        with pytest.raises(DirectionError, match=rf"'weights' goes up to .* more than {str(dtype)[6:]} can hold"):
            replace(shape(), dtype=dtype).check(direction)


def test_weights_of_mlps_count_as_those_of_attention_do() -> None:
    wild = replace(DIRECTION, mlp_weights=torch.full_like(DIRECTION.weights, 1e15))
    with pytest.raises(DirectionError, match="'mlp_weights' goes up to 1e"):
        replace(shape(), dtype=torch.bfloat16).check(wild)
    alone = replace(DIRECTION, weights=torch.zeros(3), mlp_weights=torch.tensor([0.0, 1.0, 0.0]))
    shape().check_entry(alone, Entry("d", "d", "ablate", 1.0, layers="1"))
    with pytest.raises(SpecError, match="does nothing at the layers 2"):
        shape().check_entry(alone, Entry("d", "d", "ablate", 1.0, layers="2"))


def test_weights_of_layers_that_are_not_steered_count_for_nothing() -> None:
    rows, weights = DIRECTION.directions.clone(), DIRECTION.weights.clone()
    rows[0], weights[0] = 0, 1e15
    replace(shape(), dtype=torch.float16).check(replace(DIRECTION, directions=rows, weights=weights))
