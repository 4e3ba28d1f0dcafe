"""A model as files: its safetensors shards, and the tensors in them, read one by one."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from steer.errors import InvalidInput, UnsupportedModel
from steer.hf.load import describe, find_model

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


class Checkpoint:
    """The files of a model in `folder`. Raises UnsupportedModel for weights that are not plain safetensors."""

    def __init__(self, folder: Path, *, trust_remote_code: bool = False) -> None:
        self.folder, self.trust_remote_code = folder, trust_remote_code
        self.config: dict[str, Any] = _json(folder / "config.json")
        if "quantization_config" in self.config:
            raise UnsupportedModel(f"{folder}: quantised weights cannot be edited; take the original model")
        if (folder / INDEX).exists():
            self.map: dict[str, str] = dict(_json(folder / INDEX)["weight_map"])
        elif (folder / SINGLE).exists():
            self.map = dict.fromkeys(_names(folder / SINGLE), SINGLE)
        else:
            raise UnsupportedModel(f"{folder}: has neither {SINGLE} nor {INDEX}; only safetensors weights are read")

    @cached_property
    def architecture(self) -> str:
        """Of its text model."""
        return describe(str(self.folder), trust_remote_code=self.trust_remote_code)[0]

    def shards(self) -> Iterator[tuple[str, list[str]]]:
        """Each file with the names of its tensors."""
        by_file: dict[str, list[str]] = defaultdict(list)
        for name, file in self.map.items():
            by_file[file].append(name)
        yield from sorted(by_file.items())

    def shape(self, name: str) -> tuple[int, ...]:
        with safe_open(self.folder / self.map[name], framework="pt") as opened:
            return tuple(opened.get_slice(name).get_shape())

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
        raise InvalidInput(f"'{model}' is no local folder, and the hub does not give it: {error}") from error


def _names(path: Path) -> list[str]:
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except (OSError, SafetensorError) as error:
        raise UnsupportedModel(f"{path}: cannot be read: {error}") from error


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UnsupportedModel(f"{path}: cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise UnsupportedModel(f"{path}: must be a JSON object")
    return value
