"""A measurement: statistics of a model's activations on two contrast sets, and the safetensors file that holds them.

Layer l means the **output of block l**, 0-based. `measured` may be less than the model's number of layers, because
layers above the last requested one are not run. For each class c, harmful or harmless, the file has

    c_mean      [positions, measured, d_model]            float64   mean over the prompts
    c_mean_all  [measured, d_model]                       float64   mean over all tokens of the prompts' own text
    c_moments   [positions, measured, d_model, d_model]   float64   E[xxᵀ], on request
    c_vectors   [positions, measured, prompts, d_model]   bfloat16  each prompt's vector, on request

and one metadata key, `steer_measurement`, with a `MeasurementMeta` as JSON. A method needs only this file to make a
direction.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, BeforeValidator, Field, JsonValue, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from steer._version import TOOL, made_at
from steer.direction import Dataset, no_bool
from steer.errors import DegenerateError, InvalidInput, problems_of
from steer.files import folder_problem, holds_model, open_file, problem_of_file, replacing, sorted_metadata
from steer.geometry import MIN_ANGLE, winsorise
from steer.lab.prompts import Rendering
from steer.names import MEASUREMENT_KEY

CLASSES = ("harmful", "harmless")
#: The tensors of a class with their dtypes. Only the first is always there.
KINDS = {"mean": torch.float64, "mean_all": torch.float64, "moments": torch.float64, "vectors": torch.bfloat16}


class ModelFacts(BaseModel, extra="forbid", frozen=True):
    """Which model was measured."""

    name: str
    revision: str | None = None
    architecture: str
    d_model: int = Field(ge=1)
    layers: int = Field(ge=1)
    dtype: str | None = None
    chat_template_sha256: str | None = None

    @property
    def as_fitted(self) -> dict[str, Any]:
        """The fields of `DirectionMeta` that describe the model for which a direction was made."""
        return {"model": self.name, **self.model_dump(exclude={"name", "dtype"})}


class MeasurementMeta(BaseModel, extra="forbid", frozen=True):
    """How the measurement was made: everything but the model's weights that its numbers depend on."""

    schema_version: Annotated[Literal[1], BeforeValidator(no_bool)] = 1
    model: ModelFacts
    measured: int = Field(ge=1, description="layers measured, from the first")
    positions: tuple[int, ...] = Field(min_length=1, description="token positions, −1 is the template's last")
    winsorize: float | None = Field(default=None, gt=0, le=1)
    system_prompt: str | None = None
    template: dict[str, JsonValue] = Field(default_factory=dict, description="variables of the chat template")
    response_prefix: str = Field(default="", description="what every answer had begun with")
    bos_count: int | None = Field(default=None, ge=0)
    harmful: Dataset | None = None
    harmless: Dataset | None = None
    tool: str = TOOL
    created: str = Field(default_factory=made_at)

    @property
    def rendering(self) -> Rendering:
        """What surrounded each prompt."""
        return Rendering(self.system_prompt, self.template, self.response_prefix)


@dataclass(frozen=True, slots=True)
class Statistics:
    """The tensors of one class, with shapes and dtypes as in the file."""

    mean: Tensor
    mean_all: Tensor | None = None
    moments: Tensor | None = None
    vectors: Tensor | None = None

    def sample(self, position: int, layer: int, count: int | None) -> Sample:
        """The class at one measured position (its index) and layer. `count` is the number of prompts, if known."""
        return Sample(
            self.mean[position, layer],
            count,
            None if self.vectors is None else self.vectors[position, layer],
            None if self.moments is None else self.moments[position, layer],
        )


