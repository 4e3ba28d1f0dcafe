"""What the tests of the vLLM engine share: starting one, and what transformers says of the same requests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from steer.hf.steering import Steering
from steer.registry import Registry
from steer.runtime.hook_points import hooks, on_output
from steer.spec import PHASES, Condition, Spec, parse
from steer.tokenization import Thinking
from tests import models
from tests.oracle import acting
from tests.vllm import device, tiny

RANK = 2
#: Every mode, fractions and compositions.
SPECS = (
    "off",
    "refusal",
    "refusal=-0.5",
    "refusal:one_sided=0.7",
    "refusal:affine",
    "refusal:clamp",
    "refusal:clamp^0.1=0.5,verbosity:one_sided^-0.25@answer",
    "verbosity:add=0.5",
    "refusal=0.5,verbosity",
    "verbosity:one_sided,refusal",
    "refusal,verbosity:add=0.5",
    "refusal@answer",
    "refusal@1-2=1.5,verbosity:add@0@answer",
    "refusal:one_sided@not-first=2,verbosity@prompt=0.5",
    "refusal:norm=1.5",
    "refusal:one_sided:norm@1-2@answer,verbosity:add:norm=0.5",
    "refusal:rotate",
    "refusal:rotate@1-2=-0.5",
    "refusal:rotate_one_sided@answer=0.7",
    "refusal:rotate_one_sided^-0.3",
    "refusal?each:verbosity@0>0=1.5",
    "verbosity:add@1@not-first?each:verbosity@0<0=2",
    "refusal?verbosity@0>0=1.5",
    "verbosity:add@1?verbosity@0<0=2",  # where the one before is plain
)
#: Of the two directions at every layer: what is set of one must not change the other.
COSINE = 0.4
PROMPTS = ("hello world", "this is a longer prompt of some words")
#: Of float32 on every device (see `device`).
TOLERANCE = 1e-3


def are_likeliest(answer: Sequence[int], expected: torch.Tensor) -> bool:
    """Whether a greedy answer has these `expected` log-probabilities `[tokens, vocabulary]`: of two tokens that are as
    likely, to the tolerance, an engine may say either."""
    return bool((expected.amax(-1) - expected[range(len(answer)), answer] < TOLERANCE).all())


@dataclass(frozen=True)
class Home:
    """A tiny model in a folder, with directions for it in another."""

    model: Any
    folder: Path
    directions: Path

    @classmethod
    def make(cls, name: str, root: Path) -> Home:
        model, directions = tiny.make(name, root / "model"), root / "directions"
        directions.mkdir()
        refusal = models.direction(model, seed=1, embedding=True, plane=True)
        verbosity = models.direction(model, seed=2, embedding=True)
        refusal.save(directions / "refusal.safetensors")
        models.leaning(verbosity, refusal, COSINE).save(directions / "verbosity.safetensors")
        return cls(model, root / "model", directions)

    def start(self, **options: Any) -> Any:
        """An `LLM` with steering on."""
        from vllm import LLM

        from steer.vllm import plugin

        plugin.register()
        settings = {"directions": str(self.directions), "rank": RANK} | options.pop("steer", {})
        defaults: dict[str, Any] = dict(dtype="float32", max_model_len=256, max_num_seqs=32, seed=0)
        additional = {"steer": dict(settings)}
        llm = LLM(
            str(self.folder),
            worker_cls="steer.vllm.worker.Worker",
            additional_config=additional,
            **(defaults | device.MEMORY | options),
        )
        assert additional == {"steer": settings}, "the caller's own, with which another engine may be started"
        return llm


class Reference:
    """The same model in transformers, steered by the same files."""

    def __init__(self, home: Home) -> None:
        self.steering = Steering(home.model, rows=8, rank=RANK)
        self.steering.attach()
        self.placement = self.steering.placement()
        self.registry = Registry(self.placement, home.directions)
        self.registry.sync()
        self.thinking = Thinking(-1, -1, frozenset())

    def logprobs(self, ids: Sequence[int], spec: str, prompt: int = 0) -> torch.Tensor:
        """`[tokens, vocabulary]` of one uncached pass over `ids`, of which `prompt` are the prompt's."""
        resolved = self.registry.resolve(parse(spec))
        steered = [True] * len(ids)
        if condition := resolved.condition:
            steered = self.holds(condition, ids if condition.each else ids[:prompt])
            steered = steered if condition.each else steered[-1:] * len(ids)
            resolved = Spec(tuple(replace(entry, condition=None) for entry in resolved.entries))
        each: tuple[list[Spec], list[int] | None] = [resolved], None
        if condition or not resolved.everywhere:
            acts = [acting(resolved, prompt, position, ids, self.thinking) for position in range(len(ids))]
            each = [one if holds else Spec() for one, holds in zip(acts, steered, strict=True)], [1] * len(ids)
        with torch.no_grad(), self.steering.batch(*each):
            logits = self.steering.anatomy.model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0]
        return torch.log_softmax(logits.float(), -1)

    def holds(self, condition: Condition, ids: Sequence[int]) -> list[bool]:
        """At each of these tokens, by a plain pass."""
        seen: list[torch.Tensor] = []
        block = self.steering.anatomy.blocks[condition.layer]
        with torch.no_grad(), hooks([on_output(block, lambda x: seen.append(x[0]))]):
            self.steering.anatomy.model(input_ids=torch.tensor([list(ids)]), use_cache=False)
        v = self.registry.get(condition.direction).direction.directions[condition.layer, 0]
        c = seen[0].float() @ v
        passed = c > condition.above if condition.above is not None else c < (condition.below or 0.0)
        return [bool(one) for one in passed]

    def check(self, output: Any, spec: str) -> None:
        """A greedy answer with `logprobs=1` is what this model says: the same tokens, the same logprobs."""
        prompt, answer = list(output.prompt_token_ids), list(output.outputs[0].token_ids)
        expected = self.logprobs(prompt + answer, spec, len(prompt))[len(prompt) - 1 : -1]
        said = torch.tensor(
            [entry[token].logprob for entry, token in zip(output.outputs[0].logprobs, answer, strict=True)]
        )
        assert are_likeliest(answer, expected), f"{spec}: other tokens"
        error = (expected[range(len(answer)), answer] - said).abs().max().item()
        assert error < TOLERANCE, f"{spec}: logprobs are off by {error:.1e}"


