"""What steering must equal: a copy of the model whose weights were edited, or a plain forward pass with named hooks.

Nothing here looks at how the runtime finds its sites: weights and modules are named for each architecture.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from steer.runtime.op import displacement
from tests.models import NORM_BEHIND_WRITER

ABLATE = torch.tensor([0.0, -torch.inf, 1.0, 0.0])

#: Parameters that write to the stream: name endings, by the dimension that is the stream's.
FIRST = (
    "self_attn.o_proj.weight",
    "mlp.down_proj.weight",
    "attention.dense.weight",
    "mlp.dense_4h_to_h.weight",
    "linear_attn.out_proj.weight",
)
LAST = ("attn.c_proj.weight", "mlp.c_proj.weight", "embed_tokens.weight", "wte.weight", "wpe.weight", "embed_in.weight")
BIASES = ("o_proj.bias", "down_proj.bias", "attention.dense.bias", "dense_4h_to_h.bias", "c_proj.bias")
#: `[experts, stream, hidden]`
EXPERTS = ("experts.down_proj",)


def ablated(x: Tensor, v: Tensor, strength: float = 1.0) -> Tensor:
    """x − λ⟨x, v⟩v over the last dimension."""
    return x + displacement(x, v.to(x.dtype), ABLATE.to(x.dtype), strength)


def orthogonalised(model: Any, v: Tensor, strength: float = 1.0) -> Any:
    """A copy whose every writer, bias and input embedding is orthogonal to `v`; the unembedding stays as it was."""
    edited = copy.deepcopy(model)
    output = edited.get_output_embeddings()
    if output.weight is edited.get_input_embeddings().weight:
        output.weight = torch.nn.Parameter(output.weight.detach().clone())
        edited.config.tie_word_embeddings = False
    touched = 0
    with torch.no_grad():
        for name, parameter in edited.named_parameters():
            if "vis" in name:  # a tower that sees
                continue
            w = parameter.data.float()
            if name.endswith(FIRST):
                new = ablated(w.T, v, strength).T
            elif name.endswith(LAST + BIASES):
                new = ablated(w, v, strength)
            elif name.endswith(EXPERTS):
                new = ablated(w.transpose(1, 2), v, strength).transpose(1, 2)
            else:
                continue
            parameter.copy_(new)
            touched += 1
    assert touched >= 2 * model.config.get_text_config().num_hidden_layers + 1, f"only {touched} writers were found"
    return edited


def reference_logits(model: Any, name: str, v: Tensor, ids: Tensor, strength: float = 1.0) -> Tensor:
    """Logits of a plain forward pass in which each written term is projected, for models with a norm behind the writer:
    the modules are named here, and block 0's input stands for the embedding."""
    assert name in NORM_BEHIND_WRITER
    handles = []
    decoder = model.get_decoder()
    for block in decoder.layers:
        for norm in (block.post_attention_layernorm, block.post_feedforward_layernorm):
            handles.append(norm.register_forward_hook(lambda _m, _a, out: ablated(out, v, strength)))
    handles.append(
        decoder.layers[0].register_forward_pre_hook(lambda _m, args: (ablated(args[0], v, strength), *args[1:]))
    )
    with torch.no_grad():
        logits: Tensor = model(input_ids=ids, use_cache=False).logits
    for handle in handles:
        handle.remove()
    return logits
