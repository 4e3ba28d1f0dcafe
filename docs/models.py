"""Makes docs/models.md: which models Steer serves, and how, by trying a tiny random one of every kind.

    python -m docs.models [--rows FILE] [TYPE]...
    python -m docs.models [--rows FILE] --page

Each kind of model that transformers knows as a causal language model, or as one that takes images and writes text, is
built with a few small layers in a process of its own, steered at both sites and compared with plain hooks, given to the
engine, which checks itself, and baked. What was found is kept in FILE, and the same command goes on there.
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import multiprocessing
import os
import re
import resource
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from logging.handlers import BufferingHandler
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

PAGE = Path(__file__).with_suffix(".md")
#: Seconds of computing that one kind of model may take.
LIMIT = 60
COLUMNS = ("resid_post", "writers", "engine", "bake")
#: What sizes are called, in all families. `layers` are enough for a hybrid to have one of each kind.
SIZES: dict[str, object] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "model_dim", "embed_dim", "word_embed_proj_dim"), 64),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth", "encoder_layers"), 4),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_query_groups", "num_kv_heads"), 2),
    **dict.fromkeys(("head_dim", "global_head_dim", "attention_head_dim", "v_head_dim", "qk_nope_head_dim"), 16),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "o_lora_rank", "qk_rope_head_dim", "rotary_dim"), 8),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "encoder_ffn_dim"), 96),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 48),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_top_k", "moe_k", "moe_topk"), 2),
    **dict.fromkeys(
        ("n_group", "topk_group", "n_shared_experts", "first_k_dense_replace", "moe_num_shared_experts"), 1
    ),
    **dict.fromkeys(("out_hidden_size", "projection_dim", "projector_dim", "output_dim", "qformer_hidden_size"), 64),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "context_length"), 256),
    **dict.fromkeys(("vocab_size", "text_vocab_size", "vocab_size_per_layer_input"), 256),
    **dict.fromkeys(("bos_token_id", "image_token_id", "image_token_index", "decoder_start_token_id"), 1),
    **dict.fromkeys(("eos_token_id", "video_token_id", "audio_token_id"), 2),
    **dict.fromkeys(("pad_token_id",), 0),
    **dict.fromkeys(("initializer_range", "init_std"), 0.2),
    **dict.fromkeys(("linear_num_value_heads", "linear_num_key_heads"), 2),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 16),
    **dict.fromkeys(("mamba_d_state", "state_size", "ssm_state_size", "mamba_d_conv"), 4),
    **dict.fromkeys(("mamba_chunk_size", "chunk_size", "mamba_d_head", "mamba_head_dim"), 16),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads"), 8),
    **dict.fromkeys(("mamba_n_groups",), 1),
    "mamba_d_ssm": 128,
    "image_size": 28,
    "patch_size": 14,
    "sliding_window": 64,
    "attention_chunk_size": 64,
    "query_pre_attn_scalar": 16,
    "hidden_size_per_layer_input": 8,
}
#: Text models whose positions have three parts.
MROPE = ("glm4v", "glm46v", "glm_ocr", "glmga", "paddleocr", "qwen2_vl", "qwen2_5_vl", "qwen2_5_omni", "qwen3_vl")
#: A window at each layer but the last.
WINDOWS = ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"]
#: What must agree with something else in one kind of model or of its parts.
EXTRA: dict[str, dict[str, object]] = {
    "cohere_compass_text": {"layer_types": WINDOWS},
    "gemma3n_text": {"layer_types": WINDOWS, "num_kv_shared_layers": 0},
    "glm4v_moe_text": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}},
    **{kind: {"layer_types": ["conv", "conv", "full_attention", "conv"]} for kind in ("lfm2", "lfm2_moe")},
    "bamba": {"attn_layer_indices": [1, 3]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "kimi_linear": {"num_experts_per_token": 2},
}


@dataclass(frozen=True)
class Row:
    """What was found of one kind of model. In `found`, by column: "yes" ("batched", "one at a time") or "no"; in
    `reasons`, by column, why not."""

    kind: str
    architecture: str
    found: Mapping[str, str] = field(default_factory=dict)
    reasons: Mapping[str, str] = field(default_factory=dict)
    vllm: str = "?"


def kinds() -> list[str]:
    """The model types that are tried: decoders, alone and inside of models that take images."""
    from transformers.models.auto import modeling_auto as auto

    causal, seeing = auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    encoders = set(auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES)
    return sorted({*causal, *seeing} - encoders)


def tiny_config(kind: str) -> Any:
    """A small configuration of the model type `kind`."""
    from transformers import CONFIG_MAPPING

    return _tiny(CONFIG_MAPPING[kind], EXTRA.get(kind, {}))


def _tiny(config_class: Any, extra: Mapping[str, object]) -> Any:
    try:
        default = config_class()
        values = default.to_dict()
    except Exception:  # some have no default for what they must be given
        default, values = None, SIZES
    given: dict[str, Any] = {name: size for name, size in SIZES.items() if values.get(name) is not None}
    if "kv_lora_rank" in given:  # latent attention
        given |= {"num_key_value_heads": 4, "head_dim": 8}
    if getattr(config_class, "model_type", "").startswith(MROPE):
        given["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}
    for name, part in (getattr(config_class, "sub_configs", None) or {}).items():
        one = getattr(default, name, None)
        part = type(one) if one is not None and hasattr(one, "to_dict") else part
        if getattr(part, "model_type", None) and hasattr(part, "to_dict"):
            given[name] = _tiny(part, EXTRA.get(part.model_type, {})).to_dict()
    return config_class(**given | dict(extra))


def examine(kind: str) -> Row:
    """Try one kind of model, in this process."""
    import torch
    from transformers.models.auto import modeling_auto as auto

    from steer.errors import SteerError
    from steer.hf.load import attention_implementation, auto_class

    names = {**auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, **auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}
    torch.manual_seed(0)
    torch.set_num_threads(1)
    config = tiny_config(kind)
    architecture = names[kind]
    found: dict[str, str] = {}
    reasons: dict[str, str] = {}
    try:
        built = auto_class(kind, config, whole=True)
    except SteerError as error:
        return Row(kind, architecture, dict.fromkeys(COLUMNS, "no"), dict.fromkeys(COLUMNS, str(error)))
    model = built.from_config(config, attn_implementation=attention_implementation(config)).eval()
    architecture = type(model).__name__
    spread(model)
    try:
        _logits(model)
    except (TypeError, ValueError) as error:
        if "pixel_values" not in str(error):
            raise
        return Row(
            kind, architecture, dict.fromkeys(COLUMNS, "no"), dict.fromkeys(COLUMNS, "an image comes with each text")
        )

    def trying(column: str, work: Callable[[], str]) -> None:
        try:
            found[column] = work()
        except SteerError as error:
            found[column], reasons[column] = "no", str(error)
        except Exception as error:  # a fault of ours, which the page tells
            found[column], reasons[column] = "no", f"fails ({type(error).__name__}: {str(error).partition(chr(10))[0]})"

    trying("resid_post", lambda: at_blocks(model))
    trying("writers", lambda: at_writers(model))

    def engine() -> str:
        how, why = served(model)
        if why:
            reasons["engine"] = why
        return how

    if "yes" in found.values():
        trying("engine", engine)
        trying("bake", lambda: baked(model))
    return Row(kind, architecture, found, reasons)


def spread(model: Any) -> None:
    """Random numbers where a fresh model has zeros and ones, so that what is left out shows."""
    import torch

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 and parameter.is_floating_point() and not name.endswith(("A_log", "dt_bias")):
                parameter.add_(0.1 * torch.randn_like(parameter))


def _direction(model: Any, sites: tuple[Any, ...]) -> Any:
    from steer.hf.steering import Anatomy
    from tests import models

    anatomy = Anatomy(model)
    made = models.direction(model, shared=True, embedding=True, sites=sites)
    return made.with_meta(architecture=anatomy.architecture)


def _ids() -> Any:
    import torch

    return torch.randint(3, 200, (2, 12), generator=torch.Generator().manual_seed(7))


def _logits(model: Any) -> Any:
    import torch

    with torch.no_grad():
        return model(input_ids=_ids(), use_cache=False).logits


class Differs(Exception):
    """Steered logits are not those of the reference: a bug of ours."""


def at_blocks(model: Any) -> str:
    """Steered logits against plain hooks on the modules that are called as the blocks of the text model are."""
    import steer
    from tests.oracle import ablated

    direction = _direction(model, ("resid_post",))
    with steer.attach(model, {"d": direction}) as steering, steering("d"):
        got = _logits(model)
    plain_logits = _logits(model)
    v = direction.directions[0, 0]
    blocks = [
        m
        for n, m in model.get_decoder().named_modules()
        if re.fullmatch(r"([a-z_]+\.)?(layers|h|blocks|block)\.\d+", n)
    ]
    config = model.config.get_text_config()
    assert len(blocks) == config.num_hidden_layers, f"{len(blocks)} blocks by their names"

    def hook(_m: Any, _a: Any, out: Any) -> Any:
        return (ablated(out[0], v), *out[1:]) if isinstance(out, tuple) else ablated(out, v)

    def before(_m: Any, args: Any, kwargs: Any) -> Any:
        if args:
            return (ablated(args[0], v), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": ablated(kwargs["hidden_states"], v)}

    handles = [block.register_forward_hook(hook) for block in blocks]
    handles.append(blocks[0].register_forward_pre_hook(before, with_kwargs=True))
    try:
        expected = _logits(model)
    finally:
        for handle in handles:
            handle.remove()
    _check(got, expected, plain_logits)
    return "yes"


def _check(got: Any, expected: Any, plain_logits: Any) -> None:
    size = float(expected.abs().max())
    if not float((got - expected).abs().max()) <= 1e-3 * size:
        raise Differs(f"steered logits are off by {float((got - expected).abs().max()) / size:.1e}")
    if not float((plain_logits - expected).abs().max()) > 1e-3 * size:
        raise Differs("steering changes nothing")


def at_writers(model: Any) -> str:
    from steer.hf.steering import Steering

    Steering(model, sites=("writers",))
    return "yes"


def served(model: Any) -> tuple[str, str]:
    """How the engine serves it, and why not batched."""
    from steer.hf.batching import start_engine
    from steer.hf.steering import Steering

    heard = BufferingHandler(1000)
    logging.getLogger("steer").addHandler(heard)
    engine = start_engine(Steering(model), [], context=200, capacity=8, cache_tokens=1024)
    engine.stop()
    if engine.description == "continuous batching":
        return "batched", ""
    why = next((said for one in heard.buffer if "cannot be batched" in (said := one.getMessage())), "")
    return "one at a time", why.removeprefix("this model cannot be batched (").removesuffix(
        "): requests are served one at a time"
    )


def baked(model: Any) -> str:
    """Baked as files, and compared with what is served at the site `writers`."""
    from steer.lab.merge.model import bake
    from steer.lab.merge.removal import removal
    from steer.lab.merge.weights import Checkpoint
    from tests import models

    removed = removal(_direction(model, ("writers",)))
    with tempfile.TemporaryDirectory() as folder:
        original, output = Path(folder) / "original", Path(folder) / "baked"
        model.save_pretrained(original)
        models.tokenizer(256).save_pretrained(original)
        bake(Checkpoint(original), removed, output, digest="0" * 64)
    return "yes"


#: How long reasons are told, so that models which share one share the words.
SHORTER = (
    (r".*has an encoder.*", "has an encoder"),
    (r".*a norm stands between the writers and the stream.*", "a norm stands between the writers and the stream"),
    (r".*no attention and MLP that write are known by their names.*", "its writers are not known by their names"),
    (r"site 'writers': in block .*", "no one or two modules write what a block adds to the stream"),
    (r".*(a stream that is wider than one vector a token).*", r"\1"),
    (r"a \w+ \w+ request in a mixed batch has .*", "its answers in a batch are not those of `generate`"),
    (r"a forward pass fails: (\w+).*", r"a pass fails (\1)"),
    (r"transformers refuses it: \w+: (.*)", r"transformers: \1"),
    (r"[A-Z]\w+: (.*)", r"\1"),
)


def plain(reason: str) -> str:
    """A reason in short, without what differs between models that share it."""
    reason = re.sub(r"/\S*/", "", reason.partition("\n")[0])
    for pattern, words in SHORTER:
        if found := re.fullmatch(pattern, reason):
            reason = found.expand(words)
            break
    return reason[:160].replace("|", "/")


def cells(row: Row) -> tuple[str, ...]:
    """What the page says of a row: its class, and for each column what was found, with the reason after a colon."""
    said = [row.found.get(column, "no") for column in COLUMNS]
    reasons = [plain(row.reasons[column]) if column in row.reasons else "" for column in COLUMNS]
    return (row.architecture, *(f"{one}: {why}" if why else one for one, why in zip(said, reasons, strict=True)))


PREFACE = """\
# Models

