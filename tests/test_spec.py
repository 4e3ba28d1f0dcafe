"""The request language: every form of one wish means the same, and everything else is refused in words."""

from __future__ import annotations

import json
import math
import unicodedata
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from steer.errors import SpecError
from steer.names import MAX_SHIFT, MAX_STRENGTH, MODES, Mode
from steer.spec import (
    MAX_COMPONENT,
    MAX_ITEMS,
    PHASES,
    TOKENS,
    Condition,
    Entry,
    RequestedDirection,
    Spec,
    bare,
    nearly,
    parse,
    text,
)
from tests.oracle import acting

law = settings(deadline=None, max_examples=100)

#: Directions may have names that say something elsewhere in a text.
WORDS = ("norm", "each", "all", "auto", "default", "7", "10-20", "first-1", "1e3", "nan", *MODES, *PHASES, *TOKENS)
NAMES = st.sampled_from(WORDS) | st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}", fullmatch=True).filter(
    lambda name: name.lower() not in {"off", "none", "null", "false", "true"}
)
STRENGTHS = st.floats(-MAX_STRENGTH, MAX_STRENGTH).map(lambda x: x + 0.0)
PLACES = st.none() | st.sampled_from(["prompt", "answer", "not-first", "first-1", "last-20"])
LAYERS = st.none() | st.sampled_from(["0", "7", "0-3", "10-20"])
COMPONENTS = st.floats(-MAX_COMPONENT, MAX_COMPONENT).map(lambda x: x + 0.0)
ONCE = st.builds(Condition, NAMES, st.integers(0, 9999), above=COMPONENTS) | st.builds(
    Condition, NAMES, st.integers(0, 9999), below=COMPONENTS
)
EACH = ONCE.map(lambda condition: replace(condition, each=True))
CONDITIONS = ONCE | EACH
SHIFTS = st.none() | st.floats(-MAX_SHIFT, MAX_SHIFT).filter(bool)
KEPT = st.sampled_from([None, True])
WANTED = st.builds(
    RequestedDirection,
    NAMES,
    st.none() | st.sampled_from(MODES),
    st.none() | STRENGTHS,
    LAYERS,
    PLACES,
    st.none() | EACH,
    SHIFTS,
    norm_preserving=KEPT,
) | st.builds(RequestedDirection, NAMES, st.none(), st.none() | STRENGTHS, LAYERS, st.just("answer"), ONCE)
WISHES = st.lists(WANTED, max_size=MAX_ITEMS, unique_by=lambda item: (item.direction, item.mode)).map(tuple)


def as_object(item: RequestedDirection, *, nulls: bool) -> dict[str, Any]:
    found: dict[str, Any] = {"direction": item.direction, "mode": item.mode, "strength": item.strength}
    found |= {"shift": item.shift, "norm_preserving": item.norm_preserving}
    found |= {"layers": item.layers, "tokens": item.tokens, "if": None}
    if item.condition:
        found["if"] = {k: v for k, v in asdict(item.condition).items() if v not in (None, "")}
    return {k: v for k, v in found.items() if nulls or v is not None}


def problems_of(value: Any, param: str = "steer") -> tuple[str, ...]:
    with pytest.raises(SpecError) as caught:
        parse(value, param)
    return caught.value.problems


@given(WISHES)
@law
def test_the_text_form_reads_back(wishes: tuple[RequestedDirection, ...]) -> None:
    assert parse(text(wishes)) == wishes
    assert text(parse(text(wishes))) == text(wishes)


@given(WISHES, st.booleans())
@law
def test_text_objects_and_lists_mean_the_same(wishes: tuple[RequestedDirection, ...], nulls: bool) -> None:
    objects = [as_object(item, nulls=nulls) for item in wishes]
    assert parse(objects) == wishes
    assert parse([text([item]) for item in wishes]) == wishes
    assert parse(json.dumps(objects)) == wishes, "JSON may come as a text, as in a header"
    assert parse(f"  {json.dumps(objects)}\n") == wishes
    mixed = [text([item]) if i % 2 else as_object(item, nulls=nulls) for i, item in enumerate(wishes)]
    assert parse(mixed) == wishes
    for item, form in zip(wishes, objects, strict=True):
        assert parse(form) == parse(json.dumps(form)) == parse(text([item])) == (item,)


