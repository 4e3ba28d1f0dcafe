"""The self-check at start: an engine must answer as `generate` does, for plain and steered, short and long requests in
one batch.

Four requests go through the engine at once. Two of them are steered by a test vector, and two are longer than every
length at which the model changes how it treats a request (if that is short enough to try). The engine's tokens must be
those of `generate`, under the same steering and one request at a time. If uncached passes agree with a plain
`generate`, they must also be those of uncached passes, which check the steering of cached steps.
"""

from __future__ import annotations

import asyncio
import logging
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers.generation.utils
from torch import Tensor

import steer
from steer.errors import EngineFailed, UnsupportedModel
from steer.hf import internals
from steer.hf.engine import Engine
from steer.hf.sampling import Sampling, Token
from steer.hf.steering import PROBE_TOKENS
from steer.runtime.selfcheck import vector
from steer.runtime.token_index import RequestSteer

log = logging.getLogger("steer")
#: Tokens of the greedy answers.
ANSWER = 4
#: The longest prompt that is tried, and the length of long prompts if the model has no limit below LONGEST.
LONGEST, LONG = 512, 48
#: How far log-probabilities may differ: the rounding of other batch shapes.
AGREE = {torch.float64: 1e-3, torch.float32: 1e-3}
#: Seconds for four short answers, after which the engine counts as hung.
PATIENCE = 900
_OURS = str(Path(steer.__file__).parent)
_ENTRIES = (torch.nn.modules.module.__file__, transformers.generation.utils.__file__)


class SelfCheckFailed(UnsupportedModel):
    """The engine answers differently from `generate` for this model, or a forward pass failed."""


@dataclass(frozen=True, slots=True)
class _Asked:
    name: str
    prompt: list[int]
    steer: RequestSteer | None


def self_check(engine: Engine) -> None:
    """Raise SelfCheckFailed if the model cannot be run in this engine; other errors are raised unchanged."""
    with vector(engine.steering.bank) as steer_:
        requests = _requests(engine, steer_)
        try:
            answers = asyncio.run(_answers(engine, requests))
            with engine.alone():
                _compare(engine, requests, answers)
        except Exception as error:
            cause = error.__cause__ if isinstance(error, EngineFailed) and error.__cause__ else error
            if isinstance(error, SelfCheckFailed) or not _of_the_model(cause):
                raise
            raise SelfCheckFailed(f"a forward pass fails: {internals.short(cause)}") from error


def _requests(engine: Engine, steer_: RequestSteer) -> list[_Asked]:
    longest = min(LONGEST, engine.context - ANSWER)
    beyond = [n + 1 for n in internals.lengths(engine.steering.anatomy.model.config) if n < longest]
    sizes = {"short": min(PROBE_TOKENS, longest), "long": max([min(LONG, longest), *beyond])}
    span = max(engine.steering.anatomy.vocabulary - 1, 1)
    # each long prompt is prefilled beside a short one of the other kind, and all decode together
    order = (("short", None), ("long", steer_), ("short", steer_), ("long", None))
    return [
        _Asked(
            f"{size} {'steered' if steered else 'plain'} request",
            [(i * (2 * number + 3) + 5 * number) % span for i in range(sizes[size])],
            steered,
        )
        for number, (size, steered) in enumerate(order)
    ]


async def _answers(engine: Engine, requests: Sequence[_Asked]) -> list[list[Token]]:
    sampling = Sampling(max_tokens=ANSWER, temperature=0.0, ignore_eos=True, logprobs=0)

    async def one(asked: _Asked) -> list[Token]:
        return [token async for token in engine.answer(asked.prompt, sampling, asked.steer)]

    with engine.held():  # no request begins before all have been added
        tasks = [asyncio.create_task(one(asked)) for asked in requests]
        await asyncio.sleep(0)
    try:
        return list(await asyncio.wait_for(asyncio.gather(*tasks), PATIENCE))
    except TimeoutError as error:
        raise EngineFailed(f"the engine had no answer to the probe within {PATIENCE} s") from error


def _compare(engine: Engine, requests: Sequence[_Asked], answers: Sequence[Sequence[Token]]) -> None:
    allowed = AGREE.get(engine.steering.anatomy.dtype, 0.1)
    uncached_is_right = True
    for asked, answer in sorted(zip(requests, answers, strict=True), key=lambda pair: pair[0].steer is not None):
        ids = torch.tensor([token.id for token in answer])
        got = torch.tensor([token.logprob for token in answer], dtype=torch.float32)
        with engine.steering.batch([asked.steer]), torch.inference_mode():
            engine.steering.anatomy.forget_lengths()
            logprobs = internals.teacher_forced_logprobs(engine.steering.anatomy.model, asked.prompt, ids.tolist())
        right = logprobs.cpu().gather(1, ids[:, None])[:, 0]
        _agree(asked, got, right, "`generate`", allowed)
        if not uncached_is_right:
            continue
        scores = engine.score_alone([*asked.prompt, *ids.tolist()], asked.steer, 0)[len(asked.prompt) - 1 :]
        uncached = torch.tensor([score.logprob for score in scores], dtype=torch.float32)
        if asked.steer is None and float((uncached - right).abs().max()) > allowed:
            uncached_is_right = False
            log.warning("uncached passes of this model differ from `generate`: so do scores of a text from its answers")
            continue
        _agree(asked, got, uncached, "an uncached pass", allowed)


def _agree(asked: _Asked, got: Tensor, right: Tensor, by: str, allowed: float) -> None:
    for x, y in zip(got.tolist(), right.tolist(), strict=True):
        if not abs(x - y) <= allowed:  # NaN agrees with nothing
            raise SelfCheckFailed(
                f"a {asked.name} in a mixed batch has the log-probability {x:.4f} where {by} has {y:.4f} "
                f"({allowed:g} apart at most)"
            )


def _of_the_model(error: BaseException) -> bool:
    """Whether the error arose in `generate` or the model, and not in our hooks. Lack of memory does not count."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return False
    files = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    inside = next((i for i, file in enumerate(files) if file in _ENTRIES), None)
    return inside is not None and not any(file.startswith(_OURS) for file in files[inside:])
