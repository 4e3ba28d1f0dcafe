"""Find the steering of a pass that gradient checkpointing computes again while autograd goes backward.

The graph shows it: torch numbers its nodes in the order in which a thread makes them, so the nodes of a pass have the
numbers that the thread reached while it ran. Between two passes are nodes of code after the first (the head, the loss)
or before the second: for these only a steering that both passes had is sure.
"""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass
from math import inf

import torch

#: How many changes of steering are remembered.
KEPT = 256


def going_backward() -> bool:
    """Whether autograd runs this code."""
    return bool(torch._C._current_graph_task_id() != -1)


@dataclass(slots=True)
class _Made:
    """The nodes that a thread made from `begin` to `end` in passes under `steering`. Those from `after` to `begin` came
    after a pass under `before`."""

    after: float
    before: object
    begin: float
    steering: object
    end: float = inf


class _Thread(threading.local):
    """The state of each thread, which has its own numbers."""

    def __init__(self) -> None:
        self.begin, self.end = 0, 0
        self.last: _Made | None = None


class Passes:
    """Remembers the steering of a model's passes. Call `begins` and `ended` around each pass, also if it fails."""

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
        """Whether the pass that autograd goes back through ran under `steering`; False if that is not known."""
        node = torch._C._current_autograd_node()
        number = -1 if node is None else node._sequence_nr()
        found: list[object] = []
        for made in tuple(self._made):
            if made.after <= number < made.begin:
                found += made.before, made.steering
            elif made.begin <= number < made.end:
                found.append(made.steering)
        return bool(found) and all(one is steering for one in found)
