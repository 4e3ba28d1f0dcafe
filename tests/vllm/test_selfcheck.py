"""The self-check at start: a compiled graph that passes a hook point by, acts there twice or with another hook point's
rows is not served, and the message names the hook point; what is rounding alone is no reason to refuse."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from steer.errors import UnsupportedModel
from steer.runtime import op
from steer.vllm import install, internals, selfcheck, steering_module
from tests.vllm.conftest import IN_PROCESS
from tests.vllm.engines import Home

Logits = NDArray[np.float64]
TOKENS, TOLD = 3, 64
#: Of each phase, of logits that are of the order of 1.
NOISE = {"float32": 1e-5, "bfloat16": 1e-2}


def answer(logits: Logits, tokens: tuple[int, ...] = (7, 7, 7)) -> selfcheck.ProbeAnswer:
    """What an engine says that has these logits `[TOKENS, TOLD]`."""
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return [(token, dict(enumerate(map(float, row)))) for token, row in zip(tokens, logprobs, strict=True)]


class Sides:
    """The same two models, served and eager, apart by rounding of this size."""

    def __init__(self, noise: float, effect: float = 1.0) -> None:
        self.chance, self.noise = np.random.default_rng(0), noise
        self.plain, self.effect = self.draw(), effect * self.draw()
        self.other = effect * self.draw()

    def draw(self) -> Logits:
        return self.chance.normal(size=(TOKENS, TOLD))

    def say(self, logits: Logits, **more: Any) -> selfcheck.ProbeAnswer:
        return answer(logits + self.noise * self.draw(), **more)

    def judged(self, *served: Logits, chaos: float = 0.0) -> selfcheck.Judgement:
        """Where these are what the engine's graphs do at each strength; `chaos`: what a nudge changes."""
        plain = self.say(self.plain), self.say(self.plain)
        cases = []
        for strength, did in zip(selfcheck.STRENGTHS, served, strict=True):
            eager = self.plain + strength * self.effect
            nudged = eager + chaos * self.draw()
            cases.append((*plain, self.say(self.plain + did), self.say(eager), self.say(nudged)))
        return selfcheck.judge(cases, dict.fromkeys(selfcheck.PHASES, max(self.noise, 1e-5)))


@pytest.fixture(params=NOISE)
def sides(request: pytest.FixtureRequest) -> Sides:
    return Sides(NOISE[request.param])


ALL_RIGHT = dict.fromkeys(selfcheck.PHASES, selfcheck.RIGHT)


def test_what_differs_by_rounding_alone_is_right(sides: Sides) -> None:
    assert sides.judged(sides.effect, 0.5 * sides.effect) == ALL_RIGHT


def test_a_place_that_is_passed_by_is_wrong(sides: Sides) -> None:
    for text in sides.judged(0 * sides.effect, 0 * sides.effect).values():
        assert text
        assert text.count("0.00 of the effect") == len(selfcheck.STRENGTHS)


def test_what_acts_twice_is_wrong_at_half_strength(sides: Sides) -> None:
    """At strength 1 nothing is left for the second time."""
    for text in sides.judged(sides.effect, 0.75 * sides.effect).values():
        assert text
        assert text.count("of the effect") == 1
        assert text.endswith("at strength 0.5")


def test_what_acts_otherwise_is_wrong(sides: Sides) -> None:
    assert all(sides.judged(sides.other, 0.5 * sides.other).values())
    nearly = sides.effect + 0.3 * sides.other  # as a neighbouring layer's
    assert all(sides.judged(nearly, 0.5 * nearly).values()) == (sides.noise < 1e-3)


@pytest.mark.parametrize("phase", selfcheck.PHASES)
def test_each_phase_is_looked_at_alone(sides: Sides, phase: str) -> None:
    did = sides.effect.copy()
    did[selfcheck.PHASES[phase]] = 0
    assert [name for name, text in sides.judged(did, 0.5 * did).items() if text] == [phase]


def test_an_effect_below_the_rounding_is_unclear_and_an_engine_that_acts_all_the_same_is_wrong() -> None:
    sides = Sides(1e-2, effect=1e-2)
    assert sides.judged(sides.effect, 0.5 * sides.effect) == dict.fromkeys(selfcheck.PHASES)
    assert all(sides.judged(100 * sides.effect, 100 * sides.effect).values())


def test_a_model_that_is_tipped_over_by_rounding_tells_nothing(sides: Sides) -> None:
    """What the model's own Python says under a strength that differs by rounding is as far away as the two sides."""
    assert sides.judged(sides.other, 0.5 * sides.other, chaos=1.0) == dict.fromkeys(selfcheck.PHASES)


def test_only_tokens_that_have_read_the_same_are_compared() -> None:
    logits = np.random.default_rng(0).normal(size=(TOKENS, TOLD))
    one, other = answer(logits, (7, 7, 7)), answer(-logits, (7, 8, 7))
    assert selfcheck.common(one, other, phase="prefill")[0].size == TOLD
    assert selfcheck.common(one, other, phase="decoding")[0].size == TOLD, "the second, and not the third"
    other[0][1].clear()
    other[1][1][0] = -np.inf
    assert selfcheck.common(one, other, phase="prefill")[0].size == 0
    assert selfcheck.common(one, other, phase="decoding")[0].size == TOLD - 1


