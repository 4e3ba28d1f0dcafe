"""What the front ends of one deployment share: a table of named numbers, and a way to notify all of them.

vLLM can run several API servers for one engine, each in its own process. The kill switch, the used part of each key's
rates and the lost blocks of the prefix cache belong to the deployment, so they are in one table. With one front end the
table is in its own memory, otherwise it is a mapped file in a private folder of this machine. Reading needs no lock and
no message, so what one process writes holds for all at once.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import mmap
import os
import shutil
import stat
import struct
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from steer.errors import NoRoom, UnsupportedModel

log = logging.getLogger("steer")

#: Bytes of the header: the number of records, the length of a text, and the text.
HEADER = 4096
#: A record: 16 bytes of the hash of its name, and two numbers, aligned so that each is written in one step.
RECORD = struct.Struct("@16sdd")
PAIR = struct.Struct("@dd")
RECORDS = 2**17
#: Seconds that a front end waits, after a change, until the others have looked; and seconds between two checks.
LOOK_TIMEOUT, PAUSE = 5.0, 0.005


class Shared:
    """One front end's view of the table. Thread-safe.

    Args:
        folder: of the mapped file; None for a single front end.
        index, count: the number of this front end, and how many there are.

    Raises:
        UnsupportedModel: other users can write to the folder.
        OSError: there is no room for the table.
    """

    def __init__(self, folder: Path | None = None, index: int = 0, count: int = 1) -> None:
        self.folder, self.index, self.count = folder, index, count
        self._own, self._fd, self._depth = threading.RLock(), -1, 0
        self._known: dict[bytes, int] = {}
        self._scanned = 0
        size = HEADER + RECORDS * RECORD.size
        if folder is None:
            self._memory = mmap.mmap(-1, size)
        else:
            folder.mkdir(mode=0o700, exist_ok=True)
            found = folder.stat()
            if found.st_uid != os.getuid() or stat.S_IMODE(found.st_mode) & 0o077:
                raise UnsupportedModel(f"{folder}: the front ends share this folder, and other users can write to it")
            for inner in (self.calls, self.directions):
                assert inner is not None
                inner.mkdir(mode=0o700, exist_ok=True)
            self._fd = os.open(folder / "table", os.O_RDWR | os.O_CREAT, 0o600)
            self._member = os.open(folder / "members", os.O_RDWR | os.O_CREAT, 0o600)
            fcntl.flock(self._member, fcntl.LOCK_SH)
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(self._fd, 0, size)  # or a full disk would end the process later
            else:  # macOS
                os.ftruncate(self._fd, max(size, os.fstat(self._fd).st_size))
            self._memory = mmap.mmap(self._fd, size)
        #: The same memory as numbers, which are written in one step (`struct` writes zeros first).
        self._numbers = memoryview(self._memory).cast("d")
        with self.lock():  # the counts of an earlier process with this index no longer hold
            self.put(f"life:{index}", self.number(f"life:{index}") + 1)

    @staticmethod
    def make_folder() -> Path:
        """Make a private folder on this machine, inside vLLM's folder for metrics, which vLLM removes however its
        processes end."""
        return Path(tempfile.mkdtemp(prefix="steer-", dir=os.environ.get("PROMETHEUS_MULTIPROC_DIR")))

    def close(self) -> None:
        """This front end ends; the last one removes the folder."""
        if self.folder is None or self._fd < 0:
            return
        with suppress(BlockingIOError):
            fcntl.flock(self._member, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(self.folder, ignore_errors=True)
        os.close(self._member)

    @property
    def calls(self) -> Path | None:
        """A folder that front ends watch: something changes in it when they are asked to look."""
        return self.folder and self.folder / "calls"

    @property
    def directions(self) -> Path | None:
        """The folder of directions, if the settings name no other."""
        return self.folder and self.folder / "directions"

    # -- the table ---------------------------------------------------------------------------------------------------

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other front ends and threads from changing the table. Hold it for microseconds only."""
        with self._own:
            if self._depth == 0 and self._fd >= 0:
                fcntl.flock(self._fd, fcntl.LOCK_EX)
            self._depth += 1
            try:
                yield
            finally:
                self._depth -= 1
                if self._depth == 0 and self._fd >= 0:
                    fcntl.flock(self._fd, fcntl.LOCK_UN)

    def get(self, name: str) -> tuple[float, float] | None:
        """The two numbers of a name, or None."""
        at = self._find(_hash(name))
        return None if at is None else PAIR.unpack_from(self._memory, at)

    def number(self, name: str) -> float:
        """The first number of a name, or 0."""
        return (self.get(name) or (0.0, 0.0))[0]

    def put(self, name: str, first: float, second: float = 0.0) -> None:
        """Set the numbers of a name. Hold the lock if they depend on the old ones. Raises NoRoom for a new name in a
        full table."""
        record = _hash(name)
        at = self._find(record)
        if at is None:
            with self.lock():
                at = self._find(record) or self._add(record)
        self._numbers[at // 8], self._numbers[at // 8 + 1] = first, second

    def _find(self, record: bytes) -> int | None:
        if record not in self._known and self._count != self._scanned:
            with self.lock():  # so that no half-written record is read
                for number in range(self._scanned, self._count):
                    start = HEADER + number * RECORD.size
                    self._known[self._memory[start : start + 16]] = start + 16
                self._scanned = self._count
        return self._known.get(record)

    def _add(self, record: bytes) -> int:
        count = self._count
        if count >= RECORDS:
            raise NoRoom(f"the table of the front ends is full: {RECORDS} names")
        start = HEADER + count * RECORD.size
        RECORD.pack_into(self._memory, start, record, 0.0, 0.0)
        struct.pack_into("@Q", self._memory, 0, count + 1)
        return start + 16

    @property
    def _count(self) -> int:
        return int(struct.unpack_from("@Q", self._memory, 0)[0])

    @property
    def text(self) -> str:
        """A text that all front ends share."""
        with self.lock():
            (length,) = struct.unpack_from("@Q", self._memory, 8)
            return self._memory[16 : 16 + length].decode(errors="ignore")

    @text.setter
    def text(self, value: str) -> None:
        data = value.encode()[: HEADER - 16]
        with self.lock():
            struct.pack_into("@Q", self._memory, 8, len(data))
            self._memory[16 : 16 + len(data)] = data

    # -- counts, of which each front end has its own part ------------------------------------------------------------

    def count_own(self, name: str, change: int) -> None:
        """Add to this front end's part of a count."""
        with self.lock():
            mine = self._part(name, self.index)
            self.put(mine, self.number(mine) + change)

    def total(self, name: str) -> int:
        """The sum of a count over all front ends."""
        return int(sum(self.number(self._part(name, index)) for index in range(self.count)))

    def _part(self, name: str, index: int) -> str:
        return f"{name}:{index}.{int(self.number(f'life:{index}'))}"

    # -- work for one front end, and work for all --------------------------------------------------------------------

    @contextmanager
    def once(self, name: str) -> Iterator[bool]:
        """True in the first front end, while the others wait; False after the block has ended there."""
        if self.folder is None:
            yield True
            return
        fd = os.open(self.folder / name, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)  # released if this process dies
            if os.fstat(fd).st_size:
                yield False
            else:
                yield True
                os.write(fd, b"done\n")
        finally:
            os.close(fd)

    @property
    def asked(self) -> float:
        """How often the front ends were asked to look."""
        return self.number("asked")

    def follows(self) -> None:
        """From now on this front end looks when it is asked to."""
        self.put(f"follows:{self.index}", 1)

    def has_looked(self, asked: float) -> None:
        """This front end has looked, after it was asked for the `asked`-th time."""
        self.put(f"looked:{self.index}", asked)

    def ask(self) -> float:
        """Ask all front ends to look at the files that they watch. Returns how often they were asked."""
        with self.lock():
            asked = self.asked + 1
            self.put("asked", asked)
        if self.calls is not None:
            with suppress(OSError):  # they look every two seconds anyway
                (self.calls / "call").write_bytes(b"")
        return asked

    def settle(self) -> None:
        """Ask all front ends to look, and wait until the others have. The log names those that have not."""
        if self.count == 1:
            return
        asked, deadline = self.ask(), time.monotonic() + LOOK_TIMEOUT
        others = {i for i in range(self.count) if i != self.index and self.number(f"follows:{i}")}
        while late := {i for i in others if self.number(f"looked:{i}") < asked}:
            if time.monotonic() > deadline:
                log.warning("the front ends %s have not looked within %g s", sorted(late), LOOK_TIMEOUT)
                return
            time.sleep(PAUSE)


def _hash(name: str) -> bytes:
    return hashlib.blake2b(name.encode(), digest_size=16).digest()
