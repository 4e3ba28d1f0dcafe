"""Fitting by effect: what is not given is chosen by its effect on prompts that were not measured.

Layer, method and action are chosen one after the other, which takes a tenth of the time of a whole grid. A direction
that does nothing, or does harm, is refused.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import re
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from steer._version import __version__
from steer.direction import Direction
from steer.errors import DegenerateError, InvalidInput, NothingFound
from steer.lab import select
from steer.lab.behaviour import REFUSAL, Behaviour
from steer.lab.derive import Recipe, derive
from steer.lab.evaluator import Evaluator, first_tokens
from steer.lab.judge import Judge
from steer.lab.measure import MeasurementOptions, checked, measure
from steer.lab.measurement import Measurement
from steer.lab.methods import make_method
from steer.lab.methods.base import Method
from steer.lab.progress import answering
from steer.lab.prompts import TRIED, PromptSet, Split
from steer.lab.race import Figures, Race, Sets
from steer.lab.resume import Alone, Cache
from steer.lab.source import Source
from steer.lab.statistics import mcnemar, mean_of, wilson
from steer.lab.tables import shown
from steer.names import MAX_STRENGTH, TURNING, Mode, Site, site_problem

log = logging.getLogger("steer")
#: The most tokens of a candidate's answer.
TOKENS = 24
#: The name of a part of a command's progress, and the least number of prompts of a set to measure, if it has as many.
SORTING, LEAST_KEPT = "sorting prompts", 16
#: Matches the name of each file and folder in a folder with the work of fits.
PART = re.compile(rf"[0-9a-f]{{16}}|{re.escape(Alone.file)}")
#: Limits of `fit`: the source layers that are screened, the best of these at which the other methods are screened, the
#: best candidates of which winsorized ones and other actions are screened, and the candidates that answer.
LAYERS, KEPT_LAYERS, KEPT, FINALISTS = 6, 2, 3, 5
#: The values of slerp's t that `fit` tries. Linear belongs to this family too: its t is from −2.3 to 0 on real models.
TS = (0.0, -1.0, -0.5, 0.5, 1.0)
#: The largest accepted chance that any candidate passes although none shows less than the plain model; and the largest
#: share of harmless answers that may become worse (one answer may in any case).
SIGNIFICANT, HARM = 0.05, 0.03
#: The share of harmful prompts without a good answer (see `Figures.left`) above which there is a warning.
LEFT = 0.05


@dataclass(frozen=True, slots=True)
class Choice:
    """What `fit` chooses among, one thing after the other. A tuple with a single item leaves no choice.

    The layers are compared with the first method and the first action.

    Attributes:
        layers: source layers; "auto" means all layers whose class means are far enough apart.
        winsorize: quantiles that the best candidates are tried with.
    """

    methods: tuple[Method, ...] = field(
        default_factory=lambda: (*(make_method("slerp", {"t": t}) for t in TS), make_method("linear"))
    )
    layers: tuple[int | Literal["widest", "all"], ...] | Literal["auto"] = "auto"
    actions: tuple[select.Action, ...] = (
        select.Action("one_sided", threshold=0.25, target=0.0),
        select.Action("one_sided", threshold=0.25, target=-0.75),
        select.Action("one_sided", threshold=0.5, target=0.0),
        select.Action("one_sided", threshold=0.5, target=-0.75),
        select.Action("ablate"),
        select.Action("ablate", strength=0.7),
    )
    winsorize: tuple[float, ...] = (0.995,)

    @property
    def rank(self) -> int:
        """The most rows of a direction of this choice that act on a token."""
        turning = any(action.mode in TURNING for action in self.actions)
        return max(1 + turning, *(int(getattr(method, "rank", 1)) for method in self.methods))

    @property
    def needs_vectors(self) -> bool:
        """Whether any candidate of this choice needs the prompts' own vectors."""
        return bool(self.winsorize) or any(method.needs != "means" for method in self.methods)

    @classmethod
    def of(
        cls,
        method: Method | None = None,
        layer: int | Literal["auto", "widest", "all"] = "auto",
        mode: Mode | None = None,
        strength: float | None = None,
        threshold: float | None = None,
        target: float | None = None,
        sites: tuple[Site, ...] = ("resid_post",),
    ) -> Choice:
        """Return the choice that is left if some of it is given (None or "auto": not given).

        `add` is tried at the strength −1, against the behaviour. `one_sided` is tried only with methods of one row,
        because further rows hardly ever tell the classes apart.

        Raises InvalidInput for arguments that do not go together.
        """
        every = cls()
        if mode is not None and (problem := site_problem(sites, mode)):
            raise InvalidInput(f"--mode: {problem}")
        if strength is not None and not (math.isfinite(strength) and 0 < abs(strength) <= MAX_STRENGTH):
            raise InvalidInput(f"--strength: must be within ±{MAX_STRENGTH:g} and not 0, got {strength:g}")
        one_row = getattr(method, "rank", 1) == 1
        if mode == "one_sided" and not one_row:
            raise InvalidInput("--mode: one_sided is for methods of one row")
        offered = [
            a for a in every.actions if (one_row or a.mode != "one_sided") and site_problem(sites, a.mode) is None
        ]
        given = select.Action(mode or "ablate", -1.0 if mode == "add" else 1.0)
        actions = tuple(a for a in offered if mode in (None, a.mode)) or (given,)
        if threshold is not None or target is not None:
            if mode not in (None, "one_sided") or not any(a.mode == "one_sided" for a in offered):
                raise InvalidInput(
                    "--threshold and --target: are numbers of the mode one_sided, which is for methods of one row at "
                    "the site resid_post"
                )
            actions = (select.Action("one_sided", 1.0, threshold, target),)
        if strength is not None:
            actions = tuple(dict.fromkeys(replace(action, strength=strength) for action in actions))
        for action in actions:
            Recipe(sites=sites, **asdict(action))
        return cls(
            every.methods if method is None else (method,),
            "auto" if layer == "auto" else (layer,),
            actions,
            every.winsorize if method is None else (),
        )

    @property
    def most_screened(self) -> int:
        """The most candidates that are screened."""
        layers = LAYERS if self.layers == "auto" else len(self.layers)
        return (
            layers + (len(self.methods) - 1) * KEPT_LAYERS + len(self.winsorize) * KEPT + (len(self.actions) - 1) * KEPT
        )


