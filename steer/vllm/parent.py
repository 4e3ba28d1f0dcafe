"""Processes that vLLM starts for a server end with the one that started them, also if it is killed."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import time
from threading import Thread

log = logging.getLogger("steer")


def end_with_parent() -> None:
    """From now on, end this process within about a second, as SIGTERM does, when its parent process is gone."""
    if (parent := multiprocessing.parent_process()) is not None:
        Thread(target=_watch, args=(parent.pid,), name="steer-parent", daemon=True).start()


def _watch(parent: int | None) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    log.error("the process that started this one is gone: it ends too")
    os.kill(os.getpid(), signal.SIGTERM)
