"""Results that are kept as they come, one JSON line each, so that interrupted work can go on where it stopped."""

from __future__ import annotations

import hashlib
import json
import os
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from urllib.parse import quote

from steer.errors import InvalidInput
from steer.files import write_file


class ResultFile:
    """The `lines` below `head` in the file at `path`, which is made if it is missing. A line that an interruption cut
    off is dropped. Raises InvalidInput if the file is something else, or has another head, with all differences."""

    def __init__(self, path: Path, head: dict[str, Any]) -> None:
        self.path = path
        head = json.loads(json.dumps(head))
        found = list(_whole(path)) or [head]
        if not isinstance(found[0], dict):
            raise InvalidInput(f"{path}: is not a record of measurements")
        before, self.lines = found[0], found[1:]
        InvalidInput.raise_for(
            (
                f"{path}: was measured with {key} = {json.dumps(before.get(key))}, this command has "
                f"{json.dumps(head.get(key))}: give another folder, or remove the file to measure again"
            )
            for key in sorted(before.keys() | head.keys())
            if before.get(key) != head.get(key)
        )
        self._head = head
        self.keep(len(self.lines))

    def keep(self, count: int) -> None:
        """Drop the lines after the first `count`, in the file too."""
        self.lines = self.lines[:count]
        write_file(self.path, _text([self._head, *self.lines]).encode())

    def append(self, *values: object) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(_text(values))
        self.lines += values


def _text(values: Iterable[object]) -> str:
    return "".join(json.dumps(value) + "\n" for value in values)


def _whole(path: Path) -> Iterator[Any]:
    """The complete lines, up to the first one that is cut off."""
    if path.exists():
        for line in path.read_bytes().split(b"\n")[:-1]:
            try:
                yield json.loads(line)
            except (ValueError, RecursionError):
                return


class Alone(AbstractContextManager["Alone"]):
    """A lock that keeps other runs out of `folder` until the `with` block ends or this object is deleted. Raises
    InvalidInput if another run has it. It does nothing on Windows or on a file system without locks: there two runs
    would mix their results."""

    file = ".lock"

    def __init__(self, folder: Path) -> None:
        try:
            held = os.open(folder / self.file, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise InvalidInput(f"{folder / self.file}: cannot be opened: {error.strerror}") from error
        self._release = weakref.finalize(self, os.close, held)
        try:
            import fcntl

            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._release()
            raise InvalidInput(
                f"{folder}: another run writes to it at this moment: write elsewhere, or wait for its end"
            ) from None
        except (ImportError, OSError):
            pass

    def __exit__(self, *_: object) -> None:
        self._release()


#: Rows that are made and written together. Batches never cross this border, so a resumed run has the same batches as an
#: uninterrupted one, and with them the same answers to the last bit.
CHUNK = 128
#: Characters of a record's file name, which may have 255 with all that is put around it.
MAX_NAME = 180


def _file_name(name: str) -> str:
    """A file's name for a record's, which may have any character and any length: another one for each."""
    quoted = quote(name, safe="=+", errors="surrogateescape")
    if len(quoted) <= MAX_NAME:
        return quoted
    return f"{quoted[:MAX_NAME]}~{hashlib.sha256(quoted.encode()).hexdigest()[:16]}"


class Cache:
    """Keeps one record in `folder/measured` for each thing that is measured; without a folder it keeps nothing.
    `resumes`: whether there are records of an earlier run. Raises InvalidInput if another run has the folder."""

    def __init__(self, folder: Path | None, conditions: dict[str, Any]) -> None:
        self.folder, self.conditions, self.resumes = folder and folder / "measured", conditions, False
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._alone = Alone(self.folder)
            self.resumes = any(self.folder.glob("*.jsonl"))

    def rows(
        self, name: str, conditions: dict[str, Any], count: int, make: Callable[[int, int], list[Any]]
    ) -> list[Any]:
        """`count` rows of JSON; `make(start, stop)` makes those that are not kept yet. Raises InvalidInput if the kept
        rows were made under other conditions."""
        if self.folder is None:
            return [row for at in range(0, count, CHUNK) for row in make(at, min(at + CHUNK, count))]
        path = self.folder / f"{_file_name(name)}.jsonl"
        record = ResultFile(path, {"name": name, "rows": count} | self.conditions | conditions)
        if len(record.lines) != count:
            record.keep(len(record.lines) // CHUNK * CHUNK)
        for at in range(len(record.lines), count, CHUNK):
            record.append(*make(at, min(at + CHUNK, count)))
        return record.lines

    def value(self, name: str, conditions: dict[str, Any], make: Callable[[], Any]) -> Any:
        """One JSON value, made by `make` if it is not kept yet."""
        return self.rows(name, conditions, 1, lambda _start, _stop: [make()])[0]
