"""A tokenizer with its chat template: how server, measurement and every engine turn text into ids, in one place."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Protocol

from steer.errors import RequestError, brief

if TYPE_CHECKING:
    from _collections_abc import dict_items


#: What stands before and after a model's thinking, of the usual families; the first is what templates open themselves.
THINKING = (
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<thought>", "</thought>"),
    ("<reasoning>", "</reasoning>"),
    ("<seed:think>", "</seed:think>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|channel|>analysis<|message|>", "<|channel|>final<|message|>"),
)


class _Read(dict[str, object]):
    """A message that keeps which of its keys a template asked for."""

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

    def __deepcopy__(self, memo: dict[int, object]) -> _Read:
        copied = _Read({key: deepcopy(value, memo) for key, value in super().items()})
        copied.asked = self.asked
        return copied


@dataclass(frozen=True, slots=True)
class Phase:
    """A part of the positions from a prompt's last one on. `begun`: the first of them is in it, else it begins with the
    first token `begins`; it ends in front of the first token `ends`, for good. −1: no token does that."""

    begun: bool
    begins: int = -1
    ends: int = -1

    def after(self, token: int) -> Phase:
        """The same, seen from the position of one more token of the answer."""
        if token == self.ends:
            return Phase(False)
        return replace(self, begun=True, begins=-1) if token == self.begins else self

    def comes(self, answer: Sequence[int]) -> bool:
        """Is any of these tokens predicted in it?"""
        phase = self
        for token in answer:
            if phase.begun:
                return True
            phase = phase.after(token)
        return False


@dataclass(frozen=True, slots=True)
class Thinking:
    """The tokens of a model that begin and end its thinking, and those that no text of a user becomes in most
    tokenizers, such as those between turns: the special and the added ones."""

    begin: int
    end: int
    special: frozenset[int]

    def phase(self, tokens: str, prompt: Sequence[int]) -> Phase:
        """One of `spec.PHASES` of a request with this prompt, which may have begun the thinking, or ended it: with its
        last sign, unless a special token comes after that sign, which is then of an earlier turn's."""
        signs = {self.begin, self.end}
        last = next((token for token in reversed(prompt) if token in signs or token in self.special), None)
        if tokens == "after-thinking":
            return Phase(True) if last == self.end else Phase(False, begins=self.end)
        if last == self.end:
            return Phase(False)
        return Phase(True, ends=self.end) if last == self.begin else Phase(False, self.begin, self.end)


class Encoding(Protocol):
    """What a tokenizer makes of a text."""

    input_ids: Sequence[int]


class Decoder(Protocol):
    """What makes text of token ids."""

    def __hash__(self) -> int: ...

    def decode(self, ids: Sequence[int], /, *, skip_special_tokens: bool = False) -> str: ...


class Tokenizer(Decoder, Protocol):
    """What is used of a tokenizer of transformers."""

    chat_template: object
    bos_token_id: int | None
    eos_token_id: int | None
    pad_token_id: int | None
    all_special_ids: Sequence[int]

    def __hash__(self) -> int: ...
    def __call__(self, text: str, **options: object) -> Encoding: ...
    def get_vocab(self) -> Mapping[str, int]: ...
    def get_added_vocab(self) -> Mapping[str, int]: ...
    def get_chat_template(self) -> str: ...
    def apply_chat_template(self, conversation: Sequence[Mapping[str, object]], **options: object) -> str: ...


def rendered_otherwise(fitted: Mapping[str, object], given: Mapping[str, object]) -> str | None:
    """How a chat for which the template is given other variables than those that a direction was `fitted` with differs;
    None where it does not."""
    absent = object()
    names = sorted(fitted.keys() | given.keys())
    different = [name for name in names if fitted.get(name, absent) != given.get(name, absent)][:4]

    def shown(variables: Mapping[str, object]) -> str:
        return ", ".join(f"{brief(n)} {brief(variables[n]) if n in variables else 'not set'}" for n in different)

    return f"it was fitted with {shown(fitted)}, and a chat has {shown(given)}" if different else None


