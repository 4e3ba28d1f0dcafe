"""The self-check of the running engine at start: real requests through the compiled and captured engine, each steered
at one hook point, compared with the same requests in the model's eager Python.

`install` has already checked eager Python at every hook point, by what the next module receives. If a graph does not
reach a hook point, reaches it twice, or has another tensor there, the log-probabilities of the answers show it.
"""

from __future__ import annotations

import itertools
import logging
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from steer.direction import Direction, DirectionMeta
from steer.errors import UnsupportedModel
from steer.geometry import orthogonal_part
from steer.names import TURNING, Mode
from steer.runtime.bank import EMBEDDING, HookPoint
from steer.spec import NORM

if TYPE_CHECKING:
    from steer.vllm.frontend import Frontend
    from steer.vllm.settings import EngineSettings

log = logging.getLogger("steer")

#: A request of the self-check: the number of its prompt, and its spec.
Job: TypeAlias = tuple[int, str]
#: For each token of an answer: the token, and the log-probabilities at its position, by token.
ProbeAnswer: TypeAlias = list[tuple[int, dict[int, float]]]
#: Makes greedy requests together on one data-parallel rank, and waits for their answers.
Ask = Callable[[Sequence[Job], int], list[ProbeAnswer]]
#: The result at one hook point, by phase: the problem, `RIGHT` for none, or None if no effect is clear.
Judgement: TypeAlias = dict[str, str | None]
RIGHT = ""

#: Each direction acts once at full and once at half strength. At full strength an ablation that acts twice has the
#: same effect as one that acts once, because nothing is left to remove.
STRENGTHS = (1.0, 0.5)
#: The number of prompts of steered requests, and of plain requests. Steered requests have the prompt with the least
#: rounding first. The others are for hook points at which the prompts before them show no clear effect or a wrong one.
ASKED, PROMPTS = 3, 4
#: Which tokens of an answer belong to which phase: the first comes from the prefill, the others from decoding.
PHASES = {"prefill": slice(0, 1), "decoding": slice(1, None)}
#: The least rounding that is assumed, relative to the rounded value: by the dtype, and by float32 on some hardware.
ROUNDING = {"bfloat16": 8e-3, "float16": 1e-3, "float32": 1e-5}
#: An effect is clear if it is more than CLEAR times the rounding. A clear effect must have this share of the wanted
#: effect, and more than this correlation with it: what acts twice at half strength has 1.5 times the effect.
CLEAR, AMOUNT, LIKENESS = 4.0, (0.75, 1.25), 0.9
#: Rounding at all hook points may change this many times what a nudge at one hook point changes.
NUDGES = 3.0
#: The difference between the effect and the wanted one must be at most LEFT times the wanted effect or LEFT_ROUNDING
#: times the rounding. This tells neighbouring layers apart, whose effects are much alike.
LEFT, LEFT_ROUNDING = 0.1, 32.0


def self_check(frontend: Frontend, *, ask: Ask, ranks: int = 1) -> None:
    """Raise UnsupportedModel if any hook point does not steer; the error names them. Call this before anything is
    served: nothing else may run."""
    streams, shape = _streams(frontend), frontend.shape
    needed = [HookPoint(site, i) for site in frontend.settings.sites for i in (EMBEDDING, *range(shape.layers))]
    if missing := [_named(point) for point in needed if point not in streams]:
        raise UnsupportedModel(f"no worker steers at {', '.join(missing)}")
    engines = [_Engine(frontend, ask, rank) for rank in range(ranks)]
    bad: list[str] = []
    unclear: dict[str, None] = {}
    frontend.registry.quiet = True  # no user owns the directions that are put here
    for some in _together(frontend.settings, needed):
        names = {f"probe-{secrets.token_hex(8)}": tried for tried in some}
        try:
            for name, tried in names.items():
                direction = _direction(frontend, tried, streams[tried.point])
                frontend.registry.put(name, direction.to_bytes(), store=False)
            for engine in engines:
                problems, unknown = engine.check(names)
                bad += problems
                unclear |= dict.fromkeys(unknown)
        finally:
            for name in names.keys() & frontend.registry.names().keys():
                frontend.registry.delete(name)
    frontend.registry.quiet = False
    if bad:
        raise UnsupportedModel(f"the engine does not steer as the model's own code does: {'; '.join(bad)}")
    if unclear:
        log.warning(
            "the self-check cannot tell from rounding whether the compiled engine steers at: %s; the model's own code "
            "does",
            "; ".join(unclear),
        )


