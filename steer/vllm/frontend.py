"""The front end: the process in which vLLM creates requests, the user's or the API server's.

`add_request` admits the `SamplingParams.extra_args["steer"]` of a request before the engine sees the request, or finds
by a ticket what the server's middleware has admitted. The call holds the admission, and each request that the call
creates holds it too: from the output processor's `add_request`, where the spec also goes into the prefix-cache salt,
until the output processor releases the request. `plugin` wraps these methods on the instances of an engine that has
steering on.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import secrets
import shutil
import zlib
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from steer.errors import EngineFailed, NoRoom, NotFinite, RequestError, SpecError, SteerError, UnsupportedModel
from steer.names import readable
from steer.registry import Admission, Registry
from steer.runtime.readout import Reading
from steer.serve import metrics
from steer.serve.text import token_text
from steer.shape import Shape
from steer.shared import Shared
from steer.spec import RequestedDirection, Spec, parse
from steer.tokenization import Thinking
from steer.vllm import internals
from steer.vllm.internals.types import Call, CallAsync
from steer.vllm.placement import VllmPlacement
from steer.vllm.settings import KEY, READ, RESOLVED, EngineSettings, check_absent, prompt_of, receipt_of
from steer.vllm.steering_module import code_digest

if TYPE_CHECKING:
    from steer.tokenization import Decoder
    from steer.vllm.internals.types import EngineCoreRequest, RequestState, SamplingParams, VllmConfig

log = logging.getLogger("steer")

#: The attribute of an engine that holds its `Frontend`; only an engine that has steering on has it.
ATTRIBUTE = "steer"


#: The text between a request's own prefix-cache salt and what its steering adds to the salt. A request's own salt must
#: not contain it: a plain request could otherwise leave its blocks for steered requests to find.
SALT = "|steer:"
_SALTED = re.compile(rf"(.*?)({re.escape(SALT)}([0-9]{{1,10}}):.*)", re.DOTALL)
#: Number of groups of salts for which losses are counted: a loss also gives the other salts of its group a new ending.
GROUPS = 1024
#: Names in the shared table of the front ends: the losses of a group, and the number of requests that are read.
LOSSES, READING = "losses", "reading"


def salt(spec: Spec, prompt: int, whole: Sequence[tuple[int, int]] = ()) -> str:
    """The part of a prefix-cache salt that a steered request adds. It begins with the number of the first token whose
    keys and values steering can change.

    Args:
        prompt: the number of tokens of the request's prompt.
        whole: (first, length) of each group of tokens that may see each other, such as those of an image. If one
            token of a group is steered, none of them counts as plain.
    """
    first = min(entry.span(prompt)[0] for entry in spec.entries)
    first = min([start for start, length in whole if start <= first < start + length], default=first)
    return f"{SALT}{first}:{spec.key(prompt)}"


def salted(request: EngineCoreRequest, spec: Spec) -> str:
    """The salt of a request that is steered by `spec`: only requests of the same spec find its blocks.

    Raises SpecError if the tokens at which the spec acts are not known.
    """
    length = internals.engine.prompt_length(request)
    if not spec.everywhere and not length:
        name = "if" if any(entry.condition for entry in spec.entries) else "tokens"
        raise SpecError(f"{name}: cannot be used with a prompt that is given as embeddings", param=f"steer.{name}")
    prompt = prompt_of(request.sampling_params, length)
    return (request.cache_salt or "") + salt(spec, prompt, internals.engine.image_spans(request))


def parted(request: EngineCoreRequest) -> tuple[str, int, str]:
    """A request's own salt, the first token at which its steering acts, and what the steering adds to the salt. The
    blocks before that token are shared with plain requests. (…, 0, "") for a request that no front end of ours has
    salted, whatever its salt looks like."""
    cache_salt = request.cache_salt or ""
    found = None if receipt_of(request.sampling_params) is None else _SALTED.fullmatch(cache_salt)
    return (found[1], int(found[3]), found[2]) if found else (cache_salt, 0, "")


def log_to_stderr() -> None:
    """Write Steer's log to stderr in a process that vLLM has started for a server, if no handler is set up there."""
    steer = logging.getLogger("steer")
    if not (steer.handlers or logging.getLogger().handlers):
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter(f"(pid {os.getpid()}) %(asctime)s %(levelname)s %(name)s: %(message)s"))
        steer.addHandler(handler)
        level = os.environ.get("STEER_LOG_LEVEL", "info").upper()
        steer.setLevel(logging.getLevelNamesMapping().get(level, logging.INFO))


