"""Prompts to token ids, exactly as the server would make them, with the prompt's own text marked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from steer.lab.prompts import Conversation, Prompt, messages_of


class Templated(Protocol):
    """Whatever writes conversations in the model's chat template; `steer.hf.load.Loaded` does."""

    def chat_ids(self, messages: Sequence[dict[str, Any]]) -> list[int]: ...


@dataclass(frozen=True, slots=True)
class Encoded:
    """A prompt in the chat template: its ids, and which of them are the own text of its last message."""

    ids: list[int]
    own: slice


def encode(templated: Templated, prompt: Prompt, system_prompt: str | None = None) -> Encoded:
    """The ids that the server would make of the conversation which `prompt` is."""
    return encode_all(templated, [prompt], system_prompt)[0]


def encode_all(templated: Templated, prompts: Sequence[Prompt], system_prompt: str | None = None) -> list[Encoded]:
    """`encode` for each of `prompts`. What the template writes around a lone message is found once."""
    around = templated.chat_ids(messages_of("", system_prompt))

    def one(prompt: Prompt) -> Encoded:
        empty = around
        if isinstance(prompt, Conversation):
            empty = templated.chat_ids(messages_of(Conversation((*prompt.turns[:-1], ("user", ""))), system_prompt))
        return _marked(templated.chat_ids(messages_of(prompt, system_prompt)), empty)

    return [one(prompt) for prompt in prompts]


def _marked(ids: list[int], empty: list[int]) -> Encoded:
    start = next((i for i, (x, y) in enumerate(zip(ids, empty, strict=False)) if x != y), min(len(ids), len(empty)))
    same = zip(reversed(ids[start:]), reversed(empty[start:]), strict=False)
    behind = next((i for i, (x, y) in enumerate(same) if x != y), min(len(ids), len(empty)) - start)
    return Encoded(ids, slice(start, len(ids) - behind))
