"""Authorisation and admission: what a request asks for becomes the versions that it may have, and these are pinned.

In order: names are resolved, those that the caller may not use not at all; the kill switch; the policy's modes and
strengths; what is required of the key is added. Nothing moves a name meanwhile. The key's rates have been asked before.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from steer import readout
from steer.admission import Admission
from steer.errors import SpecError
from steer.readout import RequestedReadout
from steer.registry import Registry
from steer.serve.caller import ANYONE, Caller, Refusal, forbidden
from steer.serve.carriers import FIELD, Carried
from steer.serve.errors import Code, HTTPProblem
from steer.serve.policy import KeyRules, Policy
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
        asked = _asked(carried, registry, caller) if carried.found else _default(default, registry, caller, rules)
        return _authorised(asked, registry, caller, rules)


def _asked(carried: Carried, registry: Registry, caller: Caller) -> Spec:
    """What the carriers mean."""
    if any(carried.found.values()) and caller.rules is not None and not caller.rules.steer:
        raise forbidden("steer", "this key may not steer: its policy says `steer = false`")
    meanings = {carrier: registry.resolve(wanted, caller.may_use) for carrier, wanted in carried.found.items()}
    if len(set(meanings.values())) > 1:
        said = ", ".join(f"{carrier} says '{text(wanted)}'" for carrier, wanted in carried.found.items())
        raise SpecError(f"the carriers of this request disagree: {said}; use one of them, or say the same", param=FIELD)
    return next(iter(meanings.values()))


def _default(default: Sequence[RequestedDirection], registry: Registry, caller: Caller, rules: Rules) -> Spec:
    """What a request gets that asks for nothing: the key's own default, else the server's, where the key might have
    asked for it."""
    what, code = "the default steering of this request", Code.DEFAULT_UNAVAILABLE
    own = caller.rules
    if own is not None and own.default is not None:
        return _operators(own.default, registry, caller, what, code)
    if not all(caller.may_use(item.direction) for item in default):
        return Spec()
    asked = _operators(default, registry, caller, what, code)
    return Spec() if own is not None and _broken(asked, own, registry, rules) else asked


def _operators(wanted: Sequence[RequestedDirection], registry: Registry, caller: Caller, what: str, code: Code) -> Spec:
    """What the operator wants for this request. Who asks with a key is not told why it is not there now: the reason may
    name what this key may not know."""
    try:
        return registry.resolve(wanted)
    except SpecError as error:
        why = f": {error}" if caller.rules is None else " now"
        raise HTTPProblem(code, f"{what} cannot be applied{why}") from None


def _authorised(asked: Spec, registry: Registry, caller: Caller, rules: Rules) -> Spec:
    """What is to be applied where `asked` is asked for."""
    what, code = "steering that is required for this key", Code.REQUIRED_UNAVAILABLE
    required = _operators(caller.required, registry, caller, what, code)
    if rules.off is not None:
        refuses = rules.policy is None or rules.policy.required_when_off == "refuse"
        if asked or (required and refuses):
            raise rules.off(asked)
        required = Spec()
    if caller.rules is not None and asked:
        broken = _broken(asked, caller.rules, registry, rules) + _against(asked, required)
        if broken:
            raise forbidden(broken[0][0], "; ".join(said for _, said in broken), asked)
    return registry.merge(asked, required)


def _broken(asked: Spec, own: KeyRules, registry: Registry, rules: Rules) -> list[tuple[str, str]]:
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
        total = sum(abs(entry.strength) for entry in entries)
        shown = f"direction '{entries[0].direction}': strength {total:g}"
        if total > own.max_strength:
            out.append(("max_strength", f"{shown} is over the {own.max_strength:g} that this key may use"))
        largest = min((r.max_strength for n, r in limits.items() if names.get(n) == digest), default=math.inf)
        if total > largest:
            out.append(("direction_max_strength", f"{shown} is over the {largest:g} that any key may use"))
    return out


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
