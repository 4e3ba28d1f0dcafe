"""Loading a model and its tokenizer."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from steer.errors import UnsupportedModel, first_line
from steer.tokenization import Chat, Tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

log = logging.getLogger("steer")
#: How many seconds the hub may take to answer whether it has a model.
HUB_SECONDS = 3
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True)
class Loaded(Chat):
    """A causal language model with its tokenizer. `name` is the name that was passed to `load`."""

    name: str
    revision: str | None
    model: PreTrainedModel
    tokenizer: Tokenizer

    @property
    def context(self) -> int:
        """The most tokens that the model's positions allow; 2048 if the config does not say."""
        config = self.model.config.get_text_config()
        known = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
        return int(known or 2048)

    @property
    def eos_ids(self) -> list[int]:
        found = self.model.generation_config.eos_token_id
        if found is None:
            found = self.tokenizer.eos_token_id
        return [] if found is None else ([found] if isinstance(found, int) else list(found))


def load(
    name: str,
    *,
    revision: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    device_map: str | None = None,
    trust_remote_code: bool = False,
    chat_template: Path | None = None,
) -> Loaded:
    """Load a model and its tokenizer. A model that also takes images or sound is loaded with its text part only, if
    transformers has a class for that part.

    Args:
        name: a local folder, a hub id, or a GGUF file (a path, or OWNER/NAME/FILE.gguf).
        dtype: `auto` is the stored dtype on an accelerator, and float32 on a CPU, where lower ones are slower unless
            the CPU has instructions for them: with AMX, bfloat16 took 0.4 of the time of float32.
        device: `auto` is the accelerator if there is one.
        device_map: "auto" puts the parts that do not fit on the device into the memory of the CPU and on the disk.
        trust_remote_code: whether Python code that comes with the model may be run. The code could do anything.
        chat_template: a Jinja file that renders chats in place of the model's own template, if it has one.

    Raises:
        UnsupportedModel: it is not a language model, or transformers cannot load all of it.
    """
    from transformers import AutoTokenizer

    if device_map not in (None, "auto"):
        raise UnsupportedModel(f"device map '{device_map}' is not known; accepted: auto, or none")
    if device_map and device != "auto":
        raise UnsupportedModel(f"device map 'auto' chooses the devices itself: leave the device '{device}' out")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    check_device(device)
    if dtype not in ("auto", *DTYPES):
        raise UnsupportedModel(f"dtype '{dtype}' is not known; accepted: auto, {', '.join(DTYPES)}")
    wanted: object = DTYPES.get(dtype) or (torch.float32 if device == "cpu" else "auto")
    if trust_remote_code:
        log.warning("the model '%s' may run Python code of its own here: remote code is trusted", name)
    source = find_model(name, revision)
    options = {**source.options, "trust_remote_code": trust_remote_code}
    config = _config(name, source, trust_remote_code)
    check_causal(f"the model '{name}'", getattr(config, "architectures", None) or ())
    of_tokenizer = (
        "it has no tokenizer that transformers can read (tokenizer.json and tokenizer_config.json, as "
        "`save_pretrained` writes them): "
    )
    with _reading(name, of_tokenizer):
        tokenizer = AutoTokenizer.from_pretrained(source.name, **options)
    if chat_template:
        tokenizer.chat_template = chat_template.read_text("utf-8")
    elif not tokenizer.chat_template:
        tokenizer.chat_template = _template_of_processor(source)
    # quantized weights cannot be moved later: the code that unpacks them puts them on the device
    placed = device_map or ({"": device} if getattr(config, "quantization_config", None) else None)
    with _reading(name):
        model, loading_info = auto_class(name, config, trust_remote_code=trust_remote_code).from_pretrained(
            source.name,
            dtype=wanted,
            attn_implementation=attention_implementation(config),
            output_loading_info=True,
            **options,
            **({"device_map": placed} if placed else {}),
        )
    if missing := sorted(loading_info["missing_keys"]):
        raise UnsupportedModel(
            f"cannot load the model '{name}': its files lack {len(missing)} weights of {type(model).__name__}, which "
            f"would be random: {', '.join(missing[:4])}"
        )
    if "gguf_file" in source.options:
        _apply_gguf_special_tokens(source, tokenizer, model)
    return Loaded(name, revision, (model if placed else model.to(device)).eval(), tokenizer)


def _apply_gguf_special_tokens(source: ModelLocation, tokenizer: Any, model: PreTrainedModel) -> None:
    """Set from a GGUF file whether texts begin with BOS and which tokens end a turn. transformers 5.19 reads neither.

    With a tokenizer of the kind "llama", texts begin with BOS unless the file says otherwise, as in llama.cpp.
    """
    from gguf import GGUFReader
    from transformers.utils import cached_file

    reader = GGUFReader(cached_file(source.name, source.options["gguf_file"], revision=source.options.get("revision")))

    def value_of(key: str, otherwise: Any) -> Any:
        field = reader.get_field(f"tokenizer.ggml.{key}")
        return otherwise if field is None else field.contents()

    begins = value_of("add_bos_token", value_of("model", None) == "llama")
    if begins != (tokenizer("a").input_ids[0] == tokenizer.bos_token_id):
        tokenizer.add_bos_token = begins
    generation = model.generation_config
    generation.eos_token_id = (
        sorted({tokenizer.eos_token_id, generation.eos_token_id, value_of("eot_token_id", None)} - {None}) or None
    )


