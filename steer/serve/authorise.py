"""Who calls, what keys or policy forbid, and admission: find the versions that a request asks for and may use, and pin
them.

The order: resolve names (a name that the caller may not use counts as unknown); check the kill switch; check the
policy's modes and strengths; add what the key requires. No name moves in the meantime. The key's rates were checked
before.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from steer import readout
from steer.direction import Dose
from steer.errors import SpecError
from steer.names import Mode
from steer.readout import RequestedReadout
from steer.registry import Admission, Registry
from steer.serve.carriers import FIELD, Carried
from steer.serve.errors import Code, HTTPProblem
from steer.serve.policy import CALIBRATED, ROUNDING, KeyRules, Limits, Policy
from steer.spec import Entry, RequestedDirection, Spec, shift_text, text

#: Where `Access` leaves the caller in an ASGI scope.
CALLER = "steer.caller"


class Refusal(HTTPProblem):
    """Keys or policy forbid it; `rule` is the one that does, `asked` what was asked for, where that is known."""

    def __init__(
        self,
        code: Code,
        rule: str,
        message: str,
        *,
        asked: Spec | None = None,
        param: str | None = None,
        **more: str,
    ) -> None:
        headers = {name.replace("_", "-"): value for name, value in more.items()}
        super().__init__(code, message, param=param, headers=headers)
        self.rule, self.asked = rule, asked or Spec()


def forbidden(rule: str, message: str, asked: Spec | None = None, param: str | None = None) -> Refusal:
    return Refusal(Code.STEERING_FORBIDDEN, rule, message, asked=asked, param=param)


@dataclass(frozen=True, slots=True)
class Caller:
    """Who makes a request. Without rules (no policy is in force) everything is allowed."""

    name: str | None = None
    rules: KeyRules | None = None
    #: The stored hash of the secret that came.
    stored: str | None = None

    @property
    def manages(self) -> bool:
        return self.rules is None or self.rules.manage

    @property
    def required(self) -> tuple[RequestedDirection, ...]:
        return self.rules.required if self.rules else ()

    def may_use(self, direction: str) -> bool:
        return self.rules is None or (self.rules.steer and self.rules.allows(direction))

    def may_know(self, direction: str) -> bool:
        """Is this a name that it may be told of?"""
        return self.manages or self.may_use(direction)

    def check_readout(self) -> None:
        """Raises Refusal for a caller that may not read components along directions."""
        if self.rules is not None and not self.rules.readout:
            said = f"this key may not use {readout.FIELD}: its policy does not say `readout = true`"
            raise forbidden("readout", said, param=readout.FIELD)

    @property
    def forms(self) -> bool:
        """May it say of what form an answer is?"""
        return self.rules is None or self.rules.forms


#: No policy is in force.
ANYONE = Caller()
#: One who came without a key, on a path that needs none.
NOBODY = Caller(None, KeyRules.model_construct(hash="", steer=False))


@dataclass(frozen=True, slots=True)
class Rules:
    """What holds for every caller now: the policy in force, and while steering is off what a steered request gets."""

    policy: Policy | None = None
    off: Callable[[Spec], Refusal] | None = None

    def limits(self, registry: Registry) -> Mapping[str, Sequence[Limits]]:
        """What the policy says of single directions, by the digest of the version: it holds for each of its names."""
        digests = registry.digests()
        found: dict[str, list[Limits]] = {}
        for name, its in self.policy.directions.items() if self.policy else ():
            if name in digests:
                found.setdefault(digests[name], []).append(its)
        return found


OPEN = Rules()
NO_FORMS = (
    "this key may not have answers held to a schema, a grammar or its tools: its policy does not say `forms = true`"
)
NO_READOUT = "this server offers no read-out (vLLM: start it with --readout N)"


def admit(
    carried: Carried,
    registry: Registry,
    default: Sequence[RequestedDirection] = (),
    wanted: RequestedReadout | None = None,
    *,
    readable: int = 0,
    unreadable: str = NO_READOUT,
    caller: Caller = ANYONE,
    rules: Rules = OPEN,
) -> Admission:
    """Pin what `resolve` gives and what is `wanted` to be read, of an engine that can read `readable` layers;
    `unreadable` says why it reads none.

    Both in one step, so that what is read is the version that steers. Raises what `resolve` raises, and the same for
    what may not or cannot be read.
    """
    if wanted is not None:
        caller.check_readout()
        if not readable:
            raise SpecError(f"{readout.FIELD}: {unreadable}", param=readout.FIELD)
    with registry.steady():
        spec = resolve(carried, registry, default, caller=caller, rules=rules)
        read = None if wanted is None else readout.resolve(wanted, spec, registry, readable, caller.may_use)
        return Admission(registry, spec, read)


def resolve(
    carried: Carried,
    registry: Registry,
    default: Sequence[RequestedDirection] = (),
    *,
    caller: Caller = ANYONE,
    rules: Rules = OPEN,
) -> Spec:
    """What the carriers agree on, or `default` where there is none, as far as `caller` may have it.

    Two carriers agree when they mean the same entries, however they are written. Raises SpecError for what cannot be
    resolved, Refusal for what is forbidden, HTTPProblem (503) where the operator's own steering is not to be had.
    """
    with registry.steady():  # or a swap between two carriers would look like a conflict
        asked = _asked(carried, registry, caller) if carried.found else _default(default, registry, caller)
        return _authorised(asked, carried, registry, caller, rules)


def _asked(carried: Carried, registry: Registry, caller: Caller) -> Spec:
    """What the carriers mean."""
    if any(carried.found.values()) and caller.rules is not None and not caller.rules.steer:
        raise forbidden("steer", "this key may not steer: its policy says `steer = false`")
    meanings = {carrier: registry.resolve(wanted, caller.may_use) for carrier, wanted in carried.found.items()}
    if len(set(meanings.values())) > 1:
        said = ", ".join(f"{carrier} says '{text(wanted)}'" for carrier, wanted in carried.found.items())
        raise SpecError(f"the carriers of this request disagree: {said}; send the same in each", param=FIELD)
    return next(iter(meanings.values()))


def _default(default: Sequence[RequestedDirection], registry: Registry, caller: Caller) -> Spec:
    """The default for a request that asks for nothing, as far as rules allow it: the key's own, else the server's."""
    if caller.rules is not None and caller.rules.default is not None:
        default = caller.rules.default
    if not all(caller.may_use(name) for item in default for name in item.names):
        return Spec()
    return _operators(default, registry, caller, "the default steering of this request", Code.DEFAULT_UNAVAILABLE)


def _operators(wanted: Sequence[RequestedDirection], registry: Registry, caller: Caller, what: str, code: Code) -> Spec:
    """What the operator wants for this request. A caller with a key is not told why it is not there: the reason
    may name what this key may not know."""
    try:
        return registry.resolve(wanted)
    except SpecError as error:
        why = f": {error}" if caller.rules is None else " now"
        raise HTTPProblem(code, f"{what} cannot be applied{why}") from None


def _authorised(asked: Spec, carried: Carried, registry: Registry, caller: Caller, rules: Rules) -> Spec:
    """What is to be applied where `asked` is asked for. A default that a rule forbids is left out: the request did not
    ask for it."""
    what, code = "steering that is required for this key", Code.REQUIRED_UNAVAILABLE
    required = _operators(caller.required, registry, caller, what, code)
    broken: list[tuple[str, str]] = []
    if caller.rules is not None and asked:
        broken = _broken(asked, carried.tools, caller.rules, registry, rules) + _against(asked, required)
        if broken and not carried.found:
            asked, broken = Spec(), []
    if rules.off is not None:
        refuses = rules.policy is None or rules.policy.required_when_off == "refuse"
        if asked or (required and refuses):
            raise rules.off(asked)
        required = Spec()
    if broken:
        raise forbidden(broken[0][0], "; ".join(said for _, said in broken), asked)
    try:
        return registry.merge(asked, required)
    except SpecError:
        if not carried.found:
            return required  # nobody asked for the default
        if caller.rules is not None and len({e.condition for e in (*asked.entries, *required.entries)}) > 1:
            said = "what is required for this key does not act under the condition that is asked for"
            raise forbidden("required", said, asked) from None
        if caller.rules is not None and asked.phased != required.phased:
            said = "what is required for this key acts at tokens that do not go together with those that are asked for"
            raise forbidden("required", said, asked) from None
        raise


def _broken(asked: Spec, tools: bool, own: KeyRules, registry: Registry, rules: Rules) -> list[tuple[str, str]]:
    """(rule, what is wrong) for each rule that `asked` breaks. Strengths of one version add up, whatever names and
    modes it is asked for by: a limit is not avoided by asking in two halves. Shares of calibrated doses add up over all
    versions, since two files may do the same."""
    limits = rules.limits(registry)
    out: list[tuple[str, str]] = []
    for entry in asked.entries:
        if entry.mode not in own.modes:
            accepted = ", ".join(own.modes) or "none"
            out.append(("mode", f"mode '{entry.mode}' is not allowed for this key; allowed: {accepted}"))
    for digest in dict.fromkeys(entry.digest for entry in asked.entries):
        entries = [entry for entry in asked.entries if entry.digest == digest]
        out += _over(entries, tools, own, "this key")
        for each in limits.get(digest, ()):
            out += [(f"direction_{rule}", said) for rule, said in _over(entries, tools, each, "any key")]
    for probe in {entry.condition for entry in asked.entries if entry.condition}:
        out += [
            ("direction_conditions", f"direction '{probe.direction}': for any key no condition is allowed on it")
            for each in limits.get(probe.digest, ())
            if not each.conditional
        ]
    if own.max_strength == CALIBRATED:
        out += [("max_strength", said) for said in _overdosed(asked.entries, registry)]
    dosed = [
        entry
        for entry in asked.entries
        if any(each.max_strength == CALIBRATED for each in limits.get(entry.digest, ()))
    ]
    if dosed:
        out += [("direction_max_strength", said) for said in _overdosed(dosed, registry)]
    return out


def _overdosed(entries: Sequence[Entry], registry: Registry) -> Iterator[str]:
    """What is wrong where entries together take more than one calibrated dose."""
    doses = [meta.calibrated for meta in registry.metas(Spec(tuple(entries)))]
    if sum(map(_share, entries, doses)) > 1 + ROUNDING:
        asked = ", ".join(f"{e.direction}:{e.mode}{shift_text(e)}={e.strength:g}" for e in entries)
        known = {entry.direction: dose for entry, dose in zip(entries, doses, strict=True)}
        if without := [name for name, dose in known.items() if not dose]:
            listed = " and ".join(f"'{name}'" for name in without)
            yield (
                f"{asked}: no more than a calibrated dose is allowed, and the file of {listed} has none "
                "(`steer eval --calibrate` writes one)"
            )
            return
        said = "; ".join(f"{name}: {_told(dose)}" for name, dose in known.items())
        yield f"{asked} is over what was calibrated: {said}"


def _told(dose: Mapping[Mode, Dose]) -> str:
    return ", ".join(f"{mode} from {low:g} to {high:g}" for mode, (low, high) in dose.items())


def _over(entries: Sequence[Entry], tools: bool, limits: Limits, who: str) -> Iterator[tuple[str, str]]:
    """(rule, what is wrong) for each of `limits` that the entries of one version break together."""
    direction, total = f"direction '{entries[0].direction}'", sum(abs(entry.strength) for entry in entries)
    if not isinstance(limits.max_strength, str) and total > limits.max_strength + ROUNDING:
        yield "max_strength", f"{direction}: strength {total:g} is over the {limits.max_strength:g} that {who} may use"
    for entry in entries:
        yield from ((rule, f"{direction}: for {who} {said}") for rule, said in limits.misplaced(entry))
    if tools and not limits.with_tools:
        yield "with_tools", f"{direction}: for {who} no request that has tools may be steered"


def _share(entry: Entry, dose: Mapping[Mode, Dose]) -> float:
    """How much of its calibrated dose an entry takes; what was not measured, as with a shift, is none."""
    low, high = dose.get(entry.mode, (0.0, 0.0))
    largest = 0.0 if entry.shift else high if entry.strength > 0 else -low
    return abs(entry.strength) / largest if largest else math.inf


def _against(asked: Spec, required: Spec) -> list[tuple[str, str]]:
    """What is required must not be asked for otherwise: that is how one would switch it off or weaken it."""
    kept = {entry.digest: entry for entry in required.entries}
    return [
        ("required", f"direction '{entry.direction}' is required for this key as it is, and cannot be asked for")
        for entry in asked.entries
        if entry.digest in kept and entry not in required.entries
    ]
