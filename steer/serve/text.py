"""Tokens to text as they come: incremental detokenizing and stop strings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

#: What a tokenizer gives for bytes that are not yet a whole character.
_INCOMPLETE = "\ufffd"


class TextStream:
    """The text of one answer. `push` takes a token and returns the text that is certain by now.

    Text that may be the beginning of a stop string, or of a character of several tokens, is held back.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self._tokenizer, self._stop = tokenizer, [s for s in stop if s]
        self._ids: list[int] = []
        self._start = 0  # where decoding begins: a few tokens back, for tokenizers that look at their neighbours
        self._read = 0
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        if self.stopped:
            return ""
        self._ids.append(token)
        whole = self._decode(self._start, len(self._ids))
        if whole.endswith(_INCOMPLETE):
            return ""
        new = whole[len(self._decode(self._start, self._read)) :]
        if new:  # a token without text (a special one) is no neighbour that the next could be decoded beside
            self._start, self._read = self._read, len(self._ids)
        return self._until_stop(self._held + new)

    def finish(self) -> str:
        """What was held back, at the end of the answer."""
        if self.stopped:
            return ""
        new = self._decode(self._start, len(self._ids))[len(self._decode(self._start, self._read)) :]
        rest, self._held = self._held, ""
        return self._until_stop(rest + new, final=True)

    def _decode(self, start: int, end: int) -> str:
        return str(self._tokenizer.decode(self._ids[start:end], skip_special_tokens=True))

    def _until_stop(self, text: str, final: bool = False) -> str:
        hits = [(at + len(stop), at) for stop in self._stop if (at := text.find(stop)) >= 0]
        if hits:
            self.stopped, self._held = True, ""
            return text[: min(hits)[1]]  # the first to be complete, however the text fell into tokens
        keep = 0 if final else max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """The length of the longest proper beginning of `stop` that `text` ends with."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0


def token_text(tokenizer: Any, token: int) -> str:
    """One token alone as text, special tokens shown."""
    return str(tokenizer.decode([token]))
