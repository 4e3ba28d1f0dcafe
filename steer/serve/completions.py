"""`POST /v1/chat/completions` and `/v1/completions` on the transformers engine: from a checked body to an answer or a
stream in OpenAI's shape."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from typing import TypeVar

from fastapi import APIRouter, Request, Response

from steer.hf.sampling import Token
from steer.registry import Admission
from steer.serve import errors, metrics
from steer.serve.answers import (
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatLogprobs,
    Completion,
    CompletionChoice,
    CompletionChunkChoice,
    CompletionUsage,
    chat_logprobs,
    completion_logprobs,
    generated,
    usage,
)
from steer.serve.generation import Job, Piece, Served, WholeAnswer, stream
from steer.serve.protocol import ChatRequest, CompletionRequest, StreamOptions
from steer.serve.routes import JsonRoute
from steer.serve.text import Stops

Choice = TypeVar("Choice")


def router(served: Served) -> APIRouter:
    router, engine, tokenizer = APIRouter(route_class=JsonRoute), served.engine, served.loaded.tokenizer

    @router.post(
        "/v1/chat/completions",
        tags=["generation"],
        summary="Answer a conversation",
        responses=generated(ChatCompletion, "ChatCompletionEvent"),
    )
    async def chat(body: ChatRequest, request: Request) -> Response:
        served.check_model(body.model)
        admission: Admission = request.scope["steer"]
        read = admission.readout
        wants_logprobs = body.wanted_logprobs is not None
        engine.admit(body.n)

        def prepare() -> list[Job]:
            defaults = served.tokens(body)
            text = served.loaded.chat_text(
                messages,
                add_generation_prompt=body.begins_answer,
                **{**served.template, **body.template_variables},
            )
            served.check_length(text, "messages")  # again: variables of the template can be long too
            prompt = served.loaded.piece_ids(text)
            limit = "max_completion_tokens" if body.max_completion_tokens else "max_tokens"
            room, stops = served.room(prompt, getattr(body, limit), "messages", limit), Stops(body.stops)
            samplings = body.sampling(defaults, room, body.wanted_logprobs)
            steer = served.steer(admission, prompt)
            return [Job(i, prompt, sampling, stops, steer, read) for i, sampling in enumerate(samplings)]

        messages = [message.plain() for message in body.messages]
        contents = [str(message["content"]) for message in messages]
        jobs = await served.offload(request, contents, "messages", prepare)
        prompt_tokens = len(jobs[0].prompt)
        metrics.current_usage().read(prompt_tokens, body.n)
        base = served.envelope("chatcmpl")

        def logprobs(tokens: list[Token]) -> ChatLogprobs | None:
            return chat_logprobs(tokenizer, tokens) if wants_logprobs else None

        def part(index: int, piece: Piece, tokens: list[Token]) -> ChatChunkChoice | None:
            if not (piece.text or piece.finish or (tokens and (wants_logprobs or read))):
                return None
            return {
                "index": index,
                "delta": {"content": piece.text} if piece.text else {},
                "logprobs": logprobs(tokens) if tokens else None,
                "finish_reason": piece.finish,
                **served.steer_fields(read if tokens else None, tokens, piece.applied),
            }

        if body.stream:
            opening: list[ChatChunkChoice] = [
                {
                    "index": job.index,
                    "delta": {"role": "assistant", "content": ""},
                    "logprobs": None,
                    "finish_reason": None,
                }
                for job in jobs
            ]
            chunk = {**base, "object": "chat.completion.chunk"}
            return stream(_chunks(served, jobs, prompt_tokens, body.stream_options, part, chunk, opening))

        def whole(answers: Sequence[WholeAnswer]) -> ChatCompletion:
            choices: list[ChatChoice] = [
                {
                    "index": i,
                    "message": {"role": "assistant", "content": answer.text, "refusal": None},
                    "logprobs": logprobs(answer.tokens),
                    "finish_reason": answer.finish,
                    **served.steer_fields(read, answer.tokens, answer.applied),
                }
                for i, answer in enumerate(answers)
            ]
            return {**base, "object": "chat.completion", "choices": choices, "usage": _used(prompt_tokens, answers)}

        return await served.respond(request, jobs, whole)

    @router.post(
        "/v1/completions",
        tags=["generation"],
        summary="Continue a text, or each of several",
        responses=generated(Completion, "CompletionEvent"),
    )
    async def complete(body: CompletionRequest, request: Request) -> Response:
        served.check_model(body.model)
        admission: Admission = request.scope["steer"]
        read, prompts = admission.readout, body.prompts
        engine.admit(len(prompts) * body.n, "prompt" if len(prompts) > 1 else "n")
        if body.stream and (body.echo or body.max_tokens == 0):
            raise errors.unsupported("echo and max_tokens 0 are not served as a stream", "stream")

        def prepare() -> list[Job]:
            defaults = served.tokens(body)
            jobs: list[Job] = []
            stops = Stops(body.stops)
            for prompt in prompts:
                ids = served.loaded.text_ids(prompt) if isinstance(prompt, str) else prompt
                room = served.room(ids, body.max_tokens, "prompt")
                for i, sampling in enumerate(body.sampling(defaults, room, body.logprobs)):
                    scored = body.logprobs if body.echo and i == 0 else None
                    jobs.append(Job(len(jobs), ids, sampling, stops, served.steer(admission, ids), read, scored))
            return jobs

        jobs = await served.offload(request, prompts, "prompt", prepare)
        prompt_tokens = sum(len(job.prompt) for job in jobs[:: body.n])
        metrics.current_usage().read(prompt_tokens, body.n)
        base = served.envelope("cmpl")
        offsets = [0] * len(jobs)

        def part(index: int, piece: Piece, tokens: list[Token]) -> CompletionChunkChoice | None:
            reported = None
            if body.logprobs is not None and tokens:
                reported = completion_logprobs(tokenizer, tokens, offsets[index])
                offsets[index] += len(reported["tokens"][0])
            if not (piece.text or piece.finish or reported or (tokens and read)):
                return None
            return {
                "index": index,
                "text": piece.text,
                "logprobs": reported,
                "finish_reason": piece.finish,
                **served.steer_fields(read if tokens else None, tokens, piece.applied),
            }

        if body.stream:
            chunk = {**base, "object": "text_completion"}
            return stream(_chunks(served, jobs, prompt_tokens, body.stream_options, part, chunk))

        def whole(answers: Sequence[WholeAnswer]) -> Completion:
            choices: list[CompletionChoice] = []
            for job, answer in zip(jobs, answers, strict=True):
                first = answers[job.index - job.index % body.n]  # the answers of one prompt share what it echoes
                echoed = tokenizer.decode(job.prompt, skip_special_tokens=True) if body.echo else ""
                tokens = [*first.scored, *answer.tokens]
                choices.append(
                    {
                        "index": job.index,
                        "text": echoed + answer.text,
                        "logprobs": completion_logprobs(tokenizer, tokens) if body.logprobs is not None else None,
                        "finish_reason": answer.finish,
                        **served.steer_fields(read, answer.tokens, answer.applied),
                    }
                )
            return {**base, "object": "text_completion", "choices": choices, "usage": _used(prompt_tokens, answers)}

        return await served.respond(request, jobs, whole)

    return router


async def _chunks(
    served: Served,
    jobs: Sequence[Job],
    prompt_tokens: int,
    options: StreamOptions | None,
    part: Callable[[int, Piece, list[Token]], Choice | None],
    chunk: Mapping[str, object],
    opening: Sequence[Choice] = (),
) -> AsyncGenerator[Mapping[str, object], None]:
    """The chunks of a stream, each with one choice.

    Args:
        part: makes the choice that a piece adds to the answer of a job; None if it adds nothing yet.
        chunk: the fields that all chunks have.
        opening: the choices that come first.
    """
    counted: dict[str, object] = {"usage": None} if options and options.include_usage else {}
    for choice in opening:
        yield {**chunk, "choices": [choice], **counted}
    count = 0
    async with aclosing(served.interleaved(jobs)) as pieces:
        async for index, piece in pieces:
            count += 1
            if (new := part(index, piece, [piece.token] if piece.token else [])) is not None:
                yield {**chunk, "choices": [new], **counted}
    if counted:
        yield {**chunk, "choices": [], "usage": usage(prompt_tokens, count)}


def _used(prompt_tokens: int, answers: Sequence[WholeAnswer]) -> CompletionUsage:
    return usage(prompt_tokens, sum(answer.made for answer in answers))
