"""The results of an evaluation, as in `report.json`."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Literal

import numpy as np
from pydantic import BaseModel, Field, JsonValue

from steer._version import TOOL, made_at
from steer.direction import Dataset
from steer.lab.evaluation.arms import Arm
from steer.lab.evaluator import Floats
from steer.lab.statistics import Estimate, mean_of, wilson
from steer.names import Mode

#: From this share of answers on, more than plain, broken answers count as harm.
HARM = 0.02


class ReportPart(BaseModel, frozen=True, extra="forbid", allow_inf_nan=False):
    """A part of a report."""


class Rate(ReportPart):
    """`hits` of `count`, with the 95 % interval of Wilson."""

    hits: int
    count: int
    rate: float
    low: float
    high: float

    @classmethod
    def of(cls, outcomes: Sequence[bool]) -> Rate:
        hits, count = sum(outcomes), len(outcomes)
        low, high = wilson(hits, count)
        return cls(hits=hits, count=count, rate=hits / count if count else 0.0, low=low, high=high)

    def __str__(self) -> str:
        return f"{self.hits} of {self.count} ({self.low:.1%} – {self.high:.1%})"


class Difference(ReportPart):
    """The difference of a figure between an arm and another on the same prompts (for KL and perplexity the quotient),
    with its 95 % interval."""

    value: float
    low: float
    high: float
    p: float | None = Field(
        default=None, description="two-sided: McNemar's exact test of rates, Wilcoxon's signed ranks of the log of KLs"
    )
    p_holm: float | None = Field(default=None, description="p corrected (Holm) for the number of arms")

    @classmethod
    def of(cls, estimate: Estimate, p: float | None = None) -> Difference:
        return cls(value=estimate.value, low=estimate.low, high=estimate.high, p=p)


class Judged(ReportPart):
    shown: Rate = Field(description="among the answers with a verdict")
    deflected: int = Field(description="answers to something else")
    silent: int = Field(description="answers without a verdict: the reply has none, or there was nothing to judge")


class Agreement(ReportPart):
    """Cohen's kappa of two raters (the matcher is one too) over the answers with a verdict of both, with its 95 %
    interval. There is none if a rater gives every answer the same verdict."""

    first: str
    second: str
    count: int
    kappa: float
    low: float
    high: float


class ArmOnSet(ReportPart):
    """One arm on one set. Each answer has exactly one of the first six outcomes."""

    arm: str
    shown: Rate = Field(description="the matcher finds the behaviour")
    late: Rate = Field(description="begins as an answer and shows the behaviour near its end")
    unanswered: Rate = Field(description="cut before it said anything")
    degenerate: Rate = Field(description="not an answer: see faults")
    deflected: Rate = Field(description="answers something else, according to a judge")
    complied: Rate = Field(description="none of these")
    right: Rate | None = Field(default=None, description="complied, and as expected")
    judged: dict[str, Judged] = Field(default_factory=dict, description="by judge")
    faults: dict[str, int] = Field(description="degenerate answers by their first fault")
    unended: int = Field(description="answers that reached the limit, whether or not that counts as a fault")
    tokens_mean: float
    tokens_median: float
    against_plain: dict[str, Difference] = Field(default_factory=dict, description="by figure")

    def rises(self, figure: str) -> bool:
        """Whether more answers have it than plain ones, by more than HARM and by at least two. This is not a test with
        an interval, which excludes hardly anything with few prompts: for harm a sign of it is enough."""
        more = self.against_plain[figure].value if figure in self.against_plain else 0.0
        return more > HARM and round(more * self.shown.count) >= 2


class SetResult(ReportPart):
    name: str
    dataset: Dataset
    multi_turn: int = Field(description="prompts that are conversations of more than one turn")
    limit_tells: bool = Field(description="plain answers end before the limit, so an answer without an end is a fault")
    arms: tuple[ArmOnSet, ...]


class SteeredArm(ReportPart):
    name: str
    file: str
    digest: str
    method: str
    mode: Mode
    strength: float
    layers: str | None = None
    tokens: str | None = None
    shift: float | None = None
    norm_preserving: bool | None = None
    condition: str | None = None

    @classmethod
    def of(cls, arm: Arm) -> SteeredArm:
        asked = arm.asked
        return cls(
            name=arm.name,
            file=asked.direction,
            digest=asked.digest,
            method=arm.direction.meta.method,
            **{
                name: getattr(asked, name)
                for name in ("mode", "strength", "layers", "tokens", "shift", "norm_preserving")
            },
            condition=asked.condition and str(asked.condition),
        )

    @property
    def way(self) -> str:
        """Its name without the strength."""
        return self.name.rpartition("=")[0]


class DivergenceOf(ReportPart):
    """KL(plain ‖ steered) in nats along plain answers to the set `on`: statistics over prompts, of the mean over tokens
    and of the first token."""

    arm: str
    on: str
    mean: float
    low: float = Field(description="end of the mean's 95 % interval, by the bootstrap over prompts")
    high: float
    median: float
    p95: float
    first_mean: float
    first_median: float
    first_p95: float

    @classmethod
    def of(cls, arm: str, on: str, rows: Sequence[Floats]) -> DivergenceOf:
        """From the divergence `[tokens]` of each prompt's answer."""
        each, first = np.array([row.mean() for row in rows]), np.array([row[0] for row in rows])
        mean = mean_of(each)
        return cls(
            arm=arm,
            on=on,
            mean=mean.value,
            low=mean.low,
            high=mean.high,
            median=float(np.median(each)),
            p95=float(np.percentile(each, 95)),
            first_mean=float(first.mean()),
            first_median=float(np.median(first)),
            first_p95=float(np.percentile(first, 95)),
        )


