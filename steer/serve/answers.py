"""The answers of the generation routes in the shapes of the OpenAI API: the types, which `/openapi.json` shows, and the
code that fills them. A key that is not always sent is `NotRequired`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Literal, NotRequired, TypeAlias

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, TypeAdapter
from typing_extensions import TypedDict

from steer.hf.sampling import Token
from steer.readout import Readout
from steer.runtime.readout import AFTER, BEFORE, Reading
from steer.serve.carriers import RECEIPT
from steer.serve.errors import Code, ErrorAnswer, documented
from steer.serve.text import token_text
from steer.tokenization import Tokenizer

Finish = Literal["stop", "length"]
#: Significant digits of the numbers in a read-out.
DIGITS = 5
_Numbers: TypeAlias = list[list[float | None]]


class ReadLine(TypedDict):
    """The read-out of one row of a direction."""

    name: Annotated[str, Field(description="the name that was asked for")]
    digest: Annotated[
        str, Field(description="the version that is read; if the direction also steers the request, the same version")
    ]
    row: Annotated[int, Field(description="the index of the row in the direction, from 0")]
    before: Annotated[_Numbers, Field(description="for each token, for each layer: the component before the operation")]
    after: Annotated[_Numbers, Field(description="the component after the operation; for a plain request the same")]
    angle_before: NotRequired[
        Annotated[
            _Numbers,
            Field(
                description="if angles were asked for: the stream's angle in the direction's plane before the "
                "operation, in degrees from the axis; null at a layer that the direction does not steer"
            ),
        ]
    ]
    angle_after: NotRequired[Annotated[_Numbers, Field(description="the angle after the operation")]]


class ReadReport(TypedDict):
    """The read-out of the tokens of one choice, or of one choice in a chunk of a stream."""

    layers: Annotated[list[int], Field(description="the layers that were read, in the order of the innermost lists")]
    tokens: Annotated[
        list[str], Field(description="the generated tokens, each read where it was predicted; in a chunk the new ones")
    ]
    norms: Annotated[
        _Numbers, Field(description="for each token, for each layer: the stream's norm before the operation")
    ]
    directions: Annotated[list[ReadLine], Field(description="one item for each row, in the order that was asked for")]


class SteerFields(TypedDict):
    """The fields of a choice that Steer adds for some requests."""

    steer_applied: NotRequired[
        Annotated[
            bool,
            Field(
                description="at the end of an answer whose spec has a condition or a phase: whether the condition held "
                "or the phase came, so that the answer was steered"
            ),
        ]
    ]
    steer_readout: NotRequired[Annotated[ReadReport, Field(description="if it was asked for")]]


class TokenLogprob(TypedDict):
    token: str
    logprob: float
    bytes: Annotated[list[int], Field(description="the token's text as UTF-8")]


class ChosenLogprob(TokenLogprob):
    top_logprobs: Annotated[list[TokenLogprob], Field(description="the most likely tokens at this position")]


class ChatLogprobs(TypedDict):
    content: Annotated[list[ChosenLogprob], Field(description="one item for each token of the answer")]
    refusal: None


class CompletionLogprobs(TypedDict):
    """Parallel lists, one item for each token."""

    tokens: list[str]
    token_logprobs: Annotated[list[float | None], Field(description="null for the first token of an echoed prompt")]
    top_logprobs: Annotated[list[dict[str, float] | None], Field(description="the most likely tokens at this position")]
    text_offset: Annotated[list[int], Field(description="where the token begins in the text, in characters")]


class CompletionUsage(TypedDict):
    """The tokens of one request."""

    prompt_tokens: int
    completion_tokens: Annotated[int, Field(description="tokens of all choices")]
    total_tokens: int


class _Choice(SteerFields):
    index: Annotated[int, Field(description="the number of the answer: n for each prompt, in the order of the prompts")]


class AnswerMessage(TypedDict):
    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(_Choice):
    message: AnswerMessage
    logprobs: Annotated[ChatLogprobs | None, Field(description="if `logprobs` was asked for")]
    finish_reason: Annotated[Finish, Field(description="stop: by itself; length: at the limit of tokens")]


class Delta(TypedDict):
    """What a chunk adds to an answer. The first one has `role`."""

    role: NotRequired[Literal["assistant"]]
    content: NotRequired[str]


class ChatChunkChoice(_Choice):
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: Annotated[Finish | None, Field(description="in the last chunk of this choice")]


class CompletionChoice(_Choice):
    text: str
    logprobs: Annotated[CompletionLogprobs | None, Field(description="if `logprobs` was asked for")]
    finish_reason: Annotated[Finish, Field(description="stop: by itself; length: at the limit of tokens")]


class CompletionChunkChoice(_Choice):
    text: Annotated[str, Field(description="what this chunk adds")]
    logprobs: CompletionLogprobs | None
    finish_reason: Annotated[Finish | None, Field(description="in the last chunk of this choice")]


class Envelope(TypedDict):
    id: str
    created: Annotated[int, Field(description="seconds since 1970")]
    model: Annotated[str, Field(description="the served model's name, without an alias")]
    system_fingerprint: Annotated[str, Field(description="the version of Steer and of the model's chat template")]


class ChatCompletion(Envelope):
    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: CompletionUsage


class ChunkUsage(TypedDict):
    usage: NotRequired[
        Annotated[CompletionUsage | None, Field(description="with `include_usage`: null except in the last chunk")]
    ]


class ChatCompletionChunk(Envelope, ChunkUsage):
    object: Literal["chat.completion.chunk"]
    choices: Annotated[list[ChatChunkChoice], Field(description="empty in the chunk that counts tokens")]


class Completion(Envelope):
    object: Literal["text_completion"]
    choices: list[CompletionChoice]
    usage: CompletionUsage


class CompletionChunk(Envelope, ChunkUsage):
    object: Literal["text_completion"]
    choices: Annotated[list[CompletionChunkChoice], Field(description="empty in the chunk that counts tokens")]


#: The content of a stream's events, by its name in the OpenAPI document: a chunk, or the error that ended the stream.
_EVENTS: Mapping[str, TypeAdapter[object]] = {
    "ChatCompletionEvent": TypeAdapter(ChatCompletionChunk | ErrorAnswer),
    "CompletionEvent": TypeAdapter(CompletionChunk | ErrorAnswer),
}
_REFERENCE = "#/components/schemas/{model}"


def event_schemas() -> dict[str, object]:
    """JSON schemas of the events and of all that they refer to, for `components`: FastAPI cannot declare events."""
    schemas, shared = TypeAdapter.json_schemas(
        ((name, "serialization", adapter) for name, adapter in _EVENTS.items()), ref_template=_REFERENCE
    )
    return {**shared["$defs"], **{name: schema for (name, _), schema in schemas.items()}}


def generated(model: type[ChatCompletion] | type[Completion], event: str) -> dict[int | str, dict[str, object]]:
    """The responses of a generation route for the OpenAPI document."""
    stream = {"text/event-stream": {"schema": {"$ref": _REFERENCE.format(model=event)}}}
    headers = {
        RECEIPT: {"description": "what steered the answer, as JSON; `[]` for plain", "schema": {"type": "string"}},
        "X-Request-Id": {"description": "the request's id in the audit log", "schema": {"type": "string"}},
    }
    success: dict[str, object] = {
        "model": model,
        "description": "The answer; with `stream` as events, `data: {...}`, and `data: [DONE]` at the end",
        "content": stream,
        "headers": headers,
    }
    ours = (code for code in Code if code not in (Code.DIRECTION_NOT_FOUND, Code.INVALID_DIRECTION, Code.NO_FREE_ROWS))
    return {200: success, **documented(*ours)}


def usage(prompt_tokens: int, completion_tokens: int) -> CompletionUsage:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def chat_logprobs(tokenizer: Tokenizer, tokens: Sequence[Token]) -> ChatLogprobs:
    def one(token: int, logprob: float | None) -> TokenLogprob:
        assert logprob is not None, "every generated token has one if they were asked for"
        shown = token_text(tokenizer, token)
        return {"token": shown, "logprob": logprob, "bytes": list(shown.encode())}

    return {
        "content": [{**one(t.id, t.logprob), "top_logprobs": [one(i, p) for i, p in t.top]} for t in tokens],
        "refusal": None,
    }


def completion_logprobs(tokenizer: Tokenizer, tokens: Sequence[Token], offset: int = 0) -> CompletionLogprobs:
    """`offset`: where the first token begins. Only the first token of an echoed prompt has no log-probability."""
    out: CompletionLogprobs = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for token in tokens:
        shown = token_text(tokenizer, token.id)
        out["tokens"].append(shown)
        out["token_logprobs"].append(token.logprob)
        known = token.logprob is not None
        out["top_logprobs"].append({token_text(tokenizer, i): p for i, p in reversed(token.top)} if known else None)
        out["text_offset"].append(offset)
        offset += len(shown)
    return out


def report(readout: Readout, tokens: Sequence[tuple[str, Reading | None]]) -> ReadReport:
    """The read-out of `tokens`: of each its text, and the reading where it was predicted."""
    readings = [reading for _, reading in tokens if reading]
    assert len(readings) == len(tokens), "the engine reads every token of a request with a read-out"
    lines: list[ReadLine] = []
    for k, line in enumerate(readout.lines):
        lines.append(
            {
                "name": line.name,
                "digest": line.digest,
                "row": line.row,
                "before": [_numbers(reading.before[:, k]) for reading in readings],
                "after": [_numbers(reading.after[:, k]) for reading in readings],
            }
        )
        if readout.angle:
            angles = [reading.angles[..., k] for reading in readings if reading.angles is not None]
            lines[-1]["angle_before"] = [_numbers(each[BEFORE]) for each in angles]
            lines[-1]["angle_after"] = [_numbers(each[AFTER]) for each in angles]
    return {
        "layers": list(readout.layers),
        "tokens": [text for text, _ in tokens],
        "norms": [_numbers(reading.norms) for reading in readings],
        "directions": lines,
    }


def _numbers(values: NDArray[np.float32]) -> list[float | None]:
    """Round to DIGITS; null for what overflowed, which JSON cannot express."""
    return [float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None for value in values.tolist()]
