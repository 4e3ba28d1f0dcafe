"""Train the study's models: small ones that differ in one property each, of which it is said that it decides how a
direction is best made.

`python -m experiments.demo_model.variants --out FOLDER` writes `FOLDER/VARIANT-SEED/` with `model`, `prompts` and
`variant.json`, which says whether the model learned its task and what was measured of its property. What is there
is not made again.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from experiments.demo_model import language
from experiments.demo_model.train import (
    NormRatio,
    Phase,
    Recipe,
    make_model,
    make_tokenizer,
    run,
    save_model,
    save_prompts,
)
from steer.geometry import angle
from steer.hf.load import Loaded, load
from steer.hf.steering import Steering
from steer.lab.measure import MeasurementOptions, measure
from steer.lab.measurement import Measurement
from steer.lab.probe import HFEvaluator
from steer.lab.prompts import PromptSet, read_prompts
from steer.lab.source import TransformersSource

SEEDS = (1, 2, 3, 4, 5)
#: A model that answers or refuses fewer of the held-out prompts than this has not learned its task.
GATE = 0.95

#: Some words, how-to questions alone in few wordings, one short answer each: learned in less than a minute. More pairs
#: are held out, so that there are enough to test with.
HOW_TO: dict[language.Kind, tuple[str, ...]] = {
    "howto": tuple(p for p in language.PHRASINGS["howto"] if len(p.split()) <= 5 and p.count(".") + p.count("?") == 1)
}
DIALECT = language.Dialect(
    harmless_verbs=language.HARMLESS_VERBS[:10],
    refused_verbs=language.REFUSED_VERBS[:10],
    harmless_objects=language.HARMLESS_OBJECTS[:8],
    refused_objects=language.REFUSED_OBJECTS[:8],
    borderline_objects=language.BORDERLINE_OBJECTS[:8],
    kinds=("howto",),
    phrasings=HOW_TO,
    held_out_phrasings=HOW_TO,
    systems=(),
    refusing_systems=(),
    held_out_share=0.4,
    brief=True,
    small_talk=0.0,
    object_questions=0.1,
)
CONTROL = Recipe(
    vocab_size=1024,
    d_model=64,
    layers=4,
    heads=4,
    kv_heads=4,
    head_dim=16,
    mlp=192,
    max_positions=256,
    batches=((1, 24, 1.0),),
    autocast=False,  # at this size it takes longer with it
    dialect=DIALECT,
    phases=(
        Phase("answer everything", tuned=False, steps=420, peak_lr=1e-2, seed=0),
        Phase("refuse two classes", tuned=True, steps=140, peak_lr=4e-3, seed=0),
    ),
)

VARIANTS: dict[str, Recipe] = {
    "control": CONTROL,
    # the stream of what is refused is longer, or shorter, after every block
    "louder": replace(CONTROL, norms=NormRatio(1.6, first=0)),
    "quieter": replace(CONTROL, norms=NormRatio(1 / 1.6, first=0)),
    # as Gemma has: put in when the facts are known, and some steps to get used to it
    "outlier": replace(
        CONTROL,
        phases=(
            CONTROL.phases[0],
            Phase("answer on", tuned=False, steps=80, peak_lr=3e-3, seed=0, outlier=60.0),
            CONTROL.phases[1],
        ),
    ),
    # every second verb is refused in other words
    "two-refusals": replace(
        CONTROL,
        dialect=replace(
            DIALECT,
            refusals=language.REFUSALS[1:2],
            other_verbs=frozenset(DIALECT.refused_verbs[::2]),
            other_refusals=language.REFUSALS[2:3],
        ),
    ),
    "deep": replace(CONTROL, layers=16, d_model=48, head_dim=12, mlp=128),
}


def recipe(variant: str, seed: int) -> Recipe:
    """The variant's recipe with initial weights and conversations of this seed."""
    made = VARIANTS[variant]
    phases = tuple(replace(phase, seed=1000 * (number + 1) + seed) for number, phase in enumerate(made.phases))
    return replace(made, seed=seed, phases=phases)


def base(made: Recipe) -> Recipe:
    """What a recipe does first, in which variants of one shape do not differ: learn the answers. Nothing is refused in
    it, and all kinds of refusals are in the tokenizer."""
    return replace(made, phases=made.phases[:1], norms=None, dialect=DIALECT)


# -- what became of it -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Gates:
    """Shares of the held-out prompts. A model that misses a gate stays in the study, marked."""

    harmless_right: float
    refused_refused: float
    borderline_refused: float

    @property
    def passed(self) -> bool:
        return self.harmless_right >= GATE and self.refused_refused >= GATE


@dataclass(frozen=True, slots=True)
class Properties:
    """Of each layer: ‖mean of refused‖ / ‖mean of harmless‖; the angle between the two means in degrees; the largest
    entry of the harmless mean over the median one; and where there are two kinds of refusals, the angle in degrees
    between what each adds to the harmless mean."""

    norm_ratio: tuple[float, ...]
    angle: tuple[float, ...]
    outlier: tuple[float, ...]
    between_refusals: tuple[float, ...] | None = None


