"""Loading a model and its tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from steer.errors import UnsupportedModel
from steer.tokenization import Chat, Tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True)
class Loaded(Chat):
    """A causal language model with its tokenizer. `name` is what it was loaded by."""

    name: str
    revision: str | None
    model: PreTrainedModel
    tokenizer: Tokenizer

    @property
    def context(self) -> int:
        """The most tokens that the model's positions allow."""
        config = self.model.config.get_text_config()
        known = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
        return int(known or 2048)

    @property
    def eos_ids(self) -> list[int]:
        found = self.model.generation_config.eos_token_id
        if found is None:
            found = self.tokenizer.eos_token_id
        return [] if found is None else ([found] if isinstance(found, int) else list(found))


def load(name: str, *, revision: str | None = None, dtype: str = "auto", device: str = "auto") -> Loaded:
    """Load a local folder or a hub id. dtype `auto` is the stored one on an accelerator and float32 on a CPU, where the
    lower ones are slower. Raises UnsupportedModel when it is not a causal language model that transformers can load.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    check_device(device)
    if dtype not in ("auto", *DTYPES):
        raise UnsupportedModel(f"dtype '{dtype}' is not known; accepted: auto, {', '.join(DTYPES)}")
    wanted: object = DTYPES.get(dtype) or (torch.float32 if device == "cpu" else "auto")
    find_model(name, revision)
    try:
        config = AutoConfig.from_pretrained(name, revision=revision)
        check_causal(name, config)
        try:
            tokenizer = AutoTokenizer.from_pretrained(name, revision=revision)
        except (OSError, ValueError) as error:
            raise UnsupportedModel(
                f"cannot load the model '{name}': it has no tokenizer that transformers can read (tokenizer.json and "
                f"tokenizer_config.json, as `save_pretrained` writes them): {str(error).partition(chr(10))[0]}"
            ) from error
        model = AutoModelForCausalLM.from_pretrained(
            name, revision=revision, dtype=wanted, attn_implementation=attention_implementation(config)
        )
    except (OSError, ValueError) as error:
        raise UnsupportedModel(f"cannot load the model '{name}': {error}") from error
    return Loaded(name, revision, model.to(device).eval(), tokenizer)


def check_device(device: str) -> None:
    """Raise UnsupportedModel unless a tensor can be made on `device` (such as "cpu", "cuda:1", "mps")."""
    try:
        torch.empty(0, device=device)
    except (AssertionError, RuntimeError, NotImplementedError) as error:
        raise UnsupportedModel(
            f"device '{device}' cannot be used here: {str(error).partition(chr(10))[0]}; accepted: auto, cpu, and what "
            "this build of torch reaches (cuda, cuda:N, mps)"
        ) from error


def find_model(name: str, revision: str | None = None) -> None:
    """Raise UnsupportedModel, after one request to the hub at most, when `name` is neither a folder with a config.json,
    nor in the hub's cache, nor on the hub. transformers would find that out too, after a minute of repeated requests.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    def missing(why: str) -> UnsupportedModel:
        return UnsupportedModel(
            f"cannot load the model '{name}': {why}; accepted: a folder with config.json, as `save_pretrained` writes "
            "it, or the id of a model on the hub (OWNER/NAME)"
        )

    folder = Path(name)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise missing("the folder has no config.json")
        return
    if folder.exists():
        raise missing("it is a file, not a folder")
    try:
        if isinstance(try_to_load_from_cache(name, "config.json", revision=revision), str):
            return
        get_hf_file_metadata(hf_hub_url(name, "config.json", revision=revision))
    except HFValidationError:
        raise missing("there is no such folder, and an id of the hub it cannot be") from None
    except Exception as error:  # of the network, of the hub, of its answer: they have no class of their own
        found = str(error).strip().partition("\n")[0] or type(error).__name__
        raise missing(f"there is no such folder, it is not in the hub's cache, and the hub gives: {found}") from error


def check_causal(name: str, config: PreTrainedConfig) -> None:
    """Raise UnsupportedModel for an encoder, of which transformers would make a causal model that was never trained."""
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    )

    kinds = set(getattr(config, "architectures", None) or ())
    encoders = set(MODEL_FOR_MASKED_LM_MAPPING_NAMES.values()) - set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    if kinds and kinds <= encoders:
        raise UnsupportedModel(
            f"cannot load the model '{name}': {', '.join(sorted(kinds))} fills in masked tokens and generates no text; "
            "accepted: a causal language model"
        )


def attention_implementation(config: PreTrainedConfig) -> str | None:
    """The attention implementation to load a model with, None for transformers' choice: torch's own attention has no
    soft cap, and transformers 5.19 leaves it out where that is chosen (Gemma 2)."""
    return "eager" if getattr(config.get_text_config(), "attn_logit_softcapping", None) else None


def describe(name: str, revision: str | None = None) -> tuple[str, int, int]:
    """Architecture, layers and d_model of a model, from its config alone."""
    from transformers import AutoConfig

    find_model(name, revision)
    try:
        config = AutoConfig.from_pretrained(name, revision=revision)
    except (OSError, ValueError) as error:
        raise UnsupportedModel(f"cannot read the config of the model '{name}': {error}") from error
    text = config.get_text_config()
    return (config.architectures or ["unknown"])[0], int(text.num_hidden_layers), int(text.hidden_size)


@cache
def template_parameters() -> frozenset[str]:
    """The names that `apply_chat_template` and the rendering behind it take for themselves. Whatever else is given to
    them is a variable of the template; these would replace the template, or what is made of its text."""
    from transformers import PreTrainedTokenizerBase
    from transformers.utils.chat_template_utils import render_jinja_template

    taken = {"messages"}
    for function in (PreTrainedTokenizerBase.apply_chat_template, render_jinja_template):
        taken |= {p.name for p in signature(function).parameters.values() if p.kind is not p.VAR_KEYWORD}
    return frozenset(taken)
