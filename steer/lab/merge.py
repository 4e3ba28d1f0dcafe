"""Bake a direction into an ordinary model: its writers' weights orthogonalised, shard by shard, for any server.

The result equals the original served with the direction at the site `writers`: (W − λ·v·vᵀW)x = Wx − λ·v·(vᵀWx). A
direction for `resid_post` is baked where one vector serves all layers, the embedding included.
"""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import save, save_file
from torch import Tensor

from steer._version import __version__
from steer.direction import Direction, check_fits, write_file
from steer.errors import InvalidInput, UnsupportedModel
from steer.hf.load import Skeleton, skeleton
from steer.lab.progress import Progress
from steer.lab.weights import INDEX, Checkpoint, Writer, find, text_names
from steer.runtime.bank import EMBEDDING
from steer.runtime.op import WEIGHT, coefficients, displacements, embedding_coefficients

log = logging.getLogger("steer")
RECEIPT = "steer_bake.json"
#: The parts of a command's progress.
MERGING, VERIFYING = "merging", "verifying"
#: Not copied beside new weights: other formats of the old ones, and a card that speaks of the old model.
_NOT_COPIED = (
    *("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf", "*.onnx", "*.h5", "*.msgpack", INDEX),
    *("README.md", ".*"),
)
#: Token embeddings that a model may use as its unembedding.
_TIED = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")
#: What may differ from the runtime in the logits, and be left of a component, relative; by the stored dtype. In 16 bits
#: it is the rounding of the stored weights.
TOLERANCE = {torch.float32: (1e-3, 1e-5)}
TOLERANCE_16 = (5e-2, 2e-3)


@dataclass(frozen=True, slots=True)
class Removal:
    """What is removed from what each layer writes: rows `[k, d_model]` and coefficients `[k, 4]` of the operation."""

    direction: Direction
    strength: float

    def at(self, layer: int) -> tuple[Tensor, Tensor] | None:
        """None where nothing is."""
        direction = self.direction
        if layer == EMBEDDING:
            if direction.embedding is None:
                return None
            return direction.embedding, embedding_coefficients(direction, "ablate")
        rows = direction.directions[layer]
        return (rows, coefficients(direction, "ablate")[layer]) if rows.any() else None

    def full(self, layer: int) -> bool:
        """Is the whole component removed there?"""
        found = self.at(layer)
        return found is not None and bool(((found[1][:, WEIGHT] * self.strength - 1).abs() < 1e-6).all())


def removal(direction: Direction, strength: float | None = None) -> Removal:
    """`direction` at the site `writers`. Raises InvalidInput where no edit of weights has its effect."""
    meta = direction.meta
    if "writers" not in meta.sites:
        first = direction.directions[0]
        shared = torch.equal(direction.directions, first.expand_as(direction.directions))
        if not (shared and bool((direction.weights == 1).all())):
            raise InvalidInput(
                "each layer removes its own direction from the whole stream (site 'resid_post'), and no edit of "
                "weights equals that; derive it with --sites writers, or with one source layer"
            )
        direction = replace(direction.with_meta(sites=("writers",), mode="ablate"), embedding=first.clone())
    return Removal(direction, meta.strength if strength is None else strength)


def edited(writer: Writer, tensor: Tensor, removal: Removal, preserve_norms: bool = False) -> Tensor:
    """`tensor` after the removal, in its own dtype; arithmetic in float32. With `preserve_norms` each vector that it
    writes keeps its length, so that only its direction changes (and stays orthogonal)."""
    found = removal.at(writer.layer)
    if found is None:
        return tensor
    x = writer.written(tensor.float())
    rows, coefficients_ = found
    y = x + displacements(x, rows, coefficients_, [removal.strength] * len(rows))
    if preserve_norms:
        before, after = (torch.linalg.vector_norm(t, dim=-1, keepdim=True) for t in (x, y))
        y = torch.where(after > 0, y * (before / after.clamp_min(torch.finfo(after.dtype).tiny)), y)
    return writer.written(y).to(tensor.dtype).contiguous()


