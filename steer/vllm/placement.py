"""A `Placement` (see `steer.registry`) on all workers of a vLLM engine: they get the bytes and answer with the
digest."""

from __future__ import annotations

import threading
import time

from steer.direction import Direction
from steer.errors import DirectionError, EngineFailed, NoRoom
from steer.shape import Shape
from steer.shared import Shared
from steer.vllm.internals.types import Call

#: Seconds to wait until ended requests have left the workers; until other front ends have released deleted directions;
#: and between two tries.
END_TIMEOUT, RELEASE_TIMEOUT, PAUSE = 2.0, 10.0, 0.02


class VllmPlacement:
    """Places versions on all workers. `unload` only marks rows, which the workers reuse when they need them. The marks
    are sent with the next load or `flush`: an unload happens where requests end, which must not wait for workers."""

    def __init__(self, shape: Shape, call: Call) -> None:
        self.shape, self.call = shape, call
        #: The name of this front end for the workers, and the table that it shares with others.
        self.front_end, self.shared = "", Shared()
        self._unloaded: list[str] = []
        self._calling = threading.Lock()  # keeps the calls for one digest in order

    def load(self, digest: str, direction: Direction, data: bytes) -> None:
        """Load a direction on every worker. Raises NoRoom, DirectionError or EngineFailed unless all have answered with
        this digest; those that have it are then told to unload it. Also raises what the call raises."""
        alone = self.shared.count == 1
        deadline = time.monotonic() + (END_TIMEOUT if alone else RELEASE_TIMEOUT)
        asked = alone
        while True:
            with self._calling:
                self._flush()
                try:
                    answers = self.call("steer_load", data, digest, self.front_end)
                except BaseException:
                    self._unloaded.append(digest)  # sent with the next load, since the workers may not answer now
                    raise
                if answers and all(answer == {"digest": digest} for answer in answers):
                    return
                self._unloaded.append(digest)
                self._flush()
            if not any("in_use" in answer for answer in answers) or time.monotonic() > deadline:
                break
            if not asked:
                self.shared.ask()  # all front ends release what they have deleted
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
        """Send the workers what was unloaded, and wait for them."""
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
