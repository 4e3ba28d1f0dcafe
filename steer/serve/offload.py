"""Work whose length the client decides, in threads of its own: the event loop answers /health and the kill switch
meanwhile.

Few run at once, so that they take turns for the interpreter with the loop and not with each other, and what is large
never waits in front of what is small.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Literal, TypeVar

T = TypeVar("T")

#: Bytes or characters from which on work waits in the queue of the large. One of those runs at a time.
LARGE = 64 * 1024
SMALL_AT_ONCE = 2
Kind = Literal["body", "text"]


async def offload(kind: Kind, size: int, work: Callable[[], T]) -> T:
    """What `work` returns or raises. `size`: bytes or characters that it goes through; `kind`: bodies, which take
    milliseconds, never wait for texts, whose tokenizing can take seconds."""
    return await asyncio.get_running_loop().run_in_executor(_threads(kind, size >= LARGE), work)


@cache
def _threads(kind: Kind, large: bool) -> ThreadPoolExecutor:
    """Of the process, since the interpreter's lock, which they share with the loop, is."""
    return ThreadPoolExecutor(1 if large else SMALL_AT_ONCE, f"steer-{kind}{'-large' if large else ''}")
