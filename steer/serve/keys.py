"""API keys: how a secret is made, what is stored, and how the key of a request is found.

A secret has 256 random bits, so nobody finds it by trying: its plain SHA-256 is enough to store, and a slow hash would
only make every request slow.
"""

from __future__ import annotations

import hashlib
import hmac
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
    digits = text.removeprefix(_SCHEME)
    return text.startswith(_SCHEME) and len(digits) == 64 and all(c in "0123456789abcdef" for c in digits)


class Keyring:
    """Finds the name of a secret. The work is the same for any candidate, known or not.

    The table is looked up by a keyed hash whose key is drawn for this object: how a candidate falls into the table says
    nothing about what is in it, and the one comparison that follows takes constant time.
    """

    def __init__(self, names: Iterable[tuple[str, str]]) -> None:
        """`names`: pairs of a stored hash and the name that it belongs to."""
        self._key = secrets.token_bytes(32)
        self._table = {self._blind(stored): (stored.encode(), name) for stored, name in names}
        self._nobody = (stored(make()).encode(), None)

    def __len__(self) -> int:
        return len(self._table)

    def find(self, secret: str) -> str | None:
        """The name that `secret` belongs to. Any text is accepted."""
        candidate = stored(secret.encode("utf-8", "surrogatepass").decode("utf-8", "replace"))
        expected, name = self._table.get(self._blind(candidate), self._nobody)
        return name if hmac.compare_digest(expected, candidate.encode()) else None

    def _blind(self, text: str) -> bytes:
        return hashlib.blake2b(text.encode(), key=self._key).digest()
