"""The audit log: what was steered, by whom, and who changed what; never a prompt, an answer or a secret.

The log is JSON lines. Each line has the next number as `seq` and the hash of the line before as `prev`, and ends with
`hash`, the SHA-256 of the line without it. So an edited, removed, added or moved line breaks the chain. `FILE.head` has
the last number and hash, so that missing lines at the end are found too. A file that exceeds its size is renamed to
`FILE.<its last seq>` (with `-2` and so on if that name is taken), and the new file continues the chain.

A line is written to the operating system at once. A separate thread waits until it is on the disk.

Several processes of one machine may write one file: each line is written under a lock (`FILE.lock`), after the line
that `FILE.head` names as the last.

A hash chain cannot detect that somebody with write access to both files has computed it again from some line on. Keep
the head elsewhere from time to time (`GET /v1/steering` returns it) and verify against that.
"""

from __future__ import annotations

import errno
import fcntl
import glob
import hashlib
import itertools
import json
import logging
import os
import re
import stat
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from steer.errors import SteerError
from steer.files import open_file
from steer.serve import metrics

log = logging.getLogger("steer")

GENESIS = "0" * 64
#: Bytes of one line, so the last line of a file is within its last MAX_LINE bytes.
MAX_LINE = 2**18
#: How many bytes of a torn line are kept in the event that reports it.
TORN_SHOWN = 4096
#: Bytes to read of FILE.head; it has fewer.
HEAD_BYTES = 256
#: Seconds.
FSYNC_EVERY = 1.0
Fsync = Literal["always", "second", "never"]


class AuditError(SteerError):
    """The audit file cannot be used at all, so the server must not start."""


class NoLine(ValueError):
    """Bytes that are not a line of an audit log, not even a changed one."""


class AuditUnavailable(SteerError):
    """A line could not be written, so the event that it should record must not happen."""


@dataclass(frozen=True, slots=True)
class Head:
    """The last line of a chain: its number and its hash."""

    seq: int = 0
    hash: str = GENESIS

    @classmethod
    def parse(cls, text: str) -> Head:
        """Parse `SEQ:HASH`. Raises ValueError."""
        seq, _, hash = text.strip().partition(":")
        if not (seq.isascii() and seq.isdigit() and len(hash) == 64):
            raise ValueError(f"{text[:100]!r} is not a head: SEQ:HASH, as FILE.head has it")
        return cls(int(seq), hash)

    def __str__(self) -> str:
        return f"{self.seq}:{self.hash}"


def seal(record: dict[str, object]) -> tuple[bytes, str]:
    """The line of a record, with its newline, and the line's hash. This defines the canonical form.

    Raises ValueError for a line over MAX_LINE, which could not be read again.
    """
    bare = json.dumps(record, separators=(",", ":"), allow_nan=False)
    digest = hashlib.sha256(bare.encode()).hexdigest()
    line = f'{bare[:-1]},"hash":"{digest}"}}\n'.encode()
    if len(line) > MAX_LINE:
        raise ValueError(f"a line of {len(line)} bytes, at most {MAX_LINE} are accepted")
    return line, digest


def unseal(line: bytes) -> dict[str, Any]:
    """The record of a line: its `seq`, `prev` and `hash`, and what its event has. Raises ValueError for anything but
    the bytes that `seal` returns."""
    if not line.endswith(b"\n"):
        raise ValueError("the line is torn: it has no end")
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        raise NoLine("not JSON") from None
    if not isinstance(record, dict) or not isinstance(record.get("hash"), str):
        raise NoLine("not an audit line")
    bare = {name: value for name, value in record.items() if name != "hash"}
    try:
        same = seal(bare)[0] == line
    except (ValueError, RecursionError):
        same = False
    if not same:
        raise ValueError("the hash of the line is wrong: the line was changed")
    if not isinstance(record.get("seq"), int) or not isinstance(record.get("prev"), str):
        raise ValueError("not an audit line")
    return record


