"""Streamed text is the text: no character is broken, none is lost, and nothing behind a stop string gets out."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
import transformers as tf
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers import models as token_models

from steer.serve.text import Stops, TextStream, token_text
from tests import models

law = settings(deadline=None, max_examples=100)
CORPUS = [
    "the quick brown fox jumps over the lazy dog",
    "grüße aus köln, über straßen",
    "你好，世界",
    "🙂🙃👍🏽 emoji 👩‍👩‍👧",
]


@cache
def byte_level() -> Any:
    """A tiny byte-level BPE: any text has tokens, and many characters have several."""
    raw = Tokenizer(token_models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, special_tokens=["<eos>"], show_progress=False),
    )
    return tf.PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<eos>", clean_up_tokenization_spaces=False)


@cache
def word_level() -> Any:
    """A tokenizer with a mark for the space before a word. Decoding drops the first space, so neighbours matter."""
    words = ["<unk>", "<s>", *[f"▁{word}" for word in ("the", "quick", "brown", "fox")], "es", "▁", "."]
    raw = Tokenizer(token_models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    raw.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    raw.add_special_tokens([AddedToken("<s>", special=True)])
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=raw, unk_token="<unk>", bos_token="<s>", clean_up_tokenization_spaces=False
    )


class Pieces:
    """A tokenizer whose tokens are any pieces of text."""

    def __init__(self, pieces: Sequence[str]) -> None:
        self.pieces = pieces

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        return "".join(self.pieces[i] for i in ids)


def streamed(tokenizer: Any, ids: Sequence[int], stop: Sequence[str] = ()) -> list[str]:
    """The pieces that come out, token by token and at the end; like the server, it ends with the stop."""
    stream, out = TextStream(tokenizer, Stops(stop)), []
    for token in ids:
        out.append(stream.push(token))
        if stream.stopped:
            break
    return [*out, stream.finish()]


TEXTS = st.text(max_size=40) | st.lists(
    st.sampled_from([*CORPUS, " ", "\n", "é", "🙂", "\ufffd", "x"]), max_size=4
).map("".join)


@given(TEXTS)
@example("a\ufffd")
@example("\ufffd\ufffd b")
@law
def test_the_pieces_are_the_text(text: str) -> None:
    tokenizer = byte_level()
    ids = tokenizer.encode(text)
    assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids, skip_special_tokens=True) == text


@given(st.lists(st.integers(0, 319), max_size=30))
@law
def test_the_pieces_are_the_decoding_of_any_tokens(ids: list[int]) -> None:
    """Also of broken characters and special tokens, which a sampler may well produce."""
    tokenizer = byte_level()
    ids = [i % len(tokenizer) for i in ids]
    assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids, skip_special_tokens=True)


@given(st.lists(st.integers(1, 8), max_size=12))
@example([2, 1, 3])
@law
def test_spaces_between_words_are_kept_where_decoding_drops_the_first(ids: list[int]) -> None:
    tokenizer = word_level()
    assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids, skip_special_tokens=True)


@given(st.lists(st.integers(0, models.VOCABULARY - 30), max_size=20))
@law
def test_the_pieces_are_the_decoding_of_the_test_models_tokenizer(ids: list[int]) -> None:
    tokenizer = models.tokenizer()
    assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids, skip_special_tokens=True)


@given(TEXTS.filter(lambda text: "\ufffd" not in text))
@law
def test_no_broken_character_ever_comes_out(text: str) -> None:
    tokenizer = byte_level()
    assert all("\ufffd" not in piece for piece in streamed(tokenizer, tokenizer.encode(text)))


@given(st.text(alphabet="abc d", max_size=30))
@law
def test_without_stop_strings_whole_characters_come_at_once(text: str) -> None:
    tokenizer = byte_level()
    ids = tokenizer.encode(text)
    stream = TextStream(tokenizer)
    for end, token in enumerate(ids, 1):
        assert stream.push(token) == tokenizer.decode(ids[end - 1 : end])
    assert stream.finish() == ""


def split(text: str, cuts: Sequence[int]) -> list[str]:
    """`text` in pieces, cut at these places (some may be empty)."""
    places = sorted(min(cut, len(text)) for cut in cuts)
    return [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]


WORDS = st.text(alphabet="ab", max_size=16)
STOPS = st.text(alphabet="ab", min_size=1, max_size=4)
CUTS = st.lists(st.integers(0, 16), max_size=8)


@given(WORDS, STOPS, CUTS)
@settings(deadline=None, max_examples=300)
def test_a_stop_string_cuts_where_it_is_found_however_the_text_comes(text: str, stop: str, cuts: list[int]) -> None:
    pieces = split(text, cuts)
    expected = text[: text.find(stop)] if stop in text else text
    assert "".join(streamed(Pieces(pieces), range(len(pieces)), [stop])) == expected


@given(WORDS, st.lists(STOPS, min_size=2, max_size=3), CUTS)
@settings(deadline=None, max_examples=300)
def test_of_several_stop_strings_the_first_to_be_complete_cuts(text: str, stops: list[str], cuts: list[int]) -> None:
    """As if the text came letter by letter, so that the answer does not depend on how it fell into tokens."""
    expected = text
    for end in range(len(text) + 1):
        complete = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if complete:
            expected = text[: min(complete)]
            break
    pieces = split(text, cuts)
    assert "".join(streamed(Pieces(pieces), range(len(pieces)), stops)) == expected


@given(WORDS, st.lists(STOPS, min_size=1, max_size=3), CUTS)
@law
def test_what_came_out_is_never_taken_back_and_only_possible_stops_are_held(
    text: str, stops: list[str], cuts: list[int]
) -> None:
    pieces = split(text, cuts)
    stream, out = TextStream(Pieces(pieces), Stops(stops)), ""
    for i in range(len(pieces)):
        out += stream.push(i)
        so_far = "".join(pieces[: i + 1])
        if stream.stopped:
            assert any(so_far[len(out) :].startswith(stop) for stop in stops)
            assert stream.finish() == ""
            return
        assert so_far.startswith(out)
        held = so_far[len(out) :]
        assert not held or any(stop != held and stop.startswith(held) for stop in stops)
        assert not any(so_far.endswith(stop[:n]) for stop in stops for n in range(len(held) + 1, len(stop)))
    assert out + stream.finish() == text


@given(st.text(alphabet="aé🙂", max_size=12), st.text(alphabet="aé🙂", min_size=1, max_size=3))
@law
def test_stop_strings_may_be_of_characters_of_several_tokens(text: str, stop: str) -> None:
    tokenizer = byte_level()
    expected = text[: text.find(stop)] if stop in text else text
    assert "".join(streamed(tokenizer, tokenizer.encode(text), [stop])) == expected


@given(WORDS, STOPS, WORDS, CUTS)
@law
def test_nothing_behind_the_stop_comes_out(before: str, stop: str, behind: str, cuts: list[int]) -> None:
    """Even if the engine was a few tokens ahead."""
    pieces = split(before + stop + behind, cuts)
    stream, out = TextStream(Pieces(pieces), Stops([stop])), ""
    for i in range(len(pieces)):
        out += stream.push(i)
    out += stream.finish()
    assert stream.stopped
    assert out == (before + stop + behind).split(stop, 1)[0]


def test_what_might_begin_a_stop_is_held_back_and_flushed_at_the_end() -> None:
    pieces = ["So", " ST", "O", " ST", "O"]
    stream = TextStream(Pieces(pieces), Stops(["STOP"]))
    assert [stream.push(i) for i in range(len(pieces))] == ["So", " ", "", "STO ", ""]
    assert stream.finish() == "STO"
    assert not stream.stopped
    assert stream.finish() == "", "and only once"


def test_an_unfinished_character_is_flushed_at_the_end() -> None:
    tokenizer = byte_level()
    ids = tokenizer.encode("\U0001f9ea")
    assert len(ids) > 1, "a character of several tokens"
    stream = TextStream(tokenizer)
    assert stream.push(ids[0]) == ""
    assert stream.finish() == "\ufffd"


@pytest.mark.parametrize("stop", [[], [""], ["", ""]])
def test_an_empty_stop_string_stops_nothing(stop: list[str]) -> None:
    assert "".join(streamed(Pieces(["a", "b"]), [0, 1], stop)) == "ab"


def test_one_token_alone_shows_also_special_ones() -> None:
    tokenizer = byte_level()
    assert token_text(tokenizer, tokenizer.eos_token_id) == "<eos>"
    assert token_text(tokenizer, tokenizer.encode("a")[0]) == "a"


def test_stop_strings_cost_time_that_is_linear_in_the_text() -> None:
    """Counted in steps of the search, of a text that is nearly a long stop string again and again."""

    class Counting(Stops):
        steps = 0

        def step(self, state: int, letter: str) -> int:
            Counting.steps += 1
            return super().step(state, letter)

    stops = Counting(["a" * size + "b" for size in (1000, 2000, 3000)])
    made, Counting.steps = Counting.steps, 0
    text = ("a" * 2999 + "c") * 3
    stream = TextStream(Pieces("ac"), stops)
    for letter in text:
        stream.push("ac".index(letter))
    assert Counting.steps <= len(text)
    assert made <= 6003
    assert not stream.stopped


@pytest.mark.parametrize("token", ["<eos>", "\u00a5", "a"], ids=["special", "broken", "letter"])
def test_decoding_costs_what_is_linear_in_the_tokens(token: str) -> None:
    """Counted in tokens, of answers whose text never comes, is never whole, or is as usual."""

    class Counting:
        decoded = 0

        def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
            Counting.decoded += len(ids)
            return str(tokenizer.decode(ids, skip_special_tokens=skip_special_tokens))

    tokenizer = byte_level()
    length = 2000
    ids = [tokenizer.convert_tokens_to_ids(token)] * length
    stream = TextStream(Counting())
    assert "".join(map(stream.push, ids)) + stream.finish() == tokenizer.decode(ids, skip_special_tokens=True)
    assert Counting.decoded < 300 * length
