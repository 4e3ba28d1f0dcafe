"""Text to token ids with a tokenizer and its chat template: the same for the server, measurements and every engine."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Protocol

from steer.errors import RequestError, brief

if TYPE_CHECKING:
    from _collections_abc import dict_items


#: The tokens that begin and end the thinking of the usual model families; templates often write the first one.
THINKING = (
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<thought>", "</thought>"),
    ("<reasoning>", "</reasoning>"),
    ("<seed:think>", "</seed:think>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|channel|>analysis<|message|>", "<|channel|>final<|message|>"),
)


class _TrackedMessage(dict[str, object]):
    """A message that records which of its keys a template has read."""

    def __init__(self, message: Mapping[str, object]) -> None:
        super().__init__(message)
        self.asked: set[str] = set()

    def __getitem__(self, key: str) -> object:
        self.asked.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: object = None) -> object:
        self.asked.add(key)
        return super().get(key, default)

    def items(self) -> dict_items[str, object]:
        self.asked.update(self.keys())
        return super().items()

    def __deepcopy__(self, memo: dict[int, object]) -> _TrackedMessage:
        copied = _TrackedMessage({key: deepcopy(value, memo) for key, value in super().items()})
        copied.asked = self.asked
        return copied


@dataclass(frozen=True, slots=True)
class Phase:
    """A part of the positions from the last one of a prompt on.

    Attributes:
        begun: whether the first of these positions is in it.
        begins: the token with which it begins if it has not begun; −1 for none.
        ends: the token before which it ends, for good; −1 for none.
    """

    begun: bool
    begins: int = -1
    ends: int = -1

    def after(self, token: int) -> Phase:
        """The phase as seen from the next position, at which `token` is."""
        if token == self.ends:
            return Phase(False)
        return replace(self, begun=True, begins=-1) if token == self.begins else self

    def comes(self, answer: Sequence[int]) -> bool:
        """Whether any token of this answer is predicted in the phase."""
        phase = self
        for token in answer:
            if phase.begun:
                return True
            phase = phase.after(token)
        return False


@dataclass(frozen=True, slots=True)
class Thinking:
    """The tokens that begin and end a model's thinking. `special`: the special and the added tokens, such as those
    between turns, which most tokenizers never make of a user's text."""

    begin: int
    end: int
    special: frozenset[int]

    def phase(self, tokens: str, prompt: Sequence[int]) -> Phase:
        """The phase `tokens` (of `spec.PHASES`) of a request with this prompt. The prompt may have begun or ended the
        thinking: its last `begin` or `end` token decides, unless a special token comes after it, since it then belongs
        to an earlier turn."""
        marks = {self.begin, self.end}
        last = next((token for token in reversed(prompt) if token in marks or token in self.special), None)
        if tokens == "after-thinking":
            return Phase(True) if last == self.end else Phase(False, begins=self.end)
        if last == self.end:
            return Phase(False)
        return Phase(True, ends=self.end) if last == self.begin else Phase(False, self.begin, self.end)


class Decoder(Protocol):
    """Turns token ids into text."""

    def __hash__(self) -> int: ...

    def decode(self, ids: Sequence[int], /, *, skip_special_tokens: bool = False) -> str: ...


class Tokenizer(Decoder, Protocol):
    """The parts of a transformers tokenizer that are used."""

    chat_template: object
    bos_token_id: int | None
    eos_token_id: int | None
    pad_token_id: int | None
    all_special_ids: Sequence[int]

    def __hash__(self) -> int: ...
    def __call__(self, text: str, **options: object) -> Any: ...
    def get_vocab(self) -> Mapping[str, int]: ...
    def get_added_vocab(self) -> Mapping[str, int]: ...
    def get_chat_template(self) -> str: ...
    def apply_chat_template(self, conversation: Sequence[Mapping[str, object]], **options: object) -> str: ...


def rendered_otherwise(fitted: Mapping[str, object], given: Mapping[str, object]) -> str | None:
    """How the template variables of a chat (`given`) differ from those that a direction was `fitted` with; None if they
    do not."""
    absent = object()
    names = sorted(fitted.keys() | given.keys())
    different = [name for name in names if fitted.get(name, absent) != given.get(name, absent)][:4]

    def shown(variables: Mapping[str, object]) -> str:
        return ", ".join(f"{brief(n)} {brief(variables[n]) if n in variables else 'not set'}" for n in different)

    return f"it was fitted with {shown(fitted)}, and a chat has {shown(given)}" if different else None


