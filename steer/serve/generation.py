"""From a checked request to answers: prompts to ids, tokens to text, and events of a stream."""

from __future__ import annotations

import asyncio
import json
import logging
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
from steer.readout import FIELD
from steer.registry import Admission, Registry
from steer.runtime.token_index import RequestSteer
from steer.serve import errors
from steer.serve.answers import Finish, SteerFields, report
from steer.serve.body import SIZE, SMALL, Gone, offload
from steer.serve.carriers import PLUS
from steer.serve.control import Control
from steer.serve.metrics import current_usage
from steer.serve.protocol import GenerationRequest
from steer.serve.text import Stops, TextStream, token_text
from steer.spec import Readout, RequestedDirection

log = logging.getLogger("steer")
T = TypeVar("T")
#: About what an answer says of a token: its text and a number.
TOKEN_BYTES = 64
#: Answers of one request that run at once, so that the requests of others have room beside a large one.
AT_ONCE = 16
#: What `generate` takes where a model that is to be sampled does not say.
TOP_K = 50
#: Settings by which `generate` would choose other tokens and which are not served, with the value that changes nothing.
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
    """What one generated token adds to an answer: text (perhaps none yet), and itself unless it only ends it."""

    text: str
    token: Token | None = None
    finish: Finish | None = None
    #: At the end of the answer to a request with a condition, or in a phase: did that hold, did it come.
    applied: bool | None = None


@dataclass(slots=True)
class WholeAnswer:
    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    finish: Finish = "length"
    made: int = 0
    applied: bool | None = None
    #: The tokens of the prompt, where they were to be scored.
    scored: list[Token] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Job:
    """One answer to make: its place in the request, prompt, sampling, what steers it and what is read."""

    index: int
    prompt: list[int]
    sampling: Sampling
    stop: Stops | None
    steer: RequestSteer | None = None
    read: Readout | None = None
    #: How many of the likeliest tokens are told for each token of the prompt; None where it is not scored.
    scored: int | None = None


