"""Merge a direction into an ordinary model, by orthogonalising the weights of its writers shard by shard, or into a
LoRA adapter.

The adapter is in PEFT's format: W − λ·v·(vᵀW) is W + B·A with A = vᵀW and B = −λ·v. `steer.lab.merge.removal` explains
what is removed, and how the result compares with what is served.
"""

from __future__ import annotations

import itertools
import json
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from inspect import signature
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from steer._version import TOOL
from steer.errors import InvalidInput, UnsupportedModel
from steer.hf.streamed import Change
from steer.lab.measurement import save_tensors
from steer.lab.merge.removal import Removal, RemovalPlan, Verdict, plan, verify
from steer.lab.merge.weights import INDEX, Checkpoint, Writer
from steer.lab.progress import Progress
from steer.lab.resume import Alone
from steer.runtime.bank import EMBEDDING
from steer.runtime.op import WEIGHT

log = logging.getLogger("steer")
RECEIPT = "steer_bake.json"
#: The name of the part of the progress in which files are written.
MERGING = "merging"
#: Files that are not copied to the new weights: the old weights in other formats, and the card of the old model.
_NOT_COPIED = (
    *("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf", "*.onnx", "*.h5", "*.msgpack", INDEX),
    *("README.md", ".*"),
)


def bake(
    checkpoint: Checkpoint,
    removal: Removal,
    output: Path,
    *,
    digest: str,
    preserve_norms: bool = False,
    verified: bool = True,
    progress: Progress | None = None,
) -> tuple[int, Verdict | None]:
    """Write the edited model to the new folder `output`. One shard, or one block, is in memory at a time.

    If something is removed from an embedding that is tied, the embedding is untied, because the unembedding must not
    change.

    Args:
        digest: of the direction, for the receipt.
        preserve_norms: whether the vectors that are written keep their lengths, see `RemovalPlan.edited`.
        verified: whether the edited model is verified. If the verification fails, `output` is not made.

    Returns:
        How many tensors were changed, and what the verification found; None without a verification.
    """
    progress = progress or Progress()
    with new_folder(output) as folder:
        planned = plan(checkpoint, removal, progress)
        count = _write(planned, folder, preserve_norms, progress)
        receipt = {
            "direction": digest,
            "meta": removal.direction.meta.model_dump(mode="json"),
            "strength": removal.strength,
            "preserve_norms": preserve_norms,
            "edited": sorted(writer.name for writer in planned.writers),
            "norms_behind_writers": planned.normed,
            "verified": verified,
            "tool": TOOL,
        }
        _write_json(folder / RECEIPT, receipt)
        verdict = None
        if verified:
            made = Checkpoint(folder, trust_remote_code=checkpoint.trust_remote_code)
            verdict = verify(planned, made, progress, preserve_norms=preserve_norms)
    return count, verdict


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """Yield a folder to write to. It becomes `output` at the end of the `with` block, and is removed after an error.
    Raises InvalidInput if `output` exists already, or if another run is writing it."""
    if output.exists():
        raise InvalidInput(f"{output} exists already; give a folder that does not exist")
    temporary = output.with_name(f".{output.name}.tmp")
    temporary.mkdir(parents=True, exist_ok=True)
    with Alone(temporary) as alone:
        try:
            for left in temporary.iterdir():  # left by a run that was killed
                if left.name != alone.file:
                    shutil.rmtree(left) if left.is_dir() else left.unlink()
            yield temporary
            (temporary / alone.file).unlink()
            temporary.rename(output)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def _write(planned: RemovalPlan, output: Path, preserve_norms: bool, progress: Progress) -> int:
    checkpoint, streamed = planned.checkpoint, planned.streamed
    writers = {writer.name: writer for writer in planned.writers}
    untied = None if planned.removal.at(EMBEDDING) is None else streamed.tied
    ignored = shutil.ignore_patterns(*_NOT_COPIED)
    try:
        shutil.copytree(checkpoint.folder, output, ignore=ignored, dirs_exist_ok=True)
    except shutil.Error as error:  # it has a list of all files that could not be copied
        _, target, reason = error.args[0][0]
        raise OSError(f"{target}: {reason.partition(': ')[0]}") from error
    weight_map: dict[str, str] = {}
    count = size = 0
    progress.plan(MERGING, len(checkpoint.map))
    with progress.part(MERGING):
        for file, shard in itertools.groupby(checkpoint.tensors(checkpoint.map), lambda pair: checkpoint.map[pair[0]]):
            new: dict[str, Tensor] = {}
            for name, tensor in shard:
                new[name] = tensor
                if name in writers:
                    if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
                        raise UnsupportedModel(
                            f"{name} is stored as {tensor.dtype}, only float32, bfloat16 and float16 can be edited"
                        )
                    if name == untied and streamed.head is not None:
                        new[streamed.head] = tensor.clone()
                    new[name] = planned.edited(writers[name], tensor, preserve_norms)
                    count += not torch.equal(new[name], tensor)
                progress.advance()
            save_tensors(output / file, new, {"format": "pt"})
            weight_map |= dict.fromkeys(new, file)
            size += sum(t.numel() * t.element_size() for t in new.values())
    if (checkpoint.folder / INDEX).exists():
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
        (output / INDEX).write_text(json.dumps(index, indent=2))
    # the files may have both embeddings although the config ties them, and engines differ in which one they then use
    config, text = checkpoint.config, checkpoint.config.get("text_config") or {}
    ties = config.get("tie_word_embeddings") or text.get("tie_word_embeddings")
    if untied is not None or (planned.removal.at(EMBEDDING) is not None and ties):
        loose = {"tie_word_embeddings": False}
        _write_json(output / "config.json", config | loose | ({"text_config": text | loose} if text else {}))
    return count


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


