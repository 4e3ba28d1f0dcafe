"""API keys: how a secret is made, what is stored, and how the key of a request is found.

A secret has 256 random bits, so nobody finds it by trying: its plain SHA-256 is enough to store, and a slow hash would
only make every request slow.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Iterable

PREFIX = "sk-steer-"
_BITS = 256
_SCHEME = "sha256:"


def make() -> str:
    """A new secret, to be shown once and stored nowhere."""
    return PREFIX + secrets.token_urlsafe(_BITS // 8)


def stored(secret: str) -> str:
    """What a policy file keeps of `secret`."""
    return _SCHEME + hashlib.sha256(secret.encode()).hexdigest()


def is_stored(text: str) -> bool:
    """Is this what `stored` gives?"""
    return re.fullmatch(f"{_SCHEME}[0-9a-f]{{64}}", text) is not None


class Keyring:
    """Finds the name of a secret. The time that it takes tells nothing of the stored hashes: Python finds a text in a
    table by a hash that is keyed with random bits of the process, and no other secret has the SHA-256 of a stored one.
    """

    def __init__(self, names: Iterable[tuple[str, str]]) -> None:
        """`names`: pairs of a stored hash and the name that it belongs to."""
        self._names = dict(names)

    def __len__(self) -> int:
        return len(self._names)

    def find(self, secret: str) -> str | None:
        """The name that `secret` belongs to. Any text is accepted."""
        return self._names.get(stored(secret.encode("utf-8", "surrogatepass").decode("utf-8", "replace")))
