"""Steer: serve one language model plain or with a behaviour direction removed, chosen per request.

with steer.attach(model, refusal="directions/refusal.safetensors") as steering:
    plain = model.generate(**inputs)
    with steering("refusal"):
        steered = model.generate(**inputs)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from steer._version import __version__
from steer.direction import Direction, DirectionMeta
from steer.errors import SteerError

if TYPE_CHECKING:
    from steer.hf.api import Attached


def attach(model: Any, **options: Any) -> Attached:
    """Steer a loaded transformers model outside any server. See `steer.hf.api.Attached`."""
    from steer.hf.api import Attached

    return Attached(model, **options)


__all__ = ["Direction", "DirectionMeta", "SteerError", "__version__", "attach"]