@given(WISHES, st.sampled_from(["", " ", "  ", "\t"]))
@law
def test_space_around_the_parts_means_nothing(wishes: tuple[RequestedDirection, ...], space: str) -> None:
    spaced = text(wishes)
    for sign in ",:=@?<>^":
        spaced = spaced.replace(sign, f"{space}{sign}{space}")
    assert parse(space + spaced + space) == wishes


def test_the_forms_of_the_documentation() -> None:
    assert parse("refusal") == (RequestedDirection("refusal"),)
    assert parse("refusal=0.7") == (RequestedDirection("refusal", None, 0.7),)
    assert parse("refusal:one_sided=0.7") == (RequestedDirection("refusal", "one_sided", 0.7),)
    assert parse("refusal=1,verbosity=-0.5") == (
        RequestedDirection("refusal", None, 1.0),
        RequestedDirection("verbosity", None, -0.5),
    )
    assert parse({"direction": "refusal", "strength": 0.7, "mode": "one_sided"}) == parse("refusal:one_sided=0.7")
    assert parse({"direction": "refusal", "strength": 1}) == parse("refusal=1")
    shifted = RequestedDirection("refusal", "one_sided", 0.7, None, "answer", shift=0.25)
    assert parse("refusal:one_sided^0.25@answer=0.7") == (shifted,)
    assert parse({"direction": "refusal", "shift": -1}) == parse("refusal^-1") == parse("refusal^-1.0")
    assert (
        parse("refusal^0") == parse("refusal^-0.0") == parse({"direction": "refusal", "shift": 0}) == parse("refusal")
    )
    assert parse("refusal:one_sided@answer=0.7") == (RequestedDirection("refusal", "one_sided", 0.7, None, "answer"),)
    assert parse("refusal@10-20@answer=0.7") == parse("refusal@answer@10-20=0.7")
    assert (
        parse({"direction": "refusal", "layers": 7})
        == parse("refusal@7")
        == parse("refusal@7-7")
        == parse("refusal@07")
    )
    assert parse({"direction": "refusal", "tokens": "last-3"}) == parse("refusal@last-3")
    assert parse("refusal@all") == parse("refusal"), "which is the default"
    harm = Condition("harm", 12, above=0.3)
    assert parse("refusal?harm@12>0.3") == (RequestedDirection("refusal", None, None, None, "answer", harm),)
    assert parse("refusal:one_sided@13-20?harm@12<0.3=0.7") == (
        RequestedDirection("refusal", "one_sided", 0.7, "13-20", "answer", Condition("harm", 12, below=0.3)),
    )
    whole = {"direction": "refusal", "if": {"direction": "harm", "layer": 12, "above": 0.3}}
    assert parse(whole) == parse({"direction": "refusal", "if": "harm@12>0.3"}) == parse("refusal?harm@12>0.3")
    assert parse("refusal@answer?harm@12>0.3") == parse("refusal?harm@12>0.3")
    each = replace(harm, each=True)
    assert parse("refusal?each:harm@12>0.3") == (RequestedDirection("refusal", condition=each),)
    assert parse("refusal@not-first? each : harm@12>0.3") == (
        RequestedDirection("refusal", tokens="not-first", condition=each),
    )
    assert parse("refusal?each@12>0.3")[0].condition == replace(harm, direction="each")
    whole["if"] = {"direction": "harm", "layer": 12, "above": 0.3, "each": False}
    assert parse(whole) == parse("refusal?harm@12>0.3")


@pytest.mark.parametrize(
    ("condition", "says"),
    [
        ("", "steer.if: '' is not a condition; accepted: a direction, a layer and a number like 'harm@12>0.3'"),
        ("harm>0.3", "is not a condition"),
        ("harm@12", "is not a condition"),
        ("harm@12>0.3<1", "is not a condition"),
        ("harm@1-2>0", "is not a condition"),
        ("@12>0.3", "steer.if.direction: direction name '' is not acceptable"),
        ("harm@12>", "steer.if.above: '' is not accepted: a number"),
        ("harm@12<nan", "steer.if.below: nan is not accepted"),
        ("harm@12>1e31", "steer.if.above: 1e+31 is not accepted"),
        (3, "steer.if: 3 is not a condition"),
        ({"direction": "harm", "layer": True, "above": 1}, "steer.if.layer: true is not accepted"),
        ({"direction": "harm", "layer": 1}, "steer.if: it says neither side; accepted: 'above' or 'below'"),
        ({"direction": "harm", "layer": 1, "above": 0, "below": 1}, "steer.if: it says above and below"),
        ({"direction": "harm", "layer": 1, "above": "1"}, "steer.if.above: '1' is not accepted"),
        ({"direction": "harm", "layer": 1, "above": 1, "digest": "x"}, "steer.if.digest: 'x' is not accepted"),
        ({"direction": "harm", "layer": 1, "above": 1, "each": 1}, "steer.if.each: 1 is not accepted: true or false"),
        ("one:harm@12>0.3", "steer.if.direction: direction name 'one:harm' is not acceptable"),
    ],
)
def test_conditions_that_are_none_are_refused_in_words(condition: Any, says: str) -> None:
    (problem,) = problems_of({"direction": "refusal", "if": condition})
    assert says in problem
    if isinstance(condition, str):
        assert problems_of(f"refusal?{condition}") == (problem,)