@dataclass(frozen=True, slots=True)
class Measurement:
    """A measurement in memory. `problems` lists what is wrong with the measurement."""

    meta: MeasurementMeta
    harmful: Statistics
    harmless: Statistics

    @property
    def layers(self) -> int:
        """The number of measured layers."""
        return self.meta.measured

    def position(self, position: int | None = None) -> int:
        """The index of `position` among the measured positions; 0 by default.

        Raises:
            InvalidInput: the position was not measured.
        """
        if position is None:
            return 0
        if position not in self.meta.positions:
            known = ", ".join(map(str, self.meta.positions))
            raise InvalidInput(f"position {position} was not measured; this measurement has {known}")
        return self.meta.positions.index(position)

    def contrast(self, layer: int, position: int | None = None) -> Contrast:
        """The two classes at one measured layer and position; by default at the first position."""
        at, meta = self.position(position), self.meta
        return Contrast(
            self.harmless.sample(at, layer, meta.harmless.count if meta.harmless else None),
            self.harmful.sample(at, layer, meta.harmful.count if meta.harmful else None),
        )

    def tensors(self) -> dict[str, Tensor]:
        found = {f"{c}_{kind}": getattr(getattr(self, c), kind) for c in CLASSES for kind in KINDS}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def problems(self) -> list[str]:
        """Every rule that the tensors or the metadata break, each as a text that names the tensor."""
        meta, found = self.meta, []
        if meta.measured > meta.model.layers:
            found.append(f"metadata: measured {meta.measured} is more than the model's {meta.model.layers} layers")
        if len(set(meta.positions)) != len(meta.positions):
            found.append(f"metadata: a position is listed twice in {list(meta.positions)}")
        for name, tensor in self.tensors().items():
            label, kind = name.split("_", 1)
            dataset = meta.harmful if label == "harmful" else meta.harmless
            shape = self._shape(kind, dataset.count if dataset else None)
            if shape is None:
                found.append(f"tensor '{name}': vectors of prompts that the metadata does not name")
            elif tensor.dtype != KINDS[kind]:
                dtype, wanted = (str(d).removeprefix("torch.") for d in (tensor.dtype, KINDS[kind]))
                found.append(f"tensor '{name}' has dtype {dtype}, it must be {wanted}")
            elif tuple(tensor.shape) != shape:
                found.append(f"tensor '{name}' has shape {list(tensor.shape)}, it must be {list(shape)}")
            elif not math.isfinite(float(tensor.sum(dtype=torch.float64))):
                found.append(f"tensor '{name}' has values that are not finite")
        return found

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file atomically. Raises InvalidInput if the file could not be read again."""
        InvalidInput.raise_for(self.problems())
        tensors = {name: tensor.contiguous() for name, tensor in self.tensors().items()}
        save_tensors(path, tensors, {"format": "pt", MEASUREMENT_KEY: self.meta.model_dump_json()})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Measurement:
        """Read and check a file. Raises InvalidInput with every problem, each prefixed by the path."""
        metadata, tensors = load_tensors(path)
        problems: list[str] = []
        meta = None
        if MEASUREMENT_KEY not in metadata:
            kind = "a model" if holds_model(tensors) else "another file"
            kind = "a direction" if "steer" in metadata else kind
            raise InvalidInput(f"{path}: this is {kind}; give a measurement, which `steer measure` writes")
        try:
            meta = MeasurementMeta.model_validate_json(metadata[MEASUREMENT_KEY])
        except ValidationError as error:
            problems += [f"metadata: {problem}" for problem in problems_of(error, MEASUREMENT_KEY, MeasurementMeta)]
        known = {f"{c}_{kind}" for c in CLASSES for kind in KINDS}
        problems += [f"tensor '{c}_mean' is missing" for c in CLASSES if f"{c}_mean" not in tensors]
        problems += [f"tensor '{name}' is not known here" for name in sorted(tensors.keys() - known)]
        if meta is not None and not problems:
            made = cls(meta, *(Statistics(**{k: tensors.get(f"{c}_{k}") for k in KINDS}) for c in CLASSES))  # type: ignore[arg-type]
            problems += made.problems()
            if not problems:
                return made
        raise InvalidInput([f"{path}: {problem}" for problem in problems])

    def _shape(self, kind: str, prompts: int | None) -> tuple[int, ...] | None:
        layers, d = self.meta.measured, self.meta.model.d_model
        each = (len(self.meta.positions), layers)
        if kind == "vectors":
            return None if prompts is None else (*each, prompts, d)
        return {"mean": (*each, d), "mean_all": (layers, d), "moments": (*each, d, d)}[kind]


def save_tensors(path: str | os.PathLike[str], tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file of any size atomically, with its metadata keys sorted.

    The file is never in memory as a whole.

    Raises:
        OSError: the file cannot be written.
    """
    with replacing(path) as temporary:
        try:
            save_file(tensors, temporary, metadata)
        except SafetensorError as error:  # with tensors in memory only the writing can fail
            code = int(found[1]) if (found := re.search(r"os error (\d+)", str(error))) else errno.EIO
            raise OSError(code, os.strerror(code), str(path)) from error
        with temporary.open("rb+") as file:
            size = int.from_bytes(file.read(8), "little")
            file.seek(0)
            header = file.read(8 + size)
            ordered = sorted_metadata(header)
            assert len(ordered) == len(header), "the tensors begin where the header ends"
            file.seek(0)
            file.write(ordered)


