"""What keeps blocks of vLLM's prefix cache apart: plain and steered requests, those of each spec, and those that a
request whose stream was lost may have left from all that come after it."""

from __future__ import annotations

import itertools

from steer.spec import Spec

#: Between a request's own prefix-cache salt and what its steering adds to it. No request's own salt may have it, or a
#: plain request could leave its blocks for steered ones to find.
SALT = "|steer:"
#: Salts whose losses are remembered one by one; beyond that all steered requests begin anew.
KEPT = 1024


def salt(spec: Spec) -> str:
    return SALT + spec.key()


class Salts:
    """`current` gives a steered request's salt another ending from each `renew` of it on. `first`: the ending before
    that, which must be no other process's where blocks outlive this one."""

    def __init__(self, first: str = "") -> None:
        self._numbers = itertools.count(1)
        self._first = self._all = first
        self._endings: dict[str, str] = {}

    def current(self, salt: str) -> str:
        return salt + self._endings.get(salt, self._all)

    def renew(self, salt: str) -> None:
        if len(self._endings) >= KEPT:
            self._endings.clear()
            self._all = self._ending()
        self._endings[salt] = self._ending()

    def _ending(self) -> str:
        return f"#{self._first}{next(self._numbers)}"