class Work:
    """The results that a fit has measured so far, in a folder; if it is interrupted, the same fit continues with them.

    Fits of other models, sets or options use other subfolders. Fits that differ only in their `Choice` share the
    results that they have in common.

    Raises InvalidInput for prompts that cannot be measured, and for a folder that is in use or holds other files.
    """

    def __init__(
        self,
        folder: Path,
        source: Source,
        split: Split,
        options: MeasurementOptions,
        behaviour: Behaviour,
        tokens: int,
        judge: Judge | None = None,
    ) -> None:
        self.whole, self.source, self.split, self.options = folder, source, split, options
        self.behaviour = behaviour
        checked(source, split.harmful, split.harmless, options)
        checked(source, split.tried_harmful, split.tried_harmless, options, tokens)
        everything = {
            "model": source.facts.model_dump(mode="json"),
            "weights": source.fingerprint(),
            "sets": {name: getattr(split, name).fingerprint for name in Split.__slots__},
            "conditions": asdict(options),
            "behaviour": behaviour.model_dump(mode="json"),
            "tokens": tokens,
            "judge": judge and judge.identity,
            "version": __version__,
        }
        name = hashlib.sha256(json.dumps(everything, sort_keys=True).encode()).hexdigest()[:16]
        if folder.exists() and not (folder.is_dir() and all(PART.fullmatch(one.name) for one in folder.iterdir())):
            raise InvalidInput(f"{folder}: is not the folder of an interrupted fit, but has its name: move it away")
        self.folder = folder / name
        self.folder.mkdir(parents=True, exist_ok=True)
        self._alone = Alone(folder)  # without it, the last of two fits with the same output would win
        self.cache = Cache(self.folder, {})

    def measured(self, evaluator: Evaluator, batch_size: int | None = None) -> Measurement:
        """Return the measurement of the prompts that the plain model treats as their class.

        Results that are in the folder already are used, and the others are added to it.
        """
        path, progress = self.folder / "measurement.safetensors", evaluator.progress
        if path.exists():
            return Measurement.load(path)
        progress.plan(SORTING, len(self.split.harmful) + len(self.split.harmless))
        with progress.part(SORTING):
            harmful, harmless = self._kept(evaluator, "harmful", 1.0), self._kept(evaluator, "harmless", -1.0)
        found = measure(
            self.source,
            harmful,
            harmless,
            self.options,
            batch_size=batch_size,
            progress=progress,
            partial=path.with_suffix(".part"),
        )
        found.save(path)
        return found

    def _kept(self, evaluator: Evaluator, name: str, sign: float) -> PromptSet:
        """Return the prompts of a set whose answers probably begin as answers of their class do.

        At least LEAST_KEPT prompts are kept, and all of them if the behaviour has no openings. The reason: in a set of
        prompts that ought to be refused, the model does not refuse all, and the others would add to the mean what does
        not belong to the behaviour. Source: the filter of Arditi et al. 2024.

        Args:
            name: the attribute of the `Split` that holds the set.
            sign: 1 for prompts that show the behaviour, −1 for prompts that do not.
        """
        prompts: PromptSet = getattr(self.split, name)
        if not self.behaviour.openings:
            return prompts
        tokens = first_tokens(evaluator.tokenizer, self.behaviour.openings)

        def odds(start: int, stop: int) -> list[float]:
            return [float(one) for one in evaluator.opening_odds(prompts.prompts[start:stop], None, tokens)]

        signed = [sign * one for one in self.cache.rows(f"openings-{name}", {}, len(prompts), odds)]
        count = max(sum(one > 0 for one in signed), min(LEAST_KEPT, len(signed)))
        kept = sorted(sorted(range(len(signed)), key=lambda i: -signed[i])[:count])
        return replace(prompts, prompts=tuple(prompts.prompts[i] for i in kept))

    def remove(self) -> None:
        shutil.rmtree(self.whole, ignore_errors=True)