class Audit:
    """A log that this process writes, perhaps together with others. Thread-safe."""

    def __init__(self, path: Path, *, max_bytes: int = 64 * 2**20, fsync: Fsync = "second") -> None:
        self.path, self.max_bytes, self.fsync = path, max_bytes, fsync
        self.failed: str | None = None
        self.head = Head()
        self._head_path = path.with_name(f"{path.name}.head")
        self._lost: Counter[str] = Counter()
        self._fd = self._head_fd = self._guard = -1
        self._size = 0
        self._synced = 0  # the number of the last line that is on the disk
        self._unsynced: list[int] = []  # rotated files that are not yet on the disk
        self._waiting: list[tuple[int, Future[None]]] = []
        self._lock = threading.RLock()
        self._wake = threading.Event()
        self._closed = threading.Event()

    def check(self) -> None:
        """Raise AuditError if the file cannot be written, as far as that can be seen without touching it."""
        folder = self.path.parent
        if not folder.is_dir():
            raise AuditError(f"the audit file {self.path} cannot be written: the folder {folder} does not exist")
        if self.path.is_dir() or not os.access(self.path if self.path.exists() else folder, os.W_OK):
            what = "is a folder" if self.path.is_dir() else "no permission"
            raise AuditError(f"the audit file {self.path} cannot be written: {what}")

    def open(self) -> None:
        """Open the file and find the end of its chain. Raises AuditError."""
        try:
            self._guard = os.open(self.path.with_name(f"{self.path.name}.lock"), os.O_RDWR | os.O_CREAT, 0o600)
            with self._alone():
                known = _read_head(self._head_path)
                self._head_fd = os.open(self._head_path, os.O_RDWR | os.O_CREAT, 0o600)
                self._reopen(known)
        except OSError as error:
            raise AuditError(f"the audit file {self.path} cannot be written: {error.strerror}") from None
        self._synced = self.head.seq
        if self.fsync != "never":
            threading.Thread(target=self._sync, name="steer-audit", daemon=True).start()

    def close(self) -> None:
        self._closed.set()
        self._wake.set()
        with self._lock:
            with suppress(OSError):
                self._sync_once()
            for fd in (self._fd, self._head_fd, self._guard):
                if fd >= 0:
                    os.close(fd)
            self._fd = self._head_fd = self._guard = -1

    def write(self, event: str, **fields: object) -> int:
        """Append one line and return its number. Raises AuditUnavailable: then no part of it is in the file."""
        with self._alone():
            try:
                self._catch_up()
                if self._lost:
                    self._append("recovered", {"detail": {"lost": dict(self._lost)}})
                    log.warning("the audit file is written again; lost in between: %s", dict(self._lost))
                    self._lost.clear()
                seq = self._append(event, fields)
            except (OSError, ValueError) as error:
                reason = getattr(error, "strerror", None) or str(error)
                self._fail(f"{self.path}: {reason}")
                raise AuditUnavailable(f"the audit log cannot be written: {reason}") from None
            if self.failed is not None:
                self.failed = None
                metrics.AUDIT_OK.set(1)
            if self.fsync == "always":
                self._wake.set()
            return seq

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Keep other threads and processes from writing meanwhile."""
        with self._lock:
            if self._guard >= 0:
                fcntl.flock(self._guard, fcntl.LOCK_EX)  # released if this process dies
            try:
                yield
            finally:
                if self._guard >= 0:
                    fcntl.flock(self._guard, fcntl.LOCK_UN)

    def _catch_up(self) -> None:
        """Go to the end of the chain: other processes may have extended it."""
        if not _same(self._head_path, self._head_fd):  # FILE.head was moved away
            fresh = os.open(self._head_path, os.O_RDWR | os.O_CREAT, 0o600)  # if this fails the old one stays open
            os.close(self._head_fd)
            self._head_fd = fresh
            known: Head | None = self.head if self.head.seq else None
        else:
            known = _head_of(os.pread(self._head_fd, HEAD_BYTES, 0))
        if self._fd >= 0 and known and _same(self.path, self._fd):
            size, end = os.fstat(self._fd).st_size, f'"hash":"{known.hash}"}}\n'.encode()
            if os.pread(self._fd, len(end), max(0, size - len(end))) == end:
                self.head, self._size = known, size
                return
        self._reopen(known)

    def kept(self, seq: int) -> Future[None] | None:
        """A future that is done when line `seq` is on the disk, with AuditUnavailable if that fails. None if there is
        nothing to wait for: it is on the disk, or `fsync` is not `always`."""
        with self._lock:
            if self.fsync != "always" or seq <= self._synced:
                return None
            waiting: Future[None] = Future()
            self._waiting.append((seq, waiting))
            self._wake.set()
            return waiting

    def note(self, event: str, **fields: object) -> None:
        """Append one line about an event that has already happened. If it cannot be written, it is counted, and a later
        line reports the number."""
        try:
            self.write(event, **fields)
        except AuditUnavailable:
            self._lost[event] += 1

    def _fail(self, reason: str) -> None:
        metrics.AUDIT_FAILURES.inc()
        metrics.AUDIT_OK.set(0)
        if self.failed is None:
            log.error("audit: %s; steered requests are refused until it can be written again", reason)
        self.failed = reason

    def _append(self, event: str, fields: dict[str, object]) -> int:
        line, head = self._line(event, fields)
        if self._size and self._size + len(line) > self.max_bytes:
            self._rotate()
            line, head = self._line(event, fields)
        self._put(line, head)
        metrics.AUDIT_LINES.labels(event=event).inc()
        return head.seq

    def _line(self, event: str, fields: dict[str, object]) -> tuple[bytes, Head]:
        seq = self.head.seq + 1
        record = {"time": datetime.now(UTC).isoformat(timespec="microseconds"), "seq": seq, "event": event}
        line, digest = seal(record | fields | {"prev": self.head.hash})
        return line, Head(seq, digest)

    def _put(self, line: bytes, head: Head) -> None:
        try:
            written = os.write(self._fd, line)
            if written < len(line):  # a full disk takes a part of it, and fails at the next write
                written += os.write(self._fd, line[written:])
            # one write in place, of a fixed length within one sector, so a reader sees the old head or the new one
            os.pwrite(self._head_fd, f"{head.seq:020d}:{head.hash}\n".encode(), 0)
        except OSError:
            with suppress(OSError):
                os.ftruncate(self._fd, self._size)
            raise
        self._size += len(line)
        self.head = head

    def _rotate(self) -> None:
        old = self._free_name()
        try:
            os.rename(self.path, old)
        except OSError:  # the file is a mount of its own, or its folder belongs to somebody else
            old.unlink()
            raise
        if self.fsync != "never":
            self._unsynced.append(os.dup(self._fd))
        self._begin({"previous": old.name})

    def _free_name(self) -> Path:
        """A new name for the full file, reserved by an empty file: `rename` would overwrite an existing file, which may
        be a part of an older chain."""
        for number in itertools.count(1):
            path = self.path.with_name(f"{self.path.name}.{self.head.seq}" + (f"-{number}" if number > 1 else ""))
            with suppress(FileExistsError):
                os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
                break
        return path

    def _previous(self) -> Path | None:
        """The rotated file whose last line is the end of the chain."""
        for path in sorted(self.path.parent.glob(f"{glob.escape(self.path.name)}.{self.head.seq}*")):
            with suppress(OSError, ValueError), path.open("rb") as file:
                file.seek(max(0, os.fstat(file.fileno()).st_size - MAX_LINE))
                last = file.read(MAX_LINE).removesuffix(b"\n").rpartition(b"\n")[2]
                if unseal(last + b"\n")["hash"] == self.head.hash:
                    return path
        return None

    def _begin(self, detail: dict[str, object]) -> None:
        """Begin a new file that continues the chain."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        self._fd = _opened(self.path)
        self._size = os.fstat(self._fd).st_size
        self._append("rotated", {"detail": detail})

    def _reopen(self, known: Head | None) -> None:
        """Open the file and find the end of its chain, which should be `known`. Damage by a crash is repaired, and an
        event reports it."""
        if self._fd >= 0:
            if self.fsync != "never" and self.head.seq > self._synced and not _same(self.path, self._fd):
                self._unsynced.append(self._fd)  # another process has rotated it
            else:
                os.close(self._fd)
            self._fd = -1
        self._fd = _opened(self.path)
        self._size = os.fstat(self._fd).st_size
        healed: dict[str, object] = {}
        if self._size == 0:
            self.head = known or Head()
            if self.head.seq:
                if previous := self._previous():
                    self._begin({"previous": previous.name})
                else:
                    healed = {"missing": f"the file is gone or empty, its head says {self.head.seq}"}
        else:
            tail = os.pread(self._fd, MAX_LINE, max(0, self._size - MAX_LINE))
            whole, _, torn = tail.rpartition(b"\n")
            last = whole.rpartition(b"\n")[2]
            if torn:
                os.ftruncate(self._fd, self._size - len(torn))
                self._size -= len(torn)
                shown = torn[:TORN_SHOWN].decode("ascii", "backslashreplace")
                healed["torn"] = {"bytes": len(torn), "sha256": hashlib.sha256(torn).hexdigest(), "begins": shown}
            try:
                record = unseal(last + b"\n")
                self.head = Head(record["seq"], record["hash"])
            except ValueError as error:
                self.head = known or Head()
                healed["damaged"] = f"the last line: {error}"
            if known is None:
                healed["missing"] = "FILE.head, which says where the chain ended"
            elif known.seq > self.head.seq:
                healed["missing"] = f"lines {self.head.seq + 1} to {known.seq}"
                self.head = known
            elif known.seq == self.head.seq and known.hash != self.head.hash:
                healed["damaged"] = "the last line is not the one that was written"
        if healed:
            log.error("audit: %s is damaged: %s", self.path, healed)
            self._append("recovered", {"detail": healed})

    def _sync(self) -> None:
        """The loop of the thread that waits for the disk, so that the event loop never does."""
        while not self._closed.is_set():
            self._wake.wait(None if self.fsync == "always" else FSYNC_EVERY)
            self._wake.clear()
            try:
                self._sync_once()
            except Exception as error:  # the thread must go on: no later line would be brought to the disk
                reason = getattr(error, "strerror", None) or str(error)
                with self._lock:
                    self._fail(f"{self.path}: {reason}")
                    waiting, self._waiting = self._waiting, []
                for _, each in waiting:
                    each.set_exception(AuditUnavailable(f"the audit log cannot be kept: {reason}"))

    def _sync_once(self) -> None:
        with self._lock:
            upto = self.head.seq
            if upto <= self._synced or self._fd < 0:
                return
            files = [*self._unsynced, os.dup(self._fd), os.dup(self._head_fd)]
            self._unsynced = []
        try:  # without the lock: a slow disk must not delay admissions
            for fd in files:
                os.fsync(fd)
        finally:
            for fd in files:
                os.close(fd)
        with self._lock:
            self._synced = max(self._synced, upto)
            done = [each for seq, each in self._waiting if seq <= self._synced]
            self._waiting = [(seq, each) for seq, each in self._waiting if seq > self._synced]
        for each in done:
            each.set_result(None)


