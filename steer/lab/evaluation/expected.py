"""What a right answer holds, as data: so that an answer that complies is told from one that is right."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from steer.errors import InvalidInput, problems_of
from steer.lab.prompts import Prompt, prompt_of

ACCEPTED = """\
accepted: .jsonl whose lines have a prompt (or messages) with contains and lacks, lists of texts; a line of vocabulary \
and lacks without a prompt holds for the lines after it"""


class Expected(BaseModel):
    """What an answer contains and lacks to be right; letter case does not matter."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    contains: tuple[str, ...] = Field(default=(), description="all of these stand in a right answer")
    lacks: tuple[str, ...] = Field(default=(), description="none of these does")
    vocabulary: tuple[str, ...] = Field(default=(), description="of these only those in contains do")

    def met(self, answer: str) -> bool:
        text = answer.casefold()
        named = {c.casefold() for c in self.contains}
        others = [*self.lacks, *(word for word in self.vocabulary if word.casefold() not in named)]
        return all(c in text for c in named) and not any(word.casefold() in text for word in others)


def read_expected(path: Path) -> dict[Prompt, Expected]:
    """By prompt, from a file of JSON lines. Raises InvalidInput with every problem, and what would be accepted."""
    try:
        lines = path.read_text("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput(f"--expected: {path}: cannot be read: {error}; {ACCEPTED}") from error
    found: dict[Prompt, Expected] = {}
    common, problems = Expected(), []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            item = json.loads(line)
            read = Expected.model_validate(item)
            if "vocabulary" in item:
                common = read
                continue
            own = read.model_copy(update={"lacks": (*common.lacks, *read.lacks), "vocabulary": common.vocabulary})
            if not own.contains and not own.lacks:
                problems.append(f"{where}: needs texts in contains or lacks")
            elif found.setdefault(prompt_of(item, where), own) != own:
                problems.append(f"{where}: says otherwise than an earlier line of the same prompt")
        except ValidationError as error:
            problems += [f"{where}: {problem}" for problem in problems_of(error, "line")]
        except InvalidInput as error:
            problems += error.problems
        except (ValueError, RecursionError) as error:
            problems.append(f"{where}: not JSON: {error}")
    if not found and not problems:
        problems.append(f"{path}: has no prompts")
    if problems:
        raise InvalidInput([*problems, ACCEPTED])
    return found


def right(expected: Mapping[Prompt, Expected], prompts: Sequence[Prompt], answers: Sequence[str]) -> list[bool] | None:
    """Whether each answer is as expected; None where the prompts are not all known."""
    if not all(prompt in expected for prompt in prompts):
        return None
    return [expected[prompt].met(answer) for prompt, answer in zip(prompts, answers, strict=True)]
