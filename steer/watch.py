"""A thread that follows a folder: it looks whenever something changes there, and at least every two seconds.

Code that depends on its looking can ask whether the thread still looks or has stopped.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import watchfiles

log = logging.getLogger("steer")

#: Seconds between two looks where no event calls for one.
EVERY = 2.0
#: Seconds without a look after which the thread does not count as running.
STALLED = 30.0

State = Literal["ok", "failing", "stalled", "dead"]


class Follower:
    """Calls `look` on a daemon thread until `stop`.

    What `look` raises is logged and kept as `problem`, and it is called again. Where the folder cannot be watched (it
    is not there, or the system gives out no more watches), it is called every two seconds all the same.
    """

    def __init__(
        self, folder: Path, look: Callable[[], None], *, name: str, recursive: bool = True, calls: Path | None = None
    ) -> None:
        """`calls`: a second folder, in which something changes when a look is asked for."""
        self.folder, self.look, self.recursive, self.calls = folder, look, recursive, calls
        #: What the last look met, if it met anything.
        self.problem: str | None = None
        self._unwatched: str | None = None
        self._looked = time.monotonic()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        self._looked = time.monotonic()
        self._thread.start()

    def stop(self, timeout: float = 5.0) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(timeout)

    @property
    def age(self) -> float:
        """Seconds since the last look ended."""
        return time.monotonic() - self._looked

    @property
    def state(self) -> State:
        if not self._thread.is_alive():
            return "dead"
        if self.age > STALLED:
            return "stalled"
        return "failing" if self.problem else "ok"

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                for _ in watchfiles.watch(
                    *[path for path in (self.folder, self.calls) if path is not None],
                    stop_event=self._stop,
                    debounce=50,
                    step=5,
                    yield_on_timeout=True,
                    rust_timeout=int(1000 * EVERY),
                    recursive=self.recursive,
                ):
                    self._once()
                    if self._unwatched:
                        self._unwatched = None
                        log.info("the folder %s is watched again", self.folder)
            except Exception as error:  # of the watch: `_once` raises nothing
                if (said := str(error)) != self._unwatched:
                    self._unwatched = said
                    log.error("the folder %s cannot be watched, so it is only polled: %s", self.folder, said)
            self._stop.wait(EVERY)
            self._once()

    def _once(self) -> None:
        if self._stop.is_set():
            return
        try:
            self.look()
            self.problem = None
        except Exception as error:  # a look that fails must not be the last one
            said = f"{type(error).__name__}: {error}"
            if said != self.problem:
                log.error("the folder %s: %s", self.folder, said, exc_info=not isinstance(error, OSError))
            self.problem = said
        self._looked = time.monotonic()