def _opened(path: Path) -> int:
    """A descriptor for appending. Raises OSError, also for a device or a FIFO, which would not keep the lines."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NONBLOCK, 0o600)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.EINVAL, "it is not a regular file")
    return fd


def _same(path: Path, fd: int) -> bool:
    """Whether the open file is still the one at this path."""
    try:
        here, ours = os.stat(path), os.fstat(fd)
    except FileNotFoundError:
        return False
    return (here.st_ino, here.st_dev) == (ours.st_ino, ours.st_dev)


def _read_head(path: Path) -> Head | None:
    try:
        return _head_of(path.read_bytes())
    except OSError:
        return None


def _head_of(data: bytes) -> Head | None:
    try:
        return Head.parse(data.decode("ascii"))
    except ValueError:
        return None


#: The suffix that rotation adds to a file's name.
_ROTATED = re.compile(r"\.\d+(-\d+)?$")
#: How many line numbers a note lists.
LISTED = 3

# -- verification ----------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Verification:
    """The result of a verification. A problem means that lines were changed or lost; a note does not."""

    lines: int = 0
    first: int | None = None
    last: Head = field(default_factory=Head)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    #: Requests (by the number of their line) and servers (by their front end) that have begun and not ended.
    admitted: dict[int, None] = field(default_factory=dict)
    servers: dict[object, int] = field(default_factory=dict)

    def check_first(self, where: str, number: int, record: Mapping[str, Any], before: Head | None, start: int) -> None:
        """Check the first readable line: the lines before it must not be asked for, or `before` must vouch for them."""
        seq = self.first = record["seq"]
        if number > 1:
            self.notes.append(f"{where}: the line before this one cannot be checked")
        elif seq == 1 and record["prev"] != GENESIS:
            self.problems.append(f"{where}: line 1 claims to follow another line")
        elif before is not None and before.hash != record["prev"]:
            self.problems.append(f"{where}: line {seq} does not follow the anchor of line {before.seq}")
        elif before is None and seq > start:
            self.problems.append(
                f"{where}: begins with line {seq}: lines {start} to {seq - 1} are missing; if they are kept elsewhere, "
                f"give --from {seq}, or their end: --anchor {seq - 1}:{str(record['prev'])[:64]}"
            )
        elif seq > 1:
            self.notes.append(f"{where}: begins with line {seq}, as requested; earlier lines were not checked")

    def check_line(self, where: str, record: Mapping[str, Any], before: Head | None) -> None:
        """Check a line against the one before it, if that is known, and note what its event says."""
        seq, detail = record["seq"], found if isinstance(found := record.get("detail"), dict) else {}
        if before is not None and seq != before.seq + 1:
            what = "lines are missing" if seq > before.seq + 1 else "lines are out of order"
            self.problems.append(f"{where}: line {seq} comes after line {before.seq}: {what}")
        elif before is not None and before.hash and record["prev"] != before.hash:
            self.problems.append(f"{where}: line {seq} does not follow the line before it")
        front_end = str(detail.get("front_end", ""))
        match record.get("event"):
            case "recovered" if detail.keys() & {"missing", "damaged"}:
                damage = detail.get("missing") or detail.get("damaged")
                self.problems.append(f"{where}: the server found, when it started: {damage}")
            case "recovered":
                self.notes.append(f"{where}: a crash or a full disk: {json.dumps(detail)[:200]}")
            case "admitted":
                self.admitted[seq] = None
            case "ended" if isinstance(line := record.get("admitted"), int):
                self.admitted.pop(line, None)
            case "start":
                if (since := self.servers.pop(front_end, None)) is not None:
                    self.notes.append(
                        f"line {seq}: a server starts, and no `stop` came after the `start` of line {since}: it was "
                        "killed or crashed"
                    )
                self.servers[front_end] = seq
            case "stop":
                self.servers.pop(front_end if front_end in self.servers else next(iter(self.servers), None), None)

    def check_end(self) -> None:
        """After the last line: note the requests that have not ended."""
        if self.admitted:
            shown = ", ".join(map(str, [*self.admitted][:LISTED]))
            more = f" and {len(self.admitted) - LISTED} more" if len(self.admitted) > LISTED else ""
            self.notes.append(
                f"admitted and not ended are the requests of the lines {shown}{more} ({len(self.admitted)} in all): "
                "they still run, or the server was killed"
            )


def with_rotated(path: Path) -> list[Path]:
    """The file, and the files that it was rotated to."""
    others = path.parent.glob(f"{glob.escape(path.name)}.*")
    return [path, *sorted(other for other in others if _ROTATED.fullmatch(other.name, len(path.name)))]


#: How often a log is read again because it was written meanwhile.
TRIES = 20


def verify_with_rotated(path: Path, anchors: Sequence[Head] = (), start: int = 1) -> Verification:
    """`verify` of a log and all files that it was rotated to, also while a server writes it."""
    before: list[str] = []
    for left in reversed(range(TRIES)):
        try:
            report = verify(with_rotated(path), anchors, start)
        except FileNotFoundError:  # during a rotation there is no file at its name for a moment
            if not left:
                raise
            time.sleep(0.01)
            continue
        if not report.problems or report.problems == before:
            break
        before = report.problems  # one that a line just being written has caused is gone at the next try
    return report


def verify(paths: Sequence[Path], anchors: Iterable[Head] = (), start: int = 1) -> Verification:
    """Check the files of one chain, given in any order.

    Line `start` and all after it must be there, at least up to each anchor. The `FILE.head` beside a file, or beside
    the file that it was rotated from, is an anchor too. An anchor of the line before the first one vouches for the
    missing lines before it.

    Raises OSError for a file that cannot be read.
    """
    paths = list({os.path.realpath(path): path for path in paths}.values())
    report = Verification()
    wanted = {head.seq: head for head in anchors if head.seq}
    for name in {file: None for path in paths for file in (path, path.with_name(_ROTATED.sub("", path.name)))}:
        # read before the files, to which lines may be added meanwhile; a head with the number 0 names no line
        if (head := _read_head(name.with_name(f"{name.name}.head"))) and head.seq:
            wanted.setdefault(head.seq, head)
    if not wanted:
        report.problems.append(
            "there is no FILE.head and no anchor that names a line, so nobody would notice lines missing at the end: "
            "give a head that you kept elsewhere (--anchor SEQ:HASH)"
        )
    before: Head | None = None
    strangers = list[str]()
    for path in sorted(paths, key=_first_number):
        known, foreign, number = len(report.problems), 0, 0
        for number, line in enumerate(_lines(path), 1):
            where = f"{path.name}:{number}"
            report.lines += 1
            try:
                record = unseal(line)
            except ValueError as error:
                foreign += isinstance(error, NoLine) or not line.endswith(b"\n")
                report.problems.append(f"{where}: {error}")
                before = Head(before.seq + 1, "") if before else None
                continue
            if report.first is None:
                report.check_first(where, number, record, wanted.pop(record["seq"] - 1, None), start)
            report.check_line(where, record, before)
            before = report.last = Head(record["seq"], record["hash"])
            if (anchor := wanted.pop(before.seq, None)) and anchor != before:
                report.problems.append(f"{where}: line {anchor.seq} has another hash than the anchor")
        if number and foreign == number:
            strangers.append(f"{path.name}: this is not an audit log: none of its {number} lines is a line of one")
            report.problems[known:] = [strangers[-1]]
    if report.first is None and strangers:
        report.problems = strangers
        return report
    if report.first is None:
        report.problems.append("there is no line that can be read")
    report.check_end()
    for anchor in wanted.values():
        if anchor.seq > report.last.seq:
            report.problems.append(
                f"the end is missing: the last line is {report.last.seq}, the anchor says {anchor.seq}"
            )
        else:
            report.problems.append(f"line {anchor.seq} of the anchor is not in these files")
    return report


def _first_number(path: Path) -> int:
    """The number of a file's first readable line."""
    for line in _lines(path):
        with suppress(ValueError):
            return unseal(line)["seq"]
    return 0


def _lines(path: Path) -> Iterator[bytes]:
    with open_file(path) as file:
        while line := file.readline(MAX_LINE):
            yield line
