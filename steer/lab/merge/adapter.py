"""A direction as a LoRA adapter in PEFT's format: W − λ·v·(vᵀW) is W + B·A with A = vᵀW and B = −λ·v."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from steer.errors import UnsupportedModel
from steer.hf.streamed import Change
from steer.lab.merge.model import MERGING, Made, new_folder
from steer.lab.merge.removal import Plan, Removal, plan
from steer.lab.merge.verify import verify
from steer.lab.merge.weights import Checkpoint
from steer.lab.merge.writers import Writer
from steer.lab.progress import Progress
from steer.runtime.op import WEIGHT

PREFIX = "base_model.model."
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
#: A bias has a component where more than this share of it lies along the direction; float32's rounding is below.
BIAS_SHARE = 1e-6


def export(
    checkpoint: Checkpoint,
    removal: Removal,
    output: Path,
    *,
    base: str,
    verified: bool = True,
    progress: Progress | None = None,
) -> Made:
    """Write the adapter to the new folder `output`, which is there in the end only if it was `verified`, or that was
    not asked for. Raises UnsupportedModel with every writer that an adapter cannot reach."""
    progress = progress or Progress()
    verdict = None
    with new_folder(output) as folder:
        planned = plan(checkpoint, removal, progress)
        writers = [writer for writer in planned.writers if planned.at(writer) is not None]
        if problems := _problems(planned, writers):
            raise UnsupportedModel(
                f"{len(problems)} writers of {checkpoint.architecture} are out of an adapter's reach, so it would not "
                f"remove the direction; bake the model instead. {'; '.join(problems[:4])}"
            )
        weights = {writer.name: writer for writer in writers if not writer.bias}
        modules = {writer.module: planned.streamed.module_of(writer.parameter) for writer in weights.values()}
        tensors: dict[str, Tensor] = {}
        progress.plan(MERGING, len(weights))
        with progress.part(MERGING):
            for name, tensor in checkpoint.tensors(weights):
                writer = weights[name]
                tensors |= _factors(planned, writer, tensor, isinstance(modules[writer.module], nn.Embedding))
                progress.advance()
        save_file(tensors, folder / WEIGHTS, {"format": "pt"})
        config = {"base_model_name_or_path": base} | _config(removal.direction.rank, modules)
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        if verified:
            verdict = verify(planned, checkpoint, torch.float32, progress, _adapted(planned, folder))
    return Made(len(weights), verdict)


def _config(rank: int, modules: Mapping[str, nn.Module]) -> dict[str, object]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": any(type(module).__name__ == "Conv1D" for module in modules.values()),
        "target_modules": sorted(modules),
    }


def _problems(planned: Plan, writers: list[Writer]) -> list[str]:
    problems = []
    for writer in writers:
        module = planned.streamed.module_of(writer.parameter)
        if not writer.own or not (isinstance(module, nn.Linear | nn.Embedding) or type(module).__name__ == "Conv1D"):
            problems.append(f"{writer.name}: is no module of its own in transformers")
    for name, bias in planned.checkpoint.tensors(w.name for w in writers if w.bias):
        rows, _ = planned.at(next(w for w in writers if w.name == name)) or (bias, None)
        if float((bias.float() @ rows.T).abs().max()) > BIAS_SHARE * float(bias.float().norm()):
            problems.append(f"{name}: is a bias with a component along the direction")
    return problems


def _factors(planned: Plan, writer: Writer, tensor: Tensor, embedding: bool) -> dict[str, Tensor]:
    """PEFT's tensors for one module, float32: A `[k, inputs]` and B `[d_model, k]`, alpha = r so that ΔW = B·A."""
    found = planned.at(writer)
    assert found is not None
    rows, coefficients = found
    a = rows @ writer.written(tensor.float()).T
    b = -(planned.removal.strength * coefficients[:, WEIGHT]) * rows.T
    pairs = zip(_names(writer.module, embedding), (a, b), strict=True)
    return {name: value.contiguous() for name, value in pairs}


def _names(module: str, embedding: bool) -> tuple[str, str]:
    kinds = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A.weight", "lora_B.weight")
    return f"{PREFIX}{module}.{kinds[0]}", f"{PREFIX}{module}.{kinds[1]}"


def _adapted(planned: Plan, folder: Path) -> Change:
    """The parameters with the adapter in `folder`, read as PEFT reads it: its alpha / r, its modules, its factors."""
    config, tensors = json.loads((folder / CONFIG).read_text()), load_file(folder / WEIGHTS)
    scale = config["lora_alpha"] / config["r"]
    writers = {writer.parameter: writer for writer in planned.writers}

    def change(name: str, parameter: Tensor) -> Tensor:
        module = name.rpartition(".")[0]
        if not name.endswith(".weight") or module not in config["target_modules"]:
            return parameter
        embedding = isinstance(planned.streamed.module_of(name), nn.Embedding)
        a, b = (tensors[key] for key in _names(module, embedding))
        return parameter + writers[name].stored(scale * (b @ a).T)

    return change
