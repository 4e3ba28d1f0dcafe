"""The engines: every request gets what it would get alone, plain ones to the last bit, and nothing is left behind."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GPTJConfig

from steer.direction import MODES
from steer.errors import NoRoom
from steer.hf.attach import Steering
from steer.hf.batching import BatchingEngine, start_engine
from steer.hf.engine import Engine, SequentialEngine
from steer.hf.sampling import Sampling, Token
from steer.runtime.index import RequestSteer
from steer.spec import Entry, Spec
from tests import models

GREEDY = Sampling(max_tokens=10, temperature=0.0, ignore_eos=True, logprobs=0)
NAMES = ("a", "b", "c")


@dataclass(frozen=True)
class Rig:
    engine: Engine
    model: Any

    def steer(self, spec: Spec | None) -> RequestSteer | None:
        return self.engine.steering.table.steer(spec) if spec else None

    async def tokens(self, prompt: list[int], spec: Spec | None, sampling: Sampling = GREEDY) -> list[Token]:
        return [token async for token in self.engine.generate(prompt, sampling, self.steer(spec))]


def rig(name: str, kind: str = "batching") -> Iterator[Rig]:
    model = models.tiny(name)
    steering = Steering(model)
    for seed, direction in enumerate(NAMES, 1):
        steering.table.load(direction, models.direction(model, seed=seed))
    if kind == "batching":
        engine = start_engine(steering, [2], context=256, capacity=256)
        assert isinstance(engine, BatchingEngine)
    else:
        engine = SequentialEngine(steering, [2], context=256, capacity=256)
        engine.start()
    yield Rig(engine, model)
    engine.stop()


@pytest.fixture(scope="module")
def llama() -> Iterator[Rig]:
    yield from rig("llama")


@pytest.fixture(scope="module")
def sequential() -> Iterator[Rig]:
    yield from rig("llama", "sequential")


def random_spec(rng: random.Random) -> Spec | None:
    entries = [
        Entry(name, name, rng.choice(MODES), round(rng.uniform(-1.5, 1.5), 2))
        for name in rng.sample(NAMES, rng.randint(0, 3))
    ]
    return Spec(tuple(entries)) or None


def random_prompt(rng: random.Random, longest: int = 24) -> list[int]:
    return [rng.randrange(3, models.VOCABULARY) for _ in range(rng.randint(1, longest))]


def oracle(rig: Rig, prompt: list[int], spec: Spec | None, count: int) -> list[int]:
    """Greedy tokens by whole forward passes, outside of any engine's batch."""
    ids = list(prompt)
    for _ in range(count):
        with torch.no_grad(), rig.engine.steering.batch([spec or None]):
            logits = rig.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
        ids.append(int(logits.argmax()))
    return ids[len(prompt) :]


def test_200_mixed_concurrent_requests_get_what_each_gets_alone(llama: Rig) -> None:
    rng = random.Random(0)
    requests = [(random_prompt(rng), random_spec(rng)) for _ in range(200)]

    async def late(delay: float, prompt: list[int], spec: Spec | None) -> list[Token]:
        await asyncio.sleep(delay)
        return await llama.tokens(prompt, spec)

    async def run() -> tuple[list[list[Token]], list[list[Token]]]:
        together = await asyncio.gather(*[late(rng.uniform(0, 1.0), p, s) for p, s in requests])
        alone = [await llama.tokens(p, s) for p, s in requests]
        return list(together), alone

    together, alone = asyncio.run(run())
    for (_, spec), x, y in zip(requests, together, alone, strict=True):
        assert [t.id for t in x] == [t.id for t in y], spec
        assert all(abs((s.logprob or 0) - (t.logprob or 0)) < 1e-3 for s, t in zip(x, y, strict=True))
    plain = {tuple(p): [t.id for t in x] for (p, s), x in zip(requests, alone, strict=True) if s is None}
    assert 20 < len(plain) < 150