@pytest.mark.parametrize("tokens", ["all", "prompt", "not-first", "first-1", "last-1"])
def test_a_condition_is_for_the_tokens_of_the_answer(tokens: str) -> None:
    (problem,) = problems_of(f"refusal@{tokens}?harm@12>0.3")
    assert problem.startswith(f"steer.tokens: '{tokens}' is not accepted under a condition")
    assert parse(f"refusal@{tokens}?each:harm@12>0.3")


@pytest.mark.parametrize("tokens", PHASES)
def test_a_condition_is_for_no_phase(tokens: str) -> None:
    for condition in ("harm@12>0.3", "each:harm@12>0.3"):
        (problem,) = problems_of(f"refusal@{tokens}?{condition}")
        assert problem.startswith(f"steer.tokens: '{tokens}' is not accepted under a condition")


@pytest.mark.parametrize(
    "tokens", ["", "first", "first-0", "last-", "first-01", "last--1", "first-9999999999", "x", 1, []]
)
def test_tokens_that_are_none_are_refused_with_what_is_accepted(tokens: Any) -> None:
    (problem,) = problems_of({"direction": "refusal", "tokens": tokens})
    assert problem.startswith("steer.tokens: ")
    assert all(word in problem for word in TOKENS)
    if isinstance(tokens, str):
        assert problems_of(f"refusal@{tokens}") == (problem,)


@pytest.mark.parametrize("layers", ["3-2", "1-", "-1", "1-2-3", "12345", "٣", "x", 1.0, True, [1, 2], 99999, -1])
def test_layers_that_are_none_are_refused_with_what_is_accepted(layers: Any) -> None:
    (problem,) = problems_of({"direction": "refusal", "layers": layers})
    assert problem.startswith("steer.layers: ")
    assert "like '10-20'" in problem
    assert problems_of("refusal@1@2") == ("steer: '1@2': layers are given twice",)
    assert problems_of("refusal@answer@prompt") == ("steer: 'answer@prompt': tokens are given twice",)


@given(st.integers(1, 40), st.integers(0, 60), PLACES)
@law
def test_the_span_is_what_the_words_say(prompt: int, position: int, tokens: str | None) -> None:
    start, stop = (entry := Entry("a", "a", "ablate", 1.0, None, tokens)).span(prompt)
    assert (start <= position < stop) == bool(acting(Spec((entry,)), prompt, position))


@pytest.mark.parametrize(
    "off", [None, False, "off", "OFF", " Off ", "none", "null", "false", [], (), "[]", "[ ]", ["off"]], ids=repr
)
def test_off_is_an_empty_wish(off: Any) -> None:
    assert parse(off) == ()


@pytest.mark.parametrize(
    "value", ["off,refusal", "refusal,off", ["off", "refusal"], ["refusal", "none"], '["off","a"]']
)
def test_off_beside_a_direction_is_a_contradiction_in_every_form(value: Any) -> None:
    assert problems_of(value)


@given(STRENGTHS)
@example(-0.0)
@law
def test_a_strength_is_a_plain_float(strength: float) -> None:
    for value in ({"direction": "a", "strength": strength}, f"a={strength!r}"):
        (item,) = parse(value)
        assert item.strength == strength
        assert math.copysign(1, item.strength) == 1 or item.strength < 0, "no negative zero: it has another text"


BAD_STRENGTHS: list[Any] = [
    math.nan,
    math.inf,
    -math.inf,
    math.nextafter(MAX_STRENGTH, math.inf),
    -MAX_STRENGTH - 1,
    1e300,
    11,
    10**400,
    -(10**400),
    True,
    False,
    "1",
    "",
    [],
    [1],
    {},
]


