"""The read-out's part of the request language, and what a registry makes of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from steer.errors import SpecError, UnknownDirection
from steer.hf.steering import Steering
from steer.readout import RequestedReadout, parse
from steer.registry import Admission, Registry
from steer.spec import RequestedDirection, Spec
from tests import models


@pytest.fixture(scope="module")
def registry() -> Registry:
    model = models.tiny("llama")
    steering = Steering(model, sites=("resid_post", "writers"))
    registry = Registry(steering.placement())
    for seed, name in enumerate(("a", "b", "c"), 1):
        registry.put(name, models.direction(model, seed=seed).to_bytes())
    registry.put("pair", models.direction(model, k=2, seed=8).to_bytes())
    registry.put("zero", models.direction(model, seed=9, strength=0.0).with_meta(source_layer=1).to_bytes())
    for seed, name in enumerate(("flat", "even", "third"), 10):
        registry.put(name, models.direction(model, seed=seed, plane=True).to_bytes())
    registry.put("written", models.direction(model, seed=7, shared=True, sites=("writers",)).to_bytes())
    return registry


@pytest.mark.parametrize("off", [None, False, "off", "None", [], {"directions": False}])
def test_off(off: Any) -> None:
    assert parse(off) is None


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        (True, RequestedReadout(None)),
        ("a", RequestedReadout(("a",))),
        ("a, b", RequestedReadout(("a", "b"))),
        (["a", "b", "a"], RequestedReadout(("a", "b"))),
        ({}, RequestedReadout(None)),
        ({"directions": "a", "layers": "source"}, RequestedReadout(("a",), "source")),
        ({"directions": ["a"], "layers": [2, 0, 2]}, RequestedReadout(("a",), (0, 2))),
        ({"directions": "a", "angle": True}, RequestedReadout(("a",), angle=True)),
        ({"angle": False}, RequestedReadout(None)),
    ],
)
def test_what_is_understood(value: Any, wanted: RequestedReadout) -> None:
    assert parse(value) == wanted


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (7, "7 is not understood; accepted: true"),
        (["a", 3], "is not understood"),
        ({"directions": "a", "layer": 1, "x": 2}, "steer_readout.layer: unknown field"),
        ({"layers": "last"}, "'last' is not accepted: 'all', 'source' or a list"),
        ({"layers": [True]}, "is not accepted"),
        ({"layers": []}, "is not accepted"),
        ({"directions": "a", "angle": 1}, r"steer_readout\.angle: 1 is not accepted: true or false"),
        (["a", "b", "c", "d", "e"], "5 directions, at most 4"),
    ],
)
def test_what_is_not(value: Any, says: str) -> None:
    with pytest.raises(SpecError, match=says) as caught:
        parse(value)
    assert caught.value.param == "steer_readout"


def test_all_problems_come_together() -> None:
    with pytest.raises(SpecError) as caught:
        parse({"directions": 7, "layers": "last", "x": 1})
    assert len(caught.value.problems) == 3


def test_true_reads_the_directions_of_the_own_spec(registry: Registry) -> None:
    spec = registry.resolve(
        [RequestedDirection("b"), RequestedDirection("a", "add"), RequestedDirection("a", "ablate")]
    )
    readout = registry.resolve_readout(RequestedReadout(None), spec, models.LAYERS)
    assert [line.name for line in readout.lines] == ["b", "a"]
    assert readout.digests == tuple(dict.fromkeys(e.digest for e in spec.entries))
    assert readout.layers == (0, 1, 2)


def test_a_version_is_pinned_once_by_what_steers_or_reads(registry: Registry) -> None:
    spec = registry.resolve([RequestedDirection("a")])
    admission = Admission(registry, spec, registry.resolve_readout(RequestedReadout(("a", "b")), spec, models.LAYERS))
    assert [registry.get(name).pins for name in ("a", "b", "c")] == [1, 1, 0]
    admission.release()
    assert [registry.get(name).pins for name in ("a", "b", "c")] == [0, 0, 0]


def test_each_row_is_a_line_and_what_is_read_need_not_act(registry: Registry) -> None:
    readout = registry.resolve_readout(RequestedReadout(("pair", "zero"), (1,)), Spec(), models.LAYERS)
    assert [(line.name, line.row) for line in readout.lines] == [("pair", 0), ("pair", 1), ("zero", 0)]


def test_an_angle_is_read_of_two_rows_for_each_direction(registry: Registry) -> None:
    wanted = RequestedReadout(("flat", "even"), angle=True)
    readout = registry.resolve_readout(wanted, Spec(), models.LAYERS)
    assert ([line.name for line in readout.lines], readout.rows) == (["flat", "even"], 4)
    assert registry.resolve_readout(replace(wanted, angle=False), Spec(), models.LAYERS).rows == 2


def test_source_is_the_named_directions_source_layer(registry: Registry) -> None:
    readout = registry.resolve_readout(RequestedReadout(("zero",), "source"), Spec(), models.LAYERS)
    assert readout.layers == (1,)
    with pytest.raises(SpecError, match="a: each layer has its own direction"):
        registry.resolve_readout(RequestedReadout(("zero", "a"), "source"), Spec(), models.LAYERS)


def test_refusals_name_the_rule_and_pin_nothing(registry: Registry) -> None:
    def refused(wanted: RequestedReadout, says: str) -> SpecError:
        with pytest.raises(SpecError, match=says) as caught:
            registry.resolve_readout(wanted, Spec(), models.LAYERS)
        assert caught.value.param == "steer_readout"
        return caught.value

    refused(RequestedReadout(None), "those that steer this request are read, but none does")
    assert isinstance(refused(RequestedReadout(("nobody",)), "'nobody' is not served; served: a, b"), UnknownDirection)
    refused(RequestedReadout(("a",), (0, 3)), "3: this model has the layers 0 to 2")
    refused(RequestedReadout(("written",)), "acts at the site 'writers'; what is read is 'resid_post'")
    refused(RequestedReadout(("a", "b", "c", "pair")), "needs 5 direction rows")
    refused(RequestedReadout(("flat", "a"), angle=True), "steer_readout: direction 'a' holds no plane")
    refused(RequestedReadout(("flat", "even", "third"), angle=True), "needs 6 direction rows")
    assert all(version.pins == 0 for version in registry.names().values())