This page lists the models that Steer serves, as tests found them. `python -m docs.models` writes it. It builds a small
random model of every kind that transformers {version} knows as a causal language model, or as a model that takes images
and writes text, except encoders. Each model goes through three tests. It is steered at both sites and compared with
plain hooks on its blocks. The engine compares its answers with `generate`. It is baked, and the result is compared with
what is served. Your model goes through the same self-check at every start.

- *blocks*: `--sites resid_post`, the default. *writers*: `--sites writers`.
- *engine*: how the transformers backend serves requests: batched, or one at a time.
- *bake*: `steer bake` makes an ordinary checkpoint.
- *vLLM*: vLLM {vllm} knows the class, and batches it. The self-check at start decides whether it is steered;
  [Backends](backends.md#vllm) says what was run.
- The first column is `model_type` in config.json. For a model that takes images, only text is served and steered. A
  direction is checked against its text model, so a direction made for the text model alone fits too, and the reverse.

"""
HEAD = ("model_type", "class", "blocks", "writers", "engine", "bake", "vLLM")


def render(rows: Iterable[Row], version: str, vllm: str) -> str:
    """The page."""
    found = sorted(rows, key=lambda row: row.kind)
    shown = [row for row in found if "build" not in row.reasons]
    reasons: dict[str, int] = {}
    lines = [" | ".join(HEAD), " | ".join(["---"] * len(HEAD))]
    for row in shown:
        made = []
        for cell in cells(row)[1:]:
            said, colon, why = cell.partition(": ")
            made.append(f"{said} [{reasons.setdefault(why, len(reasons) + 1)}]" if colon else said)
        lines.append(" | ".join([row.kind, row.architecture, *made, row.vllm]))
    text = PREFACE.format(version=version, vllm=vllm) + "".join(f"| {line} |\n" for line in lines)
    text += "\n## Why not\n\n" + "".join(f"{number}. {why}\n" for why, number in reasons.items())
    text += "\n## Not tried\n\nNo small model of these kinds could be built here, which says nothing about real ones: "
    return text + ", ".join(row.kind for row in found if "build" in row.reasons) + ".\n"


def parse(page: str) -> dict[str, tuple[str, ...]]:
    """By kind what `cells` says of it."""
    reasons = dict(re.findall(r"^(\d+)\. (.*)$", page, re.MULTILINE))
    table = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| ")][2:]
    return {
        kind: (architecture, *(re.sub(r" \[(\d+)\]$", lambda m: f": {reasons[m[1]]}", cell) for cell in found))
        for kind, architecture, *found, _vllm in table
    }


def _child(kind: str, sender: Connection) -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (LIMIT, LIMIT))
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, 1)
    os.dup2(devnull, 2)
    try:
        row = examine(kind)
    except BaseException as error:  # whatever it is, the other kinds are tried
        row = Row(kind, "?", {}, {"build": f"{type(error).__name__}: {error}"})
    sender.send(asdict(row))
    sender.close()


def tried(kind: str) -> Row:
    """`examine` in a process of its own, for LIMIT seconds at most."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(kind, sender))
    process.start()
    sender.close()
    try:
        if receiver.poll(10 * LIMIT):  # the machine may be busy
            return Row(**receiver.recv())
        raise EOFError
    except EOFError:
        return Row(kind, "?", {}, {"build": f"it died, or took more than {LIMIT} seconds"})
    finally:
        process.kill()
        process.join()


def known_to_vllm(rows: Iterable[Row]) -> list[Row]:
    if find_spec("vllm") is None:
        return list(rows)
    from vllm import ModelRegistry

    known = set(ModelRegistry.get_supported_archs())
    return [Row(r.kind, r.architecture, r.found, r.reasons, "yes" if r.architecture in known else "no") for r in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", metavar="TYPE", help="try these again; default: all that are not in FILE")
    parser.add_argument("--rows", type=Path, default=Path("models.jsonl"), metavar="FILE")
    parser.add_argument("--page", action="store_true", help="write the page of what is in FILE, and try nothing")
    chosen = parser.parse_args()
    import torch
    import transformers

    # which the processes then have already
    for module in ("steer.hf.batching", "steer.lab.merge.model", "tests.oracle"):
        importlib.import_module(module)

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    rows: dict[str, Row] = {}
    if chosen.rows.exists():
        rows = {one["kind"]: Row(**one) for one in map(json.loads, chosen.rows.read_text().splitlines())}
    if chosen.page:
        from steer.vllm.internals.base import version

        vllm = version() if find_spec("vllm") else "?"
        missing = [Row(kind, "?", {}, {"build": "not tried yet"}) for kind in kinds() if kind not in rows]
        PAGE.write_text(render([*known_to_vllm(rows.values()), *missing], transformers.__version__, vllm), "utf-8")
        return
    todo = chosen.kinds or [kind for kind in kinds() if kind not in rows]
    for number, kind in enumerate(todo, 1):
        row = rows[kind] = tried(kind)
        with chosen.rows.open("a") as file:
            file.write(json.dumps(asdict(row)) + "\n")
        print(f"{number}/{len(todo)} {kind}: {dict(row.found)} {dict(row.reasons)}", flush=True)


if __name__ == "__main__":
    main()
