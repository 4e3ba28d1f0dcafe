"""A `Placement` (see `steer.registry`) on all workers of a vLLM engine: bytes go out, digests come back."""

from __future__ import annotations

import time

from steer.direction import Direction
from steer.errors import EngineFailed, NoRoom
from steer.runtime.placement import Shape, ShapedPlacement
from steer.vllm.internals.types import Call

#: Seconds in which requests that have ended here leave the workers, and between two looks.
ENDING, PAUSE = 2.0, 0.02


class VllmPlacement(ShapedPlacement):
    """`unload` only marks rows on the workers, which take them when they need them. Marks travel with the next load: an
    unload comes from wherever a request ends, where nothing may wait for the workers."""

    def __init__(self, shape: Shape, call: Call) -> None:
        super().__init__(shape)
        self.call = call
        self._unloaded: list[str] = []

    def load(self, digest: str, direction: Direction, data: bytes) -> None:
        """Raises NoRoom or EngineFailed unless every worker has answered with this digest, or what a call raises; those
        that have it are then told to let it go."""
        while self._unloaded:
            self.call("steer_unload", self._unloaded[0])
            del self._unloaded[0]
        deadline = time.monotonic() + ENDING
        while True:
            try:
                answers = self.call("steer_load", data, digest)
            except BaseException:
                self._unloaded.append(digest)  # with the next load: now the workers may not answer
                raise
            if answers and all(answer == {"digest": digest} for answer in answers):
                return
            self._unloaded.append(digest)
            self.call("steer_unload", digest)
            self._unloaded.remove(digest)
            if not any("in_use" in answer for answer in answers) or time.monotonic() > deadline:
                break
            time.sleep(PAUSE)
        problems = sorted({_problem(answer) for answer in answers if answer != {"digest": digest}})
        if any("no_room" in answer or "in_use" in answer for answer in answers):
            raise NoRoom("; ".join(problems))
        raise EngineFailed(f"the workers did not all load the direction {digest[:12]}: {'; '.join(problems)}")

    def unload(self, digest: str) -> None:
        self._unloaded.append(digest)


def _problem(answer: dict[str, object]) -> str:
    known = [answer[kind] for kind in ("no_room", "in_use", "error") if kind in answer]
    return str(known[0]) if known else f"the digest {answer.get('digest')}"
