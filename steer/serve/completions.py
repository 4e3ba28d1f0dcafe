"""`POST /v1/completions` on the own engine: texts to continue, streamed or not, scored with `echo`."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from steer.hf.sampling import Token
from steer.serve import errors, token_usage
from steer.serve.answers import (
    ChunkUsage,
    Completion,
    CompletionChoice,
    CompletionChunk,
    CompletionChunkChoice,
    CompletionUsage,
    completion_logprobs,
    envelope,
    generated,
    usage,
)
from steer.serve.generation import Job, made, stream, unless_gone
from steer.serve.protocol import CompletionRequest
from steer.serve.route import JsonRoute
from steer.serve.served import Served
from steer.serve.text import Stops


def router(served: Served) -> APIRouter:
    router, generator, engine = APIRouter(route_class=JsonRoute), served.generator, served.engine

    @router.post(
        "/v1/completions",
        tags=["generation"],
        summary="Continue a text, or each of several",
        responses=generated(Completion, "CompletionEvent"),
    )
    async def complete(body: CompletionRequest, request: Request) -> Response:
        served.check_model(body.model)
        admission = served.admitted(request)
        read = admission.readout
        tokenizer = served.loaded.tokenizer
        prompts = body.prompts
        engine.admit(len(prompts) * body.n)
        if body.stream and (body.echo or body.max_tokens == 0):
            raise errors.HTTPProblem(
                errors.Code.UNSUPPORTED, "echo and max_tokens 0 are not served as a stream", param="stream"
            )

        def prepare() -> list[Job]:
            asked = generator.tokens(body)
            jobs: list[Job] = []
            stops = Stops(body.stops)
            for prompt in prompts:
                ids = served.loaded.text_ids(prompt) if isinstance(prompt, str) else prompt
                room = generator.room(ids, body.max_tokens, "prompt")
                for sampling in body.sampling(asked, room, body.logprobs):
                    jobs.append(Job(len(jobs), ids, sampling, stops, served.steer(admission, ids), read))
            return jobs

        jobs = await generator.offload(request, prompts, "prompt", prepare)
        prompt_tokens = sum(len(job.prompt) for job in jobs[:: body.n])
        token_usage.current().prompt += prompt_tokens
        base = envelope("cmpl", body.model, served.fingerprint)
        if body.stream:
            with_usage = bool(body.stream_options and body.stream_options.include_usage)

            def chunk(choices: list[CompletionChunkChoice], usage: CompletionUsage | None = None) -> CompletionChunk:
                counted: ChunkUsage = {"usage": usage} if with_usage else {}
                return {**base, "object": "text_completion", "choices": choices, **counted}

            async def chunks() -> AsyncGenerator[CompletionChunk, None]:
                count = 0
                offsets = [0] * len(jobs)
                async with aclosing(generator.interleaved(jobs)) as pieces:
                    async for index, piece in pieces:
                        count += 1
                        tokens = [piece.token] if piece.token else []
                        reported = None
                        if body.logprobs is not None and tokens:
                            reported = completion_logprobs(tokenizer, tokens, offsets[index])
                            offsets[index] += len(reported["tokens"][0])
                        if piece.text or piece.finish or reported or (tokens and read):
                            choice: CompletionChunkChoice = {
                                "index": index,
                                "text": piece.text,
                                "logprobs": reported,
                                "finish_reason": piece.finish,
                                **served.steer_fields(read if tokens else None, tokens, piece.applied),
                            }
                            yield chunk([choice])
                if with_usage:
                    yield chunk([], usage(prompt_tokens, count))

            return stream(chunks())
        answers = await unless_gone(request, generator.answers(jobs))
        choices: list[CompletionChoice] = []
        for job, answer in zip(jobs, answers, strict=True):
            text, tokens = answer.text, answer.tokens
            if body.echo:
                text = tokenizer.decode(job.prompt, skip_special_tokens=True) + text
                if body.logprobs is not None:
                    first = Token(job.prompt[0])
                    rest = await engine.score(job.prompt, job.steer, body.logprobs) if len(job.prompt) > 1 else []
                    tokens = [first, *rest, *tokens]
            choices.append(
                {
                    "index": job.index,
                    "text": text,
                    "logprobs": completion_logprobs(tokenizer, tokens) if body.logprobs is not None else None,
                    "finish_reason": answer.finish,
                    **served.steer_fields(read, answer.tokens, answer.applied),
                }
            )
        whole: Completion = {
            **base,
            "object": "text_completion",
            "choices": choices,
            "usage": usage(prompt_tokens, made(answers)),
        }
        return JSONResponse(whole)

    return router