@pytest.mark.parametrize("strength", BAD_STRENGTHS, ids=lambda s: repr(s)[:12])
def test_a_strength_that_is_no_number_in_range_is_refused_by_field(strength: Any) -> None:
    (problem,) = problems_of({"direction": "refusal", "strength": strength})
    assert problem.startswith("steer.strength: ")
    assert "a number from -10 to 10" in problem


@pytest.mark.parametrize(
    "number",
    ["", "x", "nan", "inf", "-inf", "Infinity", "11", "-10.5", "1e9", "1=2", "0x1", "1 2", "1_0", "٣", "9" * 5000],
)
def test_a_text_that_is_no_number_in_range_is_refused_by_field(number: str) -> None:
    (problem,) = problems_of(f"refusal={number}")
    assert problem.startswith("steer.strength: ")
    assert "a number from -10 to 10" in problem


@pytest.mark.parametrize("number", ["", "x", "nan", "inf", "2.01", "-2.01", "1_0", "1^1", "0.5:one_sided"])
def test_a_shift_that_is_no_number_in_range_is_refused_by_field(number: str) -> None:
    (problem,) = problems_of(f"refusal:one_sided^{number}=0.7")
    assert problem.startswith("steer.shift: ")
    assert "a number from -2 to 2" in problem
    given: Any
    for given in (math.nan, 2.01, "0.25", True, []):
        (problem,) = problems_of({"direction": "refusal", "shift": given})
        assert problem.startswith("steer.shift: ")


def test_a_number_too_long_to_read_is_refused_too() -> None:
    assert problems_of('{"direction": "refusal", "strength": ' + "9" * 5000 + "}")


@pytest.mark.parametrize("mode", ["", "remove", "Ablate", "ablate ", 1, True, ["ablate"], {"ablate": 1}, b"ablate"])
def test_a_mode_that_is_none_of_the_modes_is_refused_by_field(mode: Any) -> None:
    (problem,) = problems_of({"direction": "refusal", "mode": mode})
    assert problem.startswith("steer.mode: ")
    for accepted in get_args(Mode):
        assert accepted in problem


@pytest.mark.parametrize("value", ["refusal:", "refusal:=1", "refusal:remove", "refusal:ablate:add", ":ablate"])
def test_a_text_with_no_such_mode_or_no_name_is_refused(value: str) -> None:
    assert problems_of(value)


@pytest.mark.parametrize("name", ["", "a b", "../x", "a/b", "a" * 65, "off", "true", "é", "a\n", "-x"])
def test_a_name_that_cannot_be_one_is_refused_in_every_form(name: str) -> None:
    for value in ({"direction": name}, [{"direction": name}], f"x,{name}/=1"):
        assert any("is not acceptable: 1 to 64 of a to z" in problem for problem in problems_of(value))


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("a;b", "; several are separated by commas"),
        ("a + b=0.5", "; several are separated by commas"),
        ("a:0.5", "; a strength stands after '=', as a=0.5"),
        ({"a": 0.5}, "missing; it names the direction, like {'direction': 'refusal'}"),
    ],
)
def test_what_is_nearly_the_language_is_told_how_it_is_said(value: Any, says: str) -> None:
    assert problems_of(value)[-1].endswith(says)


@pytest.mark.parametrize("value", [None, 1, True, [], {}, ["refusal"]])
def test_a_name_that_is_no_text_is_refused_by_field(value: Any) -> None:
    (problem,) = problems_of({"direction": value})
    assert problem.startswith("steer.direction: ")


@pytest.mark.parametrize(
    "value", ["", "  ", ",", "refusal,", ",refusal", "refusal,,other", "=1", "[", "{", "[1", "{'a'}"]
)
def test_an_unfinished_text_is_refused(value: str) -> None:
    assert problems_of(value)


@pytest.mark.parametrize("value", [True, 0, 1, 0.5, -1, b"refusal", object])
def test_a_value_of_another_kind_is_told_what_is_accepted(value: Any) -> None:
    (problem,) = problems_of(value)
    assert problem.startswith("steer: ")
    assert "accepted: a text like 'refusal'" in problem