PREFIX = "base_model.model."
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
#: A bias has a component along the direction if the component is more than this share of its length; the rounding of
#: float32 is less.
BIAS_SHARE = 1e-6
#: What PEFT (0.21) refuses: the model types whose fast path reads the weights of some modules itself, and the names of
#: these modules.
NOT_BY_PEFT = {"falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h"}, {"out_proj", "conv1d"}
#: The names that embeddings have for their first argument, the rows that they are asked for.
IDS = ("input", "input_ids")


def export_adapter(
    checkpoint: Checkpoint,
    removal: Removal,
    output: Path,
    *,
    base: str,
    verified: bool = True,
    progress: Progress | None = None,
) -> tuple[int, Verdict | None]:
    """Write the adapter to the new folder `output`.

    Args:
        base: the model that the adapter is for, as its config names it.
        verified: whether the adapter is verified. If the verification fails, `output` is not made.

    Returns:
        How many modules the adapter changes, and what the verification found; None without a verification.

    Raises:
        UnsupportedModel: with the writers that an adapter cannot reach.
    """
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
        if (classes := planned.streamed.classes) is not None:
            log.warning(
                "the adapter fits %s, and not %s, as AutoModelForCausalLM loads it: there modules have other names",
                *classes,
            )
        save_tensors(folder / WEIGHTS, tensors, {"format": "pt"})
        rank = removal.direction.rank
        config = {
            "base_model_name_or_path": base,
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
        _write_json(folder / CONFIG, config)
        if verified:
            verdict = verify(planned, checkpoint, progress, _adapted(planned, folder))
    return len(weights), verdict


def _problems(planned: RemovalPlan, writers: list[Writer]) -> list[str]:
    problems = []
    kind = planned.streamed.model.config.model_type
    for writer in writers:
        module = planned.streamed.module_of(writer.parameter)
        if not writer.own or not (isinstance(module, nn.Linear | nn.Embedding) or type(module).__name__ == "Conv1D"):
            problems.append(f"{writer.name}: is no module of its own in transformers")
        elif kind in NOT_BY_PEFT[0] and writer.module.rpartition(".")[2] in NOT_BY_PEFT[1]:
            problems.append(f"{writer.name}: is no module that PEFT takes in {kind}")
        elif (
            isinstance(module, nn.Embedding) and (given := next(iter(signature(module.forward).parameters))) not in IDS
        ):
            problems.append(f"{writer.name}: is given {given} first, which PEFT takes for the rows of an embedding")
    for name, bias in planned.checkpoint.tensors(w.name for w in writers if w.bias):
        rows, _ = planned.at(next(w for w in writers if w.name == name)) or (bias, None)
        if float((bias.float() @ rows.T).abs().max()) > BIAS_SHARE * float(bias.float().norm()):
            problems.append(f"{name}: is a bias with a component along the direction")
    return problems


def _factors(planned: RemovalPlan, writer: Writer, tensor: Tensor, embedding: bool) -> dict[str, Tensor]:
    """PEFT's tensors for one module, float32: A `[k, inputs]` and B `[d_model, k]`. Since alpha = r, ΔW = B·A."""
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


def _adapted(planned: RemovalPlan, folder: Path) -> Change:
    """The change that the adapter in `folder` makes to parameters. The adapter is read as PEFT reads it: its alpha / r,
    its modules and its factors."""
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
