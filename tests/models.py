"""Tiny random models of every architecture that Steer promises, made on the fly, and directions for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import transformers as tf

from steer.direction import Direction, DirectionMeta
from steer.hf.load import attention_implementation, auto_class, text_architecture
from steer.names import MODES, TURNING, Mode, Site
from steer.runtime.bank import DirectionBank, HookPoint, LocalPlacement
from steer.shape import Shape

D_MODEL, LAYERS, VOCABULARY = 64, 3, 128
#: Two prompts.
IDS = torch.randint(3, VOCABULARY, (2, 17), generator=torch.Generator().manual_seed(7))

_SHAPE: dict[str, Any] = dict(
    vocab_size=VOCABULARY,
    hidden_size=D_MODEL,
    intermediate_size=96,
    num_hidden_layers=LAYERS,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=512,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
    initializer_range=0.2,
)


def _shape(*without: str, **more: Any) -> dict[str, Any]:
    return {k: v for k, v in (_SHAPE | more).items() if k not in without}


def configs() -> dict[str, Any]:
    """A tiny configuration of each architecture."""
    experts = dict(num_local_experts=4, num_experts_per_tok=2, intermediate_size=D_MODEL)  # square: no shape tells
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    gpt2 = dict(n_embd=D_MODEL, n_layer=LAYERS, n_head=4, n_positions=512, vocab_size=VOCABULARY, initializer_range=0.2)
    return {
        "llama": tf.LlamaConfig(**_SHAPE),
        "mistral": tf.MistralConfig(**_shape(sliding_window=None)),
        "qwen2": tf.Qwen2Config(**_shape("head_dim")),
        "qwen3": tf.Qwen3Config(**_SHAPE),
        "gemma2": tf.Gemma2Config(**_shape(query_pre_attn_scalar=16, sliding_window=64)),
        "gemma3": tf.Gemma3TextConfig(**_shape(query_pre_attn_scalar=16, sliding_window=64)),
        "phi3": tf.Phi3Config(**_shape("head_dim")),
        "gpt2": tf.GPT2Config(**gpt2, bos_token_id=1, eos_token_id=2, pad_token_id=0),
        "gpt_neox": tf.GPTNeoXConfig(**_shape("num_key_value_heads", "head_dim")),
        "olmo2": tf.Olmo2Config(**_shape("head_dim")),
        "cohere": tf.CohereConfig(**_shape("head_dim", "num_key_value_heads", num_key_value_heads=2)),
        "mixtral": tf.MixtralConfig(**_shape(num_local_experts=4, num_experts_per_tok=2, sliding_window=None)),
        "qwen3_moe": tf.Qwen3MoeConfig(
            **_shape(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=48, decoder_sparse_step=1)
        ),
        "phi": tf.PhiConfig(**_shape("num_key_value_heads", "head_dim")),
        "glm4": tf.Glm4Config(**_SHAPE),
        "granite": tf.GraniteConfig(**_shape("head_dim", residual_multiplier=0.22, embedding_multiplier=3.0)),
        "gpt_oss": tf.GptOssConfig(**_shape(layer_types=["full_attention"] * LAYERS, rope_parameters=rope, **experts)),
        "llama4": tf.Llama4TextConfig(**_shape(intermediate_size_mlp=96, interleave_moe_layer_step=2, **experts)),
    }


def wrappers() -> dict[str, Any]:
    """Tiny configurations of models that take images too, each with as many layers in its vision tower as in its text
    model."""
    tower: dict[str, Any] = dict(hidden_size=32, intermediate_size=48, num_attention_heads=2, patch_size=14)
    seeing = tower | dict(num_hidden_layers=LAYERS, image_size=28)
    qwen = dict(depth=LAYERS, hidden_size=32, intermediate_size=48, num_heads=2, out_hidden_size=D_MODEL, patch_size=14)
    rope = {"rope_type": "default", "mrope_section": [4, 2, 2], "rope_theta": 10000.0}
    linear = dict(linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=16, linear_value_head_dim=16)
    kinds = ["linear_attention", "linear_attention", "full_attention"]
    return {
        "gemma3_vision": tf.Gemma3Config(
            text_config=configs()["gemma3"].to_dict(),
            vision_config=seeing | {"model_type": "siglip_vision_model"},
            mm_tokens_per_image=4,
            boi_token_index=97,
            eoi_token_index=98,
            image_token_index=99,
        ),
        "mistral3": tf.Mistral3Config(
            text_config=configs()["mistral"].to_dict(),
            vision_config=seeing | {"model_type": "pixtral"},
            image_token_index=99,
        ),
        "llava": tf.LlavaConfig(
            text_config=configs()["llama"].to_dict(),
            vision_config=seeing | {"model_type": "clip_vision_model"},
            image_token_index=99,
        ),
        "qwen2_5_vl": tf.Qwen2_5_VLConfig(
            text_config=_shape("head_dim", rope_parameters=rope),
            vision_config=qwen | dict(fullatt_block_indexes=[1]),
            image_token_id=99,
            video_token_id=98,
        ),
        "qwen3_vl": tf.Qwen3VLConfig(
            text_config=_shape(rope_parameters=rope),
            vision_config=qwen | dict(deepstack_visual_indexes=[0, 1], num_position_embeddings=4),
            image_token_id=99,
            video_token_id=98,
        ),
        "qwen3_5": tf.Qwen3_5Config(
            text_config=_shape(layer_types=kinds, **linear),
            vision_config=qwen,
            image_token_id=99,
            video_token_id=98,
        ),
        "llama4_vision": tf.Llama4Config(
            text_config=_shape(num_local_experts=2, intermediate_size_mlp=96, attention_chunk_size=64),
            vision_config=seeing | dict(vision_output_dim=32, projector_input_dim=32, projector_output_dim=32),
            image_token_index=99,
        ),
    }


ARCHITECTURES = tuple(configs())
WRAPPERS = tuple(wrappers())
#: Where a norm stands between the writer and the stream, no edit of weights equals the site `writers`.
NORM_BEHIND_WRITER = ("gemma2", "gemma3", "olmo2", "glm4")


def tiny(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """A tiny random model of architecture `name`, in evaluation mode."""
    torch.manual_seed(seed)
    config = configs().get(name) or wrappers()[name]
    attention = attention_implementation(config) or (None if name == "gpt_oss" else "sdpa")
    model = auto_class(name, config, whole=True).from_config(config, attn_implementation=attention).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.ndim == 1 and "norm" in parameter_name and parameter_name.endswith("weight"):
                parameter.add_(0.1 * torch.randn_like(parameter))
            elif parameter.ndim == 1 or parameter_name.endswith("bias"):
                # biases start at zero, where a wrong treatment of them would not show
                parameter.copy_(0.1 * torch.randn_like(parameter))
            elif (
                name.startswith("llama4") and "experts" in parameter_name
            ):  # which transformers leaves as memory had it
                parameter.copy_(0.2 * torch.randn_like(parameter))
    return model if dtype == torch.float32 else model.to(dtype)


def direction(
    model: Any,
    *,
    k: int = 1,
    seed: int = 1,
    shared: bool = False,
    embedding: bool = False,
    sites: tuple[Site, ...] = ("resid_post",),
    mode: Mode = "ablate",
    strength: float = 1.0,
    plane: bool = False,
) -> Direction:
    """A random direction for `model`; `shared` gives every layer (and the embedding) the same rows, `plane` an axis."""
    config = model.config.get_text_config()
    layers, d_model = config.num_hidden_layers, config.hidden_size
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    rows = random(layers + 1, d_model, k + plane)
    if shared:
        rows[:] = rows[0]
    rows, axis = torch.linalg.qr(rows)[0].transpose(1, 2).float().contiguous().split([k, int(plane)], dim=1)
    return Direction(
        DirectionMeta(
            schema_version=2 if plane else 1,
            modes=MODES if plane else MODES[: -len(TURNING)],
            method="random",
            model="tiny",
            architecture=text_architecture(config.model_type, type(model).__name__),
            d_model=d_model,
            layers=layers,
            sites=sites,
            mode=mode,
            strength=strength,
        ),
        directions=rows[1:].contiguous(),
        weights=torch.ones(layers),
        reference=0.1 * random(layers, k).float(),
        mean_harmful=random(layers, d_model).float(),
        mean_harmless=random(layers, d_model).float(),
        mean_harmless_all=random(layers, d_model).float(),
        embedding=rows[0].contiguous() if embedding else None,
        axis=axis[1:, 0].contiguous() if plane else None,
        angles=torch.tensor([0.2, -0.1]).repeat(layers, 1) if plane else None,
    )


#: Weights of attention and of the MLP by layer, for directions that weigh them apart.
APART = torch.tensor([0.0, 1.0, 0.5]), torch.tensor([1.0, 0.25, 0.0])


def apart(model: Any, **more: Any) -> Direction:
    """A direction at `writers` that weighs attention and MLP apart, and leaves the embedding alone."""
    given: dict[str, Any] = {"shared": True, "sites": ("writers",)} | more
    made = direction(model, **given)
    return replace(made, weights=APART[0].clone(), mlp_weights=APART[1].clone())


def leaning(direction: Direction, other: Direction, cosine: float) -> Direction:
    """`direction`, of one row, turned so that at every layer its cosine to `other` is `cosine`."""
    assert direction.rank == other.rank == 1

    def turned(v: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        v, u = v.double(), u.double()
        across = torch.nn.functional.normalize(v - (v * u).sum(-1, keepdim=True) * u, dim=-1)
        return (cosine * u + (1 - cosine**2) ** 0.5 * across).float()

    embedding = direction.embedding
    if embedding is not None and other.embedding is not None:
        embedding = turned(embedding, other.embedding)
    return replace(direction, directions=turned(direction.directions, other.directions), embedding=embedding)


def tokenizer(vocabulary: int = VOCABULARY) -> Any:
    """A byte-level tokenizer whose ids fit the tiny models, with a BOS that both it and its chat template add."""
    from tokenizers import Tokenizer, decoders, processors
    from tokenizers import models as token_models

    specials = ["<pad>", "<bos>", "<eos>"]
    letters = [chr(i) for i in range(32, 127)]
    vocab = {token: i for i, token in enumerate([*specials, *letters, "\n"])}
    assert len(vocab) <= vocabulary
    raw = Tokenizer(token_models.BPE(vocab=vocab, merges=[], unk_token="<pad>"))
    raw.decoder = decoders.Fuse()
    raw.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    made = tf.PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")
    made.chat_template = (
        "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    return made


def placement(rows: int = 8, rank: int = 4, sites: Sequence[Site] = ("resid_post",)) -> LocalPlacement:
    """A bank of its own for directions of a tiny Llama."""
    points = [HookPoint(site, layer) for site in sites for layer in range(LAYERS)]
    bank = DirectionBank(points, rows=rows, rank=rank, d_model=D_MODEL)
    return LocalPlacement(Shape("LlamaForCausalLM", LAYERS, D_MODEL, bank.sites, rank), bank)


def logits(model: Any) -> torch.Tensor:
    """Of the prompts IDS, float32."""
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS, use_cache=False).logits.float()
    return found


def relative(x: torch.Tensor, y: torch.Tensor) -> float:
    """How far x is from y, beside what is largest in y."""
    return float((x - y).abs().max() / y.abs().max())


def save(name: str, folder: Any, dtype: torch.dtype = torch.float32) -> Any:
    """A tiny model with its tokenizer as a local folder; returns the model."""
    model = tiny(name, dtype)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return model


def save_gguf(model: Any, path: Any, *, begins: bool = False, turn_end: int | None = None) -> None:
    """A tiny Llama with its tokenizer as one GGUF file. begins: does each text begin with BOS? turn_end: the token that
    ends a turn of a chat."""
    import gguf

    config, made = model.config, tokenizer()
    vocabulary = sorted(made.get_vocab(), key=made.get_vocab().get)
    vocabulary += [f"<unused{i}>" for i in range(config.vocab_size - len(vocabulary) - 1)] + ["ab"]
    file = gguf.GGUFWriter(path, "llama")
    file.add_context_length(config.max_position_embeddings)
    file.add_embedding_length(config.hidden_size)
    file.add_block_count(config.num_hidden_layers)
    file.add_feed_forward_length(config.intermediate_size)
    file.add_head_count(config.num_attention_heads)
    file.add_head_count_kv(config.num_key_value_heads)
    file.add_layer_norm_rms_eps(config.rms_norm_eps)
    file.add_rope_freq_base(10000.0)
    file.add_vocab_size(config.vocab_size)
    file.add_key_length(config.head_dim)
    file.add_tokenizer_model("gpt2")
    file.add_token_list(vocabulary)
    file.add_token_types([3] * 3 + [1] * (len(vocabulary) - 3))
    file.add_token_merges(["a b"])
    file.add_bos_token_id(1)
    file.add_eos_token_id(2)
    file.add_add_bos_token(begins)
    if turn_end is not None:
        file.add_eot_token_id(turn_end)
    file.add_pad_token_id(0)
    file.add_chat_template(made.chat_template)
    whole = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    parts = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    for name, tensor in model.state_dict().items():
        module = name.removesuffix(".weight")
        if module in whole:
            file.add_tensor(f"{whole[module]}.weight", tensor.numpy())
            continue
        layer, part = module.removeprefix("model.layers.").split(".", 1)
        if part in ("self_attn.q_proj", "self_attn.k_proj"):  # the halves of a head are interleaved there
            tensor = tensor.unflatten(0, (-1, 2, config.head_dim // 2)).transpose(1, 2).flatten(0, 2)
        file.add_tensor(f"blk.{layer}.{parts[part]}.weight", tensor.contiguous().numpy())
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
