"""The request bodies of the OpenAI API that the transformers engine serves, and their checks.

A field that is not served and would change the answer is refused, and so is an unknown field: the error names it. Null,
empty values and the defaults that clients send are accepted, since they ask for nothing. A test reads the request types
of the `openai` package and of vLLM, so that none of their fields is forgotten here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import islice
from types import NoneType
from typing import Annotated, ClassVar, Literal, get_args

from pydantic import BaseModel, FailFast, Field, field_validator, model_validator
from pydantic.fields import FieldInfo

from steer import readout, spec
from steer.errors import MAX_PROBLEMS, RequestError, brief, unknown_field
from steer.hf.load import template_parameters
from steer.hf.sampling import Sampling
from steer.serve import body, carriers
from steer.serve.errors import Unserved

MAX_N = 64
MAX_TOP_LOGPROBS = 20
#: Limits of every number of tokens (int32 in engines), and of a seed (int64).
MAX_COUNT, MAX_SEED = 2**31 - 1, 2**63 - 1
#: Limit of `stop_token_ids` and `logit_bias`.
MAX_IDS = 1024


#: JSON schemas of the fields that the middleware takes out of every body before it is checked here.
CARRIED: dict[str, dict[str, object]] = {
    carriers.FIELD: {"description": f"What steers the answer; {spec.ACCEPTED}"},
    readout.FIELD: {"description": f"What is read at each generated token; {readout.ACCEPTED}"},
    carriers.XARGS: {
        "type": "object",
        "description": f"Another carrier of `{carriers.FIELD}`, as in stock vLLM: the values must be strings",
    },
}


def _each(names: str, *neutral: object) -> dict[str, tuple[object, ...]]:
    return dict.fromkeys(names.split(), neutral)


#: Accepted with any value, since they do not change an answer: they say who asks, and how to store or schedule it.
IGNORED = frozenset(
    _each(
        """
        cache_salt client_metadata metadata parallel_tool_calls priority prompt_cache_key prompt_cache_options
        prompt_cache_retention request_id safety_identifier service_tier session_id store stream_interval user
        """
    )
)
#: Not served. Each has the values that ask for nothing, besides null and empty ones.
NOT_SERVED: Mapping[str, tuple[object, ...]] = (
    _each(
        """
        allowed_token_ids audio chat_template do_sample documents ec_transfer_params extra_args extra_body
        extra_headers extra_query functions grammar guided_choice guided_decoding_backend guided_grammar guided_json
        guided_regex guided_whitespace_pattern json_schema kv_transfer_params logit_processors logits_processors
        logprob_token_ids lora_request max_new_tokens media_io_kwargs mm_processor_kwargs moderation prediction
        prompt_embeds prompt_logprobs reasoning reasoning_effort regex repetition_detection structured_outputs
        suffix thinking_token_budget tools truncate_prompt_tokens truncation_side vllm_xargs watermarking
        web_search_options
        """,
    )
    | _each(
        """
        dry_multiplier epsilon_cutoff eta_cutoff min_new_tokens mirostat mirostat_mode no_repeat_ngram_size
        penalty_alpha routed_experts_prompt_start smoothing_factor top_a xtc_probability
        """,
        0,
    )
    | _each(
        """
        best_of encoder_repetition_penalty guidance_scale length_penalty num_beams rep_pen repeat_penalty tfs
        typical typical_p
        """,
        1,
    )
    | _each(
        """
        include_stop_str_in_output return_mm_kwargs return_prompt_text return_token_ids return_token_offsets
        return_tokens_as_token_ids use_beam_search
        """,
        False,
    )
    | _each(
        """
        skip_special_tokens spaces_between_special_tokens
        """,
        True,
    )
    | {
        "function_call": ("none", "auto"),
        "include_reasoning": (True, False),  # reasoning is never removed from an answer here
        "mm_payload": ("tensors",),
        "modalities": (["text"],),
        "response_format": ({"type": "text"},),
        "tool_choice": ("none", "auto"),
        "verbosity": ("medium",),
    }
)
_EMPTY: tuple[object, ...] = ("", [], {})
#: Fields that belong to one of the routes, for the error of the other.
OF_ROUTE = {"messages": "/v1/chat/completions", "prompt": "/v1/completions"}


class StreamOptions(BaseModel, extra="allow", strict=True):
    include_usage: bool = Field(False, description="end the stream with a chunk that counts tokens")

    @model_validator(mode="before")
    @classmethod
    def _of_known_fields(cls, data: object) -> object:
        return _given(cls, data, {"include_obfuscation": (True, False), "continuous_usage_stats": (False,)})


class GenerationRequest(
    BaseModel,
    extra="allow",
    strict=True,
    allow_inf_nan=False,
    json_schema_extra=lambda schema: schema["properties"].update(CARRIED),
):
    """The fields that both generation routes share."""

    model: str = Field(description="the served model's name, or an alias `MODEL+DIRECTION`, which steers")
    stream: bool = Field(False, description="answer as server-sent events, a chunk for each piece of text")
    stream_options: StreamOptions | None = Field(None, description="`{include_usage}`")
    n: int = Field(1, ge=1, le=MAX_N, description="answers to each prompt")
    temperature: float | None = Field(None, ge=0, le=2, description="0 is greedy; default: the model's, or else greedy")
    top_p: float | None = Field(None, gt=0, le=1, description="sample from the most likely tokens up to this sum")
    top_k: int | None = Field(
        None, ge=-1, le=MAX_COUNT, description="sample from this many most likely tokens; 0 and -1 for all"
    )
    min_p: float | None = Field(
        None, ge=0, le=1, description="exclude tokens whose probability is below this share of the largest one"
    )
    seed: int | None = Field(
        None,
        ge=-MAX_SEED,
        le=MAX_SEED,
        description="makes answers repeatable, independent of other requests; the i-th answer has seed + i",
    )
    stop: str | list[str] | None = Field(None, description="strings before which the answer ends")
    ignore_eos: bool = Field(False, description="go on after the end-of-sequence token")

    stop_token_ids: Annotated[list[int], FailFast()] = Field(
        default_factory=list, max_length=MAX_IDS, description="tokens that end the answer, besides the model's own"
    )
    min_tokens: int = Field(0, ge=0, le=2**31 - 1, description="the least number of tokens before the answer may end")
    bad_words: list[str] = Field(
        default_factory=list, description="words that the answer must not contain, compared as tokens"
    )
    logit_bias: dict[str, float] | None = Field(
        None, max_length=MAX_IDS, description="token id → number from -100 to 100 that is added to its logit"
    )
    presence_penalty: float | None = Field(
        None, ge=-2, le=2, description="subtracted from the logits of tokens that the answer has already"
    )
    frequency_penalty: float | None = Field(
        None, ge=-2, le=2, description="subtracted from a token's logit for each time that the answer has it"
    )
    repetition_penalty: float | None = Field(
        None, ge=0.01, le=100, description="divides the logits of tokens in prompt and answer; default: the model's own"
    )

    #: Values of fields that are not served, which ask for nothing on this route.
    neutral: ClassVar[Mapping[str, tuple[object, ...]]] = {}

    @model_validator(mode="before")
    @classmethod
    def _of_known_fields(cls, data: object) -> object:
        return _given(cls, data, cls.neutral, CARRIED)

    @field_validator("stop", "bad_words", mode="before")
    @classmethod
    def _few_texts(cls, value: object) -> object:
        given = body.as_list(value or None)
        texts = [text for text in given if isinstance(text, str)]
        if len(texts) < len(given):
            raise ValueError(f"{brief(value)} is not accepted: a text, or a list of texts")
        if problem := body.too_many(texts):
            raise ValueError(problem)
        return value

    @field_validator("logit_bias", mode="before")
    @classmethod
    def _of_token_ids(cls, value: object) -> object:
        """Raises Unserved for the first wrong item alone: there may be thousands."""
        for token, bias in value.items() if isinstance(value, dict) else ():
            number = isinstance(bias, int | float) and not isinstance(bias, bool) and abs(bias) <= 100
            if not (number and token.isascii() and token.isdigit() and len(token) < 10):
                wrong = f"{brief(bias)} is not accepted: token ids, with numbers from -100 to 100"
                raise Unserved([(token[:40], wrong)])
        return value

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or [])

    def sampling(self, defaults: Sampling, max_tokens: int, logprobs: int | None) -> list[Sampling]:
        """One `Sampling` for each of the n answers; the seed counts up, so that they differ. Raises RequestError if
        `min_tokens` is over `max_tokens`."""
        if self.min_tokens > max_tokens:
            raise RequestError(
                f"min_tokens: {self.min_tokens} is over the {max_tokens} tokens that the answer may have",
                param="min_tokens",
            )
        given = self.model_dump(include={"temperature", "top_p", "top_k", "min_p", "ignore_eos"}, exclude_none=True)
        asked = replace(defaults, **given, max_tokens=max_tokens, logprobs=logprobs)
        asked = replace(asked, top_k=max(0, asked.top_k))
        return [replace(asked, seed=None if self.seed is None else self.seed + i) for i in range(self.n)]


def _given(
    cls: type[BaseModel], data: object, neutral: Mapping[str, tuple[object, ...]], carried: Iterable[str] = ()
) -> object:
    """The fields that are given, without those that are null. Raises Unserved for fields that are not served and ask
    for something.

    Args:
        neutral: values that ask for nothing on this route; it goes before `NOT_SERVED`.
        carried: names that the middleware takes out; a misspelt field may have meant one of them.
    """
    if not isinstance(data, dict):
        return data
    meant = {*cls.model_fields, *carried}
    problems = ((name[:100], _wrong(name, data[name], meant, neutral)) for name in data if name not in cls.model_fields)
    if found := list(islice((each for each in problems if each[1]), MAX_PROBLEMS)):
        raise Unserved(found)
    for name in ("max_tokens", "max_completion_tokens"):
        if data.get(name) == -1:  # several servers take this for "no limit"
            data = data | {name: None}
    return {
        name: int(value) if type(value) is float and value.is_integer() else value  # 5.0 is a whole number in JSON
        for name, value in data.items()
        if value is not None or _means_null(cls.model_fields.get(name))
    }


def _wrong(name: str, value: object, meant: set[str], own: Mapping[str, tuple[object, ...]]) -> str:
    if value is None or name in IGNORED or _among(value, _EMPTY):
        return ""
    neutral = own.get(name, NOT_SERVED.get(name))
    if neutral is None:
        if name in OF_ROUTE:
            return f"not of this route: {OF_ROUTE[name]} takes it"
        return f"{unknown_field(name, meant, listed=False)}; /openapi.json has the fields of this route"
    if _among(value, neutral):
        return ""
    takes = ["null", *map(brief, neutral), *(["{'steer': 'refusal'}"] if name == carriers.XARGS else [])]
    return f"not served by the transformers backend; accepted: {', '.join(takes)}"


def _among(value: object, values: Iterable[object]) -> bool:
    """Whether `value` is one of these; True is not 1."""
    return any(value == each and isinstance(value, bool) == isinstance(each, bool) for each in values)


def _means_null(field: FieldInfo | None) -> bool:
    """Whether null must be kept: as a value that the field accepts, or to report that a required field is missing."""
    return field is not None and (field.is_required() or NoneType in get_args(field.annotation))


class ContentPart(BaseModel):
    """A part of a message's content; only text is served."""

    type: Literal["text"]
    text: str


