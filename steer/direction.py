"""A direction: unit vectors for each layer with the class means they came from, and the safetensors file that holds it.

Layer l means the **output of block l**, 0-based. The file's tensors (float32):

    directions         [layers, k, d_model]   orthonormal rows; a layer whose rows are all zero is not steered
    weights            [layers]               how much of the operation each layer does
    mlp_weights        [layers]               optional, for the site `writers`: how much of the operation is done on the
                                              MLP's output; `weights` then applies to attention's output alone
    reference          [layers, k]            ρ of the mode `one_sided`, which acts on components above ρ
    mean_harmful       [layers, d_model]      class means at the fitted position
    mean_harmless      [layers, d_model]
    mean_harmless_all  [layers, d_model]      mean over all positions of the harmless prompts' own text
    target             [layers, k]            optional: the value to which `one_sided` sets the component; default: ρ
    embedding          [k, d_model]           optional: rows for the stream before block 0

If k is 1, a file of schema 2 has two more tensors, for the modes that turn the stream in the plane of a layer's two
vectors:

    axis               [layers, d_model]      unit vector, orthogonal to the direction, on the side of the harmless mean
    angles             [layers, 2]            of `rotate_one_sided`, in radians from the axis: an angle beyond the first
                                              is turned to the second

The file has one metadata key, `steer`, whose value is a `DirectionMeta` as JSON. A version of Steer refuses tensors
that it does not know. The sha256 of the file's bytes identifies the direction.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeGuard

import safetensors.torch
import torch
from pydantic import BaseModel, BeforeValidator, Field, JsonValue, ValidationError, field_validator, model_validator
from safetensors import SafetensorError
from torch import Tensor
from typing_extensions import TypedDict

from steer._version import TOOL, made_at
from steer.errors import DirectionError, brief, prefixed, problems_of, unique_keys
from steer.files import (
    folder_problem,
    foreign_kind,
    holds_model,
    open_file,
    safetensors_problem,
    sorted_metadata,
    write_file,
)
from steer.geometry import angle
from steer.names import MAX_STRENGTH, MEASUREMENT_KEY, MODES, TURNING, Mode, Site, acts_on_terms, site_problem

#: Most bytes of a direction file. A file with 128 layers, d_model 16384 and k = 2 has about 50 MB.
MAX_BYTES = 256 * 2**20
#: Most bytes of the file's header, the JSON that lists its tensors and metadata, because Python parses it.
MAX_HEAD = 4 * 2**20
#: How far the inner products of a layer's rows may be from those of orthonormal rows.
UNIT_TOLERANCE = 1e-4
#: Largest magnitude of any value in a tensor. Products and norms of larger values overflow float32, and NaN would get
#: into the stream.
MAX_VALUE = 1e15
#: Components of a vector below this share of its length may come from float32 rounding alone.
ROUNDING = 1e-6
#: Tensors that a file may be without.
OPTIONAL = ("embedding", "target", "mlp_weights", "axis", "angles")


def no_bool(value: object) -> object:
    """Return `value`, but a bool as text, so that pydantic refuses it; otherwise pydantic would accept true as 1."""
    return brief(value) if isinstance(value, bool) else value


class Dataset(BaseModel, extra="forbid", frozen=True):
    """Where the prompts of one class came from."""

    name: str
    sha256: str
    count: int = Field(ge=1)


Dose = tuple[Annotated[float, Field(ge=-MAX_STRENGTH, le=0)], Annotated[float, Field(ge=0, le=MAX_STRENGTH)]]


class FoundCondition(BaseModel, extra="forbid", frozen=True, allow_inf_nan=False):
    """A condition on this direction that tells two sets of prompts apart, and how well on prompts that did not choose
    it. It says what a request may ask for: nothing acts by it."""

    layer: int = Field(ge=0, description="the component is compared at the output of this layer")
    above: float | None = Field(default=None, description="met where the component is above this")
    below: float | None = Field(default=None, description="met where it is below this; one of the two is there")
    harmful: Dataset = Field(description="the prompts that are to meet it, as many as were counted")
    harmless: Dataset = Field(description="the prompts that are not to meet it, as many as were counted")
    missed: int = Field(ge=0, description="false negatives: the harmful ones that do not meet it")
    caught: int = Field(ge=0, description="false positives: the harmless ones that meet it")
    system_prompt: str | None = Field(default=None, description="in every chat in which it was found")
    template: dict[str, JsonValue] = Field(default={}, description="the chat template's variables there")
    response_prefix: str = Field(default="", description="what every answer there had begun with")

    @property
    def errors(self) -> str:
        """How well the condition tells the two sets apart, in words, and in which chats this was counted."""
        missed, caught = (
            f"{count} of {dataset.count} of {dataset.name}"
            for count, dataset in ((self.missed, self.harmful), (self.caught, self.harmless))
        )
        around = [
            f"{key.replace('_', ' ')} {value!r}"
            for key in ("system_prompt", "template", "response_prefix")
            if (value := getattr(self, key))
        ]
        return f"{missed} do not meet it, {caught} do" + (f", with the {', the '.join(around)}" if around else "")

    @model_validator(mode="after")
    def _one_side(self) -> Self:
        if (self.above is None) == (self.below is None):
            raise ValueError("one of 'above' and 'below' is to be there")
        return self


class DirectionMeta(BaseModel, extra="forbid", frozen=True, json_schema_serialization_defaults_required=True):
    """What a direction is, how it was made and for which model."""

    schema_version: Annotated[Literal[1, 2], BeforeValidator(no_bool)] = Field(
        default=1, description="2 for a file that has a plane to turn the stream in"
    )
    method: str = Field(max_length=64)
    parameters: dict[str, float | int | str | None] = Field(default_factory=dict)
    source_layer: int | None = Field(
        default=None, ge=0, description="the layer whose direction serves all layers, if one does"
    )
    selection: dict[str, Any] = Field(default_factory=dict, description="how the source layer was chosen: measurements")
    model: str
    revision: str | None = None
    architecture: str
    d_model: int = Field(ge=1)
    layers: int = Field(ge=1)
    chat_template_sha256: str | None = None
    system_prompt: str | None = None
    template: dict[str, JsonValue] = Field(
        default_factory=dict, description="variables of the chat template under which prompts were measured"
    )
    response_prefix: str = Field(default="", description="what every measured answer had begun with")
    bos_count: int | None = Field(
        default=None, ge=0, description="BOS tokens at the start of each prompt that was measured"
    )
    harmful: Dataset | None = None
    harmless: Dataset | None = None
    mode: Mode = "ablate"
    modes: tuple[Mode, ...] = Field(
        default=tuple(mode for mode in MODES if mode not in TURNING),
        min_length=1,
        description="the modes for which the file's tensors hold what is needed",
    )
    strength: float = Field(default=1.0, ge=-MAX_STRENGTH, le=MAX_STRENGTH, allow_inf_nan=False)
    sites: tuple[Site, ...] = Field(default=("resid_post",), min_length=1)
    calibrated: dict[Mode, Dose] = Field(
        default_factory=dict, description="by mode the least and the largest strength up to which no harm was seen"
    )
    condition: FoundCondition | None = Field(
        default=None, description="one that was found on it; it applies to no request that does not write it"
    )
    tool: str = TOOL
    created: str = Field(default_factory=made_at)

    @field_validator("modes")
    @classmethod
    def _with_clamp(cls, value: tuple[Mode, ...]) -> tuple[Mode, ...]:
        """Add `clamp` to the modes of files that are older than it: it needs only what `add` and `one_sided` need."""
        clamps = {"add", "one_sided"} <= set(value)
        return tuple(mode for mode in MODES if mode in value or mode == "clamp") if clamps else value

    def strength_in(self, mode: Mode) -> float:
        """The strength in `mode` if a request gives none: the file's strength in the file's mode, 1 in another mode."""
        return self.strength if mode == self.mode else 1.0


class LayerProfile(TypedDict):
    """One layer of a direction. None where a value is undefined."""

    layer: int
    steered: Annotated[bool, Field(description="is any of its rows not zero")]
    weight: Annotated[float, Field(description="how much of the operation the layer does")]
    mlp_weight: Annotated[float | None, Field(description="the same of what its MLP writes, where the file has both")]
    angle: Annotated[float | None, Field(description="between the class means, in degrees")]
    norm_harmful: Annotated[float | None, Field(description="of the class mean")]
    norm_harmless: Annotated[float | None, Field(description="of the class mean")]
    component_harmful: Annotated[float | None, Field(description="of the class mean along its first row")]
    component_harmless: Annotated[float | None, Field(description="of the class mean along its first row")]
    threshold: Annotated[float | None, Field(description="of `one_sided`, a component along its first row")]
    target: Annotated[float | None, Field(description="to which `one_sided` moves what is above the threshold")]
    cosine_next: Annotated[float | None, Field(description="of its first row with the next layer's")]


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Direction:
    """A direction in memory. `problems` lists what is wrong with the direction, and `to_bytes` raises these problems.

    Two directions are equal if their metadata and all their tensors are equal.
    """

    meta: DirectionMeta
    directions: Tensor
    weights: Tensor
    reference: Tensor
    mean_harmful: Tensor
    mean_harmless: Tensor
    mean_harmless_all: Tensor
    embedding: Tensor | None = None
    target: Tensor | None = None
    axis: Tensor | None = None
    angles: Tensor | None = None
    mlp_weights: Tensor | None = None

    def __eq__(self, other: object) -> bool:
        if self is other or not isinstance(other, Direction):
            return self is other
        pairs = ((getattr(self, each.name), getattr(other, each.name)) for each in fields(self) if each.name != "meta")
        return self.meta == other.meta and all(_same(one, two) for one, two in pairs)

    def __hash__(self) -> int:
        """Hash only metadata, which is cheap: sets of directions are small, and `__eq__` compares the tensors."""
        meta = self.meta
        return hash((meta.method, meta.model, meta.created, meta.mode, meta.strength, meta.layers, meta.d_model))

    def __repr__(self) -> str:
        """One line, with the digest of the file that `save` would write."""
        if not isinstance(self.meta, DirectionMeta):
            return f"Direction(meta {_kind(self.meta)})"
        try:
            summary = f"digest {digest(self.to_bytes())[:12]}"
        except DirectionError as error:
            summary = f"{len(error.problems)} problems, see problems()"
        meta = self.meta
        return f"Direction({meta.method}, {meta.mode}, {meta.layers} layers, d_model {meta.d_model}, {summary})"

    @property
    def layers(self) -> int:
        return self.directions.shape[0]

    @property
    def rank(self) -> int:
        """k, the number of rows of each layer."""
        return self.directions.shape[1]

    @property
    def d_model(self) -> int:
        return self.directions.shape[2]

    def rows_in(self, mode: Mode) -> int:
        """The number of rows that act on a token in `mode`: the turning modes use the axis as a second row."""
        return 2 if mode in TURNING else self.rank

    def resident(self, rank: int) -> int:
        """The number of rows that the direction takes in a direction bank whose requests can use `rank` rows.

        The axis takes a row too, unless `rank` is 1: then no request can use the turning modes.
        """
        return self.rank + (self.axis is not None and rank > 1)

    def contrasted(self, *, each: bool = False) -> bool:
        """Whether the file has class means that differ by more than rounding at every layer that it steers.

        Args:
            each: whether the means must differ along each row of a layer; otherwise one row of the layer is enough.
        """
        steered = self.directions.flatten(1).any(1) & (self.weights != 0)
        means = torch.stack([self.mean_harmful, self.mean_harmless])
        apart = torch.einsum("lkd,ld->lk", self.directions, means[0] - means[1]).abs()
        apart = apart > ROUNDING * torch.linalg.vector_norm(means, dim=-1).amax(0)[:, None]
        found = (apart | ~self.directions.any(-1)).all(1) if each else apart.any(1)
        return bool(found[steered].all())

    def acts_in(self, mode: Mode) -> Tensor:
        """The layers at which the direction can change anything in `mode`, `[layers]` bool.

        `add` changes nothing at a layer whose class means are equal, because it adds their difference.
        """
        acts = self.directions.flatten(1).any(1) & (self.weight_sizes != 0)
        return acts & (self.mean_harmful != self.mean_harmless).any(-1) if mode == "add" else acts

    def weights_of(self, term: int) -> Tensor:
        """The weights for one term of each block, `[layers]`: for attention if `term` is 0, for the MLP if it is 1."""
        return self.mlp_weights if term and self.mlp_weights is not None else self.weights

    @property
    def weight_sizes(self) -> Tensor:
        """The larger magnitude of each layer's two weights, `[layers]`."""
        return torch.maximum(self.weights.abs(), self.weights_of(1).abs())

    def check_terms(self, single: Iterable[int]) -> None:
        """Raise DirectionError if a layer in `single` has two different weights.

        Args:
            single: the layers whose block writes attention and MLP as one term.
        """
        if different := [layer for layer in sorted(single) if self.weights[layer] != self.weights_of(1)[layer]]:
            raise DirectionError(
                f"tensor 'mlp_weights' differs from 'weights' at layers {different}, and this model's block writes one "
                "term there, in which attention and MLP cannot be told apart; equal weights are accepted there"
            )

    def tensors(self) -> dict[str, Tensor]:
        return {name: t for name in _shapes(1, 1, 1) if (t := getattr(self, name)) is not None}

    def problems(self) -> list[str]:
        """Every rule that the tensors or the metadata break, each as a text that names the tensor.

        Values of a tensor with a wrong dtype or shape are not checked.
        """
        found: list[str] = []
        for name in _shapes(1, 1, 1):
            tensor = getattr(self, name)
            if not _dense(tensor) and not (tensor is None and name in OPTIONAL):
                found.append(f"tensor '{name}' is {_kind(tensor)}, it must be a dense tensor of float32")
        if not isinstance(self.meta, DirectionMeta):
            found.append(f"metadata: {_kind(self.meta)} is not accepted: a DirectionMeta")
        if found:
            return found  # the other checks need dense tensors and metadata
        tensors = self.tensors()
        k = self.directions.shape[1] if self.directions.ndim == 3 else 1
        shapes = _shapes(self.meta.layers, max(1, k), self.meta.d_model)
        for name, tensor in tensors.items():
            before = len(found)
            if tensor.dtype != torch.float32:
                found.append(
                    f"tensor '{name}' has dtype {str(tensor.dtype).removeprefix('torch.')}, it must be float32"
                )
            if tuple(tensor.shape) != shapes[name]:
                found.append(f"tensor '{name}' has shape {list(tensor.shape)}, it must be {list(shapes[name])}")
            if len(found) > before:
                continue
            if not torch.isfinite(tensor).all():
                found.append(f"tensor '{name}' has values that are not finite")
            elif tensor.numel() and tensor.abs().max() > MAX_VALUE:
                found.append(f"tensor '{name}' has values beyond ±{MAX_VALUE:g}")
            elif name == "directions":
                found += _row_problems(name, tensor)
                if not tensor.any():
                    found.append("tensor 'directions' is zero at every layer, so nothing would be steered")
            elif name == "embedding":
                found += _row_problems(name, tensor.unsqueeze(0))
            elif name == "target" and tensor.shape == self.reference.shape and (tensor > self.reference).any():
                found.append("tensor 'target' is above 'reference' somewhere, so a component would be raised there")
            elif name == "axis" and k == 1 and tensor.shape == self.directions[:, 0].shape:
                found += _axis_problems(tensor, self.directions[:, 0])
            elif name == "angles" and (tensor[:, 1] > tensor[:, 0]).any():
                found.append("tensor 'angles': the second is above the first somewhere, so an angle would grow there")
        if not found and not self.acts_in("ablate").any() and self.embedding is None:
            found.append("the weights are zero at every layer with rows, so nothing would be steered")
        elif not found and self.meta.mode == "add" and not self.acts_in("add").any():
            found.append(
                "metadata: the mode 'add' adds the difference of the class means, which is zero wherever it acts"
            )
        found += self._plane_problems()
        if self.mlp_weights is not None and not acts_on_terms(self.meta.sites):
            found.append(
                f"tensor 'mlp_weights' is for the site 'writers', this file's sites are {', '.join(self.meta.sites)}"
            )
        if problem := site_problem(self.meta.sites, self.meta.mode):
            found.append(f"metadata: {problem}")
        if self.meta.mode not in self.meta.modes:
            found.append(f"metadata: the mode '{self.meta.mode}' is not among the file's modes {list(self.meta.modes)}")
        if self.meta.source_layer is not None and self.meta.source_layer >= self.meta.layers:
            found.append(f"metadata: source_layer {self.meta.source_layer} is not below layers {self.meta.layers}")
        if (condition := self.meta.condition) is not None and condition.layer >= self.meta.layers - 1:
            found.append(f"metadata: condition: no layer comes after {condition.layer}: this has {self.meta.layers}")
        return found

    def _plane_problems(self) -> list[str]:
        """The ways in which metadata and tensors disagree on whether the file has a plane to turn the stream in."""
        found = []
        if (self.axis is None) != (self.angles is None):
            found.append("tensors 'axis' and 'angles' come together, one is missing")
        if (self.meta.schema_version == 2) != (self.axis is not None):
            found.append(
                f"metadata: schema_version {self.meta.schema_version}: it is 2 where there is an 'axis', else 1"
            )
        if self.axis is None and (turning := [mode for mode in self.meta.modes if mode in TURNING]):
            found.append(f"metadata: the modes {turning} need the tensors 'axis' and 'angles'")
        if self.axis is not None and self.rank != 1:
            found.append(f"tensor 'axis' is for directions of one row, this one has {self.rank}")
        return found

    def with_meta(self, **changes: Any) -> Direction:
        """The same tensors with `changes` to the metadata, which is checked again. Raises DirectionError."""
        try:
            return replace(self, meta=DirectionMeta.model_validate(self.meta.model_dump() | changes))
        except ValidationError as error:
            raise DirectionError(f"metadata: {p}" for p in problems_of(error, "steer", DirectionMeta)) from error

    def profile(self) -> list[LayerProfile]:
        rows: list[LayerProfile] = []
        sided, aimed = "one_sided" in self.meta.modes, self.reference if self.target is None else self.target
        for layer in range(self.layers):
            a, h = self.mean_harmless[layer], self.mean_harmful[layer]
            known = bool(a.any() and h.any())  # another tool's file may have only their difference
            first, following = self.directions[layer, 0], self.directions[layer + 1 : layer + 2, 0]
            steered = bool(first.any())
            rows.append(
                {
                    "layer": layer,
                    "steered": bool(self.directions[layer].any()),
                    "weight": float(self.weights[layer]),
                    "mlp_weight": None if self.mlp_weights is None else float(self.mlp_weights[layer]),
                    "angle": math.degrees(float(angle(a, h))) if known else None,
                    "norm_harmful": float(h.norm()) if known else None,
                    "norm_harmless": float(a.norm()) if known else None,
                    "component_harmful": float(h @ first) if steered and known else None,
                    "component_harmless": float(a @ first) if steered and known else None,
                    "threshold": float(self.reference[layer, 0]) if sided and steered else None,
                    "target": float(aimed[layer, 0]) if sided and steered else None,
                    "cosine_next": float(first @ following[0]) if first.any() and following.any() else None,
                }
            )
        return rows

    def to_bytes(self) -> bytes:
        """The bytes of the file, which `from_bytes` reads. Raises DirectionError with every problem."""
        problems = self.problems()
        metadata = _meta_json(self.meta, problems) if isinstance(self.meta, DirectionMeta) else ""
        DirectionError.raise_for(problems)
        # copies, because safetensors refuses tensors that share memory
        tensors = {n: t.detach().clone(memory_format=torch.contiguous_format) for n, t in self.tensors().items()}
        return sorted_metadata(safetensors.torch.save(tensors, {"format": "pt", "steer": metadata}))

    @classmethod
    def from_bytes(cls, data: bytes, source: str = "direction file") -> Direction:
        """Parse and check a file's bytes. Raises DirectionError with every problem, each prefixed by `source`."""
        problems: list[str] = []
        with prefixed(source, DirectionError):
            tensors = _read_tensors(data)
            meta = _read_meta(data, problems)
            if holds_model(tensors):
                raise DirectionError("this is a model; give a direction file")
            known = set(_shapes(1, 1, 1))
            if missing := sorted(known - tensors.keys() - set(OPTIONAL)):
                problems.append(f"missing tensors: {_quoted(missing)}")
            if others := sorted(tensors.keys() - known):
                problems.append(f"unknown tensors: {_quoted(others)}")
            DirectionError.raise_for(problems)
            assert meta is not None, "or it would be among the problems"
            direction = cls(meta=meta, **tensors)
            DirectionError.raise_for(direction.problems())
        return direction

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Direction:
        return cls.from_bytes(read_file(path), source=str(path))

    def save(self, path: str | os.PathLike[str]) -> str:
        """Write the file atomically and return its digest."""
        _check_path(path)
        data = self.to_bytes()
        write_file(path, data)
        return digest(data)


