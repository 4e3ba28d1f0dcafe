"""The engines: every request gets what it would get alone, plain ones to the last bit, and nothing is left behind."""

from __future__ import annotations

import asyncio
import gc
import itertools
import random
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor
from transformers.generation.continuous_batching.requests import GenerationOutput

from steer.errors import EngineFailed, NoRoom, NotFinite, RequestFailed, UnsupportedModel
from steer.hf import batching, internals
from steer.hf.batching import BatchingEngine, start_engine
from steer.hf.engine import Engine, SequentialEngine
from steer.hf.sampling import Sampling, Token
from steer.hf.steering import Steering
from steer.names import MODES, Mode
from steer.readout import Line, Readout
from steer.runtime.bank import HookPoint
from steer.runtime.token_index import RequestSteer, TokenIndex
from steer.spec import PHASES, Condition, Entry, Spec
from steer.tokenization import Thinking
from tests import models
from tests.oracle import acting

GREEDY = Sampling(max_tokens=10, temperature=0.0, ignore_eos=True, logprobs=0)
NAMES = ("a", "b", "c")
#: At which tokens; mostly at all.
PLACES = (None, None, None, "prompt", "answer", "not-first", "first-3", "last-2")
#: Directions whose operation gives values that are no numbers, and one that only float16 cannot hold.
BROKEN = {"inf": 1e38, "nan": float("nan"), "large": 1e6}


@dataclass(frozen=True)
class Rig:
    engine: Engine
    model: Any

    def steer(self, spec: Spec | None, prompt: int = 1) -> RequestSteer | None:
        return self.engine.steering.bank.steer(spec, prompt) if spec else None

    async def tokens(
        self, prompt: list[int], spec: Spec | None, sampling: Sampling = GREEDY, thinking: Thinking | None = None
    ) -> list[Token]:
        phase = None if spec is None else spec.phase(thinking, prompt)
        steer = self.engine.steering.bank.steer(spec or Spec(), len(prompt), phase)
        return [token async for token in self.engine.generate(prompt, sampling, steer)]


def rig(name: str, kind: str = "batching", dtype: torch.dtype = torch.float32) -> Iterator[Rig]:
    model = models.tiny(name, dtype)
    steering = Steering(model, rank=2 * len(NAMES))  # each of them may turn
    for seed, named in enumerate(NAMES, 1):
        steering.bank.load(named, models.direction(model, seed=seed, plane=True))
    for what, weight in BROKEN.items():  # no file holds such weights
        direction = models.direction(model, seed=9)
        steering.bank.load(what, replace(direction, weights=torch.full_like(direction.weights, weight)))
    if kind != "sequential":
        engine = start_engine(steering, [2], context=256, capacity=256)
        assert kind == "any" or isinstance(engine, BatchingEngine)
    else:
        engine = SequentialEngine(steering, [2], context=256, capacity=256)
        engine.start()
    try:
        yield Rig(engine, model)
    finally:
        engine.stop()


@pytest.fixture(scope="module")
def llama() -> Iterator[Rig]:
    yield from rig("llama")


@pytest.fixture(scope="module")
def sequential() -> Iterator[Rig]:
    yield from rig("llama", "sequential")


def random_spec(rng: random.Random) -> Spec | None:
    entries = [
        Entry(
            name,
            name,
            rng.choice(MODES),
            round(rng.uniform(-1.5, 1.5), 2),
            rng.choice((None, None, "1")),
            rng.choice(PLACES),
        )
        for name in rng.sample(NAMES, rng.randint(0, 3))
    ]
    return Spec(tuple(entries)) or None


def random_prompt(rng: random.Random, longest: int = 24) -> list[int]:
    return [rng.randrange(3, models.VOCABULARY) for _ in range(rng.randint(1, longest))]


NO_THINKING = Thinking(-1, -1, frozenset())


def oracle(rig: Rig, prompt: list[int], spec: Spec | None, count: int, thinking: Thinking = NO_THINKING) -> list[int]:
    """Greedy tokens by whole forward passes, outside of any engine's batch."""
    ids = list(prompt)
    for _ in range(count):
        each = [acting(spec or Spec(), len(prompt), position, ids, thinking) for position in range(len(ids))]
        with torch.no_grad(), rig.engine.steering.batch(each, [1] * len(ids)):
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


#: No paged attention has the soft cap of Gemma 2; transformers 5.24 gives GPT-NeoX's layers the paged cache by a name
#: that they do not know.
UNSURE = ("gemma2", "gpt_neox")


@pytest.mark.parametrize("name", ["qwen3", "gemma2", "gemma3", "gpt2", "gpt_neox", "cohere", "mixtral", "qwen3_moe"])
def test_other_architectures_batch_right(name: str) -> None:
    for made in rig(name, "any" if name in UNSURE else "batching"):
        rng = random.Random(2)
        requests = [(random_prompt(rng), random_spec(rng)) for _ in range(12)]

        async def run(made: Rig = made, requests: list[Any] = requests) -> list[list[Token]]:
            return list(await asyncio.gather(*[made.tokens(p, s) for p, s in requests]))

        together = asyncio.run(run())
        for (prompt, spec), tokens in zip(requests, together, strict=True):
            assert [t.id for t in tokens][:4] == oracle(made, prompt, spec, 4), (name, spec)


