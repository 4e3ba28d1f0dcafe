"""The OpenAI-compatible server on the own engine: routes, lifespan, and the middleware around them."""

from __future__ import annotations

import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from steer._version import __version__
from steer.errors import SteerError
from steer.hf.engine import Engine
from steer.hf.load import Loaded
from steer.hf.sampling import Token
from steer.readout import FIELD, Readout
from steer.registry import Admission, Registry
from steer.runtime.index import RequestSteer
from steer.runtime.readout import RequestRead
from steer.serve import errors, metrics, playground, switch, tally
from steer.serve.access import PUBLIC, Access
from steer.serve.carriers import PLUS, RECEIPT
from steer.serve.control import Control
from steer.serve.directions import router as directions_router
from steer.serve.generation import (
    Answer,
    Generator,
    Job,
    chat_logprobs,
    completion_logprobs,
    envelope,
    events,
    unless_gone,
    usage,
)
from steer.serve.middleware import SteerMiddleware
from steer.serve.protocol import ChatRequest, CompletionRequest
from steer.serve.readout import report
from steer.serve.text import token_text
from steer.spec import Wanted


@dataclass(frozen=True, slots=True)
class Served:
    """All that the app stands on."""

    model_name: str
    loaded: Loaded
    engine: Engine
    registry: Registry
    default: tuple[Wanted, ...] = ()
    max_body: int = 8 * 2**20
    control: Control = field(default_factory=Control)
    origins: Sequence[str] = ()