def digest(data: bytes) -> str:
    """The identity of a direction file: the sha256 of its bytes, in hex."""
    return hashlib.sha256(data).hexdigest()


def check_fits(direction: Direction, *, d_model: int, layers: int, architecture: str) -> None:
    """Raise DirectionError with every way in which the served model differs from the one `direction` was made for."""
    meta, problems = direction.meta, []
    if meta.d_model != d_model:
        problems.append(f"it was made for d_model {meta.d_model}, this model has {d_model}")
    if meta.layers != layers:
        problems.append(f"it was made for {meta.layers} layers, this model has {layers}")
    if _family(meta.architecture) != _family(architecture):
        problems.append(f"it was made for {meta.architecture}, this model is {architecture}")
    DirectionError.raise_for(problems)


def _family(architecture: str) -> str:
    """The name of a transformers class without its suffix for the task, such as ForCausalLM.

    A model that also reads images is a …ForConditionalGeneration, and its text model is the same as in …ForCausalLM.
    """
    return re.sub("(ForCausalLM|ForConditionalGeneration|LMHeadModel)$", "", architecture)


def read_file(path: str | os.PathLike[str]) -> bytes:
    """The bytes of a file. Raises DirectionError if the file cannot be read or has more than MAX_BYTES."""
    _check_path(path)
    try:
        if Path(path).is_dir():
            raise DirectionError(f"{path}: {folder_problem(path)}; give a direction file")
        with open_file(path) as file:
            if (size := os.fstat(file.fileno()).st_size) > MAX_BYTES:
                raise DirectionError(
                    f"{path}: {size} bytes, a direction file has at most {MAX_BYTES}; is this a model?"
                )
            return file.read()
    except OSError as error:
        raise DirectionError(f"{path}: cannot be read: {error.strerror or error}") from error


