"""A `Placement` (see `steer.registry`) on all workers of a vLLM engine: bytes go out, digests come back."""

from __future__ import annotations

import threading
import time

from steer.direction import Direction
from steer.errors import DirectionError, EngineFailed, NoRoom
from steer.shape import Shape
from steer.shared import Shared
from steer.vllm.internals.types import Call

#: Seconds in which requests that have ended here leave the workers, in which other front ends let go of what they have
#: deleted, and between two looks.
ENDING, LETTING_GO, PAUSE = 2.0, 10.0, 0.02


class VllmPlacement:
    """`unload` only marks rows on the workers, which take them when they need them. Marks travel with the next load, or
    `flush`: an unload comes from wherever a request ends, where nothing may wait for the workers."""

    def __init__(self, shape: Shape, call: Call) -> None:
        self.shape, self.call = shape, call
        #: By which the workers know this front end, and what it has in common with others.
        self.front_end, self.shared = "", Shared()
        self._unloaded: list[str] = []
        self._calling = threading.Lock()  # what goes out for one digest keeps its order

    def load(self, digest: str, direction: Direction, data: bytes) -> None:
        """Raises NoRoom, DirectionError or EngineFailed unless every worker has answered with this digest, or what a
        call raises; those that have it are then told to let it go."""
        alone = self.shared.count == 1
        deadline = time.monotonic() + (ENDING if alone else LETTING_GO)
        asked = alone
        while True:
            with self._calling:
                self._flush()
                try:
                    answers = self.call("steer_load", data, digest, self.front_end)
                except BaseException:
                    self._unloaded.append(digest)  # with the next load: now the workers may not answer
                    raise
                if answers and all(answer == {"digest": digest} for answer in answers):
                    return
                self._unloaded.append(digest)
                self._flush()
            if not any("in_use" in answer for answer in answers) or time.monotonic() > deadline:
                break
            if not asked:
                self.shared.ask()  # all let go of what they have deleted
                asked = True
            time.sleep(PAUSE)
        problems = sorted({_problem(answer) for answer in answers if answer != {"digest": digest}})
        if any("no_room" in answer or "in_use" in answer for answer in answers):
            raise NoRoom("; ".join(problems))
        if any("refused" in answer for answer in answers):
            raise DirectionError(problems)
        raise EngineFailed(f"the workers did not all load the direction {digest[:12]}: {'; '.join(problems)}")

    def unload(self, digest: str) -> None:
        self._unloaded.append(digest)

    def flush(self) -> None:
        """Tell the workers of what was unloaded. Waits for them."""
        if self._unloaded:
            with self._calling:
                self._flush()

    def _flush(self) -> None:
        while self._unloaded:
            self.call("steer_unload", self._unloaded[0], self.front_end)
            del self._unloaded[0]


def _problem(answer: dict[str, object]) -> str:
    known = [answer[kind] for kind in ("no_room", "in_use", "refused", "error") if kind in answer]
    return str(known[0]) if known else f"the digest {answer.get('digest')}"
