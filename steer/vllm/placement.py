"""A `Placement` (see `steer.registry`) on all workers of a vLLM engine: bytes go out, digests come back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from steer.direction import Direction
from steer.errors import EngineFailed, NoRoom
from steer.runtime.placement import Shape, ShapedPlacement

#: Calls a method on every worker of every engine and waits for their answers.
Call = Callable[..., list[Any]]


class VllmPlacement(ShapedPlacement):
    """`unload` only marks rows on the workers, which take them when they need them. Marks travel with the next load: an
    unload comes from wherever a request ends, where nothing may wait for the workers."""

    def __init__(self, shape: Shape, call: Call) -> None:
        super().__init__(shape)
        self.call = call
        self._unloaded: list[str] = []

    def load(self, digest: str, direction: Direction, data: bytes) -> None:
        """Raises NoRoom or EngineFailed unless every worker has answered with this digest; those that have it are then
        told to let it go."""
        while self._unloaded:
            self.call("steer_unload", self._unloaded[0])
            del self._unloaded[0]
        answers = self.call("steer_load", data, digest)
        if answers and all(answer == {"digest": digest} for answer in answers):
            return
        self.call("steer_unload", digest)
        problems = sorted({str(a.get("no_room") or a.get("error") or f"the digest {a.get('digest')}") for a in answers})
        if any("no_room" in answer for answer in answers):
            raise NoRoom(problems[0])
        raise EngineFailed(f"the workers did not all load the direction {digest[:12]}: {'; '.join(problems)}")

    def unload(self, digest: str) -> None:
        self._unloaded.append(digest)
