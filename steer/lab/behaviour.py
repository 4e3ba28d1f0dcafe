"""A behaviour as data: how to tell an answer that shows it, one TOML file each; and answers that are no answers.

Loops, nothing at all, collapse and no end must not pass for compliance. A fault is told from the token ids, so that it
does not depend on spaces or on a language:

- `empty`: no letter, digit, symbol or bracket.
- `garbled`: a phrase that stands there five times but for the numbers between, pieces of a vocabulary, a wrong
  encoding, or letters that are no words.
- `looped`: the answer ends in a phrase that stands there at least three times, six tokens in all. Source: Holtzman et
  al. 2020, "The curious case of neural text degeneration" (a phrase of two tokens or more, three times, at the end).
- `repetitive`: more than half of its 4-grams have stood in it before, in an answer of at least 32 tokens. Source:
  seq-rep-4 of Welleck et al. 2020, "Neural text generation with unlikelihood training"; the half is our choice.
- `collapsed`: fewer than a quarter of the tokens of the plain answer to the same prompt.
- `unanswered`: its thinking has no end, so that it says nothing yet. All others are told of what stands after it.
- `unended`: no end before the limit. It says something only where the plain model does end; see `ends`.
"""

from __future__ import annotations

import re
import tomllib
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from steer.errors import InvalidInput, problems_of

if TYPE_CHECKING:
    from steer.lab.evaluator import Answer

FOLDER = Path(__file__).parent / "behaviours"


class Behaviour(BaseModel):
    """What an answer must be to show the behaviour: all of what is given below holds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    description: Annotated[str, Field(min_length=1, description="one sentence on the assistant's answer, for a judge")]
    patterns: Annotated[tuple[str, ...], Field(description="one of these regular expressions is found")] = ()
    exceptions: Annotated[
        tuple[str, ...], Field(description="with one of these regular expressions in it, an answer does not show it")
    ] = ()
    window: Annotated[
        int | None, Field(ge=1, description="characters at the beginning that are searched; none: all")
    ] = None
    min_words: Annotated[int | None, Field(ge=1, description="least number of words in the answer")] = None
    openings: Annotated[
        tuple[str, ...], Field(description="how such answers begin; their first tokens tell candidates apart early")
    ] = ()

    @field_validator("patterns", "exceptions")
    @classmethod
    def _compile(cls, patterns: tuple[str, ...]) -> tuple[str, ...]:
        for pattern in patterns:
            try:
                re.compile(pattern, re.IGNORECASE)
            except (re.error, OverflowError, RecursionError) as error:
                raise ValueError(f"{pattern[:200]!r} is no regular expression: {error}") from error
        return patterns

    @model_validator(mode="after")
    def _tells_something(self) -> Behaviour:
        if not self.patterns and self.min_words is None:
            raise ValueError("needs patterns or min_words to recognise an answer")
        return self

    @cached_property
    def _compiled(self) -> tuple[re.Pattern[str], ...]:
        """Each by itself: joined, their groups and flags would get into each other's way."""
        return tuple(re.compile(pattern, re.IGNORECASE) for pattern in self.patterns)

    @cached_property
    def _excepted(self) -> tuple[re.Pattern[str], ...]:
        return tuple(re.compile(pattern, re.IGNORECASE) for pattern in self.exceptions)

    def shown(self, answer: str) -> bool:
        """Whether `answer` shows the behaviour, in what it says after its thinking."""
        return self.evidence(answer) is not None

    def evidence(self, answer: str) -> str | None:
        """The words of `answer` by which it shows the behaviour (or their number, where that is what tells); None where
        it does not."""
        said = after_thinking(answer) or ""
        count = len(said.split())
        if self.min_words is not None and count < self.min_words:
            return None
        if not self.patterns:
            return f"{count} words"
        seen = own_words(said.replace("’", "'")[: self.window])
        if any(pattern.search(seen) for pattern in self._excepted):
            return None
        return next((found[0] for pattern in self._compiled if (found := pattern.search(seen))), None)

    def decided(self, answer: str) -> bool:
        """Whether `shown` would say the same of any answer that goes on from `answer`: its last word may still change,
        so that a pattern must end before it."""
        said = after_thinking(answer)
        if said is None:
            return False
        answer, settled = said, said.rpartition(" ")[0]
        if self.min_words is not None and len(settled.split()) < self.min_words:
            return False
        if not self.patterns:
            return True
        if self.window is not None and len(answer) >= self.window:
            return True
        if self.exceptions:  # one may still come
            return False
        seen = own_words(settled.replace("’", "'"))
        return any(found.end() < len(seen) for pattern in self._compiled if (found := pattern.search(seen)))

    def rate(self, answers: Sequence[str]) -> float:
        """The share of `answers` that show it."""
        return sum(self.shown(answer) for answer in answers) / len(answers)

    @classmethod
    def load(cls, source: str) -> Behaviour:
        """The behaviour that is shipped under the name `source`, or that the file `source` describes. Raises
        InvalidInput with every problem of the file."""
        shipped = sorted(path.stem for path in FOLDER.glob("*.toml"))
        path = FOLDER / f"{source}.toml" if source in shipped else Path(source)
        try:
            return cls(**({"name": path.stem} | tomllib.loads(path.read_text(encoding="utf-8"))))
        except OSError as error:
            raise InvalidInput(
                f"behaviour '{source}': cannot be read: {error.strerror}; "
                f"accepted: {', '.join(shipped)}, or a TOML file"
            ) from error
        except ValidationError as error:
            raise InvalidInput(f"{path}: {problem}" for problem in problems_of(error, "behaviour")) from error
        except (ValueError, RecursionError) as error:  # not UTF-8, not TOML, or an integer of thousands of digits
            raise InvalidInput(f"{path}: not TOML: {error}") from error


