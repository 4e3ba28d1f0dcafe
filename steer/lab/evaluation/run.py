"""The evaluation itself: it measures the plain arm once, then every arm on every set, and what each arm costs on
harmless prompts and on plain text."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from steer.errors import NotFinite
from steer.lab.behaviour import REFUSAL, Behaviour
from steer.lab.evaluation import figures
from steer.lab.evaluation.arms import PLAIN, Arm, steering
from steer.lab.evaluation.report import Comparison, Difference, DivergenceOf, Dose, SetResult, TextResult
from steer.lab.evaluator import Continuation, Evaluator, Floats, Steer, named
from steer.lab.judge import Judge, judged
from steer.lab.outcome import Answer, Outcome, ends
from steer.lab.progress import answering
from steer.lab.prompts import Conversation, Prompt, PromptSet
from steer.lab.resume import Cache
from steer.lab.statistics import ratio_of_means, signed_rank
from steer.names import MAX_STRENGTH
from steer.tokenization import thinking_of

log = logging.getLogger("steer")
#: The set on whose answers the divergence is measured, and how many of its prompts are used to find a dose.
HARMLESS, DOSE_PROMPTS = "harmless", 32
#: The most strengths that are tried for one dose; and how near the KL must come to the dose, as a share of the dose.
TRIES, NEAR = 10, 0.03
#: The largest distance of the KL from the dose, as a share of the dose, for a comparison at an equal price.
FAR = 0.25
#: A KL below this, in nats, is rounding.
ROUNDING = 1e-9
#: The part of the progress that stands for the arms whose strengths are not known yet.
DOSES = "arms at doses"


@dataclass(frozen=True, slots=True)
class EvaluationPlan:
    """What an evaluation measures.

    Attributes:
        arms: the arms to measure.
        sets: the prompts, by the set's name.
        max_tokens: the limit of an answer.
        judges: judge each answer, besides the patterns of `behaviour`.
        expected: what a right answer contains, by prompt.
        text: the text whose perplexity is measured.
        doses: KLs in nats; with them, each arm is measured at the strengths at which it has these KLs.
        against: the arm that the others are compared with. If it is named without a strength, each arm is compared
            with the one of the same strength or dose.
    """

    arms: Sequence[Arm]
    sets: Mapping[str, PromptSet]
    max_tokens: int
    behaviour: Behaviour = REFUSAL
    judges: Sequence[Judge] = ()
    expected: Mapping[Prompt, figures.Expected] = field(default_factory=dict)
    text: figures.Text | None = None
    doses: Sequence[float] = ()
    against: str | None = None


@dataclass(frozen=True, slots=True)
class Measured:
    """What was measured. `rows` has every answer with its outcome, by set and arm."""

    arms: Sequence[Arm]
    doses: tuple[Dose, ...]
    sets: tuple[SetResult, ...]
    divergence: tuple[DivergenceOf, ...]
    text: TextResult | None
    comparisons: tuple[Comparison, ...]
    rows: Mapping[tuple[str, str], Sequence[figures.Row]]


class Evaluation:
    """What was measured of `plan` so far. Answers and divergences are kept in `cache`, so that they are measured only
    once."""

    def __init__(self, evaluator: Evaluator, plan: EvaluationPlan, cache: Cache) -> None:
        self.evaluator, self.plan, self.cache = evaluator, plan, cache
        self.answers: dict[tuple[str, str], list[Answer]] = {}
        self.divergences: dict[str, list[Floats]] = {}
        self.negative: dict[str, Floats] = {}
        self._continued: Sequence[Continuation] = ()

    def run(self) -> Measured:
        """Measure what is missing.

        Raises:
            SpecError: an arm is not for this model. It is raised before anything is measured.
            InvalidInput: prompts are too long for the model.
        """
        named(self.plan.arms, thinking_of(self.evaluator.tokenizer))
        self.evaluator.check_room(self.plan.sets.values())
        self._planned({})
        self._measure(None)
        doses = self._doses() if self.plan.doses else []
        for arm in self.plan.arms:
            self._measure(arm)
        all_rows: dict[tuple[str, str], list[figures.Row]] = {}
        sets = []
        for title, prompts in self.plan.sets.items():
            tells, names = self._limit_tells(title), (PLAIN, *(arm.name for arm in self.plan.arms))
            by_arm = {name: self._outcomes_of(title, prompts, name, tells) for name in names}
            all_rows |= {(title, name): rows for name, rows in by_arm.items()}
            sets.append(
                SetResult(
                    name=title,
                    dataset=prompts.dataset,
                    multi_turn=sum(isinstance(p, Conversation) and p.several for p in prompts.prompts),
                    limit_tells=tells,
                    arms=figures.arms_on_set(by_arm),
                )
            )
        text = None if self.plan.text is None else figures.text_result(self.plan.text, self.negative)
        divergence = tuple(DivergenceOf.of(name, HARMLESS, rows) for name, rows in self.divergences.items())
        beside = _beside(self.plan, doses, all_rows, self.divergences)
        return Measured(self.plan.arms, tuple(doses), tuple(sets), divergence, text, beside, all_rows)

    def _planned(self, before: Mapping[str, float]) -> None:
        for part, work in (dict(before) | parts_of(self.plan)).items():
            self.evaluator.progress.plan(part, work)

    def _measure(self, arm: Arm | None) -> None:
        plan, progress, name = self.plan, self.evaluator.progress, _name(arm)
        with steering(self.evaluator, arm) as steer:
            for title, prompts in plan.sets.items():
                with progress.part(f"{title}, {name}"):
                    self.answers[title, name] = self._answers(title, prompts, arm, steer)
            if plan.text is not None:
                with progress.part(f"text, {name}"):
                    self.negative[name] = self._read(plan.text, arm, steer)
            if arm is not None and HARMLESS in plan.sets:
                with progress.part(f"divergence, {name}"):
                    self.divergences[name] = self._diverge(arm, steer)

    def _doses(self) -> list[Dose]:
        """Find the strengths at which the arms have the doses. The arms at these strengths replace the plan's arms."""
        doses, arms = list[Dose](), dict[str, Arm]()
        for arm in self.plan.arms:
            for dose in self.plan.doses:
                with self.evaluator.progress.part(f"{arm.way} at KL {dose:g}"):
                    found = self._at_dose(arm, dose)
                doses.append(Dose(way=arm.way, kl=dose, strength=found.asked.strength if found else None))
                if found:
                    arms.setdefault(found.name, found)
        self.plan = replace(self.plan, arms=list(arms.values()), doses=())
        self._planned({DOSES: 0.0})
        return doses

    def _outcomes_of(self, title: str, prompts: PromptSet, name: str, tells: bool) -> list[figures.Row]:
        """The outcomes of the answers to a set in the arm `name`. `tells`: whether an answer that reaches the limit is
        a runaway."""
        given = self.answers[title, name]
        texts = [answer.text for answer in given]
        with self.evaluator.progress.part(f"judging {title}, {name}"):
            verdicts = {judge.name: self._verdicts(judge, title, name, prompts, texts) for judge in self.plan.judges}
        known = figures.right(self.plan.expected, prompts.prompts, texts)
        plain = self.answers[title, PLAIN]
        limit = self.plan.max_tokens
        return figures.rows_of(self.plan.behaviour, prompts.prompts, given, plain, limit, known, verdicts, tells)

    def _limit_tells(self, title: str) -> bool:
        """Whether an answer to a set that reaches the limit is a runaway. The plain answers to the set and to harmless
        prompts decide that (`ends`)."""
        plain = [
            self.answers[name, PLAIN] for name in dict.fromkeys((title, HARMLESS)) if (name, PLAIN) in self.answers
        ]
        return ends(self.plan.behaviour, [answer for answers in plain for answer in answers], self.plan.max_tokens)

    def _conditions(self, prompts: PromptSet, arm: Arm | None) -> dict[str, Any]:
        return {"sha256": prompts.sha256, "max_tokens": self.plan.max_tokens} | _identity(arm)

    def _answers(self, title: str, prompts: PromptSet, arm: Arm | None, steer: Steer) -> list[Answer]:
        def make(start: int, stop: int) -> list[Any]:
            return [asdict(answer) for answer in self.evaluator.answers(prompts.prompts[start:stop], steer)]

        conditions = self._conditions(prompts, arm)
        rows = self.cache.rows(f"{title}.{_name(arm)}.answers", conditions, len(prompts), make)
        return [Answer(**row) for row in rows]

    def _along(self) -> Sequence[Continuation]:
        """The plain answers along which divergences are measured. They are computed at the first call, so not at all if
        the cache has every divergence."""
        if not self._continued:
            prompts = self.plan.sets[HARMLESS].prompts
            self._continued = self.evaluator.continuations(prompts, self.answers[HARMLESS, PLAIN])
        return self._continued

    def _diverge(self, arm: Arm, steer: Steer) -> list[Floats]:
        prompts = self.plan.sets[HARMLESS]

        def make(start: int, stop: int) -> list[Any]:
            found = self.evaluator.divergences(prompts.prompts[start:stop], self._along()[start:stop], steer)
            return [row.tolist() for row in found]

        conditions = self._conditions(prompts, arm)
        rows = self.cache.rows(f"{HARMLESS}.{arm.name}.divergence", conditions, len(prompts), make)
        return [np.array(row) for row in rows]

    def _at_dose(self, arm: Arm, dose: float) -> Arm | None:
        """`arm` at the strength at which its KL on at most DOSE_PROMPTS of the harmless prompts, drawn at random, is
        `dose`; None if no strength is found."""
        prompts = self.plan.sets[HARMLESS]
        drawn = sorted(random.Random(0).sample(range(len(prompts)), min(DOSE_PROMPTS, len(prompts))))

        def measured(tried: Arm) -> float:
            along = self._along()
            with steering(self.evaluator, tried) as steer:
                try:
                    asked = [prompts.prompts[i] for i in drawn]
                    found = self.evaluator.divergences(asked, [along[i] for i in drawn], steer)
                except NotFinite:
                    return math.inf
            return float(np.mean([row.mean() for row in found]))

        def kl(strength: float) -> float:
            tried = arm.asking(strength=math.copysign(strength, arm.asked.strength))
            conditions = self._conditions(prompts, tried) | {"prompts": len(drawn)}
            value = float(self.cache.value(f"{HARMLESS}.{tried.name}.dose", conditions, partial(measured, tried)))
            message = f"{tried.name}: KL {value:.5f} on {len(drawn)} prompts, {dose:g} is asked for"
            self.evaluator.progress.write(message)
            return value

        strength = strength_at(dose, kl)
        if strength is None:
            log.warning("%s: no strength up to %g has a KL of %g", arm.way, MAX_STRENGTH, dose)
            return None
        return arm.asking(strength=math.copysign(strength, arm.asked.strength))

    def _verdicts(
        self, judge: Judge, title: str, arm: str, prompts: PromptSet, texts: Sequence[str]
    ) -> list[Outcome | None]:
        def make(start: int, stop: int) -> list[Any]:
            return judged(judge, prompts.prompts[start:stop], texts[start:stop])

        name = f"{title}.{arm}.verdicts-{judge.name.replace('/', '_')}"
        answers = hashlib.sha256(json.dumps(texts).encode()).hexdigest()
        conditions = {"sha256": prompts.sha256, "answers": answers} | judge.identity
        return self.cache.rows(name, conditions, len(prompts), make)

    def _read(self, text: figures.Text, arm: Arm | None, steer: Steer) -> Floats:
        def make() -> list[float]:
            return [float(v) for v in figures.negative_log_likelihoods(self.evaluator, text, steer)]

        conditions = {"sha256": text.dataset.sha256} | _identity(arm)
        return np.array(self.cache.value(f"text.{_name(arm)}", conditions, make))


