"""Find the condition that separates two sets of prompts: chosen on a part of the prompts, counted on the others."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass

import numpy as np
import torch
from sklearn.metrics import roc_curve
from torch import Tensor

from steer.direction import Direction, FoundCondition
from steer.errors import InvalidInput, NothingFound, SpecError
from steer.lab.evaluation.check import fitting_shape
from steer.lab.evaluation.report import Rate
from steer.lab.evaluator import Floats
from steer.lab.measure import MeasurementOptions, checked
from steer.lab.progress import Progress
from steer.lab.prompts import Rendering, Split
from steer.lab.source import Source, prompt_components
from steer.lab.statistics import Estimate, mean_of_rates, rank_sum, undominated
from steer.lab.tables import shown
from steer.runtime.bank import probe_of
from steer.runtime.op import decided
from steer.shape import Shape
from steer.spec import Condition, Entry, RequestedDirection, text

#: The name of this part of a command's progress.
READING = "reading components"
#: The balanced accuracy on other prompts must surely be above this: half of the way from chance to no error.
LEAST = 0.75


@dataclass(frozen=True, slots=True)
class Cut:
    """A condition, and its balanced accuracy (the mean of both classes' shares of right decisions) on the prompts that
    chose its threshold."""

    condition: Condition
    accuracy: float


@dataclass(frozen=True, slots=True)
class ChosenCondition:
    """The best condition, and its results on prompts that did not choose it.

    Attributes:
        front: the conditions that are better than all at earlier layers; the last one is the best.
        harmful, harmless: whether each of the other prompts meets it.
        auc: how often a harmful one of these is farther on its side than a harmless one.
    """

    front: tuple[Cut, ...]
    harmful: tuple[bool, ...]
    harmless: tuple[bool, ...]
    auc: float

    @property
    def condition(self) -> Condition:
        return self.front[-1].condition

    def kept(self, split: Split, rendering: Rendering) -> FoundCondition:
        """The condition as a direction's file keeps it; `split` and `rendering` are those that it was found with."""
        return FoundCondition(
            layer=self.condition.layer,
            above=self.condition.above,
            below=self.condition.below,
            harmful=split.tried_harmful.dataset,
            harmless=split.tried_harmless.dataset,
            missed=self.harmful.count(False),
            caught=self.harmless.count(True),
            **asdict(rendering),
        )

    @property
    def balanced_accuracy(self) -> Estimate:
        """The balanced accuracy on prompts that did not choose it."""
        return mean_of_rates(self.harmful, [not met for met in self.harmless])


def find(
    source: Source,
    direction: Direction,
    name: str,
    split: Split,
    rendering: Rendering | None = None,
    layer: int | None = None,
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> ChosenCondition:
    """Find the condition on `direction` that harmful prompts meet and harmless ones do not: the one with the highest
    balanced accuracy on the prompts that choose it. Of equal ones it is the first, since steering acts after it.

    Args:
        name: of the direction in requests.
        split: at least SMALL prompts of each set, and the others that count the errors.
        layer: try only this layer; None tries all.

    Raises:
        InvalidInput: components are not finite.
        DirectionError: the direction does not fit the model.
        SpecError: no condition can be on this direction.
        NothingFound: the balanced accuracy on the other prompts is not surely above LEAST.
    """
    assert split.harmful is not split.tried_harmful, "some prompts are set aside"
    shape, progress = fitting_shape(direction, source), progress or Progress()
    layers = _decidable(shape, direction, name, range(shape.layers) if layer is None else [layer])
    pairs = (split.harmful, split.harmless), (split.tried_harmful, split.tried_harmless)
    progress.plan(READING, sum(len(prompts) for pair in pairs for prompts in pair))
    rows = direction.directions[: layers[-1] + 1, 0]
    with progress.part(READING):
        harmful, harmless, *others = (
            prompt_components(source, rows, encoded, batch_size, progress)
            for pair in pairs
            for encoded in checked(source, *pair, MeasurementOptions(rendering=rendering or Rendering()))[0].values()
        )
    if bad := torch.nonzero(~torch.cat([harmful, harmless, *others], 1).isfinite().all(1)).flatten().tolist():
        raise InvalidInput(f"components are not finite at layers {bad}; try --dtype float32 or bfloat16")
    cuts = [_cut(name, at, harmful[at].double().numpy(), harmless[at].double().numpy()) for at in layers]
    front = undominated(cuts, lambda cut: (cut.condition.layer, -cut.accuracy))
    condition = front[-1].condition
    met, wrongly = (_met(condition, each[condition.layer]) for each in others)
    near, far = (each[condition.layer].tolist() for each in (others if condition.above is None else others[::-1]))
    found = ChosenCondition(tuple(front), tuple(met.tolist()), tuple(wrongly.tolist()), rank_sum(near, far)[0])
    if found.balanced_accuracy.low <= LEAST:
        raise NothingFound(
            f"no condition on '{name}' tells the sets apart: the best is {condition}, whose balanced accuracy is "
            f"{_percent(found.balanced_accuracy)} on prompts that did not choose it, and not surely above {LEAST:.0%}. "
            "Try a direction that was made from these sets (`steer derive --layer all` gives each layer its own), or "
            "give more prompts"
        )
    return found


def describe(found: ChosenCondition, split: Split) -> list[str]:
    """Describe the condition and its errors on prompts that did not choose it, for a terminal."""
    missed, caught = Rate.of([not met for met in found.harmful]), Rate.of(found.harmless)
    rows = [[str(cut.condition), f"{cut.accuracy:.1%}", ""] for cut in found.front]
    rows[-1][-1] = "chosen"
    spec = text([RequestedDirection(found.condition.direction, condition=found.condition)])
    return [
        shown(
            ("condition", f"balanced accuracy on {len(split.harmful)} + {len(split.harmless)} prompts", "note"), rows
        ),
        f"on prompts that did not choose it: balanced accuracy {_percent(found.balanced_accuracy)}, "
        f"AUC {found.auc:.3f}",
        f"{split.tried_harmful.name}: {missed} do not meet it (false negatives)",
        f"{split.tried_harmless.name}: {caught} meet it (false positives)",
        f'in a request: "steer": "{spec}", or another direction in front of the question mark',
    ]


def _percent(estimate: Estimate) -> str:
    return f"{estimate.value:.1%} ({estimate.low:.1%} – {estimate.high:.1%})"


def _decidable(shape: Shape, direction: Direction, name: str, layers: Iterable[int]) -> list[int]:
    """The `layers` at which a server accepts a condition on `direction`."""
    found, refused = [], None
    for layer in layers:
        entry = Entry(name, "", direction.meta.mode, 1.0, condition=Condition(name, layer, above=0.0))
        try:
            shape.after_condition(direction, entry)
            found.append(layer)
        except SpecError as error:
            refused = error
    if refused is not None and not found:
        raise refused
    return found


def _cut(name: str, layer: int, harmful: Floats, harmless: Floats) -> Cut:
    """The condition at a layer with the highest balanced accuracy, of the components there. Source: Youden 1950."""
    values, labels = np.concatenate([harmful, harmless]), np.repeat([1, 0], [len(harmful), len(harmless)])
    wrong, right, steps = roc_curve(labels, values, drop_intermediate=False)
    youden, gaps = (right - wrong)[1:-1], steps[1:-1] - steps[2:]
    if not len(gaps):  # all are equal
        return Cut(Condition(name, layer, above=0.0), 0.5)
    best = max(range(len(gaps)), key=lambda i: (abs(youden[i]), gaps[i]))
    number = _between(float(steps[best + 2]), float(steps[best + 1]))
    above, below = (number, None) if youden[best] >= 0 else (None, number)
    return Cut(Condition(name, layer, above, below), (1 + abs(youden[best])) / 2)


def _between(low: float, high: float) -> float:
    """The number with the fewest digits in the middle half of the interval."""
    middle, reach = (low + high) / 2, (high - low) / 4
    rounded = (float(f"{middle:.{digits}g}") for digits in range(1, 18))
    return next(number for number in rounded if abs(number - middle) <= reach)


def _met(condition: Condition, components: Tensor) -> Tensor:
    """Whether each of these components meets the condition, by the engine's rule, `[...]` bool."""
    probe = probe_of(condition)
    numbers = torch.tensor(probe.deciding), torch.tensor(probe.threshold)
    return decided(components, torch.zeros_like(components, dtype=torch.bool), *numbers, abs(probe.deciding))
