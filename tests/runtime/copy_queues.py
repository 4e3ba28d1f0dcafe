"""A stand-in for a device that copies while the host goes on: nothing that is enqueued happens before it must."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class Late:
    """A queue whose copies read the host's memory as late as a device may: when the host waits for a event behind them,
    or when it is told to `run`. Behind each event comes the pass, which is `seeing`."""

    seeing: Callable[[], object] = lambda: None
    pinned: bool = False
    waiting: deque[tuple[Tensor, Tensor] | CopyEvent] = field(default_factory=deque)
    events: int = 0
    waits: int = 0

    def copy(self, to: Tensor, source: Tensor) -> None:
        self.waiting.append((to, source))

    def record_event(self) -> CopyEvent:
        record_event = CopyEvent(self)
        self.events += 1
        self.waiting.append(record_event)
        return record_event

    def run(self, until: CopyEvent | None = None) -> None:
        """The device goes on to `until`; without, past the next event, which is one step."""
        while self.waiting:
            done = self.waiting.popleft()
            if isinstance(done, CopyEvent):
                done.passed = True
                self.seeing()
                if until in (None, done):
                    return
            else:
                to, source = done
                to.copy_(source)


@dataclass(eq=False)
class CopyEvent:
    queue: Late
    passed: bool = False

    def synchronize(self) -> None:
        if not self.passed:
            self.queue.waits += 1
            self.queue.run(self)


class Prompt:
    """A queue to a device that copies at once: by copies all the same, as no CPU does."""

    pinned = False

    def copy(self, to: Tensor, source: Tensor) -> None:
        to.copy_(source)

    def record_event(self) -> Prompt:
        return self

    def synchronize(self) -> None:
        pass
