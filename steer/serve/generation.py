"""From a checked request to its answers: prompts to token ids, tokens to text, and the events of a stream."""

from __future__ import annotations

import asyncio
import json
import logging
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import TypeVar

from fastapi import Request, Response
from fastapi.responses import StreamingResponse

from steer._version import __version__
from steer.errors import RequestError, RequestFailed, SteerError
from steer.hf.engine import Engine
from steer.hf.load import Loaded
from steer.hf.sampling import Sampling, Token
from steer.readout import FIELD, Readout
from steer.registry import Admission, Registry
from steer.runtime.token_index import RequestSteer
from steer.serve import errors
from steer.serve.answers import Envelope, Finish, SteerFields, report
from steer.serve.body import SIZE, SMALL, Gone, offload
from steer.serve.carriers import PLUS
from steer.serve.control import Control
from steer.serve.metrics import current_usage
from steer.serve.protocol import GenerationRequest
from steer.serve.text import Stops, TextStream, token_text
from steer.spec import RequestedDirection

log = logging.getLogger("steer")
T = TypeVar("T")
#: About how many bytes an answer has for each token: its text and a number.
TOKEN_BYTES = 64
#: How many answers of one request run at the same time, so that others have room beside a large request.
AT_ONCE = 16
#: The `top_k` of `generate` if a model that is sampled has none.
TOP_K = 50
#: Settings of `generate` that change tokens and are not served, each with the value that changes nothing.
_LEFT_OUT: dict[str, object] = {
    "bad_words_ids": None,
    "begin_suppress_tokens": None,
    "diversity_penalty": 0.0,
    "encoder_no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "exponential_decay_length_penalty": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "guidance_scale": 1.0,
    "max_time": None,
    "min_length": 0,
    "min_new_tokens": 0,
    "no_repeat_ngram_size": 0,
    "num_beams": 1,
    "penalty_alpha": 0.0,
    "sequence_bias": None,
    "stop_strings": None,
    "suppress_tokens": None,
    "top_h": None,
    "typical_p": 1.0,
    "watermarking_config": None,
}


@dataclass(slots=True)
class Piece:
    """What one generated token adds to an answer: text (perhaps none yet), and the token unless it only ends it."""

    text: str
    token: Token | None = None
    finish: Finish | None = None
    #: At the end of an answer whose steering has a condition or a phase: whether the condition held or the phase came.
    applied: bool | None = None


@dataclass(slots=True)
class WholeAnswer:
    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    finish: Finish = "length"
    made: int = 0
    applied: bool | None = None
    #: The tokens of the prompt, if they were to be scored.
    scored: list[Token] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Job:
    """One answer to make: its index in the request, its prompt, sampling, steering and read-out."""

    index: int
    prompt: list[int]
    sampling: Sampling
    stop: Stops | None
    steer: RequestSteer | None = None
    read: Readout | None = None
    #: How many of the most likely tokens are reported for each token of the prompt; None if the prompt is not scored.
    scored: int | None = None


