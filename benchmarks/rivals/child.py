"""`python child.py LIBRARY MODEL DIRECTION` in the environment of one library: runs the jobs that it reads, a JSON line
each, and answers with seconds and what was generated. It imports nothing of this repository, but for "steer".

Every library removes the same direction from the output of every block, in the way that its documentation shows.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

#: Greedy generation of (ids, new tokens) by the same loop for all libraries that leave the loop to transformers.
Generate = Callable[[torch.Tensor, int], torch.Tensor]


def by_transformers(model: Any) -> Generate:
    return lambda ids, tokens: model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        do_sample=False,
        pad_token_id=0,
    )


def transformers(model: Any, _rows: torch.Tensor) -> Generate:
    return by_transformers(model)


def steer(model: Any, _rows: torch.Tensor) -> Generate:
    import steer as package

    attached = package.attach(model, {"d": sys.argv[3]})
    plain = by_transformers(model)

    def run(ids: torch.Tensor, tokens: int) -> torch.Tensor:
        with attached, attached("d"):
            return plain(ids, tokens)

    return run


def steering_vectors(model: Any, rows: torch.Tensor) -> Generate:
    from steering_vectors import SteeringVector, ablation_operator

    vector = SteeringVector(dict(enumerate(rows)))
    plain = by_transformers(model)

    def run(ids: torch.Tensor, tokens: int) -> torch.Tensor:
        with vector.apply(model, operator=ablation_operator()):
            return plain(ids, tokens)

    return run


def repeng(model: Any, rows: torch.Tensor) -> Generate:
    from repeng import ControlModel

    wrapped = ControlModel(model, range(len(rows)))

    def removed(current: torch.Tensor, control: torch.Tensor) -> torch.Tensor:
        return current - (current * control).sum(-1, keepdim=True) * control

    wrapped.set_raw_control(dict(enumerate(rows)), operator=removed)
    return by_transformers(wrapped)


def nnsight(model: Any, rows: torch.Tensor) -> Generate:
    from nnsight import TransformersModel

    traced = TransformersModel(model, tokenizer=AutoTokenizer.from_pretrained(sys.argv[2]))
    options = dict(do_sample=False, pad_token_id=0)

    def run(ids: torch.Tensor, tokens: int) -> torch.Tensor:
        with traced.generate(ids, max_new_tokens=tokens, min_new_tokens=tokens, **options) as tracer:
            for _ in tracer.iter[:tokens]:
                for layer, row in zip(traced.model.layers, rows, strict=True):
                    x = layer.output
                    layer.output = x - (x @ row).unsqueeze(-1) * row
            result = tracer.result.save()
        return torch.as_tensor(result)

    return run


def transformer_lens(model: Any, rows: torch.Tensor) -> Generate:
    """Its own loop and its own attention (eager), in which its hooks run."""
    from transformer_lens.model_bridge import TransformerBridge

    bridge = TransformerBridge.boot_transformers(
        sys.argv[2], hf_model=model, tokenizer=AutoTokenizer.from_pretrained(sys.argv[2]), device="cpu"
    )

    def hook(row: torch.Tensor) -> Callable[..., torch.Tensor]:
        return lambda x, hook: x - (x @ row).unsqueeze(-1) * row

    hooks = [(f"blocks.{i}.hook_out", hook(row)) for i, row in enumerate(rows)]

    def run(ids: torch.Tensor, tokens: int) -> torch.Tensor:
        with bridge.hooks(fwd_hooks=hooks):
            return bridge.generate(
                ids, max_new_tokens=tokens, do_sample=False, stop_at_eos=False, verbose=False, return_type="tokens"
            )

    return run


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes to the log
    torch.set_num_threads(int(os.environ.get("THREADS", torch.get_num_threads())))
    library, folder, directions = sys.argv[1:4]
    eager = {"attn_implementation": "eager"} if library == "transformer_lens" else {}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **eager).eval()
    rows = load_file(directions)["directions"][:, 0]
    generate = globals()[library](model, rows)
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        ids = torch.tensor(job["ids"])
        with torch.inference_mode() if library != "nnsight" else contextlib.nullcontext():
            began = time.perf_counter()
            out = generate(ids, job["tokens"])
            seconds = time.perf_counter() - began
        print(json.dumps({"seconds": seconds, "ids": out[:, ids.shape[1] :].tolist()}), file=answers, flush=True)


if __name__ == "__main__":
    main()
