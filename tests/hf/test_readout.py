"""What the engines read is what a forward pass with hooks of the test's own sees, alone and among other requests."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from steer.direction import Direction
from steer.hf.batching import BatchingEngine, start_engine
from steer.hf.engine import Engine, SequentialEngine
from steer.hf.sampling import Sampling, Token
from steer.hf.steering import Anatomy, Steering
from steer.readout import Line, Readout
from steer.spec import Entry, Spec
from tests import models
from tests.oracle import ablated

COUNT = 6
GREEDY = Sampling(max_tokens=COUNT, temperature=0.0, ignore_eos=True)
STRENGTH = 0.7
SPEC = Spec((Entry("a", "a", "ablate", STRENGTH),))


@dataclass(frozen=True)
class Rig:
    engine: Engine
    model: Any
    directions: dict[str, Direction]

    def read(self, names: list[str], layers: tuple[int, ...]) -> Readout:
        lines = (Line(name, name, row) for name in names for row in range(self.directions[name].rank))
        return Readout(tuple(lines), layers)

    async def tokens(self, prompt: list[int], spec: Spec, read: Readout | None) -> list[Token]:
        steer = self.engine.steering.bank.steer(spec)
        return [token async for token in self.engine.generate(prompt, GREEDY, steer, read)]


def make(name: str, kind: str) -> Rig:
    model = models.tiny(name)
    steering = Steering(model)
    directions = {"a": models.direction(model, seed=1), "b": models.direction(model, seed=2, k=2)}
    for digest, direction in directions.items():
        steering.bank.load(digest, direction)
    if kind == "batching":
        engine = start_engine(steering, [2], context=256, capacity=64)
        assert isinstance(engine, BatchingEngine)
    else:
        engine = SequentialEngine(steering, [2], context=256, capacity=64)
        engine.start()
    return Rig(engine, model, directions)


def streams(rig: Rig, ids: list[int], spec: Spec) -> list[tuple[Tensor, Tensor]]:
    """For each layer the stream `[positions, d_model]` before and after `a` is ablated there (if `spec` says so), in a
    copy of the model without our hooks."""
    copy = type(rig.model)(rig.model.config).eval()
    copy.load_state_dict(rig.model.state_dict())
    seen: list[tuple[Tensor, Tensor]] = []

    def hook(layer: int) -> Any:
        def act(_module: Any, _args: Any, output: Any) -> Any:
            before = output[0] if isinstance(output, tuple) else output
            v = rig.directions["a"].directions[layer, 0]
            after = ablated(before, v, STRENGTH) if spec else before
            seen.append((before[0], after[0]))
            return (after, *output[1:]) if isinstance(output, tuple) else after

        return act

    for layer, block in enumerate(Anatomy(copy).blocks):
        block.register_forward_hook(hook(layer))
    with torch.no_grad():
        copy(input_ids=torch.tensor([ids]), use_cache=False)
    return seen


def check(rig: Rig, prompt: list[int], spec: Spec, tokens: list[Token], names: list[str], layers: list[int]) -> None:
    ids = prompt + [token.id for token in tokens]
    seen = streams(rig, ids[:-1], spec)
    for i, token in enumerate(tokens):
        at = len(prompt) - 1 + i  # the position that predicted it
        assert token.reading is not None
        for n, layer in enumerate(layers):
            lines = torch.cat([rig.directions[name].directions[layer] for name in names])
            before, after = (side[at] for side in seen[layer])
            np.testing.assert_allclose(token.reading.before[n], lines @ before, rtol=1e-4, atol=1e-4)
            np.testing.assert_allclose(token.reading.after[n], lines @ after, rtol=1e-4, atol=1e-4)
            assert token.reading.norms[n] == pytest.approx(float(before.norm()), rel=1e-4)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("llama", "batching"),
        ("llama", "sequential"),
        ("gemma3", "batching"),
        ("gpt2", "batching"),
        ("mixtral", "batching"),
    ],
)
def test_readers_among_requests_that_do_not_ask(name: str, kind: str) -> None:
    rig = make(name, kind)
    layers = list(range(models.LAYERS))
    asks: list[tuple[list[int], Spec, list[str], list[int]]] = [
        ([5, 6, 7, 8], SPEC, ["a"], layers),
        ([9, 10, 11], Spec(), ["a", "b"], layers),
        ([12, 13, 14, 15, 16, 17], SPEC, ["b"], [2]),
        ([5, 6, 7, 8], Spec(), ["a"], [0, 2]),
    ]

    async def run() -> tuple[list[list[Token]], list[list[Token]]]:
        reading = [rig.tokens(p, s, rig.read(names, tuple(ls))) for p, s, names, ls in asks]
        others = [rig.tokens([20 + i, 21, 22], SPEC if i % 2 else Spec(), None) for i in range(6)]
        done = await asyncio.gather(
            *(task for pair in zip(others, reading, strict=False) for task in pair), *others[4:]
        )
        return list(done[1:8:2]), [*done[0:8:2], *done[8:]]

    try:
        read, unread = asyncio.run(run())
        for (prompt, spec, names, ls), tokens in zip(asks, read, strict=True):
            check(rig, prompt, spec, tokens, names, ls)
            alone = asyncio.run(rig.tokens(prompt, spec, None))
            assert [t.id for t in alone] == [t.id for t in tokens], "reading changes nothing"
        assert all(token.reading is None for tokens in unread for token in tokens)
        plain = read[1][0].reading
        assert plain is not None
        assert np.array_equal(plain.before, plain.after)
        steered = read[0][0].reading
        assert steered is not None
        assert float(np.abs(steered.after - (1 - STRENGTH) * steered.before).max()) < 1e-3
    finally:
        rig.engine.stop()


def test_a_prompt_longer_than_a_step_is_read_at_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine takes it in chunks, of which only the last predicts a token."""
    monkeypatch.setattr("steer.hf.batching.CPU_BATCH_TOKENS", 16)
    rig = make("llama", "batching")
    try:
        prompt = [3 + i % 100 for i in range(100)]
        tokens = asyncio.run(rig.tokens(prompt, SPEC, rig.read(["a"], (0, 1, 2))))
        check(rig, prompt, SPEC, tokens, ["a"], [0, 1, 2])
    finally:
        rig.engine.stop()


def test_scores_in_between_are_not_read() -> None:
    """`score` runs beside a paused batch whose readers are still known."""
    rig = make("llama", "batching")

    async def run() -> list[Token]:
        stream = asyncio.create_task(rig.tokens([5, 6, 7], SPEC, rig.read(["a"], (0, 1, 2))))
        await asyncio.sleep(0.01)
        await rig.engine.score([5, 6], None, 1)
        return await stream

    try:
        check(rig, [5, 6, 7], SPEC, asyncio.run(run()), ["a"], [0, 1, 2])
    finally:
        rig.engine.stop()
