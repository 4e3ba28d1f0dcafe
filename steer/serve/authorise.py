"""Authorise a request: who calls, what keys and policy forbid, and which versions of directions the request pins.

The order: resolve names (a name that the caller may not use counts as unknown), check the kill switch, check what the
policy allows, add what the key requires. No name moves to another version meanwhile. The key's rates have been checked
before.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from steer import readout
from steer.direction import Dose
from steer.errors import SpecError
from steer.names import MAX_SHIFT, Mode
from steer.readout import RequestedReadout
from steer.registry import Admission, Registry, norms
from steer.serve.carriers import FIELD, Carried
from steer.serve.errors import Code, HTTPProblem
from steer.serve.policy import ANY, CALIBRATED, ROUNDING, KeyRules, Limits, Policy
from steer.spec import Entry, RequestedDirection, Spec, text, variant

#: Where `Access` leaves the caller in an ASGI scope.
CALLER = "steer.caller"
#: The rule that a request breaks, and a message that says how.
Violation: TypeAlias = tuple[str, str]


class Refusal(HTTPProblem):
    """Keys or policy forbid the request. `rule` names the rule, `asked` is the requested spec if it is known."""

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


#: The rules of every caller where no policy is in force.
EVERYTHING = KeyRules.model_construct(
    hash="", directions=(ANY,), max_shift=MAX_SHIFT, manage=True, readout=True, forms=True, metrics=True
)


@dataclass(frozen=True, slots=True)
class Caller:
    """Who makes a request, and what they may do."""

    name: str | None = None
    rules: KeyRules = EVERYTHING
    #: The hash of the secret that was sent, as the policy stores it.
    stored: str | None = None

    @property
    def manages(self) -> bool:
        return self.rules.manage

    def may_use(self, direction: str) -> bool:
        return self.rules.steer and self.rules.allows(direction)

    def may_know(self, direction: str) -> bool:
        """Whether the caller may learn that this direction exists."""
        return self.manages or self.may_use(direction)

    def check_readout(self) -> None:
        """Raises Refusal for a caller that may not read components along directions."""
        if not self.rules.readout:
            message = f"this key may not use {readout.FIELD}: its policy does not say `readout = true`"
            raise forbidden("readout", message, param=readout.FIELD)


#: The caller where no policy is in force.
ANYONE = Caller()
#: A caller without a key, on a path that needs none.
NOBODY = Caller(None, KeyRules.model_construct(hash="", steer=False))


@dataclass(frozen=True, slots=True)
class Rules:
    """What holds for every caller now: the policy in force, and while steering is off the error of a steered
    request."""

    policy: Policy | None = None
    off: Callable[[Spec], Refusal] | None = None

    def limits(self, registry: Registry) -> Mapping[str, Mapping[str, Limits]]:
        """The policy's limits on single directions, by the digest of the version and the name in the policy: a limit on
        one name of a version holds for its other names too."""
        digests = registry.digests()
        found: dict[str, dict[str, Limits]] = {}
        for name, limits in self.policy.directions.items() if self.policy else ():
            if name in digests:
                found.setdefault(digests[name], {})[name] = limits
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
    """Resolve the spec and the read-out of a request and pin their versions, in one step: so the version that is read
    is the one that steers.

    Args:
        wanted: the requested read-out.
        readable: how many layers the engine can read.
        unreadable: why it can read none.

    Raises:
        what `resolve` raises, and the same for a read-out that is not allowed or not possible.
    """
    if wanted is not None:
        caller.check_readout()
        if not readable:
            raise SpecError(f"{readout.FIELD}: {unreadable}", param=readout.FIELD)
    with registry.steady():
        spec = resolve(carried, registry, default, caller=caller, rules=rules)
        read = None if wanted is None else registry.resolve_readout(wanted, spec, readable, caller.may_use)
        return Admission(registry, spec, read)


def resolve(
    carried: Carried,
    registry: Registry,
    default: Sequence[RequestedDirection] = (),
    *,
    caller: Caller = ANYONE,
    rules: Rules = OPEN,
) -> Spec:
    """The spec to apply: what the carriers agree on, or `default` if there is no carrier, with what the key requires.

    Two carriers agree if they mean the same entries, however they are written. Raises SpecError for a spec that cannot
    be resolved, Refusal for a forbidden one, HTTPProblem (503) if the operator's own steering cannot be applied.
    """
    with registry.steady():  # or a swap between two carriers would look like a conflict
        asked = _asked(carried, registry, caller) if carried.found else _default(default, registry, caller)
        return _authorised(asked, carried, registry, caller, rules)


def _asked(carried: Carried, registry: Registry, caller: Caller) -> Spec:
    """The spec that the carriers ask for."""
    if any(carried.found.values()) and not caller.rules.steer:
        raise forbidden("steer", "this key may not steer: its policy says `steer = false`")
    meanings = {carrier: registry.resolve(wanted, caller.may_use) for carrier, wanted in carried.found.items()}
    if len(set(meanings.values())) > 1:
        each = ", ".join(f"{carrier} says '{text(wanted)}'" for carrier, wanted in carried.found.items())
        raise SpecError(f"the carriers of this request disagree: {each}; send the same in each", param=FIELD)
    return next(iter(meanings.values()))


def _default(default: Sequence[RequestedDirection], registry: Registry, caller: Caller) -> Spec:
    """The default of a request without a carrier: the key's own, or else the server's; plain if the caller may not use
    one of its directions."""
    if caller.rules.default is not None:
        default = caller.rules.default
    if not all(caller.may_use(name) for item in default for name in item.names):
        return Spec()
    return _configured(default, registry, caller, "the default steering of this request", Code.DEFAULT_UNAVAILABLE)


def _configured(
    wanted: Sequence[RequestedDirection], registry: Registry, caller: Caller, what: str, code: Code
) -> Spec:
    """Resolve steering that the operator has configured. If that fails, a caller with a key is not told why: the reason
    may name a direction that this key may not know."""
    try:
        return registry.resolve(wanted)
    except SpecError as error:
        reason = f": {error}" if caller.rules is EVERYTHING else " now"
        raise HTTPProblem(code, f"{what} cannot be applied{reason}") from None


def _authorised(asked: Spec, carried: Carried, registry: Registry, caller: Caller, rules: Rules) -> Spec:
    """The spec to apply where `asked` is asked for. A default that a rule forbids is left out, since the request did
    not ask for it."""
    what, code = "steering that is required for this key", Code.REQUIRED_UNAVAILABLE
    required = _configured(caller.rules.required, registry, caller, what, code)
    violations: list[Violation] = []
    if caller.rules is not EVERYTHING and asked:
        violations = _violations(asked, carried.tools, caller.rules, registry, rules)
        violations += _changes_of_required(asked, required)
        if violations and not carried.found:
            asked, violations = Spec(), []
    if rules.off is not None:
        refuses = rules.policy is None or rules.policy.required_when_off == "refuse"
        if asked or (required and refuses):
            raise rules.off(asked)
        required = Spec()
    if violations:
        raise forbidden(violations[0][0], "; ".join(message for _, message in violations), asked)
    try:
        return registry.merge(asked, required)
    except SpecError:
        if not carried.found:
            return required  # nobody asked for the default
        if len({e.condition for e in (*asked.entries, *required.entries)}) > 1:
            message = "what is required for this key does not act under the condition that is asked for"
            raise forbidden("required", message, asked) from None
        if asked.phased != required.phased:
            message = "what is required for this key acts at tokens that do not go together with those asked for"
            raise forbidden("required", message, asked) from None
        if len(norms((*asked.entries, *required.entries))) > 1:
            kept = "keeps the norm, and so must" if True in norms(required.entries) else "keeps no norm, nor may"
            message = f"what is required for this key {kept} what is asked for ('norm_preserving', or `refusal:norm`)"
            raise forbidden("required", message, asked) from None
        raise


def _violations(asked: Spec, tools: bool, own: KeyRules, registry: Registry, rules: Rules) -> list[Violation]:
    """Every rule that `asked` breaks.

    The strengths of one version add up over all names and modes, so that a limit cannot be avoided by asking in two
    halves. Shares of calibrated doses add up over all versions, since two files may have the same effect.
    """
    limits = rules.limits(registry)
    out: list[Violation] = []
    for entry in asked.entries:
        if entry.mode not in own.modes:
            accepted = ", ".join(own.modes) or "none"
            out.append(("mode", f"mode '{entry.mode}' is not allowed for this key; allowed: {accepted}"))
    for digest in dict.fromkeys(entry.digest for entry in asked.entries):
        entries = [entry for entry in asked.entries if entry.digest == digest]
        out += _exceeded(entries, tools, own, "this key")
        for name, each in limits.get(digest, {}).items():
            who = (
                "any key"
                if name in {e.direction for e in entries}
                else "any key (by a rule on another name of the file)"
            )
            out += [(f"direction_{rule}", message) for rule, message in _exceeded(entries, tools, each, who)]
    for probe in {entry.condition for entry in asked.entries if entry.condition}:
        out += [
            ("direction_conditions", f"direction '{probe.direction}': for any key no condition is allowed on it")
            for each in limits.get(probe.digest, {}).values()
            if not each.conditional
        ]
    if own.max_strength == CALIBRATED:
        out += [("max_strength", message) for message in _overdosed(asked.entries, registry)]
    dosed = [
        entry
        for entry in asked.entries
        if any(each.max_strength == CALIBRATED for each in limits.get(entry.digest, {}).values())
    ]
    if dosed:
        out += [("direction_max_strength", message) for message in _overdosed(dosed, registry)]
    return out


def _overdosed(entries: Sequence[Entry], registry: Registry) -> Iterator[str]:
    """A message if the entries take more than one calibrated dose together."""
    if unmeasured := [entry for entry in entries if variant(entry)]:
        yield (
            f"{text(unmeasured)}: doses are calibrated without a shift and without the norm kept, so no strength of it "
            "is allowed"
        )
        return
    doses = [meta.calibrated for meta in registry.metas(Spec(tuple(entries)))]
    if sum(map(_share, entries, doses)) > 1 + ROUNDING:
        asked = ", ".join(f"{e.direction}:{e.mode}={e.strength:g}" for e in entries)
        by_name = {entry.direction: dose for entry, dose in zip(entries, doses, strict=True)}
        if without := [name for name, dose in by_name.items() if not dose]:
            listed = " and ".join(f"'{name}'" for name in without)
            yield (
                f"{asked}: no more than a calibrated dose is allowed, and the file of {listed} has none "
                "(`steer eval --calibrate` writes one)"
            )
            return
        allowed = "; ".join(f"{name}: {_dose_text(dose)}" for name, dose in by_name.items())
        yield f"{asked} is over what was calibrated: {allowed}"


def _dose_text(dose: Mapping[Mode, Dose]) -> str:
    return ", ".join(f"{mode} from {low:g} to {high:g}" for mode, (low, high) in dose.items())


def _exceeded(entries: Sequence[Entry], tools: bool, limits: Limits, who: str) -> Iterator[Violation]:
    """The limits that the entries of one version break together."""
    direction, total = f"direction '{entries[0].direction}'", sum(abs(entry.strength) for entry in entries)
    if not isinstance(limits.max_strength, str) and total > limits.max_strength + ROUNDING:
        asked = " and ".join(f"{entry.strength:g}" for entry in entries)
        size = f"{total:g}" if asked == f"{total:g}" else f"{total:g} (the size of {asked})"
        yield "max_strength", f"{direction}: strength {size} is over the {limits.max_strength:g} that {who} may use"
    for entry in entries:
        yield from ((rule, f"{direction}: for {who} {message}") for rule, message in limits.misplaced(entry))
    if tools and not limits.with_tools:
        yield "with_tools", f"{direction}: for {who} no request that has tools may be steered"


def _share(entry: Entry, dose: Mapping[Mode, Dose]) -> float:
    """The share of its calibrated dose that an entry takes; infinite in a mode that was not measured."""
    low, high = dose.get(entry.mode, (0.0, 0.0))
    largest = high if entry.strength > 0 else -low
    return abs(entry.strength) / largest if largest else math.inf


def _changes_of_required(asked: Spec, required: Spec) -> list[Violation]:
    """Entries that ask for a required direction in another way, which could weaken it or switch it off."""
    kept = {entry.digest: entry for entry in required.entries}
    return [
        ("required", f"direction '{entry.direction}' is required for this key as it is, and cannot be asked for")
        for entry in asked.entries
        if entry.digest in kept and entry not in required.entries
    ]
