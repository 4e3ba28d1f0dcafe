"""The caller of a request, and the errors that it gets when keys or policy forbid something."""

from __future__ import annotations

from dataclasses import dataclass

from steer.readout import FIELD
from steer.serve.errors import Code, HTTPProblem
from steer.serve.policy import KeyRules
from steer.spec import RequestedDirection, Spec

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
            said = f"this key may not use {FIELD}: its policy does not say `readout = true`"
            raise forbidden("readout", said, param=FIELD)


#: No policy is in force.
ANYONE = Caller()
#: One who came without a key, on a path that needs none.
NOBODY = Caller(None, KeyRules.model_construct(hash="", steer=False))