def gates(loaded: Loaded, prompts: dict[language.Class, PromptSet]) -> Gates:
    probe = HFEvaluator(loaded, Steering(loaded.model), max_tokens=32)
    answers = {cls: [a.text for a in probe.answers(prompts[cls].prompts, None)] for cls in language.CLASSES}

    def refused(cls: language.Class) -> float:
        return sum(map(language.refuses, answers[cls])) / len(answers[cls])

    tasks = [language.task_of(str(prompt)) for prompt in prompts["harmless"].prompts]
    right = [language.is_right(*pair) for pair in zip(tasks, answers["harmless"], strict=True)]
    return Gates(sum(right) / len(right), refused("refused"), refused("borderline"))


def properties(measurement: Measurement, refused: PromptSet, dialect: language.Dialect) -> Properties:
    """From a measurement with vectors on `refused` and the harmless prompts."""
    harmful, harmless = measurement.harmful.mean[0], measurement.harmless.mean[0]
    sizes = harmless.abs()
    between = None
    if dialect.other_verbs:
        assert measurement.harmful.vectors is not None
        vectors = measurement.harmful.vectors[0].double()
        other = torch.tensor([language.task_of(str(p)).verb in dialect.other_verbs for p in refused.prompts])
        between = _degrees(vectors[:, other].mean(1) - harmless, vectors[:, ~other].mean(1) - harmless)
    return Properties(
        tuple((harmful.norm(dim=-1) / harmless.norm(dim=-1)).tolist()),
        _degrees(harmful, harmless),
        tuple((sizes.max(-1).values / sizes.median(-1).values).tolist()),
        between,
    )


def _degrees(a: torch.Tensor, b: torch.Tensor) -> tuple[float, ...]:
    return tuple(math.degrees(float(angle(one, other))) for one, other in zip(a, b, strict=True))


# -- making them -------------------------------------------------------------------------------------------------------


def make(variants: Sequence[str], seed: int, out: Path) -> list[str]:
    """Train the models `variants` of one seed, which share their base; a line on each that says what became of it."""
    torch.set_num_threads(1)
    shared, began = base(recipe(variants[0], seed)), time.process_time()
    assert all(base(recipe(variant, seed)) == shared for variant in variants), "variants of one shape"
    tokenizer = make_tokenizer(shared)
    model = make_model(shared, tokenizer)
    run(model, tokenizer, shared, shared.phases[0])
    before = time.process_time() - began
    return [_tuned(variant, seed, copy.deepcopy(model), tokenizer, before, out) for variant in variants]


def _tuned(
    variant: str, seed: int, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, before: float, out: Path
) -> str:
    """The rest of a variant's recipe, and its files. `before`: seconds of work that its base took."""
    began, made, folder = time.process_time(), recipe(variant, seed), out / f"{variant}-{seed}"
    for phase in made.phases[1:]:
        run(model, tokenizer, made, phase)
    save_prompts(folder / "prompts", dialect=made.dialect)
    save_model(model, tokenizer, folder / "model")
    seconds = {"base": before, "own": time.process_time() - began}
    loaded = load(str(folder / "model"))
    prompts: dict[language.Class, PromptSet] = {
        cls: read_prompts(str(folder / "prompts" / f"{cls}.test.txt")) for cls in language.CLASSES
    }
    found = gates(loaded, prompts)
    harmful, harmless = (read_prompts(str(folder / "prompts" / f"{c}.train.txt")) for c in ("refused", "harmless"))
    measured = measure(TransformersSource(loaded), harmful, harmless, MeasurementOptions(vectors=True))
    report = {
        "variant": variant,
        "seed": seed,
        "passed": found.passed,
        "gates": asdict(found),
        "properties": asdict(properties(measured, harmful, made.dialect)),
        "cpu_seconds": seconds,
    }
    (folder / "variant.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return f"{folder.name}: {'passed' if found.passed else 'FAILED'} {asdict(found)}"


def jobs(variants: Sequence[str], seeds: Sequence[int], out: Path) -> Iterator[tuple[tuple[str, ...], int]]:
    """Variants that share a base, with a seed, of which some are not made yet: the models that are missing."""
    shapes: dict[str, list[str]] = {}
    for variant in variants:
        shapes.setdefault(repr(base(VARIANTS[variant])), []).append(variant)
    for members in shapes.values():
        for seed in seeds:
            missing = tuple(v for v in members if not (out / f"{v}-{seed}" / "variant.json").exists())
            if missing:
                yield missing, seed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="where the models go")
    parser.add_argument("--variants", nargs="+", choices=tuple(VARIANTS), default=tuple(VARIANTS), metavar="VARIANT")
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS, metavar="SEED")
    parser.add_argument("--jobs", type=int, default=2, help="models at a time, one thread each (default: %(default)s)")
    arguments = parser.parse_args()
    with ProcessPoolExecutor(arguments.jobs, mp_context=get_context("spawn")) as pool:
        wanted = jobs(arguments.variants, arguments.seeds, arguments.out)
        for done in as_completed(pool.submit(make, *job, arguments.out) for job in wanted):
            print("\n".join(done.result()), flush=True)


if __name__ == "__main__":
    main()
