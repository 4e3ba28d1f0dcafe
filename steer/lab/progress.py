"""The progress bar of a command: how much of all its work is done, and the time left."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from io import StringIO
from typing import Any, NoReturn, Self, TextIO

from tqdm import tqdm

#: Work is counted in prompts that a model reads once. Generating a token is about this much work.
TOKEN = 0.2
#: Readable at 40 columns too, where the part's name is cut.
FORMAT = "{percentage:3.0f}% |{bar:10}| {remaining} left{desc}"
LINE = "{percentage:3.0f}%, {remaining} left{desc}"


MINUTE = 60.0


class Lines(StringIO):
    """Passes what a bar writes on to `file`, each state in a line of its own."""

    def __init__(self, file: TextIO) -> None:
        super().__init__()
        self._file = file

    def write(self, text: str) -> int:
        if line := text.strip():
            self._file.write(f"{line}\n")
            self._file.flush()
        return len(text)


def answering(tokens: int) -> float:
    """Return the work of one answer of at most `tokens` tokens."""
    return 1 + TOKEN * tokens


class Progress:
    """Work that is planned part by part, and then done. If `shown`, a bar shows it on a terminal, and a line at most
    every MINUTE elsewhere (a file, a log); else it is only counted.

    The rest of a part that ends early (candidates are stopped, results exist from an earlier run) is skipped: it counts
    as done, but not for the speed.
    """

    def __init__(self, shown: bool = False) -> None:
        self._planned: dict[str, float] = {}
        self._done: dict[str, float] = {}
        self.current = ""
        self.skipped = 0.0
        self._bar: tqdm[NoReturn] | None = None
        self._named = "  {}"
        if shown and sys.stderr is not None:
            # smoothing 0: the time left follows from the average speed, since parts differ in kind
            options: dict[str, Any] = {"bar_format": FORMAT, "dynamic_ncols": True}
            if not sys.stderr.isatty():
                self._named = ": {}"
                options = {"bar_format": LINE, "file": Lines(sys.stderr), "mininterval": MINUTE, "delay": MINUTE}
            self._bar = tqdm(total=0, smoothing=0, leave=False, **options)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_raised: object) -> None:
        if self._bar is not None:
            self._bar.close()

    @property
    def total(self) -> float:
        return sum(max(work, self._done.get(part, 0.0)) for part, work in self._planned.items())

    @property
    def done(self) -> float:
        return sum(self._done.values())

    def plan(self, part: str, work: float) -> None:
        """Set the whole work of `part`, as far as it is known now."""
        self._planned[part] = work
        self._show(0.0)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count the work that is done in this block for the part `name`."""
        outer, self.current = self.current, name
        self._planned.setdefault(name, 0.0)
        try:
            yield
            self.skip(max(0.0, self._planned[name] - self._done.get(name, 0.0)))
        finally:
            self.current = outer

    def advance(self, work: float = 1.0) -> None:
        self._done[self.current] = self._done.get(self.current, 0.0) + work
        self._show(work)

    def skip(self, work: float) -> None:
        """Count `work` that was planned and need not be done."""
        self.skipped += work
        if self._bar is not None:
            self._bar.initial += work
        self.advance(work)

    def write(self, text: str) -> None:
        """Print `text` above the bar, on standard error."""
        tqdm.write(text, file=sys.stderr)

    def _show(self, work: float) -> None:
        if self._bar is not None:
            self._bar.total = self.total
            self._bar.set_description_str(self._named.format(self.current) if self.current else "", refresh=False)
            self._bar.update(work)
