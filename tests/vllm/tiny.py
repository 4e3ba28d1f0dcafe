"""The tiny models of `tests.models`, wide enough for vLLM's attention on a CPU (heads of 32 and more)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers as tf

from tests import models

D_MODEL, HEADS = 128, 4


def make(name: str, folder: Path) -> Any:
    """A tiny random model of architecture `name` with tokenizer, saved in `folder`; returns the model."""
    config = configs()[name]
    original = models.configs
    models.configs = lambda: {name: config}
    try:
        return models.save(name, folder)
    finally:
        models.configs = original


def configs() -> dict[str, Any]:
    """Configurations of `tests.models` with wider heads, and Cohere 2."""
    found = models.configs() | models.wrappers()
    found["cohere2"] = tf.Cohere2Config(
        vocab_size=models.VOCABULARY,
        intermediate_size=96,
        num_hidden_layers=models.LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=2,
        max_position_embeddings=512,
        sliding_window=64,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        initializer_range=0.2,
    )
    for whole in found.values():
        config = whole.get_text_config()
        width = "n_embd" if hasattr(config, "n_embd") else "hidden_size"
        setattr(config, width, D_MODEL)
        if getattr(config, "head_dim", None) is not None:
            config.head_dim = D_MODEL // HEADS
        if hasattr(config, "query_pre_attn_scalar"):
            config.query_pre_attn_scalar = D_MODEL // HEADS
        vision: Any = getattr(whole, "vision_config", None)
        if hasattr(vision, "out_hidden_size"):
            vision.out_hidden_size = D_MODEL
        if "mrope_section" in (getattr(config, "rope_parameters", None) or {}):
            config.rope_parameters["mrope_section"] = [8, 4, 4]
    return found
