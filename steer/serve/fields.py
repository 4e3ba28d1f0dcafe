"""How the transformers backend handles fields that it does not serve.

A field that would change the answer is refused and the error names it; an unknown one too. Null, empty values and the
values that clients send by default ask for nothing, and pass. A test reads the request types of the `openai` package
and of vLLM, so that none of their fields is forgotten here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from itertools import islice

#: Accepted with any value: they say who asks, and how it is kept or scheduled, and change no answer of one model here.
IGNORED = frozenset(
    [
        "cache_salt",
        "client_metadata",
        "metadata",
        "parallel_tool_calls",
        "priority",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "request_id",
        "safety_identifier",
        "service_tier",
        "session_id",
        "store",
        "stream_interval",
        "user",
    ]
)
#: Known and not served, whatever they say.
_NEVER = [
    "allowed_token_ids",
    "audio",
    "chat_template",
    "documents",
    "ec_transfer_params",
    "extra_args",
    "extra_body",
    "extra_headers",
    "extra_query",
    "functions",
    "grammar",
    "guided_choice",
    "guided_decoding_backend",
    "guided_grammar",
    "guided_json",
    "guided_regex",
    "guided_whitespace_pattern",
    "json_schema",
    "kv_transfer_params",
    "logit_processors",
    "logits_processors",
    "logprob_token_ids",
    "lora_request",
    "max_new_tokens",
    "media_io_kwargs",
    "mm_processor_kwargs",
    "moderation",
    "prediction",
    "prompt_embeds",
    "prompt_logprobs",
    "reasoning",
    "reasoning_effort",
    "regex",
    "repetition_detection",
    "structured_outputs",
    "suffix",
    "thinking_token_budget",
    "tools",
    "truncation_side",
    "vllm_xargs",
    "watermarking",
    "web_search_options",
]
#: Not served, with the values that ask for nothing besides null and what is empty.
NOT_SERVED: Mapping[str, tuple[object, ...]] = dict.fromkeys(_NEVER, ()) | {
    "best_of": (1,),
    "do_sample": (),
    "dry_multiplier": (0,),
    "encoder_repetition_penalty": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "function_call": ("none", "auto"),
    "guidance_scale": (1,),
    "include_reasoning": (True, False),  # nothing is taken out of an answer here, so nothing can be left in
    "include_stop_str_in_output": (False,),
    "length_penalty": (1,),
    "min_new_tokens": (0,),
    "mirostat": (0,),
    "mirostat_mode": (0,),
    "mm_payload": ("tensors",),
    "modalities": (["text"],),
    "no_repeat_ngram_size": (0,),
    "num_beams": (1,),
    "penalty_alpha": (0,),
    "rep_pen": (1,),
    "repeat_penalty": (1,),
    "response_format": ({"type": "text"},),
    "return_mm_kwargs": (False,),
    "return_prompt_text": (False,),
    "return_token_ids": (False,),
    "return_token_offsets": (False,),
    "return_tokens_as_token_ids": (False,),
    "routed_experts_prompt_start": (0,),
    "skip_special_tokens": (True,),
    "smoothing_factor": (0,),
    "spaces_between_special_tokens": (True,),
    "tfs": (1,),
    "tool_choice": ("none", "auto"),
    "top_a": (0,),
    "truncate_prompt_tokens": (),
    "typical": (1,),
    "typical_p": (1,),
    "use_beam_search": (False,),
    "verbosity": ("medium",),
    "xtc_probability": (0,),
}
_EMPTY: tuple[object, ...] = ("", [], {})
#: Problems of one request that are told of.
_MOST = 8


class Unserved(ValueError):
    """Fields that a request may not have: `found` has each with what is wrong about it."""

    def __init__(self, found: Iterable[tuple[str, str]]) -> None:
        self.found = tuple(found)
        super().__init__("; ".join(f"{name}: {wrong}" for name, wrong in self.found))


def check(data: Mapping[str, object], served: Iterable[str], neutral: Mapping[str, tuple[object, ...]]) -> None:
    """Raises Unserved for what `data` asks for beside the fields that are `served`. `neutral` is of one route and goes
    before `NOT_SERVED`."""
    known = {*served}
    problems = ((name[:100], _wrong(name, data[name], known, neutral)) for name in data if name not in known)
    if found := list(islice((each for each in problems if each[1]), _MOST)):
        raise Unserved(found)


def _wrong(name: str, value: object, served: set[str], own: Mapping[str, tuple[object, ...]]) -> str:
    if value is None or name in IGNORED or _among(value, _EMPTY):
        return ""
    neutral = own.get(name, NOT_SERVED.get(name))
    if neutral is None:
        near = get_close_matches(name[:40], served, 1, 0.8)
        return f"unknown field{f'; did you mean {near[0]}?' if near else ''}"
    if _among(value, neutral):
        return ""
    return f"not served by the transformers backend; accepted: {', '.join(['null', *map(repr, neutral)])}"


def _among(value: object, values: Iterable[object]) -> bool:
    """Is it one of these, where true is not 1?"""
    return any(value == each and isinstance(value, bool) == isinstance(each, bool) for each in values)
