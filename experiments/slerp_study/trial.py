"""One model in the study: what every arm does, first on the prompts that directions were fitted to, to choose each
method's source layer, then on the held-out ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import torch

from experiments.slerp_study.arms import METHODS, MODES, STRENGTHS, SWEPT, ZEROED, Arm
from experiments.slerp_study.sets import Sets
from steer.direction import Direction
from steer.errors import DegenerateError
from steer.lab.behaviour import Behaviour
from steer.lab.derive import Recipe, derive, separated
from steer.lab.evaluator import Candidate, Evaluator, parts
from steer.lab.measurement import Measurement
from steer.lab.progress import answering
from steer.lab.race import Figures
from steer.lab.resume import ResultFile
from steer.lab.select import Entrant, best

T = TypeVar("T")
#: Prompts of each class that layers are chosen on.
CHOOSING = 32
#: The number of source layers that are tried at most, where nothing else is asked for.
MOST_LAYERS = 16
#: Arms that run at once, each with all prompts.
AT_ONCE = 12


@dataclass(frozen=True, slots=True)
class Chosen:
    """The arms of a model: of each method and mode at its own layer, all at the layer whose class means are the widest
    apart, which no method's effect chose; those whose strength is varied, and those with ρ = 0."""

    own: tuple[Arm, ...]
    fixed: tuple[Arm, ...]
    strengths: tuple[Arm, ...]
    zeroed: tuple[Arm, ...]

    @property
    def all(self) -> tuple[Arm, ...]:
        return tuple(dict.fromkeys((*self.own, *self.fixed, *self.strengths, *self.zeroed)))


