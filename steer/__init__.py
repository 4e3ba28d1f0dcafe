"""Steer: serve one language model plain or with a behaviour direction removed, chosen per request.

steering = steer.attach(model, {"refusal": "directions/refusal.safetensors"})
plain = model.generate(**inputs)
with steering("refusal"):
    steered = model.generate(**inputs)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from steer._version import __version__
from steer.errors import SteerError

if TYPE_CHECKING:
    from steer.direction import Direction, DirectionMeta
    from steer.hf.api import attach

__all__ = ["Direction", "DirectionMeta", "SteerError", "__version__", "attach"]

_HOME = {"Direction": "steer.direction", "DirectionMeta": "steer.direction", "attach": "steer.hf.api"}
_COMMANDS = ("bake", "convert", "derive", "eval", "evaluate", "fit", "measure", "search")


def __getattr__(name: str) -> object:
    """Import what needs torch only when it is used: importing torch takes seconds, and `steer --help` does not need
    it."""
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    of_lab = "; it is a command of `steer`, made of what is in steer.lab" if name in _COMMANDS else ""
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}{of_lab}")


def __dir__() -> list[str]:
    return sorted(__all__)
