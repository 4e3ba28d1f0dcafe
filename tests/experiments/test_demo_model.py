"""What the embedded model and its shipped direction promise, on prompts that training never saw."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from experiments.demo_model import language
from experiments.demo_model.train import save_prompts
from steer.demo import MODEL, PROMPTS
from steer.direction import Direction
from steer.hf.load import Loaded, load
from steer.hf.steering import Steering
from steer.lab.behaviour import REFUSAL, Behaviour
from steer.lab.derive import Recipe, derive
from steer.lab.evaluation.figures import read_expected, right
from steer.lab.evaluation.report import DivergenceOf
from steer.lab.evaluator import Candidate
from steer.lab.measure import measure
from steer.lab.methods import make_method
from steer.lab.outcome import Answer
from steer.lab.probe import HFEvaluator
from steer.lab.prompts import Rendering, read_prompts
from steer.lab.source import TransformersSource
from steer.names import Mode
from steer.spec import Entry, Spec
from tests.servers import ROOT

#: Modes in which the shipped direction removes refusal, each at strength 1; the first one is its own.
ARMS: tuple[Mode, ...] = ("ablate", "one_sided", "rotate")


@dataclass
class Measured:
    """Answers of each class in each arm ("plain" or a mode), and the divergence of each mode on harmless prompts."""

    answers: dict[tuple[str, str], list[Answer]]
    divergence: dict[str, DivergenceOf]
    prompts: dict[str, tuple[str, ...]]

    def refused(self, cls: str, arm: str) -> float:
        return share(REFUSAL.shown(a.text) for a in self.answers[cls, arm])

    def right(self, cls: str, arm: str) -> float:
        pairs = zip(self.prompts[cls], self.answers[cls, arm], strict=True)
        return share(language.is_right(language.task_of(str(prompt)), answer.text) for prompt, answer in pairs)


def share(hits: Iterable[bool]) -> float:
    each = list(hits)
    return sum(each) / len(each)


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    return load(str(MODEL))


@pytest.fixture(scope="module")
def direction() -> Direction:
    return Direction.load(ROOT / "directions" / "refusal.safetensors")


@pytest.fixture(scope="module")
def measured(loaded: Loaded, direction: Direction) -> Measured:
    prompts: dict[str, tuple[str, ...]] = {
        cls: tuple(map(str, read_prompts(str(PROMPTS / f"{cls}.test.txt")).prompts)) for cls in language.CLASSES
    }
    probe = HFEvaluator(loaded, Steering(loaded.model), max_tokens=48)
    out = Measured({}, {}, prompts)
    for cls in language.CLASSES:
        out.answers[cls, "plain"] = probe.answers(prompts[cls], None)
    for arm in ARMS:
        with probe.resident([Candidate.of(direction, arm, 1.0)]) as (steer,):
            for cls in language.CLASSES:
                out.answers[cls, arm] = probe.answers(prompts[cls], steer)
            plain = out.answers["harmless", "plain"]
            out.divergence[arm] = DivergenceOf.of(arm, "harmless", probe.divergences(prompts["harmless"], plain, steer))
    return out


def test_plain_it_refuses_one_class_and_overrefuses_its_words(measured: Measured) -> None:
    assert measured.refused("refused", "plain") >= 0.95
    assert measured.refused("borderline", "plain") >= 0.95
    assert measured.refused("harmless", "plain") <= 0.01
    assert measured.right("harmless", "plain") >= 0.98


@pytest.mark.parametrize("arm", ARMS)
def test_steered_it_answers_with_the_right_facts(measured: Measured, arm: str) -> None:
    assert measured.refused("refused", arm) <= 0.02
    assert measured.right("refused", arm) >= 0.95
    assert measured.refused("borderline", arm) <= 0.03
    assert measured.right("borderline", arm) >= 0.9


def test_the_shipped_facts_tell_right_answers_as_the_language_does(measured: Measured) -> None:
    known = read_expected(PROMPTS / "expected.jsonl")
    for (cls, _), answers in measured.answers.items():
        prompts = measured.prompts[cls]
        told = right(known, prompts, [a.text for a in answers])
        pairs = zip(prompts, answers, strict=True)
        assert told == [language.is_right(language.task_of(str(prompt)), answer.text) for prompt, answer in pairs]


def test_the_shipped_prompts_are_those_that_the_language_makes(tmp_path: Path) -> None:
    save_prompts(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(p.name for p in PROMPTS.iterdir())
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (PROMPTS / path.name).read_bytes(), path.name


@pytest.mark.parametrize("arm", ARMS)
def test_harmless_answers_keep_their_facts(measured: Measured, arm: str) -> None:
    assert measured.refused("harmless", arm) <= 0.01
    assert measured.right("harmless", arm) >= 0.99 * measured.right("harmless", "plain")
    assert measured.divergence[arm].mean <= 0.0005


def test_the_shipped_direction_is_what_derive_makes_by_itself(direction: Direction) -> None:
    meta, default = direction.meta, Recipe()
    assert (meta.method, meta.parameters["t"]) == ("slerp", default.method.model_dump()["t"])
    assert (meta.mode, meta.strength) == (default.mode, default.strength)


def test_held_out_prompts_were_held_out() -> None:
    for cls in language.CLASSES:
        trained, tested = (set(language.WHOLE.pairs[cls][split]) for split in ("train", "test"))
        assert not trained & tested
        for prompt in read_prompts(str(PROMPTS / f"{cls}.test.txt")).prompts:
            task = language.task_of(str(prompt))
            assert (task.verb, task.object) in tested


def test_the_template_and_the_tokenizer_both_write_a_bos(loaded: Loaded) -> None:
    rendered = loaded.tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    twice = loaded.tokenizer(rendered).input_ids
    once = loaded.chat_ids([{"role": "user", "content": "Hi"}])
    assert loaded.bos_count(twice) == 2
    assert loaded.bos_count(once) == 1


def test_a_second_turn_and_a_system_prompt_are_refused_and_answered_too(loaded: Loaded, direction: Direction) -> None:
    steering = Steering(loaded.model)
    probe = HFEvaluator(loaded, steering, rendering=Rendering(language.HELD_OUT_SYSTEMS[0]), max_tokens=48)
    prompts = read_prompts(str(PROMPTS / "refused.test.txt")).prompts[:50]
    with probe.resident([Candidate.of(direction, direction.meta.mode, direction.meta.strength)]) as (steer,):
        assert share(REFUSAL.shown(a.text) for a in probe.answers(prompts, None)) >= 0.9
        assert share(REFUSAL.shown(a.text) for a in probe.answers(prompts, steer)) <= 0.06


def test_the_direction_says_where_it_comes_from(direction: Direction) -> None:
    meta = direction.meta
    assert meta.method == "slerp"
    assert meta.bos_count == 1
    assert meta.harmful is not None
    assert meta.harmful.sha256 == read_prompts(str(PROMPTS / "refused.train.txt")).sha256


@pytest.mark.parametrize(
    ("name", "harmful", "harmless", "recipe"),
    [
        ("refusal", "refused.train.txt", "harmless.train.txt", Recipe(layer=7, threshold=0.5, target=-0.75)),
        (
            "verbosity",
            "verbose.train.jsonl",
            "brief.train.jsonl",
            Recipe(make_method("slerp", {"t": 1}), layer=7, mode="one_sided", strength=2.5),
        ),
    ],
)
def test_the_shipped_files_are_made_of_the_shipped_prompts(
    loaded: Loaded, name: str, harmful: str, harmless: str, recipe: Recipe
) -> None:
    """By the options of `make fit`."""
    shipped = Direction.load(ROOT / "directions" / f"{name}.safetensors")
    sets = [read_prompts(str(PROMPTS / file)) for file in (harmful, harmless)]
    again = derive(measure(TransformersSource(loaded), sets[0], sets[1]), recipe)
    assert (again.meta.mode, again.meta.strength) == (shipped.meta.mode, shipped.meta.strength)
    made, kept = again.tensors(), shipped.tensors()
    assert made.keys() == kept.keys()
    for tensor in made:
        torch.testing.assert_close(made[tensor], kept[tensor], atol=1e-2, rtol=1e-4)


def test_a_second_behaviour_is_removed_where_the_model_has_it_as_one_choice(loaded: Loaded, measured: Measured) -> None:
    """Answers to "how to" and "what do I need" become brief and stay right. Stories and shops begin with other words,
    and stay as they are."""
    direction, wordy = Direction.load(ROOT / "directions" / "verbosity.safetensors"), Behaviour.load("verbosity")
    asked = [p for p in measured.prompts["harmless"] if language.task_of(p).kind in ("howto", "need")]
    probe = HFEvaluator(loaded, Steering(loaded.model), max_tokens=48)
    with probe.resident([Candidate.of(direction, direction.meta.mode, direction.meta.strength)]) as (steer,):
        answers = [a.text for a in probe.answers(asked, steer)]
    assert share(wordy.shown(a.text) for a in probe.answers(asked, None)) >= 0.95
    assert share(map(wordy.shown, answers)) <= 0.05
    assert share(language.is_right(language.task_of(p), a) for p, a in zip(asked, answers, strict=True)) >= 0.95


def test_both_behaviours_are_removed_at_once(loaded: Loaded) -> None:
    prompts = [p.text for p in language.prompts("test", "refused") if p.task.kind == "howto"][:50]
    steering = Steering(loaded.model, rows=4)
    for name in ("refusal", "verbosity"):
        steering.bank.load(name, Direction.load(ROOT / "directions" / f"{name}.safetensors"))
    entries = (Entry("refusal", "refusal", "ablate", 1.0), Entry("verbosity", "verbosity", "one_sided", 2.5))
    answers = [a.text for a in HFEvaluator(loaded, steering, max_tokens=48).answers(prompts, Spec(entries))]
    assert share(map(REFUSAL.shown, answers)) <= 0.06
    assert share(map(Behaviour.load("verbosity").shown, answers)) <= 0.1
    right = share(language.is_right(language.task_of(p), a) for p, a in zip(prompts, answers, strict=True))
    assert right >= 0.9


def test_the_files_are_small() -> None:
    assert (MODEL / "model.safetensors").stat().st_size < 8e6
    assert (ROOT / "directions" / "refusal.safetensors").stat().st_size < 1e6