@lru_cache(maxsize=8)
def thinking_of(tokenizer: Tokenizer) -> Thinking | None:
    """The first pair of `THINKING` that this tokenizer has as tokens."""
    vocabulary = tokenizer.get_vocab()
    for begin, end in THINKING:
        if begin in vocabulary and end in vocabulary:
            added = tokenizer.get_added_vocab().values()  # the tokens of turns may be added but not marked as special
            return Thinking(vocabulary[begin], vocabulary[end], frozenset((*tokenizer.all_special_ids, *added)))
    return None


@lru_cache(maxsize=8)
def _reads_parts(tokenizer: Tokenizer, template: str) -> bool:
    """Whether this template of the tokenizer renders the text of a message only if it comes in parts, as templates of
    models with images do."""

    def shown(content: object) -> bool:
        try:
            return "seen" in tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
        except Exception:  # a template is a program and can raise anything
            return False

    return not shown("seen") and shown([{"type": "text", "text": "seen"}])


class Chat:
    """A mixin for classes with a transformers `tokenizer`."""

    __slots__ = ()
    tokenizer: Tokenizer

    def chat_ids(
        self, messages: Sequence[dict[str, object]], *, add_generation_prompt: bool = True, **more: object
    ) -> list[int]:
        """Token ids of a conversation (`chat_text`). The template writes BOS if there is one, so the text is tokenized
        without special tokens: adding BOS twice is a common mistake."""
        return self.piece_ids(self.chat_text(messages, add_generation_prompt=add_generation_prompt, **more))

    def chat_text(
        self, messages: Sequence[dict[str, object]], *, add_generation_prompt: bool = True, **more: object
    ) -> str:
        """Render a conversation with the model's template.

        A developer's message becomes a system message if the template does not know that role. Raises RequestError if
        there is no template, if it refuses the messages, or if it ignores a field of one of them.
        """
        if not self.tokenizer.chat_template:
            raise RequestError("this model has no chat template: use /v1/completions", param="messages")
        template = self.tokenizer.get_chat_template()
        unknown, parts = "developer" not in template, _reads_parts(self.tokenizer, template)
        tracked = [
            _TrackedMessage(m | {"role": "system"} if unknown and m["role"] == "developer" else m) for m in messages
        ]
        for message in tracked:
            if parts and isinstance(text := dict.get(message, "content"), str):  # a read that is not recorded
                message["content"] = [{"type": "text", "text": text}]
        try:
            text = self.tokenizer.apply_chat_template(
                tracked, tokenize=False, add_generation_prompt=add_generation_prompt, **more
            )
        except Exception as error:  # a template is a program and can raise anything
            reason = str(error)[:500]
            raise RequestError(f"the chat template refuses these messages: {reason}", param="messages") from error
        for number, message in enumerate(tracked):
            if unread := sorted(message.keys() - message.asked - {"role", "content"}):
                name = f"messages.{number}.{unread[0][:100]}"
                raise RequestError(f"{name}: the chat template of this model does not use it", param=name)
        return str(text)

    def unread(self, variables: Iterable[str]) -> list[str]:
        """The `variables` that the chat template does not mention, so that they change nothing."""
        words = set(re.findall(r"\w+", self.tokenizer.get_chat_template())) if self.tokenizer.chat_template else set()
        return sorted(set(variables) - words - {"tools", "documents"})

    def text_ids(self, text: str) -> list[int]:
        """Token ids of a text, with the tokenizer's own special tokens (BOS if it adds one)."""
        return self._ids(text)

    def piece_ids(self, text: str) -> list[int]:
        """Token ids of a text without special tokens."""
        return self._ids(text, add_special_tokens=False)

    def _ids(self, text: str, **options: object) -> list[int]:
        """Only the ids: building further lists would hold the interpreter's lock longer."""
        only = {"return_attention_mask": False, "return_token_type_ids": False}
        return list(self.tokenizer(text, **only, **options).input_ids)

    @property
    def thinking(self) -> Thinking | None:
        return thinking_of(self.tokenizer)

    @property
    def template_sha256(self) -> str | None:
        template = self.tokenizer.chat_template
        return hashlib.sha256(str(template).encode()).hexdigest() if template else None

    def bos_count(self, ids: Sequence[int]) -> int:
        """How many BOS tokens `ids` begins with."""
        bos, count = self.tokenizer.bos_token_id, 0
        while bos is not None and count < len(ids) and ids[count] == bos:
            count += 1
        return count
