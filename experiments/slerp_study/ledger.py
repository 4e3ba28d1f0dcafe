"""The results of one model, by key, in a record that an interrupted study goes on with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from steer.lab.resume import Record


class Ledger:
    """Values by their key. Raises InvalidInput where the file at `path` was made with another `identity`."""

    def __init__(self, path: Path, identity: dict[str, Any]) -> None:
        self._record = Record(path, identity)
        self._values = {line["key"]: line["value"] for line in self._record.lines}

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def __getitem__(self, key: str) -> Any:
        return self._values[key]

    def put(self, key: str, value: Any) -> None:
        self._record.append({"key": key, "value": value})
        self._values[key] = value
