"""The design for one real model: disjoint draws of fitting prompts, and arms that are compared at strength 1 and at an
equal KL."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import inf
from pathlib import Path

import numpy as np
from torch import Tensor

from experiments.slerp_study.trial import Ledger
from steer.errors import DegenerateError, InvalidInput, NotFinite
from steer.geometry import linear_direction
from steer.hf.load import load
from steer.hf.steering import Steering
from steer.lab.behaviour import REFUSAL
from steer.lab.derive import Recipe, derive
from steer.lab.evaluation.arms import control
from steer.lab.evaluation.run import DOSE_PROMPTS, TRIES, strength_at
from steer.lab.evaluator import Candidate, Continuation, Evaluator
from steer.lab.measure import MeasurementOptions, measure
from steer.lab.measurement import Contrast, Measurement
from steer.lab.methods.base import Method
from steer.lab.methods.boundaries import Whitened
from steer.lab.methods.means import Biprojected, Linear, Slerp
from steer.lab.outcome import classify
from steer.lab.probe import HFEvaluator
from steer.lab.progress import Progress, answering
from steer.lab.prompts import PromptSet, check_contrast
from steer.lab.source import Source, TransformersSource
from steer.names import Mode
from steer.spec import Entry

#: Prompts of each class in one draw, and those that a dose is found on.
FITTING, VALIDATION = 32, DOSE_PROMPTS
#: Held-out prompts of each class, where nothing else is asked for.
HELD_OUT = 48
#: ρ of the one-sided arms, a quarter of the way from the harmless mean to the harmful one, and what is above it goes to
#: the harmless mean.
THRESHOLD, TARGET = 0.25, 0.0
#: Strength 1 beside the doses, in the names of results.
UNIT = "strength 1"


class Rescaled(Linear):
    """Linear with the harmful mean `factor` times as long: the ratio of the two norms is moved, and nothing else."""

    factor: float

    def rows(self, contrast: Contrast) -> Tensor:
        a, h = contrast.harmless.mean, contrast.harmful.mean
        return linear_direction(a, h * self.factor).unsqueeze(0)


@dataclass(frozen=True, slots=True)
class Way:
    """How an arm makes a direction from a draw and applies it. `random`: a turned copy, which knows of no behaviour."""

    method: Method
    mode: Mode = "ablate"
    winsorize: float | None = None
    tokens: str | None = None
    random: bool = False

    def recipe(self, layer: int) -> Recipe:
        sided = self.mode in ("one_sided", "rotate_one_sided")
        return Recipe(
            self.method,
            layer,
            winsorize=self.winsorize,
            mode=self.mode,
            threshold=THRESHOLD if sided else None,
            target=TARGET if sided else None,
        )


_T0 = Slerp(t=0)
WAYS: dict[str, Way] = {
    "linear": Way(Linear()),
    **{f"slerp {t:g}": Way(Slerp(t=t)) for t in (-1, -0.5, 0, 0.5, 1, 1.5)},
    "slerp 0 one-sided": Way(_T0, "one_sided"),
    "slerp 0 rotate": Way(_T0, "rotate"),
    "random": Way(_T0, random=True),
    "slerp 0 winsorised": Way(_T0, winsorize=0.995),
    "slerp 1 winsorised": Way(Slerp(t=1), winsorize=0.995),
    "biprojected": Way(Biprojected()),
    "whitened": Way(Whitened(shrinkage="auto")),
    "slerp 0 rotate one-sided": Way(_T0, "rotate_one_sided"),
    "linear one-sided": Way(Linear(), "one_sided"),
    "slerp 1 one-sided": Way(Slerp(t=1), "one_sided"),
    "linear harmful norm × 0.9": Way(Rescaled(factor=0.9)),
    "linear harmful norm × 1.1": Way(Rescaled(factor=1.1)),
    "linear not-first": Way(Linear(), tokens="not-first"),
    "slerp 0 not-first": Way(_T0, tokens="not-first"),
    "slerp 1 not-first": Way(Slerp(t=1), tokens="not-first"),
}
#: What two CPU cores can do in some hours, chosen before anything was run.
SUBSET = ("linear", "slerp -1", "slerp 0", "slerp 0.5", "slerp 1", "slerp 0 one-sided", "slerp 0 rotate", "random")
#: Named before anything was run: the first arm against the second.
PRIMARY = (("slerp 1", "linear"), ("slerp 0", "linear"), ("slerp 0", "slerp 1"))


@dataclass(frozen=True, slots=True)
class Drawn:
    """The prompts of one class: those of each draw, which share none, those that doses are found on, and the held-out
    ones."""

    fitting: tuple[PromptSet, ...]
    validation: PromptSet
    test: PromptSet

    @classmethod
    def of(cls, prompts: PromptSet, draws: int, test: int) -> Drawn:
        """Raises InvalidInput where there are too few prompts."""
        distinct, needed = list(prompts.distinct.prompts), draws * FITTING + VALIDATION + test
        if len(distinct) < needed:
            raise InvalidInput(
                f"{prompts.name}: has {len(distinct)} different prompts; {draws} draws of {FITTING}, {VALIDATION} to "
                f"find doses on and {test} to test with are {needed}"
            )
        random.Random(0).shuffle(distinct)
        ends = [*range(0, (draws + 1) * FITTING, FITTING), draws * FITTING + VALIDATION, needed]
        parts = [replace(prompts, prompts=tuple(distinct[a:b])) for a, b in pairwise(ends)]
        return cls(tuple(parts[:draws]), *parts[draws:])


def drawn(harmful: PromptSet, harmless: PromptSet, draws: int, test: int) -> tuple[Drawn, Drawn]:
    """Both classes. Raises InvalidInput with the problems of both."""
    check_contrast(harmful, harmless)
    found, problems = list[Drawn](), list[str]()
    for prompts in (harmful, harmless):
        try:
            found.append(Drawn.of(prompts, draws, test))
        except InvalidInput as error:
            problems += error.problems
    if problems:
        raise InvalidInput(problems)
    return found[0], found[1]


class DrawsTrial:
    """Runs the arms `ways` on every draw and keeps in `ledger` what they did; what is there is not run again."""

    def __init__(
        self,
        source: Source,
        evaluator: Evaluator,
        sets: tuple[Drawn, Drawn],
        ways: Sequence[str],
        doses: Sequence[float],
        layer: int,
        ledger: Ledger,
        folder: Path,
    ) -> None:
        self.source, self.evaluator, self.ledger, self.folder = source, evaluator, ledger, folder
        self.harmful, self.harmless = sets
        self.ways, self.doses, self.layer = ways, doses, layer
        self._along: dict[str, Sequence[Continuation]] = {}

    @property
    def draws(self) -> range:
        return range(len(self.harmful.fitting))

    @property
    def conditions(self) -> list[str]:
        """What the arms are compared at."""
        return [UNIT, *(f"KL {dose:g}" for dose in self.doses)]

    def run(self) -> None:
        """Everything, the arms of a draw next to each other and all of them at strength 1 first."""
        progress, each = self.evaluator.progress, answering(self.evaluator.max_tokens)
        count = len(self.harmful.test) + len(self.harmless.test)
        arms = len(self.ways) * len(self.draws)
        progress.plan("plain", count * each)
        along = len(self.harmless.test) * each  # the plain answers that KL is measured along, once
        progress.plan(UNIT, along + arms * (count * each + len(self.harmless.test)))
        for dose in self.conditions[1:]:
            along = VALIDATION * each if dose == self.conditions[1] else 0
            progress.plan(dose, along + arms * (count * each + len(self.harmless.test) + VALIDATION * TRIES))
        with progress.part("plain"):
            if "plain" not in self.ledger:
                self.ledger.put("plain", self._outcomes(None))
        for condition in self.conditions:
            with progress.part(condition):
                for draw in self.draws:
                    for name in self.ways:
                        self._arm(draw, name, condition)

    def found(self, draw: int, name: str, condition: str) -> dict[str, list[float]] | None:
        """What the arm did, a value for each held-out prompt; None where nothing defines it, or no strength has the
        dose."""
        result: dict[str, list[float]] | None = self.ledger[_key(draw, name, condition)]["found"]
        return result

    def strength(self, draw: int, name: str, condition: str) -> float | None:
        strength: float | None = self.ledger[_key(draw, name, condition)]["strength"]
        return strength

    def measurement(self, draw: int) -> Measurement:
        path = self.folder / f"measurement-{draw}.safetensors"
        if not path.exists():
            sets = self.harmful.fitting[draw], self.harmless.fitting[draw]
            measure(self.source, *sets, MeasurementOptions(vectors=True)).save(path)
        return Measurement.load(path)

    def _arm(self, draw: int, name: str, condition: str) -> None:
        key = _key(draw, name, condition)
        if key in self.ledger:
            return
        way = WAYS[name]
        try:
            direction = derive(self.measurement(draw), way.recipe(self.layer))
        except DegenerateError:
            self.ledger.put(key, {"strength": None, "found": None})
            return
        asked = Entry("", "", way.mode, 1.0, tokens=way.tokens)
        candidate = Candidate(control(direction, draw) if way.random else direction, asked)
        strength: float | None = 1.0
        if condition != UNIT:
            dose = self.doses[self.conditions.index(condition) - 1]
            strength = strength_at(dose, lambda s: self._dose(f"{key}, strength {s:g}", candidate.asking(strength=s)))
        found = None if strength is None else self._outcomes(candidate.asking(strength=strength))
        self.ledger.put(key, {"strength": strength, "found": found})

    def _dose(self, key: str, candidate: Candidate) -> float:
        if key not in self.ledger:
            self.ledger.put(key, float(np.mean(self._divergences(candidate, "validation"))))
        kl: float = self.ledger[key]
        return kl

    def _divergences(self, candidate: Candidate, which: str) -> list[float]:
        prompts = getattr(self.harmless, which).prompts
        if which not in self._along:
            self._along[which] = self.evaluator.continuations(prompts)
        with self.evaluator.resident([candidate]) as (steer,):
            try:
                found = self.evaluator.divergences(prompts, self._along[which], steer)
            except NotFinite:
                return [float("inf")]
        return [float(row.mean()) for row in found]

    def _outcomes(self, candidate: Candidate | None) -> dict[str, list[float]]:
        """Of each held-out prompt: refused, of each harmless one also whether the answer is broken, and the KL."""
        found: dict[str, list[float]] = {}
        with self.evaluator.resident([] if candidate is None else [candidate]) as steers:
            for before, one in (("", self.harmful), ("harmless_", self.harmless)):
                answers = self.evaluator.answers(one.test.prompts, steers[0] if steers else None)
                told = [classify(REFUSAL, answer).outcome for answer in answers]
                found[f"{before}refused"] = [float(each == "shown") for each in told]
                found[f"{before}degenerate"] = [float(each == "degenerate") for each in told]
        if candidate is not None:
            found["kl"] = self._divergences(candidate, "test")
        return found


def draws_study(
    model: str,
    harmful: PromptSet,
    harmless: PromptSet,
    output: Path,
    *,
    draws: int,
    test: int,
    ways: Sequence[str],
    doses: Sequence[float],
    layer: int | None,
    max_tokens: int,
    batch_size: int | None,
    dtype: str,
    device: str,
    progress: Progress | None = None,
) -> DrawsTrial:
    """Try `ways` on the model at `layer` (None: two thirds of its depth). What it did stands in `output`, and is not
    run again. Raises InvalidInput for too few prompts, and where `output` has results of something else."""
    if unknown := [way for way in ways if way not in WAYS]:
        raise InvalidInput(f"--arms: {', '.join(unknown)}: not known; accepted: {'; '.join(WAYS)}")
    if wrong := [dose for dose in doses if not 0 < dose < inf]:
        raise InvalidInput([f"--kl: {dose:g} is not accepted: a number of nats above 0" for dose in wrong])
    sets = drawn(harmful, harmless, draws, test)
    loaded = load(model, dtype=dtype, device=device)
    source = TransformersSource(loaded)
    layers = source.facts.layers
    at = layers * 2 // 3 if layer is None else layer
    if not 0 <= at < layers:
        raise InvalidInput(f"--layer: {at} is not accepted: the model has layers 0 to {layers - 1}")
    identity = {
        "weights": source.fingerprint(),
        "dtype": str(loaded.model.dtype),
        "prompts": [one.fingerprint for drawn_ in sets for one in (*drawn_.fitting, drawn_.validation, drawn_.test)],
        "layer": at,
        "max_tokens": max_tokens,
        "behaviour": REFUSAL.name,
    }
    output.mkdir(parents=True, exist_ok=True)
    ledger = Ledger(output / "results.jsonl", identity)
    evaluator = HFEvaluator(loaded, Steering(loaded.model, rows=3, rank=2), None, max_tokens, batch_size, progress)
    trial = DrawsTrial(source, evaluator, sets, ways, doses, at, ledger, output)
    trial.run()
    return trial


def _key(draw: int, name: str, condition: str) -> str:
    return f"draw {draw}, {name}, {condition}"
