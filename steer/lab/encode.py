"""Prompts to token ids, exactly as the server would make them, with the prompt's own text marked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from steer.lab.prompts import Conversation, Prompt, messages_of


class Templated(Protocol):
    """Whatever writes conversations in the model's chat template; `steer.hf.load.Loaded` does."""

    def chat_ids(self, messages: Sequence[dict[str, Any]], **more: Any) -> list[int]: ...


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
        if not isinstance(prompt, Conversation):
            return _marked(templated.chat_ids(messages_of(prompt, system_prompt)), around)
        # an assistant's message at the end is an answer that has begun, and goes on where it stops
        begun = {"add_generation_prompt": False, "continue_final_message": True} if prompt.begun else {}
        ids = [templated.chat_ids(messages_of(p, system_prompt), **begun) for p in (prompt, prompt.emptied)]
        return _marked(*ids)

    return [one(prompt) for prompt in prompts]


def _marked(ids: list[int], empty: list[int]) -> Encoded:
    start = next((i for i, (x, y) in enumerate(zip(ids, empty, strict=False)) if x != y), min(len(ids), len(empty)))
    same = zip(reversed(ids[start:]), reversed(empty[start:]), strict=False)
    behind = next((i for i, (x, y) in enumerate(same) if x != y), min(len(ids), len(empty)) - start)
    return Encoded(ids, slice(start, len(ids) - behind))
