"""Every error that Steer raises on purpose, in one small tree.

SteerError
├── InvalidInput (ValueError)     the caller's input breaks a rule; `problems` lists every broken one
│   ├── DegenerateError           vectors that define no direction (zero, equal, antipodal, not finite)
│   ├── DirectionError            a direction file or its name is not acceptable
│   ├── SpecError                 the `steer` part of a request is not acceptable
│   └── RequestError              another part of a request is not acceptable
├── UnknownDirection (SpecError)  a request names a direction that is not served
├── UnsupportedModel              a model's layers or sites cannot be claimed, so nothing starts
│   └── hf.proof.Unproved         its answers in the transformers engine are not those of `generate`
├── hf.internals.CannotBatch      transformers cannot batch the model: it is served one request at a time
├── NoRoom                        no free rows (a load) or no free queue place (a request) right now
├── RequestFailed                 one admitted request cannot be answered; the engine and all others go on
│   └── NotFinite                 steering would have taken its stream out of the range of the model's dtype
└── EngineFailed                  the engine died under a request that was admitted
"""

from __future__ import annotations

from collections.abc import Iterable

#: Of one input, those that are told; and the characters of one. An input may be as large as it likes.
MAX_PROBLEMS = 50
MAX_PROBLEM = 1000


def printable(text: str) -> str:
    """`text` for a log, an answer or a terminal: no longer than MAX_PROBLEM, and without what is no text there: control
    characters, and halves of surrogate pairs, which JSON can carry and no answer could."""
    if len(text) > MAX_PROBLEM:
        text = f"{text[:MAX_PROBLEM]}… ({len(text)} characters)"
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class SteerError(Exception):
    """Root of the tree."""


class InvalidInput(SteerError, ValueError):
    """Input that breaks rules: all of them are in `problems`, joined in the message.

    `param` names the field of a request or file that is at fault, if there is one.
    """

    def __init__(self, problems: str | Iterable[str], param: str | None = None) -> None:
        each = (problems,) if isinstance(problems, str) else tuple(problems)
        more = [f"and {len(each) - MAX_PROBLEMS} more"] if len(each) > MAX_PROBLEMS else []
        self.problems: tuple[str, ...] = (*map(printable, each[:MAX_PROBLEMS]), *more)
        self.param = param
        super().__init__("; ".join(self.problems))


class DegenerateError(InvalidInput):
    """Vectors that define no direction."""


class DirectionError(InvalidInput):
    """A direction file, or the name it is to be served under, is not acceptable."""


class SpecError(InvalidInput):
    """The `steer` part of a request is not acceptable."""


class RequestError(InvalidInput):
    """A part of a request other than `steer` is not acceptable."""


class UnknownDirection(SpecError):
    """A request names a direction that is not served."""


class UnsupportedModel(SteerError):
    """The model's layers or sites cannot be claimed and verified."""


class NoRoom(SteerError):
    """A bounded resource (table rows, the request queue) is full at this moment."""

    def __init__(self, message: str, retry_after: float = 1.0) -> None:
        self.retry_after = retry_after
        super().__init__(message)


class RequestFailed(SteerError):
    """One admitted request cannot be answered; the engine goes on, and so does every other request."""


class NotFinite(RequestFailed):
    """Steering would have taken a request's residual stream out of the range of the model's numbers."""

    def __init__(self, where: str = "") -> None:
        super().__init__(
            f"{where and where + ': '}steering would have taken the residual stream out of the range of the model's "
            "numbers, so there is no answer: ask for less strength, or load the model in a dtype of more range "
            "(bfloat16, float32)"
        )


class EngineFailed(SteerError):
    """The engine failed while it served an admitted request."""
