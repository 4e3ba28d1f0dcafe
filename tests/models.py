"""Tiny random models of every architecture that Steer promises, made on the fly, and directions for them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import transformers as tf

from steer.direction import Direction, DirectionMeta
from steer.hf.load import attention_implementation
from steer.names import Mode, Site

D_MODEL, LAYERS, VOCABULARY = 64, 3, 128

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


ARCHITECTURES = tuple(configs())
#: Where a norm stands between the writer and the stream, no edit of weights equals the site `writers`.
NORM_BEHIND_WRITER = ("gemma2", "gemma3", "olmo2", "glm4")


def tiny(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """A tiny random model of architecture `name`, in evaluation mode."""
    torch.manual_seed(seed)
    config = configs()[name]
    model = tf.AutoModelForCausalLM.from_config(
        config, attn_implementation=attention_implementation(config) or (None if name == "gpt_oss" else "sdpa")
    ).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.ndim == 1 and "norm" in parameter_name and parameter_name.endswith("weight"):
                parameter.add_(0.1 * torch.randn_like(parameter))
            elif parameter.ndim == 1 or parameter_name.endswith("bias"):
                # biases start at zero, where a wrong treatment of them would not show
                parameter.copy_(0.1 * torch.randn_like(parameter))
            elif name == "llama4" and "experts" in parameter_name:  # which transformers leaves as memory had it
                parameter.copy_(0.2 * torch.randn_like(parameter))
    return model.to(dtype)


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
) -> Direction:
    """A random direction for `model`; `shared` gives every layer (and the embedding) the same rows."""
    config = model.config.get_text_config()
    layers, d_model = config.num_hidden_layers, config.hidden_size
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    rows = random(layers + 1, d_model, k)
    if shared:
        rows[:] = rows[0]
    rows = torch.linalg.qr(rows)[0].transpose(1, 2).float().contiguous()
    return Direction(
        DirectionMeta(
            method="random",
            model="tiny",
            architecture=type(model).__name__,
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
        embedding=rows[0] if embedding else None,
    )


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


def save(name: str, folder: Any, dtype: torch.dtype = torch.float32) -> Any:
    """A tiny model with its tokenizer as a local folder; returns the model."""
    model = tiny(name, dtype)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return model
