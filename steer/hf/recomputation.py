"""Gradient checkpointing computes a pass again while autograd goes backward: under which steering did that pass run?

The graph says so: torch numbers its nodes in the order in which a thread makes them, so that those of a pass have the
numbers that the thread was at while it ran. In between are nodes of what came after one pass (the head, the loss) or
before the next, and there only what holds of both is sure.
"""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass
from math import inf

import torch

#: How often the steering may have changed since a pass whose steering is still known.
KEPT = 256


def going_backward() -> bool:
    """Is it autograd that runs this code?"""
    return bool(torch._C._current_graph_task_id() != -1)


@dataclass(slots=True)
class _Made:
    """The nodes that a thread made from `begin` up to `end` in passes under `steering`, and those from `after` on that
    came behind a pass under `before`."""

    after: float
    before: object
    begin: float
    steering: object
    end: float = inf


class _Thread(threading.local):
    """What each thread has made: each counts for itself."""

    def __init__(self) -> None:
        self.begin, self.end = 0, 0
        self.last: _Made | None = None


class Passes:
    """Which steering the passes of a model had. Call `begins` and `ended` around each, also where it fails."""

    def __init__(self) -> None:
        self._made: deque[_Made] = deque(maxlen=KEPT)
        self._mine = _Thread()

    def begins(self) -> None:
        self._mine.begin = torch._C._autograd._get_sequence_nr()

    def ended(self, steering: object) -> None:
        mine, end = self._mine, torch._C._autograd._get_sequence_nr()
        last, after, mine.end = mine.last, mine.end, end
        if end == after or (last is not None and last.steering is steering and last is self._made[-1]):
            return
        before = None if last is None else last.steering
        if last is not None:
            last.end = after
        mine.last = _Made(after, before, max(mine.begin, after), steering)
        self._made.append(mine.last)

    def ran_under(self, steering: object) -> bool:
        """Did the pass that autograd goes back through run under `steering`? Not where that is not known."""
        node = torch._C._current_autograd_node()
        number = -1 if node is None else node._sequence_nr()
        found: list[object] = []
        for made in tuple(self._made):
            if made.after <= number < made.begin:
                found += made.before, made.steering
            elif made.begin <= number < made.end:
                found.append(made.steering)
        return bool(found) and all(one is steering for one in found)