@dataclass
class Served:
    """What the routes of the own engine share: the model with its tokenizer, its engine, registry and control. Runs
    jobs on the engine."""

    model_name: str
    loaded: Loaded
    engine: Engine
    registry: Registry
    control: Control
    default: tuple[RequestedDirection, ...]
    max_body: int
    template: Mapping[str, object]

    #: What the model's own settings say where a request does not.
    defaults: Sampling = field(init=False)
    #: The most characters that the tokens of the context stand for, as the vocabulary writes them.
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
        left = [name for name, neutral in _LEFT_OUT.items() if getattr(generation, name, None) not in (None, neutral)]
        if left:
            log.warning("settings of the model's generation_config.json that are not applied: %s", ", ".join(left))

    @property
    def fingerprint(self) -> str:
        """`system_fingerprint` of every answer: what this server's answers depend on besides the request."""
        return f"steer-{__version__}-{(self.loaded.template_sha256 or 'base')[:8]}"

    def check_model(self, name: str) -> None:
        """Raise HTTPProblem 404 for a model that is not this one; the middleware has taken aliases apart."""
        if name != self.model_name:
            raise errors.HTTPProblem(
                errors.Code.MODEL_NOT_FOUND,
                f"the model {name[:100]!r} is not served here; served: '{self.model_name}', and "
                f"'{self.model_name}{PLUS}<direction>' for each direction",
                param="model",
            )

    def steer(self, admission: Admission, prompt: Sequence[int]) -> RequestSteer | None:
        """What steers a prompt of these tokens, in slots of the bank."""
        spec = admission.spec
        return self.engine.steering.bank.steer(spec, len(prompt), spec.phase(self.loaded.thinking, prompt))

    def steer_fields(self, read: Readout | None, tokens: list[Token], applied: bool | None) -> SteerFields:
        """The parts of a choice that say what was read at its tokens, and whether its condition or phase was met."""
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
        """What `work` makes of `texts`, and of whatever else the body says, in a thread, unless the client goes first.
        Raises as `check_length`."""
        for text in texts:
            self.check_length(text, param)
        return await unless_gone(request, offload("text", request.scope[SIZE], work))

    def check_length(self, text: str | list[int], param: str) -> None:
        """Raise HTTPProblem for a text that is too long for any answer, before a minute is spent on counting its
        tokens."""
        if len(text) > (most := self.longest_text):
            raise errors.HTTPProblem(
                errors.Code.CONTEXT_LENGTH_EXCEEDED,
                f"the prompt has {len(text)} characters; no text of more than {most} is within the context of "
                f"{self.engine.context} tokens",
                param=param,
            )

    def room(self, prompt: Sequence[int], wanted: int | None, param: str, limit: str = "max_tokens") -> int:
        """How many tokens the answer may have. Raises RequestError where prompt and answer do not fit the context.
        `param` and `limit`: the fields that they are from."""
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
        most: int | None = self.loaded.model.generation_config.max_new_tokens  # where a request does not say
        return min(left, most or left) if wanted is None else wanted

    def tokens(self, body: GenerationRequest) -> Sampling:
        """What a request says in tokens and in words, as a part of its `Sampling`. Raises RequestError for a token that
        the model does not have."""
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
        """A word at the beginning of a text and, where that is as many tokens with another first one, inside of it."""
        first, inside = (tuple(self.loaded.piece_ids(before + word.lstrip())) for before in ("", " "))
        different = first and len(first) == len(inside) and first[0] != inside[0]
        return [spelled for spelled in (first, inside if different else ()) if spelled]

    async def pieces(self, job: Job, turns: asyncio.Semaphore) -> AsyncGenerator[Piece, None]:
        """What goes wrong between tokens and text is a RequestFailed. `turns`: of the request."""
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
        """All of them, AT_ONCE at a time; when one fails the others are cancelled."""
        turns = asyncio.Semaphore(AT_ONCE)
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(self.answer(job, turns)) for job in jobs]
        return [task.result() for task in tasks]

    async def told(
        self, request: Request, answers: Sequence[WholeAnswer], make: Callable[[], Mapping[str, object]]
    ) -> Response:
        """What `make` makes of `answers`, as JSON, off the event loop where that takes longer than a moment."""

        def data() -> bytes:
            return written(make()).encode()

        each = [tokens for answer in answers for tokens in (answer.scored, answer.tokens) if tokens]
        size = TOKEN_BYTES * sum(len(tokens) * _told(tokens[-1]) for tokens in each)
        made = data() if size <= SMALL else await unless_gone(request, offload("answer", size, data))
        return Response(made, media_type="application/json")

    async def interleaved(self, jobs: Sequence[Job]) -> AsyncGenerator[tuple[int, Piece], None]:
        """Pieces of all jobs as they come, each with its job's index."""
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


def written(value: object, levels: int = 7) -> str:
    """`value` as JSON, as `json.dumps` writes it, but in pieces: one call would hold the interpreter to its end."""
    if levels and isinstance(value, dict):
        return "{" + ",".join(f"{_encode(key)}:{written(each, levels - 1)}" for key, each in value.items()) + "}"
    if levels and isinstance(value, list):
        return "[" + ",".join([written(each, levels - 1) for each in value]) + "]"
    return _encode(value)


_encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode


def _told(token: Token) -> int:
    """How many numbers an answer says of it, at most; one too many where none was asked for."""
    return 1 + len(token.top) + (0 if token.reading is None else 4 * token.reading.before.size)


async def unless_gone(request: Request, work: Awaitable[T]) -> T:
    """What `work` gives. Raises Gone, and cancels it, when the client disconnects first. Errors inside task groups come
    out as themselves."""

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
    """`chunks` as server-sent events; an error in mid-stream becomes an event, since the status is already sent."""

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
