"""Authorisation and admission: find the versions that a request asks for and may use, and pin them.

The order: resolve names (a name that the caller may not use counts as unknown); check the kill switch; check the
policy's modes and strengths; add what the key requires. No name moves in the meantime. The key's rates were checked
before.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from steer import readout
from steer.admission import Admission
from steer.direction import Dose
from steer.errors import SpecError
from steer.names import Mode
from steer.readout import RequestedReadout
from steer.registry import Registry
from steer.serve.caller import ANYONE, Caller, Refusal, forbidden
from steer.serve.carriers import FIELD, Carried
from steer.serve.errors import Code, HTTPProblem
from steer.serve.policy import KeyRules, Limits, Policy
from steer.spec import Entry, RequestedDirection, Spec, text


@dataclass(frozen=True, slots=True)
class Rules:
    """What holds for every caller now: the policy in force, and while steering is off what a steered request gets."""

    policy: Policy | None = None
    off: Callable[[Spec], Refusal] | None = None


OPEN = Rules()


def admit(
    carried: Carried,
    registry: Registry,
    default: Sequence[RequestedDirection] = (),
    wanted: RequestedReadout | None = None,
    *,
    readable: int = 0,
    caller: Caller = ANYONE,
    rules: Rules = OPEN,
) -> Admission:
    """Pin what `resolve` gives and what is `wanted` to be read, of an engine that can read `readable` layers.

    Both in one step, so that what is read is the version that steers. Raises what `resolve` raises, and the same for
    what may not or cannot be read.
    """
    if wanted is not None:
        caller.check_readout()
        if not readable:
            raise SpecError(f"{readout.FIELD}: this server offers no read-out", param=readout.FIELD)
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
        asked = (
            _asked(carried, registry, caller) if carried.found else _default(carried, default, registry, caller, rules)
        )
        return _authorised(asked, carried.tools, registry, caller, rules)


def _asked(carried: Carried, registry: Registry, caller: Caller) -> Spec:
    """What the carriers mean."""
    if any(carried.found.values()) and caller.rules is not None and not caller.rules.steer:
        raise forbidden("steer", "this key may not steer: its policy says `steer = false`")
    meanings = {carrier: registry.resolve(wanted, caller.may_use) for carrier, wanted in carried.found.items()}
    if len(set(meanings.values())) > 1:
        said = ", ".join(f"{carrier} says '{text(wanted)}'" for carrier, wanted in carried.found.items())
        raise SpecError(f"the carriers of this request disagree: {said}; send the same in each", param=FIELD)
    return next(iter(meanings.values()))


def _default(
    carried: Carried, default: Sequence[RequestedDirection], registry: Registry, caller: Caller, rules: Rules
) -> Spec:
    """What a request gets that asks for nothing: the key's own default, else the server's, where the key might have
    asked for it. Where tools are the only reason why it may not, nothing."""
    what, code = "the default steering of this request", Code.DEFAULT_UNAVAILABLE
    own = caller.rules
    if own is not None and own.default is not None:
        asked = _operators(own.default, registry, caller, what, code)
        broken = {rule for rule, _ in _broken(asked, carried.tools, own, registry, rules)}
        return Spec() if broken and broken <= {"with_tools", "direction_with_tools"} else asked
    if not all(caller.may_use(item.direction) for item in default):
        return Spec()
    asked = _operators(default, registry, caller, what, code)
    return Spec() if own is not None and _broken(asked, carried.tools, own, registry, rules) else asked


def _operators(wanted: Sequence[RequestedDirection], registry: Registry, caller: Caller, what: str, code: Code) -> Spec:
    """What the operator wants for this request. Who asks with a key is not told why it is not there now: the reason may
    name what this key may not know."""
    try:
        return registry.resolve(wanted)
    except SpecError as error:
        why = f": {error}" if caller.rules is None else " now"
        raise HTTPProblem(code, f"{what} cannot be applied{why}") from None


def _authorised(asked: Spec, tools: bool, registry: Registry, caller: Caller, rules: Rules) -> Spec:
    """What is to be applied where `asked` is asked for."""
    what, code = "steering that is required for this key", Code.REQUIRED_UNAVAILABLE
    required = _operators(caller.required, registry, caller, what, code)
    if rules.off is not None:
        refuses = rules.policy is None or rules.policy.required_when_off == "refuse"
        if asked or (required and refuses):
            raise rules.off(asked)
        required = Spec()
    if caller.rules is not None and asked:
        broken = _broken(asked, tools, caller.rules, registry, rules) + _against(asked, required)
        if broken:
            raise forbidden(broken[0][0], "; ".join(said for _, said in broken), asked)
    return registry.merge(asked, required)


def _broken(asked: Spec, tools: bool, own: KeyRules, registry: Registry, rules: Rules) -> list[tuple[str, str]]:
    """(rule, what is wrong) for each rule that `asked` breaks. Strengths of one version add up, whatever names and
    modes it is asked for by: a limit is not avoided by asking in two halves."""
    limits = rules.policy.directions if rules.policy else {}
    names = registry.digests()
    out: list[tuple[str, str]] = []
    for entry in asked.entries:
        if entry.mode not in own.modes:
            accepted = ", ".join(own.modes) or "none"
            out.append(("mode", f"mode '{entry.mode}' is not allowed for this key; allowed: {accepted}"))
    for digest, entries in _by_digest(asked).items():
        out += _over(entries, tools, own, registry, "this key")
        out += [
            (f"direction_{rule}", said)
            for name, each in limits.items()
            if names.get(name) == digest
            for rule, said in _over(entries, tools, each, registry, "any key")
        ]
    return out


def _over(
    entries: Sequence[Entry], tools: bool, limits: Limits, registry: Registry, who: str
) -> Iterator[tuple[str, str]]:
    """(rule, what is wrong) for each of `limits` that the entries of one version break together."""
    direction, total = f"direction '{entries[0].direction}'", sum(abs(entry.strength) for entry in entries)
    if isinstance(limits.max_strength, str):
        dose = registry.metas(Spec((entries[0],)))[0].calibrated
        if sum(_share(entry, dose) for entry in entries) > 1 + 1e-9:
            known = ", ".join(f"{mode} from {low:g} to {high:g}" for mode, (low, high) in dose.items())
            said = ", ".join(f"{entry.mode}={entry.strength:g}" for entry in entries)
            yield "max_strength", f"{direction}: {said} is over what its file is calibrated for: {known or 'nothing'}"
    elif total > limits.max_strength:
        yield "max_strength", f"{direction}: strength {total:g} is over the {limits.max_strength:g} that {who} may use"
    for entry in entries if limits.tokens is not None or limits.layers is not None else ():
        yield from ((rule, f"{direction}: for {who} {said}") for rule, said in limits.misplaced(entry))
    if tools and not limits.with_tools:
        yield "with_tools", f"{direction}: for {who} no request that has tools may be steered"


def _share(entry: Entry, dose: Mapping[Mode, Dose]) -> float:
    """How much of its calibrated dose an entry takes; what was not measured is none."""
    low, high = dose.get(entry.mode, (0.0, 0.0))
    largest = high if entry.strength > 0 else -low
    return abs(entry.strength) / largest if largest else math.inf


def _against(asked: Spec, required: Spec) -> list[tuple[str, str]]:
    """What is required must not be asked for otherwise: that is how one would switch it off or weaken it."""
    kept = {entry.digest: entry for entry in required.entries}
    return [
        ("required", f"direction '{entry.direction}' is required for this key as it is, and cannot be asked for")
        for entry in asked.entries
        if entry.digest in kept and entry not in required.entries
    ]


def _by_digest(spec: Spec) -> dict[str, list[Entry]]:
    out: dict[str, list[Entry]] = {}
    for entry in spec.entries:
        out.setdefault(entry.digest, []).append(entry)
    return out
