"""A stand-in for a device that copies while the host goes on: nothing that is enqueued happens before it must."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class Late:
    """A lane whose copies read the host's memory as late as a device may: when the host waits for a mark behind them,
    or when it is told to `run`. Behind each mark comes the pass, which is `seeing`."""

    seeing: Callable[[], object] = lambda: None
    pinned: bool = False
    waiting: deque[tuple[Tensor, Tensor] | Mark] = field(default_factory=deque)
    marks: int = 0
    waits: int = 0

    def copy(self, to: Tensor, source: Tensor) -> None:
        self.waiting.append((to, source))

    def mark(self) -> Mark:
        mark = Mark(self)
        self.marks += 1
        self.waiting.append(mark)
        return mark

    def run(self, until: Mark | None = None) -> None:
        """The device goes on to `until`; without, past the next mark, which is one step."""
        while self.waiting:
            done = self.waiting.popleft()
            if isinstance(done, Mark):
                done.passed = True
                self.seeing()
                if until in (None, done):
                    return
            else:
                to, source = done
                to.copy_(source)


@dataclass(eq=False)
class Mark:
    lane: Late
    passed: bool = False

    def synchronize(self) -> None:
        if not self.passed:
            self.lane.waits += 1
            self.lane.run(self)


class Prompt:
    """A lane to a device that copies at once: by copies all the same, as no CPU does."""

    pinned = False

    def copy(self, to: Tensor, source: Tensor) -> None:
        to.copy_(source)

    def mark(self) -> Prompt:
        return self

    def synchronize(self) -> None:
        pass