@pytest.mark.parametrize("item", [None, True, False, 0, 1.5, [], ["refusal"], [[]]])
def test_an_item_of_another_kind_is_named_by_its_place(item: Any) -> None:
    (problem,) = problems_of(["refusal", item])
    assert problem.startswith("steer[1]: ")
    assert "accepted: " in problem


@pytest.mark.parametrize("field", ["name", "lambda", "Strength", "", "direction "])
def test_an_unknown_field_is_named_with_the_known_ones(field: str) -> None:
    (problem,) = problems_of({"direction": "refusal", field: 1})
    assert problem.startswith(f"steer.{field}: unknown field")
    assert "direction, mode, strength" in problem


def test_a_missing_direction_is_named() -> None:
    for value in ({}, {"strength": 1}, "{}"):
        assert any(problem.startswith("steer.direction: missing") for problem in problems_of(value))


@given(WANTED, WISHES)
@law
def test_one_direction_twice_in_one_mode_is_refused(
    item: RequestedDirection, others: tuple[RequestedDirection, ...]
) -> None:
    again = RequestedDirection(item.direction, item.mode, 0.25)
    for value in (text([item, again]), [as_object(item, nulls=False), as_object(again, nulls=False)]):
        assert any(f"'{item.direction}' is named twice" in problem for problem in problems_of(value))


def test_one_direction_in_two_modes_is_no_repetition() -> None:
    assert len(parse("a:ablate,a:add=0.5,a:one_sided")) == 3


def test_a_wish_has_so_many_directions_and_no_more() -> None:
    names = [f"d{i}" for i in range(MAX_ITEMS + 1)]
    assert len(parse(names[:-1])) == len(parse(",".join(names[:-1]))) == MAX_ITEMS
    for value in (names, ",".join(names)):
        (problem,) = problems_of(value)
        assert f"{MAX_ITEMS + 1} directions, at most {MAX_ITEMS}" in problem


def test_all_problems_are_reported_together_by_place() -> None:
    bad = {"direction": "a b", "mode": "remove", "strength": 99, "colour": 1}
    said = problems_of(["fine", bad, 7, {"strength": "x"}], param="body")
    for place in (
        "body[1]: ",
        "body[1].mode: ",
        "body[1].strength: ",
        "body[1].colour: ",
        "body[2]: ",
        "body[3].direction: ",
    ):
        assert sum(problem.startswith(place) for problem in said) == 1


@pytest.mark.parametrize("param", ["steer", "X-Steer", "vllm_xargs.steer"])
def test_the_carrier_is_named_in_every_problem(param: str) -> None:
    with pytest.raises(SpecError) as caught:
        parse([{"direction": "a", "strength": 99}, 1], param)
    assert caught.value.param == param
    assert all(problem.startswith(param) for problem in caught.value.problems)


ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([10**400, -(10**4000)])
    | st.floats()
    | st.text(st.characters(), max_size=12)
    | st.sampled_from(
        ["refusal", "off", "a=1", "a:add", "[", "{", '{"direction":"a"}', "\ud800", "a=\ud800", "[\ud800"]
    )
    | NAMES
    | st.sampled_from(MODES),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["direction", "mode", "strength"]) | st.text(st.characters(), max_size=4), inner, max_size=4
        )
    ),
    max_leaves=8,
)


def wish_or_refusal(value: Any) -> None:
    try:
        wishes = parse(value)
    except SpecError as error:
        assert error.problems
        assert str(error).encode(), "a message that can be sent"
        return
    assert isinstance(wishes, tuple)
    assert parse(text(wishes)) == wishes


@given(ANYTHING)
@example({"\ud800": 1})
@example({"direction": "a", "strength": 10**400})
@example(10**4000)
@settings(deadline=None, max_examples=400)
def test_any_value_gives_a_wish_or_a_refusal(value: Any) -> None:
    wish_or_refusal(value)


@given(ANYTHING)
@settings(deadline=None, max_examples=200)
def test_any_value_as_json_text_gives_a_wish_or_a_refusal(value: Any) -> None:
    written = json.dumps(value)
    wish_or_refusal(written)
    wish_or_refusal([written])


@given(st.text(st.characters(), max_size=30) | st.text(alphabet='ab0.1,:=-+e[]{}" \n', max_size=20))
@example("[" * 100_000)
@example('{"a":' * 100_000)
@settings(deadline=None, max_examples=400)
def test_any_text_gives_a_wish_or_a_refusal(value: str) -> None:
    wish_or_refusal(value)


