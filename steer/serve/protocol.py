"""The parts of the OpenAI API that the own engine serves: request bodies, checked.

A field that would change the answer and is not served here is refused by name, never ignored; fields that carry no
meaning for one model on one machine (`user`, `metadata`, ...) are accepted and ignored.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from steer import readout, spec
from steer.errors import RequestError
from steer.hf.sampling import Sampling
from steer.serve import carriers

MAX_N = 64
MAX_TOP_LOGPROBS = 20
#: Of every number that counts tokens, and of a seed: what engines keep them in.
MAX_COUNT, MAX_SEED = 2**31 - 1, 2**63 - 1


#: Fields that the middleware takes out of every body before it is checked here, as JSON schema.
CARRIED: dict[str, dict[str, Any]] = {
    carriers.FIELD: {"description": f"What steers the answer; {spec.ACCEPTED}"},
    readout.FIELD: {"description": f"What is read at each generated token; {readout.ACCEPTED}"},
    carriers.XARGS: {
        "type": "object",
        "description": f"Another carrier of `{carriers.FIELD}`, as plain vLLM has it: flat texts only",
    },
}


class StreamOptions(BaseModel):
    include_usage: bool = Field(False, description="end the stream with a chunk that counts tokens")


class _Generation(BaseModel):
    """What both generation routes share."""

    model_config = ConfigDict(
        extra="allow",
        allow_inf_nan=False,
        json_schema_extra=lambda schema: schema["properties"].update(CARRIED),
    )

    model: str = Field(description="the served model's name, or an alias `MODEL+DIRECTION`, which steers")
    stream: bool = Field(False, description="answer as server-sent events, a chunk for each piece of text")
    stream_options: StreamOptions | None = Field(None, description="`{include_usage}`")
    n: int = Field(1, ge=1, le=MAX_N, description="answers to each prompt")
    temperature: float | None = Field(None, ge=0, le=2, description="0 is greedy; default: the model's own")
    top_p: float | None = Field(None, gt=0, le=1, description="sample from the likeliest tokens of this probability")
    top_k: int | None = Field(
        None, ge=-1, le=MAX_COUNT, description="sample from this many likeliest tokens; 0 and -1 for all"
    )
    min_p: float | None = Field(None, ge=0, le=1, description="leave out tokens below this share of the likeliest one")
    seed: int | None = Field(
        None,
        ge=-MAX_SEED,
        le=MAX_SEED,
        description="repeats the same answers, whatever shares the batch; counts up over n",
    )
    stop: str | list[str] | None = Field(None, description="texts before which the answer ends")
    ignore_eos: bool = Field(False, description="go on behind the end-of-sequence token")

    # accepted only at the value that does nothing
    presence_penalty: Literal[0] | None = Field(None, description="not served: 0 only")
    frequency_penalty: Literal[0] | None = Field(None, description="not served: 0 only")
    logit_bias: dict[str, float] | None = Field(None, max_length=0, description="not served: empty only")

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
    messages: list[Message] = Field(min_length=1, description="the conversation: `role` and `content` (text) of each")
    max_tokens: int | None = Field(
        None, ge=1, le=MAX_COUNT, description="most tokens of an answer; default: what the context leaves"
    )
    max_completion_tokens: int | None = Field(
        None, ge=1, le=MAX_COUNT, description="the same; it goes before `max_tokens`"
    )
    logprobs: bool | None = Field(False, description="report the log-probability of each token")
    top_logprobs: int | None = Field(
        None, ge=0, le=MAX_TOP_LOGPROBS, description="and of the likeliest alternatives; needs `logprobs`"
    )
    chat_template_kwargs: dict[str, Any] = Field(
        default_factory=dict, description="variables for the model's chat template"
    )

    @property
    def wanted_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def wanted_logprobs(self) -> int | None:
        if self.top_logprobs and not self.logprobs:
            raise RequestError("top_logprobs: needs logprobs to be true", param="top_logprobs")
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(_Generation):
    prompt: str | list[int] | list[str] | list[list[int]] = Field(
        description="a text or token ids, or a list of either for a batch"
    )
    max_tokens: int | None = Field(
        16, ge=0, le=MAX_COUNT, description="most tokens of an answer; null for what the context leaves"
    )
    logprobs: int | None = Field(
        None, ge=0, le=MAX_TOP_LOGPROBS, description="report log-probabilities, with this many alternatives"
    )
    echo: bool = Field(False, description="put the prompt before the answer")

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