@lru_cache(maxsize=8)
def thinking_of(tokenizer: Tokenizer) -> Thinking | None:
    """The first pair of `THINKING` of which both are tokens of this tokenizer."""
    vocabulary = tokenizer.get_vocab()
    for begin, end in THINKING:
        if begin in vocabulary and end in vocabulary:
            added = tokenizer.get_added_vocab().values()  # a turn's token may be added and not be said to be special
            return Thinking(vocabulary[begin], vocabulary[end], frozenset((*tokenizer.all_special_ids, *added)))
    return None


@lru_cache(maxsize=8)
def _reads_parts(tokenizer: Tokenizer, template: str) -> bool:
    """Does this template of the tokenizer write the text of a message that comes in parts, and none that comes as a
    string? That is the way of models that take images."""

    def shown(content: object) -> bool:
        try:
            return "seen" in tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
        except Exception:  # templates are programs: jinja raises whatever they raise
            return False

    return not shown("seen") and shown([{"type": "text", "text": "seen"}])


class Chat:
    """Mixed into what has a `tokenizer` of transformers."""

    __slots__ = ()
    tokenizer: Tokenizer

    def chat_ids(
        self, messages: Sequence[dict[str, object]], *, add_generation_prompt: bool = True, **more: object
    ) -> list[int]:
        """Token ids of a conversation (`chat_text`). The template writes the BOS where there is one, so the text is
        tokenized without special tokens: adding them again is the usual two-BOS bug."""
        return self.piece_ids(self.chat_text(messages, add_generation_prompt=add_generation_prompt, **more))

    def chat_text(
        self, messages: Sequence[dict[str, object]], *, add_generation_prompt: bool = True, **more: object
    ) -> str:
        """A conversation under the model's own template.

        A developer's messages are the system's where the template does not know that role. Raises RequestError where
        there is no template, where it refuses the messages, or where it does not look at what one of them carries.
        """
        if not self.tokenizer.chat_template:
            raise RequestError("this model has no chat template: use /v1/completions", param="messages")
        template = self.tokenizer.get_chat_template()
        unknown, parts = "developer" not in template, _reads_parts(self.tokenizer, template)
        read = [_Read(m | {"role": "system"} if unknown and m["role"] == "developer" else m) for m in messages]
        for message in read:
            if parts and isinstance(text := dict.get(message, "content"), str):  # ours, not the template's look
                message["content"] = [{"type": "text", "text": text}]
        try:
            text = self.tokenizer.apply_chat_template(
                read, tokenize=False, add_generation_prompt=add_generation_prompt, **more
            )
        except Exception as error:  # templates are programs: jinja raises whatever they raise
            said = str(error)[:500]
            raise RequestError(f"the chat template refuses these messages: {said}", param="messages") from error
        for number, message in enumerate(read):
            if unread := sorted(message.keys() - message.asked - {"role", "content"}):
                name = f"messages.{number}.{unread[0][:100]}"
                raise RequestError(f"{name}: the chat template of this model does not use it", param=name)
        return str(text)

    def unread(self, variables: Iterable[str]) -> list[str]:
        """Those of `variables` that the chat template nowhere names, so that they change nothing."""
        words = set(re.findall(r"\w+", self.tokenizer.get_chat_template())) if self.tokenizer.chat_template else set()
        return sorted(set(variables) - words - {"tools", "documents"})

    def text_ids(self, text: str) -> list[int]:
        """Token ids of plain text, with the tokenizer's own special tokens (BOS where it adds one)."""
        return self._ids(text)

    def piece_ids(self, text: str) -> list[int]:
        """Token ids of text as it is, without special tokens."""
        return self._ids(text, add_special_tokens=False)

    def _ids(self, text: str, **options: object) -> list[int]:
        """Of all that a tokenizer can say, the ids: each list more is made while nothing else runs."""
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
