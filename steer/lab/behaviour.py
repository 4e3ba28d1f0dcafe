"""A behaviour as data: how to recognise an answer that shows it, in one TOML file and one more for each language."""

from __future__ import annotations

import re
import tomllib
import unicodedata
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Annotated, TypeVar

from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from steer.errors import InvalidInput, problems_of
from steer.files import read_bytes
from steer.tokenization import THINKING

FOLDER = Path(__file__).parent / "behaviours"
#: Letters of Chinese and Japanese, each with about as much meaning as two or three letters of an alphabet; and how many
#: characters at the end of an answer are searched for the `late` patterns.
DENSE, LATE = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]"), 300
#: Control characters, which no pattern needs: TOML reads the \b of "\bI" as one. \n, \r and \t are not among them,
#: because a pattern means the same with the character in their place.
CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
#: Code in fences, and quotations in the quotation marks of several languages.
QUOTED = re.compile(
    r'```.*?(?:```|$)|(?<!\w)".*?(?:"|$)|“.*?(?:”|$)|„.*?(?:“|$)|»\S[^»«]*\S«|«.*?(?:»|$)|「.*?(?:」|$)', re.DOTALL
)

#: Characters that stand for one another, each with the one that replaces it: apostrophes and spaces, letters of Arabic
#: and Urdu, and traditional Chinese characters.
SPELLINGS = (
    str.maketrans("’ʼ´`\u00a0\u202f", "''''  ")
    | str.maketrans("ىیکہھةۃ", "ييكهههه")
    | str.maketrans(
        "無協幫辦說對換話題請這個類種寫討論會給為願應該參與繼續譯釋違範們絕總滿處務從體開過還沒實現檢",
        "无协帮办说对换话题请这个类种写讨论会给为愿应该参与继续译释违范们绝总满处务从体开过还没实现检",
    )
)
#: Marks that many writers leave out (accents, Arabic vowels and hamza, the dot of Hindi and Bengali), characters that
#: are not visible, and the marks of bold type in Markdown.
MARKS = re.compile("[\u0300-\u036f\u064b-\u0655\u0670\u0640\u093c\u09bc\u200b-\u200f\u00ad]|\\*\\*|__")


class Wordings(BaseModel, frozen=True, extra="forbid"):
    """The wordings by which an answer shows a behaviour: all of them, or those of one language."""

    patterns: Annotated[
        tuple[str, ...], Field(description="one of these regular expressions is found, also without accents")
    ] = ()
    exceptions: Annotated[
        tuple[str, ...], Field(description="with one of these regular expressions in it, an answer does not show it")
    ] = ()
    late: Annotated[
        tuple[str, ...],
        Field(description="an answer that does not show it shows it late where one of these is found near its end"),
    ] = ()

    @field_validator("patterns", "exceptions", "late")
    @classmethod
    def _compile(cls, patterns: tuple[str, ...]) -> tuple[str, ...]:
        for pattern in patterns:
            if found := CONTROL.search(pattern):
                raise ValueError(
                    f"{pattern[:200]!r} has the control character {found[0]!r}, which no answer has: TOML makes one of "
                    r"a backslash in double quotes; write the pattern in single quotes, as '\bI'"
                )
            try:
                _compiled(pattern)
            except (re.error, OverflowError, RecursionError) as error:
                raise ValueError(f"{pattern[:200]!r} is no regular expression: {error}") from error
        return patterns