DIGESTS = st.text(alphabet="0123456789abcdef", min_size=64, max_size=64)
RESOLVED = st.none() | st.builds(lambda condition, digest: replace(condition, digest=digest), CONDITIONS, DIGESTS)
ENTRIES = st.lists(
    st.builds(Entry, NAMES, DIGESTS, st.sampled_from(MODES), STRENGTHS, LAYERS, PLACES, RESOLVED, SHIFTS, KEPT),
    max_size=4,
).map(tuple)


@given(ENTRIES)
@law
def test_a_receipt_is_compact_ascii_json_of_exactly_what_is_applied(entries: tuple[Entry, ...]) -> None:
    receipt = Spec(entries).receipt()
    assert receipt.isascii()
    assert receipt.isprintable()
    assert " " not in receipt
    read = json.loads(receipt)
    always = ["direction", "digest", "mode", "strength"]
    more = [
        [name for name in ("layers", "tokens") if getattr(e, name) is not None]
        + ["if"] * bool(e.condition)
        + ["shift"] * bool(e.shift)
        + ["norm_preserving"] * bool(e.norm_preserving)
        for e in entries
    ]
    assert [list(entry) for entry in read] == [always + each for each in more]
    assert Spec.of(receipt).entries == entries
    assert (receipt == "[]") == (not Spec(entries))


@given(ENTRIES, ENTRIES)
@law
def test_the_key_is_all_that_decides_the_computation_and_nothing_else(
    x: tuple[Entry, ...], y: tuple[Entry, ...]
) -> None:
    def computed(entries: tuple[Entry, ...], prompt: int) -> list[tuple[object, ...]]:
        conditions = [e.condition and replace(e.condition, direction="") for e in entries]
        return [
            (e.digest, e.mode, e.strength, e.layers, e.span(prompt), condition, e.shift, e.norm_preserving)
            for e, condition in zip(entries, conditions, strict=True)
        ]

    for prompts in ((30, 30), (30, 31)):
        keys, same = (
            [of(each, prompt) for each, prompt in zip((x, y), prompts, strict=True)]
            for of in (lambda each, prompt: Spec(each).key(prompt), computed)
        )
        assert (keys[0] == keys[1]) == (same[0] == same[1])
    renamed = tuple(
        replace(e, direction=f"n{i}", condition=e.condition and replace(e.condition, direction="other"))
        for i, e in enumerate(x)
    )
    assert Spec(renamed).key(30) == Spec(x).key(30)


@given(ENTRIES)
@law
def test_every_entry_and_the_order_of_entries_change_the_key(entries: tuple[Entry, ...]) -> None:
    key = Spec(entries).key(30)
    for i, e in enumerate(entries):
        assert Spec(entries[:i] + entries[i + 1 :]).key(30) != key
        others: dict[str, Any] = {
            "digest": "none of them",
            "mode": "ablate" if e.mode != "ablate" else "add",
            "strength": math.nextafter(e.strength, 99.0),
            "tokens": "last-4",
            "layers": "5",
            "shift": 1.9 if e.shift != 1.9 else None,
            "norm_preserving": None if e.norm_preserving else True,
            "condition": Condition("c", 12, above=0.0, digest="none of them"),
        }
        # a name says nothing of what is computed; every other field does, also one that is new
        assert others.keys() | {"direction"} == {field.name for field in fields(Entry)}
        for name, value in others.items():
            other = replace(e, **{name: value})
            assert Spec((*entries[:i], other, *entries[i + 1 :])).key(30) != key
    computed = [
        (e.digest, e.mode, e.strength, e.layers, e.tokens, e.condition, e.shift, e.norm_preserving) for e in entries
    ]
    assert (Spec(entries[::-1]).key(30) == key) == (computed[::-1] == computed)


def test_whether_each_token_decides_is_in_the_receipt_and_the_key() -> None:
    once = Entry("refusal", "d", "ablate", 0.5, "13-20", "answer", Condition("harm", 12, above=0.3, digest="h"))
    assert once.condition is not None
    each = replace(once, condition=replace(once.condition, each=True))
    spec, renamed = Spec((each,)), replace(each, condition=replace(once.condition, each=True, direction="other"))
    assert '"if":{"direction":"harm","layer":12,"above":0.3,"digest":"h","each":true}' in spec.receipt()
    assert Spec.of(spec.receipt()) == spec
    assert Spec((renamed,)).key(9) == spec.key(9) != Spec((once,)).key(9)


