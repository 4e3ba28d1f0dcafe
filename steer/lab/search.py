"""A search: an optimiser with several aims over the space of directions.

Its trials are tried in groups, as rows of one batch. A search lives in a folder, and an interrupted search continues
from there:

    measurement.safetensors   the measurement from which the direction of every trial is made
    search.json               the settings, and the prompt sets of the search
    trials.log                optuna's own journal of the trials
    front.md, front.png       the Pareto front
"""

from __future__ import annotations

import hashlib
import logging
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Self, cast

import optuna
from optuna.storages.journal import JournalFileBackend
from optuna.study import StudyDirection
from optuna.trial import BaseTrial, FrozenTrial
from pydantic import BaseModel, Field, JsonValue, ValidationError, field_validator, model_validator

from steer.direction import Dataset
from steer.errors import InvalidInput, brief, noted, problems_of
from steer.files import write_file
from steer.lab import plots
from steer.lab.behaviour import Behaviour
from steer.lab.derive import Recipe, check_needs, derive, layer_weights
from steer.lab.evaluator import Candidate, Evaluator
from steer.lab.judge import Judge
from steer.lab.measurement import Measurement
from steer.lab.methods import make_method
from steer.lab.race import Figures, Race, Sets
from steer.lab.resume import Alone
from steer.lab.select import layers_of
from steer.lab.statistics import undominated
from steer.lab.tables import Table, markdown, shown
from steer.names import Mode, Site, acts_on_terms, site_problem

log = logging.getLogger("steer")

#: Names of files in the folder of a search.
MEASUREMENT, SETTINGS, TRIALS = "measurement.safetensors", "search.json", "trials.log"
#: Keys of a trial in the journal: its point, and its figures. A saved direction has the point under the same key.
POINT, FIGURES = "point", "figures"
STUDY = "steer"
#: The name of a part of a command's progress.
TRYING = "trying"


class Settings(BaseModel, frozen=True, extra="forbid"):
    """All that decides the trials, together with the model's weights."""

    model: str
    revision: str | None = None
    backend: str = "transformers"
    behaviour: Behaviour
    judge: dict[str, JsonValue] | None = Field(None, description="what judges answers in place of patterns")
    harmful: Dataset
    harmless: Dataset
    borderline: Dataset | None = None
    system_prompt: str | None = None
    template: dict[str, JsonValue] = {}
    response_prefix: str = ""
    position: int = -1
    dtype: str = "auto"
    weights: str | None = Field(None, description="the fingerprint of the model; None in older files")
    chat_template: str | None = Field(None, description="its SHA-256, empty for none; None in older files")
    prompts: int = Field(96, ge=8, description="prompts of each set that a trial is tried on, at most")
    tokens: int = Field(32, ge=1, description="longest answer")
    group: int = Field(16, ge=1, le=256, description="trials that are tried at once")
    startup: int = Field(32, ge=1, description="trials drawn at random before the optimiser begins")
    seed: int = 0
    space: SearchSpace
    measurement_sha256: str = ""

    @property
    def aims(self) -> tuple[str, ...]:
        return ("refused", "kl") + (("over",) if self.borderline else ())

    @property
    def directions(self) -> list[StudyDirection]:
        return [StudyDirection.MINIMIZE for _ in self.aims]


@dataclass(frozen=True, slots=True)
class Trial:
    """One point that was tried. `values` are its figures in the order of the aims; small values are good."""

    number: int
    point: dict[str, Any]
    values: tuple[float, ...]
    figures: Figures


def front(trials: Sequence[Trial]) -> list[Trial]:
    """Return the Pareto front, with the fewest refusals first.

    No other trial is better than a trial of the front in one aim and as good in all. Only trials that were tried to the
    end count, and of equal trials the first one is on the front.
    """
    whole = sorted((t for t in trials if t.figures.stopped is None), key=lambda t: t.number)
    return undominated(whole, lambda t: t.values)


#: The options of `steer search` with other names than their settings.
_OPTIONS = {"tokens": "max-tokens", "methods": "method", "modes": "mode"}


#: What a search was started with, if one of these settings is no longer the same. No option sets them.
_OF_MODEL = {
    "weights": "other weights of the model, on another machine or in another precision",
    "chat_template": "another chat template",
}