@dataclass(frozen=True, slots=True)
class Fitted:
    """The direction that `fit` chose, its figures, those of the plain model, and every candidate that answered."""

    direction: Direction
    plain: Figures
    figures: Figures
    finalists: tuple[select.Entrant, ...]
    #: Whether the direction was tried on other prompts than those that were measured.
    held_out: bool


def fit(
    measurement: Measurement,
    recipe: Recipe,
    choice: Choice,
    split: Split,
    tried: Evaluator,
    *,
    behaviour: Behaviour = REFUSAL,
    judge: Judge | None = None,
    cache: Cache | None = None,
) -> Fitted:
    """Choose layer, method and action in turn, by their effect on the prompts of `split` that candidates are tried on.

    All that does not vary is as in `recipe`.

    Raises:
        NothingFound: the plain model hardly shows the behaviour, or no candidate surely lessens it, or those that do
            harm harmless answers.
        InvalidInput, DegenerateError: as `select`.
    """
    layers = select.layers_of(measurement, recipe) if choice.layers == "auto" else choice.layers
    grid = select.Grid(choice.methods[:1], (recipe.position,), tuple(select.spaced(layers, LAYERS)), choice.actions[:1])
    begun = select.entrants_of(measurement, grid.recipes(measurement, recipe))
    sets = _sets(split)
    tried.progress.plan(select.CHOOSING, most_work(split, choice, tried.max_tokens, behaviour))
    with tried.progress.part(select.CHOOSING):
        selection = select.Selection(Race(tried, behaviour, sets, judge), cache)
        selection.check_shown()
        finalists = selection.run(_screened_in_turn(measurement, selection, choice, begun))
        chosen = _unharmed(selection, finalists)
    assert chosen.figures is not None
    direction = derive(measurement, chosen.recipe, selection.metadata(chosen))
    return Fitted(
        direction, selection.race.plain, chosen.figures, tuple(finalists), split.tried_harmful != split.harmful
    )


def _screened_in_turn(
    measurement: Measurement, selection: select.Selection, choice: Choice, begun: Sequence[select.Entrant]
) -> Sequence[select.Entrant]:
    """Return the candidates of `choice` that are to answer, chosen by screening.

    `begun` has a candidate for each layer, with the first method and the first action. The other methods are screened
    at the best of these layers. Then the best candidates so far are screened winsorized, and at last the best so far
    with the other actions.
    """
    known = selection.screen(begun)
    steps: tuple[tuple[int, list[dict[str, Any]]], ...] = (
        (KEPT_LAYERS, [{"method": method} for method in choice.methods[1:]]),
        (KEPT, [{"winsorize": quantile} for quantile in choice.winsorize]),
        (KEPT, [asdict(action) for action in choice.actions[1:]]),
    )
    for count, changes in steps:
        recipes = [replace(e.recipe, **change) for e in select.through(known, count) for change in changes]
        with suppress(DegenerateError):  # if none of these recipes gives a direction
            known = [*known, *(selection.screen(select.entrants_of(measurement, recipes)) if recipes else [])]
    return select.through(known, FINALISTS)


