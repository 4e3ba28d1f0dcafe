"""Read and write files that users name. What would never end is refused, a damaged safetensors file is reported in
words, and a file is replaced as a whole."""

from __future__ import annotations

import errno
import json
import os
import stat
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
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


def folder_problem(path: str | os.PathLike[str]) -> str:
    """What is wrong with `path`, a folder that was given in place of a file: whether it is a model."""
    return "this is a model" if (Path(path) / "config.json").exists() else "this is a folder"


def holds_model(names: Iterable[str]) -> bool:
    """Whether tensors with these `names` belong to a model, whose tensors are named after modules (`….weight`)."""
    return any(name.endswith(".weight") for name in names)


def sorted_metadata(data: bytes) -> bytes:
    """Return the file `data` (or its header alone) with the metadata keys sorted.

    safetensors writes the keys in any order, but the file's bytes identify the direction.
    """
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[end:]


def write_file(path: str | os.PathLike[str], data: bytes, mode: int = 0o644) -> None:
    """Write `data` so that a reader sees either the old file or the new one, never a part of it."""
    with replacing(path, mode) as temporary:
        temporary.write_bytes(data)


@contextmanager
def replacing(path: str | os.PathLike[str], mode: int = 0o644) -> Iterator[Path]:
    """Yield a temporary file beside `path` to write to.

    At the end of the `with` block the file is fsynced, gets its `mode` and is renamed to `path`; after an error it is
    removed.
    """
    target = Path(path)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, mode)
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