def bake(
    checkpoint: Checkpoint,
    removal: Removal,
    output: Path,
    *,
    digest: str,
    preserve_norms: bool = False,
    progress: Progress | None = None,
) -> int:
    """Write the edited model to the new folder `output`; how many tensors were edited. One shard is in memory at a
    time. Tied embeddings are untied, since the unembedding must not change."""
    check_fits(
        removal.direction,
        d_model=checkpoint.d_model,
        layers=checkpoint.layers,
        architecture=checkpoint.architecture,
    )
    shape = skeleton(checkpoint.folder, trust_remote_code=checkpoint.trust_remote_code)
    writers = {writer.name: writer for writer in find(checkpoint, shape)}
    untied = _untied(checkpoint, shape)
    if output.exists():
        raise InvalidInput(f"{output} exists already; a baked model is written to a new folder")
    temporary, progress = output.with_name(f".{output.name}.tmp"), progress or Progress()
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        count = _write(checkpoint, removal, temporary, writers, untied, shape.head, preserve_norms, progress)
        receipt = {
            "direction": digest,
            "meta": removal.direction.meta.model_dump(mode="json"),
            "strength": removal.strength,
            "preserve_norms": preserve_norms,
            "edited": sorted(writers),
            "tool": f"steer {__version__}",
        }
        _write_json(temporary / RECEIPT, receipt)
        temporary.rename(output)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return count


def _write(
    checkpoint: Checkpoint,
    removal: Removal,
    output: Path,
    writers: dict[str, Writer],
    untied: str | None,
    head: str | None,
    preserve_norms: bool,
    progress: Progress | None,
) -> int:
    progress = progress or Progress()
    shutil.copytree(checkpoint.folder, output, ignore=shutil.ignore_patterns(*_NOT_COPIED))
    weight_map: dict[str, str] = {}
    count = size = 0
    progress.plan(MERGING, len(checkpoint.map))
    with progress.part(MERGING):
        for file, names in checkpoint.shards():
            new: dict[str, Tensor] = {}
            for name, tensor in checkpoint.tensors(names):
                new[name] = tensor
                if name in writers:
                    _check_dtype(name, tensor)
                    if name == untied and head is not None:
                        new[f"{head}.weight"] = tensor
                    new[name] = edited(writers[name], tensor, removal, preserve_norms)
                    count += not torch.equal(new[name], tensor)
                progress.advance()
            save_file(new, output / file, {"format": "pt"})
            weight_map |= dict.fromkeys(new, file)
            size += sum(t.numel() * t.element_size() for t in new.values())
    if (checkpoint.folder / INDEX).exists():
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
        (output / INDEX).write_text(json.dumps(index, indent=2))
    if untied is not None:
        _write_json(output / "config.json", _without_tie(checkpoint.config))
    return count


@dataclass(frozen=True, slots=True)
class Verdict:
    """How far the baked model is from the original served with the direction at `writers`, largest logit difference
    relative to the largest logit (None where lengths were preserved, which the runtime does not do), and the largest
    share of the stream that is left along a removed direction (None where none was to be removed whole)."""

    logits: float | None
    left: float | None


