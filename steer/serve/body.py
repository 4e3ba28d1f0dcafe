"""The body of a request: read it up to a limit, count its values, then parse it.

A parser's time grows with the number of values, and it holds the interpreter's lock meanwhile: a megabyte of brackets
takes as long as a hundred megabytes of text. So brackets, commas and colons are counted first, in windows, by searches
that are short and linear.

Work whose length the client decides runs in threads (`offload`), so that the event loop can answer /health and the kill
switch. There are few such threads, since each competes with the loop for the interpreter's lock, and small work never
waits for large work.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from typing import Literal, TypeGuard, TypeVar

from starlette.datastructures import Headers
from starlette.types import Message, Receive, Scope

from steer.errors import RequestError, brief, first_duplicate
from steer.serve import errors

T = TypeVar("T")

#: Strings, numbers, objects and lists of one body; more than a context of 128 Ki token ids.
MAX_VALUES = 200_000
#: Keys of all objects of one body together, and the characters of one key.
MAX_KEYS, MAX_KEY = 32_768, 1024
MAX_DEPTH = 100
#: Bodies up to this many bytes are parsed on the event loop itself, which is faster than handing them to a thread.
SMALL = 16 * 1024
#: The fields that limit the length of an answer, by route. Which of several counts is for the engine to decide.
LIMITS: Mapping[str, tuple[str, ...]] = {
    "/v1/chat/completions": ("max_completion_tokens", "max_tokens"),
    "/v1/chat/completions/batch": ("max_completion_tokens", "max_tokens"),
    "/v1/completions": ("max_tokens",),
    "/v1/messages": ("max_tokens",),
    "/v1/responses": ("max_output_tokens",),
    "/inference/v1/generate": ("max_tokens",),
}
#: The tokens of an answer where these fields are absent, by route; elsewhere there is no limit then.
DEFAULT_LIMITS: Mapping[str, int] = {"/v1/completions": 16}
#: Where a scope has the parsed body, without the carriers, and how many bytes it was.
BODY, SIZE = "steer.body", "steer.size"
_WINDOW = 64 * 1024
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
#: The range of integers anywhere in a body: what a 64-bit word holds, with or without a sign. No field needs more.
MIN_INTEGER, MAX_INTEGER = -(2**63), 2**64 - 1

#: Limits of `stop` and of `bad_words`, which are searched in every piece of an answer: strings, and characters in all.
MAX_TEXTS, MAX_TEXTS_LENGTH = 64, 8192
#: Limit of the tokens in `stop_token_ids` and in `logit_bias`, times the answers of the request: some engines write
#: them into the logits of every step.
MAX_LISTED = 65_536
#: Bytes of a body for which one token of the prompt is charged in advance, and the most tokens that are charged.
BYTES_PER_TOKEN, MAX_TOKENS = 4, 10**9
#: Fields of a message, or of a part of one, whose content is not text. Elsewhere, as in the schema of a tool, a field
#: with such a name may be text.
MEDIA = [
    *("image_url", "audio_url", "video_url", "input_audio", "file", "file_data", "source", "data"),
    *("image", "audio", "video", "image_embeds", "audio_embeds", "video_embeds"),
]
#: Limit of prompts × n of one request, on any engine. For vLLM each of these answers is a request of its own, which it
#: makes on its event loop, in about 0.1 ms and the time for a copy of the options.
MAX_ANSWERS = 1024
#: Limits of the options, all fields but the prompts, as bytes of JSON times the answers, and times the prompts. vLLM
#: checks them again for each prompt.
MAX_OPTIONS = {"answers": 4 * 2**20, "prompts": 2**20}
#: The fields of prompts, in several APIs: an engine has them once.
PROMPTS = {
    *("prompt", "prompt_embeds", "token_ids", "messages", "input", "query", "items", "features", "content_parts"),
    *("system", "instructions", "tools", "functions", "documents"),
}
#: Limit of the messages or items of one request, over all of its conversations: vLLM reads them on its event loop.
MAX_MESSAGES = 2048
#: Limit in bytes, as JSON, of the forms of an answer that one request asks for: schemas, grammars, regular expressions
#: and choices, which an engine compiles while all others wait. A small form can be expensive too, so a policy decides
#: who may ask for one (`forms`).
MAX_FORM = 32 * 1024
#: The fields that have a form, in several APIs and in older versions of them, and the key under which it is there.
FORMS: Mapping[str, str | None] = {
    "structured_outputs": None,
    "response_format": None,
    "text": "format",
    "output_config": "format",
    "guided_json": None,
    "guided_regex": None,
    "guided_choice": None,
    "guided_grammar": None,
}


class Gone(Exception):
    """The client left before its body had arrived or its answer was made, so nobody needs a response."""


async def read_body(scope: Scope, receive: Receive, limit: int) -> bytes:
    """The whole body, not more than `limit` bytes. Raises HTTPProblem 413."""
    declared = Headers(scope=scope).get("content-length", "0")
    if not (declared.isdecimal() and len(declared) < 20 and int(declared) > limit):
        chunks: list[bytes] = []
        size = 0
        while size <= limit:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise Gone
            chunks.append(message.get("body", b""))
            size += len(chunks[-1])
            if not message.get("more_body", False) and size <= limit:
                return b"".join(chunks)
    raise errors.HTTPProblem(errors.Code.BODY_TOO_LARGE, f"the body is over the limit of {limit} bytes")


async def understood(work: Callable[[], T], size: int, kind: Kind = "body") -> T:
    """Run `work` on a body of `size` bytes, in a thread unless the body is small."""
    return work() if size <= SMALL else await offload(kind, size, work)


def parse_body(data: bytes) -> dict[str, object]:
    """Parse a JSON object in which no key stands twice, so that no later parser can read another value.

    Raises HTTPProblem 400 for anything else, for more values, keys or depth than a request needs, and for a value that
    no engine could be sent: NaN, an infinity, a number out of range, half of a surrogate pair. The error names its
    field.
    """
    reader = _Numbers()
    try:
        text = data.decode()  # of bytes `loads` would accept other encodings too
        check_structure(data)
        body = json.loads(
            text,
            object_pairs_hook=_unique,
            parse_int=reader.integer,
            parse_float=reader.number,
            parse_constant=reader.constant,
        )
    except errors.HTTPProblem:
        raise
    except (ValueError, RecursionError) as error:
        raise errors.HTTPProblem(errors.Code.INVALID_JSON, f"the body is not JSON: {error}") from None
    if not isinstance(body, dict):
        raise errors.HTTPProblem(errors.Code.INVALID_JSON, "the body must be a JSON object")
    if reader.found or b"\\ud" in data or b"\\uD" in data:  # rare, so the search for the field is rare too
        for name, value in body.items():
            if problem := _unsendable({name: value}):
                raise errors.HTTPProblem(errors.Code.INVALID_VALUE, f"{_shown(name)}: {problem}", param=_shown(name))
    return body


class _NoNumber:
    """Stands for a number of the body that is not accepted."""

    def __init__(self, text: str) -> None:
        self.text = text


class _Numbers:
    """Reads the numbers of one body. Each number is a call from the parser into Python, at which other threads can
    run."""

    def __init__(self) -> None:
        self.found = False

    def integer(self, text: str) -> int | _NoNumber:
        if len(text) <= 20 and MIN_INTEGER <= (value := int(text)) <= MAX_INTEGER:
            return value
        return self.constant(text)

    def number(self, text: str) -> float | _NoNumber:
        value = float(text)
        return value if math.isfinite(value) else self.constant(text)

    def constant(self, text: str) -> _NoNumber:
        self.found = True
        return _NoNumber(text)


def _unsendable(value: object) -> str:
    """Why this value cannot be sent to an engine; empty if it can."""
    try:
        json.dumps(value, ensure_ascii=False, default=_refuse).encode()
    except UnicodeEncodeError:
        return "half of a surrogate pair is not text"
    except TypeError as error:
        return str(error)
    return ""


def _refuse(value: _NoNumber) -> None:
    raise TypeError(
        f"{value.text[:60]} is not accepted: finite numbers, whole ones from {MIN_INTEGER} to {MAX_INTEGER}"
    )


def _shown(name: str) -> str:
    return name[:100].encode(errors="backslashreplace").decode()


def check_size(body: dict[str, object]) -> None:
    """Raises RequestError for a request that is too much work for any engine. Wrong types are left to the app."""
    for name in ("stop", "stop_sequences", "bad_words"):
        texts = [text for text in as_list(body.get(name)) if isinstance(text, str)]
        if problem := too_many(texts):
            raise RequestError(f"{name}: {problem}", param=name)
    prompts, each = prompt_count(body), _answers(body)
    answers = prompts * each
    for name in ("stop_token_ids", "logit_bias"):
        tokens = len(value) if isinstance(value := body.get(name), list | dict) else 0
        if (listed := tokens * answers) > MAX_LISTED:
            raise RequestError(f"{name}: {tokens} tokens × answers are {listed}, over {MAX_LISTED}", param=name)
    for name in ("n", "best_of"):  # engines would accept '16' and 16.0 too
        if (value := body.get(name)) is not None and type(value) is not int:
            raise RequestError(f"{name}: {brief(value)} is not accepted: a whole number", param=name)
    if answers > MAX_ANSWERS:
        name = asks_most(body)
        raise RequestError(f"{name}: prompts × n are {answers} answers, over {MAX_ANSWERS}", param=name)
    for name in ("messages", "input"):
        items = 0
        for item in value if isinstance(value := body.get(name), list) else ():
            items += len(item) if isinstance(item, list) else 1
        if items > MAX_MESSAGES:
            raise RequestError(f"{name}: {items} items, over {MAX_MESSAGES}", param=name)
    if answers > 1:
        sizes = {name: _json_bytes(value) for name, value in body.items() if name not in PROMPTS}
        for what, count in (("answers", answers), ("prompts", prompts)):
            if (repeated := count * sum(sizes.values())) > MAX_OPTIONS[what]:
                name = max(sizes, key=sizes.__getitem__)[:100]
                message = f"the options × {what} are {repeated} bytes, over {MAX_OPTIONS[what]}; this is the largest"
                raise RequestError(f"{name}: {message}", param=name)
    size = 0
    for name, key in FORMS.items():
        form = body.get(name)
        if key is not None:
            form = form.get(key) if isinstance(form, dict) else None
        if form is not None and (size := size + _json_bytes(form)) > MAX_FORM:
            raise RequestError(
                f"{name}: the form of an answer is {size} bytes of JSON or more, at most {MAX_FORM} are accepted",
                param=name,
            )


def _json_bytes(value: object) -> int:
    return len(json.dumps(value, ensure_ascii=False).encode())


def prompt_count(body: dict[str, object]) -> int:
    """How many prompts an unchecked body has."""
    return max(1, sum(_prompts(body).values()))


def asks_most(body: dict[str, object]) -> str:
    """The field that asks for the most answers, or for the most prompts if there are several."""
    counts, each = _prompts(body), _answers(body)
    if sum(counts.values()) > 1:
        return max(counts, key=counts.__getitem__)
    return "n" if each == 1 or body.get("n") == each else "best_of"


def _prompts(body: dict[str, object]) -> dict[str, int]:
    """How many prompts each field of an unchecked body has. A list of numbers is one prompt. On routes of vLLM's own,
    `messages` is a list of conversations, and each of the `items` to score is a prompt."""
    parts: dict[str, type | tuple[type, ...]] = {"prompt": (int, float), "messages": dict}  # of one prompt
    counts = {}
    for name in ("prompt", "prompt_embeds", "messages", "items"):
        value = body.get(name)
        if isinstance(value, list) and not (value and isinstance(value[0], parts.get(name, ()))):
            counts[name] = len(value)
        elif value is not None:
            counts[name] = 1
    return counts


def _ids(body: dict[str, object]) -> int:
    """How many token ids the prompts have. By bytes alone they would be counted too low: a short id takes two."""
    prompt = body.get("prompt", body.get("token_ids"))
    if not isinstance(prompt, list):
        return 0
    return sum(len(each) if isinstance(each, list) else isinstance(each, int) for each in prompt)


def tokens_of(body: dict[str, object], size: int, context: int, route: str) -> int:
    """The most tokens that a generation request may use: its prompts, by their bytes or ids, once for each answer
    (some engines compute them again), and its answers, by the fields that limit them on `route`, each at most
    `context`. The body's values have not been checked."""
    prompts = max(size // BYTES_PER_TOKEN, _ids(body))
    each = _longest(body, context, route)
    return min(MAX_TOKENS, _answers(body) * (prompts + prompt_count(body) * each))


def _longest(body: dict[str, object], context: int, route: str) -> int:
    """The most tokens of one answer. A limit that an engine may read in another way than this limits nothing."""
    path = next((path for path in LIMITS if route.endswith(path)), "")  # after a root_path too
    limits = [body[name] for name in LIMITS.get(path, ()) if name in body]
    if not limits and path in DEFAULT_LIMITS:
        return min(DEFAULT_LIMITS[path], context)
    # without an echo some engines take 0 for no limit; and they read "false" as false
    least = 0 if body.get("echo") is True else 1
    found = [value for value in limits if value is not None]
    read = [int(value) for value in found if _is_whole(value) and value >= least]
    return min(max(read), context) if read and len(read) == len(found) else context


def _is_whole(value: object) -> TypeGuard[int | float]:
    """Whether this is a whole number, such as 5 or 5.0; True is none."""
    return type(value) is int or (isinstance(value, float) and value.is_integer())


def answer_count(body: dict[str, object]) -> int:
    """How many answers a body asks for, over all of its prompts."""
    return prompt_count(body) * _answers(body)


def _answers(body: dict[str, object]) -> int:
    """How many answers a body asks for to each prompt."""
    return max(min(n, MAX_TOKENS) if type(n := body.get(name)) is int and n > 0 else 1 for name in ("n", "best_of"))


def text_length(body: object) -> int:
    """Characters of all strings of a body that may be tokenized, so without images, sounds and embeddings."""
    return _characters(body) - (sum(map(_characters, _media(body))) if isinstance(body, dict) else 0)


def engine_bytes(body: dict[str, object], size: int) -> int:
    """About how many bytes an engine holds for a body of `size` bytes: the body without images and sounds, once for
    each answer to a prompt (each is a request of its own, with the prompt), and four times more for each
    log-probability that is asked for at every token of the prompt."""
    asked = [body.get("prompt_logprobs"), body.get("logprobs") if body.get("echo") else None]
    each = 1 + 4 * max(map(_logprob_count, asked))
    return _answers(body) * each * (size - sum(map(_characters, _media(body))))


def _logprob_count(value: object) -> int:
    """A number of log-probabilities as engines read it: a negative one means the whole vocabulary, and anything that is
    not a number means 0."""
    with suppress(TypeError, ValueError, OverflowError):
        number = int(value)  # type: ignore[call-overload]
        return number if number >= 0 else MAX_VALUES
    return 0


def _media(body: dict[str, object]) -> Iterator[object]:
    """The values in a body that are not text."""
    yield body.get("prompt_embeds")
    parts = [body.get("messages"), body.get("input")]
    while parts:
        part = parts.pop()
        if isinstance(part, list):
            parts += part
        elif isinstance(part, dict):
            yield from map(part.get, MEDIA)
            parts += map(part.get, ("content", "output"))


def _characters(value: object) -> int:
    length = 0
    values = [value]
    while values:
        value = values.pop()
        if isinstance(value, str):
            length += len(value)
        elif isinstance(value, list | dict):
            values += value.values() if isinstance(value, dict) else value
    return length


def as_list(value: object) -> list[object]:
    return value if isinstance(value, list) else [] if value is None else [value]


def too_many(texts: list[str]) -> str:
    """Why there are too many texts, or too long ones; empty if there are not."""
    length = sum(map(len, texts))
    if len(texts) <= MAX_TEXTS and length <= MAX_TEXTS_LENGTH:
        return ""
    return (
        f"{len(texts)} texts of {length} characters in all are not accepted: at most {MAX_TEXTS} texts, of "
        f"{MAX_TEXTS_LENGTH} characters in all"
    )


def check_structure(data: bytes, most: int = MAX_VALUES) -> int:
    """An upper bound on the number of values in the JSON text `data`; meaningless if it is not JSON. Raises HTTPProblem
    400 for more than `most`, and for more keys or depth than a request needs."""
    commas = opened = keys = depth = deepest = 0
    inside, carried = 0, b""  # 1 inside a string; a backslash whose character is in the next window
    for at in range(0, len(data), _WINDOW):
        window = (carried + data[at : at + _WINDOW]).replace(b"\\\\", b"")
        carried = b"\\" if window.endswith(b"\\") else b""
        parts = window[: len(window) - len(carried)].replace(b'\\"', b"").split(b'"')
        outside = b"".join(parts[inside::2])
        inside ^= (len(parts) - 1) & 1
        commas += outside.count(b",")
        keys += outside.count(b":")
        for bracket in outside.translate(None, _NO_BRACKETS):
            if bracket in b"[{":
                opened += 1
                depth += 1
                deepest = max(deepest, depth)
            else:
                depth -= 1
        for many, limit, what in (
            (commas + opened + 1, most, "values (texts, numbers, objects and lists)"),
            (keys, MAX_KEYS, "keys"),
            (deepest, MAX_DEPTH, "levels of lists and objects in each other"),
        ):
            if many > limit:
                raise errors.HTTPProblem(
                    errors.Code.BODY_TOO_COMPLEX, f"the body has more than {limit} {what}, which is the limit"
                )
    return commas + opened + 1


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    out = dict(pairs)
    if len(out) != len(pairs) and (twice := first_duplicate(pairs)) is not None:
        raise errors.HTTPProblem(
            errors.Code.INVALID_JSON, f"the body has a key twice: {_shown(twice)}", param=_shown(twice)
        )
    if long := next((key for key in out if len(key) > MAX_KEY), None):
        raise errors.HTTPProblem(
            errors.Code.BODY_TOO_COMPLEX, f"the key '{long[:40]}…' has {len(long)} characters, at most {MAX_KEY}"
        )
    return out


def replay(body: bytes, receive: Receive, left: Callable[[], None] | None = None) -> Receive:
    """A `receive` that gives `body` once, and after it what `receive` gives. At the client's disconnect `left` is
    called."""
    given = False

    async def receiving() -> Message:
        nonlocal given
        if given:
            message = await receive()
            if left is not None and message["type"] == "http.disconnect":
                left()
            return message
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return receiving


# -- work whose length the client decides ----------------------------------------------------------------------------

#: Work on at least this many bytes or characters is large. One large piece of work of each kind runs at a time.
LARGE = 64 * 1024
SMALL_AT_ONCE = 2
Kind = Literal["body", "text", "answer"]


async def offload(kind: Kind, size: int, work: Callable[[], T]) -> T:
    """Run `work` in a thread; returns or raises what it does.

    Args:
        kind: each kind has its own threads. So bodies, which take milliseconds to parse, never wait for texts, which
            can take seconds to tokenize, nor texts for answers.
        size: bytes or characters that the work goes through.
    """
    return await asyncio.get_running_loop().run_in_executor(_threads(kind, size >= LARGE), work)


@cache
def _threads(kind: Kind, large: bool) -> ThreadPoolExecutor:
    """The threads for one kind of work. They belong to the process, as the interpreter's lock does."""
    return ThreadPoolExecutor(1 if large else SMALL_AT_ONCE, f"steer-{kind}{'-large' if large else ''}")
