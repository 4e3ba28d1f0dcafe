"""What one request was admitted with, and the handle that holds its versions, on every backend.

The code that admits a request is the handle's first holder, and releases it when the answer has ended. An engine that
works on parts of the request elsewhere (vLLM has one for each prompt and each of its n answers) holds it for each part.
The versions are unpinned when nobody holds the handle any more, however the last holder ended.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from steer.readout import Readout
from steer.registry import Registry
from steer.spec import RequestedDirection, Spec


class Admission:
    """`spec` steers the request, `readout` is what is read for it. Thread-safe."""

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