def test_engine_agrees_with_whole_forward_passes(llama: Rig) -> None:
    rng = random.Random(1)
    for _ in range(12):
        prompt, spec = random_prompt(rng), random_spec(rng)
        expected = oracle(llama, prompt, spec, 6)
        # the oracle runs between requests, when the batching thread is idle
        got = asyncio.run(llama.tokens(prompt, spec, replace(GREEDY, max_tokens=6)))
        assert [t.id for t in got] == expected


@pytest.mark.parametrize("name", ["qwen3", "gemma2", "gemma3", "gpt2", "gpt_neox", "cohere", "mixtral", "qwen3_moe"])
def test_other_architectures_batch_right(name: str) -> None:
    for made in rig(name):
        rng = random.Random(2)
        requests = [(random_prompt(rng), random_spec(rng)) for _ in range(12)]

        async def run(made: Rig = made, requests: list[Any] = requests) -> list[list[Token]]:
            return list(await asyncio.gather(*[made.tokens(p, s) for p, s in requests]))

        together = asyncio.run(run())
        for (prompt, spec), tokens in zip(requests, together, strict=True):
            assert [t.id for t in tokens][:4] == oracle(made, prompt, spec, 4), (name, spec)


def test_plain_logits_are_bit_equal_beside_steered_neighbours(llama: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two batches of one shape: all plain, and the same with every neighbour of the first request steered."""
    assert isinstance(llama.engine, BatchingEngine)
    runner = llama.engine._processor.model_runner
    inner, seen = runner._sample, {}

    def record(scores: Tensor, output_ids: Tensor) -> None:
        batch = llama.engine._processor.inputs_and_outputs.requests_in_batch  # type: ignore[attr-defined]
        if len(batch) == 4:
            seen.setdefault(current, []).append(scores[0, 0].clone())
        inner(scores, output_ids)

    monkeypatch.setattr(runner, "_sample", record)
    prompts = [[5 + i, 6, 7, 8 + i] for i in range(4)]
    spec = Spec((Entry("a", "a", "ablate", 1.0),))

    async def run(specs: list[Spec | None]) -> list[list[Token]]:
        # the loop may only look at the queue when all four are in it
        with llama.engine.manager.pause():  # type: ignore[attr-defined]
            tasks = [asyncio.create_task(llama.tokens(p, s)) for p, s in zip(prompts, specs, strict=True)]
            await asyncio.sleep(0.1)
        return list(await asyncio.gather(*tasks))

    current = "plain"
    plain = asyncio.run(run([None] * 4))
    current = "mixed"
    mixed = asyncio.run(run([None, spec, spec, spec]))
    assert len(seen["plain"]) == len(seen["mixed"]) == GREEDY.max_tokens
    assert all(torch.equal(x, y) for x, y in zip(seen["plain"], seen["mixed"], strict=True))
    assert [t.id for t in plain[0]] == [t.id for t in mixed[0]]
    assert [t.id for t in plain[1]] != [t.id for t in mixed[1]], "the neighbours were really steered"


def test_both_engines_agree(llama: Rig, sequential: Rig) -> None:
    rng = random.Random(3)
    for _ in range(10):
        prompt, spec = random_prompt(rng), random_spec(rng)
        x, y = (asyncio.run(r.tokens(prompt, spec)) for r in (llama, sequential))
        assert [t.id for t in x] == [t.id for t in y]


def test_seeded_sampling_does_not_depend_on_neighbours(llama: Rig) -> None:
    sampling = Sampling(max_tokens=12, temperature=1.0, seed=7, ignore_eos=True)

    async def run() -> tuple[list[Token], list[Token]]:
        alone = await llama.tokens([5, 6, 7], None, sampling)
        crowd = [llama.tokens([5, 6, 7 + i], None, replace(sampling, seed=i)) for i in range(10)]
        beside, *_ = await asyncio.gather(llama.tokens([5, 6, 7], None, sampling), *crowd)
        return alone, beside

    alone, beside = asyncio.run(run())
    assert alone == beside


@pytest.mark.parametrize("which", ["llama", "sequential"])
def test_closing_the_stream_frees_the_place(which: str, request: pytest.FixtureRequest) -> None:
    made: Rig = request.getfixturevalue(which)

    async def run() -> None:
        stream = made.engine.generate([5, 6, 7], replace(GREEDY, max_tokens=200), None)
        assert (await anext(stream)).id >= 0
        assert made.engine.in_flight == 1
        await stream.aclose()
        assert made.engine.in_flight == 0
        if isinstance(made.engine, BatchingEngine):
            for _ in range(100):
                if not made.engine._processor.scheduler.active_requests:
                    break
                await asyncio.sleep(0.05)
            assert not made.engine._processor.scheduler.active_requests
            assert not made.engine._requests
            assert not made.engine.manager.output_router.result_handlers

    asyncio.run(run())


def test_a_full_engine_refuses_before_anything_is_queued(llama: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama.engine, "capacity", 2)

    async def run() -> None:
        streams = [llama.engine.generate([5, 6], replace(GREEDY, max_tokens=100), None) for _ in range(2)]
        for stream in streams:
            await anext(stream)
        with pytest.raises(NoRoom, match="at most 2"):
            await anext(llama.engine.generate([5], GREEDY, None))
        for stream in streams:
            await stream.aclose()

    asyncio.run(run())


def test_scores_are_the_steered_models_log_probabilities(llama: Rig) -> None:
    spec = Spec((Entry("a", "a", "ablate", 1.0),))
    ids = [5, 6, 7, 8, 9]
    scored = asyncio.run(llama.engine.score(ids, llama.steer(spec), 2))
    with torch.no_grad(), llama.engine.steering.batch([spec]):
        expected = torch.log_softmax(llama.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0], -1)
    for i, token in enumerate(scored):
        assert token.id == ids[i + 1]
        assert token.logprob == pytest.approx(float(expected[i, ids[i + 1]]), abs=1e-4)
        assert len(token.top) == 2


def test_scores_and_answers_at_once_are_what_each_is_alone(llama: Rig) -> None:
    rng = random.Random(3)
    requests = [([*random_prompt(rng, 12), 5], random_spec(rng)) for _ in range(40)]

    async def score(prompt: list[int], spec: Spec | None) -> list[Token]:
        return await llama.engine.score(prompt, llama.steer(spec), 1)

    async def run() -> None:
        together = await asyncio.gather(*[way(*r) for r in requests for way in (score, llama.tokens)])
        alone = [await way(*r) for r in requests for way in (score, llama.tokens)]
        for x, y in zip(together, alone, strict=True):
            assert all(abs((s.logprob or 0) - (t.logprob or 0)) < 1e-3 for s, t in zip(x, y, strict=True))
        # What the index is left with: a mixed batch behind them is mixed still.
        again = await asyncio.gather(*[llama.tokens(*r) for r in requests])
        assert [[t.id for t in x] for x in again] == [[t.id for t in x] for x in alone[1::2]]

    asyncio.run(run())


def test_a_model_that_batches_wrong_is_found_out_and_served_one_at_a_time(caplog: pytest.LogCaptureFixture) -> None:
    """GPT-J runs in continuous batching and gives other log-probabilities there (transformers 5.19)."""
    torch.manual_seed(0)
    config = GPTJConfig(vocab_size=128, n_embd=64, n_layer=3, n_head=4, n_positions=256, rotary_dim=16)
    model = AutoModelForCausalLM.from_config(config).eval()
    steering = Steering(model)
    steering.table.load("a", models.direction(model))
    engine = start_engine(steering, [2], context=128, capacity=8)
    try:
        assert isinstance(engine, SequentialEngine)
        assert "is right" in caplog.text
        made, spec = Rig(engine, model), Spec((Entry("a", "a", "ablate", 1.0),))
        for each in (None, spec):
            tokens = asyncio.run(made.tokens([5, 6, 7], each, replace(GREEDY, max_tokens=5)))
            assert [t.id for t in tokens] == oracle(made, [5, 6, 7], each, 5)
    finally:
        engine.stop()
