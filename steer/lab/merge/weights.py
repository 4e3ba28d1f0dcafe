"""A model as files: its safetensors shards, the tensors in them that write to the stream, and norms after these.

A pass over the model shows which children of a block write (`steer.runtime.hook_points`). The child's parameter that
does so is known by the names that families of models use. Its layout is known by the class of the module that owns it,
never by its shape: a square matrix fits two layouts. Anything unknown is refused. Afterwards a check by effect shows
that no writer was missed (`steer.lab.merge.removal`).
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from steer.errors import InvalidInput, UnsupportedModel
from steer.files import problem_of_file
from steer.hf.internals import axis_in_file
from steer.hf.load import describe, find_model
from steer.hf.streamed import Streamed
from steer.runtime.bank import EMBEDDING
from steer.runtime.hook_points import Output, find_writers, hooks, stream_of

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


class Checkpoint:
    """The files of a model in `folder`. Raises UnsupportedModel for weights that are not plain safetensors."""

    def __init__(self, folder: Path, *, trust_remote_code: bool = False) -> None:
        self.folder, self.trust_remote_code = folder, trust_remote_code
        self.config: dict[str, Any] = _json(folder / "config.json")
        if "quantization_config" in self.config:
            raise UnsupportedModel(f"{folder}: quantised weights cannot be edited; take the original model")
        if (folder / "adapter_config.json").exists():
            raise UnsupportedModel(
                f"{folder}: has a PEFT adapter, which transformers applies: merge it into the weights"
            )
        if (folder / SINGLE).exists():  # which transformers takes before an index
            self.map: dict[str, str] = dict.fromkeys(_names(folder / SINGLE), SINGLE)
        elif (folder / INDEX).exists():
            self.map = dict(_json(folder / INDEX)["weight_map"])
        else:
            raise UnsupportedModel(f"{folder}: has neither {SINGLE} nor {INDEX}; only safetensors weights are read")

    @cached_property
    def architecture(self) -> str:
        """The architecture of its text model."""
        return describe(str(self.folder), trust_remote_code=self.trust_remote_code)[0]

    def shape(self, name: str) -> tuple[int, ...]:
        with safe_open(self.folder / self.map[name], framework="pt") as opened:
            return tuple(opened.get_slice(name).get_shape())

    def tensors(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """The tensors one by one, file by file, never all in memory."""
        by_file: dict[str, list[str]] = defaultdict(list)
        for name in names:
            by_file[self.map[name]].append(name)
        for file, some in sorted(by_file.items()):
            try:
                with safe_open(self.folder / file, framework="pt") as opened:
                    for name in some:
                        yield name, opened.get_tensor(name)
            except (OSError, SafetensorError) as error:
                path = self.folder / file
                raise UnsupportedModel(f"{path}: {problem_of_file(path, error)}") from error


def resolve(model: str, revision: str | None) -> Path:
    """The folder of a local model, or of a hub model, whose missing files are downloaded."""
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
        raise UnsupportedModel(f"{path}: {problem_of_file(path, error)}") from error


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UnsupportedModel(f"{path}: cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise UnsupportedModel(f"{path}: must be a JSON object")
    return value


_WRITER = re.compile(
    r"(?:^|\.)(?:o_proj|out_proj|dense|dense_4h_to_h|c_proj|down_proj|fc2|fc_out|w2)\.(?:weight|bias)$"
    r"|(?:^|\.)experts\.down_proj(?:_bias)?$"
)
_POSITIONS = re.compile(r"(?:^|\.)(?:wpe|embed_positions)\.weight$")
#: Names of transformers' classes whose weights are `[…, inputs, outputs]` and that have no attribute for that.
_INPUTS_FIRST = ("Conv1D", "Llama4TextExperts")
#: How far a norm may differ from g ⊙ x / rms(x), as a share of the largest value.
RMS = 1e-3


@dataclass(frozen=True, slots=True)
class Term:
    """One of the terms that a block adds to the stream: the output of `module`, or of the `norm` after it, whose `gain`
    is g in g ⊙ x / rms(x). `number`: the `term` of its `HookPoint`."""

    layer: int
    number: int
    module: nn.Module
    norm: nn.Module | None = None
    gain: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Writer:
    """A tensor of the files that writes to the stream.

    Attributes:
        name: of the tensor in the files.
        layer: EMBEDDING for a tensor before block 0.
        term: the number of its term at the layer.
        axis: the dimension of the stream, counted from the end.
        parameter: the model's parameter that is made of it.
        own: whether that parameter is made of this tensor alone.
        gain: of the norm after it.
    """

    name: str
    layer: int
    term: int
    axis: int
    parameter: str
    own: bool = True
    gain: Tensor | None = None

    @property
    def bias(self) -> bool:
        return self.parameter.endswith("bias")

    @property
    def module(self) -> str:
        return self.parameter.rpartition(".")[0]

    def written(self, tensor: Tensor) -> Tensor:
        """A view of `tensor` as the vectors that it writes to the stream, `[..., d_model]`."""
        return tensor.movedim(self.axis, -1)

    def stored(self, written: Tensor) -> Tensor:
        """The inverse of `written`."""
        return written.movedim(-1, self.axis)


@torch.no_grad()
def find_terms(streamed: Streamed) -> list[Term]:
    """Find in a pass over the model what each block adds to the stream. Raises UnsupportedModel if that is not the sum
    of one or two outputs of its children, or if a norm after one is not an RMS norm."""
    anatomy = streamed.anatomy
    children = [dict(block.named_children()) for block in anatomy.blocks]
    given: dict[int, Tensor] = {}
    wrote: dict[int, Tensor] = {}

    def record(child: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], output: Output) -> None:
        first = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)
        for store, x in ((given, first), (wrote, stream_of(output))):
            if isinstance(x, Tensor):
                store[id(child)] = x.detach().clone()

    each_child = [child for each in children for child in each.values()]
    with hooks([child.register_forward_hook(record, with_kwargs=True) for child in each_child]):
        found = find_writers(anatomy.blocks, anatomy.probe)
    terms = []
    for layer, modules in enumerate(found):
        for number, module in enumerate(modules):
            if _parameters(streamed, module):
                terms.append(Term(layer, number, module))
                continue
            feeding = [
                child
                for child in children[layer].values()
                if id(child) in wrote
                and torch.equal(wrote[id(child)], given[id(module)])
                and _parameters(streamed, child)
            ]
            if not feeding:
                raise UnsupportedModel(
                    f"{anatomy.architecture}: {streamed.name_of(module)} ({type(module).__name__}) writes to the "
                    "stream, and which of its weights do is not known; this family of models cannot be baked"
                )
            terms.append(Term(layer, number, feeding[0], module, _gain(streamed, module)))
    return terms


def find(checkpoint: Checkpoint, streamed: Streamed, terms: Sequence[Term]) -> list[Writer]:
    """Find the tensors of the files that write these terms, and the embeddings. Raises UnsupportedModel for an unknown
    layout, and for a tensor from which the model makes its parameter in an unknown way."""
    decoder = streamed.name_of(streamed.anatomy.decoder)
    inside = tuple(f"{streamed.name_of(block)}." for block in streamed.anatomy.blocks)
    outside = [name for name in streamed.parameters if name.startswith(decoder) and not name.startswith(inside)]
    embedding = f"{streamed.name_of(streamed.model.get_input_embeddings())}.weight"
    positions = [name for name in outside if _POSITIONS.search(name)]
    wanted: dict[str, tuple[int, int, Tensor | None]] = dict.fromkeys([embedding, *positions], (EMBEDDING, 0, None))
    for term in terms:
        wanted |= dict.fromkeys(_parameters(streamed, term.module), (term.layer, term.number, term.gain))
    shapes = {name: tuple(parameter.shape) for name, parameter in streamed.model.state_dict().items()}
    found, missing = [], set(wanted)
    for name, (parameter, operations) in streamed.becomes.items():
        if parameter in wanted:
            layer, number, gain = wanted[parameter]
            axis = _axis(streamed.module_of(parameter), parameter)
            if (width := shapes[parameter][axis]) != streamed.anatomy.d_model:
                raise UnsupportedModel(
                    f"{name}: writes vectors of {width}, and the stream has {streamed.anatomy.d_model}: what stands "
                    "between is not known; this model cannot be baked"
                )
            file = shapes[parameter] if not operations else checkpoint.shape(name)
            in_file = axis_in_file(operations, axis, shapes[parameter], file)
            if in_file is None:
                raise UnsupportedModel(f"{name}: how {parameter} is made of it is not known; it cannot be baked")
            found.append(Writer(name, layer, number, in_file, parameter, not operations, gain))
            missing.discard(parameter)
    if missing:
        raise UnsupportedModel(f"{checkpoint.architecture}: its files have no tensor for {', '.join(sorted(missing))}")
    return found


def _parameters(streamed: Streamed, module: nn.Module) -> list[str]:
    """Return the names of the parameters of `module` that write its output."""
    prefix = streamed.name_of(module)
    return [name for own, _ in module.named_parameters() if _WRITER.search(name := f"{prefix}.{own}")]


def _axis(module: nn.Module, parameter: str) -> int:
    """The dimension of the stream in this parameter, counted from the end, by the class of the module that owns it."""
    kind, attribute = type(module).__name__, parameter.rpartition(".")[2]
    if attribute.endswith("bias"):  # [d_model], of experts [experts, d_model]
        return -1
    if isinstance(module, nn.Embedding) or kind in _INPUTS_FIRST:
        return -1
    if isinstance(module, nn.Linear):
        return -2
    if attribute == "down_proj" and isinstance(transposed := getattr(module, "is_transposed", None), bool):
        return -1 if transposed else -2
    raise UnsupportedModel(
        f"{parameter}: writes to the stream, and how a {kind} lays out its weights is not known; this family of models "
        "cannot be baked"
    )


def _gain(streamed: Streamed, norm: nn.Module) -> Tensor:
    """g `[d_model]` of a norm that computes g ⊙ x / rms(x), in whatever form it stores g (Gemma: g − 1). Raises
    UnsupportedModel for another norm."""
    d_model = streamed.anatomy.d_model
    x = torch.randn(d_model, generator=torch.Generator().manual_seed(0))
    with streamed.loaded(norm):
        gain: Tensor = norm(torch.ones(1, d_model))[0]
        off = norm(x[None])[0] - gain * x / x.square().mean().sqrt()
    if not float(off.abs().max()) <= RMS * float((gain * x).abs().max()):
        raise UnsupportedModel(
            f"{streamed.anatomy.architecture}: {streamed.name_of(norm)} ({type(norm).__name__}) stands between the "
            "weights and the stream, and is no RMS norm; this family of models cannot be baked"
        )
    return gain
