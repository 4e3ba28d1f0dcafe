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

if TYPE_CHECKING:
    from steer.vllm.frontend import Frontend
    from steer.vllm.settings import EngineSettings

log = logging.getLogger("steer")

#: A request of the check: the number of its prompt, and its spec.
Job: TypeAlias = tuple[int, str]
#: Of each token of an answer: which it is, and log-probabilities by token.
ProbeAnswer: TypeAlias = list[tuple[int, dict[int, float]]]
#: Makes these greedy requests at once on this data-parallel rank, and waits for their answers.
Ask = Callable[[Sequence[Job], int], list[ProbeAnswer]]
#: Of one hook point, by phase: what is wrong, `RIGHT`, or None where no effect is clear.
Judgement: TypeAlias = dict[str, str | None]
RIGHT = ""

#: Once with all of it and once with half: what acts twice is all the same where nothing is left.
STRENGTHS = (1.0, 0.5)
#: Prompts that steered requests have, of those that plain ones have: the one with the least rounding, and others for
#: hook points at which it shows nothing or something wrong.
ASKED, PROMPTS = 3, 4
#: The first token of an answer is of the prefill, the others are of decoding.
PHASES = {"prefill": slice(0, 1), "decoding": slice(1, None)}
#: Rounding that is taken for granted, relative to what is rounded: of the dtype, and of float32 on some hardware.
ROUNDING = {"bfloat16": 8e-3, "float16": 1e-3, "float32": 1e-5}
#: An effect is clear when it is as many times the rounding. Then how much of it there is, and how like it is, must be
#: within these: what acts twice at half strength has 1.5 of it.
CLEAR, AMOUNT, LIKENESS = 4.0, (0.75, 1.25), 0.9
#: What a nudge at one hook point changes, times this, is what rounding at all of them may do.
NUDGES = 3.0
#: And what is left between the two, in times of the effect or of the rounding, is within either of these. It tells
#: neighbouring layers from each other, which do much the same.
LEFT, LEFT_ROUNDING = 0.1, 32.0


def self_check(frontend: Frontend, *, ask: Ask, ranks: int = 1) -> None:
    """Raise UnsupportedModel naming the hook points that do not steer. Before anything is served: nothing else may
    run."""
    streams, shape = _streams(frontend), frontend.shape
    needed = [HookPoint(site, i) for site in frontend.settings.sites for i in (EMBEDDING, *range(shape.layers))]
    if missing := [_named(point) for point in needed if point not in streams]:
        raise UnsupportedModel(f"no worker steers at {', '.join(missing)}")
    engines = [_Engine(frontend, ask, rank) for rank in range(ranks)]
    bad: list[str] = []
    unclear: dict[str, None] = {}
    frontend.registry.quiet = True  # what is put here is nobody's
    for some in _together(frontend.settings, needed):
        names = {f"probe-{secrets.token_hex(8)}": tried for tried in some}
        try:
            for name, tried in names.items():
                direction = _direction(frontend, tried, streams[tried.point])
                frontend.registry.put(name, direction.to_bytes(), store=False)
            for engine in engines:
                wrong, dim = engine.check(names)
                bad += wrong
                unclear |= dict.fromkeys(dim)
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
    """One data-parallel rank."""

    def __init__(self, frontend: Frontend, ask: Ask, rank: int) -> None:
        self.frontend, self.ask, self.rank = frontend, ask, rank
        self.nudge = 1 + ROUNDING.get(frontend.dtype, ROUNDING["bfloat16"])
        plain = [(prompt, "off") for prompt in range(PROMPTS)]
        served, eager = self._both(plain, plain)
        self.plain = served
        self.noise = [noises(frontend.dtype, served[job], eager[job]) for job in plain]

    def check(self, names: dict[str, Tried]) -> tuple[list[str], list[str]]:
        """What is wrong with the hook points of these directions, and where nothing can be told. One prompt at which
        all is right is enough: a model that falls from one behaviour into another at some prompt does so by
        rounding."""
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
            mode = names[name].mode
            tried = _named(names[name].point) + (f" ({mode})" if mode in ("one_sided", "rotate") else "")
            unclear += [f"{tried} in {phase}" for phase, text in phases.items() if text is None]
            if texts := [f"{text} in {phase}" for phase, text in phases.items() if text]:
                bad.append(f"{self._where()}{tried}: {', '.join(texts)}")
        return bad, unclear

    def _where(self) -> str:
        return f"data-parallel rank {self.rank}, " if self.rank else ""

    def _both(self, served: list[Job], eager: list[Job]) -> tuple[dict[Job, ProbeAnswer], dict[Job, ProbeAnswer]]:
        """The answers of what serves, and those of the model's own Python, asked in another order."""
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
    """`cases`: for each of `STRENGTHS` the answers (served plain, eager plain, served steered, eager steered, eager
    steered a little more: what rounding does under that steering); `noise`: how plain answers to that prompt differ by
    rounding alone."""
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
    """How an effect differs from the wanted one, of which one at least is clear."""
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
    """For each phase how far answers to a plain request are apart, at least the rounding of the dtype."""
    found: dict[str, float] = {}
    for phase in PHASES:
        a, b = common(served, eager, phase=phase)
        found[phase] = max(rms(a - b), ROUNDING.get(dtype, ROUNDING["bfloat16"]) * rms(b))
    return found


