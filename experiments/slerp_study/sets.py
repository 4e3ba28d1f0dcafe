"""The prompts of a study: two sets to fit with, held-out ones to test with, and what right answers hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from steer.errors import InvalidInput
from steer.lab.evaluation.figures import Expected, read_expected, right
from steer.lab.prompts import Prompt, PromptSet, check_contrast, read_prompts

#: The files of a folder, `<class>.<split>.txt`; the last need not be there.
FIT, TEST, OPTIONAL = ("refused.train", "harmless.train"), ("refused.test", "harmless.test"), "borderline.test"
#: What right answers hold, as `steer eval --expected` reads it. It need not be there either.
EXPECTED = "expected.jsonl"


@dataclass(frozen=True, slots=True)
class Tested:
    """Held-out prompts of one class, and what right answers hold, as far as anybody said."""

    prompts: PromptSet
    expected: Mapping[Prompt, Expected]

    def right(self, answers: Sequence[str]) -> list[bool] | None:
        """Whether each answer is right; None where it is not known of each what would be."""
        return right(self.expected, self.prompts.prompts, answers)


@dataclass(frozen=True, slots=True)
class Sets:
    """Two contrast sets to measure and choose with, and the classes `refused`, `harmless` and `borderline` (if there
    is one) to test with."""

    harmful: PromptSet
    harmless: PromptSet
    tested: Mapping[str, Tested]

    @property
    def identity(self) -> dict[str, object]:
        """What a record of results must agree with."""
        sets = {"harmful": self.harmful, "harmless": self.harmless}
        sets |= {f"tested {name}": tested.prompts for name, tested in self.tested.items()}
        return {name: [found.sha256, len(found)] for name, found in sets.items()}


def read_sets(folder: Path, most: int | None = None) -> Sets:
    """The sets in `folder`, at most `most` test prompts of each class. Raises InvalidInput with all that is wrong."""
    problems: list[str] = []
    read: dict[str, PromptSet] = {}
    wanted = [*FIT, *TEST, *([OPTIONAL] if (folder / f"{OPTIONAL}.txt").exists() else [])]
    for name in wanted:
        try:
            read[name] = read_prompts(str(folder / f"{name}.txt"))
        except InvalidInput as error:
            problems += error.problems
    expected: Mapping[Prompt, Expected] = {}
    try:
        if (folder / EXPECTED).exists():
            expected = read_expected(folder / EXPECTED)
    except InvalidInput as error:
        problems += error.problems
    if problems:
        raise InvalidInput(problems)
    tests = (name for name in wanted if name.endswith(".test"))
    tested = {name.removesuffix(".test"): Tested(_first(read[name], most), expected) for name in tests}
    check_contrast(read[FIT[0]], read[FIT[1]])
    seen = set(read[FIT[0]].prompts) | set(read[FIT[1]].prompts)
    for name, found in tested.items():
        if both := sum(prompt in seen for prompt in found.prompts.prompts):
            problems.append(f"{folder}: {both} prompts of {name}.test stand in the sets to fit with")
    if problems:
        raise InvalidInput(problems)
    return Sets(read[FIT[0]], read[FIT[1]], tested)


def _first(prompts: PromptSet, most: int | None) -> PromptSet:
    return prompts if most is None else replace(prompts, prompts=prompts.prompts[:most])