def _check_path(path: object) -> None:
    if not isinstance(path, str | os.PathLike) or "\0" in str(path):
        raise DirectionError(
            f"{brief(path, python=True)} is not accepted: the path of a direction file, as a text or a Path"
        )


def _dense(tensor: object) -> TypeGuard[Tensor]:
    """Whether `tensor` is a strided tensor whose values are in memory (not on the device `meta`)."""
    return isinstance(tensor, Tensor) and tensor.layout is torch.strided and not tensor.is_meta


def _same(one: object, other: object) -> bool:
    if not (_dense(one) and _dense(other)):
        return one is other
    return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one.cpu(), other.cpu())


def _kind(value: object) -> str:
    """A description of `value`, which is no dense tensor, for an error message."""
    if isinstance(value, Tensor):
        return f"on the device '{value.device}', {str(value.layout).removeprefix('torch.')}"
    return f"of the type {type(value).__module__}.{type(value).__name__}"


def _quoted(names: list[str]) -> str:
    more = f" and {len(names) - 6} more" if len(names) > 6 else ""
    return ", ".join(f"'{name[:80]}'" for name in names[:6]) + more


def _shapes(layers: int, k: int, d_model: int) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor that a file may have, by name."""
    return {
        "directions": (layers, k, d_model),
        "weights": (layers,),
        "reference": (layers, k),
        "mean_harmful": (layers, d_model),
        "mean_harmless": (layers, d_model),
        "mean_harmless_all": (layers, d_model),
        "embedding": (k, d_model),
        "target": (layers, k),
        "mlp_weights": (layers,),
        "axis": (layers, d_model),
        "angles": (layers, 2),
    }


def _row_problems(name: str, rows: Tensor) -> list[str]:
    """The problem that layers of `rows` (`[layers, k, d_model]`) are neither orthonormal nor all zero, if some are."""
    rows = rows.double()
    steered = rows.abs().amax(dim=(1, 2)) > 0
    gram = rows @ rows.transpose(1, 2)
    off = (gram - torch.eye(rows.shape[1], dtype=gram.dtype)).abs().amax(dim=(1, 2))
    bad = torch.nonzero(steered & (off > UNIT_TOLERANCE)).flatten().tolist()
    if not bad:
        return []
    rule = "unit vectors" if rows.shape[1] == 1 else "orthonormal rows"
    return [f"tensor '{name}': not {rule} at layers {bad} (off by up to {float(off[bad].max()):.2g})"]


def _axis_problems(axis: Tensor, rows: Tensor) -> list[str]:
    """The problem that `axis` and `rows`, both `[layers, d_model]`, do not span a plane at some layers, if so."""
    axis, rows = axis.double(), rows.double()
    steered = rows.abs().amax(-1) > 0
    off = torch.stack([axis.square().sum(-1) - 1, (axis * rows).sum(-1)]).abs().amax(0)
    off = torch.where(steered, off, axis.abs().amax(-1))
    bad = torch.nonzero(off > UNIT_TOLERANCE).flatten().tolist()
    rule = "a unit vector orthogonal to the direction, zero where there is none"
    return [f"tensor 'axis': not {rule} at layers {bad} (off by up to {float(off.max()):.2g})"] if bad else []


def _read_tensors(data: bytes) -> dict[str, Tensor]:
    if len(data) > MAX_BYTES:
        raise DirectionError(f"{len(data)} bytes, a direction file has at most {MAX_BYTES}")
    if MAX_HEAD < (head := int.from_bytes(data[:8], "little")) <= len(data):
        raise DirectionError(f"a header of {head} bytes, a direction file's has at most {MAX_HEAD}")
    try:
        return safetensors.torch.load(data)
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        # checked only after an error: a good file begins with its header's length, whose first byte may be 0x80 too
        if kind := foreign_kind(data):
            message = f"this is {kind}, only safetensors is ever loaded; `steer convert` makes one of such files"
            raise DirectionError(message) from None
        raise DirectionError(safetensors_problem(data, len(data), error)) from None


def _read_meta(data: bytes, problems: list[str]) -> DirectionMeta | None:
    """Parse the `steer` metadata of `data`, which safetensors has already accepted; None if it has `problems`.

    The header is parsed here because safetensors' API reads metadata only from a path.
    """
    length = int.from_bytes(data[:8], "little")
    try:
        found = json.loads(data[8 : 8 + length], object_pairs_hook=unique_keys).get("__metadata__") or {}
    except ValueError as error:
        problems.append(f"metadata: {error}")
        return None
    if MEASUREMENT_KEY in found:
        raise DirectionError("this is a measurement: `steer derive` makes a direction from it")
    text = found.get("steer")
    if text is None:
        problems.append("the metadata key 'steer' is missing, so this is not a Steer direction")
        return None
    return _parsed(text, problems)


def _parsed(text: str, problems: list[str]) -> DirectionMeta | None:
    """Parse the metadata `text`; if it is not valid, add what is wrong to `problems` and return None."""
    try:
        meta = DirectionMeta.model_validate_json(text, strict=True)
        _check_numbers(meta)
        json.loads(text, object_pairs_hook=unique_keys)
        return meta
    except ValidationError as error:
        problems += [f"metadata: {problem}" for problem in problems_of(error, "steer", DirectionMeta)]
    except (ValueError, RecursionError) as error:
        problems.append(f"metadata: not JSON: {error}")
    return None


def _meta_json(meta: DirectionMeta, problems: list[str]) -> str:
    """The metadata as JSON. The text is parsed again, and what a reader would refuse is added to `problems`."""
    # unused fields are left out, so that older versions can read the file
    optional = ("template", "response_prefix", "calibrated", "condition")
    unused = {name for name in optional if not getattr(meta, name)}
    try:
        _check_numbers(meta)
        text = meta.model_dump_json(exclude=unused, warnings="error")
    except (ValueError, RecursionError) as error:
        problems.append(f"metadata: cannot be written as JSON: {error}")
        return ""
    _parsed(text, problems)
    return text


def _check_numbers(meta: DirectionMeta) -> None:
    """Raise ValueError for NaN and ∞ in the metadata.

    pydantic accepts them but writes null, so the file would differ from the metadata in memory.
    """
    json.dumps(meta.model_dump(warnings=False), allow_nan=False, default=str)