class Salts:
    """The endings of the salts of steered requests. After a loss they keep the blocks that a request with a lost stream
    may have left in the prefix cache apart from all later requests: from each `renew` of a salt on, by any front end,
    `current` gives the salt another ending.

    Args:
        first: the text with which each ending begins. If blocks outlive this process, no other process may have the
            same text.
    """

    def __init__(self, shared: Shared, first: str = "") -> None:
        self._shared, self._first = shared, first

    def current(self, salt: str) -> str:
        lost = int(self._shared.number(_group(salt)))
        return f"{salt}#{self._first}{lost}" if lost else f"{salt}{self._first}"

    def renew(self, salt: str) -> None:
        with self._shared.lock():
            self._shared.put(_group(salt), self._shared.number(_group(salt)) + 1)


def _group(salt: str) -> str:
    return f"{LOSSES}:{zlib.crc32(salt.encode()) % GROUPS}"


@dataclass(slots=True)
class Ticket:
    """One admission on its way through the engine, for one HTTP request or for one `add_request` of a program.

    Attributes:
        name: the engine gets it in place of a spec, until `Frontend.forget`.
        used: whether the engine has got a request with this ticket.
        forgotten: whether no more requests may be made for this ticket.
        running: the requests of it that the engine has: by their ids, the salts that keep them apart from others in the
            prefix cache, without the ending that a loss adds.
        lost: whether steering has taken the stream of one of its answers out of range.
        states: the states of its requests that are read or have a condition or a phase, by the choices that they
            answer.
        holds: by the ids of its requests, whether their conditions hold, as far as that is known.
    """

    admission: Admission
    name: str = field(default_factory=lambda: f"ticket:{secrets.token_hex(16)}")
    usage: metrics.Usage = field(default_factory=metrics.current_usage)
    used: bool = False
    forgotten: bool = False
    running: dict[str, str] = field(default_factory=dict)
    lost: bool = False
    states: dict[tuple[str, int], RequestState] = field(default_factory=dict)
    holds: dict[str, bool] = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class _Call:
    """One call of `add_request` while it runs, and the number of requests that it has made."""

    ticket: Ticket
    made: int = 0


