"""What is added to or changed in the answers of vLLM's server: errors in plain words; the error of a lost request;
whether a condition held or a phase came, in each choice or its last chunk; and the read-out, in a whole answer or as
one more chunk before the end of a stream.

The engine returns a read-out when its request has ended, so a stream has it in one piece. The chunks of a stream have
the same fields together as a whole answer, as on the other engine.
"""

from __future__ import annotations

import json
import re
from collections.abc import Awaitable, Callable, Collection, Mapping
from typing import Any

from starlette.types import Message, Send

from steer.errors import MAX_PROBLEM, NotFinite, SteerError
from steer.readout import FIELD
from steer.serve import errors
from steer.serve.answers import ReadReport
from steer.serve.asgi import Outgoing, is_event_stream, rewriting
from steer.serve.body import understood

EVENT = b"data: "
#: The end of a stream. The text of a chunk cannot contain it, since its line ends are escaped.
DONE = re.compile(rb"^data: \[DONE\]", re.MULTILINE)
#: Occurs in a chunk that ends a choice. The text of a chunk cannot contain it, since its quotes are escaped.
ENDS = re.compile(rb'"finish_reason":\s*"')
#: Makes the read-out of the only choice.
Fetch = Callable[[], Awaitable[ReadReport]]
#: The value of `steer_applied` for a choice that has ended, by the answer's id and the choice's index; None for none.
Met = Callable[[str, int], bool | None]


def with_fields(send: Send, met: Met, fetch: Fetch | None = None) -> Send:
    """A `send` that adds `steer_applied` by `met` to the choices of an answer, and the read-out of `fetch` to its only
    choice. Raises what `fetch` raises, unless a stream has begun: then the error becomes an event of the stream."""
    streamed = False
    last = b""

    def applied(answer: dict[str, Any]) -> dict[str, Any]:
        for choice in answer.get("choices", ()):
            if choice.get("finish_reason") and (held := met(answer["id"], choice["index"])) is not None:
                choice["steer_applied"] = held
        return answer

    async def whole(body: bytes) -> bytes:
        answer = await understood(lambda: json.loads(body), len(body), "answer")
        if not isinstance(answer, dict) or "choices" not in answer:  # what vLLM sends to a client that has left
            return body
        if fetch is not None:
            for choice in answer["choices"]:
                choice[FIELD] = await fetch()
        applied(answer)
        return await understood(lambda: json.dumps(answer).encode(), len(body), "answer")

    async def with_chunk(message: Message) -> Message:
        nonlocal last
        body: bytes = message.get("body", b"")
        done = DONE.search(body)
        before, end = (body[: done.start()], body[done.start() :]) if done else (body, b"")
        if b'"choices"' in before:
            last = before
            before = b"\n".join(
                line if not ENDS.search(line) else EVENT + json.dumps(applied(json.loads(line[len(EVENT) :]))).encode()
                for line in before.split(b"\n")
            )
        chunk = b""
        if done and last and fetch is not None:
            try:
                chunk = _chunk(last, await fetch())
            except SteerError as error:
                chunk = errors.error_event(error).encode()
        return {**message, "body": before + chunk + end}

    rewritten = rewriting(send, lambda start: None if start["status"] >= 400 or is_event_stream(start) else whole)

    async def sending(message: Message) -> None:
        nonlocal streamed
        if message["type"] == "http.response.start":
            streamed = message["status"] < 400 and is_event_stream(message)
        elif streamed:
            message = await with_chunk(message)
        await rewritten(message)

    return sending


def restated(send: Send, sent: Collection[str]) -> Send:
    """A `send` that rewrites the error of a refused request: the message in plain words, and `param` as the field that
    is wrong, if the message names one. `sent`: the fields of the request."""

    async def change(body: bytes) -> bytes:
        try:
            answer = json.loads(body)
            error = answer["error"]
            error["message"], error["param"] = plainly(error["message"], error.get("param"), sent)
        except (ValueError, TypeError, KeyError):  # neither OpenAI's nor Anthropic's shape of an error
            return body
        return json.dumps(answer).encode()

    return rewriting(send, lambda start: change if 400 <= start["status"] < 500 else None)


#: The suffix of vLLM's errors that names a parameter of vLLM.
_PARAMETER = re.compile(r" \(parameter=(\w+)(, value=.*)?\)$", re.DOTALL)
#: Python's message for a power that is too large.
_OVERFLOW = re.compile(r"\(34, '[^']*'\)")
_PROMPT = ("prompt", "messages", "input")
_LIMIT = ("max_completion_tokens", "max_output_tokens", "max_tokens")
#: vLLM's names for fields, each with the fields of our routes that it may mean.
_MEANT: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(("input_text", "input_tokens", "prompt"), _PROMPT),
    **dict.fromkeys(("max_tokens", "max_completion_tokens"), _LIMIT),
    "response_id": ("previous_response_id",),
    "stop": ("stop", "stop_sequences"),
    "tool_choice": ("tool_choice", "tools"),
}
_OF_A_PROMPT = re.compile(r"\b(prompt|conversation|out of vocabulary)\b")


def plainly(message: str, param: str | None, sent: Collection[str]) -> tuple[str, str | None]:
    """A message of vLLM in plain words and limited in length, and the field among those that were `sent` that is wrong:
    the `param` of vLLM, or else the first field that the message mentions."""
    if found_fields := errors.pydantic_text(message):
        return found_fields
    if _OVERFLOW.fullmatch(message):  # only beam search raises it, for this field
        return "length_penalty: too large a number", "length_penalty"
    if found := _PARAMETER.search(message):
        message, param = message[: found.start()], param or found[1]
    if param is None:
        words = {word: _mention(word, message) for word in {*sent, *_MEANT} if len(word) <= 100}
        at, word = min((at, word) for word, at in words.items())
        param = word if at < len(message) else "prompt" if _OF_A_PROMPT.search(message) else None
    meant = next((name for name in _MEANT.get(param or "", ()) if name in sent), param)
    return message[:MAX_PROBLEM], meant


def _mention(name: str, message: str) -> int:
    """The position at which a message mentions this field: it begins with the name, quotes the name or its value, or
    has the words of a name of several words. The message's length if it does not."""
    word = re.escape(name)
    several = rf"\b{word.replace('_', '[ _]')}\b"
    found = re.search(
        several if "_" in name else rf"^{word}\b|['\"`]{word}['\"`]|\bthe {word} ['\"`]",
        message[:10_000],
        re.IGNORECASE,
    )
    return found.start() if found else len(message)


class UnlessLost(Outgoing):
    """An answer that is sent until `lost()`, and ended with the error then. vLLM's routes report errors in different
    ways, and some just end a stream."""

    def __init__(self, send: Send, lost: Callable[[], bool]) -> None:
        super().__init__(send)
        self._lost = lost

    async def send(self, message: Message) -> None:
        if not self.ended and self._lost():
            await self.break_off(NotFinite())
        else:
            await super().send(message)


def _chunk(last: bytes, field: ReadReport) -> bytes:
    """A chunk like the `last` one that has only the field of the read-out."""
    line = next(line for line in reversed(last.splitlines()) if line.startswith(b"data: {"))
    envelope = {k: v for k, v in json.loads(line[6:]).items() if k not in ("usage", "choices")}
    chat = envelope.get("object") == "chat.completion.chunk"
    choice: dict[str, object] = {"index": 0, "logprobs": None, "finish_reason": None}
    choice |= {"delta" if chat else "text": {} if chat else ""}
    return f"data: {json.dumps(envelope | {'choices': [choice | {FIELD: field}]})}\n\n".encode()