REFUSAL = Behaviour.load("refusal")


Fault: TypeAlias = Literal["unanswered", "empty", "looped", "garbled", "repetitive", "collapsed", "unended"]
FAULTS: tuple[Fault, ...] = ("unanswered", "empty", "looped", "garbled", "repetitive", "collapsed", "unended")
#: Words, signs, and the letters of scripts that put no space between words.
WORDS = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|\w+|[^\w\s]")
#: Code in fences, and quotations in the signs of several languages.
QUOTED = re.compile(r'```.*?(?:```|$)|(?<!\w)".*?(?:"|$)|“.*?(?:”|$)|„.*?(?:“|$)|«.*?(?:»|$)|「.*?(?:」|$)', re.DOTALL)
#: What is no text: a phrase with letters that stands 5 times one after the other, but for the numbers between; one
#: letter 30 times; pieces of a vocabulary; letters of a wrong encoding; words without a vowel.
COUNTED = re.compile(r"([^\W\d_][^\n]{6,160}?)(?:\W{0,6}\d{0,4}\W{0,6}\1){4}")
STUCK = re.compile(r"([^\W\d_])\1{30}")
PIECES = re.compile(
    r"<(?:unk|pad|s|/s|mask|\|[a-z_]+\|)>|\[(?:MASK|SEP|CLS|PAD|unused\d+)\]|[ĠĊ▁]|##[a-z]|@@[a-z]", re.IGNORECASE
)
#: Of a long text the end is looked at.
GARBLED = 4000
URL = re.compile(r"\w+://\S+")
MISREAD = re.compile(r"[ÃÐÑâã][\u0080-\u00bf€™œžŸš‚„†‡…‰‹Œ˜ƒÂÃ]")
VOWELLESS = re.compile(r"\b[b-df-hj-np-tv-xz]{5}\b")
#: What stands before and after a model's thinking.
THINKING = ("<think>", "</think>")

REPEATS, LOOP_TOKENS = 3, 6
NGRAM, REPETITIVE, REPETITIVE_TOKENS = 4, 0.5, 32
COLLAPSED = 0.25
#: Plain answers to ordinary prompts end before the limit at least so often, where to run into it means something.
ENDING = 0.95


def after_thinking(answer: str) -> str | None:
    """What `answer` says after its thinking, all of it where there is none; None where the thinking has no end."""
    begin, end = THINKING
    if end in answer:
        return answer.rpartition(end)[2].lstrip()
    return None if answer.lstrip().startswith(begin) else answer


def own_words(text: str) -> str:
    """`text` without its quotations and code, also such that have no end in it: their words are somebody else's."""
    return QUOTED.sub(" ", text)


@dataclass(frozen=True, slots=True)
class Text:
    """An answer of which the text alone is known: its words stand for the tokens."""

    text: str

    @property
    def ids(self) -> list[int]:
        numbers: dict[str, int] = {}
        return [numbers.setdefault(word, len(numbers)) for word in WORDS.findall(self.text)]


def looped(ids: Sequence[int]) -> bool:
    """Whether `ids` end in a phrase that repeats; the last repeat may be cut short."""
    for period in range(1, len(ids) // REPEATS + 1):
        length = period
        while length < len(ids) and ids[-length - 1] == ids[-length - 1 + period]:
            length += 1
        if length >= max(REPEATS * period, LOOP_TOKENS):
            return True
    return False


def garbled(text: str) -> bool:
    """Whether `text` is no text: one phrase or letter over and over, pieces of a vocabulary, a wrong encoding, or
    letters that are no words."""
    text = URL.sub(" ", text)[-GARBLED:]
    counted = COUNTED.finditer(own_words(text))
    if any(len(found[1].split()) >= 3 for found in counted) or STUCK.search(text):
        return True
    return len(set(VOWELLESS.findall(text))) >= 5 or any(len(kind.findall(text)) >= 5 for kind in (PIECES, MISREAD))


def repetition(ids: Sequence[int]) -> float:
    """The share of 4-grams that have stood in `ids` before, from 0 to 1."""
    grams = [tuple(ids[i : i + NGRAM]) for i in range(len(ids) - NGRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def unended(answer: Answer, max_tokens: int) -> bool:
    return len(answer.ids) >= max_tokens


def ends(plain: Sequence[Answer], max_tokens: int) -> bool:
    """Whether `max_tokens` are enough for the plain model's answers, so that the limit tells a runaway answer; else it
    is the limit that cuts, and nothing is wrong with the answer."""
    return sum(not unended(answer, max_tokens) for answer in plain) >= ENDING * len(plain)


def fault(answer: Answer, beside: Answer | None, limit: int | None) -> Fault | None:
    """The first fault of `answer`, if it has one. `beside` is a plain answer that it should be about as long as, and
    `limit` the number of tokens before which it should have ended. None where there is no such measure."""
    ids, said = answer.ids, after_thinking(answer.text)
    if looped(ids):
        return "looped"
    if said is None:
        return "unanswered"
    if not any(letter.isalnum() or unicodedata.category(letter)[0] == "S" or letter in "[]{}()*#" for letter in said):
        return "empty"
    if garbled(said):
        return "garbled"
    if len(ids) >= REPETITIVE_TOKENS and repetition(ids) > REPETITIVE:
        return "repetitive"
    if beside is not None and len(ids) < COLLAPSED * len(beside.ids):
        return "collapsed"
    if limit is not None and unended(answer, limit):
        return "unended"
    return None