class Message(BaseModel, extra="allow"):
    role: str
    content: str | list[ContentPart] | None = None

    @field_validator("content", mode="before")
    @classmethod
    def _of_text(cls, value: object) -> object:
        for number, part in enumerate(value if isinstance(value, list) else ()):
            if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                kind = part.get("type", part) if isinstance(part, dict) else part
                kind = part if kind == "text" else kind
                raise Unserved([(f"{number}", f"{brief(kind)} is not served; accepted: {{'type': 'text', 'text': …}}")])
        return value

    @model_validator(mode="after")
    def _of_someone(self) -> Message:
        """Only a message of the assistant may have no content."""
        if self.content is None and self.role != "assistant":
            raise Unserved([("content", "missing; accepted: a text, or a list of {'type': 'text', 'text': …}")])
        return self

    @model_validator(mode="after")
    def _without_tools(self) -> Message:
        extra = self.model_extra or {}
        if found := [name for name in ("audio", "function_call", "tool_calls") if extra.get(name)]:
            raise Unserved((name, "not served by the transformers backend; accepted: null") for name in found)
        return self

    def plain(self) -> dict[str, object]:
        """The message for a chat template: the content as one string, and all other fields."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content or [])
        more = {name: value for name, value in (self.model_extra or {}).items() if name not in _OF_ANSWERS and value}
        return more | {"role": self.role, "content": content}


#: Fields of an answer that clients send back with it, and that the template must not see.
_OF_ANSWERS = frozenset(("annotations", "provider_specific_fields"))


class ChatRequest(GenerationRequest):
    neutral: ClassVar = {"echo": (False,), "add_special_tokens": (False,)}

    messages: Annotated[list[Message], FailFast()] = Field(
        min_length=1, description="the conversation: `role` and `content` (text) of each"
    )
    max_tokens: int | None = Field(
        None, ge=1, le=MAX_COUNT, description="the most tokens of an answer; default: as many as the context has room"
    )
    max_completion_tokens: int | None = Field(
        None, ge=1, le=MAX_COUNT, description="the same; it takes precedence over `max_tokens`"
    )
    logprobs: bool | None = Field(False, description="report the log-probability of each token")
    top_logprobs: int | None = Field(
        None, ge=0, le=MAX_TOP_LOGPROBS, description="report this many most likely alternatives too; needs `logprobs`"
    )
    add_generation_prompt: bool | None = Field(
        None, description="end the prompt where an answer begins; default: true, unless the last message is continued"
    )
    continue_final_message: bool = Field(False, description="continue the last message instead of a new answer")
    chat_template_kwargs: dict[str, object] = Field(
        default_factory=dict, description="variables for the model's chat template"
    )

    @field_validator("messages", mode="before")
    @classmethod
    def _is_a_list(cls, value: object) -> object:
        if isinstance(value, str):
            like = f"[{{'role': 'user', 'content': {brief(value)}}}]"
            raise ValueError(f"{brief(value)} is not accepted: a list, like {like}")
        return value

    @field_validator("chat_template_kwargs")
    @classmethod
    def _variables_alone(cls, value: dict[str, object]) -> dict[str, object]:
        if taken := sorted(template_parameters().intersection(value)):
            raise Unserved(
                (name, "not for requests to set; accepted: the variables of the model's own template") for name in taken
            )
        return value

    @model_validator(mode="after")
    def _ends_in_one_way(self) -> ChatRequest:
        if self.add_generation_prompt and self.continue_final_message:
            raise Unserved([("add_generation_prompt", "cannot be true together with continue_final_message")])
        return self

    @property
    def begins_answer(self) -> bool:
        """Whether the prompt ends where an answer begins."""
        return not self.continue_final_message if self.add_generation_prompt is None else self.add_generation_prompt

    @property
    def template_variables(self) -> dict[str, object]:
        """Variables for the chat template, besides the messages and `add_generation_prompt`."""
        more = {"continue_final_message": True} if self.continue_final_message else {}
        return self.chat_template_kwargs | more

    @property
    def wanted_logprobs(self) -> int | None:
        if self.top_logprobs and not self.logprobs:
            raise RequestError("top_logprobs: needs logprobs to be true", param="top_logprobs")
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(GenerationRequest):
    neutral: ClassVar = {"add_special_tokens": (True,)}

    prompt: str | list[int] | list[str] | list[list[int]] = Field(
        description="a text or token ids, or a list of either for a batch"
    )
    max_tokens: int | None = Field(
        16, ge=0, le=MAX_COUNT, description="the most tokens of an answer; null: as many as the context has room"
    )
    logprobs: int | None = Field(
        None, ge=0, le=MAX_TOP_LOGPROBS, description="report log-probabilities, with this many alternatives"
    )
    echo: bool = Field(False, description="put the prompt before the answer")

    @field_validator("prompt", mode="wrap")
    @classmethod
    def _of_one_kind(cls, value: object, _each: object) -> object:
        """Check all items in one pass. pydantic would try each item as each of the types."""
        items = value if isinstance(value, list) else []
        kinds = set(map(type, items))
        if kinds == {list}:
            within = {frozenset(map(type, each)) for each in items}
            kinds = {int} if within == {frozenset([int])} else set()
        if not isinstance(value, str) and kinds not in ({int}, {str}):
            raise ValueError(
                f"{brief(value)} is not accepted: a text, token ids, or a list of either, and none of them empty"
            )
        return value

    @property
    def prompts(self) -> list[str | list[int]]:
        """The batch of prompts, each text or token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [list(self.prompt)]
        return list(self.prompt)
