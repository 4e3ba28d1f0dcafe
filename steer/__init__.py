"""Steer: serve one language model plain or with a behaviour direction removed, chosen per request.

steering = steer.attach(model, {"refusal": "directions/refusal.safetensors"})
plain = model.generate(**inputs)
with steering("refusal"):
    steered = model.generate(**inputs)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from steer._version import __version__
from steer.direction import Direction, DirectionMeta
from steer.errors import SteerError

if TYPE_CHECKING:
    from steer.hf.api import attach

__all__ = ["Direction", "DirectionMeta", "SteerError", "__version__", "attach"]


def __getattr__(name: str) -> object:
    """`attach`, when it is asked for: what it imports would be a server's and a command's cost too."""
    if name == "attach":
        from steer.hf.api import attach

        return attach
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