def load_classifier(name: str) -> tuple[Any, Any]:
    """A sequence classifier of transformers and its tokenizer, from the folder or hub id `name`. Python code that comes
    with it is not run. Raises UnsupportedModel if it cannot be loaded."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    try:
        return AutoModelForSequenceClassification.from_pretrained(name).eval(), AutoTokenizer.from_pretrained(name)
    except Exception as error:  # transformers raises errors of any class here, as in `_reading`
        raise UnsupportedModel(f"'{name}' is no sequence classifier that can be loaded: {error}") from error


def read_config(name: str, revision: str | None = None, *, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The config of a model, found in the same way as by `load`. Raises UnsupportedModel if there is none."""
    return _config(name, find_model(name, revision), trust_remote_code)


def _config(name: str, source: ModelLocation, trust_remote_code: bool) -> PreTrainedConfig:
    from transformers import AutoConfig

    with _reading(name):
        return AutoConfig.from_pretrained(source.name, trust_remote_code=trust_remote_code, **source.options)


@contextmanager
def _reading(name: str, what: str = "") -> Iterator[None]:
    """Raise an UnsupportedModel in place of the error that transformers raises for the files of a model, which may be
    of any class. `what` is the beginning of its text."""
    try:
        yield
    except UnsupportedModel:
        raise
    except Exception as error:
        text = " ".join(str(error).split())
        if "trust_remote_code" in text:
            text = (
                "it needs Python code that comes with it, which is not run unasked; accepted: --trust-remote-code "
                "(trust_remote_code=True in Python), if you trust its authors with this machine"
            )
        elif not isinstance(error, (OSError, ValueError, ImportError, RuntimeError)):
            text = (
                f"a file of it cannot be read ({type(error).__name__}: {text[:200]}): fetch it again if the download "
                "broke off, or if it is a pointer of Git LFS"
            )
        raise UnsupportedModel(f"cannot load the model '{name}': {what}{text}") from error


def auto_class(name: str, config: PreTrainedConfig, *, whole: bool = False, trust_remote_code: bool = False) -> Any:
    """The class of transformers that loads the language model of `config`: the text part alone if that has a class, or,
    with `whole`, also the parts for images and sound. Raises UnsupportedModel if there is no such class."""
    import transformers
    from transformers.models.auto import modeling_auto

    kinds = {
        "AutoModelForCausalLM": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        "AutoModelForImageTextToText": modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        "AutoModelForMultimodalLM": modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
    }
    own = (getattr(config, "auto_map", None) or {}) if trust_remote_code else {}
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModel(
            f"cannot load the model '{name}': {config.model_type} has an encoder; accepted: {_TAKEN}"
        )
    for kind in reversed(kinds) if whole else kinds:
        if config.model_type in kinds[kind] or kind in own:
            return getattr(transformers, kind)
    raise UnsupportedModel(
        f"cannot load the model '{name}': {config.model_type} is not known to transformers as a model that writes "
        f"text; accepted: {_TAKEN}"
    )


_TAKEN = "a causal language model, alone or inside of one that takes images, sound or video too"


