"""Trying candidates out through vLLM: many in one call are what each is alone, and what transformers says of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from steer.errors import InvalidInput, NoRoom, SpecError
from steer.hf.load import load
from steer.hf.steering import Steering
from steer.lab.behaviour import Behaviour
from steer.lab.evaluator import Candidate
from steer.lab.measure import MeasurementOptions, measure
from steer.lab.probe import HFEvaluator
from steer.lab.progress import answering
from steer.lab.prompts import PromptSet
from steer.lab.race import Race, Sets
from steer.lab.search import Search, SearchSpace, Settings
from steer.lab.source import TransformersSource
from steer.spec import PHASES, Condition, Entry, Spec
from steer.tokenization import Thinking
from tests import models
from tests.oracle import acting
from tests.servers import ROOT
from tests.vllm import device, tiny

PROMPTS = ("hello world", "a longer prompt of some words", "xyz?")
CHANCE = Behaviour(name="chance", description="by chance", patterns=("^[!-O]",), window=1)
SETS = Sets(tuple("abc" * n for n in range(1, 11)), tuple("xy " * n + "z" for n in range(1, 11)), PROMPTS)


def estimates(one: Any, logits: torch.Tensor) -> list[float]:
    """Of a sampled answer, from the log-probabilities that transformers has after each of its tokens when steered."""
    from steer.vllm.offline import estimated_divergence

    own = [*enumerate(one.ids)][one.start :]
    steered = [place(logits[i - 1].double().numpy(), token) for i, token in own]
    return [estimated_divergence(own[i][1], one.places[i], each) for i, each in enumerate(steered)]


def place(logp: Any, token: int, top: int = 20) -> Any:
    from steer.vllm.offline import Place

    return Place(float(logp[token]), {int(i): float(logp[i]) for i in np.argsort(-logp)[:top]})


@pytest.mark.parametrize(("vocabulary", "top", "scale"), [(50, 5, 3.0), (50, 5, 0.01), (200, 20, 8.0), (10, 20, 2.0)])
def test_the_estimate_of_a_divergence_has_it_as_its_expectation(vocabulary: int, top: int, scale: float) -> None:
    """Over all tokens that can be drawn; and it varies less than that of the drawn token alone."""
    from steer.vllm.offline import estimated_divergence

    random, spread = np.random.default_rng(0), np.zeros(2)
    for _ in range(20):
        logits = random.normal(size=vocabulary) * 3
        logp, logq = (x - np.logaddexp.reduce(x) for x in (logits, logits + random.normal(size=vocabulary) * scale))
        p = np.exp(logp)
        found = [estimated_divergence(i, place(logp, i, top), place(logq, i, top)) for i in range(vocabulary)]
        alone = np.expm1(logq - logp) - (logq - logp)
        divergence = float(p @ (logp - logq))
        assert p @ found == pytest.approx(divergence, rel=1e-9, abs=1e-12)
        assert min(found) >= 0
        spread += [p @ (np.array(each) - divergence) ** 2 for each in (found, alone)]
    assert spread[0] < spread[1]


def test_the_estimate_of_a_divergence_sees_what_is_seldom_drawn() -> None:
    """A refusal that began one answer in a thousand, and begins none when steered."""
    from steer.vllm.offline import estimated_divergence

    logits = np.array([5.0, 4.0, 3.0, -2.0, *[-9.0] * 96])
    logp, logq = (x - np.logaddexp.reduce(x) for x in (logits, logits - 8 * (np.arange(100) == 3)))
    assert 5e-4 < np.exp(logp[3]) < 1e-3
    divergence = float(np.exp(logp) @ (logp - logq))
    assert estimated_divergence(0, place(logp, 0), place(logq, 0)) == pytest.approx(divergence, rel=0.2)
    assert np.expm1(logq[0] - logp[0]) - (logq[0] - logp[0]) < divergence / 1000


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    tiny.make("llama", folder)
    return folder


@pytest.fixture(scope="module")
def probe(folder: Path) -> HFEvaluator:
    loaded = load(str(folder), dtype="float32")
    return HFEvaluator(loaded, Steering(loaded.model, rows=32, rank=2), max_tokens=6)


@pytest.fixture(scope="module")
def evaluator(folder: Path, in_process: Callable[[Any], Any]) -> Iterator[Any]:
    from steer.vllm.offline import VllmEvaluator, VllmSource, start

    options = ["--dtype", "float32", "--max-model-len", "256", "--distributed-executor-backend", "uni"]
    llm = start(str(folder), [*options, *device.ARGUMENTS], rank=2)
    try:
        yield VllmEvaluator(VllmSource(llm, str(folder)), None, 6)
    finally:
        in_process(llm)


@pytest.fixture(scope="module")
def candidates(probe: HFEvaluator) -> list[Candidate]:
    first, second = (models.direction(probe.loaded.model, seed=seed, k=k) for seed, k in ((1, 1), (2, 2)))
    return [
        Candidate.of(first, "ablate", 1.0),
        Candidate.of(first, "add", -0.5),
        Candidate.of(second, "one_sided", 0.7),
        Candidate.of(first, "ablate", 0.0),
        Candidate(first, Entry("", "", "one_sided", 1.0, shift=-0.5)),
        Candidate(first, Entry("", "", "ablate", 1.0, condition=Condition("it", 0, above=0.01, each=True)), first),
    ]


def test_each_prompt_advances_the_progress_once(probe: HFEvaluator, evaluator: Any) -> None:
    for one in (probe, evaluator):
        before = one.progress.done
        one.answers(PROMPTS, None)
        assert one.progress.done - before == pytest.approx(len(PROMPTS) * answering(6)), "as much as was planned"
        before = one.progress.done
        plain = one.continuations(PROMPTS)
        assert one.progress.done - before == pytest.approx(len(PROMPTS) * answering(6))
        before = one.progress.done
        one.divergences(PROMPTS, plain, None)
        assert one.progress.done - before == pytest.approx(len(PROMPTS))


def test_rows_are_what_transformers_says(probe: HFEvaluator, evaluator: Any, candidates: list[Candidate]) -> None:
    tokens = [ord("A") - 29, ord("z") - 29, 7]
    seen = []
    for one in (probe, evaluator):
        before = one.room
        with one.resident(candidates) as steers:
            assert one.room == before - 3, "what shares a direction shares its rows"
            prompts = [*PROMPTS] * len(steers)
            rows = [steer for steer in steers for _ in PROMPTS]
            seen.append((one.answers(prompts, rows), one.opening_odds(prompts, rows, tokens)))
        assert one.room == before
    (ours, odds), (theirs, its) = seen
    assert [answer.ids for answer in theirs] == [answer.ids for answer in ours]
    assert its == pytest.approx(odds, abs=1e-3)


def test_divergences_of_many_are_those_of_each(evaluator: Any, candidates: list[Candidate]) -> None:
    plain = evaluator.continuations(PROMPTS)
    with evaluator.resident(candidates) as steers:
        rows = [steer for steer in steers for _ in PROMPTS]
        together = evaluator.divergences([*PROMPTS] * len(steers), [*plain] * len(steers), rows)
        for number, steer in enumerate(steers):
            alone = evaluator.divergences(PROMPTS, plain, steer)
            for a, b in zip(alone, together[3 * number :], strict=False):
                assert a == pytest.approx(b, abs=1e-5)
        begun = evaluator.divergences(PROMPTS, [one.first(2) for one in plain], steers[0])
        assert [row.tolist() for row in begun] == [pytest.approx(row[:2], abs=1e-5) for row in together[:3]]
    assert max(row.max() for row in together[9:12]) < 1e-6
    assert min(row.mean() for row in together[:3]) > 1e-4


def test_tokens_and_layers_are_those_of_transformers(
    probe: HFEvaluator, evaluator: Any, candidates: list[Candidate]
) -> None:
    """Along its sampled answers too: the engine reads them after their prompts in one pass, and the estimate has the
    same log-probabilities in it."""
    first = candidates[0]
    tried = [first.asking(tokens=each) for each in ("prompt", "answer", "not-first", "first-2", "last-99", "last-2")]
    tried += [first.asking(layers="1", tokens="answer"), first]
    plain, loaded = evaluator.continuations(PROMPTS), probe.loaded
    with probe.resident(tried) as ours, evaluator.resident(tried) as theirs:
        prompts = [*PROMPTS] * len(tried)
        specs, texts = ([one for one in each for _ in PROMPTS] for each in (ours, theirs))
        said = [
            [answer.ids for answer in one.answers(prompts, rows)] for one, rows in ((probe, specs), (evaluator, texts))
        ]
        assert said[0] == said[1]
        odds = probe.opening_odds(prompts, specs, [7, 40]), evaluator.opening_odds(prompts, texts, [7, 40])
        assert odds[0] == pytest.approx(odds[1], abs=1e-3)
        found = iter(evaluator.divergences(prompts, [*plain] * len(tried), texts))
        for spec in ours:
            for one in plain:
                assert isinstance(spec, Spec)
                steer = probe.steering.bank.steer(spec, one.start)
                assert steer is not None
                with probe.steering.batch([steer], [len(one.ids)], [0]), torch.inference_mode():
                    logits = loaded.model(torch.tensor([one.ids])).logits[0].log_softmax(-1)
                assert next(found) == pytest.approx(estimates(one, logits), abs=1e-3)
        with pytest.raises(SpecError, match="not known where the prompt ends"):
            evaluator.log_probabilities([[1, 2, 3]], theirs[0])
    with (
        pytest.raises(SpecError, match="the model has the layers"),
        evaluator.resident([first.asking(layers="77")]),
    ):
        pass


def test_a_condition_of_one_token_is_decided_before_an_answer_is_read(
    probe: HFEvaluator, evaluator: Any, candidates: list[Candidate]
) -> None:
    """By the last token of each prompt: of those that meet it the later layers act, of the others nothing does."""
    first, plain, last = (
        candidates[0],
        evaluator.continuations(PROMPTS),
        probe.loaded.model.config.num_hidden_layers - 1,
    )
    components = []
    for one in plain:
        with torch.inference_mode():
            hidden = probe.loaded.model(torch.tensor([one.ids[: one.start]]), output_hidden_states=True).hidden_states
        components.append(float(hidden[1][0, -1] @ first.direction.directions[0, 0]))
    low, *_, high = sorted(components)
    middle = (low + high) / 2
    assert high - low > 1e-2, "or another direction"
    condition = Condition("it", 0, above=middle)
    once = Candidate(first.direction, Entry("", "", "ablate", 1.0, condition=condition), first.direction)
    room = evaluator.room
    with evaluator.resident([once, first.asking(layers=f"1-{last}", tokens="answer")]) as (text, after):
        asked = [*PROMPTS, *PROMPTS], [*plain, *plain]
        found = evaluator.divergences(*asked, [text] * len(PROMPTS) + [None] * len(PROMPTS))
        acts = evaluator.divergences(PROMPTS, plain, after)
    for component, got, off, on in zip(components, found, found[len(PROMPTS) :], acts, strict=False):
        assert got == pytest.approx(on if component > middle else off, abs=1e-6)
        assert on.max() > 1e-4 > off.max()
    assert (evaluator.room, evaluator.frontend._tickets, evaluator.frontend.held) == (room, {}, {})


@pytest.mark.parametrize("tokens", PHASES)
def test_phases_begin_and_end_with_what_a_scored_answer_says(
    probe: HFEvaluator, evaluator: Any, candidates: list[Candidate], tokens: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of plain answers that begin and end a thinking in their midst, token by token."""
    plain, placement = evaluator.continuations(PROMPTS), evaluator.frontend.placement
    said = plain[0].ids[plain[0].start :]
    thinking = Thinking(said[1], said[3], frozenset())
    assert len({*said[:4]}) == 4, "or another seed"
    monkeypatch.setattr(placement, "shape", replace(placement.shape, thinking=thinking))
    hello = ["1:looks", "", [thinking.begin, thinking.end]]
    evaluator.source.llm.collective_rpc("steer_hello", args=tuple(hello))
    candidate = candidates[0].asking(tokens=tokens)
    with (
        evaluator.resident([candidate]) as (text,),
        probe.resident([candidate.asking(tokens=None)]) as (spec,),
    ):
        assert isinstance(spec, Spec)
        steer = probe.steering.bank.steer(spec, 1)
        for one, found in zip(plain, evaluator.divergences(PROMPTS, plain, text), strict=True):
            resolved = Spec(tuple(replace(entry, tokens=tokens) for entry in spec.entries))
            acts = [acting(resolved, one.start, at, one.ids, thinking) for at in range(len(one.ids))]
            rows = [steer if each else None for each in acts]
            with probe.steering.batch(rows, [1] * len(rows), [*range(len(rows))]), torch.inference_mode():
                logits = probe.loaded.model(torch.tensor([one.ids])).logits[0].log_softmax(-1)
            assert found == pytest.approx(estimates(one, logits), abs=1e-3)
            assert one is not plain[0] or (found > 1e-6).any(), "it acts in the first answer"


