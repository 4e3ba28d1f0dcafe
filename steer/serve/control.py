"""The control plane of one server: the policy in force, the kill switch, the audit log, and the running requests.

If a server has several front ends, each has a `Control`; the switch and the rates are in their shared table. One
`Control` serves `access`, the middleware and the control routes. It belongs to the event loop, except that the watcher
of the policy file and moves of names come on their own threads.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable
from contextvars import ContextVar
from dataclasses import dataclass, field

from starlette.types import ASGIApp, Receive, Scope

from steer._version import __version__
from steer.errors import InvalidInput, RequestError, SteerError, UnknownDirection, printable
from steer.registry import Move, Registry
from steer.serve import metrics, policy
from steer.serve.asgi import Outgoing, answered
from steer.serve.audit import Audit, AuditUnavailable
from steer.serve.authorise import ANYONE, CALLER, NOBODY, Caller, Refusal, Rules, forbidden
from steer.serve.errors import Code
from steer.serve.origin import ANY, AllowedOrigins, hosts_of, is_loopback
from steer.serve.policy import InForce, Policy, PolicyError
from steer.settings import ControlSettings
from steer.shared import Shared
from steer.spec import Spec
from steer.watch import STALLED, Follower

log = logging.getLogger("steer")

#: Characters of a model's name that the audit log keeps.
MODEL_SHOWN = 128
#: Of one key's refusals by one rule in a minute, those that the audit log keeps one by one.
REFUSALS_KEPT = 10.0
_DEFAULTS = ControlSettings.model_construct()
#: Names in what front ends share: the switch, and of requests that run the steered ones.
SWITCH, STEERED = "switch", "steered"
#: Who moves a name: set where a route does it, unset where the folder does.
_moving: ContextVar[Caller | None] = ContextVar("steer_moving", default=None)


@dataclass(slots=True, eq=False)
class Run:
    """One request, from before it is read to its end. `tokens` are charged to its key's rates and not yet used, and
    `answers` are what it counts for `requests_at_once`; `spec` and what follows are of an admitted one, `line` is the
    audit line of its admission."""

    caller: Caller
    tokens: int = 0
    answers: int = 1
    spec: Spec = field(default_factory=Spec)
    request_id: str = ""
    line: int | None = None
    #: Why it was ended before its end.
    ended: Refusal | None = None
    _stop: asyncio.Future[Exception] | None = field(default=None, init=False)

    def abort(self, why: Refusal) -> None:
        """On the event loop."""
        self.ended = why
        if self._stop is not None and not self._stop.done():
            self._stop.set_result(why)

    async def serve(self, app: ASGIApp, scope: Scope, receive: Receive, answer: Outgoing) -> None:
        """Have `app` answer it, until it is aborted."""
        if self.ended is not None:
            await answer.break_off(self.ended)
            return
        self._stop = asyncio.get_running_loop().create_future()
        await answered(app, scope, receive, answer, self._stop)


MINUTE = 60.0
#: Seconds of a drain in which what has not ended is told so.
GRACE = 1.0
TAKEN_AWAY = "the API key was taken away"


class RateLimiter:
    """One kind of rate (requests, or tokens) of all keys: token buckets that hold at most a minute's amount and fill
    evenly. They are in the table that all front ends share; check and charge together under its lock.

    A request is counted before any work is done for it, and charged all the tokens that it can use once it is read.
    What it did not use is given back when it ends. So requests that run at once cannot exceed together what they could
    use one after the other, and a request that fails is counted too. A bucket may be overdrawn: an answer's cost is
    known at its end. `clock` is one clock of the whole machine.
    """

    def __init__(self, kind: str, shared: Shared, clock: Callable[[], float] = time.monotonic) -> None:
        self._kind, self._shared, self._clock = kind, shared, clock

    def wait(self, key: str, per_minute: float | None, amount: float) -> float:
        """Seconds until `key` may have `amount`; 0 where it may now, or has no such limit."""
        if per_minute is None:
            return 0.0
        missing = min(amount, per_minute) - self._level(key, per_minute, self._clock())
        return max(0.0, missing * MINUTE / per_minute)

    def charge(self, key: str, per_minute: float | None, amount: float) -> None:
        if per_minute is not None:
            with self._shared.lock():
                now = self._clock()
                self._shared.put(f"{self._kind}:{key}", self._level(key, per_minute, now) - amount, now)

    def _level(self, key: str, per_minute: float, now: float) -> float:
        """What the bucket holds now, at a rate that a new policy may have changed."""
        level, when = self._shared.get(f"{self._kind}:{key}") or (per_minute, now)
        return min(per_minute, level + (now - when) * per_minute / MINUTE)


class Control:
    """Everything is allowed, and nothing is kept, where the settings name no policy and no audit log."""

    def __init__(self, settings: ControlSettings = _DEFAULTS) -> None:
        """Raises PolicyError for a policy file that is not acceptable."""
        self.settings = settings
        self.in_force: InForce | None = policy.load(settings.policy) if settings.policy else None
        self.audit = (
            Audit(settings.audit, max_bytes=settings.audit_max_bytes, fsync=settings.audit_fsync)
            if settings.audit
            else None
        )
        #: What a server without keys answers to; None where keys say who may call. Until `listen` the strictest.
        self.allowed_origins: AllowedOrigins | None = None if self.in_force else AllowedOrigins()
        #: Of pages elsewhere that may call.
        self.origins: frozenset[str] = frozenset()
        self.policy_problems: tuple[str, ...] = ()
        #: All requests that run and can be ended, plain ones too.
        self.runs: set[Run] = set()
        self.registry: Registry | None = None
        self._share(Shared())
        self._refusals = RateLimiter("refusals", Shared())  # what is kept of them is each front end's own
        self._unkept: Counter[tuple[str | None, str]] = Counter()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._good: bytes | None = None  # what the policy file was at the last look, if it was acceptable
        self._read = time.monotonic()  # when the policy file was last read, acceptable or not
        #: Looks at the policy file.
        self.follower: Follower | None = None

    # -- life ----------------------------------------------------------------------------------------------------

    def listen(self, host: str | None, origins: Iterable[str] = (), *, guarded: bool = False) -> None:
        """Where the server will listen (None: all interfaces), and the origins of pages elsewhere that may call it.
        `guarded`: others' keys, or a socket that only this machine has, say who may call.

        Raises InvalidInput where others, or all web pages, would reach a server that wants no key.
        """
        self.origins = frozenset(origins)
        if self.in_force or guarded:
            self.allowed_origins = None
            return
        where = None if host in ("", "0.0.0.0", "::") else host
        if not self.settings.insecure:
            hint = "give a --policy with keys, or say --insecure to let everybody do everything"
            if not is_loopback(host):
                raise InvalidInput(
                    f"--host {host or '0.0.0.0'} can be reached by others, and there are no keys: {hint}"
                )
            if ANY in self.origins:
                raise InvalidInput(f"--cors-origins {ANY} lets every web page call, and there are no keys: {hint}")
            log.info("no policy: everybody on this machine may do everything")
        else:
            log.warning("INSECURE: everybody who reaches %s may steer, upload and delete", host or "all addresses")
            if ANY in self.origins:
                log.warning("INSECURE: every web page that such a person opens may do so too")
        named = hosts_of(self.settings.allowed_hosts) | hosts_of(where or "")
        self.allowed_origins = AllowedOrigins(named, self.origins, addresses=where is None)

    def _share(self, shared: Shared) -> None:
        """Share the switch and the rates with all front ends that have `shared`."""
        self.shared = shared
        self._requests, self._tokens = RateLimiter("requests", shared), RateLimiter("tokens", shared)
        with shared.lock():
            if shared.get(SWITCH) is None:
                shared.text = "" if self.settings.steering else "the server was started so"
                shared.put(SWITCH, self.settings.steering)

    def start(self, registry: Registry, model: str, shared: Shared | None = None) -> None:
        """Open the audit log and follow the policy file and the registry; `shared` with other front ends. Raises
        AuditError."""
        if shared is not None:
            self._share(shared)
        if self.audit:
            self.audit.open()
        detail: dict[str, object] = {"version": __version__, "policy": self.policy_digest}
        several = {"front_end": self.shared.index} if self.shared.count > 1 else {}
        self._note("start", model=model, detail=detail | several)
        self.registry, registry.on_move = registry, self._moved
        metrics.STEERING.set(self.steering)
        metrics.AUDIT_OK.set(self.audit is None or self.audit.failed is None)
        if self.in_force:
            self._warn_of_what_cannot_be_applied(self.in_force.policy)
            log.info("policy: %d keys", len(self.in_force.policy.keys))
        if self.settings.policy:
            # the folder is watched, since editors and ConfigMaps put a new file in place
            folder = self.settings.policy.parent
            self.follower = Follower(folder, self._look, name="steer-policy", recursive=False, calls=self.shared.calls)
            self.follower.start()

    def stop(self) -> None:
        if self.follower:
            self.follower.stop()
            self.follower = None
        if self.audit:
            for (key, rule), count in self._unkept.items():
                self._note("refused", key=key, outcome="summed", detail={"rule": rule, "unkept": count})
            self._unkept.clear()
            self._note("stop")
            self.audit.close()
        self.shared.close()

    # -- policy --------------------------------------------------------------------------------------------------

    def _warn_of_what_cannot_be_applied(self, what: Policy) -> None:
        """Log the directions that it names and that are not served, and each key whose own steering fails in all its
        requests, or is left out of them."""
        assert self.registry is not None
        own = [item for rules in what.keys.values() for item in (*rules.required, *(rules.default or ()))]
        served = self.registry.names()
        for said, names in (("limits", set(what.directions)), ("needs", {name for item in own for name in item.names})):
            if missing := ", ".join(sorted(names - served.keys())):
                all_served = ", ".join(served) or "none"
                log.warning("the policy %s directions that are not served: %s; served: %s", said, missing, all_served)
        for name, rules in what.keys.items():
            for said, wanted in (("required", ()), ("default", rules.default)):
                try:
                    if wanted is not None:
                        self.registry.merge(self.registry.resolve(wanted), self.registry.resolve(rules.required))
                except UnknownDirection:
                    pass  # it may come yet
                except SteerError as error:
                    log.warning("the %s steering of the key '%s' cannot be applied: %s", said, name, error)

    def _look(self) -> None:
        """On the follower's thread: the file may be another, and another front end may have moved the switch."""
        self.reload()
        if self._ends_running and self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._end_steered)

    @property
    def _ends_running(self) -> bool:
        """Does what is steered and runs end, as the switch is now?"""
        return not self.steering and self.in_force is not None and self.in_force.policy.on_kill == "abort"

    def _end_steered(self) -> None:
        """On the event loop."""
        if self._ends_running:
            for run in self.running:
                run.abort(self.off(run.spec))

    def reload(self) -> None:
        """Read the policy file again. One that is not acceptable leaves the old in force, and says why."""
        assert self.settings.policy is not None
        path = self.settings.policy
        try:
            data = policy.fetch(path)
            self._read = time.monotonic()
            if data == self._good:
                return
            fresh = policy.read(data, path.name)
        except PolicyError as error:
            self._good = None
            if error.problems != self.policy_problems:
                self.policy_problems = error.problems
                metrics.POLICY_RELOADS.labels(result="failed").inc()
                log.error("the policy file has problems, so the old one stays in force: %s", error)
                self._note("policy", outcome="refused", detail={"policy": self.policy_digest})
            return
        self._good, self.policy_problems = data, ()
        if fresh.digest != self.policy_digest:
            self.in_force = fresh
            metrics.POLICY_RELOADS.labels(result="ok").inc()
            log.info("a new policy is in force: %d keys", len(fresh.policy.keys))
            if self.registry is not None:
                self._warn_of_what_cannot_be_applied(fresh.policy)
            self._note("policy", outcome="ok", detail={"policy": fresh.digest})
            self.shared.ask()  # it holds in all front ends together, whichever has seen it first
            if fresh.policy.on_kill == "abort" and self._loop is not None and not self._loop.is_closed():
                self._loop.call_soon_threadsafe(self._end_removed)

    def _end_removed(self) -> None:
        """On the event loop: end what runs for secrets that are no keys any more."""
        assert self.in_force is not None
        keys = self.in_force.policy.keys
        for run in tuple(self.runs):
            rules = keys.get(run.caller.name or "")
            if run.caller.name is not None and (rules is None or run.caller.stored not in rules.hashes):
                run.abort(Refusal(Code.INVALID_API_KEY, "key", TAKEN_AWAY))

    @property
    def policy_digest(self) -> str | None:
        return self.in_force.digest if self.in_force else None

    # -- who -----------------------------------------------------------------------------------------------------

    def caller(self, scope: Scope) -> Caller:
        """Who makes this request. With a policy in force, nobody whom the door has not let in."""
        return scope.get(CALLER, ANYONE if self.in_force is None else NOBODY)

    def renewed(self, scope: Scope) -> Caller:
        """Who makes this request, by the policy that is in force now: a body may come long after the headers with the
        key. Raises Refusal where that is no key any more, or has another name."""
        caller = self.caller(scope)
        if self.in_force is not None and caller.name is not None:
            self.check_policy()
            if self.in_force.names.get(caller.stored or "") != caller.name:
                raise Refusal(Code.INVALID_API_KEY, "key", TAKEN_AWAY)
            caller = Caller(caller.name, self.in_force.policy.keys[caller.name], caller.stored)
            scope[CALLER] = caller
        return caller

    @property
    def rules(self) -> Rules:
        """What holds for every caller now."""
        return Rules(self.in_force.policy if self.in_force else None, None if self.steering else self.off)

    def manager(self, scope: Scope) -> Caller:
        """Who makes this request and may manage: directions, and the kill switch. Raises Refusal for who may not."""
        peer = (scope.get("client") or (None,))[0]  # after a proxy on this machine: the one that the proxy names
        if self.in_force is None:
            if not (self.settings.insecure or peer is None or is_loopback(peer)):
                raise forbidden("manage", "without a policy, a server is managed from its own machine alone")
        elif not self.renewed(scope).manages:
            raise forbidden("manage", "managing needs a key with the managing role")
        return self.caller(scope)

    def refused(self, error: SteerError, caller: Caller, scope: Scope) -> None:
        """Count and keep a refusal by policy; of other errors nothing is kept. Nobody can fill the disk with them: a
        request without a key is counted alone, and of a key's refusals by one rule REFUSALS_KEPT in a minute are kept
        one by one. The next line that is says how many were not."""
        if not isinstance(error, Refusal):
            return
        metrics.POLICY_REFUSED.labels(rule=error.rule).inc()
        if self.audit is None or (caller.name is None and caller.rules is not None):
            return
        which = (caller.name, error.rule)
        bucket = f"{caller.name or ''}:{error.rule}"
        if self._refusals.wait(bucket, REFUSALS_KEPT, 1):
            self._unkept[which] += 1
            return
        self._refusals.charge(bucket, REFUSALS_KEPT, 1)
        before = self._unkept.pop(which, 0)
        self._note(
            "refused",
            key=caller.name,
            request_id=request_id(scope),
            entries=error.asked.described,
            outcome=error.code.wire,
            detail={"rule": error.rule, "path": scope["path"][:200]} | ({"unkept": before} if before else {}),
        )

    def check_policy(self) -> None:
        """Raises Refusal (503) while the policy file has not been read for so long that nobody can say whom it lets in:
        a key may have been taken away in it."""
        if self.policy_unread:
            said = f"the policy file has not been read for {STALLED:g} s, so no key is known to hold; the log says why"
            raise Refusal(Code.POLICY_UNREAD, "policy", said, Retry_After="10")

    @property
    def policy_unread(self) -> bool:
        """Has the policy file not been read for so long that nobody can say whom it lets in?"""
        return self.follower is not None and time.monotonic() - self._read > STALLED

    # -- requests ------------------------------------------------------------------------------------------------

    @property
    def running(self) -> list[Run]:
        """The steered requests that run on this front end."""
        return [run for run in self.runs if run.spec]

    def enter(self, caller: Caller) -> Run:
        """Take one request of the caller's rates, before it is read: what fails has been one too. Raises Refusal (429).
        Whoever has entered must `leave`."""
        rules, name = caller.rules, caller.name
        if rules is not None and name is not None:
            with self.shared.lock():
                limit = rules.requests_at_once
                if limit is not None and self.shared.total(_at_once(name)) >= limit:
                    raise _over("requests_at_once", rules, 1)
                self._check_rate("requests_per_minute", self._requests, caller, 1)
                self._check_rate("tokens_per_minute", self._tokens, caller, 1)
                self._requests.charge(name, rules.requests_per_minute, 1)
                self.shared.count_own(_at_once(name), 1)
        return Run(caller)

    def reserve(self, run: Run, scope: Scope, tokens: int, answers: int = 1) -> None:
        """Take all the tokens that a whole request may come to, and each of its answers as a request that runs, by the
        rules that hold now. Raises Refusal (429, and 401 where the key is none any more), and RequestError where these
        are more than the key may ever have."""
        run.caller = self.renewed(scope)
        rules, name = run.caller.rules, run.caller.name
        if rules is not None and name is not None and answers > 1 and (limit := rules.requests_at_once) is not None:
            if answers > limit:
                raise RequestError(
                    f"n: prompts × n are {answers} answers, and this key may have {limit} at once", param="n"
                )
            with self.shared.lock():
                if self.shared.total(_at_once(name)) + answers - 1 > limit:
                    raise _over("requests_at_once", rules, 1)
                self.shared.count_own(_at_once(name), answers - 1)
            run.answers = answers
        if rules is not None and name is not None and rules.tokens_per_minute is not None:
            with self.shared.lock():
                self._check_rate("tokens_per_minute", self._tokens, run.caller, tokens)
                self._tokens.charge(name, rules.tokens_per_minute, tokens)
            run.tokens += tokens

    def leave(self, run: Run) -> None:
        """The request has ended, whatever became of it; what it took and did not use is given back."""
        rules, name = run.caller.rules, run.caller.name
        if rules is not None and name is not None:
            self.shared.count_own(_at_once(name), -run.answers)
            self._tokens.charge(name, rules.tokens_per_minute, -run.tokens)
            run.tokens = 0

    def _check_rate(self, rule: str, meter: RateLimiter, caller: Caller, amount: int) -> None:
        assert caller.rules is not None
        assert caller.name is not None
        if wait := meter.wait(caller.name, getattr(caller.rules, rule), amount):
            raise _over(rule, caller.rules, math.ceil(wait))

    async def begin(self, run: Run, spec: Spec, model: str | None, scope: Scope) -> None:
        """The request is admitted. Raises Refusal (503) for a steered one whose line cannot be kept.

        Where each line is to be on the disk first (`--audit-fsync always`), this waits for it, and nobody else does.
        """
        run.spec, run.request_id = spec, request_id(scope)
        self.add(run)
        try:
            if spec and self.audit:
                run.line = self.audit.write(
                    "admitted",
                    key=run.caller.name,
                    request_id=run.request_id,
                    model=None if model is None else model[:MODEL_SHOWN],
                    entries=spec.described,
                )
                if kept := self.audit.kept(run.line):
                    await asyncio.wrap_future(kept)
        except AuditUnavailable as error:
            self.discard(run)
            self._note_end(run, "error", 0, 0)
            raise Refusal(Code.AUDIT_UNAVAILABLE, "audit", str(error), Retry_After="10") from None
        except BaseException:
            self.discard(run)
            self._note_end(run, "cancelled", 0, 0)
            raise

    def add(self, run: Run) -> None:
        """It runs, and can be ended. Whoever adds one must `discard` it; `end` does."""
        self._loop = asyncio.get_running_loop()
        self.runs.add(run)
        if run.spec:
            self.shared.count_own(STEERED, 1)
            metrics.STEERED_RUNNING.inc()

    def discard(self, run: Run) -> None:
        self.runs.discard(run)
        if run.spec:
            self.shared.count_own(STEERED, -1)
            metrics.STEERED_RUNNING.dec()

    def end(self, run: Run, outcome: str, usage: metrics.Usage) -> None:
        self.discard(run)
        used = usage.prompt + usage.again + usage.completion
        if (rules := run.caller.rules) is not None and run.caller.name is not None:
            self._tokens.charge(run.caller.name, rules.tokens_per_minute, used)
        metrics.count(run.spec, outcome, usage)
        self._note_end(run, outcome, usage.prompt, usage.completion)

    def _note_end(self, run: Run, outcome: str, prompt: int, completion: int) -> None:
        if run.line is not None:
            self._note(
                "ended",
                key=run.caller.name,
                request_id=run.request_id,
                admitted=run.line,
                prompt_tokens=prompt,
                completion_tokens=completion,
                outcome=outcome,
            )

    def drain(self, seconds: float) -> None:
        """As the server stops, on a thread that may wait: let what runs here end, and end it GRACE before the time is
        up, so that clients are told and the audit log has it."""
        deadline = time.monotonic() + max(seconds, GRACE)
        while self.runs and time.monotonic() < deadline - GRACE:
            time.sleep(0.02)
        if self.runs and self._loop is not None:
            self._loop.call_soon_threadsafe(self.end_all)
            while self.runs and time.monotonic() < deadline:
                time.sleep(0.02)

    def end_all(self) -> None:
        """On the event loop: end what runs, since the server stops."""
        for run in tuple(self.runs):
            run.abort(Refusal(Code.STOPPING, "stopping", "the server is stopping", Retry_After="10"))

    # -- the kill switch -----------------------------------------------------------------------------------------

    @property
    def steering(self) -> bool:
        """Is steering switched on? Read of each request; what moves it is seen by the next one, on every front end."""
        return bool(self.shared.number(SWITCH))

    @property
    def reason(self) -> str:
        """Why the switch was moved."""
        return self.shared.text

    @property
    def steered(self) -> int:
        """The steered requests that run on all front ends."""
        return self.shared.total(STEERED)

    def switch(self, enabled: bool, caller: Caller, reason: str = "") -> None:
        """From here on, and before anything else runs on this loop, no steered request is admitted (or is again); nor
        on any other front end."""
        reason = printable(reason)
        with self.shared.lock():
            self.shared.text = reason
            self.shared.put(SWITCH, enabled)
        metrics.STEERING.set(enabled)
        log.warning("steering is %s%s", "on" if enabled else "off", f": {reason}" if reason else "")
        self._note(
            "switch",
            key=caller.name,
            outcome="on" if enabled else "off",
            detail={"reason": reason, "running": self.steered, "aborted": self._ends_running},
        )
        self._end_steered()
        self.shared.ask()  # the others end what runs on them

    def off(self, asked: Spec) -> Refusal:
        """What a steered request gets while steering is off."""
        said = f"steering is switched off on this server{f': {self.reason}' if self.reason else ''}"
        return Refusal(Code.STEERING_OFF, "switch", said, asked=asked, Retry_After="60")

    # -- what is kept ---------------------------------------------------------------------------------------------

    def moving(self, caller: Caller) -> None:
        """In this context, and in threads that begin in it, names are moved by `caller`."""
        _moving.set(caller)

    def _moved(self, move: Move) -> None:
        mover = _moving.get()
        if move.new:
            metrics.SWAP.observe(move.seconds)
        self._note(
            "swap" if move.new else "delete",
            key=mover.name if mover else None,
            entries=[{"direction": move.name, "digest": move.new}],
            detail={"was": move.old, "by": "request" if mover else "folder"},
        )

    def _note(self, event: str, **fields: object) -> None:
        if self.audit:
            self.audit.note(event, **fields)


def _at_once(key: str) -> str:
    return f"at_once:{key}"


def _over(rule: str, rules: policy.KeyRules, seconds: int) -> Refusal:
    said = f"over this key's {rule} ({getattr(rules, rule):g}); try again in {seconds} s"
    return Refusal(Code.RATE_LIMIT_EXCEEDED, rule, said, Retry_After=str(seconds))


def request_id(scope: Scope) -> str:
    """The id under which a request is kept, made once: its own `X-Request-Id` is the client's to choose, so it is not
    ours."""
    return scope.setdefault("steer.request_id", f"req-{uuid.uuid4().hex}")