@dataclass(slots=True)
class Passage:
    """What the engine may be asked for in the context of one network request, beside requests that have a ticket.

    A raw spec is never accepted here: it would bypass keys, policy and audit log.

    Attributes:
        plain: whether the request may be plain.
        forms: whether answers may be held to a form.
        manages: whether the request has the managing role.
        reserve: charges the request's key when the engine is asked for the first answer; None if it is charged already.
        asked: whether the engine was asked.
        over: whether a ticket let the request pass and its answer has ended.
        refused: the reason, once something was refused.
        turn: see `in_turn`.
        since: when the event loop last served others while requests were added to the engine.
        beams: whether the log-probabilities of beams are in the answer.
        repeats: whether the last chunk of a stream has all of its log-probabilities again.
        logprobs: how many log-probabilities vLLM has to put into the answer at once.
        streams: the number of streams with log-probabilities that have begun and not ended.
    """

    plain: bool = False
    forms: bool = True
    manages: bool = True
    reserve: Callable[[], None] | None = None
    asked: bool = False
    over: bool = False
    refused: SteerError | None = None
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    since: float = 0.0
    beams: bool = False
    repeats: bool = False
    logprobs: int = 0
    streams: int = 0

    def count_logprobs(self, count: int) -> RequestError | None:
        """Note `count` more log-probabilities. Returns an error if there are now too many."""
        self.logprobs += count
        remedy = "ask for" if self.repeats else "ask for a stream, or for"
        return self._check(self.logprobs, remedy)

    def count_chunk(self, count: int) -> RequestError | None:
        """Note that one of the streams has a chunk of `count` log-probabilities. Returns an error if those of all could
        be too many: they are made in one turn of the event loop."""
        remedy = "they wait for their reader, or for this server to write them; ask for shorter chunks,"
        return self._check(count * self.streams, remedy)

    def _check(self, count: int, remedy: str) -> RequestError | None:
        if count <= MAX_LOGPROBS:
            return None
        self.refused = RequestError(
            f"logprobs: at most {MAX_LOGPROBS} log-probabilities are made at once for one request, and this one has "
            f"come to {count}: {remedy} fewer prompts, answers, tokens or log-probabilities",
            param="logprobs",
        )
        return self.refused


#: Limit of the log-probabilities that one network request gets at once. vLLM makes them on its event loop, in about 15
#: µs each, and nothing else is answered meanwhile.
MAX_LOGPROBS = 2**17
#: Seconds for which one network request may add requests to the engine before the event loop serves others.
TURN = 0.002
#: The passage of the network request that runs in this context; None if there is none, as in a Python program.
passage: ContextVar[Passage | None] = ContextVar("steer_passage", default=None)


@asynccontextmanager
async def in_turn() -> AsyncIterator[None]:
    """Add the requests that vLLM makes of one network request one after the other, and have the event loop serve others
    after each `TURN`. vLLM would add them all in one turn of the loop: a list of a thousand prompts held it for half a
    second, and for ten with options that take long to copy."""
    if (way := passage.get()) is None:
        yield
        return
    now = asyncio.get_running_loop().time
    async with way.turn:
        if now() - way.since > TURN:
            await asyncio.sleep(0)
            way.since = now()
        yield


#: The call of `add_request` that runs in this context.
_adding: ContextVar[_Call | None] = ContextVar("steer_adding", default=None)

#: Whether the self-check makes the requests of this context: they have no ticket, and cannot wait for the start, which
#: waits for them.
in_self_check: ContextVar[bool] = ContextVar("steer_self_check", default=False)


async def _no_loop(*_args: object) -> list[Any]:
    raise UnsupportedModel("this engine is driven by no event loop: it has no server")


