"""The model that benchmarks run: a random Llama of the shape of a 0.5 B one, as deep as is asked for."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

WIDTH = 896


def llama(layers: int, vocabulary: int, **more: Any) -> Any:
    """float32, on the CPU; the same weights each time. `more` goes into its configuration."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=WIDTH,
        intermediate_size=4864,
        num_hidden_layers=layers,
        num_attention_heads=14,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        **more,
    )
    return LlamaForCausalLM(config)