def _option(setting: str) -> str:
    """The option of `steer search` for a setting."""
    return f"--{_OPTIONS.get(setting, setting.replace('_', '-'))}"


def _value(setting: object) -> str:
    """A setting as JSON, briefly; of prompts their source, and the beginning of their hash."""
    if isinstance(setting, dict) and setting.keys() == Dataset.model_fields.keys():
        return "{name} ({count} prompts, sha256 {sha256:.8}…)".format(**setting)
    return brief(setting)


class Search:
    """The state of a search in its folder."""

    def __init__(self, folder: Path, settings: Settings, measurement: Measurement) -> None:
        self.folder, self.settings, self.measurement = folder, settings, measurement

    # -- files -----------------------------------------------------------------------------------------------------

    @classmethod
    def begin(cls, folder: Path, settings: Settings, measure: Callable[[Path], Measurement]) -> Search:
        """Return the search in `folder`, or begin a new one if there is none.

        Args:
            measure: makes the measurement of a new search. It gets the path of a file for unfinished work.

        Raises:
            InvalidInput: has every setting that differs from the setting with which the search was begun.
        """
        path = folder / MEASUREMENT
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InvalidInput(f"{folder}: cannot be created: {error.strerror}") from error
        if not (folder / SETTINGS).exists():
            with Alone(folder):
                partial = path.with_name(f"{path.name}.part")
                measurement = measure(partial)
                measurement.save(path)
                partial.unlink(missing_ok=True)
                settings = settings.model_copy(
                    update={"space": settings.space.bounded(measurement), "measurement_sha256": _sha256(path)}
                )
                write_file(folder / SETTINGS, settings.model_dump_json(indent=2).encode())
            return cls(folder, settings, measurement)
        begun = cls.open(folder)
        asked, have = settings.model_dump(mode="json"), begun.settings.model_dump(mode="json")
        for each in (asked, have):
            each |= each.pop("space")
        found_out = ("measurement_sha256", "layers", "depth", *(name for name in _OF_MODEL if have[name] is None))
        if different := [name for name in have if name not in found_out and asked[name] != have[name]]:
            started = [
                _OF_MODEL.get(name, f"{_option(name)} {_value(have[name])}, not {_value(asked[name])}")
                for name in different
            ]
            again = "give the same options again, or another folder"
            raise InvalidInput([*(f"{folder}: was started with {each}" for each in started), again])
        return begun

    @classmethod
    def open(cls, folder: Path) -> Search:
        """Return the search in `folder`. Raises InvalidInput if there is none or its files do not belong together."""
        try:
            settings = Settings.model_validate_json((folder / SETTINGS).read_bytes())
        except OSError as error:
            raise InvalidInput(f"{folder}: there is no search in this folder ({SETTINGS}: {error.strerror})") from error
        except ValidationError as error:
            problems = problems_of(error, "file", Settings)
            raise InvalidInput(f"{folder / SETTINGS}: {problem}" for problem in problems) from error
        path = folder / MEASUREMENT
        measurement = Measurement.load(path)
        if _sha256(path) != settings.measurement_sha256:
            raise InvalidInput(f"{path}: it is not the measurement that this search was started with")
        return cls(folder, settings, measurement)

    def trials(self) -> list[Trial]:
        """Return the trials that are in the journal, in order."""
        return [_trial(frozen) for frozen in self._journal().get_trials(deepcopy=False)]

    def save(self, number: int, path: Path) -> str:
        """Write the direction of trial `number` and return its digest. Only the measurement is needed for this."""
        known = {trial.number: trial for trial in self.trials()}
        if number not in known:
            raise InvalidInput(f"trial {number} is not in {self.folder}: it has {len(known)}, from 0")
        trial = known[number]
        selection = {
            "by": f"trial {number} of a search",
            "behaviour": self.settings.behaviour.name,
            POINT: trial.point,
            **dict(zip(self.settings.aims, trial.values, strict=True)),
            "prompts": len(trial.figures.asked),
            "stopped": trial.figures.stopped,
        }
        return candidate(self.measurement, trial.point, selection).direction.save(path)

    # -- running ---------------------------------------------------------------------------------------------------

    def run(
        self,
        evaluator: Evaluator,
        sets: Sets,
        count: int,
        after: Callable[[list[Trial]], object] = lambda _: None,
        judge: Judge | None = None,
    ) -> list[Trial]:
        """Run trials until there are at least `count`, in whole groups, and return all trials.

        A group is written when all of it is known. A group that was interrupted is drawn and tried again, with the same
        result, because it is drawn from the seed, the group's number and the groups before it alone.

        Args:
            after: called with all trials, at the start and after each group.
            judge: the judge that the settings name.

        Raises:
            InvalidInput: another run uses the folder.
        """
        settings, group, progress = self.settings, self.settings.group, evaluator.progress
        with Alone(self.folder):
            journal = self._journal()
            written = journal.get_trials(deepcopy=False)
            known = written[: len(written) // group * group]
            trials = [_trial(frozen) for frozen in known]
            after(trials)
            if len(trials) >= count:
                return trials
            progress.plan(TRYING, work(settings, sets, count))
            with progress.part(TRYING):
                progress.skip(len(trials) * sets.work(settings.tokens))
                race = Race(evaluator, settings.behaviour, sets, judge)
                if why := race.hardly_shown():
                    log.warning("%s", why)
                while len(trials) < count:
                    fresh = self._tried(race, known, trials)
                    journal.add_trials(fresh[len(written) - len(known) :])
                    written = known = [*known, *fresh]
                    trials = [_trial(frozen) for frozen in known]
                    after(trials)
        return trials

    def _tried(self, race: Race, known: Sequence[FrozenTrial], trials: Sequence[Trial]) -> list[FrozenTrial]:
        """Draw and try the next group. `known` are the trials before it, which the optimiser knows."""
        study = self._study(known)
        asked = [study.ask() for _ in range(self.settings.group)]
        points = [self.settings.space.suggest(trial) for trial in asked]
        rivals = [trial.figures for trial in front(trials)]
        figures = race.run([candidate(self.measurement, point) for point in points], rivals)
        fresh = []
        for trial, point, found in zip(asked, points, figures, strict=True):
            for key, value in ((POINT, point), (FIGURES, asdict(found))):
                trial.set_user_attr(key, value)
            # a trial that stopped because it shows the behaviour is not on the front, however little it diverges: it
            # must not attract the optimiser
            trial.set_constraint("shown", found.rate_left if found.stopped == "shown" else 0.0)
            fresh.append(study.tell(trial, [found.rate_left, found.kl, *([] if found.over is None else [found.over])]))
        return fresh

    def _study(self, known: Sequence[FrozenTrial]) -> optuna.Study:
        """Return the optimiser that draws the next group, in memory, after it was told the trials `known`."""
        settings = self.settings
        seed = int.from_bytes(hashlib.sha256(f"{settings.seed} {len(known)}".encode()).digest()[:4])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            sampler = optuna.samplers.TPESampler(
                seed=seed, n_startup_trials=settings.startup, multivariate=True, group=True, constant_liar=True
            )
        study = optuna.create_study(directions=settings.directions, sampler=sampler)
        study.add_trials(known)
        return study

    def _journal(self) -> optuna.Study:
        storage = optuna.storages.JournalStorage(JournalFileBackend(str(self.folder / TRIALS)))
        if STUDY in optuna.get_all_study_names(storage):
            return optuna.load_study(study_name=STUDY, storage=storage)
        return optuna.create_study(study_name=STUDY, storage=storage, directions=self.settings.directions)


def work(settings: Settings, sets: Sets, count: int) -> float:
    """Return the work of `count` trials, rounded up to whole groups, without the measurement."""
    trials = math.ceil(count / settings.group) * settings.group
    return sets.plain_work(settings.tokens) + trials * sets.work(settings.tokens)


def rank_of(space: SearchSpace, measurement: Measurement) -> int:
    """Return the most rows that act on a token, of any direction of `space` in any of its modes."""
    made = [derive(measurement, Recipe(make_method(m), space.layers[-1], sites=space.sites)) for m in space.methods]
    return max(direction.rows_in(mode) for direction in made for mode in space.modes)


def _trial(frozen: FrozenTrial) -> Trial:
    attributes = frozen.user_attrs
    return Trial(frozen.number, attributes[POINT], tuple(frozen.values), Figures(**attributes[FIGURES]))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


Parameter = str | float | int


class SearchSpace(BaseModel, frozen=True, extra="forbid"):
    """The bounds of a search."""

    methods: Annotated[tuple[str, ...], Field(min_length=1)] = ("slerp", "projected", "linear", "whitened")
    modes: Annotated[tuple[Mode, ...], Field(min_length=1)] = ("ablate", "one_sided")
    t: tuple[float, float] = Field((-1.0, 1.0), description="least and most t of slerp")
    strength: tuple[float, float] = Field(
        (0.5, 1.5), description="least and most strength; of `add` its hundredth, negative"
    )
    threshold: tuple[float, float] = Field(
        (-0.25, 0.5), description="of `one_sided`: 0 is the harmless mean, 1 the harmful one"
    )
    layers: tuple[int, ...] = Field((), description="source layers that are tried")
    depth: Annotated[int, Field(ge=1, description="layers of the model")] = 1
    sites: Annotated[tuple[Site, ...], Field(min_length=1, description="where every direction acts")] = ("resid_post",)

    @field_validator("t", "strength", "threshold")
    @classmethod
    def _check_range(cls, bounds: tuple[float, float]) -> tuple[float, float]:
        low, high = bounds
        if not -math.inf < low < high < math.inf:
            raise ValueError(f"the least, {low:g}, must be below the most, {high:g}, and both finite")
        return bounds

    @model_validator(mode="after")
    def _check_modes(self) -> Self:
        if problems := [problem for mode in self.modes if (problem := site_problem(self.sites, mode))]:
            raise ValueError("; ".join(problems))
        return self

    def bounded(self, measurement: Measurement) -> SearchSpace:
        """Return the space with the layers of `measurement` whose classes separate. Raises InvalidInput with every
        problem."""
        problems: list[str] = []
        for name in self.methods:
            with noted(problems):
                check_needs(measurement, Recipe(make_method(name)))
        InvalidInput.raise_for(problems)
        layers = layers_of(measurement, Recipe(make_method(self.methods[0])))
        bounded = self.model_copy(update={"layers": layers, "depth": measurement.meta.model.layers})
        offered = derive(measurement, Recipe(make_method(self.methods[0]), layers[-1], sites=self.sites)).meta.modes
        InvalidInput.raise_for(
            f"the mode '{mode}' needs means that this measurement does not have"
            for mode in self.modes
            if mode not in offered
        )
        return bounded

    def suggest(self, trial: BaseTrial) -> dict[str, Parameter]:
        """Return a point that optuna draws. A point without `layer` has each layer's own direction."""
        point: dict[str, Parameter] = {"method": trial.suggest_categorical("method", list(self.methods))}
        if point["method"] == "slerp":
            point["t"] = trial.suggest_float("t", *self.t)
        if trial.suggest_categorical("source", ["one layer", "each its own"]) == "one layer":
            point["layer"] = self.layers[trial.suggest_int("layer", 0, len(self.layers) - 1)]
        point["mode"] = trial.suggest_categorical("mode", list(self.modes))
        point["strength"] = trial.suggest_float("strength", *self.strength)
        if point["mode"] == "one_sided":
            point["threshold"] = trial.suggest_float("threshold", *self.threshold)
        if self.sites != ("resid_post",):
            point["sites"] = ",".join(self.sites)
        for prefix in ("", "mlp_") if acts_on_terms(self.sites) else ("",):
            point[f"{prefix}peak"] = trial.suggest_float(f"{prefix}peak", 0.0, float(max(1, self.depth - 1)))
            point[f"{prefix}width"] = trial.suggest_float(f"{prefix}width", 0.5, float(2 * self.depth), log=True)
            point[f"{prefix}least"] = trial.suggest_float(f"{prefix}least", 0.0, 1.0)
        if acts_on_terms(self.sites):
            point["mlp_most"] = trial.suggest_float("mlp_most", 0.0, 1.5)
        return point


def candidate(
    measurement: Measurement, point: Mapping[str, Parameter], selection: dict[str, Any] | None = None
) -> Candidate:
    """Return the candidate of a `point`.

    If a `selection` is given, the direction is to be saved: it has the selection, and the point's mode and strength as
    its defaults.
    """
    t, mode, strength = point.get("t"), cast(Mode, point["mode"]), float(point["strength"])
    if mode == "add":
        strength = -strength / 100  # against the behaviour, and small because it is added at each layer
    method = make_method(str(point["method"]), {} if t is None else {"t": t})
    at = float(point["threshold"]) if "threshold" in point else None
    made = derive(
        measurement,
        Recipe(
            method,
            int(point["layer"]) if "layer" in point else "all",
            threshold=at,
            sites=cast(tuple[Site, ...], tuple(str(point.get("sites", "resid_post")).split(","))),
            weights=_bell(point, "", measurement.meta.model.layers),
            mlp_weights=_bell(point, "mlp_", measurement.meta.model.layers) if "mlp_peak" in point else None,
        ),
    )
    if selection is not None:
        made = made.with_meta(mode=mode, strength=strength, selection=selection)
    return Candidate.of(made, mode, strength)


def _bell(point: Mapping[str, Parameter], prefix: str, depth: int) -> list[float]:
    """The weights of `depth` layers that the values under `prefix` say."""
    peak, width, least = (float(point[prefix + name]) for name in ("peak", "width", "least"))
    bell: list[float] = (float(point.get(f"{prefix}most", 1.0)) * layer_weights(depth, peak, width, least)).tolist()
    return bell


def described(trial: Trial) -> str:
    """Return a text on how the trial's direction is made and applied."""
    point = trial.point
    method = point["method"] + (f" t={point['t']:.2f}" if "t" in point else "")
    source = f"layer {point['layer']}" if "layer" in point else "each layer's own"
    mode = point["mode"] + (f" from {point['threshold']:.2f}" if "threshold" in point else "")
    at = f"{method}, {source}, {mode} at {point['strength']:.2f}"
    if "mlp_peak" not in point:
        return f"{at}, weights {_bell_text(point, '')}"
    return f"{at}, attention {_bell_text(point, '')}, MLP {_bell_text(point, 'mlp_')}"


def _bell_text(point: Mapping[str, Parameter], prefix: str) -> str:
    most = float(point.get(f"{prefix}most", 1))
    least, peak, width = (float(point[prefix + name]) for name in ("least", "peak", "width"))
    return f"{most * least:.2f} to {most:{'.2f' if most != 1 else 'g'}} at layer {peak:.1f} ± {width:.1f}"


def front_table(trials: Sequence[Trial], table: Table = shown) -> str:
    """Return a table of the front, which describes each of its trials."""
    rows = []
    for trial in front(trials):
        refused, kl, *over = trial.values
        overs = f"{over[0]:.1%}" if over else "–"
        rows.append((str(trial.number), f"{refused:.1%}", f"{kl:.6f}", overs, described(trial)))
    return table(("trial", "refused", "N-token KL", "over-refused", "direction"), rows)


def write_front(search: Search, trials: Sequence[Trial]) -> None:
    """Write `front.md`, and `front.png` with all trials that were tried to the end; the front's have their numbers."""
    settings, best = search.settings, front(trials)
    stopped = sum(trial.figures.stopped is not None for trial in trials)
    lines = [
        f"# {settings.model}: the front of {len(trials)} trials",
        "",
        f"{settings.behaviour.name} on {settings.harmful.name}, N-token KL(plain ‖ steered) in nats on "
        f"{settings.harmless.name}"
        + (f", over-refusal on {settings.borderline.name}" if settings.borderline else "")
        + f"; at most {settings.prompts} prompts of each, {settings.tokens} tokens, seed {settings.seed}. "
        f"{stopped} trials stopped early, since they could not be on the front.",
        "",
        front_table(trials, markdown),
        "",
        "![front](front.png)",
        "",
    ]
    write_file(search.folder / "front.md", "\n".join(lines).encode())
    points = [
        plots.Point(100 * t.values[0], t.values[1], name=str(t.number) if t in best else "")
        for t in trials
        if t.figures.stopped is None
    ]
    with plots.picture(search.folder / "front.png", width=7, height=4.2) as (axes,):
        plots.front(axes, points, x="refused, %", y="N-token KL(plain ‖ steered), nats", log=True)
