"""Body, header, model name and xargs: four ways to say one thing, and no way to say two."""

from __future__ import annotations

import json
import threading
import tracemalloc
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.datastructures import Headers

from steer.direction import Direction
from steer.errors import SpecError, UnknownDirection
from steer.names import MODES
from steer.registry import Registry
from steer.serve import carriers
from steer.serve.authorise import admit
from steer.serve.body import parse_body
from steer.serve.carriers import Carried, split_alias
from steer.serve.errors import HTTPProblem
from steer.shape import Shape
from steer.spec import Entry, RequestedDirection, parse, text
from tests import models

law = settings(deadline=None, max_examples=60)
MODEL = models.tiny("llama")
SERVED = ("base", "org/base")
FILES = [models.direction(MODEL, seed=seed, plane=True).to_bytes() for seed in range(3)]


class Watched(Shape):
    """The real checks, with something that happens while a request is being resolved."""

    while_resolving: Callable[[], None] = staticmethod(lambda: None)

    def check_entry(self, direction: Direction, entry: Entry) -> None:
        super().check_entry(direction, entry)
        self.while_resolving()


def registry_of(**names: bytes) -> Registry:
    placement = models.placement(rows=16)
    placement.shape = Watched("LlamaForCausalLM", models.LAYERS, models.D_MODEL, placement.shape.sites, 4)
    registry = Registry(placement)
    for name, data in names.items():
        registry.put(name, data)
    return registry


REGISTRY = registry_of(refusal=FILES[0], other=FILES[1])


def read(
    body: dict[str, Any], headers: Sequence[tuple[bytes, bytes]], served: Sequence[str], query: bytes = b""
) -> Carried:
    return carriers.read(body, Headers(raw=list(headers)), served, query)


def header(*values: str) -> list[tuple[bytes, bytes]]:
    return [(b"content-type", b"application/json"), *[(b"x-steer", value.encode("latin-1")) for value in values]]


def admitted(
    body: dict[str, Any],
    headers: Sequence[tuple[bytes, bytes]] = (),
    default: str = "off",
    registry: Registry = REGISTRY,
    served: Sequence[str] = SERVED,
) -> str:
    """The receipt of a request."""
    admission = admit(read(body, headers, served), registry, parse(default))
    admission.release()
    return admission.spec.receipt()


def refused(body: dict[str, Any], headers: Sequence[tuple[bytes, bytes]] = (), default: str = "off") -> SpecError:
    with pytest.raises(SpecError) as caught:
        admitted(body, headers, default)
    return caught.value


#: A wish as each of the four carriers has it.
CARRIERS: dict[str, Callable[[str], tuple[dict[str, Any], list[tuple[bytes, bytes]]]]] = {
    "body field 'steer'": lambda wish: ({"model": "base", "steer": wish}, header()),
    "header 'X-Steer'": lambda wish: ({"model": "base"}, header(wish)),
    "model name": lambda wish: ({"model": f"base+{wish.replace(',', '+')}"}, header()),
    "body field 'vllm_xargs.steer'": lambda wish: ({"model": "base", "vllm_xargs": {"steer": wish}}, header()),
}
WISHES = st.lists(
    st.builds(
        RequestedDirection,
        st.sampled_from(["refusal", "other"]),
        st.none() | st.sampled_from(MODES),
        st.none() | st.floats(-10, 10).filter(lambda s: "e+" not in repr(s)),
    ),
    max_size=3,
    unique_by=(lambda item: item.direction),
).map(text)


@given(WISHES)
@law
def test_all_carriers_mean_the_same(wish: str) -> None:
    receipts = {admitted(*carry(wish)) for carry in CARRIERS.values()}
    assert len(receipts) == 1
    assert receipts == {REGISTRY.resolve(parse(wish)).receipt()}


@given(WISHES)
@law
def test_each_carrier_is_found_under_its_name_and_the_model_is_freed_of_its_alias(wish: str) -> None:
    for name, carry in CARRIERS.items():
        assert read(*carry(wish), SERVED) == Carried({name: parse(wish)}, "base")


@given(WISHES, st.sets(st.sampled_from(sorted(CARRIERS)), min_size=2))
@law
def test_carriers_that_agree_are_no_conflict(wish: str, names: set[str]) -> None:
    body: dict[str, Any] = {}
    headers: list[tuple[bytes, bytes]] = []
    for name in names:
        more, lines = CARRIERS[name](wish)
        body |= more if name == "model name" else {k: v for k, v in more.items() if k != "model"}
        headers += lines
    assert admitted(body, headers) == REGISTRY.resolve(parse(wish)).receipt()