def test_other_numbers_than_log_probabilities_of_the_model_are_not_compared(folder: Path) -> None:
    from steer.vllm.offline import start

    with pytest.raises(InvalidInput, match="--logprobs-mode processed_logits: what is compared here are"):
        start(str(folder), ["--logprobs-mode", "processed_logits"])


def test_too_many_at_once_leave_nothing_behind(evaluator: Any, probe: HFEvaluator, candidates: list[Candidate]) -> None:
    before = evaluator.room
    many = [Candidate.of(models.direction(probe.loaded.model, seed=seed), "ablate", 1.0) for seed in range(before + 1)]
    evaluator.frontend.registry.patience = 0.0
    with pytest.raises(NoRoom), evaluator.resident(many):
        pass
    assert evaluator.room == before
    race = Race(evaluator, CHANCE, replace(SETS, asked=SETS.asked[:2], other=SETS.other[:1], borderline=()))
    assert len(race.run(many)) == before + 1, "a race takes them in turns"


def test_a_search_runs_on_the_engine(evaluator: Any, folder: Path, tmp_path: Path) -> None:
    """The same trials as on transformers: they are drawn before anything is tried, and answer alike."""
    loaded = load(str(folder), dtype="float32")
    first, second = (PromptSet(name, "0" * 64, prompts) for name, prompts in (("a", SETS.asked), ("b", SETS.other)))
    measured = measure(TransformersSource(loaded), first, second, MeasurementOptions())
    settings = Settings(
        model="tiny",
        behaviour=CHANCE,
        harmful=first.dataset,
        harmless=second.dataset,
        borderline=first.dataset,
        group=4,
        space=SearchSpace(methods=("slerp", "linear")),
    )
    found = []
    for name, one in (
        ("theirs", evaluator),
        ("ours", HFEvaluator(loaded, Steering(loaded.model, rank=1), max_tokens=6)),
    ):
        search = Search.begin(tmp_path / name, settings, lambda _partial: measured)
        found.append(search.run(one, SETS, 4))
    for theirs, ours in zip(*found, strict=True):
        assert theirs.point == ours.point
        count = min(len(theirs.figures.asked), len(ours.figures.asked))
        assert theirs.figures.asked[:count] == ours.figures.asked[:count]
        assert np.isfinite(theirs.figures.kl)


def test_the_command_writes_nothing_but_results_to_its_output(tmp_path: Path) -> None:
    for name, text in {"asked": "How do I kill a thread?", "other": "What is a thread?"}.items():
        (tmp_path / f"{name}.txt").write_text(text)
    command = [sys.executable, "-m", "steer", "eval", str(ROOT / "steer/demo/model"), "--json", "--max-tokens", "4"]
    command += ["--direction", str(ROOT / "directions/refusal.safetensors"), "--condition", "refusal@4>-99"]
    command += ["--harmful", str(tmp_path / "asked.txt"), "--harmless", str(tmp_path / "other.txt")]
    command += ["--backend", "vllm", "--max-model-len", "128", "--max-num-seqs", "4", *device.ARGUMENTS]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("VLLM_LOGGING")}
    environment |= device.ENVIRONMENT
    done = subprocess.run(command, capture_output=True, text=True, timeout=1500, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["arms"]
