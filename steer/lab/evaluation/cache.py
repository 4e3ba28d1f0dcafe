"""What was measured, kept in the report's folder: the same command goes on where it was interrupted."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from steer.errors import InvalidInput

#: Rows that are made and written at once. Batches depend on it, so a resumed run makes the batches of an uninterrupted
#: one, and with them the same answers to the last bit.
CHUNK = 128


class Cache:
    """JSON lines in `folder/measured`, one file for each thing measured, or nothing kept where there is no folder. The
    first line of a file says under which conditions its rows were made."""

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
        head = {"name": name, "rows": count} | self.conditions | conditions
        rows = self._kept(path, head)
        if not rows:
            path.write_text(json.dumps(head) + "\n", "utf-8")
        for at in range(len(rows), count, CHUNK):
            made = make(at, min(at + CHUNK, count))
            with path.open("a", encoding="utf-8") as file:
                file.write("".join(json.dumps(row) + "\n" for row in made))
            rows += made
        return rows

    def value(self, name: str, conditions: dict[str, Any], make: Callable[[], Any]) -> Any:
        """One value of JSON, made by `make` where it is not kept yet."""
        return self.rows(name, conditions, 1, lambda _start, _stop: [make()])[0]

    def _kept(self, path: Path, head: dict[str, Any]) -> list[Any]:
        """Rows of whole chunks; what an interruption cut is dropped from the file too."""
        if not path.exists():
            return []
        first, *lines = path.read_text("utf-8").split("\n")
        try:
            kept = json.loads(first)
        except ValueError:
            return []  # interrupted before the first line was whole
        changed = [key for key in sorted({*kept, *head}) if kept.get(key) != head.get(key)]
        if changed:
            raise InvalidInput(
                [
                    f"{path}: was measured with {key} = {json.dumps(kept.get(key))}, asked for is "
                    f"{json.dumps(head.get(key))}: give another folder, or remove the file to measure again"
                    for key in changed
                ]
            )
        whole = [line for line in lines[:-1] if line]  # behind the last end of line nothing is whole
        good = len(whole) if len(whole) == head["rows"] else len(whole) // CHUNK * CHUNK
        path.write_text("\n".join([first, *whole[:good], ""]), "utf-8")
        return [json.loads(line) for line in whole[:good]]
