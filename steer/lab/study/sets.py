"""The prompts of a study: two sets to fit with, held-out ones to test with, and what right answers hold."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from steer.errors import InvalidInput
from steer.lab.prompts import PromptSet, check_contrast, read_prompts

#: The files of a folder, `<class>.<split>.txt`; the last need not be there.
FIT, TEST, OPTIONAL = ("refused.train", "harmless.train"), ("refused.test", "harmless.test"), "borderline.test"


@dataclass(frozen=True, slots=True)
class Tested:
    """Held-out prompts of one class. expected: for each prompt the phrases that a right answer holds, or None where
    nobody said."""

    prompts: PromptSet
    expected: tuple[tuple[str, ...], ...] | None

    def right(self, answers: Sequence[str]) -> list[bool] | None:
        """Whether each answer holds all of its own phrases, and none of those of other prompts."""
        if self.expected is None:
            return None
        known = {phrase for phrases in self.expected for phrase in phrases}
        pairs = zip(self.expected, answers, strict=True)
        return [{phrase for phrase in known if phrase in answer} == set(own) for own, answer in pairs]


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
    tested: dict[str, Tested] = {}
    for name in (name for name in wanted if name.endswith(".test") and name in read):
        try:
            found = Tested(read[name], _expected(folder / f"{name}.expected.jsonl", len(read[name])))
            tested[name.removesuffix(".test")] = _first(found, most)
        except InvalidInput as error:
            problems += error.problems
    if problems:
        raise InvalidInput(problems)
    check_contrast(read[FIT[0]], read[FIT[1]])
    seen = set(read[FIT[0]].prompts) | set(read[FIT[1]].prompts)
    for name, found in tested.items():
        if both := sum(prompt in seen for prompt in found.prompts.prompts):
            problems.append(f"{folder}: {both} prompts of {name}.test stand in the sets to fit with")
    if problems:
        raise InvalidInput(problems)
    return Sets(read[FIT[0]], read[FIT[1]], tested)


def _expected(path: Path, count: int) -> tuple[tuple[str, ...], ...] | None:
    if not path.exists():
        return None
    lines = path.read_text(encoding="utf-8").splitlines()
    problems, found = [], []
    for number, line in enumerate(lines, 1):
        try:
            phrases = json.loads(line)
        except ValueError:
            phrases = None
        if not isinstance(phrases, list) or not phrases or not all(isinstance(p, str) and p for p in phrases):
            problems.append(f"{path}, line {number}: must be a JSON list of the phrases that a right answer holds")
        found.append(tuple(map(str, phrases or ())))
    if len(found) != count:
        problems.append(f"{path}: has {len(found)} lines, its prompts are {count}")
    if problems:
        raise InvalidInput(problems)
    return tuple(found)


def _first(tested: Tested, most: int | None) -> Tested:
    if most is None:
        return tested
    prompts = replace(tested.prompts, prompts=tested.prompts.prompts[:most])
    return Tested(prompts, None if tested.expected is None else tested.expected[:most])