@pytest.mark.parametrize("phase", PHASES)
def test_a_phase_has_one_form(phase: str) -> None:
    wanted = parse(f"refusal@1-2@{phase}=0.5")
    assert wanted == parse({"direction": "refusal", "strength": 0.5, "layers": "1-2", "tokens": phase})
    assert text(wanted) == f"refusal@1-2@{phase}=0.5"
    spec = Spec((Entry("refusal", "d", "ablate", 0.5, "1-2", phase),))
    assert Spec.of(spec.receipt()) == spec
    assert (spec.phased, spec.everywhere) == (phase, False)
    others = [replace(spec.entries[0], tokens=other) for other in (*({*PHASES} - {phase}), "answer", None)]
    assert spec.key(9) not in {Spec((other,)).key(9) for other in others}
    assert problems_of(f"refusal@{phase}?harm@0>1")[0].startswith(f"steer.tokens: '{phase}' is not accepted under")


def test_the_page_says_of_tokens_what_the_code_says() -> None:
    page = (Path(__file__).parents[1] / "docs" / "requests.md").read_text()
    for name, sentence in TOKENS.items():
        assert f"| `{name}` | {sentence} |" in page


@pytest.mark.parametrize(
    "spec",
    [
        *("d=1?h@3>0", "d^0.25:one_sided", "d@answer^0.2", "d=1^0.5", "d=0.5@answer", "d=1:norm", "d^0.25:norm"),
        *("d@3-5:norm", "d@3:ablate=1", "d?h@3>3:norm", "d?h@3>3@answer"),
    ],
)
def test_a_part_in_another_place_is_told_the_order(spec: str) -> None:
    (problem,) = problems_of(spec)
    assert problem.endswith("; the order is name:mode:norm^shift@where?condition=strength")


def test_the_norm_is_kept_by_a_field_or_after_the_mode() -> None:
    kept = RequestedDirection("refusal", "ablate", 0.7, norm_preserving=True)
    assert parse("refusal:ablate:norm=0.7") == parse(" refusal : ablate : norm = 0.7") == (kept,)
    assert parse({"direction": "refusal", "mode": "ablate", "strength": 0.7, "norm_preserving": True}) == (kept,)
    assert parse({"direction": "refusal", "norm_preserving": False}) == parse("refusal")
    assert text(parse("refusal:norm@7")) == "refusal:norm@7"
    (problem,) = problems_of({"direction": "refusal", "norm_preserving": 1})
    assert problem == "steer.norm_preserving: 1 is not accepted: true or false"
    assert parse("norm") == parse({"direction": "norm"})
    assert parse("norm:norm") == parse({"direction": "norm", "norm_preserving": True})
    assert parse("norm:ablate:norm=0.5") == parse(
        {"direction": "norm", "mode": "ablate", "norm_preserving": True, "strength": 0.5}
    )
    (problem,) = problems_of("refusal:norms")
    assert problem.startswith("steer.mode: 'norms' is not a mode; accepted: ablate")
    (problem,) = problems_of("refusal:norm:ablate")
    assert problem.endswith("; the order is name:mode:norm^shift@where?condition=strength")


def test_a_text_of_json_says_a_key_once_and_an_empty_one_says_nothing() -> None:
    for twice in ('{"direction":"d","strength":0,"strength":1}', '[{"direction":"d","if":{"layer":1,"layer":2}}]'):
        (problem,) = problems_of(twice)
        assert "stands twice" in problem
    assert problems_of(" ") == problems_of("")
    assert "is empty" in problems_of("")[0]


@pytest.mark.parametrize("name", ["vllm_xargs.steer", "\uff53teer", "X-\uff33teer", "a.b.steering"])
def test_what_looks_like_the_field_is_nearly_it(name: str) -> None:
    assert nearly(name)


def test_names_of_any_letters_cost_as_little_as_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """A body may have thousands of the longest, and each is read before anybody is asked. One letter may be as many as
    eighteen."""
    assert bare("ｓＴｅｅｒ") == bare("s\u0308teer") == "steer"
    read: list[str] = []

    def normalize(_form: str, text: str) -> str:
        read.append(text)
        return text * 18

    monkeypatch.setattr(unicodedata, "normalize", normalize)
    assert len(bare("".join(map(chr, range(0x4E00, 0x9000))))) == 64
    assert 0 < len(read) <= 5
    assert max(map(len, read)) == 1