def build(served: Served) -> FastAPI:
    """The app; the middleware sits around it, so no route here ever sees a carrier, and the door around that."""
    control = served.control
    generator, registry, engine = Generator(served.loaded, served.engine), served.registry, served.engine
    fingerprint = f"steer-{__version__}-{(served.loaded.template_sha256 or 'base')[:8]}"
    stop_watching = threading.Event()

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        watcher = threading.Thread(
            target=registry.watch,
            args=(stop_watching, lambda: metrics.refresh(registry)),
            name="steer-watch",
            daemon=True,
        )
        watcher.start()
        metrics.refresh(registry)
        yield
        stop_watching.set()
        watcher.join(timeout=5)
        engine.stop()

    app = FastAPI(title="Steer", version=__version__, lifespan=lifespan)
    app.add_exception_handler(SteerError, errors.on_steer_error)
    app.add_exception_handler(RequestValidationError, errors.on_validation_error)
    app.add_exception_handler(HTTPException, errors.on_http_exception)
    app.add_middleware(
        SteerMiddleware,
        registry=registry,
        served=[served.model_name],
        default=served.default,
        max_body=served.max_body,
        readable=engine.steering.anatomy.layers if "resid_post" in engine.steering.table.sites else 0,
        control=control,
    )
    app.add_middleware(Access, control=control, public=PUBLIC.union(playground.PATHS))
    if served.origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(served.origins),
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=[RECEIPT, "x-request-id"],
        )
    app.include_router(playground.router())
    app.include_router(directions_router(registry, control=control))
    app.include_router(switch.router(control))
    table = engine.steering.table
    metrics.watch(registry, lambda: table.rows_in_use, table.rows)

    def check_model(name: str) -> None:
        if name != served.model_name:
            raise errors.HTTPProblem(
                404,
                f"the model {name[:100]!r} is not served here; served: '{served.model_name}', and "
                f"'{served.model_name}{PLUS}<direction>' for each direction",
                code="model_not_found",
                param="model",
            )

    def steer_of(request: Request) -> RequestSteer | None:
        admission: Admission = request.scope["steer"]
        return engine.steering.table.steer(admission.spec)

    def read_of(wanted: Readout | None) -> RequestRead | None:
        if wanted is None:
            return None
        return RequestRead(engine.steering.table.rows_of(wanted.digests), wanted.layers)

    def read_out(reading: Readout | None, tokens: list[Token]) -> dict[str, Any]:
        """The part of a choice that says what was read at its tokens."""
        if reading is None:
            return {}
        shown = [(token_text(served.loaded.tokenizer, token.id), token.reading) for token in tokens]
        return {FIELD: report(reading, shown).model_dump()}

    @app.post("/v1/chat/completions", tags=["generation"], summary="Answer a conversation")
    async def chat(body: ChatRequest, request: Request) -> Response:
        check_model(body.model)
        steer, reading = steer_of(request), request.scope["steer_readout"]
        read = read_of(reading)
        messages = [message.plain() for message in body.messages]
        prompt = served.loaded.chat_ids(messages, **body.chat_template_kwargs)
        samplings = body.sampling(
            generator.defaults, generator.room(prompt, body.wanted_tokens, "messages"), body.wanted_logprobs
        )
        jobs = [Job(i, prompt, sampling, body.stops, read) for i, sampling in enumerate(samplings)]
        engine.admit(len(jobs))
        tally.current().prompt += len(prompt)
        wants_logprobs = body.wanted_logprobs is not None
        tokenizer = served.loaded.tokenizer

        def logprobs(tokens: list[Token]) -> dict[str, Any] | None:
            return chat_logprobs(tokenizer, tokens) if wants_logprobs else None

        if body.stream:
            base = envelope("chatcmpl", "chat.completion.chunk", body.model, fingerprint)
            with_usage = bool(body.stream_options and body.stream_options.include_usage)

            async def chunks() -> AsyncGenerator[dict[str, Any], None]:
                def chunk(choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
                    return base | {"choices": choices} | ({"usage": None} if with_usage else {}) | more

                for job in jobs:
                    opening = {"role": "assistant", "content": ""}
                    yield chunk([{"index": job.index, "delta": opening, "logprobs": None, "finish_reason": None}])
                made = 0
                async with aclosing(generator.interleaved(jobs, steer)) as pieces:
                    async for index, piece in pieces:
                        made += 1
                        if piece.text or piece.finish or (piece.token and (wants_logprobs or reading)):
                            tokens = [piece.token] if piece.token else []
                            choice = {
                                "index": index,
                                "delta": {"content": piece.text} if piece.text else {},
                                "logprobs": logprobs(tokens) if tokens else None,
                                "finish_reason": piece.finish,
                            }
                            yield chunk([choice | (read_out(reading, tokens) if tokens else {})])
                if with_usage:
                    yield chunk([], usage=usage(len(prompt), made))

            return _stream(chunks())
        answers = await unless_gone(request, generator.answers(jobs, steer))
        choices = [
            {
                "index": i,
                "message": {"role": "assistant", "content": answer.text, "refusal": None},
                "logprobs": logprobs(answer.tokens),
                "finish_reason": answer.finish,
            }
            | read_out(reading, answer.tokens)
            for i, answer in enumerate(answers)
        ]
        base = envelope("chatcmpl", "chat.completion", body.model, fingerprint)
        return JSONResponse(base | {"choices": choices, "usage": usage(len(prompt), _made(answers))})

    @app.post("/v1/completions", tags=["generation"], summary="Continue a text, or each of several")
    async def complete(body: CompletionRequest, request: Request) -> Response:
        check_model(body.model)
        steer, reading, tokenizer = steer_of(request), request.scope["steer_readout"], served.loaded.tokenizer
        read = read_of(reading)
        jobs: list[Job] = []
        for prompt in body.prompts:
            ids = served.loaded.text_ids(prompt) if isinstance(prompt, str) else prompt
            room = generator.room(ids, body.max_tokens, "prompt")
            for sampling in body.sampling(generator.defaults, room, body.logprobs):
                jobs.append(Job(len(jobs), ids, sampling, body.stops, read))
        engine.admit(len(jobs))
        prompt_tokens = sum(len(job.prompt) for job in jobs[:: body.n])
        tally.current().prompt += prompt_tokens
        if body.stream:
            if body.echo or body.max_tokens == 0:
                raise errors.HTTPProblem(
                    400, "echo and max_tokens 0 are not served as a stream", code="unsupported", param="stream"
                )
            base = envelope("cmpl", "text_completion", body.model, fingerprint)
            with_usage = bool(body.stream_options and body.stream_options.include_usage)

            async def chunks() -> AsyncGenerator[dict[str, Any], None]:
                made = 0
                offsets = [0] * len(jobs)
                async with aclosing(generator.interleaved(jobs, steer)) as pieces:
                    async for index, piece in pieces:
                        made += 1
                        tokens = [piece.token] if piece.token else []
                        reported = None
                        if body.logprobs is not None and tokens:
                            reported = completion_logprobs(tokenizer, tokens, offsets[index])
                            offsets[index] += len(reported["tokens"][0])
                        if piece.text or piece.finish or reported or (tokens and reading):
                            choice = {
                                "index": index,
                                "text": piece.text,
                                "logprobs": reported,
                                "finish_reason": piece.finish,
                            }
                            choice |= read_out(reading, tokens) if tokens else {}
                            yield base | {"choices": [choice]} | ({"usage": None} if with_usage else {})
                if with_usage:
                    yield base | {"choices": [], "usage": usage(prompt_tokens, made)}

            return _stream(chunks())
        answers = await unless_gone(request, generator.answers(jobs, steer))
        choices = []
        for job, answer in zip(jobs, answers, strict=True):
            text, tokens = answer.text, answer.tokens
            if body.echo:
                text = tokenizer.decode(job.prompt, skip_special_tokens=True) + text
                if body.logprobs is not None:
                    first = Token(job.prompt[0])
                    rest = await engine.score(job.prompt, steer, body.logprobs) if len(job.prompt) > 1 else []
                    tokens = [first, *rest, *tokens]
            choices.append(
                {
                    "index": job.index,
                    "text": text,
                    "logprobs": completion_logprobs(tokenizer, tokens) if body.logprobs is not None else None,
                    "finish_reason": answer.finish,
                }
                | read_out(reading, answer.tokens)
            )
        base = envelope("cmpl", "text_completion", body.model, fingerprint)
        return JSONResponse(base | {"choices": choices, "usage": usage(prompt_tokens, _made(answers))})

    started = int(time.time())

    def model_card(name: str, **more: Any) -> dict[str, Any]:
        card = {"id": name, "object": "model", "created": started, "owned_by": "steer", "root": served.model_name}
        return card | {"parent": None, "max_model_len": engine.context} | more

    def cards(request: Request) -> list[dict[str, Any]]:
        caller = control.caller(request.scope)
        aliases = [
            model_card(f"{served.model_name}{PLUS}{name}", parent=served.model_name, root=name)
            for name in registry.names()
            if caller.may_use(name)
        ]
        return [model_card(served.model_name), *aliases]

    @app.get("/v1/models", tags=["models"], summary="The model, and an alias of it for each direction")
    async def models(request: Request) -> dict[str, Any]:
        return {"object": "list", "data": cards(request)}

    @app.get("/v1/models/{name:path}", tags=["models"], summary="The card of one model or alias")
    async def model(name: str, request: Request) -> dict[str, Any]:
        for card in cards(request):
            if card["id"] == name:
                return card
        raise errors.HTTPProblem(404, f"the model {name[:100]!r} is not served here", code="model_not_found")

    @app.get("/health", tags=["operation"], summary="State of the server; 503 when its engine has failed")
    async def health(request: Request) -> Response:
        state = control.health() | {
            "status": "ok" if engine.healthy else "failed",
            "engine": engine.description,
            "in_flight": engine.in_flight,
        }
        if control.caller(request.scope).manages:
            state |= {"directions": len(registry.names()), "failed_directions": sorted(registry.failures)}
        return JSONResponse(state, 200 if engine.healthy else 503)

    @app.get("/metrics", tags=["operation"], summary="Prometheus metrics")
    async def prometheus() -> Response:
        return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)

    return app


def _made(answers: list[Answer]) -> int:
    return sum(answer.made for answer in answers)


def _stream(chunks: AsyncGenerator[dict[str, Any], None]) -> StreamingResponse:
    return StreamingResponse(events(chunks), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
