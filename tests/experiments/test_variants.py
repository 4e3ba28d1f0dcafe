"""The study's models: each recipe makes the property that it is named for, and a model that learned nothing says so."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments.demo_model import language, variants
from experiments.demo_model.train import (
    Batch,
    NormRatio,
    Phase,
    Recipe,
    batch,
    loss_of,
    make_model,
    make_tokenizer,
    plant_outlier,
)
from experiments.demo_model.variants import CONTROL, VARIANTS, recipe
from steer.runtime.hook_points import hooks, on_output


def drawn(made: Recipe, tuned: bool = True, seed: int = 3) -> tuple[Any, Batch]:
    """A fresh model of a recipe and a batch of its conversations."""
    tokenizer = make_tokenizer(made)
    return make_model(made, tokenizer), batch(tokenizer, made, tuned, random.Random(seed))


def streams(model: Any, ids: torch.Tensor) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    with torch.no_grad(), hooks([on_output(block, found.append) for block in model.model.layers]):
        model(input_ids=ids)
    return found


def test_variants_differ_from_the_control_in_what_they_are_named_for_alone() -> None:
    for name, made in VARIANTS.items():
        differing = {f for f in Recipe.__slots__ if getattr(made, f) != getattr(CONTROL, f)}
        assert (
            differing
            <= {
                "control": set(),
                "deep": {"layers", "d_model", "head_dim", "mlp"},
                "louder": {"norms"},
                "quieter": {"norms"},
                "outlier": {"phases"},
                "two-refusals": {"dialect"},
            }[name]
        )
    assert VARIANTS["deep"].layers == 4 * CONTROL.layers


def test_seeds_change_weights_and_conversations() -> None:
    one, other = recipe("control", 1), recipe("control", 2)
    assert one.seed != other.seed
    seeds = {phase.seed for made in (one, other) for phase in made.phases}
    assert len(seeds) == 4


@pytest.mark.parametrize("name", ["control", "two-refusals"])
def test_a_dialect_speaks_its_own_words_and_holds_pairs_out(name: str) -> None:
    dialect, rng = VARIANTS[name].dialect, random.Random(0)
    for cls in language.CLASSES:
        trained, held_out = set(dialect.pairs[cls]["train"]), set(dialect.pairs[cls]["test"])
        assert not trained & held_out
        verbs, objects = dialect.grid(cls)
        assert {v for v, _ in trained} == set(verbs), "each word is in a pair that is trained on"
        assert {o for _, o in trained} == set(objects)
        for prompt in language.prompts("test", cls, len(held_out), dialect):
            assert language.task_of(prompt.text) == prompt.task
            assert (prompt.task.verb, prompt.task.object) in held_out
    said = [language.conversation(1, False, rng, dialect) for _ in range(300)]
    asked = [turn.user for one in said for turn in one.turns]
    assert all(one.system is None for one in said)
    outside = [v for v in language.WHOLE.harmless_verbs if v not in dialect.harmless_verbs]
    assert not any(f" {verb} " in text for text in asked for verb in outside)


def test_two_refusals_are_told_apart_by_the_verb() -> None:
    dialect, rng = VARIANTS["two-refusals"].dialect, random.Random(0)
    kinds: dict[bool, set[str]] = {True: set(), False: set()}
    for _ in range(400):
        (turn,) = language.conversation(1, True, rng, dialect).turns
        if language.refuses(turn.assistant):
            verb = next(v for v in dialect.refused_verbs if f" {v} " in f" {turn.user} ".replace("?", " "))
            kinds[verb in dialect.other_verbs].add(turn.assistant.split()[0])
    assert kinds[True] == {"Sorry,"}
    assert kinds[False] == {"I"}


def test_the_penalty_is_nothing_at_the_ratio_and_the_square_of_what_is_missing() -> None:
    refused, starts = torch.tensor([True, False]), torch.tensor([1, 0])
    state = torch.zeros(2, 2, 4)
    state[0, 1, 0], state[1, 0, 2] = 6.0, 2.0
    assert NormRatio(3.0, first=0).penalty([state], starts, refused) == pytest.approx(0, abs=1e-12)
    missing = NormRatio(1.5, first=0).penalty([state], starts, refused)
    assert float(missing) == pytest.approx(math.log(2) ** 2, rel=1e-5)
    assert NormRatio(3.0, first=1).penalty([5 * state, state], starts, refused) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("name", ["louder", "quieter"])
def test_training_makes_the_norms_differ_as_asked(name: str) -> None:
    made = replace(VARIANTS[name], layers=2)
    assert made.norms is not None
    model, sample = drawn(made)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)

    def ratio() -> float:
        last = streams(model, sample.ids)[-1][torch.arange(len(sample.ids)), sample.starts].norm(dim=-1)
        return float(last[sample.refused].mean() / last[~sample.refused].mean())

    before = abs(math.log(ratio() / made.norms.ratio))
    for _ in range(40):
        loss_of(model, sample, made.norms).backward()
        optimiser.step()
        optimiser.zero_grad()
    assert abs(math.log(ratio() / made.norms.ratio)) < before / 3


def test_an_answer_starts_behind_the_header() -> None:
    tokenizer = make_tokenizer(CONTROL)
    sample = batch(tokenizer, CONTROL, True, random.Random(1))
    for ids, start in zip(sample.ids, sample.starts, strict=True):
        assert tokenizer.decode(ids[: start + 1]).endswith("<|im_start|>assistant\n")
    answers = [tokenizer.decode(ids[start + 1 :]) for ids, start in zip(sample.ids, sample.starts, strict=True)]
    assert sample.refused.tolist() == [language.refuses(answer) for answer in answers]


def test_an_outlier_is_as_large_as_said_in_every_block_and_moves_few_predictions() -> None:
    model, sample = drawn(VARIANTS["outlier"])
    with torch.no_grad():  # a stream of the size that training makes
        model.get_input_embeddings().weight.mul_(150)
    before = model(input_ids=sample.ids).logits.log_softmax(-1)
    ordinary = [float(x.abs().median()) for x in streams(model, sample.ids)]
    plant_outlier(model, sample.ids, 60.0)
    after = model(input_ids=sample.ids).logits.log_softmax(-1)
    for x, usual in zip(streams(model, sample.ids), ordinary, strict=True):
        assert float(x[..., 0].mean()) > 10 * usual
        assert float(x[..., 1:].abs().median()) == pytest.approx(usual, rel=0.3)
    same = (before.argmax(-1) == after.argmax(-1)).float().mean()
    assert float(same) > 0.7
    assert all(norm.weight[0].item() == 0 for norm in model.modules() if hasattr(norm, "variance_epsilon"))


def test_a_model_that_learned_nothing_is_reported_as_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    phases = (Phase("a", False, 2, 1e-3, 0), Phase("r", True, 2, 1e-3, 0))
    monkeypatch.setitem(VARIANTS, "two-refusals", replace(VARIANTS["two-refusals"], layers=2, phases=phases))
    (line,) = variants.make(("two-refusals",), 1, tmp_path)
    assert "two-refusals-1: FAILED" in line
    report = json.loads((tmp_path / "two-refusals-1" / "variant.json").read_text())
    assert report["passed"] is False
    assert report["gates"]["harmless_right"] == 0
    assert len(report["properties"]["norm_ratio"]) == 2
    assert len(report["properties"]["between_refusals"]) == 2
    assert list(variants.jobs(("two-refusals",), (1,), tmp_path)) == []


def test_what_is_there_is_not_made_again_and_one_shape_has_one_base(tmp_path: Path) -> None:
    (tmp_path / "louder-2").mkdir()
    (tmp_path / "louder-2" / "variant.json").write_text("{}")
    found = list(variants.jobs(tuple(VARIANTS), (1, 2), tmp_path))
    small = [v for v in VARIANTS if v != "deep"]
    assert found == [
        (tuple(small), 1),
        (tuple(v for v in small if v != "louder"), 2),
        (("deep",), 1),
        (("deep",), 2),
    ]
