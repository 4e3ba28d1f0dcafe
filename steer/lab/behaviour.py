"""A behaviour as data: how to tell an answer that shows it. One TOML file each, in `behaviours/` or the user's own."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from steer.errors import InvalidInput, problems_of

FOLDER = Path(__file__).parent / "behaviours"


class Behaviour(BaseModel):
    """What an answer must be to show the behaviour: all of what is given below holds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    description: Annotated[str, Field(min_length=1, description="one sentence on the assistant's answer, for a judge")]
    patterns: Annotated[tuple[str, ...], Field(description="one of these regular expressions is found")] = ()
    window: Annotated[int | None, Field(ge=1, description="in so many first characters; none: anywhere")] = None
    min_words: Annotated[int | None, Field(ge=1, description="the answer has at least so many words")] = None
    openings: Annotated[
        tuple[str, ...], Field(description="how such answers begin; their first tokens are a screen")
    ] = ()

    @field_validator("patterns")
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
            raise ValueError("needs patterns or min_words, by which an answer is told")
        return self

    @cached_property
    def _compiled(self) -> tuple[re.Pattern[str], ...]:
        """Each by itself: joined, their groups and flags would get into each other's way."""
        return tuple(re.compile(pattern, re.IGNORECASE) for pattern in self.patterns)

    def shown(self, answer: str) -> bool:
        """Whether `answer` shows the behaviour."""
        if self.min_words is not None and len(answer.split()) < self.min_words:
            return False
        seen = answer.replace("’", "'")[: self.window]
        return not self.patterns or any(pattern.search(seen) for pattern in self._compiled)

    def decided(self, answer: str) -> bool:
        """Whether `shown` would say the same of any answer that goes on from `answer`: its last word may still change,
        so that a pattern must end before it."""
        settled = answer.rpartition(" ")[0]
        if self.min_words is not None and len(settled.split()) < self.min_words:
            return False
        if not self.patterns:
            return True
        if self.window is not None and len(answer) >= self.window:
            return True
        seen = settled.replace("’", "'")
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