def test_heads_of_several_sizes_are_served_one_at_a_time() -> None:
    """transformers has no paged cache for them (Gemma 4), and says so by an error of its own kind."""
    sizes = models.configs()["gemma3"].to_dict()
    shared = {name: sizes[name] for name in ("vocab_size", "hidden_size", "intermediate_size", "head_dim")}
    layers = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}
    config = tf.Gemma4TextConfig(
        **shared | layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        global_head_dim=32,
        vocab_size_per_layer_input=models.VOCABULARY,
        hidden_size_per_layer_input=8,
        sliding_window=64,
        num_kv_shared_layers=0,
    )
    engine = start_engine(Steering(tf.AutoModelForCausalLM.from_config(config).eval()), [2], context=128, capacity=4)
    try:
        assert isinstance(engine, SequentialEngine)
    finally:
        engine.stop()


def test_plain_logits_are_bit_equal_beside_steered_neighbours(llama: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two batches of one shape: all plain, and the same with every neighbour of the first request steered."""
    assert isinstance(llama.engine, BatchingEngine)
    runner = llama.engine._processor.model_runner
    inner = runner._sample
    seen: dict[str, list[Tensor]] = {}

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


def under(condition: Condition, *entries: Entry) -> Spec:
    """`entries` under a condition, as the registry would resolve them."""
    behind = f"{condition.layer + 1}-{models.LAYERS - 1}"
    return Spec(tuple(replace(e, layers=e.layers or behind, tokens="answer", condition=condition) for e in entries))


def component(rig: Rig, prompt: list[int], layer: int, direction: str) -> float:
    """Of the plain stream at the prompt's last token."""
    with torch.no_grad(), rig.engine.steering.batch([None]):  # the last step's steering is there until the next one
        hidden = rig.model(input_ids=torch.tensor([prompt]), use_cache=False, output_hidden_states=True).hidden_states
    bank = rig.engine.steering.bank
    return float(
        hidden[layer + 1][0, -1].float()
        @ bank.slices[HookPoint("resid_post", layer)].vectors[bank.rows_of([direction])[0]]
    )


def side_of(side: str, number: float, layer: int) -> Condition:
    return Condition("c", layer, *((number, None) if side == "above" else (None, number)), digest="c")


CONDITIONAL = ((Entry("a", "a", "ablate", 2.0),), (Entry("a", "a", "rotate", 1.0), Entry("b", "b", "add", 1.5)))


@pytest.mark.parametrize("kind", ["llama", "sequential"])
def test_under_a_condition_a_request_is_plain_or_steered_behind_it(kind: str, request: pytest.FixtureRequest) -> None:
    """To the last bit the plain one, or the one that is steered at the tokens of the answer and the layers behind the
    condition; and it says which. Also for a prompt of one token."""
    made: Rig = request.getfixturevalue(kind)
    for entries, prompt, layer in itertools.product(CONDITIONAL, ([5, 6, 7, 11, 9], [8]), (0, 1)):
        c = component(made, prompt, layer, "c")
        steered = Spec(tuple(replace(e, condition=None) for e in under(Condition("c", layer), *entries).entries))
        plain, whole = (asyncio.run(made.tokens(prompt, spec)) for spec in (None, steered))
        assert plain != whole
        assert {t.applied for t in (*plain, *whole)} == {None}
        for side, sign in (("above", 1), ("below", -1)):
            for holds in (True, False):
                number = c - sign * (0.01 if holds else -0.01)
                condition = side_of(side, number, layer)
                got = asyncio.run(made.tokens(prompt, under(condition, *entries)))
                assert got == (whole if holds else plain), (entries, condition, c)
                assert {t.applied for t in got} == {holds}


@pytest.mark.parametrize("tokens", [None, "prompt", "answer", "not-first", "last-2"])
@pytest.mark.parametrize("kind", ["llama", "sequential"])
def test_tokens_that_decide_for_themselves_are_steered_or_keep_their_bits(
    kind: str, tokens: str | None, request: pytest.FixtureRequest
) -> None:
    """Which these are follows from a plain pass: nothing acts before the layer of the condition has ended."""
    made: Rig = request.getfixturevalue(kind)
    steering, count = made.engine.steering, 6
    for entries, prompt, layer in itertools.product(CONDITIONAL, ([5, 6, 7, 11, 9], [8]), (0, 1)):
        layers = f"{layer + 1}-{models.LAYERS - 1}"
        steered = Spec(tuple(replace(e, layers=e.layers or layers, tokens=tokens) for e in entries))
        if any(e.layers and e.range[0] <= layer for e in entries):
            continue
        for side, sign in (("above", 1), ("below", -1)):
            number = component(made, prompt, layer, "c") - sign * 0.01

            def under_each(number: float, side: str = side, layer: int = layer, steered: Spec = steered) -> Spec:
                condition = replace(side_of(side, number, layer), each=True)
                return Spec(tuple(replace(e, condition=condition) for e in steered.entries))

            got = asyncio.run(made.tokens(prompt, under_each(number), replace(GREEDY, max_tokens=count)))
            assert {t.applied for t in got} == {None}
            ids = list(prompt)
            for token in got:
                passed = [sign * (component(made, ids[: at + 1], layer, "c") - number) > 0 for at in range(len(ids))]
                each = [
                    acting(steered, len(prompt), position, ids) if holds else Spec()
                    for position, holds in enumerate(passed)
                ]
                with torch.no_grad(), steering.batch(each, [1] * len(ids)):
                    logits = made.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
                assert token.id == int(logits.argmax()), (entries, tokens, passed)
                ids.append(token.id)
            plain, whole = (asyncio.run(made.tokens(prompt, spec)) for spec in (None, steered))
            assert asyncio.run(made.tokens(prompt, under_each(sign * 1e9))) == plain
            assert asyncio.run(made.tokens(prompt, under_each(-sign * 1e9))) == whole


def acts_in(tokens: str) -> Spec:
    return Spec((Entry("a", "a", "ablate", 2.0, None, tokens), Entry("b", "b", "add", 1.5, "1", tokens)))


@pytest.mark.parametrize("kind", ["llama", "sequential"])
def test_a_phase_begins_and_ends_with_its_tokens(kind: str, request: pytest.FixtureRequest) -> None:
    """To the last bit plain before it; and it says whether it came. `after-thinking` is `answer` where the prompt has
    ended the thinking, and nothing where it never ends."""
    made: Rig = request.getfixturevalue(kind)
    for prompt in ([5, 6, 7, 11, 9], [8], [*range(20, 60), *range(70, 110)]):
        plain = asyncio.run(made.tokens(prompt, None))
        said = [token.id for token in plain]
        at = next(i for i in range(2, 9) if said[i] not in (*said[:i], *prompt))
        # what is said at `at` begins the thinking, or ends it
        begins, ends = Thinking(said[at], 126, frozenset()), Thinking(127, said[at], frozenset({1}))
        for thinking, tokens in ((begins, "thinking"), (ends, "after-thinking")):
            got = asyncio.run(made.tokens(prompt, acts_in(tokens), GREEDY, thinking))
            assert got[: at + 1] == plain[: at + 1]
            assert [t.id for t in got] == oracle(made, prompt, acts_in(tokens), 10, thinking)
            assert [t.applied for t in got] == [False] * (at + 1) + [True] * (9 - at)
            assert got != plain
        never = Thinking(126, 127, frozenset({1}))
        for tokens in PHASES:
            got = asyncio.run(made.tokens(prompt, acts_in(tokens), GREEDY, never))
            assert got == plain
            assert {t.applied for t in got} == {False}
        off, on, earlier = [126, 127, *prompt], [126, *prompt], [126, 1, *prompt]
        plain, answer = (asyncio.run(made.tokens(off, spec)) for spec in (None, acts_in("answer")))
        assert asyncio.run(made.tokens(off, acts_in("after-thinking"), GREEDY, never)) == answer != plain
        assert asyncio.run(made.tokens(off, acts_in("thinking"), GREEDY, never)) == plain
        plain, answer = (asyncio.run(made.tokens(on, spec)) for spec in (None, acts_in("answer")))
        assert asyncio.run(made.tokens(on, acts_in("thinking"), GREEDY, never)) == answer != plain
        assert asyncio.run(made.tokens(earlier, acts_in("thinking"), GREEDY, never)) == asyncio.run(
            made.tokens(earlier, None)
        )


def test_phases_in_one_batch(llama: Rig) -> None:
    """Each request its own, also with prompts that are longer than a pass; afterwards no place is lost."""
    rng = random.Random(6)
    decisions = llama.engine.steering.index.decisions
    free = len(decisions._free)
    requests: list[tuple[list[int], Spec | None, Thinking]] = []
    for i in range(40):
        prompt = random_prompt(rng, 24 if i % 10 else 240)
        said = [token.id for token in asyncio.run(llama.tokens(prompt, None))]
        thinking = Thinking(said[rng.randrange(4)], said[rng.randrange(3, 7)], frozenset({5}))
        spec = random_spec(rng) if i % 4 == 0 else acts_in(PHASES[i % 2])
        requests.append((prompt, spec, thinking))

    async def run() -> list[list[Token]]:
        return list(await asyncio.gather(*[llama.tokens(p, s, GREEDY, t) for p, s, t in requests]))

    for (prompt, spec, thinking), got in zip(requests, asyncio.run(run()), strict=True):
        assert [t.id for t in got][:6] == oracle(llama, prompt, spec, 6, thinking), (spec, thinking)
    assert len(decisions._free) == free


def test_requests_decide_each_for_itself_in_one_batch(llama: Rig) -> None:
    """In batches that change, beside plain and steered neighbours, with prompts that are longer than a pass; afterwards
    no place of a decision is lost."""
    rng = random.Random(5)
    decisions = llama.engine.steering.index.decisions
    free = len(decisions._free)
    requests: list[tuple[list[int], Spec | None]] = []
    right: list[tuple[Spec | None, bool | None]] = []
    for i in range(40):
        prompt = random_prompt(rng, 24 if i % 10 else 240)
        if i % 4 == 0:
            requests.append((prompt, spec := random_spec(rng)))
            right.append((spec, None))
            continue
        layer, holds = rng.randrange(models.LAYERS - 1), rng.random() < 0.5
        number = component(llama, prompt, layer, "c") + (-0.02 if holds else 0.02)
        spec = under(Condition("c", layer, above=number, digest="c"), *rng.choice(CONDITIONAL))
        requests.append((prompt, spec))
        right.append((Spec(tuple(replace(e, condition=None) for e in spec.entries)) if holds else None, holds))

    async def late(delay: float, prompt: list[int], spec: Spec | None) -> list[Token]:
        await asyncio.sleep(delay)
        return await llama.tokens(prompt, spec)

    async def run() -> list[list[Token]]:
        return list(await asyncio.gather(*[late(rng.uniform(0, 0.5), *each) for each in requests]))

    for (prompt, _), (same, applied), got in zip(requests, right, asyncio.run(run()), strict=True):
        alone = asyncio.run(llama.tokens(prompt, same))
        assert [t.id for t in got] == [t.id for t in alone], (same, applied)
        assert {t.applied for t in got} == {applied}
    assert len(decisions._free) == free


def test_a_text_is_scored_under_its_condition(llama: Rig) -> None:
    prompt = [5, 6, 7, 11, 9]
    c = component(llama, prompt, 1, "c")
    for sign in (-1, 1):
        spec = under(Condition("c", 1, above=c + 0.01 * sign, digest="c"), *CONDITIONAL[0])
        scored = asyncio.run(llama.engine.score(prompt, llama.steer(spec, len(prompt)), 0))
        assert scored == asyncio.run(llama.engine.score(prompt, None, 0)), "what is in front of it is plain"


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


async def told(made: Rig, prompt: list[int], spec: Spec | None, sampling: Sampling) -> list[Token] | Exception:
    try:
        return await made.tokens(prompt, spec, sampling)
    except RequestFailed as error:
        return error


async def in_one_batch(made: Rig, requests: list[tuple[list[int], Spec | None]], sampling: Sampling) -> list[Any]:
    with made.engine.held():
        tasks = [asyncio.create_task(told(made, prompt, spec, sampling)) for prompt, spec in requests]
        await asyncio.sleep(0.1)
    return list(await asyncio.gather(*tasks))


def broken(name: str, mode: Mode = "ablate", strength: float = 1.0) -> Spec:
    return Spec((Entry(name, name, mode, strength),))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_no_neighbour_is_touched_by_a_stream_that_overflows(dtype: torch.dtype) -> None:
    """Plain and steered requests in one batch with such, and in the memory of the cache that these have left, have the
    answers that they have beside plain ones, to the last bit."""
    first, whole = Sampling(max_tokens=1, temperature=0.0, ignore_eos=True, logprobs=5), replace(GREEDY, logprobs=5)
    good = [([5 + i, 6, 7, 8 + i], broken("a") if i == 2 else None) for i in range(3)]
    for made in rig("llama", "batching", dtype):
        with_plain = [*good[:2], ([9, 8, 7], None), ([9, 8, 7, 6], None), good[2]]
        expected = asyncio.run(in_one_batch(made, with_plain, first))
        alone = [asyncio.run(made.tokens(*request, whole)) for request in good]
        for name in ("inf", "nan", *(["large"] if dtype == torch.float16 else [])):
            bad = [*good[:2], ([9, 8, 7], broken(name)), ([9, 8, 7, 6], broken(name, "one_sided", -9.5)), good[2]]
            got = asyncio.run(in_one_batch(made, bad, first))
            assert isinstance(got[2], NotFinite)
            assert [got[i] for i in (0, 1, 4)] == [expected[i] for i in (0, 1, 4)]
            answers = asyncio.run(in_one_batch(made, bad, whole))
            assert isinstance(answers[2], NotFinite)
            for mine in (0, 1, 4):
                assert all(torch.isfinite(torch.tensor(token.logprob)) for token in answers[mine])
            assert [asyncio.run(made.tokens(*request, whole)) for request in good] == alone, "nothing is left behind"
            assert made.engine.healthy
            with pytest.raises(NotFinite, match="dtype of more range"):
                asyncio.run(made.engine.score([5, 6, 7], made.steer(broken(name)), 0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_component_that_grows_from_layer_to_layer_fails_its_request(dtype: torch.dtype) -> None:
    """Each of 48 layers makes it eleven times what it was."""
    torch.manual_seed(0)
    config = tf.LlamaConfig(**models._shape(num_hidden_layers=48, initializer_range=0.02))
    steering = Steering(tf.AutoModelForCausalLM.from_config(config).eval().to(dtype))
    steering.bank.load("a", models.direction(steering.anatomy.model, shared=True))
    engine = start_engine(steering, [2], context=64, capacity=8)
    made = Rig(engine, steering.anatomy.model)
    sampling = Sampling(max_tokens=1, temperature=0.0, logprobs=3)
    plain: list[tuple[list[int], Spec | None]] = [([5 + i, 6, 7], None) for i in range(3)]
    expected = asyncio.run(in_one_batch(made, plain, sampling))
    grows = broken("a", "ablate", -10.0)
    got = asyncio.run(in_one_batch(made, [*plain[:2], (plain[2][0], grows)], sampling))
    assert got[:2] == expected[:2]
    assert isinstance(got[2], NotFinite)
    engine.stop()


def test_one_request_at_a_time_fails_alone(sequential: Rig) -> None:
    expected = asyncio.run(sequential.tokens([5, 6, 7], None))
    for name in ("inf", "nan"):
        with pytest.raises(NotFinite):
            asyncio.run(sequential.tokens([5, 6, 7], broken(name)))
        with pytest.raises(NotFinite):
            asyncio.run(sequential.engine.score([5, 6, 7], sequential.steer(broken(name)), 0))
        assert asyncio.run(sequential.tokens([5, 6, 7], None)) == expected


def test_a_loss_in_an_early_part_of_a_long_prompt_fails_its_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """The prompt is read in several passes, and only the first of them loses a token."""
    passes, right = list[int](), TokenIndex.losses
    monkeypatch.setattr(batching, "CPU_BATCH_TOKENS", 64)

    def losses(index: TokenIndex) -> Any:
        if index.active:
            passes.append(len(passes))
            index.lost[: index.max_tokens] = torch.arange(index.max_tokens) == 3 if passes == [0] else False
        return right(index)

    for made in rig("llama"):
        with monkeypatch.context() as patch:
            patch.setattr(TokenIndex, "losses", losses)
            got = asyncio.run(told(made, [5 + i % 50 for i in range(200)], broken("a"), replace(GREEDY, max_tokens=3)))
        assert isinstance(got, NotFinite)
        assert len(passes) > 1


@pytest.mark.parametrize("step", ["fill", "collect"])
def test_a_read_out_that_fails_fails_its_request_alone(llama: Rig, step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    read = Readout((Line("a", "a", 0),), (0, 1))
    expected = asyncio.run(llama.tokens([5, 6, 7], None))

    async def reading() -> Exception | None:
        try:
            async for _ in llama.engine.generate([5, 6, 9], GREEDY, None, read):
                pass
        except RequestFailed as error:
            return error
        return None

    async def run() -> tuple[Any, Any]:
        with llama.engine.held():
            tasks = [asyncio.create_task(reading()), asyncio.create_task(llama.tokens([5, 6, 7], None))]
            await asyncio.sleep(0.1)
        failed, tokens = await asyncio.gather(*tasks)
        return failed, tokens

    right = getattr(llama.engine.steering.reads, step)

    def fails_where_it_reads(*args: Any) -> Any:
        if llama.engine._readers:  # type: ignore[attr-defined]
            raise ValueError("a mistake")
        return right(*args)

    with monkeypatch.context() as patch:
        patch.setattr(llama.engine.steering.reads, step, fails_where_it_reads)
        failed, tokens = asyncio.run(run())
    assert "a mistake" in str(failed)
    assert [t.id for t in tokens] == [t.id for t in expected]
    assert llama.engine.healthy


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
            for _ in range(1200):
                if not made.engine._processor.scheduler.active_requests:
                    break
                await asyncio.sleep(0.05)
            assert not made.engine._processor.scheduler.active_requests
            assert not made.engine._requests
            assert not made.engine.manager.output_router.result_handlers

    asyncio.run(run())


def test_streams_that_are_left_leave_nothing_in_memory(llama: Rig) -> None:
    """transformers still makes results for a request whose cancellation its thread has not seen yet."""

    def outputs() -> int:
        gc.collect()
        return sum(type(each) is GenerationOutput for each in gc.get_objects())

    async def run() -> None:
        for _ in range(20):
            stream = llama.engine.generate([5, 6, 7], replace(GREEDY, max_tokens=200), None)
            await anext(stream)
            await stream.aclose()
        await llama.tokens([5, 6, 7], None)  # answered after all that came before it

    before = outputs()
    asyncio.run(run())
    assert outputs() <= before + 1


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


def test_scoring_leaves_as_much_time_to_the_requests_that_run(llama: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second text waits as long as the first one took, and without such requests not at all."""
    assert isinstance(llama.engine, BatchingEngine)
    slept: list[float] = []

    def score_alone(*_: object) -> list[Token]:
        time.sleep(0.2)
        return []

    monkeypatch.setattr(llama.engine, "score_alone", score_alone)
    monkeypatch.setattr(batching, "time", SimpleNamespace(monotonic=time.monotonic, sleep=slept.append))

    async def score(texts: int) -> None:
        for _ in range(texts):
            await llama.engine.score([5, 6, 7], None, 0)

    asyncio.run(score(2))
    assert slept == []
    monkeypatch.setitem(llama.engine._requests, "runs", None)
    monkeypatch.setattr(llama.engine, "_rest", 0.0)
    asyncio.run(score(2))
    assert slept[0] == 0.0 < slept[1]


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


@pytest.mark.parametrize("name", sorted({**models.configs(), **models.wrappers()}))
def test_logits_in_pieces_are_those_of_one_pass(name: str) -> None:
    model = models.tiny(name)
    ids, passes, rows = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12, 13, 14]]), list[int](), list[int]()
    with torch.inference_mode():
        whole = model(input_ids=ids, use_cache=False).logits[0, :-1]
        head = model.get_output_embeddings()
        model.get_input_embeddings().register_forward_hook(lambda *_: passes.append(1))
        head.register_forward_hook(lambda _head, _given, out: rows.append(out.shape[-2]))
        pieces = list(internals.logits_in_pieces(model, ids, 4))
        again = model(input_ids=ids, use_cache=False).logits[0, :-1]
    assert [len(piece) for piece in pieces] == [4, 4, 1]
    torch.testing.assert_close(torch.cat(pieces), whole, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(again, whole, rtol=0, atol=0)
    assert rows in ([4, 4, 1, 10], [10, 10]), "pieces, unless the model cannot be asked for them"
    if name == "llama":
        assert (len(passes), rows) == (2, [4, 4, 1, 10])


def test_scores_hold_a_place_and_cost_nothing_once_cancelled(llama: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, begun, may_end, passes = llama.engine, threading.Event(), threading.Event(), list[object]()
    score_alone = engine.score_alone

    def watched(*given: Any) -> list[Token]:
        passes.append(given)
        begun.set()
        assert may_end.wait(60)
        return score_alone(*given)

    monkeypatch.setattr(engine, "score_alone", watched)
    monkeypatch.setattr(engine, "capacity", 3)

    async def run() -> None:
        tasks = [asyncio.create_task(engine.score([5, 6, 7], None, 0)) for _ in range(3)]
        try:
            assert await asyncio.to_thread(begun.wait, 60)
            assert engine.in_flight == 3
            with pytest.raises(NoRoom, match="at most 3"):
                await engine.score([5, 6], None, 0)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            assert engine.in_flight == 0
        finally:
            may_end.set()
        assert len(await engine.score([5, 6], None, 0)) == 1
        assert len(passes) == 2, "the one that ran, and this one"

    asyncio.run(run())


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
    """Gemma 2 runs in continuous batching, which leaves out the soft cap of its attention."""
    for made in rig("gemma2", "any"):
        assert isinstance(made.engine, SequentialEngine)
        assert "in a mixed batch has the log-probability" in caplog.text
        check_decodes(made)


def check_decodes(made: Rig) -> None:
    """Plain answers are those of `generate`, steered ones those of whole forward passes."""
    prompt, spec = [5, 6, 7, 0, 9], Spec((Entry("a", "a", "ablate", 1.0),))
    settings = tf.GenerationConfig(do_sample=False, max_new_tokens=6, eos_token_id=[], pad_token_id=0)
    ids = torch.tensor([prompt])
    right = made.model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)
    sampling = replace(GREEDY, max_tokens=6)
    assert [t.id for t in asyncio.run(made.tokens(prompt, None, sampling))] == right[0, len(prompt) :].tolist()
    assert [t.id for t in asyncio.run(made.tokens(prompt, spec, sampling))] == oracle(made, prompt, spec, 6)


MAMBA: dict[str, Any] = dict(mamba_n_heads=8, mamba_d_head=16, mamba_d_state=8, mamba_n_groups=1, mamba_chunk_size=16)
STATES: dict[str, Any] = dict(vocab_size=128, hidden_size=64, num_hidden_layers=3, state_size=8, pad_token_id=0)
LINEAR = ["linear_attention", "full_attention", "linear_attention"]
#: Models whose cache is more than keys and values.
RECURRENT = {
    "mamba": lambda: tf.MambaConfig(**STATES),
    "mamba2": lambda: tf.Mamba2Config(**STATES, num_heads=8, head_dim=16, n_groups=1, chunk_size=16),
    "falcon_mamba": lambda: tf.FalconMambaConfig(**STATES),
    "recurrent_gemma": lambda: tf.RecurrentGemmaConfig(
        **models._shape("head_dim", num_key_value_heads=1, lru_width=64, attention_window_size=64)
    ),
    "rwkv": lambda: tf.RwkvConfig(
        vocab_size=128, context_length=512, hidden_size=64, num_hidden_layers=3, intermediate_size=96
    ),
    "bamba": lambda: tf.BambaConfig(**models._shape("head_dim", attn_layer_indices=[1], **MAMBA)),
    "minimax": lambda: tf.MiniMaxConfig(
        **models._shape(num_local_experts=4, num_experts_per_tok=2, layer_types=LINEAR, block_size=16)
    ),
}


def started(config: Any, context: int = 128, **how: Any) -> Iterator[Rig]:
    """The engine that a model of `config` gets, with weights large enough to tell tokens apart."""
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(config, **how).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)
    steering = Steering(model)
    steering.bank.load("a", models.direction(model))
    engine = start_engine(steering, [2], context=context, capacity=8)
    yield Rig(engine, model)
    engine.stop()


@pytest.mark.parametrize("name", RECURRENT)
def test_states_and_hybrid_caches_are_kept_as_generate_keeps_them(name: str) -> None:
    for made in started(RECURRENT[name]()):
        check_decodes(made)


def longrope() -> Any:
    rope = dict(rope_type="longrope", rope_theta=1e4, short_factor=[1.0] * 8, long_factor=[4.0] * 8)
    return tf.Phi3Config(
        **models._shape(
            "head_dim",
            original_max_position_embeddings=32,
            rope_parameters=rope | {"original_max_position_embeddings": 32},
        )
    )


async def beside(made: Rig, short: list[int], long: list[int]) -> list[int]:
    with made.engine.held():
        tasks = [asyncio.create_task(made.tokens(prompt, None)) for prompt in (short, long)]
        await asyncio.sleep(0)
    return [token.id for token in (await asyncio.gather(*tasks))[0]]


@pytest.mark.parametrize("known", [True, False], ids=["by the rule", "by the probe"])
def test_an_answer_does_not_depend_on_how_long_its_neighbours_are(known: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not known:
        monkeypatch.setattr(internals, "length_dependent", lambda config: None)
    short, long = [5, 6, 7, 8], [3 + i % 100 for i in range(60)]
    for made in started(longrope()):
        assert isinstance(made.engine, SequentialEngine)
        alone = [token.id for token in asyncio.run(made.tokens(short, None))]
        assert asyncio.run(beside(made, short, long)) == alone
        check_decodes(made)


def test_within_the_original_context_such_a_model_is_batched() -> None:
    for made in started(longrope(), context=32):
        assert isinstance(made.engine, BatchingEngine)
        check_decodes(made)


def test_a_rotary_embedding_that_grows_is_for_each_request_what_it_is_alone() -> None:
    """It keeps the frequencies of the longest text that the model has read."""
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    for made in started(tf.LlamaConfig(**models._shape(rope_parameters=rope, max_position_embeddings=32)), context=200):
        assert isinstance(made.engine, SequentialEngine)
        check_decodes(made)
        short, long = ([5 + i % 50 for i in range(length)] for length in (36, 100))
        alone = asyncio.run(made.tokens(short, None)), asyncio.run(made.engine.score(short, None, 0))
        for text in (long, short):
            after = asyncio.run(made.tokens(text, None)), asyncio.run(made.engine.score(text, None, 0))
        assert after == alone


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_rotary_embeddings_that_depend_on_the_batch_are_found_in_each_layer_type(kind: str) -> None:
    rope = {"full_attention": {"rope_type": "default"}, "sliding_attention": {"rope_type": kind}}
    config = tf.LlamaConfig(**models._shape())
    config.rope_parameters = rope
    assert internals.length_dependent(config) == (kind, 512)
    config.rope_parameters = {"rope_type": "yarn", "original_max_position_embeddings": 64}
    assert internals.length_dependent(config) is None


def test_nothing_of_a_failed_attempt_stays_in_the_configuration() -> None:
    config = tf.Lfm2Config(**models._shape("head_dim", full_attn_idxs=[1], block_multiple_of=8))
    for made in started(config, attn_implementation="eager"):
        assert isinstance(made.engine, SequentialEngine)
        assert made.model.config._attn_implementation == "eager"
        check_decodes(made)


def test_a_model_with_eager_attention_only_is_batched_and_scored() -> None:
    rope = {"rope_type": "default", "rope_theta": 1e4}
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    shape = models._shape(num_local_experts=4, num_experts_per_tok=2, sliding_window=16, layer_types=kinds)
    for made in started(tf.GptOssConfig(**shape, rope_parameters=rope), attn_implementation="eager"):
        assert isinstance(made.engine, BatchingEngine)
        ids = [5, 6, 7, 8]
        scored = asyncio.run(made.engine.score(ids, None, 0))
        made.engine.stop()
        assert made.model.config._attn_implementation == "eager"
        with torch.no_grad():
            right = torch.log_softmax(made.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0], -1)
        assert [t.logprob for t in scored] == pytest.approx([float(right[i, ids[i + 1]]) for i in range(3)], abs=1e-4)


def raising(error: Exception) -> Any:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    return fail


@pytest.mark.parametrize("where", ["fill", "hook", "sample", "transformers"])
def test_a_failure_that_is_not_the_models_is_one(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what transformers cannot batch leads to the slower engine; a mistake of ours would hide behind it."""
    model, before = models.tiny("llama"), set(threading.enumerate())
    steering, mistake = Steering(model), TypeError("a mistake")
    if where == "fill":
        monkeypatch.setattr(steering, "fill", raising(mistake))
    elif where == "hook":
        monkeypatch.setattr(steering, "_moved", raising(mistake))
    elif where == "sample":
        monkeypatch.setattr(batching, "sample", raising(mistake))
    else:
        monkeypatch.setattr(type(model), "init_continuous_batching", raising(mistake))
    with pytest.raises((TypeError, EngineFailed), match="a mistake"):
        start_engine(steering, [2], context=128, capacity=8)
    assert not steering.attached
    assert set(threading.enumerate()) <= before


def test_the_least_that_the_settings_allow_starts() -> None:
    """The self-check takes more requests at once than a server of one request does."""
    engine = start_engine(Steering(models.tiny("llama")), [2], context=16, capacity=1, cache_tokens=32)
    assert isinstance(engine, BatchingEngine)
    engine.stop()


@pytest.mark.parametrize("stay", [0, 1])
def test_requests_that_leave_a_full_cache_hold_up_none_that_come(stay: int) -> None:
    """transformers takes no new ones after its cache was full until one has finished: one that left never does, and one
    that stays may take long."""
    steering = Steering(models.tiny("llama"))
    engine = start_engine(steering, [2], context=128, capacity=64, cache_tokens=256)
    assert isinstance(engine, BatchingEngine)
    scheduler, long = engine._processor.scheduler, replace(GREEDY, max_tokens=96)
    step, ended = engine._step, asyncio.Event()

    def stepping(model: Any) -> None:
        time.sleep(0.02)
        step(model)

    engine._step = stepping

    async def whole(stream: Any) -> None:
        async for _ in stream:
            pass
        ended.set()

    async def run() -> None:
        # one that stays needs its second page of the cache after all others, so it is none that is put off
        stays = [asyncio.ensure_future(whole(engine.generate([5, 6, 7], long, None))) for _ in range(stay)]
        streams = [engine.generate([*range(5, 25)], long, None) for _ in range(24)]
        first = [asyncio.ensure_future(anext(stream)) for stream in streams]
        for _ in range(1000):
            if scheduler.block_new_requests:
                break
            await asyncio.sleep(0.01)
        assert scheduler.block_new_requests, "or the cache was never full"
        for waiting in first:
            waiting.cancel()
        await asyncio.gather(*first, return_exceptions=True)
        for stream in streams:
            await stream.aclose()
        one = await asyncio.wait_for(anext(engine.generate([5, 6, 7], GREEDY, None)), 60)
        assert one.id >= 0
        assert not ended.is_set()
        await asyncio.gather(*stays)

    try:
        asyncio.run(run())
    finally:
        engine.stop()


def test_an_engine_that_takes_no_requests_is_not_healthy(llama: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = llama.engine
    assert isinstance(engine, BatchingEngine)
    monkeypatch.setattr(batching, "STUCK", 0.05)

    async def until(state: bool) -> None:
        for _ in range(1200):
            if engine.healthy is state:
                return
            await asyncio.sleep(0.05)
        raise AssertionError(f"healthy is not {state}")

    async def run() -> None:
        assert engine.healthy, "with nothing to do, however long"
        with monkeypatch.context() as patch:
            patch.setattr(engine, "_prepare_next_batch", lambda: False)
            waiting = asyncio.ensure_future(llama.tokens([5, 6, 7], None))
            await until(False)
        assert len(await waiting) == GREEDY.max_tokens
        assert engine.healthy
        with engine.held():  # as a long scoring does
            waiting = asyncio.ensure_future(llama.tokens([5, 6, 7], None))
            await asyncio.sleep(0.2)
            assert engine.healthy
        assert len(await waiting) == GREEDY.max_tokens

    asyncio.run(run())


def test_a_server_does_not_start_where_no_engine_passes_its_self_check(monkeypatch: pytest.MonkeyPatch) -> None:
    right = internals.Decoding.logits
    monkeypatch.setattr(internals.Decoding, "logits", lambda self, inputs: right(self, inputs).flip(-1))
    steering = Steering(models.tiny("gemma2"))
    with pytest.raises(UnsupportedModel, match="`generate` has"):
        start_engine(steering, [2], context=128, capacity=8)
    assert not steering.attached
    assert steering.bank.rows_in_use == 0


def test_the_index_is_filled_on_the_stream_of_the_pass(llama: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device's streams, emulated: what is enqueued outside of the pass's own is not ordered before it."""
    assert isinstance(llama.engine, BatchingEngine)
    engine, running, seen = llama.engine, list[str](), list[tuple[str, bool]]()

    @contextmanager
    def entered(stream: Any) -> Iterator[None]:
        running.append("compute")
        yield
        running.pop()

    def noting(name: str, inner: Any) -> Any:
        def call(*args: Any) -> Any:
            seen.append((name, running == ["compute"]))
            return inner(*args)

        return call

    stream = SimpleNamespace(synchronize=lambda: None)
    monkeypatch.setattr(torch, "get_device_module", lambda *_: SimpleNamespace(stream=entered))
    monkeypatch.setattr(engine._processor.inputs_and_outputs, "compute_stream", stream)
    monkeypatch.setattr(engine.steering, "fill", noting("index", engine.steering.fill))
    monkeypatch.setattr(engine.steering.reads, "fill", noting("reads", engine.steering.reads.fill))
    asyncio.run(llama.tokens([5, 6, 7], Spec((Entry("a", "a", "ablate", 1.0),)), replace(GREEDY, max_tokens=3)))
    assert {name for name, _ in seen} == {"index", "reads"}
    assert all(inside for _, inside in seen)


def test_all_that_is_used_of_transformers_is_checked_at_start(llama: Rig) -> None:
    assert isinstance(llama.engine, BatchingEngine)
    source = Path(batching.__file__).read_text()
    for start, checked in (("manager", internals._MANAGER), ("_processor", internals._PROCESSOR)):
        used = set(re.findall(rf"self\.{start}\.([\w.]+)", source)) - {"batch_processor"}
        for name in used:
            assert any(name == c or name.startswith(f"{c}.") for c in checked), name
    internals.check_seams(llama.engine.manager)
    with pytest.raises(UnsupportedModel, match=r"Manager\.pause, .*Processor\.cache\.max_tokens_read"):
        internals.check_seams(SimpleNamespace(batch_processor=SimpleNamespace()))
