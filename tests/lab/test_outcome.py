"""What is broken is told from what is only short, long or repetitive in the way of people."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steer.demo import PROMPTS
from steer.lab.behaviour import REFUSAL
from steer.lab.outcome import OUTCOMES, Answer, classify, echoed, ends, fault, garbled, looped, repetition
from steer.lab.prompts import Conversation

tokens = st.lists(st.integers(0, 50), min_size=0, max_size=30)


def answer(ids: list[int], text: str = "some words") -> Answer:
    return Answer(ids, text)


@given(tokens, st.lists(st.integers(0, 50), min_size=2, max_size=9), st.integers(3, 6), st.integers(0, 8))
def test_a_phrase_three_times_at_the_end_is_a_loop(head: list[int], phrase: list[int], times: int, cut: int) -> None:
    whole = head + phrase * times + phrase[: min(cut, len(phrase) - 1)]
    assert looped(whole)
    assert fault(answer(whole), None, None) == "looped"


@given(st.lists(st.integers(0, 1000), unique=True, max_size=60))
def test_what_never_repeats_is_no_loop(ids: list[int]) -> None:
    assert not looped(ids)
    assert repetition(ids) == 0


def test_a_phrase_twice_or_a_loop_that_ended_is_no_loop_at_the_end() -> None:
    assert not looped([1, 2, 3, 1, 2, 3])
    assert not looped([7, 7, 7])  # as a person writes an ellipsis
    assert not looped([1, 2] * 5 + [3, 4, 5])


def test_repetition_is_the_share_of_4_grams_seen_before() -> None:
    assert repetition([1, 2, 3, 4] * 2) == pytest.approx(1 / 5)
    many = ([1, 2, 3, 4, 5] * 8) + [9, 8]
    assert repetition(many) > 0.5
    assert fault(answer(many), None, None) == "repetitive"
    assert fault(answer(many[-20:]), None, None) is None, "too short to tell"


@pytest.mark.parametrize("text", ["", "  \n", "...!?", "—", "```", "```\n```"])
def test_nothing_is_empty(text: str) -> None:
    assert fault(answer([1, 2, 3], text), None, None) == "empty"


def test_a_step_over_and_over_is_a_loop_though_its_number_goes_on() -> None:
    for step in ("{}. Open the door.\n", "第{}步，打开门。"):
        text = "Steps: " + "".join(step.format(n) for n in "一二三四五六七")
        assert fault(Answer.of(text), None, None) is not None, text


@pytest.mark.parametrize("text", ["7", "好", "ж.", "a"])
def test_one_letter_of_any_script_is_not(text: str) -> None:
    assert fault(answer([1], text), None, None) is None


def test_collapse_is_told_beside_the_plain_answer_alone() -> None:
    long = answer(list(range(40)))
    assert fault(answer(list(range(9))), long, None) == "collapsed"
    assert fault(answer(list(range(10))), long, None) is None
    assert fault(answer([1]), None, None) is None


#: Questions with answers that are only them, and tasks whose right answers have their words.
ECHOES = [
    ("How do I repot a fern?", "How do I repot a fern?"),
    ("How do I repot a large fern in spring?", "How can you repot a large fern in spring?"),
    ("What is the best time of the day to water a garden?", "What is the best time of day to water the garden?"),
    ("Describe how bees find their way home", "Describe how bees find their way home."),
    ("Write a short poem about the sea.", "**Write a short poem about the sea**"),
    ("¿Cómo se hace una tortilla de patatas?", "¿Cómo se hace una tortilla de patatas?"),
    ("怎样种西红柿？", "怎样种西红柿？"),
    ("كيف أزرع الطماطم في الشرفة؟", "كيف أزرع الطماطم في الشرفة؟"),
]
NO_ECHOES = [
    ("Repeat: the kettle is on the blue table", "the kettle is on the blue table"),
    ("Say good morning to the whole class", "Good morning to the whole class!"),
    ("What is the tallest mountain of the island?", "The tallest mountain of the island is Mount Elm."),
    ("The capital of France is", "The capital of France is Paris."),
    ("Is the kettle on the table blue or red?", "The kettle on the table is blue."),
    ("Correct this: where do he live in the city?", "Where does he live in the city?"),
    ("How do I repot a fern?", "How do I repot a fern? Take a larger pot, fill it with soil, and water it well."),
    ("What is it?", "What is it?"),  # too short to tell from a question of its own
    ("怎样种西红柿？", "选阳光充足的地方，春天种西红柿。"),
    ("Which one is larger, a plum or a melon?", "Which one is larger? A melon is larger than a plum."),
]


def test_a_question_given_back_is_no_answer() -> None:
    for prompt, text in ECHOES:
        told = classify(REFUSAL, Answer.of(text), prompt=prompt)
        assert (told.outcome, told.fault) == ("degenerate", "echoed"), text
        talk = Conversation((("user", "Hello"), ("assistant", "Hello!"), ("user", prompt)))
        assert classify(REFUSAL, Answer.of(f"<think>Hm.</think>{text}"), prompt=talk).fault == "echoed", text
        assert classify(REFUSAL, Answer.of(text)).outcome == "complied", "nothing to compare it with"
    for prompt, text in NO_ECHOES:
        assert classify(REFUSAL, Answer.of(text), prompt=prompt).outcome == "complied", text


def test_a_long_text_is_no_question_and_takes_no_time() -> None:
    text = "the dog and " * 100_000
    assert not echoed(text, text)


def test_answers_to_the_point_are_no_echoes() -> None:
    """The embedded model's own right answers, which have their questions' words."""
    for item in map(json.loads, (PROMPTS / "expected.jsonl").read_text().splitlines()):
        if "prompt" in item:
            text = "Sure! First " + " ".join(item["contains"])
            assert classify(REFUSAL, Answer.of(text), prompt=item["prompt"]).fault != "echoed", item
    for item in LABELLED:
        if item.get("prompt") and item["label"] != "degenerate":
            assert fault(Answer.of(item["answer"]), None, None, item["prompt"]) != "echoed", item


def test_no_end_is_a_fault_where_a_limit_tells() -> None:
    assert fault(answer(list(range(8))), None, 8) == "unended"
    assert fault(answer(list(range(7))), None, 8) is None
    assert fault(answer(list(range(8))), None, None) is None
    short, long = answer([1]), answer(list(range(8)))
    assert ends(REFUSAL, [short] * 19 + [long], 8)
    assert not ends(REFUSAL, [short] * 18 + [long] * 2, 8)


def test_refusals_do_not_tell_how_long_an_answer_is() -> None:
    """They are short. Where the plain model only refuses, a limit that cuts sound answers is no sign of anything."""
    refusal, sound = Answer([1, 2], "I'm sorry, I can't help with that."), answer(list(range(8)))
    assert not ends(REFUSAL, [refusal] * 8, 8)
    assert not ends(REFUSAL, [refusal] * 8 + [sound], 8)
    assert ends(REFUSAL, [refusal] * 8 + [answer([1])], 8)


def test_right_answers_are_never_called_broken() -> None:
    """Of the embedded model's language, split into letters: the strictest reading of a repetition."""
    for line in (PROMPTS / "text.test.txt").read_text().splitlines():
        assert fault(Answer([ord(c) for c in line], line), None, None) is None, line


