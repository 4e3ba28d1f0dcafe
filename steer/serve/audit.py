"""The audit log: what was steered, by whom, and who changed what; never a prompt, an answer or a secret.

JSON lines. Each line has the next number as `seq` and the hash of the line before as `prev`, and ends with `hash`, the
SHA-256 of the line without it. So an edited, removed, added or moved line breaks the chain. `FILE.head` has the last
number and hash, so that missing lines at the end are found too. A file that exceeds its size is renamed to
`FILE.<its last seq>` (with `-2` and so on if that name is taken), and the new file continues the chain.

Lines are written where they happen, into the system's memory. A separate thread waits for the disk.

Several processes of one machine may write one file: each line is written under a lock (`FILE.lock`), after the line
that `FILE.head` names as the last.

A hash chain cannot detect a history that somebody with write access to both files has computed again from some line on.
Keep the head elsewhere from time to time (`GET /v1/steering` returns it) and verify against that.
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
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, NotRequired, TypedDict, cast

from steer.errors import SteerError
from steer.serve import metrics

log = logging.getLogger("steer")

GENESIS = "0" * 64
#: Bytes of the end of a file that are read to find its last line; no line is longer.
MAX_LINE = 2**18
#: How much of a torn line the event that reports it keeps.
TORN_SHOWN = 4096
#: More than FILE.head has.
HEAD_BYTES = 256
FSYNC_EVERY = 1.0
Fsync = Literal["always", "second", "never"]


class AuditError(SteerError):
    """The audit file cannot be used at all, so the server must not start."""


class NoLine(ValueError):
    """Bytes that are no line of an audit log, not even one that was changed."""


class AuditUnavailable(SteerError):
    """A line could not be written, so what it was to record must not happen."""


@dataclass(frozen=True, slots=True)
class Head:
    """The last line of a chain: its number and its hash."""

    seq: int = 0
    hash: str = GENESIS

    @classmethod
    def parse(cls, text: str) -> Head:
        """Of `SEQ:HASH`. Raises ValueError."""
        seq, _, hash = text.strip().partition(":")
        if not (seq.isascii() and seq.isdigit() and len(hash) == 64):
            raise ValueError(f"{text[:100]!r} is not a head: SEQ:HASH, as FILE.head has it")
        return cls(int(seq), hash)

    def __str__(self) -> str:
        return f"{self.seq}:{self.hash}"


class Record(TypedDict):
    """A line of the log, as far as the chain goes; what else it has depends on the event."""

    seq: int
    prev: str
    hash: str
    event: NotRequired[object]
    detail: NotRequired[object]
    admitted: NotRequired[object]


def seal(record: dict[str, object]) -> tuple[bytes, str]:
    """A record as its line, newline included, and the line's hash. The one definition of the canonical form.

    Raises ValueError for a line over MAX_LINE, which could not be read again.
    """
    bare = json.dumps(record, separators=(",", ":"), allow_nan=False)
    digest = hashlib.sha256(bare.encode()).hexdigest()
    line = f'{bare[:-1]},"hash":"{digest}"}}\n'.encode()
    if len(line) > MAX_LINE:
        raise ValueError(f"a line of {len(line)} bytes, at most {MAX_LINE} are accepted")
    return line, digest


def unseal(line: bytes) -> Record:
    """The record of a line, `hash` included. Raises ValueError for anything but the bytes that `seal` gives."""
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
    return cast(Record, record)


class Audit:
    """One file that is being written, by this process and maybe by others. Thread-safe."""

    def __init__(self, path: Path, *, max_bytes: int = 64 * 2**20, fsync: Fsync = "second") -> None:
        self.path, self.max_bytes, self.fsync = path, max_bytes, fsync
        self.failed: str | None = None
        self.head = Head()
        self._head_path = path.with_name(f"{path.name}.head")
        self._lost: Counter[str] = Counter()
        self._fd = self._head_fd = self._guard = -1
        self._size = 0
        self._synced = 0  # the last line that is on the disk
        self._behind: list[int] = []  # files that were rotated and are not yet on the disk
        self._waiting: list[tuple[int, Future[None]]] = []
        self._lock = threading.RLock()
        self._wake = threading.Event()
        self._closed = threading.Event()

    def check(self) -> None:
        """Raise AuditError where the file can surely not be written. It is not touched."""
        folder = self.path.parent
        if not folder.is_dir():
            raise AuditError(f"the audit file {self.path} cannot be written: the folder {folder} does not exist")
        if self.path.is_dir() or not os.access(self.path if self.path.exists() else folder, os.W_OK):
            what = "is a folder" if self.path.is_dir() else "no permission"
            raise AuditError(f"the audit file {self.path} cannot be written: {what}")

    def open(self) -> None:
        """Look at the file's tail and go on with its chain. Raises AuditError."""
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
        """Append one line; its number. Raises AuditUnavailable: then nothing of it is in the file."""
        with self._alone():
            try:
                self._catch_up()
                if self._lost:
                    self._append("recovered", {"detail": {"lost": dict(self._lost)}})
                    log.warning("the audit file is written again; lost in between: %s", dict(self._lost))
                    self._lost.clear()
                seq = self._append(event, fields)
            except (OSError, ValueError) as error:
                said = getattr(error, "strerror", None) or str(error)
                self._fail(f"{self.path}: {said}")
                raise AuditUnavailable(f"the audit log cannot be written: {said}") from None
            if self.failed is not None:
                self.failed = None
                metrics.AUDIT_OK.set(1)
            if self.fsync == "always":
                self._wake.set()
            return seq

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """No other thread or process writes meanwhile."""
        with self._lock:
            if self._guard >= 0:
                fcntl.flock(self._guard, fcntl.LOCK_EX)  # which a process that dies lets go
            try:
                yield
            finally:
                if self._guard >= 0:
                    fcntl.flock(self._guard, fcntl.LOCK_UN)

    def _catch_up(self) -> None:
        """Be at the end of the chain, wherever other processes have brought it by now."""
        if not _same(self._head_path, self._head_fd):
            fresh = os.open(self._head_path, os.O_RDWR | os.O_CREAT, 0o600)  # may fail: the old one stays ours
            os.close(self._head_fd)
            self._head_fd = fresh
            known: Head | None = self.head if self.head.seq else None  # it was moved away: what we know is all there is
        else:
            known = _head_of(os.pread(self._head_fd, HEAD_BYTES, 0))
        if self._fd >= 0 and known and _same(self.path, self._fd):
            size, end = os.fstat(self._fd).st_size, f'"hash":"{known.hash}"}}\n'.encode()
            if os.pread(self._fd, len(end), max(0, size - len(end))) == end:
                self.head, self._size = known, size
                return
        self._reopen(known)

    def kept(self, seq: int) -> Future[None] | None:
        """Done when line `seq` is on the disk, with AuditUnavailable where it cannot be; None where nobody has to wait:
        it is there, or `fsync` does not ask for it."""
        with self._lock:
            if self.fsync != "always" or seq <= self._synced:
                return None
            waiting: Future[None] = Future()
            self._waiting.append((seq, waiting))
            self._wake.set()
            return waiting

    def note(self, event: str, **fields: object) -> None:
        """Append one line about what has happened anyway. What cannot be written is counted, and said later."""
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
            if written < len(line):  # a disk that is full takes a part, and says so at the next write
                written += os.write(self._fd, line[written:])
            # in place, in one write of one length within one sector: a reader sees the old one or the new one
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
        except OSError:  # of a file that is mounted by itself, or in a folder of somebody else's
            old.unlink()
            raise
        if self.fsync != "never":
            self._behind.append(os.dup(self._fd))
        self._begin({"previous": old.name})

    def _free_name(self) -> Path:
        """A name for the file that is full, taken by an empty file: `rename` would overwrite what has it already, which
        may be a part of an older chain."""
        for number in itertools.count(1):
            path = self.path.with_name(f"{self.path.name}.{self.head.seq}" + (f"-{number}" if number > 1 else ""))
            with suppress(FileExistsError):
                os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
                break
        return path

    def _previous(self) -> Path | None:
        """The file beside this one whose last line is the chain's."""
        for path in sorted(self.path.parent.glob(f"{glob.escape(self.path.name)}.{self.head.seq}*")):
            with suppress(OSError, ValueError), path.open("rb") as file:
                file.seek(max(0, os.fstat(file.fileno()).st_size - MAX_LINE))
                last = file.read(MAX_LINE).removesuffix(b"\n").rpartition(b"\n")[2]
                if unseal(last + b"\n")["hash"] == self.head.hash:
                    return path
        return None

    def _begin(self, detail: dict[str, object]) -> None:
        """A new file that goes on with the chain."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        self._fd = _opened(self.path)
        self._size = os.fstat(self._fd).st_size
        self._append("rotated", {"detail": detail})

    def _reopen(self, known: Head | None) -> None:
        """Find the end of the chain in what is there, where it is `known` to end. What a crash left is healed by an
        event that says so."""
        if self._fd >= 0:
            if self.fsync != "never" and self.head.seq > self._synced and not _same(self.path, self._fd):
                self._behind.append(self._fd)  # another process has rotated it
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
        """On a thread of its own: the event loop never waits for the disk."""
        while not self._closed.is_set():
            self._wake.wait(None if self.fsync == "always" else FSYNC_EVERY)
            self._wake.clear()
            try:
                self._sync_once()
            except Exception as error:  # a thread that ends here would leave all later lines to the system's mood
                said = getattr(error, "strerror", None) or str(error)
                with self._lock:
                    self._fail(f"{self.path}: {said}")
                    waiting, self._waiting = self._waiting, []
                for _, each in waiting:
                    each.set_exception(AuditUnavailable(f"the audit log cannot be kept: {said}"))

    def _sync_once(self) -> None:
        with self._lock:
            upto = self.head.seq
            if upto <= self._synced or self._fd < 0:
                return
            files = [*self._behind, os.dup(self._fd), os.dup(self._head_fd)]
            self._behind = []
        try:  # not under the lock: a slow disk must not hold up admissions
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
    """A descriptor for appending. Raises OSError, also for what is no file: it would swallow lines."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NONBLOCK, 0o600)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.EINVAL, "it is not a regular file")
    return fd