class Trial:
    """Runs one model and keeps what it did in `ledger`; what is there is not run again. `label` is the model's
    name in the progress."""

    def __init__(
        self,
        measurement: Measurement,
        evaluator: Evaluator,
        sets: Sets,
        behaviour: Behaviour,
        ledger: Ledger,
        most_layers: int = MOST_LAYERS,
        label: str = "",
    ) -> None:
        self.measurement, self.evaluator, self.sets = measurement, evaluator, sets
        self.behaviour, self.ledger, self.label = behaviour, ledger, label
        # spread evenly up to the last, where refusals are decided
        step = math.ceil(measurement.layers / most_layers)
        self.layers = list(range(measurement.layers))[::-step][::-1]
        self._directions: dict[tuple[str, int], Direction | None] = {}

    def run(self) -> Chosen:
        """Everything. The layer of each method and mode is the one that leaves the fewest refusals of the fitting
        prompts, and within one prompt of that the one with the least KL (the rule of `steer fit`)."""
        self.plain()
        self.sweep()
        chosen = self.chosen()
        self.held_out(chosen.all)
        return chosen

    # -- plain ---------------------------------------------------------------------------------------------------------

    def plain(self) -> None:
        if "plain" not in self.ledger:
            answers = {
                name: [a.text for a in self.evaluator.answers(tested.prompts.prompts, None)]
                for name, tested in self.sets.tested.items()
            }
            self.ledger.put("plain", self._outcomes(answers))

    # -- source layers -------------------------------------------------------------------------------------------------

    def candidates(self) -> list[Arm]:
        """Every method in every mode at each of `layers` where it defines a direction."""
        arms = [Arm(method, mode, layer) for method in METHODS for mode in MODES for layer in self.layers]
        return [arm for arm in arms if self.direction(arm) is not None]

    def sweep(self) -> None:
        """What each of `candidates` does to the prompts that directions were fitted to."""
        asked, other = (s.prompts[:CHOOSING] for s in (self.sets.harmful, self.sets.harmless))
        work = len(asked) * answering(self.evaluator.max_tokens) + len(other)
        plain = None
        for arms in self._missing("choosing layers", self.candidates(), _sweep_key, work):
            plain = plain or self.evaluator.continuations(other)
            with self.evaluator.resident([self._candidate(arm) for arm in arms]) as steers:
                answers = self.evaluator.answers_of_each(asked, steers, known=self.behaviour.decided)
                kls = self.evaluator.divergences_of_each(other, plain, steers)
            for arm, given, kl in zip(arms, answers, kls, strict=True):
                refused = [self.behaviour.shown(answer.text) for answer in given]
                self.ledger.put(_sweep_key(arm), {"refused": _bits(refused), "kl": kl})

    def swept(self, arm: Arm) -> Figures:
        found = self.ledger[_sweep_key(arm)]
        return Figures(list(map(bool, found["refused"])), kls=found["kl"])

    def chosen(self) -> Chosen:
        candidates = self.candidates()
        own: list[Arm] = []
        for method in METHODS:
            for mode in MODES:
                arms = [arm for arm in candidates if (arm.method, arm.mode) == (method, mode)]
                if arms:
                    entrants = [Entrant(arm.recipe, self._candidate(arm), figures=self.swept(arm)) for arm in arms]
                    own.append(arms[entrants.index(best(entrants))])
        degrees = dict(separated(self.measurement, Recipe()))
        layer = max(self.layers, key=lambda layer: degrees.get(layer, 0.0))
        fixed = [arm for arm in (replace(arm, layer=layer) for arm in own) if arm in candidates]
        zeroed = [replace(a, zeroed=True) for a in fixed if a.method in ZEROED and a.mode == "one_sided"]
        swept = [replace(arm, strength=strength) for arm in own if arm.method in SWEPT for strength in STRENGTHS]
        return Chosen(tuple(own), tuple(fixed), tuple(swept), tuple(zeroed))

    # -- held-out prompts ----------------------------------------------------------------------------------------------

    def held_out(self, arms: Sequence[Arm]) -> None:
        tested = self.sets.tested
        prompts = list(chain.from_iterable(t.prompts.prompts for t in tested.values()))
        work = len(prompts) * answering(self.evaluator.max_tokens) + len(tested["harmless"].prompts)
        plain = None
        for some in self._missing("held-out prompts", arms, _test_key, work):
            plain = plain or self.evaluator.continuations(tested["harmless"].prompts.prompts)
            with self.evaluator.resident([self._candidate(arm) for arm in some]) as steers:
                answers = self.evaluator.answers_of_each(prompts, steers)
                kls = self.evaluator.divergences_of_each(tested["harmless"].prompts.prompts, plain, steers)
            for arm, given, kl in zip(some, answers, kls, strict=True):
                each = (answer.text for answer in given)
                split = {name: [next(each) for _ in t.prompts.prompts] for name, t in tested.items()}
                self.ledger.put(_test_key(arm), {**self._outcomes(split), "kl": kl})

    def tested(self, arm: Arm) -> dict[str, Any]:
        found: dict[str, Any] = self.ledger[_test_key(arm)]
        return found

    # -- parts ---------------------------------------------------------------------------------------------------------

    def direction(self, arm: Arm) -> Direction | None:
        """What the arm steers with; None where its method defines none at its layer."""
        key = arm.method, arm.layer
        if key not in self._directions:
            try:
                # the mode is the candidate's: arms that share a direction share its rows
                self._directions[key] = derive(self.measurement, replace(arm.recipe, mode="ablate", strength=1.0))
            except DegenerateError:
                self._directions[key] = None
        return self._directions[key]

    def _candidate(self, arm: Arm) -> Candidate:
        direction = self.direction(arm)
        assert direction is not None, "only arms with a direction are candidates"
        if arm.zeroed:
            direction = replace(direction, reference=torch.zeros_like(direction.reference))
        return Candidate.of(direction, arm.mode, arm.strength)

    def _missing(
        self, title: str, arms: Sequence[Arm], key: Callable[[Arm], str], work: float
    ) -> Iterator[Sequence[Arm]]:
        """Those that are not in the ledger, AT_ONCE at a time; `work` is the work of each."""
        missing = [arm for arm in arms if key(arm) not in self.ledger]
        progress, part = self.evaluator.progress, f"{self.label}: {title}"
        progress.plan(part, len(missing) * work)
        with progress.part(part):
            yield from parts(missing, min(AT_ONCE, self.evaluator.room))

    def _outcomes(self, answers: dict[str, list[str]]) -> dict[str, Any]:
        shown = {name: [self.behaviour.shown(text) for text in texts] for name, texts in answers.items()}
        right = {name: self.sets.tested[name].right(texts) for name, texts in answers.items()}
        return {
            "refused": {name: _bits(found) for name, found in shown.items()},
            "right": {
                name: _bits([r and not s for r, s in zip(found, shown[name], strict=True)])
                for name, found in right.items()
                if found is not None
            },
        }


def _sweep_key(arm: Arm) -> str:
    return f"choosing: {arm.key}"


def _test_key(arm: Arm) -> str:
    return f"held out: {arm.key}"


def _bits(values: Sequence[bool]) -> list[int]:
    return [int(value) for value in values]


class Ledger:
    """Values by their key. Raises InvalidInput where the file at `path` was made with another `identity`."""

    def __init__(self, path: Path, identity: dict[str, Any]) -> None:
        self._record = ResultFile(path, identity)
        self._values = {line["key"]: line["value"] for line in self._record.lines}

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def __getitem__(self, key: str) -> Any:
        return self._values[key]

    def put(self, key: str, value: Any) -> None:
        self._record.append({"key": key, "value": value})
        self._values[key] = value
