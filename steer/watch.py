"""A thread that watches a folder: it looks whenever something changes there, and at least every two seconds.

Code that depends on it can ask whether the thread still looks or has stopped.
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

#: Seconds between two looks if nothing changes.
EVERY = 2.0
#: Seconds without a look after which the thread counts as stalled.
STALLED = 30.0

State = Literal["ok", "failing", "stalled", "dead"]


class Follower:
    """Calls `look` on a daemon thread until `stop`.

    An error of `look` is logged and kept as `problem`, and `look` is called again. If the folder cannot be watched (it
    does not exist, or the system has no more watches), `look` is still called every two seconds.
    """

    def __init__(
        self, folder: Path, look: Callable[[], None], *, name: str, recursive: bool = True, calls: Path | None = None
    ) -> None:
        """`calls`: a second folder, in which something changes when a look is asked for."""
        self.folder, self.look, self.recursive, self.calls = folder, look, recursive, calls
        #: The error of the last look, or None.
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
            except Exception as error:  # raised by the watch, since `_once` raises nothing
                if (message := str(error)) != self._unwatched:
                    self._unwatched = message
                    log.error("the folder %s cannot be watched, so it is only polled: %s", self.folder, message)
            self._stop.wait(EVERY)
            self._once()

    def _once(self) -> None:
        if self._stop.is_set():
            return
        try:
            self.look()
            self.problem = None
        except Exception as error:  # the thread must go on
            message = f"{type(error).__name__}: {error}"
            if message != self.problem:
                log.error("the folder %s: %s", self.folder, message, exc_info=not isinstance(error, OSError))
            self.problem = message
        self._looked = time.monotonic()