def _same(path: Path, fd: int) -> bool:
    """Is the file that is open still the one under its name?"""
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


#: What rotation puts after a file's name.
_ROTATED = re.compile(r"\.\d+(-\d+)?$")
#: Numbers of lines that a note names.
NAMED = 3

# -- verification ----------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Verification:
    """What verification found. `problems` say that something was changed or lost; `notes` do not."""

    lines: int = 0
    first: int | None = None
    last: Head = field(default_factory=Head)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    #: What has begun and not ended yet: requests by the number of their line, and servers by their front end.
    admitted: dict[int, None] = field(default_factory=dict)
    servers: dict[object, int] = field(default_factory=dict)

    def begin(self, where: str, number: int, record: Record, before: Head | None, start: int) -> None:
        """Check at the first line that can be read that those before it are not asked for, or have an anchor."""
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

    def see(self, where: str, record: Record, expected: Head | None) -> None:
        """A line that can be read, and what the one before it says of it, if that is known."""
        seq, detail = record["seq"], found if isinstance(found := record.get("detail"), dict) else {}
        if expected is not None and seq != expected.seq + 1:
            what = "lines are missing" if seq > expected.seq + 1 else "lines are out of order"
            self.problems.append(f"{where}: line {seq} comes after line {expected.seq}: {what}")
        elif expected is not None and expected.hash and record["prev"] != expected.hash:
            self.problems.append(f"{where}: line {seq} does not follow the line before it")
        front_end = str(detail.get("front_end", ""))
        match record.get("event"):
            case "recovered" if detail.keys() & {"missing", "damaged"}:
                said = detail.get("missing") or detail.get("damaged")
                self.problems.append(f"{where}: the server found, when it started: {said}")
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

    def end(self) -> None:
        """No line is left."""
        if self.admitted:
            shown = ", ".join(map(str, [*self.admitted][:NAMED]))
            more = f" and {len(self.admitted) - NAMED} more" if len(self.admitted) > NAMED else ""
            self.notes.append(
                f"admitted and not ended are the requests of the lines {shown}{more} ({len(self.admitted)} in all): "
                "they run still, or the server was killed"
            )