@pytest.mark.parametrize("first", CARRIERS)
@pytest.mark.parametrize("second", CARRIERS)
def test_a_conflict_names_both_carriers_and_what_they_say(first: str, second: str) -> None:
    if first == second:
        return
    one, two = CARRIERS[first]("refusal"), CARRIERS[second]("other=0.5")
    body = one[0] | two[0]
    for each in (one, two):  # the alias must not be overwritten by the plain model name of the other
        if each[0]["model"] != "base":
            body["model"] = each[0]["model"]
    error = refused(body, one[1] + two[1])
    assert f"{first} says 'refusal'" in str(error)
    assert f"{second} says 'other=0.5'" in str(error)
    assert error.param == "steer"


@pytest.mark.parametrize(
    ("one", "two"),
    [
        ("refusal", "refusal=1"),
        ("refusal", "refusal:ablate=1.0"),
        ("refusal=0.50", '{"direction": "refusal", "strength": 0.5}'),
        ("refusal,other", "refusal, other=1"),
        ("off", "refusal=0"),
        ("off", "[]"),
        ("refusal,other=0", "refusal"),
    ],
)
def test_one_meaning_written_differently_is_no_conflict(one: str, two: str) -> None:
    assert admitted({"model": "base", "steer": one}, header(two)) == admitted({"model": "base", "steer": one})


@pytest.mark.parametrize(
    ("one", "two"),
    [
        ("refusal", "off"),
        ("off", "refusal"),
        ("refusal", "refusal=0.999"),
        ("refusal", "refusal:one_sided"),
        ("refusal,other", "other,refusal"),
        ("refusal", "refusal,other"),
    ],
)
def test_different_meanings_are_a_conflict(one: str, two: str) -> None:
    assert "disagree" in str(refused({"model": "base", "steer": one}, header(two)))


def test_two_headers_must_agree_too() -> None:
    expected = admitted({"model": "base", "steer": "refusal"})
    assert admitted({"model": "base"}, header("refusal", "refusal=1")) == expected
    said = str(refused({"model": "base"}, header("refusal", "other")))
    assert "header 'X-Steer' (1 of 2) says 'refusal'" in said
    assert "header 'X-Steer' (2 of 2) says 'other'" in said


def test_the_case_of_the_header_means_nothing() -> None:
    expected = admitted({"model": "base", "steer": "refusal"})
    for name in (b"X-Steer", b"x-steer", b"X-STEER"):
        assert admitted({"model": "base"}, [(name, b"refusal")]) == expected
    assert admitted({"model": "base"}, [(b"x-steer-applied", b"refusal")]) == "[]"


@pytest.mark.parametrize(
    ("body", "name"),
    [
        ({"steers": "refusal"}, "steers"),
        ({"Steer": "refusal"}, "Steer"),
        ({"STEERING": {}}, "STEERING"),
        ({"steer_mode": "ablate"}, "steer_mode"),
        ({"extra_body": {"steer": "refusal"}}, "extra_body.steer"),
        ({"extra_args": {"steer": "refusal"}}, "extra_args.steer"),
        ({"metadata": {"steer": "refusal"}}, "metadata.steer"),
        ({"vllm_xargs": {"steering": "refusal"}}, "vllm_xargs.steering"),
        ({"sampling_params": {"extra_args": {"steer": "x"}}}, "sampling_params.extra_args.steer"),
        ({"vllm_xargs": '{"steering": 1}'}, "vllm_xargs.steering"),
        ({"vllm_xargs": "steer=refusal"}, "vllm_xargs"),
        ({"vllm_xargs.steer": "refusal"}, '"vllm_xargs.steer"'),
        ({"extra_headers": "X-Steer: refusal"}, "extra_headers"),
        ({"extra_body": {"extra_args": "temperature=0 STEER=refusal"}}, "extra_body.extra_args"),
        ({"requests": [{}, {"body": {"steer": "refusal"}}]}, "requests.1.body.steer"),
        ({"requests": [{"model": "base+refusal"}]}, "requests.0.model"),
        ({"X-Steer": "refusal"}, "X-Steer"),
        ({"x_steer": "refusal"}, "x_steer"),
        ({" steer": "refusal"}, " steer"),
        ({"extra_headers": {"X-Steer": "refusal"}}, "extra_headers.X-Steer"),
        ({"extra-body": {"_steer": "refusal"}}, "extra-body._steer"),
        ({"extraBody": {"steer": "refusal"}}, "extraBody.steer"),
        ({"vllm-xargs": {"steer": "refusal"}}, "vllm-xargs.steer"),
        ({"parameters": {"steer": "refusal"}}, "parameters.steer"),
        ({"chat_template_kwargs": {"steer": "refusal"}}, "chat_template_kwargs.steer"),
    ],
)
def test_what_nearly_asks_for_steering_is_told_of(body: dict[str, Any], name: str) -> None:
    for beside in ({}, {"steer": "refusal"}):
        error = refused(body | beside)
        assert f"'{name}'" in str(error)
        assert error.param == name


