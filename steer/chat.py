"""A tokenizer with its chat template: the ids that server, measurement and every engine make of text, in one place."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from steer.errors import RequestError


class Chat:
    """Mixed into what has a `tokenizer` of transformers."""

    __slots__ = ()
    tokenizer: Any

    def chat_ids(
        self, messages: Sequence[dict[str, Any]], *, add_generation_prompt: bool = True, **more: Any
    ) -> list[int]:
        """Token ids of a conversation under the model's own template. The template writes the BOS where there is one,
        so the text is tokenized without special tokens: adding them again is the usual two-BOS bug.

        Raises RequestError where there is no template or it refuses the messages.
        """
        if not self.tokenizer.chat_template:
            raise RequestError("this model has no chat template: use /v1/completions", param="messages")
        try:
            text = self.tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=add_generation_prompt, **more
            )
        except Exception as error:  # templates are programs: jinja raises whatever they raise
            raise RequestError(f"the chat template refuses these messages: {error}", param="messages") from error
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)

    def text_ids(self, text: str) -> list[int]:
        """Token ids of plain text, with the tokenizer's own special tokens (BOS where it adds one)."""
        return list(self.tokenizer(text).input_ids)

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