class _Engine:
    """The engine of one data-parallel rank, with its plain answers and their rounding."""

    def __init__(self, frontend: Frontend, ask: Ask, rank: int) -> None:
        self.frontend, self.ask, self.rank = frontend, ask, rank
        self.nudge = 1 + ROUNDING.get(frontend.dtype, ROUNDING["bfloat16"])
        plain = [(prompt, "off") for prompt in range(PROMPTS)]
        served, eager = self._both(plain, plain)
        self.plain = served
        self.noise = [noises(frontend.dtype, served[job], eager[job]) for job in plain]

    def check(self, names: dict[str, Tried]) -> tuple[list[str], list[str]]:
        """The problems at the hook points of these directions, and the hook points whose effect is not clear. One
        prompt at which everything is right is enough: if a model falls from one behaviour into another at some prompt,
        this comes from rounding."""
        found: dict[str, Judgement] = {name: dict.fromkeys(PHASES) for name in names}
        bad: list[str] = []
        for prompt in sorted(range(PROMPTS), key=lambda prompt: sum(self.noise[prompt].values()))[:ASKED]:
            left = [name for name, phases in found.items() if any(text != RIGHT for text in phases.values())]
            if not left:
                break
            specs = {name: [(prompt, _spec(name, names[name], strength)) for strength in STRENGTHS] for name in left}
            nudged = {
                name: [(prompt, _spec(name, names[name], self.nudge * strength)) for strength in STRENGTHS]
                for name in left
            }
            plain = list(self.plain)
            jobs = [*plain[:1], *itertools.chain(*specs.values()), *plain[1:]]
            served, eager = self._both(jobs, [*jobs, *itertools.chain(*nudged.values())])
            worst = {phase: max(noise[phase] for noise in self.noise) for phase in PHASES}
            for job in plain:
                bad += [f"{self._where()}{text}" for text in leaks(worst, self.plain[job], served[job])]
            alone = served[prompt, "off"], eager[prompt, "off"]
            for name in left:
                cases = [
                    (*alone, served[job], eager[job], eager[near])
                    for job, near in zip(specs[name], nudged[name], strict=True)
                ]
                for phase, text in judge(cases, self.noise[prompt]).items():
                    found[name][phase] = RIGHT if RIGHT in (text, found[name][phase]) else text or found[name][phase]
        unclear: list[str] = []
        for name, phases in found.items():
            tried = str(names[name])
            unclear += [f"{tried} in {phase}" for phase, text in phases.items() if text is None]
            if texts := [f"{text} in {phase}" for phase, text in phases.items() if text]:
                bad.append(f"{self._where()}{tried}: {', '.join(texts)}")
        return bad, unclear

    def _where(self) -> str:
        return f"data-parallel rank {self.rank}, " if self.rank else ""

    def _both(self, served: list[Job], eager: list[Job]) -> tuple[dict[Job, ProbeAnswer], dict[Job, ProbeAnswer]]:
        """The answers of the engine as it serves, and those of the model's own Python, which gets its requests in
        another order."""
        answers = self.ask(served, self.rank)
        try:
            self._eager(True)
            others = self.ask(eager[::-1], self.rank)[::-1]
        finally:
            self._eager(False)
        return dict(zip(served, answers, strict=True)), dict(zip(eager, others, strict=True))

    def _eager(self, on: bool) -> None:
        if problems := {answer["error"] for answer in self.frontend.call("steer_eager", on) if answer}:
            raise UnsupportedModel("; ".join(sorted(problems)))