def test_to_look_for_traces_takes_no_more_memory_than_the_body() -> None:
    """Of long keys, one inside of the other, around many values; also of one that a text holds."""
    deep: Any = [[]] * 20_000
    for _ in range(60):
        deep = {"metadata" + "-" * 1000: deep}
    wide = json.dumps({"metadata" + "-" * 30_000: [[]] * 20_000})
    for body in (deep, {"metadata": wide}):
        tracemalloc.start()
        assert list(carriers.traces(body, Headers(), SERVED)) == []
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 30 * 2**20
    [name] = carriers.traces({"metadata" + "-" * 100: [{"x": 1}, {"steer" + "y" * 100: 1}]}, Headers(), SERVED)
    assert name == f"{('metadata' + '-' * 100)[:40]}.1.{('steer' + 'y' * 100)[:40]}"


@pytest.mark.parametrize("name", [b"X-Steering", b"steer", b"x_steer", b"X-Steer-Mode"])
def test_so_is_a_header_that_nearly_does(name: bytes) -> None:
    assert "X-Steer" in str(refused({}, [(name, b"refusal")]))


def test_an_alias_of_nothing_is_told_how_it_would_be_one() -> None:
    for name in ("base+", "base+ "):
        assert f"model: '{name}' names no direction; accepted: 'base'" in str(refused({"model": name}))


def test_so_is_a_query() -> None:
    for name in ("steer", "x-steer", "X_Steer"):
        with pytest.raises(SpecError, match=rf"'\?{name}'"):
            read({}, (), SERVED, f"a=1&{name}=refusal".encode())


def test_names_of_other_things_are_left_alone() -> None:
    deep: Any = {}
    for _ in range(10_000):
        deep = {"body": deep}
    tool = {"type": "function", "function": {"name": "steer", "parameters": {"properties": {"steering": {}}}}}
    body = {"messages": [{"role": "user", "content": "steer", "steer": 1}], "tools": [tool], "oversteer": 1}
    body |= {"metadata": {"user": "steer", "steering_group": "a"}, "chat_template_kwargs": {"steering_style": "x"}}
    body |= {"response_format": {"steering": {}}, "extra_body": deep}
    assert admitted(body) == "[]"


def test_problems_of_all_carriers_are_reported_together() -> None:
    body = {"model": "base+a b", "steer": {"direction": "refusal", "strength": 99}, "vllm_xargs": {"steer": 1}}
    error = refused(body, header("x:y", ""))
    for words in ("steer.strength: ", "X-Steer.mode: ", "vllm_xargs.steer: ", "model: ", "X-Steer: "):
        assert sum(problem.startswith(words) for problem in error.problems) >= 1, words
    assert error.param == "steer"


def test_bytes_that_are_no_text_are_refused() -> None:
    for value in (b"\xff\xfe", b"", b"\x00", "réfusal".encode()):
        with pytest.raises(SpecError, match="X-Steer: "):
            read({"model": "base"}, [(b"x-steer", value)], SERVED)


def test_an_unknown_direction_is_unknown_in_every_carrier() -> None:
    for carry in CARRIERS.values():
        with pytest.raises(UnknownDirection, match="'nothing' is not served; served: other, refusal"):
            admitted(*carry("nothing"))


