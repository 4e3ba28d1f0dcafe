"""What was measured, kept in the report's folder: the same command goes on where it was interrupted."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from steer.lab.record import Record

#: Rows that are made and written at once. Batches depend on it, so a resumed run makes the batches of an uninterrupted
#: one, and with them the same answers to the last bit.
CHUNK = 128


class Cache:
    """One record in `folder/measured` for each thing measured, or nothing kept where there is no folder."""

    def __init__(self, folder: Path | None, conditions: dict[str, Any]) -> None:
        self.folder, self.conditions = folder and folder / "measured", conditions
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)

    def rows(
        self, name: str, conditions: dict[str, Any], count: int, make: Callable[[int, int], list[Any]]
    ) -> list[Any]:
        """`count` rows of JSON, of which `make(start, stop)` gives those that are not kept yet. Raises InvalidInput
        where rows are kept that were made under other conditions."""
        if self.folder is None:
            return [row for at in range(0, count, CHUNK) for row in make(at, min(at + CHUNK, count))]
        path = self.folder / f"{re.sub(r'[^A-Za-z0-9_.=+-]+', '_', name)}.jsonl"
        record = Record(path, {"name": name, "rows": count} | self.conditions | conditions)
        if len(record.lines) != count:
            record.keep(len(record.lines) // CHUNK * CHUNK)
        for at in range(len(record.lines), count, CHUNK):
            record.append(*make(at, min(at + CHUNK, count)))
        return record.lines

    def value(self, name: str, conditions: dict[str, Any], make: Callable[[], Any]) -> Any:
        """One value of JSON, made by `make` where it is not kept yet."""
        return self.rows(name, conditions, 1, lambda _start, _stop: [make()])[0]