def verify(original: str, revision: str | None, baked: Path, removal: Removal, preserve_norms: bool = False) -> Verdict:
    """Prove the baked model by effect, both in float32, one after the other. Raises UnsupportedModel where it is not
    what the runtime computes: then some writer was missed."""
    from steer.hf.load import load
    from steer.hf.steering import Anatomy, Steering
    from steer.runtime.hook_points import hooks, on_input, on_output
    from steer.spec import Entry, Spec

    anatomy = Anatomy(load(str(baked), dtype="float32", device="cpu").model)
    files = Checkpoint(baked)
    dtype = next(tensor.dtype for _, tensor in files.tensors([next(iter(files.map))]))
    limit_logits, limit_left = TOLERANCE.get(dtype, TOLERANCE_16)
    left: dict[int, float] = {}

    def watch(layer: int, x: Tensor) -> None:
        rows, _ = removal.at(layer) or (None, None)
        if rows is not None and removal.full(layer) and _same_up_to(removal, layer):
            flat = x.reshape(-1, x.shape[-1]).float()
            share = (flat @ rows.T).abs() / torch.linalg.vector_norm(flat, dim=-1, keepdim=True)
            left[layer] = max(left.get(layer, 0.0), float(share.max()))

    places = [on_input(anatomy.blocks[0], lambda x: watch(EMBEDDING, x))]
    places += [on_output(b, lambda x, n=n: watch(n, x)) for n, b in enumerate(anatomy.blocks)]
    with hooks(places):
        got = anatomy.probe().logits.float()
    del anatomy
    error = None
    if not preserve_norms:
        model = load(original, revision=revision, dtype="float32", device="cpu").model
        rank = removal.direction.rank
        steering = Steering(model, sites=("writers",), rows=rank, rank=rank)
        steering.bank.load("baked", removal.direction)
        steering.attach()
        with steering.batch([Spec((Entry("baked", "baked", "ablate", removal.strength),))]):
            expected = steering.anatomy.probe().logits.float()
        error = float((got - expected).abs().max() / expected.abs().max())
    verdict = Verdict(error, max(left.values()) if left else None)
    if (error or 0.0) > limit_logits or (verdict.left or 0.0) > limit_left:
        raise UnsupportedModel(
            f"the baked model is not the original with the direction at its writers: logits differ by {error}, "
            f"{verdict.left} of the stream is left along it; some writer of this architecture is not known by its name"
        )
    return verdict


def room_to_verify(checkpoint: Checkpoint) -> bool:
    """Does the model fit in memory in float32?"""
    parameters = sum((checkpoint.folder / file).stat().st_size for file, _ in checkpoint.shards())
    return bool(3 * parameters < psutil.virtual_memory().available)


def _same_up_to(removal: Removal, layer: int) -> bool:
    """Is one and the same direction removed from everything that was written up to `layer`? Then none of it is left."""
    direction = removal.direction
    if direction.embedding is None or not removal.full(EMBEDDING):
        return False
    return all(torch.equal(direction.directions[n], direction.embedding) and removal.full(n) for n in range(layer + 1))


def _untied(checkpoint: Checkpoint, shape: Skeleton) -> str | None:
    """The input embedding that is the unembedding too, if the model ties them."""
    if not shape.tied or shape.head is None or f"{shape.head}.weight" in checkpoint.map:
        return None
    names = [name for name in text_names(checkpoint, shape) if name.endswith(_TIED)]
    if len(names) != 1:
        raise UnsupportedModel(
            f"{checkpoint.architecture}: the embedding that is tied to {shape.head} is not known by its name"
        )
    return names[0]


def _without_tie(config: dict[str, Any]) -> dict[str, Any]:
    changed = config | {"tie_word_embeddings": False}
    if "text_config" in config:
        changed["text_config"] = config["text_config"] | {"tie_word_embeddings": False}
    return changed


def _check_dtype(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise UnsupportedModel(f"{name} is stored as {tensor.dtype}, only float32, bfloat16 and float16 can be edited")


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


PREFIX = "base_model.model."
#: A bias has a component where more than this share of it lies along the direction; float32's rounding is below.
BIAS_SHARE = 1e-6


def export(
    checkpoint: Checkpoint, removal: Removal, output: Path, *, base: str, progress: Progress | None = None
) -> int:
    """Write the adapter to the folder `output`; how many modules it adapts. Raises UnsupportedModel with every writer
    that an adapter cannot reach."""
    check_fits(
        removal.direction,
        d_model=checkpoint.d_model,
        layers=checkpoint.layers,
        architecture=checkpoint.architecture,
    )
    shape = skeleton(checkpoint.folder, trust_remote_code=checkpoint.trust_remote_code)
    kinds = shape.kinds
    writers = [writer for writer in find(checkpoint, shape) if removal.at(writer.layer) is not None]
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
    progress = progress or Progress()
    progress.plan(MERGING, len(weights))
    with progress.part(MERGING):
        for name, tensor in checkpoint.tensors(weights):
            tensors |= factors(weights[name], tensor, removal, kinds[weights[name].module] == "Embedding")
            progress.advance()
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