class Frontend:
    """The registry of one engine, and the admissions that its requests hold."""

    def __init__(
        self,
        config: VllmConfig,
        settings: EngineSettings,
        call: Call,
        call_async: CallAsync | None = None,
        *,
        place: tuple[int, int] = (0, 1),
        serves: bool = False,
        thinking: Thinking | None = None,
    ) -> None:
        """
        Args:
            place: the index of this front end, and the number of front ends of the engine.
            serves: whether the engine is a server's. It then takes no request that no layer of ours has let pass.
            thinking: the tokens that begin and end the model's thinking.
        """
        architecture, layers, d_model = internals.config.dimensions_of(config)
        self.settings, self.call, self.call_async = settings, call, call_async or _no_loop
        self.serves, self.place = serves, place
        #: The table of the engine's front ends. From `start` on it is the one that all of them share.
        self.shared = Shared()
        self.dtype = internals.config.dtype_of(config)
        self.context = internals.config.context_of(config)
        self.vocabulary = internals.config.vocabulary_of(config)
        sites = frozenset(settings.sites)
        dtype = getattr(torch, self.dtype)
        self.shape = Shape(architecture, layers, d_model, sites, settings.rank, dtype, thinking)
        self.placement = VllmPlacement(self.shape, call)
        self.registry = Registry(self.placement, settings.directions)
        self.default = parse(settings.default)
        self._tickets: dict[str, Ticket] = {}  # of HTTP requests, by name
        #: Requests of the engine that are steered or read and have not ended, by id.
        self.held: dict[str, Ticket] = {}
        self._outlived = internals.config.shares_blocks(config)
        self.salts = self._salts()
        #: Sampling parameters that a server refuses, each with the reason; known after `start`.
        self.unsafe: dict[str, str] = {}
        self._config = config

    # -- start -------------------------------------------------------------------------------------------------------

    def start(self, check: Callable[[Frontend], None]) -> None:
        """Meet the workers, call `check` to see that they steer, and fill the registry. Blocks.

        Raises SteerError if the engine must not serve.
        """
        if self.serves:
            log_to_stderr()
        self.settings.check_folder()
        workers = self._meet()
        codes = {worker["code"] for worker in workers}
        if codes != {code_digest()}:
            raise UnsupportedModel("the workers run another version of Steer than this process")
        # One front end alone checks: the check switches what runs, and no request may run beside it.
        with self.shared.once("self-check") as first:
            if first:
                check(self)
        if self.serves:
            self.unsafe = internals.config.unsafe_fields(self._config, workers[0]["runner"])
        self.registry.swaps = 0
        self.shared.follows()
        self.registry.sync()
        self.registry.resolve(self.default)
        log.info(
            "steering: %d workers, directions: %s; requests that name no steering get: %s",
            len(workers),
            ", ".join(self.registry.names()) or "none",
            self.settings.default,
        )

    def _meet(self) -> list[dict[str, Any]]:
        """Connect to the workers. Returns what each of them reports. From here on `shared` is the table of all front
        ends: the workers report the folder that the first front end has made."""
        index, count = self.place
        made = Shared.make_folder() if count > 1 else None
        name = f"{index}:{secrets.token_hex(8)}"
        try:
            workers = self.call(
                "steer_hello", name, str(made or ""), (t := self.shape.thinking) and [t.begin, t.end, *t.special]
            )
            if made is not None:
                self.shared = Shared(Path(workers[0]["folder"]), index, count)
        finally:
            if made is not None and self.shared.folder != made:
                shutil.rmtree(made, ignore_errors=True)
        self.placement.front_end, self.placement.shared = name, self.shared
        self.salts = self._salts()
        self.registry.folder = self.settings.directions or self.shared.directions
        return workers

    def _salts(self) -> Salts:
        return Salts(self.shared, secrets.token_hex(8) if self._outlived else "")

    def watch(self) -> None:
        """Follow the folder of directions, and let the metrics read the registry, for the life of the process."""
        registry = self.registry

        def looked() -> None:
            self.placement.flush()
            metrics.refresh(registry)

        metrics.watch(registry, self.settings.rows)
        metrics.refresh(registry)
        registry.follow(looked, self.shared)

    @property
    def readable(self) -> int:
        """The number of layers that can be read; 0 if no read-out is compiled in."""
        return self.shape.layers if self.settings.readout and readable(self.shape.sites) else 0

    # -- admission ---------------------------------------------------------------------------------------------------

    def ticket(self, admission: Admission) -> Ticket:
        """A ticket for an admission. The caller must `forget` the ticket before it releases the admission.

        Raises NoRoom if as many requests are being read as the engine was compiled for.
        """
        if admission.readout is not None:
            with self.shared.lock():
                if self.shared.total(READING) >= self.settings.readout:
                    raise NoRoom(
                        f"{self.settings.readout} requests are being read, and no more can be: try again shortly"
                    )
                self.shared.count_own(READING, 1)
        ticket = Ticket(admission)
        self._tickets[ticket.name] = ticket
        return ticket

    def forget(self, ticket: Ticket) -> list[str]:
        """Let no more requests be made for a ticket. Returns the ids of its requests that have not ended; the engine
        has to end them."""
        if self._tickets.pop(ticket.name, None):
            ticket.forgotten = True
            self._read_no_more(ticket)
        return list(ticket.running)

    def _read_no_more(self, ticket: Ticket) -> None:
        """Stop counting a forgotten ticket as read, once the engine has no request of the ticket any more."""
        if ticket.forgotten and not ticket.running and ticket.admission.readout is not None:
            self.shared.count_own(READING, -1)

    async def readings(self, ticket: Ticket, tokenizer: Decoder) -> list[tuple[str, Reading]]:
        """Each token of the answer that was made for a ticket, as text, with the reading at the position that predicted
        the token.

        Raises EngineFailed if a layer or a token was not read.
        """
        readout = ticket.admission.readout
        assert readout is not None
        if not ticket.states:
            raise EngineFailed("the engine got no request to read")
        (state,) = ticket.states.values()
        tokens = internals.engine.answer_ids(state)
        found: dict[int, NDArray[np.float32]] = {}
        for answer in await self.call_async("steer_readings", state.request_id):
            for layer, data in answer or ():
                values = np.frombuffer(data, np.float32).reshape(-1, 2 * self.settings.rank + 1)
                found.setdefault(layer, values)  # tensor-parallel ranks report the same values
        layers = readout.layers
        if missing := [layer for layer in layers if layer not in found or len(found[layer]) < len(tokens)]:
            raise EngineFailed(f"the layers {missing} were not read for every token")
        values = np.stack([found[layer][: len(tokens)] for layer in layers], axis=1)
        return [
            (token_text(tokenizer, token), Reading.of(readout, each))
            for token, each in zip(tokens, values, strict=True)
        ]

    def met(self, ticket: Ticket, answer: str, choice: int) -> bool | None:
        """Whether a token of a choice was steered: whether the condition of its request held, or its phase came. Call
        this at the end of the choice.

        Args:
            answer: the id of the answer that the choice belongs to.
            choice: the number of the choice in this answer.

        Returns:
            None if the request has neither a condition nor a phase, if the choice has no token, or if it is not known.
        """
        spec, state = ticket.admission.spec, internals.engine.of_choice(ticket.states, answer, choice)
        if state is None or not (tokens := internals.engine.answer_ids(state)):
            return None
        if spec.decided_once:
            return ticket.holds.get(state.request_id)
        phase = spec.phase(self.placement.shape.thinking, state.prompt_token_ids or ())
        return None if phase is None else phase.comes(tokens)

    @contextmanager
    def admitted(self, params: SamplingParams) -> Iterator[SamplingParams]:
        """Yield `params` as the engine has to see them. A request that is added inside the context finds its admission.
        Raises SpecError."""
        extra = getattr(params, "extra_args", None) or {}
        check_absent(extra, served=self.serves)
        if not hasattr(params, "extra_args"):  # pooling: nothing is generated, and nothing is steered
            yield params
            return
        if (way := passage.get()) is not None:
            first, way.asked = not way.asked, True
            if first and way.reserve is not None:
                try:
                    way.reserve()
                except SteerError as error:
                    way.refused = error
                    raise
            if internals.engine.has_form(params) and not way.forms:
                from steer.serve.authorise import NO_FORMS, forbidden

                way.refused = forbidden("forms", NO_FORMS)
                raise way.refused
        asked = extra.get(KEY)
        ticket = self._tickets.get(asked) if isinstance(asked, str) else None
        if own := ticket is None:
            if (way is not None or self.serves) and not in_self_check.get():
                check_passage(way, raw=KEY in extra)
                requested: tuple[RequestedDirection, ...] = ()
            else:
                requested = parse(asked, KEY) if KEY in extra else self.default
                if internals.engine.is_beam_step(params) and any(item.tokens for item in requested):
                    raise SpecError(
                        "beam search asks for each token as if those before it were the prompt, so steering at some "
                        "tokens, or under a condition that one token decides, would act at others; accepted: at all"
                    )
            ticket = Ticket(Admission.of(self.registry, requested))
        call, admission = _Call(ticket), ticket.admission
        admission.hold(call)  # the server may release it before the call has ended, if its client has left
        if own:
            admission.release()
        ticket.used = True
        token = _adding.set(call)
        try:
            yield _with_spec(params, extra, admission)
        finally:
            _adding.reset(token)
            admission.release(call)

    def check_added(self, request: EngineCoreRequest) -> None:
        """Check a request that the output processor is about to take. From here on the request holds its admission; a
        steered request also gets its salt.

        Raises:
            SpecError: the request was never admitted.
            RequestError: the prompts of the network request have too many log-probabilities.
        """
        if SALT in (request.cache_salt or ""):
            raise SpecError(f"a cache_salt must not contain '{SALT}'", param="cache_salt")
        call = _adding.get()
        # n answers have one prompt, which is checked once
        if call is None or not call.made or getattr(request, "resumable", False):
            internals.engine.check_fields(request, self.unsafe)
            internals.engine.check_numbers(request)
        if (way := passage.get()) is not None and not way.manages and request.priority:
            check_priority(way)
        prompt, _ = internals.engine.logprobs_of(request, self.vocabulary)
        if way is not None and prompt and (error := way.count_logprobs(prompt)):
            raise error
        self._hold(request, call)
        if call is not None:
            call.made += 1
            usage, tokens = metrics.current_usage(), internals.engine.positions_of(request)
            if call.made == 1:  # n answers are n requests of the engine with one prompt
                usage.read(tokens)
            elif getattr(request.sampling_params, "skip_reading_prefix_cache", False):
                usage.again += tokens

    def _hold(self, request: EngineCoreRequest, call: _Call | None) -> None:
        """If a request is steered or read, have it hold the admission of the `call` that makes it, and salt it.

        Raises SpecError as `check_added` does.
        """
        text = receipt_of(request.sampling_params)
        unread = KEY in (getattr(request.sampling_params, "extra_args", None) or {})
        if text is None and not unread and not (call and call.ticket.admission.spec):
            return
        if call is None or call.ticket.admission.spec.receipt() != text:
            raise SpecError("a request with steering must be made by add_request from a prompt and parameters")
        if request.request_id in self.held:
            raise SpecError(f"a steered request with the id '{request.request_id}' is running already")
        if getattr(request, "resumable", False):
            raise SpecError("requests with streamed input cannot be steered", param=KEY)
        ticket = call.ticket
        if ticket.forgotten:
            raise over()
        own = salted(request, ticket.admission.spec)
        request.cache_salt = self.salts.current(own)
        if ticket.admission.spec.decided_once:
            request.cache_salt += f"?{request.request_id}"  # an equal request may decide otherwise, because of rounding
        ticket.admission.hold(request.request_id)
        self.held[request.request_id] = ticket
        ticket.running[request.request_id] = own

    def has_added(
        self, request: EngineCoreRequest, state: RequestState
    ) -> Callable[[int | None], RequestError | None] | None:
        """Note the `state` that the output processor keeps for a request that it has taken. Returns what has to be told
        of the tokens of its answer, if their log-probabilities count."""
        if (call := _adding.get()) is not None:
            admission = call.ticket.admission
            if admission.readout or admission.spec.decided_once or admission.spec.phased:
                call.ticket.states[internals.engine.choice_of(state)] = state
        _, each = internals.engine.logprobs_of(request, self.vocabulary)
        if (way := passage.get()) is None or not each:
            return None
        delivery = internals.engine.delivery_of(request.sampling_params)
        if delivery == "beam" and not way.beams:
            return None
        if delivery != "stream" or way.repeats:
            return lambda tokens: way.count_logprobs((tokens or 0) * each)
        unread, begun = 0, False

        def count(tokens: int | None) -> RequestError | None:
            nonlocal unread, begun
            if tokens is None:
                way.streams -= begun
                return None
            way.streams += not begun
            begun = True
            unread = unread + tokens if internals.engine.is_unread(state) else 0
            return way.count_chunk((unread + internals.engine.chunk_of(state)) * each)

        return count

    def let_go(self, request_id: str) -> None:
        """Release the admission of a request that has ended."""
        if ticket := self.held.pop(request_id, None):
            ticket.admission.release(request_id)
            ticket.running.pop(request_id, None)
            self._read_no_more(ticket)

    def left_of_call(self) -> list[str]:
        """The ids of the requests that have not ended, of the ticket for which `add_request` runs in this context: if
        one of several requests fails, all of them have to end."""
        call = _adding.get()
        return list(call.ticket.running) if call else []

    def lost(self, request_id: str) -> NotFinite:
        """Note that the stream of this request was lost, so that no later request finds its blocks. Returns the error
        of the request."""
        if ticket := self.held.get(request_id):
            self.salts.renew(ticket.running[request_id])
            ticket.usage.failed = ticket.lost = True
        return NotFinite()

    def decided(self, request_id: str, holds: bool) -> None:
        """Note whether the condition of a request that is held `holds`."""
        self.held[request_id].holds[request_id] = holds

    def applied(self, request_id: str) -> Spec | None:
        """The spec of a request that has not ended; None if the request is neither steered nor read."""
        ticket = self.held.get(request_id)
        return ticket.admission.spec if ticket else None