def think(llm: Any, reference: Reference, thinking: Thinking) -> None:
    """From now on the thinking of both has these tokens."""
    from steer.vllm import frontend

    reference.thinking = thinking
    for placement in (frontend.of(llm).placement, reference.placement):
        placement.shape = replace(placement.shape, thinking=thinking)
    llm.collective_rpc("steer_hello", args=("1:looks", "", [thinking.begin, thinking.end, *thinking.special]))


def check_phases(llm: Any, reference: Reference) -> None:
    """Of a model whose thinking begins, or ends, with what the plain model says in the midst of an answer: plain to the
    last token before that, where a phase begins with it, and from there on what transformers says."""
    plain = generate(llm, [(PROMPTS[0], "off")])[0]
    said = list(plain.outputs[0].token_ids)
    at = next(i for i in range(3, 12) if said[i] not in (*said[:i], *plain.prompt_token_ids))
    given = models.tokenizer().get_vocab()["~"]
    specs = [f"refusal@{tokens}=1.5,verbosity:add@1@{tokens}=2" for tokens in PHASES]
    for begin, end, more in ((127, said[at], ""), (said[at], 126, ""), (given, said[at], "~")):
        think(llm, reference, Thinking(begin, end, frozenset()))
        jobs = [(prompt + more, spec) for prompt in PROMPTS for spec in specs]
        outputs = generate(llm, jobs)
        for (_, spec), output in zip(jobs, outputs, strict=True):
            reference.check(output, spec)
        for tokens, output in zip(PHASES, outputs[:2] if not more else (), strict=False):
            comes = tokens == ("thinking" if begin == said[at] else "after-thinking")
            answer = list(output.outputs[0].token_ids)
            assert answer[: at + 1 if comes else None] == said[: at + 1 if comes else None]


def check_told(llm: Any, reference: Reference, jobs: Sequence[tuple[str, str]], **more: Any) -> set[bool | None]:
    """At the end of each answer to these (prompt, spec) pairs it is known whether its condition held, or its phase
    came; of one without either nothing is. Returns what was said."""
    from vllm.sampling_params import RequestOutputKind

    from steer.vllm import frontend

    engine, front = llm.llm_engine, frontend.of(llm)
    said: set[bool | None] = set()
    more |= {"output_kind": RequestOutputKind.FINAL_ONLY}
    for n, (words, spec) in enumerate(jobs):
        engine.add_request(f"told-{n}", words, parameters(spec, **more))
    tickets = {name: ticket for ticket in front.held.values() for name, _ in ticket.states}
    outputs: list[Any] = []
    while engine.has_unfinished_requests():
        outputs += engine.step()
    assert len(outputs) == len(jobs)
    for output in outputs:
        _, spec = jobs[int(output.request_id.removeprefix("told-"))]
        resolved, prompt = reference.registry.resolve(parse(spec)), list(output.prompt_token_ids)
        for choice in output.outputs:
            ticket = tickets.get(output.request_id)
            expected: bool | None = None
            if resolved.condition and not resolved.condition.each:
                expected = reference.holds(resolved.condition, prompt)[-1]
            elif resolved.phased:
                ids = [*prompt, *choice.token_ids]
                predicting = range(len(prompt) - 1, len(ids) - 1)
                expected = any(acting(resolved, len(prompt), at, ids, reference.thinking) for at in predicting)
            found = front.met(ticket, output.request_id, choice.index) if ticket else None
            assert found == expected, (spec, prompt, choice)
            said.add(found)
    assert not front.held
    return said


def parameters(spec: str | None, **more: Any) -> Any:
    """Greedy sampling of 12 tokens under `spec`; None carries nothing."""
    from vllm import SamplingParams

    options: dict[str, Any] = dict(max_tokens=12, temperature=0, logprobs=1, ignore_eos=True)
    return SamplingParams(**(options | more), extra_args=None if spec is None else {"steer": spec})


def generate(llm: Any, jobs: Sequence[tuple[str, str]], **more: Any) -> list[Any]:
    """Answers to (prompt, spec) pairs, all in one batch."""
    outputs: list[Any] = llm.generate(
        [prompt for prompt, _ in jobs], [parameters(spec, **more) for _, spec in jobs], use_tqdm=False
    )
    return outputs