def _beside(
    plan: EvaluationPlan,
    doses: Sequence[Dose],
    rows: Mapping[tuple[str, str], Sequence[figures.Row]],
    divergences: Mapping[str, Sequence[Floats]],
) -> tuple[Comparison, ...]:
    """Compare each arm with the arm that `plan.against` names."""
    size = {arm.name: arm.asked.strength for arm in plan.arms}
    size |= {f"{one.way}={one.strength:g}": one.kl for one in doses if one.strength is not None}
    pairs = {
        arm.name: other.name
        for arm in plan.arms
        for other in plan.arms
        if other.name != arm.name
        if other.name == plan.against or (other.way == plan.against and size[other.name] == size[arm.name])
    }
    rates = {
        title: figures.differences({name: own for (where, name), own in rows.items() if where == title}, pairs)
        for title in plan.sets
    }
    kls = {name: np.array([max(row.mean(), ROUNDING) for row in rows]) for name, rows in divergences.items()}
    ratios = {
        name: Difference.of(ratio_of_means(kls[other], kls[name]), signed_rank(np.log(kls[other]), np.log(kls[name])))
        for name, other in pairs.items()
        if kls and kls[other].max() > ROUNDING  # a ratio to a KL that is rounding means nothing
    }
    ratios = figures.corrected(ratios)
    return tuple(
        Comparison(
            arm=name, against=other, sets={title: found[name] for title, found in rates.items()}, kl=ratios.get(name)
        )
        for name, other in pairs.items()
    )


