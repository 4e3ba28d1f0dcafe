"""Lost requests (see `steer.runtime.op`) in a worker: from the flags of a pass to what the engine is told about its
requests. The decisions of conditions go the same way.

The keys and values of a lost token are not those of the requested operation, and vLLM may already have given its block
to another request with the same steering. So a request with the same tokens up to the lost one fails too, as it would
if it had computed them itself. The front end makes sure that no later request finds such blocks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from steer.runtime.token_index import Losses
from steer.vllm import internals

if TYPE_CHECKING:
    from steer.vllm.internals.types import ModelRunnerOutput, SchedulerOutput

#: How many recently lost requests a new one is compared with: the front end may not have seen their end yet.
KEPT = 64


@dataclass(slots=True)
class SteeredRun:
    """A steered request: the key of its steering, what is at each position of its prompt
    (`internals.worker.prompt_of`), how many positions that are, and the position of its first lost token."""

    spec: str
    prompt: Sequence[object]
    length: int
    lost: int | None = None

    def falls_with(self, other: SteeredRun) -> bool:
        """Whether it has read the first lost token of `other`, or would have computed the same one."""
        if other.lost is None or self.spec != other.spec or other.lost >= self.length:
            return False
        common = min(other.lost + 1, len(other.prompt))
        return self.prompt[:1] == other.prompt[:1] and list(self.prompt[:common]) == list(other.prompt[:common])


@dataclass(frozen=True, slots=True)
class Step:
    """A pass that was enqueued. `scheduled` is vLLM's output of the scheduler, used only for lost requests."""

    losses: Losses
    requests: Sequence[str]
    lengths: NDArray[np.int32]
    scheduled: SchedulerOutput


class SteeredRuns:
    """The steered requests of a worker. `meet` and `end` run on its main thread, `annotate` on the thread that reads a
    step's outputs. Each writes its own facts before it reads those of the other, so that if both run at the same time,
    at least one sees the other's."""

    def __init__(self) -> None:
        self._running: dict[str, SteeredRun] = {}
        self._lost: dict[str, int] = {}
        self._recent: deque[SteeredRun] = deque(maxlen=KEPT)

    def meet(self, request: str, run: SteeredRun) -> None:
        self._running[request] = run
        for other in tuple(self._recent):
            if run.falls_with(other):
                run.lost = other.lost
                self._lost[request] = other.lost or 0
                return

    def end(self, request: str) -> None:
        self._running.pop(request, None)
        self._lost.pop(request, None)

    def annotate(self, output: ModelRunnerOutput, step: Step | None) -> ModelRunnerOutput:
        """vLLM's output of a step, with the requests that are lost by now, and the decisions of this step."""
        decided: dict[str, bool] = {}
        if step is not None:
            if found := step.losses.first(step.lengths):
                starts = internals.worker.starts_of(step.scheduled)
                for i, offset in found.items():
                    self._lose(step.requests[i], starts[step.requests[i]] + offset)
            decided = {step.requests[i]: holds for i, holds in step.losses.decided(step.lengths).items()}
        if not self._lost and not decided:
            return output
        return internals.worker.with_news(output, dict(self._lost), decided)

    def _lose(self, request: str, position: int) -> None:
        run = self._running.get(request)
        if run is None or run.lost is not None:  # it has ended, or is known to be lost
            return
        run.lost = position
        self._recent.append(run)
        for name, other in tuple(self._running.items()):
            if other is run or (other.lost is None and other.falls_with(run)):
                other.lost = position
                self._lost[name] = position
                if name not in self._running:  # it ended meanwhile
                    self._lost.pop(name, None)