def judge(cases: Sequence[Sequence[ProbeAnswer]], noise: dict[str, float]) -> Judgement:
    """Compare the effect of steering in the serving engine with that in eager Python.

    Args:
        cases: for each of `STRENGTHS` the answers (served plain, eager plain, served steered, eager steered, eager
            steered a little more). The last one shows what rounding does under that steering.
        noise: by phase, how much plain answers to that prompt differ by rounding alone.
    """
    found: Judgement = {}
    for phase, least in noise.items():
        problems: list[str] = []
        clear = 0
        for strength, answers in zip(STRENGTHS, cases, strict=True):
            plain, plain_eager, steered, steered_eager, nudged = common(*answers, phase=phase)
            effect, wanted = steered - plain, steered_eager - plain_eager
            limit = max(least, NUDGES * rms(nudged - steered_eager))
            if max(rms(effect), rms(wanted)) > CLEAR * limit:
                clear += 1
                if problem := _differ(effect, wanted, limit):
                    problems.append(f"{problem} at strength {strength}")
        found[phase] = " and ".join(problems) if problems else RIGHT if clear == len(STRENGTHS) else None
    return found


def _differ(effect: NDArray[np.float64], wanted: NDArray[np.float64], noise: float) -> str | None:
    """How an effect differs from the wanted one; None if they agree. At least one of the two must be clear."""
    both = float(effect @ wanted)
    amount = both / max(float(wanted @ wanted), 1e-30)
    likeness = both / max(float(np.linalg.norm(effect) * np.linalg.norm(wanted)), 1e-30)
    left = rms(effect - wanted)
    if (
        AMOUNT[0] < amount < AMOUNT[1]
        and likeness > LIKENESS
        and left <= max(LEFT * rms(wanted), LEFT_ROUNDING * noise)
    ):
        return None
    return f"{amount:.2f} of the effect (with a correlation of {likeness:.2f})"


def noises(dtype: str, served: ProbeAnswer, eager: ProbeAnswer) -> dict[str, float]:
    """For each phase, how far the answers to a plain request are apart; at least the rounding of the dtype."""
    found: dict[str, float] = {}
    for phase in PHASES:
        a, b = common(served, eager, phase=phase)
        found[phase] = max(rms(a - b), ROUNDING.get(dtype, ROUNDING["bfloat16"]) * rms(b))
    return found


def leaks(noise: dict[str, float], alone: ProbeAnswer, mixed: ProbeAnswer) -> list[str]:
    """The problems of a plain request that ran beside steered ones (`mixed`), compared with its answer `alone`."""
    found: list[str] = []
    for phase, limit in noise.items():
        a, b = common(alone, mixed, phase=phase)
        if rms(a - b) > LEFT_ROUNDING * limit:  # another batch shape rounds otherwise, and may choose other experts
            found.append(f"a plain request is changed by those beside it in {phase}: by {rms(a - b):.2g}")
    return found


def common(*answers: ProbeAnswer, phase: str) -> list[NDArray[np.float64]]:
    """For each of the answers to one prompt, its logits of the tokens that all answers report in this phase, with a
    mean of 0 at each position, up to the position where the answers chose different tokens. All arrays have one
    length, which may be 0."""
    found: list[list[NDArray[np.float64]]] = [[] for _ in answers]
    for n, entries in enumerate(zip(*answers, strict=False)):
        reported = [{token for token, value in entry.items() if np.isfinite(value)} for _, entry in entries]
        tokens = sorted(set.intersection(*reported))
        if tokens and n in range(*PHASES[phase].indices(len(answers[0]))):
            for parts, (_, entry) in zip(found, entries, strict=True):
                values = np.array([entry[token] for token in tokens])
                parts.append(values - values.mean())
        if len({token for token, _ in entries}) > 1:
            break
    return [np.concatenate(parts) if parts else np.zeros(0) for parts in found]


def rms(x: NDArray[np.float64]) -> float:
    return float(np.sqrt(np.square(x).mean())) if x.size else 0.0


def _streams(frontend: Frontend) -> dict[HookPoint, Tensor]:
    """A typical stream of plain passes at every hook point: their common direction, with their usual length.
    Tensor-parallel ranks report the same."""
    return {
        HookPoint(site, layer): torch.from_numpy(np.frombuffer(data, np.float32).copy())
        for worker in frontend.call("steer_streams")
        for site, layer, data in worker
    }


#: How long the part of a direction along the stream at its hook point is, beside a random part of length 1. It is
#: shorter if `affine` makes the effect: removing what all tokens have in common can tip a model over.
LEANING: dict[Mode, float] = {"affine": 0.3, "ablate": 1.0, "one_sided": 1.0, "rotate": 0.3}
#: By how much the gate of `one_sided` is shifted: from a value that no component passes, to 0.
SHIFT = -0.5