def parts_of(plan: EvaluationPlan) -> dict[str, float]:
    """The work of each part of the progress, by the part's name."""
    if plan.doses:
        count = min(DOSE_PROMPTS, len(plan.sets[HARMLESS]))
        each, plain = (sum(parts_of(replace(plan, arms=arms, doses=())).values()) for arms in (plan.arms, ()))
        return (
            parts_of(replace(plan, arms=(), doses=()))
            | {f"{arm.way} at KL {dose:g}": float(count * TRIES) for arm in plan.arms for dose in plan.doses}
            | {DOSES: (each - plain) * len(plan.doses)}
        )
    found: dict[str, float] = {}
    for name in (PLAIN, *(arm.name for arm in plan.arms)):
        for title, prompts in plan.sets.items():
            found[f"{title}, {name}"] = len(prompts) * answering(plan.max_tokens)
            if plan.judges:
                found[f"judging {title}, {name}"] = len(prompts) * len(plan.judges)
        if plan.text is not None:
            found[f"text, {name}"] = len(plan.text.pieces)
        if name != PLAIN and HARMLESS in plan.sets:
            found[f"divergence, {name}"] = len(plan.sets[HARMLESS])
    return found


def _name(arm: Arm | None) -> str:
    return arm.name if arm else PLAIN


