"""Names → versions of directions: validate, place, swap under live traffic, pin what running requests use.

A *version* is one file's content, known by its digest and never changed. A name points to a version; a swap validates
the new one completely, has it placed on every worker, and only then moves the pointer. Requests pin the versions that
they were admitted with, and a version that no name points to is unloaded when its last request ends.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Hashable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import numpy as np

from steer.direction import Direction, DirectionMeta, read_file, write_file
from steer.direction import digest as digest_of
from steer.errors import DirectionError, NoRoom, SpecError, SteerError, UnknownDirection, prefixed, printable
from steer.names import OTHER_SUFFIXES, SUFFIX, check_name
from steer.shape import Shape
from steer.shared import Shared
from steer.spec import MAX_PLACES, PHASES, Entry, Readout, RequestedDirection, Spec, meant
from steer.watch import Follower

log = logging.getLogger("steer")

#: May the caller know of this name?
Known = Callable[[str], bool]
#: The stamp of a file that must be looked at again: equal to no file's.
_UNSETTLED = (-1, -1, -1)


class Placement(Protocol):
    """Where versions are made resident: one bank, or all workers of an engine."""

    @property
    def shape(self) -> Shape:
        """What must agree with it before it is loaded."""

    def load(self, digest: str, direction: Direction, data: bytes) -> None:
        """Make it resident everywhere. Raises NoRoom; then nothing has changed anywhere."""

    def unload(self, digest: str) -> None:
        """Let it go. Called wherever a request ends, so it must not wait, and perhaps while `load` runs elsewhere."""


@dataclass(slots=True)
class Version:
    """One resident version. `pins` counts the admissions that use it, `names` the names that point to it."""

    digest: str
    direction: Direction
    bytes: int
    loaded: float = field(default_factory=time.time)
    pins: int = 0
    names: int = 0

    @property
    def needed(self) -> bool:
        return self.pins > 0 or self.names > 0


def _another(version: Version, name: str, wanted: str) -> SpecError:
    said = f"direction '{name}' is the version {version.digest[:12]} now, and {wanted[:12]} is asked for"
    return SpecError(said, param="steer.digest")


@dataclass(frozen=True, slots=True)
class Move:
    """A name that points elsewhere now; None is nowhere. `seconds` is what it took from the bytes on."""

    name: str
    old: str | None
    new: str | None
    seconds: float


class Registry:
    """Thread-safe. `folder` holds the files; without one, directions come by `put` alone and live in memory.
    A `quiet` one, for use inside of a program, logs nothing of what is put, and raises what it does not accept."""

    def __init__(
        self, placement: Placement, folder: Path | None = None, *, patience: float = 10.0, quiet: bool = False
    ) -> None:
        self.placement, self.folder, self.patience, self.quiet = placement, folder, patience, quiet
        #: Why the newest content offered for a name is not served.
        self.failures: dict[str, tuple[str, ...]] = {}
        #: Why the folder itself cannot be read, if it cannot.
        self.folder_problem: str | None = None
        #: What keeps looking at the folder, from `follow` on.
        self.follower: Follower | None = None
        self.swaps = 0
        #: Told of every name that has moved, on the thread that moved it.
        self.on_move: Callable[[Move], None] = lambda move: None
        self._names: dict[str, str] = {}
        self._versions: dict[str, Version] = {}
        self._seen: dict[str, tuple[int, int, int]] = {}
        self._others: set[str] = set()
        self._freed = 0  # versions unloaded so far
        self._state = threading.Condition(threading.RLock())
        self._swapping = threading.RLock()  # one change of content at a time; admission never waits for it

    # -- reading -------------------------------------------------------------------------------------------------

    def names(self) -> dict[str, Version]:
        with self._state:
            return {name: self._versions[d] for name, d in sorted(self._names.items())}

    def get(self, name: str, among: Known = lambda _: True) -> Version:
        """The version that `name` points to. Names for which `among` is false do not exist for the caller."""
        with self._state:
            if name not in self._names or not among(name):
                served = ", ".join(known for known in sorted(self._names) if among(known)) or "none"
                said = f"direction {name[:100]!r} is not served; served: {served}{meant(name)}"
                raise UnknownDirection(said, param="steer")
            return self._versions[self._names[name]]

    @property
    def resident(self) -> int:
        with self._state:
            return len(self._versions)

    @property
    def rows(self) -> int:
        """DirectionBank rows that the resident versions have."""
        with self._state:
            return sum(version.direction.resident(self.placement.shape.rank) for version in self._versions.values())

    def steady(self) -> AbstractContextManager[object]:
        """While it is held (`with registry.steady():`) no name moves."""
        return self._state

    # -- requests ------------------------------------------------------------------------------------------------

    def resolve(self, wanted: Sequence[RequestedDirection], among: Known = lambda _: True) -> Spec:
        """The exact versions, modes and strengths that `wanted` means now. Raises SpecError with every problem."""
        entries: list[Entry] = []
        problems: list[str] = []
        unknown = False
        for item in wanted:
            try:
                version = self.get(item.direction, among)
                if item.digest and not version.digest.startswith(item.digest):
                    raise _another(version, item.direction, item.digest)
                meta = version.direction.meta
                mode = item.mode or meta.mode
                strength = meta.strength_in(mode) if item.strength is None else item.strength
                shift = item.shift if np.float32(item.shift or 0) else None
                entry = Entry(item.direction, version.digest, mode, strength, item.layers, item.tokens, shift=shift)
                if (condition := item.condition) is not None:
                    probe = self.get(condition.direction, among)
                    if not probe.digest.startswith(condition.digest):
                        raise _another(probe, condition.direction, condition.digest)
                    entry = replace(entry, condition=replace(condition, digest=probe.digest))
                    entry = self.placement.shape.after_condition(probe.direction, entry)
                self.placement.shape.check_entry(version.direction, entry)
            except SpecError as error:
                problems += error.problems
                unknown |= isinstance(error, UnknownDirection)
                continue
            same = next((e for e in entries if (e.digest, e.mode) == (entry.digest, entry.mode)), None)
            if same is not None:
                which = f"direction '{entry.direction}' is listed twice"
                if same.direction != entry.direction:
                    which = f"the directions '{same.direction}' and '{entry.direction}' are one file, listed twice"
                problems.append(f"{which} in the mode '{entry.mode}'")
            if np.float32(entry.strength):  # strength 0 does nothing, so it is not part of what is applied
                entries.append(entry)
        problems += self._too_much(entries)
        if problems:
            raise (UnknownDirection if unknown else SpecError)(problems, "steer")
        return Spec(tuple(entries))

    def merge(self, first: Spec, then: Spec) -> Spec:
        """Both, in this order; what `then` has already is not applied twice. Both must have been resolved just now
        (`steady`). Raises SpecError."""
        if not then:
            return first
        merged = Spec((*(entry for entry in first.entries if entry not in then.entries), *then.entries))
        if problems := self._too_much(merged.entries):
            raise SpecError(problems, "steer")
        return merged

    def _too_much(self, entries: Sequence[Entry]) -> list[str]:
        """What is wrong with these entries in one request."""
        places = sorted({entry.tokens or "all" for entry in entries})
        if len(places) > MAX_PLACES:
            return [
                f"the directions of one request act at {len(places)} different tokens ({', '.join(places)}), at most "
                f"{MAX_PLACES} are accepted"
            ]
        phases = [place for place in places if place in PHASES]
        if phases and len(places) > 1:
            return [
                f"tokens: '{phases[0]}' does not go together with others in one request ({', '.join(places)}); "
                "accepted: the same for all its directions"
            ]
        if len({entry.condition for entry in entries}) > 1:
            said = ", ".join(dict.fromkeys(f"if {e.condition}" if e.condition else "always" for e in entries))
            return [f"the directions of one request act under different conditions ({said}); accepted: one for all"]
        with self._state:
            needed = sum(self._versions[entry.digest].direction.rows_in(entry.mode) for entry in entries)
        needed += any(entry.condition for entry in entries)
        needed = max(needed, 2) if phases else needed
        if needed <= (rank := self.placement.shape.rank):
            return []
        condition = " (one of them for its condition)" if any(entry.condition for entry in entries) else ""
        condition = f" (two are the least with the tokens '{phases[0]}')" if phases else condition
        return [
            f"the request needs {needed} direction rows for each token{condition}, and the rank here is {rank}: "
            f"`--rank {needed}` for a server, `rank=` in Python"
        ]

    def metas(self, spec: Spec) -> list[DirectionMeta]:
        """What is known of the versions of a resolved spec that are still resident, in the order of its entries."""
        with self._state:
            return [self._versions[e.digest].direction.meta for e in spec.entries if e.digest in self._versions]

    def digests(self) -> dict[str, str]:
        """What each name points to now."""
        with self._state:
            return dict(self._names)

    def pin(self, digests: Iterable[str]) -> None:
        """Keep these versions, each once more, until `unpin`. They must have been resolved in this `steady`."""
        with self._state:
            for digest in digests:
                self._versions[digest].pins += 1

    def unpin(self, digests: Iterable[str]) -> None:
        with self._state:
            for digest in digests:
                version = self._versions[digest]
                version.pins -= 1
                self._let_go(version)

    def _point(self, name: str, version: Version | None) -> str | None:
        """Move `name`, to nowhere for None; the digest that it pointed to. Under the state lock."""
        old = self._names.pop(name, None)
        if version is not None:
            self._names[name] = version.digest
            version.names += 1
        if old is not None:
            self._versions[old].names -= 1
            self._let_go(self._versions[old])
        return old

    def _let_go(self, version: Version) -> None:
        """Unload `version` if no name points to it and no request uses it. Under the state lock."""
        if not version.needed and version.digest in self._versions:
            del self._versions[version.digest]
            self.placement.unload(version.digest)
            self._freed += 1
            self._state.notify_all()

    # -- change --------------------------------------------------------------------------------------------------

    def put(self, name: str, data: bytes, *, store: bool = True) -> Version:
        """Serve `data` under `name` from now on, and (with `store` and a folder) keep it as a file.

        Raises DirectionError or NoRoom; then, and whatever else it meets, the old version goes on serving and
        `failures` says why. An upload for a name that has nothing leaves nothing.
        """
        check_name(name)
        started = time.perf_counter()
        with self._swapping:
            version = None
            try:
                version = self._load(name, data)
                if store and self.folder is not None:
                    write_file(self.folder / f"{name}{SUFFIX}", data)
                    self._seen[name] = _UNSETTLED  # another process may have replaced it by now
                with self._state:
                    old = self._point(name, version)
                    self.failures.pop(name, None)
            except Exception as error:
                offered = name in self._names or (self.folder and (self.folder / f"{name}{SUFFIX}").exists())
                self._fail(name, error, keep=not store or bool(offered))
                raise
            finally:
                if version is not None:
                    with self._state:
                        version.pins -= 1
                        self._let_go(version)
            if old != version.digest:
                self.swaps += 1
                if not self.quiet:
                    before = f" (was {old[:12]})" if old else ""
                    log.info("direction '%s' is now %s%s", name, version.digest[:12], before)
                self.on_move(Move(name, old, version.digest, time.perf_counter() - started))
            return version

    def _fail(self, name: str, error: Exception, *, keep: bool = True) -> None:
        """Say why the newest content for `name` is not served, once, however often it is met. Not kept is what was sent
        and left nothing: whoever sent it was told."""
        if isinstance(error, DirectionError):
            problems = error.problems
        elif isinstance(error, SteerError | OSError):
            # a client that may see the direction sees them: no path of the server
            problems = (printable(getattr(error, "strerror", None) or str(error)),)
        else:
            problems = (printable(f"{type(error).__name__}: {error}"),)
        if self.failures.get(name) != problems:
            if keep:
                self.failures[name] = problems
            unforeseen = not isinstance(error, SteerError | OSError)
            if not self.quiet:
                said = "; ".join(problems)
                log.error("direction '%s' was not accepted: %s", printable(name), said, exc_info=unforeseen)

    def delete(self, name: str) -> None:
        """Stop serving `name` and remove its file, also one that was never accepted. Raises UnknownDirection."""
        with self._swapping:
            if name not in self.failures:  # which are names of files as they are, also of those that no name could be
                self.get(name)
                check_name(name)
            if self.folder is not None:
                for path in self.folder.glob(f"*{SUFFIX}"):
                    if _named(path) == name:
                        path.unlink(missing_ok=True)
                self._seen.pop(name, None)
            self._drop(name)

    def _drop(self, name: str) -> None:
        with self._state:
            self.failures.pop(name, None)
            old = self._point(name, None)
        if old:
            if not self.quiet:
                log.info("direction '%s' is no longer served", name)
            self.on_move(Move(name, old, None, 0.0))

    def _load(self, name: str, data: bytes) -> Version:
        """The resident version of `data`, pinned: until a name points to it nothing else would hold it."""
        d = digest_of(data)
        with self._state:
            if d in self._versions:
                self._versions[d].pins += 1
                return self._versions[d]
        direction = Direction.from_bytes(data, source=name)
        with prefixed(name):
            self.placement.shape.check(direction)
        deadline = time.monotonic() + self.patience
        while True:
            freed = self._freed
            try:
                self.placement.load(d, direction, data)  # not under the state lock: workers may take their time
                break
            except NoRoom:
                with self._state:
                    retiring = any(not version.names for version in self._versions.values())
                    if self._freed == freed and not (retiring and self._state.wait(deadline - time.monotonic())):
                        raise
        with self._state:
            version = self._versions[d] = Version(d, direction, len(data), pins=1)
            return version

    # -- the folder ----------------------------------------------------------------------------------------------

    def sync(self) -> None:
        """Make what is served agree with the folder's files. Never raises for one of them: `failures` has why it is not
        served, and the others are.

        Raises OSError when the folder itself cannot be read; then what is served stays as it is.
        """
        if self.folder is None:
            return
        try:
            self._tell_others(os.listdir(self.folder))
        except OSError as error:
            self.folder_problem = error.strerror or str(error)
            raise
        self.folder_problem = None
        with self._swapping:
            present: set[str] = set()
            for path in sorted(self.folder.glob(f"*{SUFFIX}")):
                name = _named(path)
                if name.startswith("."):
                    continue
                present.add(name)
                try:
                    self._seen[name] = self._sync_file(name, path)
                except Exception as error:  # whatever one file meets, the others are looked at
                    self._fail(name, error)
                    self._seen[name] = _UNSETTLED
            for name in self._seen.keys() - present:
                try:
                    self._drop(name)
                    del self._seen[name]
                except Exception as error:  # tried again at the next look
                    self._fail(name, error)

    def _tell_others(self, files: Iterable[str]) -> None:
        """Say once of each file of another tool that it is not served."""
        others = {name for name in files if Path(name).suffix in OTHER_SUFFIXES}
        for name in sorted(others - self._others):
            log.warning(
                "%s is not served: a direction's file ends in %s; `steer convert` makes one of it",
                printable(os.fsencode(name).decode(errors="backslashreplace")),
                SUFFIX,
            )
        self._others = others

    def _sync_file(self, name: str, path: Path) -> tuple[int, int, int]:
        """Serve the file, or have `failures` say why not; the stamp with which it need not be looked at again. Raises
        errors that may be gone at the next look."""
        try:
            status = path.stat()
        except OSError as error:  # a link to nowhere or to itself; or it has just gone, and then the next look drops it
            raise OSError(f"{path.name}: cannot be read: {error.strerror or error}") from None
        stamp = status.st_ctime_ns, status.st_size, status.st_ino  # others where content or permissions are
        if self._seen.get(name) == stamp:
            return stamp
        try:
            data = read_file(path)
            check_name(name)
            self.put(name, data, store=False)
        except NoRoom:
            return _UNSETTLED  # rows may be free at the next look
        except SteerError as error:
            if isinstance(error.__cause__, OSError):  # the disk's trouble, not the file's
                raise
            self._fail(name, error)
        return stamp

    def follow(self, on_look: Callable[[], None] = lambda: None, shared: Shared | None = None) -> None:
        """Follow the folder on a thread of its own until `stop`, and look when another front end asks to; `on_look` is
        called after every look."""
        if self.folder is None:
            return
        shared = shared or Shared()

        def look() -> None:
            asked = shared.asked
            try:
                self.sync()
                on_look()
            finally:
                shared.has_looked(asked)

        self.follower = Follower(self.folder, look, name="steer-folder", calls=shared.calls)
        self.follower.start()

    def stop(self) -> None:
        if self.follower is not None:
            self.follower.stop()


def _named(path: Path) -> str:
    """What the direction in a file is called: text in any case."""
    return os.fsencode(path.name).decode(errors="backslashreplace").removesuffix(SUFFIX)


class Admission:
    """What one request was admitted with, on every backend: `spec` steers it, `readout` is what is read for it. It is
    the handle that holds its versions. Thread-safe.

    The code that admits a request is the handle's first holder, and releases it when the answer has ended. An engine
    that works on parts of the request elsewhere (vLLM has one for each prompt and each of its n answers) holds it for
    each part. The versions are unpinned when nobody holds the handle any more, however the last holder ended.
    """

    __slots__ = ("_digests", "_holders", "_registry", "readout", "spec")

    def __init__(self, registry: Registry, spec: Spec, readout: Readout | None = None) -> None:
        """Pin the versions of both, each once. They must have been resolved in the same `registry.steady()`, or a swap
        may have come between."""
        self.spec, self.readout = spec, readout
        self._registry = registry
        self._digests = dict.fromkeys(e.digest for each in spec.entries for e in (each, each.condition) if e)
        if readout is not None:
            self._digests |= dict.fromkeys(readout.digests)
        self._holders: set[Hashable] = {None}
        registry.pin(self._digests)

    @classmethod
    def of(cls, registry: Registry, wanted: Sequence[RequestedDirection]) -> Admission:
        """Resolve `wanted` and pin what it means now. Raises SpecError with every problem."""
        with registry.steady():
            return cls(registry, registry.resolve(wanted))

    def hold(self, holder: Hashable) -> None:
        """Keep the versions until this holder's `release` too. Raises RuntimeError where all have released already."""
        with self._registry.steady():
            if not self._holders:
                raise RuntimeError("this admission has ended: its versions may be gone")
            self._holders.add(holder)

    def release(self, holder: Hashable = None) -> None:
        """End one hold: the first holder's without an argument. Twice is once."""
        with self._registry.steady():
            if holder in self._holders:
                self._holders.remove(holder)
                if not self._holders:
                    self._registry.unpin(self._digests)