class Dose(ReportPart):
    """A KL that was asked for, and the strength at which a way of steering has it, found on a part of the prompts."""

    way: str
    kl: float
    strength: float | None = Field(description="null if no accepted strength reaches it")


class Comparison(ReportPart):
    """An arm compared with another steered one."""

    arm: str
    against: str
    sets: dict[str, dict[str, Difference]] = Field(description="by set and figure")
    kl: Difference | None = Field(description="mean KL ÷ that of the other, paired bootstrap over prompts")


class PerplexityOf(ReportPart):
    arm: str
    perplexity: float
    ratio: Difference | None = Field(default=None, description="÷ plain, paired bootstrap over blocks of tokens")


class TextResult(ReportPart):
    dataset: Dataset
    tokens: int
    arms: tuple[PerplexityOf, ...]


class TaskScore(ReportPart):
    """One metric of one task of lm_eval in one arm."""

    task: str
    metric: str
    arm: str
    samples: int
    value: float
    against_plain: Difference | None = None


class RunSettings(ReportPart):
    """The settings of the evaluation."""

    model: str
    revision: str | None
    backend: str
    dtype: str
    system_prompt: str | None
    template: dict[str, JsonValue] = {}
    response_prefix: str = ""
    max_tokens: int
    behaviour: str
    judges: tuple[str, ...] = ()
    tasks_url: str | None = None
    software: dict[str, str]


class Report(ReportPart):
    schema_version: Literal[2] = 2
    tool: str = TOOL
    created: str = Field(default_factory=made_at)
    conditions: RunSettings
    arms: tuple[SteeredArm, ...]
    sets: tuple[SetResult, ...]
    divergence: tuple[DivergenceOf, ...]
    doses: tuple[Dose, ...] = ()
    comparisons: tuple[Comparison, ...] = ()
    agreements: tuple[Agreement, ...] = Field(
        default=(), description="over all answers: within an arm they may hardly vary"
    )
    text: TextResult | None = None
    tasks: tuple[TaskScore, ...] = ()

    def calibrated(self, file: str) -> dict[Mode, tuple[float, float]]:
        """Return for each mode the lowest and the highest strength up to which no tried strength of `file` did harm:
        more degenerate answers in any set, or more of the behaviour on harmless prompts."""
        harmed = {
            arm.arm
            for each in self.sets
            for arm in each.arms
            if arm.rises("degenerate") or (each.name == "harmless" and arm.rises("shown"))
        }
        tried = sorted((arm for arm in self.arms if arm.file == file), key=lambda arm: abs(arm.strength))
        found: dict[Mode, tuple[float, float]] = {}
        for mode in dict.fromkeys(arm.mode for arm in tried):
            ends = [0.0, 0.0]
            for side, sign in enumerate((-1, 1)):
                arms = (arm for arm in tried if arm.mode == mode and arm.strength * sign > 0)
                for arm in itertools.takewhile(lambda arm: arm.name not in harmed, arms):
                    ends[side] = arm.strength
            found[mode] = (ends[0], ends[1])
        return found
