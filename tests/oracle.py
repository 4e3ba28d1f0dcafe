"""What steering must equal: a copy of the model whose weights were edited, or a plain forward pass with named hooks.

Nothing here looks at how the runtime finds its sites: weights and modules are named for each architecture.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from steer.runtime.op import amount, component
from steer.spec import PHASES, Spec
from steer.tokenization import Thinking
from tests.models import NORM_BEHIND_WRITER

ABLATE = torch.tensor([0.0, -torch.inf, 1.0, 0.0, -torch.inf, 0.0])

#: Parameters that write to the stream: name endings, by the dimension that is the stream's.
FIRST = (
    *("self_attn.o_proj.weight", "mlp.down_proj.weight", "attention.dense.weight", "mlp.dense_4h_to_h.weight"),
    *("self_attn.dense.weight", "mlp.fc2.weight"),
    *("feed_forward.down_proj.weight", "shared_expert.down_proj.weight", "linear_attn.out_proj.weight"),
)
LAST = ("attn.c_proj.weight", "mlp.c_proj.weight", "embed_tokens.weight", "wte.weight", "wpe.weight", "embed_in.weight")
BIASES = (
    "self_attn.dense.bias",
    "mlp.fc2.bias",
    "o_proj.bias",
    "down_proj.bias",
    "attention.dense.bias",
    "dense_4h_to_h.bias",
    "c_proj.bias",
)
#: `[experts, stream, hidden]`, or `[experts, hidden, stream]` in these models
EXPERTS, EXPERT_BIASES = ("experts.down_proj",), ("experts.down_proj_bias",)
TRANSPOSED = ("gpt_oss", "llama4_text")


def displacement(x: Tensor, v: Tensor, coefficients: Tensor, strength: Tensor | float) -> Tensor:
    """What one entry adds to `x`: as `op.amount`, with coefficients `[..., 6]`. Returns `[..., d_model]`."""
    return amount(component(x, v), coefficients.unbind(-1), strength).unsqueeze(-1) * v


def ablated(x: Tensor, v: Tensor, strength: float = 1.0) -> Tensor:
    """x − λ⟨x, v⟩v over the last dimension."""
    return x + displacement(x, v.to(x.dtype), ABLATE.to(x.dtype), strength)


def orthogonalised(model: Any, v: Tensor, strength: float = 1.0, weights: tuple[Tensor, Tensor] | None = None) -> Any:
    """A copy whose every writer, bias and input embedding is orthogonal to `v`; the unembedding stays as it was. With
    the `weights` of each layer's attention and of its MLP each writer by its own, and the embedding not at all."""
    edited = copy.deepcopy(model)
    output = edited.get_output_embeddings()
    if output.weight is edited.get_input_embeddings().weight:
        output.weight = torch.nn.Parameter(output.weight.detach().clone())
        edited.config.tie_word_embeddings = False
    touched, transposed = 0, model.config.model_type in TRANSPOSED
    with torch.no_grad():
        for name, parameter in edited.named_parameters():
            if "vis" in name:  # a tower that sees
                continue
            w, by = parameter.data.float(), strength
            if weights is not None:
                layer = next((int(part) for part in name.split(".") if part.isdigit()), None)
                own = weights["attn" not in name and "attention" not in name]
                by = 0.0 if layer is None else strength * float(own[layer])
            if name.endswith(FIRST):
                new = ablated(w.T, v, by).T
            elif name.endswith(LAST + BIASES + EXPERT_BIASES + (EXPERTS if transposed else ())):
                new = ablated(w, v, by)
            elif name.endswith(EXPERTS):
                new = ablated(w.transpose(1, 2), v, by).transpose(1, 2)
            else:
                continue
            parameter.copy_(new)
            touched += 1
    assert touched >= 2 * model.config.get_text_config().num_hidden_layers + 1, f"only {touched} writers were found"
    return edited


#: The norms behind attention and MLP.
NORMS = {
    "gemma2": ("post_attention_layernorm", "post_feedforward_layernorm"),
    "gemma3": ("post_attention_layernorm", "post_feedforward_layernorm"),
    "olmo2": ("post_attention_layernorm", "post_feedforward_layernorm"),
    "glm4": ("post_self_attn_layernorm", "post_mlp_layernorm"),
}


def reference_logits(
    model: Any, name: str, v: Tensor, ids: Tensor, strength: float = 1.0, *, before: bool = False
) -> Tensor:
    """Logits of a plain forward pass in which each written term is projected, for models with a norm behind the writer:
    the modules are named here, and block 0's input stands for the embedding. With `before` what enters the norms is
    projected, along their weights times `v`, in place of what leaves them."""
    assert name in NORM_BEHIND_WRITER

    def project(module: Any, along: Tensor) -> Any:
        def hook(_module: Any, _args: Any, out: Any) -> Any:
            changed = ablated(out[0] if isinstance(out, tuple) else out, along, strength)
            return (changed, *out[1:]) if isinstance(out, tuple) else changed

        return module.register_forward_hook(hook)

    handles = []
    decoder = model.get_decoder()
    for block in decoder.layers:
        for writer, norm in zip((block.self_attn, block.mlp), NORMS[name], strict=True):
            norm = getattr(block, norm)
            gain = norm.weight.detach() + (1.0 if name.startswith("gemma") else 0.0)
            along = torch.nn.functional.normalize(gain * v, dim=-1)
            handles.append(project(writer, along) if before else project(norm, v))
    handles.append(
        decoder.layers[0].register_forward_pre_hook(lambda _m, args: (ablated(args[0], v, strength), *args[1:]))
    )
    with torch.no_grad():
        logits: Tensor = model(input_ids=ids, use_cache=False).logits
    for handle in handles:
        handle.remove()
    return logits


def acting(
    spec: Spec, prompt: int, position: int, ids: Sequence[int] = (), thinking: Thinking = Thinking(-1, -1, frozenset())
) -> Spec:
    """The entries that act on the token at `position` of a request with `prompt` tokens, by the words of the docs.
    Phases need its `ids` up to there, and what `thinking` is."""

    def acts(tokens: str) -> bool:
        if tokens in PHASES:
            given, made = list(ids[:prompt]), list(ids[prompt : position + 1])
            turn = given[max((i + 1 for i, token in enumerate(given) if token in thinking.special), default=0) :]
            signs = [token for token in turn if token in (thinking.begin, thinking.end)][-1:]
            signs += [token for token in made if token in (thinking.begin, thinking.end)]
            after = thinking.end in signs
            return position >= prompt - 1 and (after if tokens == "after-thinking" else bool(signs) and not after)
        kind, _, number = tokens.partition("-")
        match kind:
            case "prompt":
                return position < prompt - 1
            case "answer":
                return position >= prompt - 1
            case "not":
                return position > 0
            case "first":
                return position < int(number) and position < prompt
            case "last":
                return prompt - int(number) <= position < prompt
        raise ValueError(tokens)

    return Spec(tuple(replace(e, tokens=None) for e in spec.entries if e.tokens is None or acts(e.tokens)))
