"""API keys: how a secret is made, and what is stored of it.

A secret has 256 random bits, so nobody finds it by trying: its plain SHA-256 is enough to store, and a slow hash would
only make every request slow.
"""

from __future__ import annotations

import hashlib
import re
import secrets

PREFIX = "sk-steer-"
_BITS = 256
_SCHEME = "sha256:"


def make() -> str:
    """A new secret, to be shown once and stored nowhere."""
    return PREFIX + secrets.token_urlsafe(_BITS // 8)


def stored(secret: str) -> str:
    """What a policy file keeps of `secret`, which may be any text."""
    return _SCHEME + hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()


def is_stored(text: str) -> bool:
    return re.fullmatch(f"{_SCHEME}[0-9a-f]{{64}}", text) is not None
