"""`POST /v1/chat/completions` on the own engine: from a checked body to an answer or a stream, in OpenAI's shape."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from steer.hf.sampling import Token
from steer.serve import token_usage
from steer.serve.answers import (
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatLogprobs,
    ChunkUsage,
    CompletionUsage,
    chat_logprobs,
    envelope,
    generated,
    usage,
)
from steer.serve.generation import Job, made, stream, unless_gone
from steer.serve.protocol import ChatRequest
from steer.serve.route import JsonRoute
from steer.serve.served import Served
from steer.serve.text import Stops


def router(served: Served) -> APIRouter:
    router, generator, engine = APIRouter(route_class=JsonRoute), served.generator, served.engine

    @router.post(
        "/v1/chat/completions",
        tags=["generation"],
        summary="Answer a conversation",
        responses=generated(ChatCompletion, "ChatCompletionEvent"),
    )
    async def chat(body: ChatRequest, request: Request) -> Response:
        served.check_model(body.model)
        admission = served.admitted(request)
        read = admission.readout
        wants_logprobs = body.wanted_logprobs is not None
        engine.admit(body.n)

        def prepare() -> list[Job]:
            asked = generator.tokens(body)
            prompt = served.loaded.chat_ids(
                messages,
                add_generation_prompt=body.begins_answer,
                **{**served.template, **body.template_variables},
            )
            limit = "max_completion_tokens" if body.max_completion_tokens else "max_tokens"
            room, stops = generator.room(prompt, body.wanted_tokens, "messages", limit), Stops(body.stops)
            samplings = body.sampling(asked, room, body.wanted_logprobs)
            steer = served.steer(admission, prompt)
            return [Job(i, prompt, sampling, stops, steer, read) for i, sampling in enumerate(samplings)]

        messages = [message.plain() for message in body.messages]
        jobs = await generator.offload(request, [message["content"] for message in messages], "messages", prepare)
        prompt = jobs[0].prompt
        token_usage.current().prompt += len(prompt)
        tokenizer = served.loaded.tokenizer

        def logprobs(tokens: list[Token]) -> ChatLogprobs | None:
            return chat_logprobs(tokenizer, tokens) if wants_logprobs else None

        base = envelope("chatcmpl", body.model, served.fingerprint)
        if body.stream:
            with_usage = bool(body.stream_options and body.stream_options.include_usage)

            def chunk(choices: list[ChatChunkChoice], usage: CompletionUsage | None = None) -> ChatCompletionChunk:
                counted: ChunkUsage = {"usage": usage} if with_usage else {}
                return {**base, "object": "chat.completion.chunk", "choices": choices, **counted}

            async def chunks() -> AsyncGenerator[ChatCompletionChunk, None]:
                for job in jobs:
                    opening: ChatChunkChoice = {
                        "index": job.index,
                        "delta": {"role": "assistant", "content": ""},
                        "logprobs": None,
                        "finish_reason": None,
                    }
                    yield chunk([opening])
                count = 0
                async with aclosing(generator.interleaved(jobs)) as pieces:
                    async for index, piece in pieces:
                        count += 1
                        if piece.text or piece.finish or (piece.token and (wants_logprobs or read)):
                            tokens = [piece.token] if piece.token else []
                            choice: ChatChunkChoice = {
                                "index": index,
                                "delta": {"content": piece.text} if piece.text else {},
                                "logprobs": logprobs(tokens) if tokens else None,
                                "finish_reason": piece.finish,
                                **served.steer_fields(read if tokens else None, tokens, piece.applied),
                            }
                            yield chunk([choice])
                if with_usage:
                    yield chunk([], usage(len(prompt), count))

            return stream(chunks())
        answers = await unless_gone(request, generator.answers(jobs))
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
        whole: ChatCompletion = {
            **base,
            "object": "chat.completion",
            "choices": choices,
            "usage": usage(len(prompt), made(answers)),
        }
        return JSONResponse(whole)

    return router