def _identity(arm: Arm | None) -> dict[str, Any]:
    if arm is None:
        return {"arm": PLAIN}
    condition = arm.asked.condition
    return {"arm": arm.name, "digest": arm.asked.digest} | ({"probe": condition.digest} if condition else {})


def strength_at(dose: float, kl: Callable[[float], float]) -> float | None:
    """A strength up to MAX_STRENGTH, of four digits, at which `kl` is `dose`: the nearest of those that were tried.

    The search keeps a bracket: the KL is below the dose at its lower end and above the dose at its upper end. So there
    is a crossing inside it, although the KL need not rise everywhere. The next strength to try is the one at which a
    power law through both ends has the dose; if the lower end is 0, the law is a square, as the KL of a small change
    is. The middle is tried instead if two strengths in a row were on the same side of the dose, or if the power law's
    strength is not inside the bracket.

    Returns:
        The strength; None if no KL comes within FAR of the dose, because it jumps over the dose or stays below it.
    """
    low, high, tried, sides = (0.0, 0.0), (math.inf, math.inf), dict[float, float](), [0, 0]
    at = 1.0
    for _ in range(TRIES):
        at = float(f"{at:.4g}")
        if at in tried:
            break
        found = tried[at] = kl(at)
        if abs(found - dose) <= NEAR * dose:
            break
        sides = [sides[1], 1 if found > dose else -1]
        low, high = (low, (at, found)) if found > dose else ((at, found), high)
        if low[0] == MAX_STRENGTH:
            return None
        if math.isinf(high[0]):
            at = min(MAX_STRENGTH, low[0] * min(4.0, max(1.25, math.sqrt(dose / low[1]) if low[1] > 0 else 4.0)))
            continue
        if low[1] > 0:
            power = math.log(high[1] / low[1]) / math.log(high[0] / low[0])
            at = low[0] * (dose / low[1]) ** (1 / power)
        else:
            at = high[0] * math.sqrt(dose / high[1])
        if sides[0] == sides[1] or not low[0] < float(f"{at:.4g}") < high[0]:
            at = (low[0] + high[0]) / 2
    best = min(tried, key=lambda strength: abs(math.log(max(tried[strength], 1e-300) / dose)))
    return best if abs(tried[best] - dose) <= FAR * dose else None