@dataclass(frozen=True, slots=True)
class Tried:
    """The hook point at which a direction of the self-check acts, its mode, and whether the norm is kept."""

    point: HookPoint
    mode: Mode
    keeps: bool = False

    def __str__(self) -> str:
        if self.keeps:
            return f"{_named(self.point)} (the norm kept)"
        return _named(self.point) + (f" ({self.mode})" if self.mode in ("one_sided", "rotate") else "")


def _together(settings: EngineSettings, needed: Sequence[HookPoint]) -> list[list[Tried]]:
    """All that is tried, in groups for which there are rows at the same time. Where `affine` can act, it is tried: it
    adds a component as long as the stream, whatever the stream is. What shifts, turns or keeps the norm runs the same
    code everywhere, so it is tried at one layer."""
    each = [Tried(point, "affine" if "affine" in point.modes else "ablate") for point in needed]
    gated = [Tried(point, "one_sided") for point in needed if "one_sided" in point.modes]
    each += gated[len(gated) // 2 :][:1]
    kept = [Tried(point, "affine", keeps=True) for point in needed if "affine" in point.modes]
    each += kept[len(kept) // 2 :][:1]
    groups = [each[at : at + settings.rows] for at in range(0, len(each), settings.rows)]
    turning = [Tried(point, "rotate") for point in needed if "rotate" in point.modes]
    if turning and min(settings.rank, settings.rows) > 1:
        groups.append([turning[len(turning) // 2]])
    return groups


def _spec(name: str, tried: Tried, strength: float) -> str:
    shift = f"^{SHIFT}" if tried.mode == "one_sided" else ""
    return f"{name}:{tried.mode}{NORM * tried.keeps}{shift}={strength}"


def _direction(frontend: Frontend, tried: Tried, stream: Tensor) -> Direction:
    """A direction that acts at one hook point and changes much there.

    With `affine` the component of a stream along it becomes as large as the streams are. With `ablate` and `one_sided`
    a part of what the streams have in common is removed, and with `rotate` a part of it is turned to an axis that the
    streams do not have in common.
    """
    shape, point = frontend.shape, tried.point
    generator = torch.Generator().manual_seed(point.layer + 1)
    v = torch.randn(shape.d_model, generator=generator)
    v = v / v.norm() + LEANING[tried.mode] * stream / stream.norm().clamp_min(1e-12)
    v = (v / v.norm()).unsqueeze(0)
    own = max(point.layer, 0)  # a layer must have a row for the embedding's hook point too, with a weight of 0
    rows, weights = torch.zeros(shape.layers, 1, shape.d_model), torch.zeros(shape.layers)
    rows[own], weights[own] = v, float(point.layer != EMBEDDING)
    means = torch.zeros(shape.layers, shape.d_model)
    means[own] = v * stream.norm()
    harmful, reference = torch.zeros_like(means), torch.zeros(shape.layers, 1)
    if tried.mode == "one_sided":
        harmful[own], reference[own] = 4 * means[own], 2 * stream.norm()
    axis = None
    if tried.mode in TURNING:
        axis = torch.zeros(shape.layers, shape.d_model)
        axis[own] = orthogonal_part(v[0], torch.randn(shape.d_model, generator=generator)).float()
    meta = DirectionMeta(
        schema_version=1 if axis is None else 2,
        method="probe",
        model="probe",
        architecture=shape.architecture,
        d_model=shape.d_model,
        layers=shape.layers,
        mode=tried.mode,
        modes=(tried.mode,),
        sites=(point.site,),
    )
    return Direction(
        meta,
        directions=rows,
        weights=weights,
        reference=reference,
        mean_harmful=harmful,
        mean_harmless=torch.zeros(shape.layers, shape.d_model),
        mean_harmless_all=means,
        embedding=v if point.layer == EMBEDDING else None,
        axis=axis,
        angles=None if axis is None else torch.zeros(shape.layers, 2),
    )


def _named(point: HookPoint) -> str:
    return f"{point.site} of {'the embedding' if point.layer == EMBEDDING else f'layer {point.layer}'}"