def load_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Read the metadata and tensors of a safetensors file. Raises InvalidInput if `path` is no such file."""
    if Path(path).is_dir():
        raise InvalidInput(f"{path}: {folder_problem(path)}; give a .safetensors file")
    try:
        open_file(path).close()
        with safe_open(Path(path), framework="pt") as file:
            return file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise InvalidInput(f"{path}: {problem_of_file(path, error)}") from error


@dataclass(frozen=True, slots=True)
class Sample:
    """One class at one layer and position.

    Attributes:
        mean: `[d_model]`.
        count: the number of prompts, if known.
        vectors: each prompt's vector, `[prompts, d_model]`, of any dtype; None if not kept.
        moments: E[xxᵀ], `[d_model, d_model]`, float64; None if not kept.
    """

    mean: Tensor
    count: int | None = None
    vectors: Tensor | None = None
    moments: Tensor | None = None

    @property
    def rows(self) -> Tensor:
        """The vectors of the prompts, `[prompts, d_model]`, float64."""
        assert self.vectors is not None, "a method that reads vectors says so in `needs`"
        return self.vectors.double()

    def deviations(self) -> Tensor:
        """Each prompt's vector minus the mean of the vectors, `[prompts, d_model]`."""
        rows = self.rows
        return rows - rows.mean(0)

    def covariance(self) -> Tensor:
        """The covariance, `[d_model, d_model]`, from the moments; its divisor is the count."""
        assert self.moments is not None
        return self.moments - torch.outer(self.mean, self.mean)

    def of(self, indices: Tensor) -> Sample:
        """The sample of the prompts numbered `indices`, which may contain a prompt several times."""
        assert self.vectors is not None
        some = self.vectors[indices].double()
        return Sample(some.mean(0), len(indices), some)

    def winsorised(self, quantile: float) -> Sample:
        """The sample with each prompt's vector clipped to the `quantile` of its magnitudes."""
        clipped = winsorise(self.rows, quantile)
        return Sample(clipped.mean(0), self.count, clipped)


@dataclass(frozen=True, slots=True)
class Contrast:
    """The two classes at one layer and position."""

    harmless: Sample
    harmful: Sample

    @property
    def difference(self) -> Tensor:
        """The harmful mean minus the harmless mean, `[d_model]`."""
        return self.harmful.mean - self.harmless.mean

    @property
    def vectors(self) -> bool:
        """Whether the prompts' vectors of both classes were kept."""
        return self.harmful.vectors is not None and self.harmless.vectors is not None


def towards_harmful(rows: Tensor, contrast: Contrast) -> Tensor:
    """Return `rows` `[k, d_model]`, each with the sign that puts the harmful mean above the harmless one.

    Raises:
        DegenerateError: the first row does not tell the means apart, so that its sign would be chance.
    """
    along = rows @ contrast.difference
    if float(along[0].abs()) <= MIN_ANGLE * float(torch.linalg.vector_norm(contrast.difference)):
        raise DegenerateError("the result is orthogonal to the difference of the means, so its sign is undefined")
    return torch.where((along < 0)[:, None], -rows, rows)


def principal(rows: Tensor, k: int, what: str) -> Tensor:
    """The k leading right singular vectors of `rows` `[n, d_model]`, as `[k, d_model]`.

    Args:
        what: the beginning of error messages.

    Raises:
        DegenerateError: there are fewer than k, or the k-th and the next are equally strong, so that the choice between
            them would be chance.
    """
    if not 1 <= k <= min(rows.shape):
        raise DegenerateError(f"{what}: rank {k} needs at least as many prompts, there are {rows.shape[0]}")
    _, values, vectors = torch.linalg.svd(rows, full_matrices=False)
    return _leading(vectors, values.square(), k, what)


def principal_of(matrix: Tensor, k: int, what: str) -> Tensor:
    """As `principal`, but from the symmetric Gram matrix of the dimensions, `[d_model, d_model]`."""
    values, vectors = torch.linalg.eigh(matrix)
    return _leading(vectors.flip(1).T, values.flip(0), k, what)


def _leading(vectors: Tensor, values: Tensor, k: int, what: str) -> Tensor:
    """The first k of `vectors`, which are sorted by `values`, the strongest first. Raises as `principal` does."""
    top, floor = float(values[0]), torch.finfo(values.dtype).eps * len(values)
    if not top > 0 or float(values[k - 1]) <= floor * top:
        raise DegenerateError(f"{what}: the activations span fewer than {k} dimensions")
    if k < len(values) and float(values[k - 1] - values[k]) <= floor * top:
        raise DegenerateError(f"{what}: component {k} equals the next in strength, so either would be chance")
    return vectors[:k]