def leaks(noise: dict[str, float], alone: ProbeAnswer, mixed: ProbeAnswer) -> list[str]:
    """What is wrong with a plain request beside steered ones."""
    found: list[str] = []
    for phase, limit in noise.items():
        a, b = common(alone, mixed, phase=phase)
        if rms(a - b) > LEFT_ROUNDING * limit:  # other shapes of a batch round otherwise, and experts may be others
            found.append(f"a plain request is changed by those beside it in {phase}: by {rms(a - b):.2g}")
    return found


def common(*answers: ProbeAnswer, phase: str) -> list[NDArray[np.float64]]:
    """What each of the answers to one prompt says in this phase of the same tokens, as logits with a mean of 0, up to
    where they have read different tokens. All of one length, which may be 0."""
    found: list[list[NDArray[np.float64]]] = [[] for _ in answers]
    for n, entries in enumerate(zip(*answers, strict=False)):
        told = [{token for token, value in entry.items() if np.isfinite(value)} for _, entry in entries]
        tokens = sorted(set.intersection(*told))
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
    """What every hook point has in plain passes: as long as streams there are, in their common direction.
    Tensor-parallel ranks say the same."""
    return {
        HookPoint(site, layer): torch.from_numpy(np.frombuffer(data, np.float32).copy())
        for worker in frontend.call("steer_streams")
        for site, layer, data in worker
    }


#: How far the directions lean to what the stream has at their hook point, beside a random part of length 1. Less, where
#: `affine` makes the effect: to take away what all tokens have in common can tip a model over.
LEANING: dict[Mode, float] = {"affine": 0.3, "ablate": 1.0, "one_sided": 1.0, "rotate": 0.3}
#: By how much the gate of `one_sided` is shifted: from where no component passes it to 0.
SHIFT = -0.5


@dataclass(frozen=True, slots=True)
class Tried:
    """Where a direction of the check acts, and how."""

    point: HookPoint
    mode: Mode


def _together(settings: EngineSettings, needed: Sequence[HookPoint]) -> list[list[Tried]]:
    """All that is tried, by what there are rows for at once. `affine`, where it acts, adds as much as there is,
    whatever the stream. What shifts and what turns is the same code everywhere, and is tried at one layer."""
    each = [Tried(point, "affine" if "affine" in point.modes else "ablate") for point in needed]
    gated = [Tried(point, "one_sided") for point in needed if "one_sided" in point.modes]
    each += gated[len(gated) // 2 :][:1]
    groups = [each[at : at + settings.rows] for at in range(0, len(each), settings.rows)]
    turning = [Tried(point, "rotate") for point in needed if "rotate" in point.modes]
    if turning and min(settings.rank, settings.rows) > 1:
        groups.append([turning[len(turning) // 2]])
    return groups


def _spec(name: str, tried: Tried, strength: float) -> str:
    shift = f"^{SHIFT}" if tried.mode == "one_sided" else ""
    return f"{name}:{tried.mode}{shift}={strength}"


def _direction(frontend: Frontend, tried: Tried, stream: Tensor) -> Direction:
    """Acts at one hook point, and changes much there. With `affine` its component of a stream becomes as large as
    streams are; with `ablate` and `one_sided` what streams there have in common is removed from them in part, and with
    `rotate` a part of it is turned to an axis that they do not have in common."""
    shape, point = frontend.shape, tried.point
    generator = torch.Generator().manual_seed(point.layer + 1)
    v = torch.randn(shape.d_model, generator=generator)
    v = v / v.norm() + LEANING[tried.mode] * stream / stream.norm().clamp_min(1e-12)
    v = (v / v.norm()).unsqueeze(0)
    own = max(point.layer, 0)  # at the embedding's hook point a layer must have a row as well: with a weight of 0
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