@dataclass
class Served:
    """What the routes of the transformers engine share: the model with its tokenizer, the engine, registry and control.
    Runs jobs on the engine."""

    model_name: str
    loaded: Loaded
    engine: Engine
    registry: Registry
    control: Control
    default: tuple[RequestedDirection, ...]
    max_body: int
    template: Mapping[str, object]

    #: The model's own settings, for what a request does not say.
    defaults: Sampling = field(init=False)
    #: The most characters that a text within the context can have, by the longest token of the vocabulary.
    longest_text: int = field(init=False)

    def __post_init__(self) -> None:
        self.longest_text = self.engine.context * max(map(len, self.loaded.tokenizer.get_vocab()))
        generation = self.loaded.model.generation_config
        self.defaults = Sampling(
            max_tokens=0,
            temperature=_or(generation.temperature, 1.0) if generation.do_sample else 0.0,
            top_p=_or(generation.top_p, 1.0),
            top_k=_or(generation.top_k, TOP_K if generation.do_sample else 0),
            min_p=_or(generation.min_p, 0.0),
            repetition_penalty=_or(generation.repetition_penalty, 1.0),
        )
        ignored = [name for name, same in _LEFT_OUT.items() if getattr(generation, name, None) not in (None, same)]
        if ignored:
            log.warning("settings of the model's generation_config.json that are not applied: %s", ", ".join(ignored))

    def envelope(self, prefix: str) -> Envelope:
        """The fields that every answer, or all chunks of one, have. The fingerprint: the versions that answers depend
        on."""
        return {
            "id": f"{prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": self.model_name,
            "system_fingerprint": f"steer-{__version__}-{(self.loaded.template_sha256 or 'base')[:8]}",
        }

    def check_model(self, name: str) -> None:
        """Raise HTTPProblem 404 for another model's name. The middleware has resolved aliases."""
        if name != self.model_name:
            raise errors.HTTPProblem(
                errors.Code.MODEL_NOT_FOUND,
                f"the model {name[:100]!r} is not served here; served: '{self.model_name}', and "
                f"'{self.model_name}{PLUS}<direction>' for each direction",
                param="model",
            )

    def steer(self, admission: Admission, prompt: Sequence[int]) -> RequestSteer | None:
        """The steering of a prompt with these tokens, in slots of the bank."""
        spec = admission.spec
        return self.engine.steering.bank.steer(spec, len(prompt), spec.phase(self.loaded.thinking, prompt))

    def steer_fields(self, read: Readout | None, tokens: list[Token], applied: bool | None) -> SteerFields:
        """The fields of a choice with the read-out of its tokens, and with whether its condition or phase was met."""
        out: SteerFields = {}
        if applied is not None:
            out["steer_applied"] = applied
        if read is not None:
            shown = [(token_text(self.loaded.tokenizer, token.id), token.reading) for token in tokens]
            out[FIELD] = report(read, shown)
        return out

    async def offload(
        self,
        request: Request,
        texts: Sequence[str | list[int]],
        param: str,
        work: Callable[[], T],
    ) -> T:
        """Run `work` on `texts` and the rest of the body, in a thread, until it ends or the client leaves. Raises what
        `check_length` does."""
        for text in texts:
            self.check_length(text, param)
        return await unless_gone(request, offload("text", request.scope[SIZE], work))

    def check_length(self, text: str | list[int], param: str) -> None:
        """Raise HTTPProblem for a text that is surely longer than the context. Without this check, counting its tokens
        could take a minute."""
        if len(text) > (most := self.longest_text):
            raise errors.HTTPProblem(
                errors.Code.CONTEXT_LENGTH_EXCEEDED,
                f"the prompt has {len(text)} characters; no text of more than {most} is within the context of "
                f"{self.engine.context} tokens",
                param=param,
            )

    def room(self, prompt: Sequence[int], wanted: int | None, param: str, limit: str = "max_tokens") -> int:
        """How many tokens the answer may have. Raises RequestError if prompt and answer do not fit the context. `param`
        and `limit`: the names of the fields that prompt and limit come from."""
        if not prompt:
            raise RequestError("the prompt has no tokens", param=param)
        context = self.engine.context
        left = context - len(prompt)
        if left < (1 if wanted is None else wanted):
            raise errors.HTTPProblem(
                errors.Code.CONTEXT_LENGTH_EXCEEDED,
                f"the prompt has {len(prompt)} tokens, the answer may have {wanted or 1}, the context is {context}",
                param=limit if left > 0 else param,
            )
        vocabulary = self.engine.steering.anatomy.vocabulary
        if (bad := next((t for t in prompt if not 0 <= t < vocabulary), None)) is not None:
            raise RequestError(f"token id {str(bad)[:40]} is outside the vocabulary of {vocabulary}", param=param)
        most: int | None = self.loaded.model.generation_config.max_new_tokens  # if the request has no limit
        return min(left, most or left) if wanted is None else wanted

    def tokens(self, body: GenerationRequest) -> Sampling:
        """The parts of the request's `Sampling` that concern single tokens and words. Raises RequestError for a token
        id that the model does not have."""
        vocabulary = self.engine.steering.anatomy.vocabulary
        biased = sorted((int(token), value) for token, value in (body.logit_bias or {}).items())
        for name, ids in ("stop_token_ids", body.stop_token_ids), ("logit_bias", [token for token, _ in biased]):
            if (bad := next((t for t in ids if not 0 <= t < vocabulary), None)) is not None:
                raise RequestError(f"{name}: token id {bad} is outside the vocabulary of {vocabulary}", param=name)
        return replace(
            self.defaults,
            stop_token_ids=tuple(body.stop_token_ids),
            logit_bias=tuple(biased),
            bad_words=tuple(ids for word in body.bad_words for ids in self._spelled(word)),
            repetition_penalty=_or(body.repetition_penalty, self.defaults.repetition_penalty),
            frequency_penalty=body.frequency_penalty or 0.0,
            presence_penalty=body.presence_penalty or 0.0,
            min_tokens=body.min_tokens,
        )

    def _spelled(self, word: str) -> list[tuple[int, ...]]:
        """The tokens of a word at the beginning of a text, and also those inside a text, if they are as many and the
        first one differs."""
        first, inside = (tuple(self.loaded.piece_ids(before + word.lstrip())) for before in ("", " "))
        different = first and len(first) == len(inside) and first[0] != inside[0]
        return [spelled for spelled in (first, inside if different else ()) if spelled]

    async def pieces(self, job: Job, turns: asyncio.Semaphore) -> AsyncGenerator[Piece, None]:
        """The pieces of an answer. Raises RequestFailed for an error between tokens and text. `turns`: the semaphore
        of the request."""
        made, ends = 0, job.sampling.ends(self.engine.eos_ids)
        current_usage().answer(lambda: made)
        try:
            text = TextStream(self.loaded.tokenizer, job.stop)
            async with aclosing(self.engine.generate(job.prompt, job.sampling, job.steer, job.read, turns)) as tokens:
                async for token in tokens:
                    made += 1
                    if token.id in ends:
                        yield Piece(text.finish(), None, "stop", token.applied)
                        break
                    new = text.push(token.id)
                    if text.stopped:
                        yield Piece(new, token, "stop", token.applied)
                        break
                    if made == job.sampling.max_tokens:
                        rest = new + text.finish()
                        yield Piece(rest, token, "stop" if text.stopped else "length", token.applied)
                        break
                    yield Piece(new, token)
        except SteerError:
            raise
        except Exception as error:
            log.exception("an answer broke off")
            raise RequestFailed(f"the answer was cut off: {type(error).__name__}: {str(error)[:200]}") from error

    async def answer(self, job: Job, turns: asyncio.Semaphore) -> WholeAnswer:
        out = WholeAnswer()
        if job.scored is not None:
            rest = await self.engine.score(job.prompt, job.steer, job.scored) if len(job.prompt) > 1 else []
            out.scored = [Token(job.prompt[0]), *rest]
        if job.sampling.max_tokens == 0:
            return out
        async with aclosing(self.pieces(job, turns)) as pieces:
            async for piece in pieces:
                out.made += 1
                out.text += piece.text
                if piece.token:
                    out.tokens.append(piece.token)
                out.finish, out.applied = piece.finish or out.finish, piece.applied
        return out

    async def answers(self, jobs: Sequence[Job]) -> list[WholeAnswer]:
        """All answers, AT_ONCE at a time. If one fails, the others are cancelled."""
        turns = asyncio.Semaphore(AT_ONCE)
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(self.answer(job, turns)) for job in jobs]
        return [task.result() for task in tasks]

    async def respond(
        self, request: Request, jobs: Sequence[Job], make: Callable[[Sequence[WholeAnswer]], Mapping[str, object]]
    ) -> Response:
        """The JSON response that `make` makes of the answers of all jobs; a large one is made in a thread."""
        answers = await unless_gone(request, self.answers(jobs))

        def data() -> bytes:
            return dumps(make(answers)).encode()

        each = [tokens for answer in answers for tokens in (answer.scored, answer.tokens) if tokens]
        size = TOKEN_BYTES * sum(len(tokens) * _numbers_of(tokens[-1]) for tokens in each)
        content = data() if size <= SMALL else await unless_gone(request, offload("answer", size, data))
        return Response(content, media_type="application/json")

    async def interleaved(self, jobs: Sequence[Job]) -> AsyncGenerator[tuple[int, Piece], None]:
        """The pieces of all jobs as they come, each with the index of its job."""
        queue: asyncio.Queue[tuple[int, Piece] | BaseException | None] = asyncio.Queue()
        turns = asyncio.Semaphore(AT_ONCE)

        async def run(job: Job) -> None:
            try:
                async with aclosing(self.pieces(job, turns)) as pieces:
                    async for piece in pieces:
                        queue.put_nowait((job.index, piece))
                queue.put_nowait(None)
            except Exception as error:
                queue.put_nowait(error)

        tasks = [asyncio.create_task(run(job)) for job in jobs]
        try:
            running = len(tasks)
            while running:
                item = await queue.get()
                if isinstance(item, BaseException):
                    raise item
                if item is None:
                    running -= 1
                else:
                    yield item
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


