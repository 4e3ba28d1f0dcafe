"""The parts of the OpenAI API that the own engine serves: request bodies, checked.

A field that would change the answer and is not served here is refused by name, never ignored; fields that carry no
meaning for one model on one machine (`user`, `metadata`, ...) are accepted and ignored.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from steer.errors import RequestError
from steer.hf.sampling import Sampling

MAX_N = 64
MAX_TOP_LOGPROBS = 20


class StreamOptions(BaseModel):
    include_usage: bool = False


class _Generation(BaseModel):
    """What both generation routes share."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    model: str
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: int = Field(1, ge=1, le=MAX_N)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1)
    min_p: float | None = Field(None, ge=0, le=1)
    seed: int | None = None
    stop: str | list[str] | None = None
    ignore_eos: bool = False

    # accepted only at the value that does nothing
    presence_penalty: Literal[0] | None = None
    frequency_penalty: Literal[0] | None = None
    logit_bias: dict[str, float] | None = Field(None, max_length=0)

    @model_validator(mode="before")
    @classmethod
    def _name_what_is_not_served(cls, data: Any) -> Any:
        if isinstance(data, dict):
            found = [name for name in _NOT_SERVED if data.get(name)]
            if found:
                raise ValueError(f"{', '.join(found)}: not served by the transformers backend")
        return data

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or [])

    def sampling(self, defaults: Sampling, max_tokens: int, logprobs: int | None) -> list[Sampling]:
        """One `Sampling` for each of the n answers; a seed counts up over them, so that they differ."""

        def given(name: str) -> Any:
            value = getattr(self, name)
            return getattr(defaults, name) if value is None else value

        return [
            Sampling(
                max_tokens=max_tokens,
                temperature=given("temperature"),
                top_p=given("top_p"),
                top_k=max(0, given("top_k")),
                min_p=given("min_p"),
                seed=None if self.seed is None else self.seed + i,
                logprobs=logprobs,
                ignore_eos=self.ignore_eos,
            )
            for i in range(self.n)
        ]


_NOT_SERVED = (
    "tools",
    "functions",
    "response_format",
    "guided_json",
    "structured_outputs",
    "suffix",
    "best_of",
    "repetition_penalty",
    "use_beam_search",
    "prompt_logprobs",
)


class Part(BaseModel):
    """A part of a message's content; only text is served."""

    type: Literal["text"]
    text: str


class Message(BaseModel):
    model_config = ConfigDict(extra="allow")

    role: str
    content: str | list[Part] | None = None

    def plain(self) -> dict[str, Any]:
        """The message as templates want it: the content as one text."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content or [])
        return {"role": self.role, "content": content}


class ChatRequest(_Generation):
    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = False
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)

    @property
    def wanted_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def wanted_logprobs(self) -> int | None:
        if self.top_logprobs and not self.logprobs:
            raise RequestError("top_logprobs: needs logprobs to be true", param="top_logprobs")
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(_Generation):
    prompt: str | list[int] | list[str] | list[list[int]]
    max_tokens: int | None = Field(16, ge=0)
    logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    echo: bool = False

    @property
    def prompts(self) -> list[str | list[int]]:
        """The batch of prompts, each text or token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if not self.prompt:
            raise RequestError("prompt: must not be empty", param="prompt")
        if isinstance(self.prompt[0], int):
            return [list(self.prompt)]
        return list(self.prompt)
