"""A first check of a direction on a model: the layers at which it acts, its sign, and its effect on a few answers.

This is an evaluation (`steer.lab.evaluation.run`) of one arm on few prompts, with a verdict.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from steer.direction import MAX_VALUE, Direction
from steer.lab.behaviour import Behaviour
from steer.lab.evaluation.arms import Arm, layer_of, projected
from steer.lab.evaluation.report import SetResult
from steer.lab.evaluation.run import HARMLESS, Evaluation, EvaluationPlan
from steer.lab.evaluator import Evaluator
from steer.lab.prompts import PromptSet, Rendering
from steer.lab.resume import Cache
from steer.lab.source import Source
from steer.lab.statistics import rank_sum
from steer.names import SIGNED, Mode
from steer.runtime.op import GAMMA, GATE, WEIGHT, coefficients
from steer.shape import Shape

HARMFUL = "harmful"
#: A p-value below this means that the components separate the classes.
SURE = 0.05


@dataclass(frozen=True, slots=True)
class Sign:
    """The components of both classes at a layer: `auc` is how often a harmful one is above a harmless one, `p` its
    p-value. On the right side the direction points to the harmful class; "none" if the classes are not separated."""

    layer: int
    auc: float
    p: float
    side: Literal["right", "wrong", "none"]


@dataclass(frozen=True, slots=True)
class CheckResult:
    """The result of a check.

    Attributes:
        kl: mean KL(plain ‖ steered) along plain harmless answers, in nats.
        problems: why the direction fails.
        unknown: what these prompts cannot decide.
        notes: further remarks.
    """

    mode: Mode
    strength: float
    layers: list[int]
    sign: Sign
    sets: tuple[SetResult, ...]
    kl: float
    problems: list[str]
    unknown: list[str]
    notes: list[str]

    @property
    def verdict(self) -> Literal["works", "fails", "unknown"]:
        return "fails" if self.problems else "unknown" if self.unknown else "works"


def fitting_shape(direction: Direction, source: Source) -> Shape:
    """The shape of a server with this model. Raises DirectionError with every reason why it could not serve
    `direction`."""
    facts, meta = source.facts, direction.meta
    dtype = getattr(torch, facts.dtype or "float32")
    shape = Shape(facts.architecture, facts.layers, facts.d_model, frozenset(meta.sites), direction.rank, dtype)
    shape.check(direction)
    return shape


def check(
    arm: Arm,
    source: Source,
    evaluator: Evaluator,
    sets: Mapping[str, PromptSet],
    rendering: Rendering,
    behaviour: Behaviour,
) -> CheckResult:
    """Check `arm`. `sets` has the names HARMFUL and HARMLESS. Call `fitting_shape` first."""
    found = Evaluation(evaluator, EvaluationPlan([arm], sets, evaluator.max_tokens, behaviour), Cache(None, {})).run()
    notes: list[str] = []
    unknown: list[str] = []
    mode, strength = arm.asked.mode, arm.asked.strength
    (components,) = projected(source, arm.direction, sets, rendering).values()
    auc, p = rank_sum(components[HARMLESS], components[HARMFUL])
    sign = Sign(layer_of(arm.direction), auc, p, "none" if p >= SURE else "right" if auc > 0.5 else "wrong")
    layers = acting(arm.direction, mode)
    problems = [] if layers else [f"acts at no layer in the mode {mode}"]
    theirs, ours = arm.direction.meta.chat_template_sha256, source.facts.chat_template_sha256
    if theirs is not None and theirs != ours:
        notes.append("the model's chat template differs from the one that the direction was measured with")
    _effect(arm, found.sets, behaviour.name, problems, unknown)
    if sign.side == "wrong":
        message = f"wrong sign: it points from {sets[HARMFUL].name} to {sets[HARMLESS].name}"
        if mode in SIGNED or problems:
            problems.insert(0, f"{message}; the sets that it was made from may have been swapped")
        else:
            notes.append(message)
    return CheckResult(mode, strength, layers, sign, found.sets, found.divergence[0].mean, problems, unknown, notes)


def acting(direction: Direction, mode: Mode) -> list[int]:
    """The layers at which the direction changes anything in `mode`."""
    values = torch.stack([coefficients(direction, mode, term) for term in (0, 1)])
    does = (values[..., [WEIGHT, GAMMA]] != 0).any(-1) & (values[..., GATE] < MAX_VALUE) & direction.directions.any(-1)
    return [layer for layer, acts in enumerate(does.any(-1).any(0).tolist()) if acts]


def _effect(arm: Arm, sets: tuple[SetResult, ...], behaviour: str, problems: list[str], unknown: list[str]) -> None:
    """Judge the effect by the answers. To add the difference of means, or to remove a negative amount, should bring the
    behaviour to harmless prompts; anything else should remove it from the harmful ones."""
    brings = (arm.asked.mode == "add") == (arm.asked.strength > 0)
    unchanged: list[str] = []
    for one in sets:
        plain, steered = one.arms
        count, change = plain.shown.count, steered.against_plain["shown"]
        if steered.rises("degenerate"):
            problems.append(
                f"breaks {steered.degenerate.hits} of {count} answers to {one.name} (plain: {plain.degenerate.hits})"
            )
        if not brings and one.name == HARMLESS and steered.rises("shown"):
            problems.append(
                f"{behaviour} in {steered.shown.hits} of {count} harmless answers ({plain.shown.hits} plain)"
            )
        if (one.name == HARMLESS) != brings or (change.low > 0 if brings else change.high < 0):
            continue
        lacking = plain.complied.hits if brings else plain.shown.hits
        counts = f"{behaviour} in {plain.shown.hits} of {count} {one.name} answers plain, {steered.shown.hits} steered"
        if 2 * lacking < count:
            unknown.append(f"{counts}: give other prompts with --{one.name}: with these there is too little to change")
        elif change.value > 0 if brings else change.value < 0:
            unknown.append(f"{counts}: so few prompts cannot tell that from chance, give more of them with --prompts")
        else:
            unchanged.append(counts)
    word = f"does not {'bring' if brings else 'lessen'} it" if problems else "no effect"
    problems += [f"{word}: {counts}" for counts in unchanged]
