"""Names and versions of directions: validate, place on devices, swap while requests run, pin what they use.

A *version* is the content of one file. Its digest identifies it, and it never changes. A name points to a version. A
swap checks the new version completely, has it placed on every worker, and only then moves the name. Requests pin the
versions that they were admitted with. A version that no name points to is unloaded when its last request ends.
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

from steer.direction import Direction, DirectionMeta, read_file
from steer.direction import digest as digest_of
from steer.errors import DirectionError, NoRoom, SpecError, SteerError, UnknownDirection, prefixed, printable
from steer.files import write_file
from steer.names import OTHER_SUFFIXES, SITE_RULES, SITES, SUFFIX, TURNING, Mode, check_name, readable
from steer.readout import FIELD, MAX_DIRECTIONS, Line, Readout, RequestedReadout
from steer.shape import Shape
from steer.shared import Shared
from steer.spec import MAX_PLACES, PHASES, Entry, RequestedDirection, Spec, decimal_comma_hint
from steer.watch import Follower

log = logging.getLogger("steer")

#: Whether the caller may know of this name.
Known = Callable[[str], bool]
#: The stamp of a file that must be read again. No file has it.
_UNSETTLED = (-1, -1, -1)


class Placement(Protocol):
    """Makes versions resident: in one bank, or on all workers of an engine."""

    @property
    def shape(self) -> Shape:
        """The shape that a direction must fit before it is loaded."""

    def load(self, digest: str, direction: Direction, data: bytes) -> None:
        """Make a version resident everywhere. Raises NoRoom; then nothing has changed anywhere."""

    def unload(self, digest: str) -> None:
        """Free a version. This is called where requests end, so it must not block; `load` may run at the same time."""


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


def _wrong_version(version: Version, name: str, wanted: str) -> SpecError:
    message = f"direction '{name}' is the version {version.digest[:12]} now, and {wanted[:12]} is asked for"
    return SpecError(message, param="steer.digest")


@dataclass(frozen=True, slots=True)
class Move:
    """A name has moved from an `old` to a `new` digest; None for no version. `seconds`: since the bytes came."""

    name: str
    old: str | None
    new: str | None
    seconds: float


def norms(entries: Iterable[Entry]) -> dict[bool, list[str]]:
    """The directions of the entries in modes that do not keep the norm by themselves, by whether it is kept. One
    request cannot have both."""
    found: dict[bool, list[str]] = {}
    for entry in entries:
        if entry.mode not in TURNING:
            found.setdefault(bool(entry.norm_preserving), []).append(entry.direction)
    return found


class Registry:
    """The names and versions of one server or program. Thread-safe.

    Args:
        placement: makes versions resident.
        folder: holds the files. Without one, directions come only by `put` and live in memory.
        patience: seconds that a new version waits for rows that retiring versions still use.
        quiet: log nothing of what is put, for a registry inside a program, which gets the errors itself.
    """

    def __init__(
        self, placement: Placement, folder: Path | None = None, *, patience: float = 10.0, quiet: bool = False
    ) -> None:
        self.placement, self.folder, self.patience, self.quiet = placement, folder, patience, quiet
        #: Why the newest content for a name is not served.
        self.failures: dict[str, tuple[str, ...]] = {}
        #: Why the folder itself cannot be read.
        self.folder_problem: str | None = None
        #: Watches the folder after `follow`.
        self.follower: Follower | None = None
        self.swaps = 0
        #: Called for every name that has moved, on the thread that moved it.
        self.on_move: Callable[[Move], None] = lambda move: None
        self._names: dict[str, str] = {}
        self._versions: dict[str, Version] = {}
        self._seen: dict[str, tuple[int, int, int]] = {}
        self._others: set[str] = set()
        self._freed = 0  # versions unloaded so far
        self._state = threading.Condition(threading.RLock())
        self._swapping = threading.RLock()  # held while content changes; admission never waits for it

    # -- reading -------------------------------------------------------------------------------------------------

    def names(self) -> dict[str, Version]:
        with self._state:
            return {name: self._versions[d] for name, d in sorted(self._names.items())}

    def get(self, name: str, among: Known = lambda _: True) -> Version:
        """The version that `name` points to. For the caller, names for which `among` is false do not exist. Raises
        UnknownDirection."""
        with self._state:
            if name not in self._names or not among(name):
                served = ", ".join(known for known in sorted(self._names) if among(known)) or "none"
                message = f"direction {name[:100]!r} is not served; served: {served}{decimal_comma_hint(name)}"
                raise UnknownDirection(message, param="steer")
            return self._versions[self._names[name]]

    @property
    def resident(self) -> int:
        with self._state:
            return len(self._versions)

    @property
    def rows(self) -> int:
        """How many bank rows the resident versions use."""
        with self._state:
            return sum(version.direction.resident(self.placement.shape.rank) for version in self._versions.values())

    def steady(self) -> AbstractContextManager[object]:
        """A lock: while it is held (`with registry.steady():`) no name moves."""
        return self._state

    # -- requests ------------------------------------------------------------------------------------------------

    def resolve(self, wanted: Sequence[RequestedDirection], among: Known = lambda _: True) -> Spec:
        """Resolve `wanted` to the versions, modes and strengths that it means now. Raises SpecError with every
        problem."""
        entries: list[Entry] = []
        problems: list[str] = []
        unknown = False
        for item in wanted:
            try:
                version = self.get(item.direction, among)
                if item.digest and not version.digest.startswith(item.digest):
                    raise _wrong_version(version, item.direction, item.digest)
                meta = version.direction.meta
                mode = item.mode or meta.mode
                strength = meta.strength_in(mode) if item.strength is None else item.strength
                shift = item.shift if np.float32(item.shift or 0) else None
                where, keeps = (item.layers, item.tokens), item.norm_preserving or None
                entry = Entry(
                    item.direction, version.digest, mode, strength, *where, shift=shift, norm_preserving=keeps
                )
                if (condition := item.condition) is not None:
                    probe = self.get(condition.direction, among)
                    if not probe.digest.startswith(condition.digest):
                        raise _wrong_version(probe, condition.direction, condition.digest)
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
            if np.float32(entry.strength):  # strength 0 does nothing, so it is left out
                entries.append(entry)
        problems += self._incompatible(entries)
        if problems:
            raise (UnknownDirection if unknown else SpecError)(problems, "steer")
        return Spec(tuple(entries))

    def resolve_readout(
        self, wanted: RequestedReadout, spec: Spec, layers: int, among: Known = lambda _: True
    ) -> Readout:
        """Resolve `wanted` to the versions that it means now. Raises SpecError with every problem.

        Args:
            spec: of the same request. It must have been resolved in the same `steady`. Its directions can be read
                whatever `among` says.
            layers: how many the model has.
        """
        own = dict.fromkeys(entry.direction for entry in spec.entries)
        names = tuple(own) if wanted.names is None else wanted.names
        if not names:
            raise SpecError(
                f"{FIELD}: without 'directions' those that steer this request are read, but none does; name them",
                param=FIELD,
            )
        if len(names) > MAX_DIRECTIONS:
            raise SpecError(f"{FIELD}: {len(names)} directions, at most {MAX_DIRECTIONS} are read at once", param=FIELD)
        mode: Mode | None = "rotate" if wanted.angle else None
        try:
            self.resolve(
                [RequestedDirection(name, mode, strength=1.0) for name in names],
                lambda name: name in own or among(name),
            )
        except SpecError as error:
            raise type(error)([f"{FIELD}: {problem}" for problem in error.problems], param=FIELD) from None
        versions = {name: self.get(name) for name in names}
        metas = {name: version.direction.meta for name, version in versions.items()}
        can = ", ".join(f"'{site}'" for site in SITES if SITE_RULES[site].readable)
        SpecError.raise_for(
            (
                f"{FIELD}: direction '{name}' acts at the site '{', '.join(meta.sites)}'; what is read is {can}"
                for name, meta in metas.items()
                if not readable(meta.sites)
            ),
            FIELD,
        )
        lines = [Line(n, version.digest, k) for n, version in versions.items() for k in range(version.direction.rank)]
        sources = {name: meta.source_layer for name, meta in metas.items()}
        return Readout(tuple(lines), wanted.layers_of(sources, layers), wanted.angle)

    def merge(self, first: Spec, then: Spec) -> Spec:
        """The entries of both, in this order; entries of both specs are applied once. Both must have been resolved in
        the same `steady`. Raises SpecError."""
        if not then:
            return first
        merged = Spec((*(entry for entry in first.entries if entry not in then.entries), *then.entries))
        SpecError.raise_for(self._incompatible(merged.entries), "steer")
        return merged

    def _incompatible(self, entries: Sequence[Entry]) -> list[str]:
        """Why these entries cannot act in one request; empty if they can."""
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
            each = ", ".join(dict.fromkeys(f"if {e.condition}" if e.condition else "always" for e in entries))
            return [f"the directions of one request act under different conditions ({each}); accepted: one for all"]
        if len(named := norms(entries)) > 1:
            asked, others = (", ".join(named[kept]) for kept in (True, False))
            return [
                f"norm_preserving: asked for with {asked} and not with {others}; accepted: with all directions of one "
                "request, or with none; those in modes that rotate need no mark"
            ]
        with self._state:
            needed = sum(self._versions[entry.digest].direction.rows_in(entry.mode) for entry in entries)
        needed += any(entry.condition for entry in entries)
        needed = max(needed, 2) if phases else needed
        if needed <= (rank := self.placement.shape.rank):
            return []
        turning = [entry for entry in entries if entry.mode in TURNING]
        condition = f" (two for the mode '{turning[0].mode}')" if turning else ""
        condition = " (one of them for its condition)" if any(entry.condition for entry in entries) else condition
        condition = f" (two are the least with the tokens '{phases[0]}')" if phases else condition
        return [
            f"the request needs {needed} direction rows for each token{condition}, and the rank here is {rank}: "
            f"`--rank {needed}` for a server, `rank=` in Python"
        ]

    def metas(self, spec: Spec) -> list[DirectionMeta]:
        """The metadata of a resolved spec's versions that are still resident, in the order of its entries."""
        with self._state:
            return [self._versions[e.digest].direction.meta for e in spec.entries if e.digest in self._versions]

    def digests(self) -> dict[str, str]:
        """The digest of each name now."""
        with self._state:
            return dict(self._names)

    def pin(self, digests: Iterable[str]) -> None:
        """Add a pin to each of these versions, which keeps it until `unpin`. They must have been resolved in this
        `steady`."""
        with self._state:
            for digest in digests:
                self._versions[digest].pins += 1

    def unpin(self, digests: Iterable[str]) -> None:
        with self._state:
            for digest in digests:
                version = self._versions[digest]
                version.pins -= 1
                self._unload_unneeded(version)

    def _point(self, name: str, version: Version | None) -> str | None:
        """Move `name` to a version, or remove it for None. Returns the digest that it pointed to. Needs the state
        lock."""
        old = self._names.pop(name, None)
        if version is not None:
            self._names[name] = version.digest
            version.names += 1
        if old is not None:
            self._versions[old].names -= 1
            self._unload_unneeded(self._versions[old])
        return old

    def _unload_unneeded(self, version: Version) -> None:
        """Unload `version` if no name points to it and no request uses it. Needs the state lock."""
        if not version.needed and version.digest in self._versions:
            del self._versions[version.digest]
            self.placement.unload(version.digest)
            self._freed += 1
            self._state.notify_all()

    # -- change --------------------------------------------------------------------------------------------------

    def put(self, name: str, data: bytes, *, store: bool = True) -> Version:
        """Serve `data` under `name` from now on, and write it to the folder if `store` and there is one.

        Raises DirectionError or NoRoom. After any error the old version is still served, and `failures` says why. A
        failed upload for a new name leaves no trace.
        """
        check_name(name)
        started = time.perf_counter()
        with self._swapping:
            version = None
            try:
                version = self._load(name, data)
                if store and self.folder is not None:
                    write_file(self.folder / f"{name}{SUFFIX}", data)
                    self._seen[name] = _UNSETTLED  # another process may have replaced the file already
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
                        self._unload_unneeded(version)
            if old != version.digest:
                self.swaps += 1
                if not self.quiet:
                    before = f" (was {old[:12]})" if old else ""
                    log.info("direction '%s' is now %s%s", name, version.digest[:12], before)
                self.on_move(Move(name, old, version.digest, time.perf_counter() - started))
            return version

    def _fail(self, name: str, error: Exception, *, keep: bool = True) -> None:
        """Log once why the newest content for `name` is not served, and keep it in `failures` if `keep`: an upload that
        leaves no trace is not kept, since the client was told."""
        if isinstance(error, DirectionError):
            problems = error.problems
        elif isinstance(error, SteerError | OSError):
            # clients that may see the direction see this, so it must not have a path of the server
            problems = (printable(getattr(error, "strerror", None) or str(error)),)
        else:
            problems = (printable(f"{type(error).__name__}: {error}"),)
        if self.failures.get(name) != problems:
            if keep:
                self.failures[name] = problems
            unforeseen = not isinstance(error, SteerError | OSError)
            if not self.quiet:
                reasons = "; ".join(problems)
                log.error("direction '%s' was not accepted: %s", printable(name), reasons, exc_info=unforeseen)

    def delete(self, name: str) -> None:
        """Stop serving `name` and remove its file, also one that was never accepted. Raises UnknownDirection."""
        with self._swapping:
            if name not in self.failures:  # a file that failed may have a name that no direction can have
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
        """The resident version of `data`, pinned, since no name points to it yet."""
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
                self.placement.load(d, direction, data)  # without the state lock, since workers can be slow
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
        """Serve what the folder has now. A file that cannot be served is in `failures`, and all others are served.

        Raises OSError if the folder itself cannot be read; then the served directions stay as they are.
        """
        if self.folder is None:
            return
        try:
            self._warn_of_others(os.listdir(self.folder))
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
                except Exception as error:  # an error of one file must not keep the others from being served
                    self._fail(name, error)
                    self._seen[name] = _UNSETTLED
            for name in self._seen.keys() - present:
                try:
                    self._drop(name)
                    del self._seen[name]
                except Exception as error:  # retried at the next look
                    self._fail(name, error)

    def _warn_of_others(self, files: Iterable[str]) -> None:
        """Warn once of each file of another tool, since it is not served."""
        others = {name for name in files if Path(name).suffix in OTHER_SUFFIXES}
        for name in sorted(others - self._others):
            log.warning(
                "%s is not served: a direction's file ends in %s; `steer convert` makes one of it",
                printable(os.fsencode(name).decode(errors="backslashreplace")),
                SUFFIX,
            )
        self._others = others

    def _sync_file(self, name: str, path: Path) -> tuple[int, int, int]:
        """Serve the file, or record in `failures` why not. Returns the stamp of the file: as long as it has this stamp,
        it need not be read again. Raises an error that may not occur again at the next look."""
        try:
            status = path.stat()
        except OSError as error:  # a broken link, or the file was just removed, which the next look notices
            raise OSError(f"{path.name}: cannot be read: {error.strerror or error}") from None
        stamp = status.st_ctime_ns, status.st_size, status.st_ino  # changes with the content and with permissions
        if self._seen.get(name) == stamp:
            return stamp
        try:
            data = read_file(path)
            check_name(name)
            self.put(name, data, store=False)
        except NoRoom:
            return _UNSETTLED  # rows may be free at the next look
        except SteerError as error:
            if isinstance(error.__cause__, OSError):  # the disk failed, so the file may be good
                raise
            self._fail(name, error)
        return stamp

    def follow(self, on_look: Callable[[], None] = lambda: None, shared: Shared | None = None) -> None:
        """Watch the folder on a thread until `stop`, and look when another front end asks. `on_look` is called after
        every look."""
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
    """The name of the direction in a file, as printable text."""
    return os.fsencode(path.name).decode(errors="backslashreplace").removesuffix(SUFFIX)


class Admission:
    """The spec and the read-out that one request was admitted with, and the handle that keeps their versions resident.
    The same on every backend. Thread-safe.

    The code that admits a request is the first holder, and releases the handle when the answer has ended. An engine
    that handles parts of the request elsewhere (vLLM has one for each prompt and each of its n answers) holds it for
    each part. When the last holder has released the handle, the versions are unpinned.
    """

    __slots__ = ("_digests", "_holders", "_registry", "readout", "spec")

    def __init__(self, registry: Registry, spec: Spec, readout: Readout | None = None) -> None:
        """Pin the versions of both, each once. They must have been resolved in the same `registry.steady()`, in which
        no swap can happen."""
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
        """Keep the versions until this holder's `release` too. Raises RuntimeError if all holders have released."""
        with self._registry.steady():
            if not self._holders:
                raise RuntimeError("this admission has ended: its versions may be gone")
            self._holders.add(holder)

    def release(self, holder: Hashable = None) -> None:
        """End one hold; without an argument that of the first holder. A second call for a holder does nothing."""
        with self._registry.steady():
            if holder in self._holders:
                self._holders.remove(holder)
                if not self._holders:
                    self._registry.unpin(self._digests)