@pytest.mark.parametrize(
    ("model", "served", "expected"),
    [
        ("base+refusal", ["base"], ("base", "refusal")),
        ("base+refusal=0.7", ["base"], ("base", "refusal=0.7")),
        ("base+refusal:add=-0.5+other", ["base"], ("base", "refusal:add=-0.5,other")),
        ("org/base+refusal", ["org/base"], ("org/base", "refusal")),
        ("base+", ["base"], ("base", "")),
        ("base", ["base"], None),
        ("basement+refusal", ["base"], None),
        ("base-refusal", ["base"], None),
        ("other+refusal", ["base"], None),
        ("qwen+chat", ["qwen+chat"], None),
        ("qwen+chat", ["qwen", "qwen+chat"], None),
        ("qwen+chat+refusal", ["qwen+chat"], ("qwen+chat", "refusal")),
        ("qwen+chat+refusal", ["qwen", "qwen+chat"], ("qwen+chat", "refusal")),
        ("qwen+chat+refusal", ["qwen+chat", "qwen"], ("qwen+chat", "refusal")),
        ("qwen+refusal", ["qwen", "qwen+chat"], ("qwen", "refusal")),
    ],
)
def test_an_alias_is_a_served_name_with_directions_behind_it(
    model: str, served: list[str], expected: tuple[str, str] | None
) -> None:
    assert split_alias(model, served) == expected


def test_an_alias_with_several_directions_is_all_of_them_in_order() -> None:
    expected = admitted({"model": "base", "steer": "refusal=0.5,other:add"})
    assert admitted({"model": "base+refusal=0.5+other:add"}) == expected
    assert admitted({"model": "qwen+chat+refusal=0.5+other:add"}, served=["qwen", "qwen+chat"]) == expected


def test_an_alias_without_a_direction_is_refused() -> None:
    assert refused({"model": "base+"}).param == "model"


@pytest.mark.parametrize("body", [{}, {"model": None}, {"model": 1}, {"model": "unknown"}, {"vllm_xargs": None}])
def test_what_carries_nothing_is_left_to_others(body: dict[str, Any]) -> None:
    carried = read(body, header(), SERVED)
    assert carried.found == {}
    assert carried.model == (body.get("model") if isinstance(body.get("model"), str) else None)


@pytest.mark.parametrize("xargs", [{}, {"other": 1}, [], "other=oversteer", None])
def test_xargs_without_steer_carry_nothing(xargs: Any) -> None:
    assert admitted({"model": "base", "vllm_xargs": xargs}, default="refusal") == admitted({}, default="refusal")


def test_the_default_is_for_requests_without_a_carrier_only() -> None:
    plain, refusal, other = (admitted({"model": "base", "steer": wish}) for wish in ("off", "refusal", "other"))
    assert plain == "[]"
    assert admitted({"model": "base"}, default="refusal") == refusal
    for carry in CARRIERS.values():
        assert admitted(*carry("other"), default="refusal") == other


@pytest.mark.parametrize("off", ["off", None, False, "none", [], "[]"])
def test_off_beats_the_default(off: Any) -> None:
    assert admitted({"model": "base", "steer": off}, default="refusal") == "[]"
    assert admitted({"model": "base", "vllm_xargs": {"steer": off}}, default="refusal") == "[]"


def test_off_beats_the_default_in_text_carriers() -> None:
    for carry in CARRIERS.values():
        assert admitted(*carry("off"), default="refusal") == "[]"


def test_a_refused_request_pins_nothing() -> None:
    refused({"model": "base", "steer": "refusal"}, header("other"))
    refused({"model": "base", "steer": "refusal,nothing"})
    assert [version.pins for version in REGISTRY.names().values()] == [0, 0]


def test_a_swap_in_between_makes_no_conflict(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two carriers that name one direction agree, also where the name moves on while they are compared."""
    registry = registry_of(refusal=FILES[0])
    swaps: list[threading.Thread] = []

    def swap() -> None:
        if not swaps:
            swaps.append(threading.Thread(target=registry.put, args=("refusal", FILES[2])))
            swaps[0].start()
            swaps[0].join(0.3)

    monkeypatch.setattr(Watched, "while_resolving", staticmethod(swap))
    receipt = admitted({"model": "base", "steer": "refusal"}, header("refusal=1"), registry=registry)
    swaps[0].join(10)
    assert '"direction":"refusal"' in receipt


def test_half_of_a_surrogate_pair_is_no_text() -> None:
    assert parse_body(b'{"prompt": "\\ud83d\\ude00"}') == {"prompt": "\U0001f600"}
    for half in (b"\\ud83d", b"\\uDE00", b"\xed\xa0\xbd", b"\xff"):  # the last two are no UTF-8
        with pytest.raises(HTTPProblem) as caught:
            parse_body(b'{"messages": [{"content": "a' + half + b'"}]}')
        assert caught.value.code.status == 400