def _unharmed(selection: select.Selection, finalists: Sequence[select.Entrant]) -> select.Entrant:
    """Return the best of `finalists` that surely shows less than the plain model and does no harm to harmless answers.

    A finalist answers harmless prompts only after it has been found to show less. Raises NothingFound, with the reason
    against each finalist.
    """
    plain, left, against = selection.race.plain, list(finalists), []
    while whole := [e for e in left if e.figures is not None and e.figures.stopped is None]:
        one = select.best(whole)
        left = [e for e in whole if e is not one]
        figures = one.figures
        assert figures is not None
        where = f"layer {one.recipe.layer}, {one.recipe.method.name}, {one.recipe.mode}"
        # half of the p value, because only less counts (one side), times the number of candidates that might pass
        less = len(finalists) * mcnemar(plain.left, figures.left) / 2 <= SIGNIFICANT
        if sum(figures.left) >= sum(plain.left) or not less:
            against.append(
                f"{where}: {sum(figures.asked)} of {len(figures.asked)} answers still show it"
                + (f", {sum(figures.lost)} are lost" if any(figures.lost) else "")
            )
            continue
        selection.race.answer_harmless(one.candidate, figures)
        allowed = max(1, round(HARM * len(plain.other)))
        if sum(figures.other) > sum(plain.other) + allowed:
            against.append(f"{where}: {sum(figures.other)} of {len(figures.other)} harmless prompts get such an answer")
        elif sum(figures.faulty) > sum(plain.faulty) + allowed:
            against.append(f"{where}: {sum(figures.faulty)} of {len(figures.faulty)} harmless answers are lost")
        else:
            return one
    raise NothingFound(
        f"none of {len(selection.tried)} candidates takes '{selection.race.behaviour.name}' away without harm; the "
        f"plain model shows it in {sum(plain.asked)} of {len(plain.asked)} answers. " + "; ".join(against)
    )


def most_work(split: Split, choice: Choice, tokens: int = TOKENS, behaviour: Behaviour = REFUSAL) -> float:
    """Return the most work that `fit` can have, before the layers that are worth trying are known.

    If the behaviour has no openings, all candidates answer.
    """
    sets, finalists = _sets(split), FINALISTS if behaviour.openings else None
    return select.work(sets, tokens, choice.most_screened, finalists) + len(sets.other) * answering(tokens)


def _sets(split: Split) -> Sets:
    return Sets.drawn(split.tried_harmful, split.tried_harmless, limit=TRIED)


def report(fitted: Fitted) -> list[str]:
    """Return a table of the finalists, and lines on what was found, what is left and what it cost, for a terminal."""
    plain, steered, chosen = fitted.plain, fitted.figures, fitted.direction.meta
    rows = [
        [
            "each its own" if one.recipe.layer == "all" else str(one.recipe.layer),
            described(one.recipe),
            f"{sum(figures.asked)} of {len(figures.asked)}",
            f"{figures.kl:.4f}",
            "chosen" if figures is steered else "stopped" if figures.stopped else "",
        ]
        for one in fitted.finalists
        if (figures := one.figures) is not None
    ]
    behaviour, low, high = (
        chosen.selection["behaviour"],
        *(100 * end for end in wilson(sum(steered.asked), len(steered.asked))),
    )
    kl = mean_of(steered.kls)
    count, harmless = len(steered.asked), len(steered.other)
    made = " + ".join(str(one.count) for one in (chosen.harmful, chosen.harmless) if one is not None)
    lines = [
        shown(("layer", "direction", behaviour, "N-token KL", "note"), rows),
        f"made from {made} prompts, tried on {count} + {harmless}{' others' if fitted.held_out else ' of the same'}",
        f"harmful: {behaviour} in {sum(plain.asked)} plain answers, "
        f"in {sum(steered.asked)} with it ({low:.0f} to {high:.0f} %)"
        + (f"; lost: {sum(plain.lost)} plain, {sum(steered.lost)} with it" if any(steered.lost + plain.lost) else ""),
        f"harmless: {behaviour} in {sum(plain.other)} plain answers, in {sum(steered.other)} with it; lost: "
        f"{sum(plain.faulty)} plain, {sum(steered.faulty)} with it; N-token KL {kl.value:.4f} ({kl.low:.4f} to "
        f"{kl.high:.4f})",
    ]
    if steered.rate_left > LEFT:
        lines.append(f"warning: more than {LEFT:.0%} are left; `steer search` tries more")
    return lines


def described(recipe: Recipe) -> str:
    """Return in a few words how a direction is made and how it acts."""
    method = recipe.method.name + "".join(f" {k}={v}" for k, v in recipe.method.model_dump().items())
    clipped = "" if recipe.winsorize is None else f" winsorized {recipe.winsorize:g}"
    sides = "" if recipe.threshold is None else f" threshold {recipe.threshold:g}"
    sides += "" if recipe.target is None else f" target {recipe.target:g}"
    strength = "" if recipe.strength == 1 else f" at {recipe.strength:g}"
    return f"{method}{clipped}, {recipe.mode}{sides}{strength}"