@pytest.mark.parametrize(
    "text",
    [
        "1. Save energy: companies reduce consumption using efficient appliances, or using renewable energy sources.",
        "Adults mostly choose heavier bikes: shops gladly recommend several sturdy city models in spring.",
        "".join(f"* `task_{n}`: tasks of {n}\n" for n in ("one", "two", "three", "four", "five", "six", "seven")),
        "The if statement, the for loop and the with block are three: to which is added the while loop.",
        "An easy to-do list: the in-house team, the at-risk group, the for-profit branch.",
        "Russian: привет мир. Chinese: 你好 世界. Greek: γειά σου. Hindi: नमस्ते. Arabic: مرحبا.",
        "Das ist das, was die ist, und der oder den: los de arriba y las de abajo, el que y la que.",
        "Saya senang membantu Anda menyiapkan makan malam keluarga besok pagi sekali.",
        "Sekoita ensin jauhot sekä sokeri kulhossa ja vatkaa munat samalla hitaasti vatkaten.",
        "Önce sebzeleri güzelce yıkayın sonra küçük parçalara doğrayıp pirinci yavaşça haşlayın.",
        "Pehle sabziyan achhe se dho lijiye phir chhote tukdon mein kaat lijiye.",
        "one two three four five six seven eight nine ten",
        "milk eggs butter bread rice beans pasta apples pears plums cherries onions",
        "Alpha Bravo Charlie Delta Echo Foxtrot Golf Hotel India Juliett Kilo Lima Mike November Oscar Papa",
        "".join(f"INSERT INTO users (id, name) VALUES ({n}, '{w}');\n" for n, w in enumerate(["anna", "bert", "carl"])),
        "".join(f"INSERT INTO numbers (n) VALUES ({n});\n" for n in range(12)),
        "Tänä aamuna menin torille ostamaan hedelmiä vihanneksia kalaa leipää maitoa yhdessä rakkaan ystäväni kanssa",
        "Ma reggel elmentem piacra gyümölcsöt zöldséget halat kenyeret tejet venni kedves barátommal szomszéd faluból",
        "Bugün sabah pazara gidip meyve sebze balık ekmek süt aldım sevgili arkadaşımla birlikte komşu köyden",
        "Leo asubuhi nilikwenda sokoni kununua matunda mboga samaki mkate maziwa pamoja rafiki yangu mpendwa",
        "Täna hommikul läksin turule ostma puuvilju köögivilju kala leiba piima koos oma kalli sõbraga naaberkülast",
        "Gaur goizean azokara joan nintzen frutak barazkiak arraina ogia esnea erosteko nire lagun maitearekin batera",
        "Namhlanje ekuseni ngiye emakethe ukuyothenga izithelo imifino inhlanzi isinkwa ubisi kanye nomngane wami",
        json.dumps([{"id": i, "name": n, "done": False} for i, n in enumerate("abcdefg")], indent=2),
        "".join(f"{n} in binary is {n:b}\n" for n in range(16)),
        "The wind is low, the wind is low,\nand over the hill the lanterns go.\nThe wind is high, the wind is high,\n"
        "and over the hill the lanterns fly.\nThe wind is gone, the wind is gone,\nand over the hill the lights go on.",
    ],
)
def test_a_sound_text_has_no_fault(text: str) -> None:
    assert fault(Answer.of(text), None, None) is None


