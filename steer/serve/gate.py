"""The rules of a policy, asked of one request between its wish and its admission.

What a key may not use is not resolved at all; then come the kill switch, modes and strengths, and what is required of
the key. Its rates have been asked before.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from steer.errors import SpecError
from steer.registry import Registry
from steer.serve import carriers, errors
from steer.serve.access import Caller, forbidden
from steer.serve.policy import KeyRules
from steer.spec import Entry, Spec, Wanted

if TYPE_CHECKING:
    from steer.serve.control import Control


class PolicyGate(carriers.Gate):
    """The rules of one caller, asked while no name can move."""

    def __init__(self, control: Control, caller: Caller) -> None:
        self.control, self.caller = control, caller

    def may_use(self, direction: str) -> bool:
        return self.caller.may_use(direction)

    def asks(self) -> None:
        if self.caller.rules is not None and not self.caller.rules.steer:
            raise forbidden("steer", "this key may not steer: its policy says `steer = false`")

    def default(self, default: Sequence[Wanted], registry: Registry) -> Spec:
        """The key's own default; else the server's, where the key might have asked for it."""
        rules = self.caller.rules
        if rules is not None and rules.default is not None:
            return self._resolved(
                rules.default, registry, "the default steering of this request", code="default_unavailable"
            )
        if not all(self.caller.may_use(item.direction) for item in default):
            return Spec()
        asked = self._resolved(default, registry, "the default steering of this request", code="default_unavailable")
        return Spec() if rules is not None and self._broken(asked, rules, registry) else asked

    def _resolved(self, wanted: Sequence[Wanted], registry: Registry, what: str, code: str) -> Spec:
        """What the operator wants for this request. Who asks with a key is not told why it is not there now: the reason
        may name what this key may not know."""
        try:
            return registry.resolve(wanted)
        except SpecError as error:
            why = f": {error}" if self.caller.rules is None else " now"
            raise errors.HTTPProblem(503, f"{what} cannot be applied{why}", code=code) from None

    def passed(self, asked: Spec, registry: Registry) -> Spec:
        control, rules = self.control, self.caller.rules
        required = self._required(registry)
        if not control.steering:
            if asked or (required and self._refuses_when_off()):
                raise control.off(asked)
            required = Spec()
        if rules is not None and asked:
            broken = self._broken(asked, rules, registry)
            broken += self._against(asked, required)
            if broken:
                raise forbidden(broken[0][0], "; ".join(said for _, said in broken), asked)
        return registry.merge(asked, required)

    def _required(self, registry: Registry) -> Spec:
        return self._resolved(
            self.caller.required, registry, "steering that is required for this key", code="required_unavailable"
        )

    def _refuses_when_off(self) -> bool:
        force = self.control.in_force
        return force is None or force.policy.required_when_off == "refuse"

    def _broken(self, asked: Spec, rules: KeyRules, registry: Registry) -> list[tuple[str, str]]:
        """(rule, what is wrong) for each rule that `asked` breaks. Strengths of one version add up, whatever names and
        modes it is asked for by: a limit is not avoided by asking in two halves."""
        force = self.control.in_force
        limits = force.policy.directions if force else {}
        names = registry.digests()
        out: list[tuple[str, str]] = []
        for entry in asked.entries:
            if entry.mode not in rules.modes:
                accepted = ", ".join(rules.modes) or "none"
                out.append(("mode", f"mode '{entry.mode}' is not allowed for this key; allowed: {accepted}"))
        for digest, entries in _by_digest(asked).items():
            total = sum(abs(entry.strength) for entry in entries)
            shown = f"direction '{entries[0].direction}': strength {total:g}"
            if total > rules.max_strength:
                out.append(("max_strength", f"{shown} is over the {rules.max_strength:g} that this key may use"))
            largest = min((r.max_strength for n, r in limits.items() if names.get(n) == digest), default=math.inf)
            if total > largest:
                out.append(("direction_max_strength", f"{shown} is over the {largest:g} that any key may use"))
        return out

    def _against(self, asked: Spec, required: Spec) -> list[tuple[str, str]]:
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
