"""The same edit as `steer.lab.bake` as a LoRA adapter in PEFT's format: ΔW = −λ·w·Vᵀ(V·W), of rank k.

Source of the identity: (W − λ·v·vᵀW) = W + (−λ·v)(vᵀW), a product of a column and a row. An adapter cannot reach
biases, and not experts whose weights are one tensor: there it is refused.
"""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

from steer.direction import check_fits, write_file
from steer.errors import InvalidInput, UnsupportedModel
from steer.hf.load import skeleton
from steer.lab.bake import Removal
from steer.lab.weights import Checkpoint, Writer, find
from steer.runtime.op import WEIGHT

PREFIX = "base_model.model."
#: A bias has a component where more than this share of it lies along the direction; float32's rounding is below.
BIAS_SHARE = 1e-6


def export(checkpoint: Checkpoint, removal: Removal, output: Path, *, base: str, progress: bool = False) -> int:
    """Write the adapter to the folder `output`; how many modules it adapts. Raises UnsupportedModel with every writer
    that an adapter cannot reach."""
    check_fits(
        removal.direction,
        d_model=checkpoint.d_model,
        layers=checkpoint.layers,
        architecture=checkpoint.architecture,
    )
    kinds = skeleton(checkpoint.folder).kinds
    writers = [writer for writer in find(checkpoint, kinds) if removal.at(writer.layer) is not None]
    problems = [f"{w.name}: is no module of its own in transformers" for w in writers if w.module not in kinds]
    for name, bias in checkpoint.tensors(w.name for w in writers if w.bias):
        writer = next(w for w in writers if w.name == name)
        rows, _ = removal.at(writer.layer) or (bias, None)
        if float((rows @ bias.float()).abs().max()) > BIAS_SHARE * float(bias.float().norm()):
            problems.append(f"{name}: is a bias with a component along the direction")
    if problems:
        raise UnsupportedModel(
            f"{len(problems)} writers of {checkpoint.architecture} are out of an adapter's reach, so it would not "
            f"remove the direction; bake the model instead. {'; '.join(problems[:4])}"
        )
    if output.exists():
        raise InvalidInput(f"{output} exists already; an adapter is written to a new folder")
    weights = {writer.name: writer for writer in writers if not writer.bias}
    tensors: dict[str, Tensor] = {}
    for name, tensor in tqdm(
        checkpoint.tensors(weights),
        desc="adapter",
        total=len(weights),
        unit="tensor",
        disable=not progress,
        leave=False,
    ):
        tensors |= factors(weights[name], tensor, removal, kinds[weights[name].module] == "Embedding")
    rank = removal.direction.rank
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": any(kinds[w.module] == "Conv1D" for w in weights.values()),
        "target_modules": sorted(w.module for w in weights.values()),
    }
    output.mkdir(parents=True)
    write_file(output / "adapter_model.safetensors", save(tensors, {"format": "pt"}))
    write_file(output / "adapter_config.json", (json.dumps(config, indent=2) + "\n").encode())
    return len(weights)


def factors(writer: Writer, tensor: Tensor, removal: Removal, embedding: bool) -> dict[str, Tensor]:
    """PEFT's tensors for one module, float32: A `[k, inputs]` and B `[d_model, k]`, alpha = r so that ΔW = B·A."""
    found = removal.at(writer.layer)
    assert found is not None
    rows, coefficients = found
    a = rows @ writer.written(tensor.float()).T
    b = -(removal.strength * coefficients[:, WEIGHT]) * rows.T
    kind = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A.weight", "lora_B.weight")
    return {f"{PREFIX}{writer.module}.{name}": value.contiguous() for name, value in zip(kind, (a, b), strict=True)}