def _template_of_processor(source: ModelLocation) -> str | None:
    """The chat template that a model with a processor keeps in a file apart from its tokenizer; None if it has none, or
    if the file cannot be read."""
    from transformers.utils import cached_file

    options = {key: value for key, value in source.options.items() if key != "gguf_file"}
    try:
        path = cached_file(source.name, "chat_template.json", _raise_exceptions_for_missing_entries=False, **options)
        whole = {} if path is None else json.loads(Path(path).read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        log.warning("the chat template of '%s' cannot be read: %s", source.name, first_line(error))
        return None
    found = whole.get("chat_template") if isinstance(whole, dict) else None
    return found if isinstance(found, str) else None


def check_device(device: str) -> None:
    """Raise UnsupportedModel unless a tensor can be made on `device` (such as "cpu", "cuda:1", "mps")."""
    try:
        torch.empty(0, device=device)
    except (AssertionError, RuntimeError, NotImplementedError) as error:
        raise UnsupportedModel(
            f"device '{device}' cannot be used here: {first_line(error)}; accepted: auto, cpu, and what "
            "this build of torch reaches (cuda, cuda:N, mps)"
        ) from error


@dataclass(frozen=True, slots=True)
class ModelLocation:
    """Where a model is: the folder or hub id, and the options that transformers needs with it (revision, GGUF file)."""

    name: str
    options: Mapping[str, Any]


def find_model(name: str, revision: str | None = None, configs: Sequence[str] = ("config.json",)) -> ModelLocation:
    """Find the model `name`, whose config file has one of the names `configs`.

    Raises:
        UnsupportedModel: `name` is neither a folder with a config, nor a GGUF file, nor in the hub's cache, nor on the
            hub. It is raised after one request to the hub for each of `configs` at most; transformers would find that
            out only after a minute of repeated requests.
    """
    from huggingface_hub import get_session, hf_hub_url, hf_raise_for_status, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._headers import build_hf_headers

    def missing(why: str) -> UnsupportedModel:
        return UnsupportedModel(
            f"cannot load the model '{name}': {why}; accepted: a folder with config.json, as `save_pretrained` writes "
            "it, a GGUF file, or the id of a model on the hub (OWNER/NAME, or OWNER/NAME/FILE.gguf)"
        )

    options: dict[str, Any] = {} if revision is None else {"revision": revision}
    where, path = name, Path(name)
    if name.endswith(".gguf"):
        if path.is_file():
            check_gguf()
            return ModelLocation(str(path.parent), {"gguf_file": path.name})
        where, _, file = name.rpartition("/")
        options, configs = options | {"gguf_file": file}, (file,)
    elif path.is_dir():
        if not any((path / config).is_file() for config in configs):
            raise missing("the folder has no config.json")
        return ModelLocation(name, options)
    elif path.exists():
        raise missing("it is a file, not a folder")
    try:
        found = (try_to_load_from_cache(where, config, revision=revision) for config in configs)
        cached = next((Path(path) for path in found if isinstance(path, str)), None)
        try:
            for config in configs:
                url = hf_hub_url(where, config, revision=revision)
                answer = get_session().head(url, headers=build_hf_headers(), timeout=HUB_SECONDS)
                if answer.status_code != 404 or config == configs[-1]:
                    hf_raise_for_status(answer)
                    break
        except Exception:  # errors of the network, the hub or its answer have no common class
            if cached is None:
                raise
            where = str(cached.parent)  # by its id, the hub would be asked again for each file
            options.pop("revision", None)
    except HFValidationError:
        raise missing("there is no such folder, and this is not a hub id either") from None
    except Exception as error:
        raise missing(
            f"there is no such folder, it is not in the hub's cache, and the hub gives: {first_line(error)}"
        ) from error
    if "gguf_file" in options:
        check_gguf()
    return ModelLocation(where, options)


def check_gguf() -> None:
    if find_spec("gguf") is None:
        raise UnsupportedModel("a GGUF file needs the package gguf: pip install 'steer-llm[gguf]'")


def check_causal(what: str, architectures: Sequence[str]) -> None:
    """Raise UnsupportedModel for an encoder, by the names of its classes: transformers would load it as a causal model
    that was never trained. `what`: what cannot be used."""
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    )

    kinds = set(architectures)
    encoders = set(MODEL_FOR_MASKED_LM_MAPPING_NAMES.values()) - set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    if kinds and kinds <= encoders:
        raise UnsupportedModel(
            f"cannot use {what}: {', '.join(sorted(kinds))} fills in masked tokens and generates no text; accepted: a "
            "causal language model"
        )


def attention_implementation(config: PreTrainedConfig) -> str | None:
    """The attention implementation to load a model with; None for transformers' choice. torch's own attention has no
    soft cap, and transformers 5.19 leaves the soft cap out if it chooses that attention (Gemma 2)."""
    return "eager" if getattr(config.get_text_config(), "attn_logit_softcapping", None) else None


def describe(name: str, revision: str | None = None, *, trust_remote_code: bool = False) -> tuple[str, int, int]:
    """The architecture (`text_architecture`), the number of layers and the d_model of a model, from its config
    alone."""
    config = read_config(name, revision, trust_remote_code=trust_remote_code)
    text = config.get_text_config()
    otherwise = (config.architectures or ["unknown"])[0]
    return text_architecture(text.model_type, otherwise), int(text.num_hidden_layers), int(text.hidden_size)


def text_architecture(model_type: str, otherwise: str) -> str:
    """The architecture by which a direction is checked to fit a model: the class of the text model of type
    `model_type` if transformers has one, else `otherwise`. So a text model alone and the same text model with a vision
    tower have the same architecture."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return str(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type, otherwise))


@cache
def template_parameters() -> frozenset[str]:
    """The names of the parameters of `apply_chat_template` and of the rendering function that it calls. Any other name
    that is passed to them is a variable of the template. These names would change the template, or how its text is
    used."""
    from transformers import PreTrainedTokenizerBase
    from transformers.utils.chat_template_utils import render_jinja_template

    taken = {"messages"}
    for function in (PreTrainedTokenizerBase.apply_chat_template, render_jinja_template):
        taken |= {p.name for p in signature(function).parameters.values() if p.kind is not p.VAR_KEYWORD}
    return frozenset(taken)
