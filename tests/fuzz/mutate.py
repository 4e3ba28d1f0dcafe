"""Inputs that are nearly right: random JSON, and mutations of texts, bytes and JSON values."""

from __future__ import annotations

import copy
import json
from random import Random
from typing import Any

#: Single values that parsers have tripped over before.
ODD: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2**31, 2**63, 10**400, 0.0, -0.0, 0.5, 1e-320, 1e38, 1e308),
    *(float("nan"), float("inf"), float("-inf"), "", " ", "\0", "\ud800", "é", "𝕊", "\u202e", "off", "null", "NaN"),
    *("refusal", "refusal=0.7", "refusal:add=-1", "a" * 300, "../x", "%00", "1e999", "=", ",", ":", "+", [], {}),
)
BYTES = (b"\0", b"\xff", b"\x80", b"\n", b"\r\n", b'"', b"'", b"\\", b"{", b"}", b"[", b"]", b"=", b",", b"#", b".")


def value(rng: Random, depth: int = 3) -> Any:
    """A random JSON value."""
    kind = rng.random()
    if depth and kind < 0.2:
        return [value(rng, depth - 1) for _ in range(rng.randrange(4))]
    if depth and kind < 0.4:
        return {str(text(rng)): value(rng, depth - 1) for _ in range(rng.randrange(4))}
    if kind < 0.42:
        return nested(rng.choice((5, 50, 200)))
    return copy.copy(rng.choice(ODD)) if kind < 0.85 else rng.choice((rng.gauss(0, 9), rng.randrange(-99, 99)))


def nested(depth: int) -> Any:
    out: Any = []
    for _ in range(depth):
        out = [out]
    return out


def text(rng: Random) -> str:
    odd = rng.choice(ODD)
    if isinstance(odd, str):
        return odd
    codes = [rng.choice((rng.randrange(32, 127), rng.randrange(0xD7FF))) for _ in range(rng.randrange(8))]
    return "".join(map(chr, codes))


def within(rng: Random, tree: Any) -> Any:
    """`tree` with one of its values, keys or items replaced, doubled or removed."""
    if isinstance(tree, dict) and tree and rng.random() < 0.9:
        key = rng.choice(list(tree))
        kind = rng.random()
        if kind < 0.15:
            return {k: v for k, v in tree.items() if k != key}
        if kind < 0.3:
            return tree | {text(rng): value(rng)}
        return tree | {key: within(rng, tree[key])}
    if isinstance(tree, list) and tree and rng.random() < 0.9:
        at = rng.randrange(len(tree))
        kind = rng.random()
        if kind < 0.2:
            return tree[:at] + tree[at + 1 :]
        if kind < 0.4:
            return [*tree, value(rng)]
        return [*tree[:at], within(rng, tree[at]), *tree[at + 1 :]]
    if isinstance(tree, str) and rng.random() < 0.6:
        return characters(rng, tree)
    return value(rng)


def characters(rng: Random, source: str) -> str:
    """`source` with some of its characters replaced, added, removed, or a part of it repeated."""
    for _ in range(rng.choice((1, 1, 2, 5))):
        at = rng.randrange(len(source) + 1)
        end = min(len(source), at + rng.choice((0, 1, 1, 4, 30)))
        kind = rng.random()
        if kind < 0.4:
            source = source[:at] + text(rng) + source[end:]
        elif kind < 0.6:
            source = source[:at] + source[end:]
        elif kind < 0.7:
            source = source[:end] + source[at:]
        elif kind < 0.75:
            source = source[:at] + source[at:end] * rng.choice((2, 50)) + source[end:]
        else:
            source = source[:at] + rng.choice("\0\n\r\t \"'\\{}[]=,:;#.+-_0123456789eExX*()?") + source[end:]
    return source


def octets(rng: Random, source: bytes) -> bytes:
    """`source` with some bytes flipped, cut, added or repeated."""
    for _ in range(rng.choice((1, 1, 2, 8))):
        at = rng.randrange(len(source) + 1)
        end = min(len(source), at + rng.choice((1, 1, 8, 200)))
        kind = rng.random()
        if kind < 0.4:
            source = source[:at] + bytes([rng.randrange(256)]) + source[end:]
        elif kind < 0.6:
            source = source[:at] + source[end:]
        elif kind < 0.75:
            source = source[:at] + rng.choice(BYTES) + source[at:]
        elif kind < 0.85:
            source = source[:at]
        else:
            source = source[:end] + source[at:]
    return source


def dumped(rng: Random, tree: Any) -> str:
    """As JSON, now and then with a key that stands twice, a very long number, or deep brackets."""
    out = json.dumps(tree, ensure_ascii=rng.random() < 0.5)
    kind = rng.random()
    if kind < 0.03 and out.startswith("{") and len(out) > 2:
        out = "{" + out[1:-1] + "," + out[1:]
    elif kind < 0.05:
        out = out.replace("1", "1" * 5000, 1)
    elif kind < 0.08:
        depth = rng.randrange(700, 1100)
        deep = "[" * depth + "]" * depth
        out = out.replace("null", deep, 1).replace("{", f'{{"x":{deep},', 1)
    return out
