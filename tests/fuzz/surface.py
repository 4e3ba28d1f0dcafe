"""What a fuzzed surface is, and how its inputs are given to it."""

from __future__ import annotations

import faulthandler
import signal
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from types import FrameType
from typing import Any

from steer.errors import SteerError

#: Seconds in which every input is answered, on a busy machine too.
PATIENCE = 20


@dataclass(frozen=True)
class Surface:
    """`make` an input, `feed` it to the product. What `feed` raises on purpose is a SteerError, and nothing else."""

    name: str
    make: Callable[[Random], Any]
    feed: Callable[[Any], None]


@dataclass
class Outcome:
    """What became of the inputs: accepted and refused ones, and findings (at most a few of each kind)."""

    counts: Counter[str] = field(default_factory=Counter)
    findings: dict[str, str] = field(default_factory=dict)


class Hang(BaseException):
    """An input took too long. Not an Exception, so that nothing in the product can take it for its own."""


def _alarm(_signal: int, _frame: FrameType | None) -> None:
    raise Hang


def run(surface: Surface, numbers: range, outcome: Outcome, step: Callable[[], object] = lambda: None) -> Outcome:
    """Feed the inputs of these numbers; number n of a surface is the same input on every machine."""
    signal.signal(signal.SIGALRM, _alarm)
    faulthandler.dump_traceback_later(PATIENCE * 30, repeat=True)  # where the hang is in C, no signal handler runs
    try:
        for number in numbers:
            source = surface.make(Random(f"{surface.name} {number}"))
            signal.alarm(PATIENCE)
            try:
                surface.feed(source)
                outcome.counts["accepted"] += 1
            except SteerError:
                outcome.counts["refused"] += 1
            except (Exception, Hang) as error:
                outcome.counts["found"] += 1
                where = traceback.extract_tb(error.__traceback__)[-1]
                kind = f"{type(error).__name__} at {where.filename}:{where.lineno}"
                if kind not in outcome.findings:
                    shown = "".join(traceback.format_exception(error)[-12:])[-3000:]
                    outcome.findings[kind] = f"{surface.name} {number}: {source!r:.300}\n{shown}"
            finally:
                signal.alarm(0)
            step()
    finally:
        faulthandler.cancel_dump_traceback_later()
    return outcome
