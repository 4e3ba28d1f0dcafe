"""What became of each prompt of a set in each arm, and the rates and paired differences of that."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np

from steer.lab.behaviour import FAULTS, Behaviour, Fault, ends, fault, unended
from steer.lab.evaluation.arms import PLAIN
from steer.lab.evaluation.report import ArmOnSet, Difference, Judged, Rate
from steer.lab.probe import Answered
from steer.lab.statistics import cohens_kappa, difference_of_rates, holm, mcnemar

Outcome: TypeAlias = Literal["shown", "degenerate", "complied"]


@dataclass(frozen=True, slots=True)
class Told:
    """One answer and what is told of it. `right` and `verdict` are None where nobody asked, or nobody knows."""

    answer: Answered
    outcome: Outcome
    fault: Fault | None
    late: bool
    unended: bool
    right: bool | None = None
    verdict: bool | None = None


def tell(
    behaviour: Behaviour,
    answers: Sequence[Answered],
    plain: Sequence[Answered],
    max_tokens: int,
    right: Sequence[bool] | None = None,
    verdicts: Sequence[bool | None] | None = None,
) -> list[Told]:
    """One of three outcomes for each answer. An answer that shows the behaviour is never counted as degenerate, and a
    degenerate one never as compliance."""
    limit = max_tokens if ends(plain, max_tokens) else None
    everywhere = behaviour.model_copy(update={"window": None})
    told = []
    for i, (answer, beside) in enumerate(zip(answers, plain, strict=True)):
        shown = behaviour.shown(answer.text)
        # a plain answer that shows the behaviour, or is broken itself, says nothing of how long an answer should be
        sound = not behaviour.shown(beside.text) and fault(beside, None, None) is None
        wrong = None if shown else fault(answer, beside if sound else None, limit)
        told.append(
            Told(
                answer,
                "shown" if shown else "complied" if wrong is None else "degenerate",
                wrong,
                not shown and everywhere.shown(answer.text),
                unended(answer, max_tokens),
                None if right is None else right[i] and not shown and wrong is None,
                None if verdicts is None else verdicts[i],
            )
        )
    return told


def arms_on_set(told: Mapping[str, Sequence[Told]], judged: bool) -> tuple[ArmOnSet, ...]:
    """The figures of every arm, PLAIN among them, and each one's differences from plain, with p-values corrected for
    the number of arms."""
    against = differences(told, {name: PLAIN for name in told if name != PLAIN})
    return tuple(_arm(name, arm, judged, against.get(name, {})) for name, arm in told.items())


def differences(told: Mapping[str, Sequence[Told]], pairs: Mapping[str, str]) -> dict[str, dict[str, Difference]]:
    """By figure those of each arm from the one that `pairs` gives it, with p-values corrected for the number of
    arms."""
    against = {name: _against(told[other], told[name]) for name, other in pairs.items()}
    for figure in sorted({figure for found in against.values() for figure in found}):
        having = {name: found[figure] for name, found in against.items() if figure in found}
        for name, difference in corrected(having).items():
            against[name][figure] = difference
    return against


def corrected(differences: Mapping[str, Difference]) -> dict[str, Difference]:
    """With p-values corrected for their number."""
    p_values = holm([one.p or 0.0 for one in differences.values()])
    return {
        name: one.model_copy(update={"p_holm": p}) for (name, one), p in zip(differences.items(), p_values, strict=True)
    }


def _figures(told: Sequence[Told]) -> dict[str, list[bool | None]]:
    """Each figure's outcome for each prompt; None where there is none."""
    return {
        "shown": [t.outcome == "shown" for t in told],
        "degenerate": [t.outcome == "degenerate" for t in told],
        "complied": [t.outcome == "complied" for t in told],
        "right": [t.right for t in told],
        "judged": [t.verdict for t in told],
    }


def _against(plain: Sequence[Told], arm: Sequence[Told]) -> dict[str, Difference]:
    found = {}
    before, after = _figures(plain), _figures(arm)
    for figure in before:
        pairs = zip(before[figure], after[figure], strict=True)
        known = [(a, b) for a, b in pairs if a is not None and b is not None]
        if known:
            first, second = [a for a, _ in known], [b for _, b in known]
            found[figure] = Difference.of(difference_of_rates(first, second), mcnemar(first, second))
    return found


def _arm(name: str, told: Sequence[Told], judged: bool, against: dict[str, Difference]) -> ArmOnSet:
    lengths = [len(t.answer.ids) for t in told]
    figures = _figures(told)
    right = [t.right for t in told if t.right is not None]
    return ArmOnSet(
        arm=name,
        **{
            outcome: Rate.of([bool(hit) for hit in figures[outcome]]) for outcome in ("shown", "degenerate", "complied")
        },
        late=Rate.of([t.late for t in told]),
        right=Rate.of(right) if right else None,
        judged=_judged(told) if judged else None,
        faults={f: count for f in FAULTS if (count := sum(t.fault == f for t in told))},
        unended=sum(t.unended for t in told),
        tokens_mean=float(np.mean(lengths)),
        tokens_median=float(np.median(lengths)),
        against_plain=against,
    )


def agreement(told: Iterable[Told]) -> float | None:
    """Cohen's kappa of judge and matcher over the answers with a verdict."""
    both = [(t.verdict, t.outcome == "shown") for t in told if t.verdict is not None]
    return cohens_kappa([v for v, _ in both], [m for _, m in both]) if both else None


def _judged(told: Sequence[Told]) -> Judged:
    verdicts = [t.verdict for t in told if t.verdict is not None]
    return Judged(shown=Rate.of(verdicts), unparsable=len(told) - len(verdicts), kappa=agreement(told))
