"""Results as they come, one JSON line each, so that a study that was interrupted goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from steer.errors import InvalidInput


class Ledger:
    """Values by their key in a file whose first line says what they were measured on.

    A line that was cut off by an interruption is dropped. Raises InvalidInput where the file belongs to something
    else, naming what differs.
    """

    def __init__(self, path: Path, identity: dict[str, Any]) -> None:
        self.path = path
        self._values: dict[str, Any] = {}
        identity = json.loads(json.dumps(identity))
        if not path.exists():
            self._append({"identity": identity})
            return
        lines = list(_lines(path))
        first = lines[0].get("identity") if lines else None
        if not isinstance(first, dict):
            raise InvalidInput(f"{path}: is no record of a study")
        if differing := sorted(k for k in identity.keys() | first.keys() if identity.get(k) != first.get(k)):
            raise InvalidInput(
                f"{path}: was made with another {', '.join(differing)}; give another output folder, or remove it"
            )
        self._values = {line["key"]: line["value"] for line in lines[1:]}
        # written anew, so that a line that was cut off does not stand before the next one
        path.write_text("".join(map(_line, lines)), encoding="utf-8")

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def __getitem__(self, key: str) -> Any:
        return self._values[key]

    def put(self, key: str, value: Any) -> None:
        self._append({"key": key, "value": value})
        self._values[key] = value

    def _append(self, value: Any) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(_line(value))


def _line(value: Any) -> str:
    return json.dumps(value) + "\n"


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            yield json.loads(line)
        except ValueError:
            return