def check_passage(way: Passage | None, *, raw: bool) -> None:
    """Check that a layer of ours lets a request without a ticket pass.

    Args:
        raw: whether the request brings a spec itself.

    Raises:
        SpecError: no layer lets the request pass.
        CancelledError: the request had a ticket, and its answer has ended (`over`).
    """
    from steer.serve.errors import unsupported

    way = way or Passage()
    if way.over:
        raise over()
    if raw:
        way.refused = unsupported("this route does not take steering: ask a generation route of this server")
    elif not way.plain:
        way.refused = unsupported("this route cannot be steered, and requests without steering are not allowed here")
    if way.refused:
        raise SpecError(str(way.refused), param=KEY)


def check_priority(way: Passage) -> None:
    """Raise SpecError for a request that has another priority than all others. vLLM's fields and headers set it."""
    from steer.serve.errors import unsupported

    reason = "needs a key with the managing role: a request of another priority may run before those of other keys"
    way.refused = unsupported(f"'priority' {reason}", "priority")
    raise SpecError(str(way.refused), param="priority")


def over() -> asyncio.CancelledError:
    """The error to raise if a task of vLLM goes on with a request whose answer has ended. vLLM treats the task as
    cancelled: the task waits for none of its other requests, and nobody gets an error."""
    return asyncio.CancelledError("the request has ended")


def _with_spec(params: SamplingParams, extra: Mapping[str, object], admission: Admission) -> SamplingParams:
    """A copy of SamplingParams that carries the resolved spec and the read-out; the same object if nothing changes."""
    spec, readout = admission.spec, admission.readout
    if KEY not in extra and not spec:
        return params
    copied = params.clone()
    ours: dict[str, object] = {RESOLVED: spec.receipt()} if spec else {}
    if readout:
        ours[READ] = [list(readout.digests), readout.angle]
    copied.extra_args = {key: value for key, value in extra.items() if key != KEY} | ours or None
    return copied


def of(engine: object) -> Frontend:
    """The front end of an `LLM`, `LLMEngine` or `AsyncLLM`. Raises UnsupportedModel if steering is not on."""
    frontend = getattr(getattr(engine, "llm_engine", engine), ATTRIBUTE, None)
    if not isinstance(frontend, Frontend):
        raise UnsupportedModel(
            "this engine was started without steering: it needs worker_cls and additional_config['steer'], and the "
            "plugin 'steer' must be loaded"
        )
    return frontend
