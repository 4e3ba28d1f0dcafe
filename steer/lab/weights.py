"""A model as files: its safetensors shards, and which of the tensors in them write to the stream.

Writers are known by the names that the families of models use, since a checkpoint of any size is edited shard by shard
and never runs. That none was missed is checked afterwards by effect (`steer.lab.merge.verify`).
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError, safe_open
from torch import Tensor

from steer.errors import InvalidInput, UnsupportedModel
from steer.hf.load import Skeleton, describe, find_model
from steer.runtime.bank import EMBEDDING

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_BLOCK = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")
_WRITER = re.compile(
    r"\.(?P<module>o_proj|out_proj|dense|dense_4h_to_h|c_proj|down_proj|fc2|fc_out|w2)\.(?P<kind>weight|bias)$"
    r"|\.experts\.down_proj$"
)
_EMBEDDING = re.compile(r"(?:^|\.)(?:embed_tokens|wte|wpe|embed_in|embed_positions|word_embeddings)\.weight$")
#: Norms after a writer: what is written is their output, which no edit of the writer's weights makes orthogonal.
_NORM_BEHIND = re.compile(r"\.post_(?:feedforward|mlp|ffw|self_attn)_?(?:layer)?norm\.weight$")

Axis = Literal["first", "last", "middle"]


@dataclass(frozen=True, slots=True)
class Writer:
    """A tensor that writes to the stream: at which layer (EMBEDDING for what stands before block 0), and which of its
    dimensions is the stream's."""

    name: str
    layer: int
    axis: Axis

    @property
    def bias(self) -> bool:
        return self.name.endswith(".bias")

    @property
    def module(self) -> str:
        return self.name.rsplit(".", 1)[0]

    def written(self, tensor: Tensor) -> Tensor:
        """A view of `tensor` as the vectors that it writes, `[..., d_model]`."""
        return {
            "last": tensor,
            "first": tensor.transpose(0, -1) if tensor.ndim == 2 else tensor,
            "middle": tensor.transpose(1, 2) if tensor.ndim == 3 else tensor,
        }[self.axis]


class Checkpoint:
    """The files of a model in `folder`. Raises UnsupportedModel for weights that are not plain safetensors."""

    def __init__(self, folder: Path, *, trust_remote_code: bool = False) -> None:
        self.folder, self.trust_remote_code = folder, trust_remote_code
        self.config: dict[str, Any] = _json(folder / "config.json")
        if "quantization_config" in self.config:
            raise UnsupportedModel(
                f"{folder}: quantised weights cannot be edited; take the model that they were made of"
            )
        if (folder / INDEX).exists():
            self.map: dict[str, str] = dict(_json(folder / INDEX)["weight_map"])
        elif (folder / SINGLE).exists():
            self.map = dict.fromkeys(_names(folder / SINGLE), SINGLE)
        else:
            raise UnsupportedModel(f"{folder}: has neither {SINGLE} nor {INDEX}; only safetensors weights are read")

    @cached_property
    def shape(self) -> tuple[str, int, int]:
        """Architecture, layers and d_model of its text model."""
        return describe(str(self.folder), trust_remote_code=self.trust_remote_code)

    @property
    def architecture(self) -> str:
        return self.shape[0]

    @property
    def layers(self) -> int:
        return self.shape[1]

    @property
    def d_model(self) -> int:
        return self.shape[2]

    def shards(self) -> Iterator[tuple[str, list[str]]]:
        """Each file with the names of its tensors."""
        by_file: dict[str, list[str]] = defaultdict(list)
        for name, file in self.map.items():
            by_file[file].append(name)
        yield from sorted(by_file.items())

    def tensors(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Tensors one by one, never all in memory."""
        by_file: dict[str, list[str]] = defaultdict(list)
        for name in names:
            by_file[self.map[name]].append(name)
        for file, some in sorted(by_file.items()):
            try:
                with safe_open(self.folder / file, framework="pt") as opened:
                    for name in some:
                        yield name, opened.get_tensor(name)
            except (OSError, SafetensorError) as error:
                raise UnsupportedModel(f"{self.folder / file}: cannot be read: {error}") from error


def text_names(checkpoint: Checkpoint, shape: Skeleton) -> list[str]:
    """The tensors of the text model: those that are in none of the parts beside it."""
    return sorted(name for name in checkpoint.map if shape.beside.isdisjoint(name.split(".")))


def find(checkpoint: Checkpoint, shape: Skeleton) -> list[Writer]:
    """Every writer, blocks and embeddings. Raises UnsupportedModel for a norm after a writer, and for a block in which
    no two modules that write are known by name."""
    names, kinds = text_names(checkpoint, shape), shape.kinds
    behind = [name for name in names if _NORM_BEHIND.search(name)]
    if behind:
        raise UnsupportedModel(
            f"{checkpoint.architecture}: a norm stands between the writers and the stream ({behind[0]}), so no edit of "
            "weights equals removing the direction; serve it with `--sites writers`, which acts behind the norm"
        )
    found: list[Writer] = []
    modules: dict[int, set[str]] = defaultdict(set)
    for name in names:
        block = _BLOCK.search(name)
        if block is None:
            if _EMBEDDING.search(name):
                found.append(Writer(name, EMBEDDING, "last"))
            continue
        matched = _WRITER.search(name[block.end() - 1 :])
        if matched is None:
            continue
        writer = Writer(name, int(block.group(1)), "middle")
        if matched.group("kind") == "bias":
            writer = Writer(name, writer.layer, "last")
        elif matched.group("kind") == "weight":
            writer = Writer(name, writer.layer, "last" if kinds.get(writer.module) == "Conv1D" else "first")
        found.append(writer)
        modules[writer.layer].add(name[block.end() :].split(".")[0])
    poor = [layer for layer in range(checkpoint.layers) if len(modules[layer]) < 2]
    if poor:
        raise UnsupportedModel(
            f"{checkpoint.architecture}: in the layers {poor} no attention and MLP that write are known by their "
            "names; this family of models cannot be baked"
        )
    if not any(w.layer == EMBEDDING for w in found):
        raise UnsupportedModel(f"{checkpoint.architecture}: no input embedding is known by its name")
    return found


def resolve(model: str, revision: str | None) -> Path:
    """The folder of a local model, or of a hub model that is downloaded as far as it is missing."""
    if Path(model).is_dir():
        return Path(model)
    find_model(model, revision)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, revision=revision, ignore_patterns=["*.bin", "*.pt", "*.gguf", "*.onnx"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise InvalidInput(f"'{model}' is no local folder, and cannot be had from the hub: {error}") from error


def _names(path: Path) -> list[str]:
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except (OSError, SafetensorError) as error:
        raise UnsupportedModel(f"{path}: cannot be read: {error}") from error


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UnsupportedModel(f"{path}: cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise UnsupportedModel(f"{path}: must be a JSON object")
    return value
