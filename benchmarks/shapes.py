"""The models that benchmarks run: random Llamas, of a 0.5 B model's shape as deep as is asked for, and a small one."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

WIDTH = 896
SMALL_LAYERS, SMALL_WIDTH = 12, 512


def llama(layers: int, vocabulary: int, **more: Any) -> Any:
    """float32, on the CPU; the same weights each time. `more` goes into its configuration."""
    return _random(
        vocab_size=vocabulary,
        hidden_size=WIDTH,
        intermediate_size=4864,
        num_hidden_layers=layers,
        num_attention_heads=14,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        **more,
    )


def small(vocabulary: int, **more: Any) -> Any:
    """12 layers × 512, where what is done beside the model shows more than in a large one."""
    return _random(
        vocab_size=vocabulary,
        hidden_size=SMALL_WIDTH,
        intermediate_size=4 * SMALL_WIDTH,
        num_hidden_layers=SMALL_LAYERS,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        **more,
    )


def _random(**shape: Any) -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**shape)).eval()
