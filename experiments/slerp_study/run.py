"""A study of one model or many: measure, try, and write the report."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from experiments.slerp_study import pictures
from experiments.slerp_study.pages import markdown
from experiments.slerp_study.sets import Sets, read_sets
from experiments.slerp_study.summary import group_figures, model_figures, over_models
from experiments.slerp_study.trial import AT_ONCE, CHOOSING, MOST_LAYERS, Ledger, Trial
from steer._version import __version__
from steer.errors import InvalidInput
from steer.hf.load import load
from steer.hf.steering import Steering
from steer.lab.behaviour import REFUSAL
from steer.lab.measure import MeasurementOptions, measure
from steer.lab.measurement import Measurement
from steer.lab.probe import HFEvaluator
from steer.lab.progress import Progress
from steer.lab.source import TransformersSource


@dataclass(frozen=True, slots=True)
class Subject:
    """A model of the study: what it is called, where it is, and its prompts."""

    label: str
    model: str
    sets: Sets


def subjects(models: Sequence[str], prompts: Path | None, most: int | None) -> list[Subject]:
    """Each model with its prompts: those of `prompts`, else of the folder `prompts` beside the model. A model in
    `NAME/model` is called NAME. Raises InvalidInput with the problems of all of them."""
    found: list[Subject] = []
    problems: list[str] = []
    for model in models:
        path = Path(model)
        label = (path.resolve().parent if path.name == "model" else path).name
        try:
            found.append(Subject(label, model, read_sets(prompts or path.parent / "prompts", most)))
        except InvalidInput as error:
            problems += [f"{model}: {problem}" for problem in error.problems]
    labels = [subject.label for subject in found]
    problems += [
        f"two models are called '{label}'" for label in sorted({one for one in labels if labels.count(one) > 1})
    ]
    if problems:
        raise InvalidInput(problems)
    return found


def study(
    chosen: Sequence[Subject],
    output: Path,
    *,
    max_tokens: int,
    batch_size: int | None,
    most_layers: int = MOST_LAYERS,
    dtype: str = "auto",
    device: str = "auto",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Try every arm on every model, and write `report.json`, `report.md` and the pictures. What a model did stands in
    `OUTPUT/LABEL/`, and is not run again."""
    models = [_one(s, output / s.label, max_tokens, batch_size, most_layers, dtype, device, progress) for s in chosen]
    groups = group_figures(models)
    counted = {label for group in groups for label in group["models"]}
    report = {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"steer": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "conditions": {"max_tokens": max_tokens, "choosing": CHOOSING, "behaviour": REFUSAL.name},
        "models": models,
        "groups": groups,
        "over_models": over_models([model for model in models if model["label"] in counted]),
    }
    (output / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (output / "report.md").write_text(markdown(report), encoding="utf-8")
    pictures.draw(report, output)
    return report


def _one(
    subject: Subject,
    folder: Path,
    max_tokens: int,
    batch_size: int | None,
    most_layers: int,
    dtype: str,
    device: str,
    progress: Progress | None,
) -> dict[str, Any]:
    folder.mkdir(parents=True, exist_ok=True)
    loaded = load(subject.model, dtype=dtype, device=device)
    source = TransformersSource(loaded)
    identity = {
        "weights": source.fingerprint(),
        "prompts": subject.sets.identity,
        "max_tokens": max_tokens,
        "choosing": CHOOSING,
        "behaviour": REFUSAL.name,
    }
    ledger = Ledger(folder / "results.jsonl", identity)
    path = folder / "measurement.safetensors"
    if path.exists():
        measurement = Measurement.load(path)
    else:
        sets = subject.sets.harmful, subject.sets.harmless
        measurement = measure(source, *sets, MeasurementOptions(vectors=True), progress=progress)
        measurement.save(path)
    steering = Steering(loaded.model, rows=AT_ONCE + 1, rank=1)
    probe = HFEvaluator(loaded, steering, None, max_tokens, batch_size, progress)
    trial = Trial(measurement, probe, subject.sets, REFUSAL, ledger, most_layers, subject.label)
    return model_figures(subject.label, trial, trial.run())
