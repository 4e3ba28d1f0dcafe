"""Tokens to text as they come: incremental detokenizing and stop strings."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from functools import lru_cache

from steer.tokenization import Decoder

#: What a tokenizer returns for bytes that are not yet a whole character.
_INCOMPLETE = "\ufffd"
#: After this many tokens without text nothing is held back any more. No character is that long: the answer has broken
#: bytes or special tokens, and would otherwise be decoded from its first token at every new one.
_LATE = 64


# Not `DecodeStream` of `tokenizers`: it cannot return what it holds back at the end, and needs a fast tokenizer.
class TextStream:
    """The text of one answer. `push` takes a token and returns the text that is certain by now.

    Text is held back while it may be the beginning of a stop string, or of a character of several tokens.
    """

    def __init__(self, tokenizer: Decoder, stop: Stops | None = None) -> None:
        self._tokenizer, self._stop = tokenizer, stop
        self._ids: list[int] = []
        self._start = 0  # where decoding begins: a few tokens back, since the text of a token can depend on the last
        self._read = 0
        self._held, self._state = "", 0  # the beginning of a stop string, perhaps, and the state in `Stops`
        self.stopped = False

    def push(self, token: int) -> str:
        if self.stopped:
            return ""
        self._ids.append(token)
        whole = self._decode(self._start, len(self._ids))
        late = len(self._ids) - self._read > _LATE
        if whole.endswith(_INCOMPLETE) and not late:
            return ""
        new = whole[len(self._decode(self._start, self._read)) :]
        if new:  # the next token is not decoded beside a special token, which has no text
            self._start, self._read = self._read, len(self._ids)
        elif late:
            del self._ids[self._read :]
        return self._until_stop(new)

    def finish(self) -> str:
        """The text that was held back, at the end of the answer."""
        if self.stopped:
            return ""
        new = self._decode(self._start, len(self._ids))[len(self._decode(self._start, self._read)) :]
        return self._until_stop(new, final=True)

    def _decode(self, start: int, end: int) -> str:
        return self._tokenizer.decode(self._ids[start:end], skip_special_tokens=True)

    def _until_stop(self, new: str, final: bool = False) -> str:
        text = self._held + new
        if not self._stop:
            return text
        state = self._state
        for at, letter in enumerate(new, len(self._held) + 1):
            state = self._stop.step(state, letter)
            if found := self._stop.found[state]:
                self.stopped, self._held = True, ""
                return text[: at - found]  # the stop string that is complete first, whatever the tokens are
        kept = 0 if final else self._stop.depth[state]
        self._state, self._held = state, text[len(text) - kept :]
        return text[: len(text) - kept]


class Stops:
    """Searches for all stop strings in one pass over the text (Aho and Corasick 1975). A state stands for the longest
    beginning of a stop string that the text ends with.

    Immutable, so the answers of a request share it.

    Attributes:
        depth: for each state the length of that beginning.
        found: for each state the length of the longest stop string that is complete, or 0.
    """

    def __init__(self, stops: Iterable[str]) -> None:
        self._next: list[dict[str, int]] = [{}]
        self._back = [0]
        self.depth, self.found = [0], [0]
        for stop in stops:
            state = 0
            for letter in stop:
                state = self._next[state].get(letter) or self._add(state, letter)
            self.found[state] = len(stop)
        queue = deque([0])
        while queue:  # breadth first: the fallbacks of shorter beginnings are known first
            state = queue.popleft()
            for letter, then in self._next[state].items():
                self._back[then] = self.step(self._back[state], letter) if state else 0
                self.found[then] = self.found[then] or self.found[self._back[then]]
                queue.append(then)

    def __bool__(self) -> bool:
        return len(self.depth) > 1

    def _add(self, state: int, letter: str) -> int:
        new = self._next[state][letter] = len(self._next)
        self._next.append({})
        self._back.append(0)
        self.depth.append(self.depth[state] + 1)
        self.found.append(0)
        return new

    def step(self, state: int, letter: str) -> int:
        """The state after one more character."""
        while (then := self._next[state].get(letter)) is None and state:
            state = self._back[state]
        return then or 0


@lru_cache(maxsize=1 << 16)  # the most likely tokens are often the same ones
def token_text(tokenizer: Decoder, token: int) -> str:
    """The text of one token alone, also of a special token."""
    return tokenizer.decode([token])