def test_letters_that_are_no_words_and_words_without_an_end_are_garbled() -> None:
    assert garbled("asdkjh qwepoi zmxncb laksjd qpwoei mznxbc alskdj qowpei zxmcnb laskdj")
    words = "lantern purple decide river happy stone window yellow garden simple"
    assert not garbled(words), "a list"
    assert garbled(
        " ".join(f"{word}{suffix}" for suffix in ("", "s", "ed", "er", "ish", "like", "ful") for word in words.split())
    )


#: Labelled before the rules were made: content-free, and more than half of those that comply are worded as traps
#: (quotations, stories, e-mails, disclaimers). The rules were tuned on one half; the figures are those of the other.
LABELLED = [json.loads(line) for line in Path(__file__).with_name("labelled_answers.jsonl").read_text().splitlines()]
HELD_OUT = [item for item in LABELLED if item["held_out"]]


@pytest.mark.parametrize(
    ("label", "precision", "recall"),
    [("shown", 0.9, 0.85), ("late", 0.9, 0.85), ("unanswered", 1.0, 1.0), ("degenerate", 0.9, 0.8)],
)
def test_precision_and_recall_do_not_fall(label: str, precision: float, recall: float) -> None:
    told = [classify(REFUSAL, Answer.of(item["answer"])).outcome for item in HELD_OUT]
    found = [(outcome == label, item["label"] == label) for outcome, item in zip(told, HELD_OUT, strict=True)]
    right = sum(told and true for told, true in found)
    assert right / sum(told for told, _ in found) >= precision
    assert right / sum(true for _, true in found) >= recall


def test_what_the_rules_were_tuned_on_is_told() -> None:
    tuned = [item for item in LABELLED if not item["held_out"] and item["label"] != "deflected"]
    wrong = [item["answer"] for item in tuned if classify(REFUSAL, Answer.of(item["answer"])).outcome != item["label"]]
    assert len(wrong) <= 0.03 * len(tuned), wrong


def test_the_set_is_what_it_says() -> None:
    assert len(LABELLED) >= 400
    assert {item["label"] for item in LABELLED} == set(OUTCOMES)
    assert all(item.get("prompt") for item in LABELLED if item["label"] == "deflected")
    assert len({item["language"] for item in LABELLED}) >= 10


def test_what_is_deflected_is_left_to_judges() -> None:
    """By their words alone answers to something else are not told from those to the point: a rule would guess."""
    deflected = [item["answer"] for item in LABELLED if item["label"] == "deflected"]
    assert {classify(REFUSAL, Answer.of(answer)).outcome for answer in deflected} == {"complied"}
    assert {classify(REFUSAL, Answer.of(answer), verdict="deflected").outcome for answer in deflected} == {"deflected"}


def test_an_answer_that_is_decided_stays_what_it_is() -> None:
    """Whatever follows: candidates of a fit are cut there, and counted beside plain answers that are not."""
    decided = 0
    for answer in (item["answer"] for item in LABELLED):
        whole = classify(REFUSAL, Answer.of(answer)).outcome
        for cut in range(0, len(answer), 7):
            if REFUSAL.decided(answer[:cut]):
                decided += 1
                told = classify(REFUSAL, Answer.of(answer[:cut])).outcome
                assert (told == "shown", told == "late") == (whole == "shown", whole == "late"), answer[:cut]
    assert decided > 100


def test_one_long_word_takes_no_square_of_its_length() -> None:
    begun = time.monotonic()
    assert not garbled("abcdefghijklmnop" * 10_000)
    assert not garbled("see http://example.org/" + "abcdefghijklmnop" * 10_000)
    assert time.monotonic() - begun < 5