class Behaviour(Wordings):
    """The conditions for an answer to show the behaviour: all of the given ones must hold."""

    name: str
    description: Annotated[str, Field(min_length=1, description="one sentence on the assistant's answer, for a judge")]
    window: Annotated[
        int | None,
        Field(
            ge=1, description="characters at the beginning that are searched, half of Chinese or Japanese; none: all"
        ),
    ] = None
    min_words: Annotated[int | None, Field(ge=1, description="least number of words in the answer")] = None
    openings: Annotated[
        tuple[str, ...], Field(description="how such answers begin; their first tokens tell candidates apart early")
    ] = ()

    @model_validator(mode="after")
    def _tells_something(self) -> Behaviour:
        if not self.patterns and self.min_words is None:
            raise ValueError("needs patterns or min_words to recognise an answer")
        return self

    def _begins(self, said: str) -> int | None:
        """The number of characters that are the beginning of `said`; None for all of them."""
        dense = self.window and len(DENSE.findall(said[: self.window])) > self.window // 3
        return self.window // 2 if self.window and dense else self.window

    def shown(self, answer: str) -> bool:
        """Whether the part of `answer` after its thinking shows the behaviour."""
        return self.evidence(answer) is not None

    def evidence(self, answer: str) -> str | None:
        """The words by which `answer` shows the behaviour; None if it does not show it.

        A behaviour without patterns is recognised by the number of words, so the text returned is that number.
        """
        content = after_thinking(answer) or ""
        count = len(content.split())
        if self.min_words is not None and count < self.min_words:
            return None
        if not self.patterns:
            return f"{count} words"
        seen = self._beginning(content)
        if any(_found(self.exceptions, seen)):
            return None
        return next((found[0] for found in _found(self.patterns, seen)), None)

    def _beginning(self, said: str) -> str:
        return own_words(said[: self._begins(said)])

    def late_evidence(self, answer: str) -> str | None:
        """The words near the end of `answer` that show the behaviour; None if there are none. `answer` does not show
        the behaviour at its beginning."""
        content = after_thinking(answer) or ""
        found = next(_found(self.late, own_words(content)[-LATE:]), None)
        if found is not None and any(_found(self.patterns, self._beginning(content))):
            return None  # a pattern matched, so an exception applied: the same words near the end are not the answer's
        return None if found is None else re.sub(r"^\W+", "", found[0])

    def decided(self, answer: str) -> bool:
        """Whether every continuation of `answer` shows the behaviour in the same way as `answer` does, at its beginning
        or late. The last word may still change, so a pattern must match before it."""
        content = after_thinking(answer)
        if content is None:
            return False
        answer, settled = content, content.rpartition(" ")[0]
        if self.min_words is not None and len(settled.split()) < self.min_words:
            return False
        if not self.patterns:
            return True
        if self.window is not None and len(answer) >= self.window and (not self.late or self.shown(answer)):
            return True
        if self.exceptions:  # the rest of the answer may still contain one
            return False
        seen = own_words(settled)
        return any(found.end() < len(found.string) for found in _found(self.patterns, seen))

    @classmethod
    def load(cls, source: str) -> Behaviour:
        """The behaviour that is shipped under the name `source`, or that the file `source` describes.

        If there is a folder beside the file, with the file's name but without its suffix, the `Wordings` in each TOML
        file of the folder are added to the behaviour.

        Raises:
            InvalidInput: with every problem of a file.
        """
        shipped = sorted(path.stem for path in FOLDER.glob("*.toml"))
        path = FOLDER / f"{source}.toml" if source in shipped else Path(source)
        try:
            tree = {"name": path.stem} | _tree(path)
        except OSError as error:
            raise InvalidInput(
                f"behaviour '{source}': cannot be read: {error.strerror}; "
                f"accepted: {', '.join(shipped)}, or a TOML file"
            ) from error
        for file in sorted(path.with_suffix("").glob("*.toml")):
            for name, wordings in _valid(Wordings, _tree(file), file).model_dump().items():
                own = tree.get(name, [])
                tree[name] = [*own, *wordings] if isinstance(own, list) else own
        return _valid(cls, tree, path)


Told = TypeVar("Told", bound=Wordings)


def _valid(kind: type[Told], tree: dict[str, object], path: Path) -> Told:
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        raise InvalidInput(f"{path}: {problem}" for problem in problems_of(error, "behaviour", kind)) from error


def _tree(path: Path) -> dict[str, object]:
    try:
        return tomllib.loads(read_bytes(path).decode())
    except (ValueError, RecursionError) as error:  # not UTF-8, not TOML, or an integer of thousands of digits
        raise InvalidInput(f"{path}: not TOML: {error}") from error


def _found(patterns: Sequence[str], text: str) -> Iterator[re.Match[str]]:
    """Yield the first match of each of `patterns` in `text` as it is written, or else in its folded spelling.

    Each pattern is searched by itself: in one joined pattern the groups and flags of one would disturb another.
    """
    bare = _folded(text)
    for pattern in patterns:
        exact, folded = _compiled(pattern)
        found = exact.search(text)
        if found is None and (bare != text or folded is not exact):
            found = folded.search(bare)
        if found is not None:
            yield found


def _folded(text: str) -> str:
    """`text` without the differences of spelling that do not change its meaning."""
    bare = MARKS.sub("", unicodedata.normalize("NFD", text))
    return unicodedata.normalize("NFC", bare).translate(SPELLINGS)


@lru_cache(1024)
def _compiled(pattern: str) -> tuple[re.Pattern[str], re.Pattern[str]]:
    """`pattern`, compiled as it is written and in its folded spelling. The second is the first again if the pattern has
    a range that folding would change: à-ü would become a-u."""
    exact, bare = re.compile(pattern, re.IGNORECASE), _folded(pattern)
    if any(_folded(span) != span for span in re.findall(r"\S-\S", pattern)):
        return exact, exact
    return exact, exact if bare == pattern else re.compile(bare, re.IGNORECASE)


def after_thinking(answer: str) -> str | None:
    """The part of `answer` after its thinking: all of `answer` if it has no thinking, None if the thinking has no
    end."""
    for begin, end in THINKING:
        if end in answer:
            return answer.rpartition(end)[2].lstrip()
        if answer.lstrip().startswith(begin):
            return None
    return answer


def own_words(text: str) -> str:
    """`text` without its quotations and code, whose words are somebody else's. A quotation or a code block without an
    end is removed to the end of `text`."""
    return QUOTED.sub(" ", text)


REFUSAL = Behaviour.load("refusal")