def dumps(value: object, levels: int = 7) -> str:
    """The same as `json.dumps`, in pieces: one call would hold the interpreter's lock until its end."""
    if levels and isinstance(value, dict):
        return "{" + ",".join(f"{_encode(key)}:{dumps(each, levels - 1)}" for key, each in value.items()) + "}"
    if levels and isinstance(value, list):
        return "[" + ",".join([dumps(each, levels - 1) for each in value]) + "]"
    return _encode(value)


_encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode


def _numbers_of(token: Token) -> int:
    """An upper bound on the numbers that an answer has for this token."""
    return 1 + len(token.top) + (0 if token.reading is None else 4 * token.reading.before.size)


async def unless_gone(request: Request, work: Awaitable[T]) -> T:
    """The result of `work`. If the client disconnects first, `work` is cancelled and this raises Gone. Errors inside
    task groups are raised as themselves."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = working, _ = asyncio.ensure_future(work), asyncio.create_task(gone())
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise Gone
        return working.result()
    except* SteerError as group:
        error: BaseException = group
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        raise error from None
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _or(value: T | None, default: T) -> T:
    return default if value is None else value


def stream(chunks: AsyncGenerator[Mapping[str, object], None]) -> StreamingResponse:
    """`chunks` as server-sent events. An error becomes an event too, since the status has been sent."""

    async def events() -> AsyncGenerator[str, None]:
        try:
            async with aclosing(chunks):
                async for chunk in chunks:
                    yield f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n"
        except SteerError as error:
            current_usage().failed = True
            yield errors.error_event(error)
        yield "data: [DONE]\n\n"

    return StreamingResponse(events(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
