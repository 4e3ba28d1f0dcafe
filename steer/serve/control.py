"""The control plane of one server: the policy in force, the kill switch, the audit log, and the running requests.

If a server has several front ends, each has a `Control`; the switch and the rates are in their shared table. One
`Control` serves `access`, the middleware and the control routes. It runs on the event loop, except that changes of the
policy file and moves of names come from other threads.
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
from steer.serve.policy import Policy, PolicyError
from steer.settings import ControlSettings
from steer.shared import Shared
from steer.spec import Spec
from steer.watch import STALLED, Follower

log = logging.getLogger("steer")

#: Characters of a model's name that the audit log keeps.
MODEL_SHOWN = 128
#: How many refusals of one key by one rule the audit log keeps one by one in a minute.
REFUSALS_KEPT = 10.0
_DEFAULTS = ControlSettings.model_construct()
#: Names in the shared table of the front ends: the switch, and the number of steered requests that run.
SWITCH, STEERED = "switch", "steered"
#: Who moves a name: set by a route, unset where the folder's watcher does it.
_moving: ContextVar[Caller | None] = ContextVar("steer_moving", default=None)


@dataclass(slots=True, eq=False)
class Run:
    """One request, from before it is read to its end.

    Attributes:
        tokens: charged to its key's rates in advance, and given back at the end.
        answers: how many it counts for `requests_at_once`.
        usage: the tokens that it has used.
        left: whether it counts for its key no more.
        spec, request_id, line: of an admitted request; `line` is the number of its line in the audit log.
    """

    caller: Caller
    tokens: int = 0
    answers: int = 1
    usage: metrics.Usage = field(default_factory=metrics.Usage)
    left: bool = False
    spec: Spec = field(default_factory=Spec)
    request_id: str = ""
    line: int | None = None
    #: Why it was aborted.
    aborted: Refusal | None = None
    _stop: asyncio.Future[Exception] | None = field(default=None, init=False)

    def abort(self, reason: Refusal) -> None:
        """End it early. Call this on the event loop."""
        self.aborted = reason
        if self._stop is not None and not self._stop.done():
            self._stop.set_result(reason)

    async def serve(self, app: ASGIApp, scope: Scope, receive: Receive, answer: Outgoing) -> None:
        """Have `app` answer it, until it is aborted."""
        if self.aborted is not None:
            await answer.break_off(self.aborted)
            return
        self._stop = asyncio.get_running_loop().create_future()
        await answered(app, scope, receive, answer, self._stop)


MINUTE = 60.0
#: The last seconds of a drain, in which the requests that still run are aborted and told so.
GRACE = 1.0
TAKEN_AWAY = "the API key was taken away"


class RateLimiter:
    """One kind of rate (requests, or tokens) of all keys: token buckets that hold at most a minute's amount and fill
    evenly. They are in the table that all front ends share; check and charge under its lock, in one step.

    A request is counted before any work is done for it, so a request that fails is counted too. Once it is read, it is
    charged all the tokens that it can use, and what it did not use is given back at its end. So requests that run at
    the same time cannot use more than they could one after the other. A bucket may be overdrawn, since the cost of an
    answer is known only at its end. `clock`: one clock for the whole machine.
    """

    def __init__(self, kind: str, shared: Shared, clock: Callable[[], float] = time.monotonic) -> None:
        self._kind, self._shared, self._clock = kind, shared, clock

    def wait(self, key: str, per_minute: float | None, amount: float) -> float:
        """Seconds until `key` may have `amount`; 0 if it may have it now, or has no such limit."""
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
        """What the bucket holds now. A new policy may have changed the rate."""
        level, when = self._shared.get(f"{self._kind}:{key}") or (per_minute, now)
        return min(per_minute, level + (now - when) * per_minute / MINUTE)


class Control:
    """The control plane. Without a policy in the settings everything is allowed, without an audit log nothing is
    logged."""

    def __init__(self, settings: ControlSettings = _DEFAULTS) -> None:
        """Raises PolicyError for a policy file that is not acceptable, and AuditError for an audit log that cannot be
        written."""
        self.settings = settings
        self.in_force: Policy | None = policy.load(settings.policy) if settings.policy else None
        self.audit = (
            Audit(settings.audit, max_bytes=settings.audit_max_bytes, fsync=settings.audit_fsync)
            if settings.audit
            else None
        )
        if self.audit:
            self.audit.check()
        #: The hosts and pages that a server without keys answers; None where keys decide. The strictest until `listen`.
        self.allowed_origins: AllowedOrigins | None = None if self.in_force else AllowedOrigins()
        #: The origins of other servers' pages that may call.
        self.origins: frozenset[str] = frozenset()
        self.policy_problems: tuple[str, ...] = ()
        #: All requests that run and can be aborted, plain ones too.
        self.runs: set[Run] = set()
        self.registry: Registry | None = None
        self._share(Shared())
        self._refusals = RateLimiter("refusals", Shared())  # not shared: each front end limits its own audit lines
        self._unkept: Counter[tuple[str | None, str]] = Counter()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._good: bytes | None = None  # the policy file at the last look, if it was acceptable
        self._read = time.monotonic()  # when the policy file was last read, acceptable or not
        #: Watches the policy file.
        self.follower: Follower | None = None

    # -- start and stop ------------------------------------------------------------------------------------------

    def listen(self, host: str | None, origins: Iterable[str] = (), *, guarded: bool = False) -> None:
        """Decide which hosts and pages are answered.

        Args:
            host: where the server will listen; None for all interfaces.
            origins: those of other servers' pages that may call.
            guarded: whether something else decides who may call: the engine's own keys, or a local socket.

        Raises:
            InvalidInput: other machines, or all web pages, would reach a server that needs no key.
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
        """Keep the switch and the rates in `shared`, which all front ends have."""
        self.shared = shared
        self._requests, self._tokens = RateLimiter("requests", shared), RateLimiter("tokens", shared)
        with shared.lock():
            if shared.get(SWITCH) is None:
                shared.text = "" if self.settings.steering else "the server was started so"
                shared.put(SWITCH, self.settings.steering)

    def start(self, registry: Registry, model: str, shared: Shared | None = None) -> None:
        """Open the audit log, and follow the policy file and the registry. `shared`: the table of all front ends, if
        there are several. Raises AuditError."""
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
            self._warn_of_what_cannot_be_applied(self.in_force)
            log.info("policy: %d keys", len(self.in_force.keys))
        if self.settings.policy:
            # the folder is watched, since editors and ConfigMaps replace the file
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
        """Log the directions that the policy names and that are not served, and each key whose required or default
        steering cannot be applied."""
        assert self.registry is not None
        own = [item for rules in what.keys.values() for item in (*rules.required, *(rules.default or ()))]
        served = self.registry.names()
        usable = {name for rules in what.keys.values() for name in rules.named}
        needed = {name for item in own for name in item.names}
        for verb, names in (("limits", set(what.directions)), ("needs", needed), ("lets keys use", usable - needed)):
            if missing := ", ".join(sorted(names - served.keys())):
                all_served = ", ".join(served) or "none"
                log.warning("the policy %s directions that are not served: %s; served: %s", verb, missing, all_served)
        for name, rules in what.keys.items():
            for kind, wanted in (("required", ()), ("default", rules.default)):
                try:
                    if wanted is not None:
                        self.registry.merge(self.registry.resolve(wanted), self.registry.resolve(rules.required))
                except UnknownDirection:
                    pass  # it may still be added
                except SteerError as error:
                    log.warning("the %s steering of the key '%s' cannot be applied: %s", kind, name, error)

    def _look(self) -> None:
        """On the follower's thread: the file may have changed, and another front end may have moved the switch."""
        self.reload()
        if self._aborts_steered and self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._abort_steered)

    @property
    def _aborts_steered(self) -> bool:
        """Whether steered requests that run are aborted, as switch and policy are now."""
        return not self.steering and self.in_force is not None and self.in_force.on_kill == "abort"

    def _abort_steered(self) -> None:
        """On the event loop."""
        if self._aborts_steered:
            for run in self.running:
                run.abort(self.off(run.spec))

    def reload(self) -> None:
        """Read the policy file again. If it is not acceptable, the old policy stays in force, and the log says why."""
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
            log.info("a new policy is in force: %d keys", len(fresh.keys))
            if self.registry is not None:
                self._warn_of_what_cannot_be_applied(fresh)
            self._note("policy", outcome="ok", detail={"policy": fresh.digest})
            self.shared.ask()  # the other front ends read it too
            if fresh.on_kill == "abort" and self._loop is not None and not self._loop.is_closed():
                self._loop.call_soon_threadsafe(self._abort_removed)

    def _abort_removed(self) -> None:
        """On the event loop: abort the requests whose key was removed."""
        assert self.in_force is not None
        keys = self.in_force.keys
        for run in tuple(self.runs):
            rules = keys.get(run.caller.name or "")
            if run.caller.name is not None and (rules is None or run.caller.stored not in rules.hashes):
                run.abort(Refusal(Code.INVALID_API_KEY, "key", TAKEN_AWAY))

    @property
    def policy_digest(self) -> str | None:
        return self.in_force.digest if self.in_force else None

    # -- callers -------------------------------------------------------------------------------------------------

    def caller(self, scope: Scope) -> Caller:
        """Who makes this request, as `Access` has found; NOBODY if it has not and a policy is in force."""
        return scope.get(CALLER, ANYONE if self.in_force is None else NOBODY)

    def renewed(self, scope: Scope) -> Caller:
        """Who makes this request by the policy that is in force now: a body may come long after the headers with the
        key. Raises Refusal if the key was removed meanwhile, or has another name."""
        caller = self.caller(scope)
        if self.in_force is not None and caller.name is not None:
            self.check_policy()
            if self.in_force.names.get(caller.stored or "") != caller.name:
                raise Refusal(Code.INVALID_API_KEY, "key", TAKEN_AWAY)
            caller = Caller(caller.name, self.in_force.keys[caller.name], caller.stored)
            scope[CALLER] = caller
        return caller

    @property
    def rules(self) -> Rules:
        """What holds for every caller now."""
        return Rules(self.in_force, None if self.steering else self.off)

    def manager(self, scope: Scope) -> Caller:
        """Who makes this request, if they may manage directions and the kill switch. Raises Refusal if they may not."""
        peer = (scope.get("client") or (None,))[0]  # behind a proxy on this machine: the client that the proxy names
        if self.in_force is None:
            if not (self.settings.insecure or peer is None or is_loopback(peer)):
                raise forbidden("manage", "without a policy, a server is managed from its own machine alone")
        elif not self.renewed(scope).manages:
            raise forbidden("manage", "managing needs a key with the managing role")
        return self.caller(scope)

    def refused(self, error: SteerError, scope: Scope) -> None:
        """Count a refusal by policy and write it to the audit log; other errors are not logged.

        Nobody can fill the disk with refusals: a request without a key is only counted, and in a minute REFUSALS_KEPT
        refusals of one key by one rule get a line each. The next line says how many got none.
        """
        if not isinstance(error, Refusal):
            return
        metrics.POLICY_REFUSED.labels(rule=error.rule).inc()
        caller = self.caller(scope)
        if self.audit is None or caller is NOBODY:
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
        """Raises Refusal (503) while `policy_unread`: a key may have been removed from the file."""
        if self.policy_unread:
            message = f"the policy file has not been read for {STALLED:g} s, so no key is known to hold; see the log"
            raise Refusal(Code.POLICY_UNREAD, "policy", message, Retry_After="10")

    @property
    def policy_unread(self) -> bool:
        """Whether the policy file has not been read for so long that its keys may be out of date."""
        return self.follower is not None and time.monotonic() - self._read > STALLED

    # -- requests ------------------------------------------------------------------------------------------------

    @property
    def running(self) -> list[Run]:
        """The steered requests that run on this front end."""
        return [run for run in self.runs if run.spec]

    def enter(self, caller: Caller) -> Run:
        """Charge one request to the caller's rates before it is read, so that a request that fails counts too. Every
        `enter` needs a `leave`. Raises Refusal (429)."""
        rules, name = caller.rules, caller.name
        if name is not None:
            with self.shared.lock():
                limit = rules.requests_at_once
                if limit is not None and self.shared.total(_at_once(name)) >= limit:
                    raise _over("requests_at_once", rules, 1)
                _check_rate("requests_per_minute", self._requests, name, rules, 1)
                _check_rate("tokens_per_minute", self._tokens, name, rules, 1)
                self._requests.charge(name, rules.requests_per_minute, 1)
                self.shared.count_own(_at_once(name), 1)
        return Run(caller)

    def reserve(self, run: Run, scope: Scope, tokens: int, answers: int = 1, param: str = "n") -> None:
        """Charge all the tokens that the request may use, and count each of its answers as a running request, by the
        rules in force now. `param`: the field that asks for several answers.

        Raises:
            Refusal: 429 over a limit, 401 if the key was removed meanwhile.
            RequestError: the request has more answers than the key may ever have at once.
        """
        if run.left:
            raise Refusal(Code.STOPPING, "stopping", "the answer to this request has ended", Retry_After="1")
        run.caller = self.renewed(scope)
        rules, name = run.caller.rules, run.caller.name
        if name is not None and answers > 1 and (limit := rules.requests_at_once) is not None:
            if answers > limit:
                message = f"{param}: prompts × n are {answers} answers, and this key may have {limit} at once"
                raise RequestError(message, param=param)
            with self.shared.lock():
                if self.shared.total(_at_once(name)) + answers - 1 > limit:
                    raise _over("requests_at_once", rules, 1)
                self.shared.count_own(_at_once(name), answers - 1)
            run.answers = answers
        if name is not None and rules.tokens_per_minute is not None:
            with self.shared.lock():
                _check_rate("tokens_per_minute", self._tokens, name, rules, tokens)
                self._tokens.charge(name, rules.tokens_per_minute, tokens)
            run.tokens += tokens

    def leave(self, run: Run) -> None:
        """The answer is complete, or the request has ended in another way: give back what was reserved for it, and
        charge what it has used. A second call does nothing."""
        if run.left:
            return
        run.left = True
        if (name := run.caller.name) is not None:
            self.shared.count_own(_at_once(name), -run.answers)
            used = run.usage.prompt + run.usage.again + run.usage.completion
            self._tokens.charge(name, run.caller.rules.tokens_per_minute, used - run.tokens)

    async def begin(self, run: Run, spec: Spec, model: str | None, scope: Scope) -> None:
        """The request is admitted. Raises Refusal (503) if it is steered and its audit line cannot be written.

        With `--audit-fsync always` this waits until the line is on the disk; other requests do not wait.
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
        """Register a running request, so that it can be aborted. Every `add` needs a `discard`; `end` does that."""
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

    def end(self, run: Run, outcome: str) -> None:
        self.discard(run)
        metrics.count(run.spec, outcome, run.usage)
        self._note_end(run, outcome, run.usage.prompt, run.usage.completion)

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
        """Wait until the running requests have ended, and abort them GRACE before `seconds` are over, so that clients
        and the audit log are told. Call this on a thread that may block, when the server stops."""
        deadline = time.monotonic() + max(seconds, GRACE)
        while self.runs and time.monotonic() < deadline - GRACE:
            time.sleep(0.02)
        if self.runs and self._loop is not None:
            self._loop.call_soon_threadsafe(self.abort_all)
            while self.runs and time.monotonic() < deadline:
                time.sleep(0.02)

    def abort_all(self) -> None:
        """On the event loop: abort all running requests, since the server stops."""
        for run in tuple(self.runs):
            run.abort(Refusal(Code.STOPPING, "stopping", "the server is stopping", Retry_After="10"))

    # -- the kill switch -----------------------------------------------------------------------------------------

    @property
    def steering(self) -> bool:
        """Whether steering is switched on. Every request reads this, so a change holds from the next request on, on
        every front end."""
        return bool(self.shared.number(SWITCH))

    @property
    def reason(self) -> str:
        """Why the switch was moved."""
        return self.shared.text

    @property
    def steered(self) -> int:
        """How many steered requests run on all front ends."""
        return self.shared.total(STEERED)

    def switch(self, enabled: bool, caller: Caller, reason: str = "") -> None:
        """Switch steering on or off, at once and on every front end: once it is off, no steered request is admitted."""
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
            detail={"reason": reason, "running": self.steered, "aborted": self._aborts_steered},
        )
        self._abort_steered()
        self.shared.ask()  # the other front ends abort theirs

    def off(self, asked: Spec) -> Refusal:
        """The error of a steered request while steering is off."""
        message = f"steering is switched off on this server{f': {self.reason}' if self.reason else ''}"
        return Refusal(Code.STEERING_OFF, "switch", message, asked=asked, Retry_After="60")

    # -- audit log ------------------------------------------------------------------------------------------------

    def moving(self, caller: Caller) -> None:
        """Note that `caller` is who moves names in this context, and in threads started in it."""
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


def _check_rate(rule: str, meter: RateLimiter, key: str, rules: policy.KeyRules, amount: int) -> None:
    if wait := meter.wait(key, getattr(rules, rule), amount):
        raise _over(rule, rules, math.ceil(wait))


def _over(rule: str, rules: policy.KeyRules, seconds: int) -> Refusal:
    message = f"over this key's {rule} ({getattr(rules, rule):g}); try again in {seconds} s"
    return Refusal(Code.RATE_LIMIT_EXCEEDED, rule, message, Retry_After=str(seconds))


def request_id(scope: Scope) -> str:
    """The id of a request in the audit log, made once. An `X-Request-Id` of the client is not used: the client could
    choose any."""
    return scope.setdefault("steer.request_id", f"req-{uuid.uuid4().hex}")
