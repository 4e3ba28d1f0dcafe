"""Bake a direction into an ordinary model: its writers' weights orthogonalised, shard by shard, for any server.

What is removed, and how that compares with what is served, says `steer.lab.merge.removal`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from steer._version import __version__
from steer.errors import InvalidInput, UnsupportedModel
from steer.lab.merge.removal import Plan, Removal, plan
from steer.lab.merge.verify import Verdict, verify
from steer.lab.merge.weights import INDEX, Checkpoint
from steer.lab.progress import Progress
from steer.runtime.bank import EMBEDDING

RECEIPT = "steer_bake.json"
#: The part of a command's progress in which files are written.
MERGING = "merging"
#: Not copied beside new weights: other formats of the old ones, and a card that speaks of the old model.
_NOT_COPIED = (
    *("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf", "*.onnx", "*.h5", "*.msgpack", INDEX),
    *("README.md", ".*"),
)


@dataclass(frozen=True, slots=True)
class Made:
    """How many tensors, or modules, were changed; what the verification found, None where there was none."""

    count: int
    verdict: Verdict | None


def bake(
    checkpoint: Checkpoint,
    removal: Removal,
    output: Path,
    *,
    digest: str,
    preserve_norms: bool = False,
    verified: bool = True,
    progress: Progress | None = None,
) -> Made:
    """Write the edited model to the new folder `output`, which is there in the end only if it was `verified`, or if
    that was not asked for. One shard, or one block, is in memory at a time. Where something is removed from the
    embedding, a tied one is untied, since the unembedding must not change."""
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
            "tool": f"steer {__version__}",
        }
        _write_json(folder / RECEIPT, receipt)
        verdict = None
        if verified:
            made = Checkpoint(folder, trust_remote_code=checkpoint.trust_remote_code)
            dtype = next(tensor.dtype for _, tensor in made.tensors([planned.writers[0].name]))
            verdict = verify(planned, made, dtype, progress, preserve_norms=preserve_norms)
    return Made(count, verdict)


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """A folder to write to, which becomes `output` at the end of the `with`, and is removed after an error. Raises
    InvalidInput where `output` is there already."""
    if output.exists():
        raise InvalidInput(f"{output} exists already; give a folder that does not exist")
    temporary = output.with_name(f".{output.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        temporary.rename(output)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _write(planned: Plan, output: Path, preserve_norms: bool, progress: Progress) -> int:
    checkpoint, streamed = planned.checkpoint, planned.streamed
    writers = {writer.name: writer for writer in planned.writers}
    untied = None if planned.removal.at(EMBEDDING) is None else streamed.tied
    ignored = shutil.ignore_patterns(*_NOT_COPIED)
    shutil.copytree(checkpoint.folder, output, ignore=ignored, dirs_exist_ok=True)
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
                    if name == untied and streamed.head is not None:
                        new[streamed.head] = tensor.clone()
                    new[name] = planned.edited(writers[name], tensor, preserve_norms)
                    count += not torch.equal(new[name], tensor)
                progress.advance()
            save_file(new, output / file, {"format": "pt"})
            weight_map |= dict.fromkeys(new, file)
            size += sum(t.numel() * t.element_size() for t in new.values())
    if (checkpoint.folder / INDEX).exists():
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
        (output / INDEX).write_text(json.dumps(index, indent=2))
    if untied is not None or (planned.removal.at(EMBEDDING) is not None and _ties(checkpoint.config)):
        _write_json(output / "config.json", _without_tie(checkpoint.config))
    return count


def _ties(config: dict[str, Any]) -> bool:
    """Does the config tie the unembedding to the embedding? Files may have both all the same, and engines differ in
    which they then take."""
    text = config.get("text_config")
    return bool(config.get("tie_word_embeddings") or (isinstance(text, dict) and text.get("tie_word_embeddings")))


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