def test_plain_requests_that_have_something_of_others_are_told() -> None:
    sides = Sides(1e-2)
    alone, eager, mixed = [sides.say(sides.plain) for _ in range(3)]
    noise = selfcheck.noises("bfloat16", alone, eager)
    assert not selfcheck.leaks(noise, alone, mixed)
    changed = sides.say(sides.plain + 0.5 * sides.effect)
    assert [text.rpartition(": ")[0] for text in selfcheck.leaks(noise, alone, changed)] == [
        f"a plain request is changed by those beside it in {phase}" for phase in selfcheck.PHASES
    ]


def test_a_runner_whose_graphs_cannot_be_put_aside_is_refused_and_nothing_is_changed() -> None:
    pytest.importorskip("vllm")
    model = torch.nn.Linear(1, 1)
    worker: Any = SimpleNamespace(get_model=lambda: model, model_runner=SimpleNamespace(), vllm_config=None)
    model.compile(backend="eager")
    whole = model._compiled_call_impl
    with pytest.raises(UnsupportedModel, match="cudagraph_dispatcher"):
        internals.worker.run_eager(worker)
    assert model._compiled_call_impl is whole
    graphs = SimpleNamespace(_graphs_captured=True)
    worker.model_runner = SimpleNamespace(prepare_inputs=None, cudagraph_manager=graphs)
    undo = internals.worker.run_eager(worker)
    assert (model._compiled_call_impl, graphs._graphs_captured) == (None, False)
    undo()
    assert (model._compiled_call_impl, graphs._graphs_captured) == (whole, True)


@pytest.mark.parametrize("folded", [True, False])
def test_an_engine_whose_graph_is_not_what_was_attached_does_not_start(
    folded: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its eager passes are right: only what was compiled passes layer 0 by, acts twice at layer 1, and has the rows of
    layer 0 at layer 2, be it in norms or in hooks in front of them."""
    from vllm.distributed import parallel_state

    real, attaching = steering_module.hand_on, install.attach
    within = steering_module.forward

    def attached(*args: Any) -> install.Installation:
        found = attaching(*args)
        assert bool(found.folded) == folded
        own = {point.layer: each for point, each in found.steering_modules}
        for layer, fault in enumerate(("none", "twice", "other")):
            own[layer].fault = fault  # type: ignore[assignment]
        own[2].__dict__["neighbour"] = own[0]  # not as a module of it
        return found

    def wrong(own: steering_module.SteeringModule, x: Tensor, r: Tensor | None = None) -> Tensor:
        if not torch.compiler.is_compiling() or not hasattr(own, "fault"):
            return real(own, x, r)
        if own.fault == "none":
            return x
        if own.fault == "twice":
            return real(own, real(own, x, r), r)
        return real(own.neighbour, x, r)  # type: ignore[arg-type]

    def wrong_within(norm: Any, x: Tensor, r: Tensor | None = None) -> Any:
        own = getattr(norm, steering_module.WITHIN)
        if r is None or not torch.compiler.is_compiling() or not hasattr(own, "fault"):
            return within(norm, x, r)
        return norm.forward_native(wrong(own, x, r), r)

    if not folded:
        monkeypatch.setattr(internals.worker, "open_norms", lambda _worker: [])
    monkeypatch.setattr(steering_module, "forward", wrong_within)
    monkeypatch.setattr(install, "attach", attached)
    monkeypatch.setattr(steering_module, "hand_on", wrong)
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    monkeypatch.setenv("VLLM_DISABLE_COMPILE_CACHE", "1")
    home = Home.make("llama", tmp_path)
    with pytest.raises(UnsupportedModel) as refused:
        home.start(**IN_PROCESS, steer={"rows": 2})  # fewer than hook points, so in turns
    assert not parallel_state.model_parallel_is_initialized(), "what is refused must end, not wait to be collected"
    text = str(refused.value)
    assert all(f"resid_post of layer {layer}: " in text for layer in range(3)), text
    assert "embedding" not in text
    assert "plain request" not in text


@pytest.mark.parametrize(("step", "tried"), [("shifted", "one_sided"), ("restoring", "the norm kept")])
def test_an_engine_whose_graph_leaves_a_step_out_does_not_start(
    step: str, tried: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, without = getattr(op, step), {"shifted": lambda each, by: each, "restoring": lambda before, after: 1.0}[step]
    monkeypatch.setattr(op, step, lambda *args: (without if torch.compiler.is_compiling() else real)(*args))
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    monkeypatch.setenv("VLLM_DISABLE_COMPILE_CACHE", "1")
    with pytest.raises(UnsupportedModel, match=rf"own code does: resid_post of layer 1 \({tried}\): "):
        Home.make("llama", tmp_path).start(**IN_PROCESS)