def with_rotated(path: Path) -> list[Path]:
    """The file, and those beside it that it was rotated to."""
    others = path.parent.glob(f"{glob.escape(path.name)}.*")
    return [path, *sorted(other for other in others if _ROTATED.fullmatch(other.name, len(path.name)))]


#: How often a log is read once more because it was written meanwhile.
TRIES = 20


def verify_with_rotated(path: Path, anchors: Sequence[Head] = (), start: int = 1) -> Verification:
    """`verify` of a log and all files that it was rotated to, also while a server writes it."""
    before: list[str] = []
    for left in reversed(range(TRIES)):
        try:
            report = verify(with_rotated(path), anchors, start)
        except FileNotFoundError:  # it is not there for a moment, between its two names
            if not left:
                raise
            time.sleep(0.01)
            continue
        if not report.problems or report.problems == before:
            break
        before = report.problems  # what was seen of a line or a file that just came is gone at the next look
    return report


def verify(paths: Sequence[Path], anchors: Iterable[Head] = (), start: int = 1) -> Verification:
    """Check files of one chain, in whatever order they are given: line `start` and all that follow it must be there, up
    to each of the anchors. The `FILE.head` beside a file, also beside one that was rotated, is an anchor too. An anchor
    of the line before the first one vouches for all that are not there before it.

    Raises OSError for a file that cannot be read.
    """
    paths = list({path.resolve(): path for path in paths}.values())
    report = Verification()
    wanted = {head.seq: head for head in anchors if head.seq}
    for name in {file: None for path in paths for file in (path, path.with_name(_ROTATED.sub("", path.name)))}:
        # first: lines may be added while this reads; the number 0 is of no line, so it vouches for none
        if (head := _read_head(name.with_name(f"{name.name}.head"))) and head.seq:
            wanted.setdefault(head.seq, head)
    if not wanted:
        report.problems.append(
            "there is no FILE.head and no anchor that names a line, so nobody would notice lines missing at the end: "
            "give a head that you kept elsewhere (--anchor SEQ:HASH)"
        )
    expected: Head | None = None
    strangers = list[str]()
    for path in sorted(paths, key=_begins):
        known, foreign, number = len(report.problems), 0, 0
        for number, line in enumerate(_lines(path), 1):
            where = f"{path.name}:{number}"
            report.lines += 1
            try:
                record = unseal(line)
            except ValueError as error:
                foreign += isinstance(error, NoLine) or not line.endswith(b"\n")
                report.problems.append(f"{where}: {error}")
                expected = Head(expected.seq + 1, "") if expected else None
                continue
            if report.first is None:
                report.begin(where, number, record, wanted.pop(record["seq"] - 1, None), start)
            report.see(where, record, expected)
            expected = report.last = Head(record["seq"], record["hash"])
            if (anchor := wanted.pop(expected.seq, None)) and anchor != expected:
                report.problems.append(f"{where}: line {anchor.seq} has another hash than the anchor")
        if number and foreign == number:
            strangers.append(f"{path.name}: this is no audit log: not one of its lines ({number}) is a line of one")
            report.problems[known:] = [strangers[-1]]
    if report.first is None and strangers:
        report.problems = strangers
        return report
    if report.first is None:
        report.problems.append("there is no line that can be read")
    report.end()
    for anchor in wanted.values():
        if anchor.seq > report.last.seq:
            report.problems.append(
                f"the end is missing: the last line is {report.last.seq}, the anchor says {anchor.seq}"
            )
        else:
            report.problems.append(f"line {anchor.seq} of the anchor is not in these files")
    return report


def _begins(path: Path) -> int:
    """The number of a file's first line that can be read."""
    for line in _lines(path):
        with suppress(ValueError):
            return unseal(line)["seq"]
    return 0


def _lines(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while line := file.readline(MAX_LINE):
            yield line
