"""Read files that users name. What would never end is refused, and a damaged safetensors file is reported in words."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO


def open_file(path: str | os.PathLike[str], *, pipes: bool = False) -> BinaryIO:
    """Open a regular file, or with `pipes` also a pipe, as `<(…)` of a shell is one. Raises OSError for anything else.
    A pipe to which nobody writes is empty: an ordinary `open` would wait for a writer."""
    file: BinaryIO = open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))  # noqa: SIM115
    mode = os.fstat(file.fileno()).st_mode
    if not (stat.S_ISREG(mode) or (pipes and stat.S_ISFIFO(mode))):
        file.close()
        raise OSError(errno.EINVAL, "it is not a regular file", str(path))
    os.set_blocking(file.fileno(), True)
    return file


def read_bytes(path: str | os.PathLike[str]) -> bytes:
    """The bytes of a regular file. Raises OSError."""
    with open_file(path) as file:
        return file.read()


def foreign_kind(begin: bytes) -> str | None:
    """Which kind of file of other tools begins with these bytes, if it is a known one."""
    if begin[:4] == b"GGUF":
        return "GGUF"
    return "a pickle or a zip archive (a .pt file?)" if begin[:4] == b"PK\x03\x04" or begin[:1] == b"\x80" else None


def safetensors_problem(begin: bytes, size: int, error: Exception) -> str:
    """Why a file is no safetensors file, in place of the library's words.

    Args:
        begin: the first 8 bytes of the file, or more.
        size: the bytes of the whole file.
        error: that of the library.
    """
    if kind := foreign_kind(begin):
        return f"not a safetensors file: this is {kind}"
    if size < 8 or (header := int.from_bytes(begin[:8], "little")) > size - 8:
        says = f"its first 8 bytes announce a header of {header} bytes" if size >= 8 else "a header begins with 8 bytes"
        return f"not a safetensors file, or cut short: it has {size} bytes, and {says}"
    reason = str(error).rpartition("deserializing")[2].removeprefix(" header").removeprefix(": ")
    if "not fully covered" in reason:
        reason = "its tensors do not fill it: it was cut short, or has more behind them"
    return f"not a safetensors file: {reason}"


def problem_of_file(path: str | os.PathLike[str], error: Exception) -> str:
    """Why the file at `path` cannot be read as safetensors; `error` is that of the library."""
    try:
        with open_file(path) as file:
            return safetensors_problem(file.read(8), Path(path).stat().st_size, error)
    except OSError as unreadable:
        return f"cannot be read: {unreadable.strerror}"
