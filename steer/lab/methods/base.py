"""The interface of a method, which makes the rows of a direction from the two classes at one layer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Literal

from pydantic import BaseModel
from torch import Tensor

from steer.lab.measurement import Contrast

#: What a method reads. "means": only the class means. "spread": also how the prompts spread around the means (the
#: prompts' vectors, or the second moments). "vectors": the prompts' own vectors.
Need = Literal["means", "spread", "vectors"]


class Method(BaseModel, ABC, extra="forbid", frozen=True, allow_inf_nan=False):
    """A method with its parameters. The parameters are the fields, and are written to the direction's metadata."""

    #: The class's name in lower case.
    name: ClassVar[str]
    needs: ClassVar[Need] = "means"
    #: The least number of prompts in each class.
    prompts: ClassVar[int] = 1

    @classmethod
    def __pydantic_init_subclass__(cls, **_options: object) -> None:
        cls.name = cls.__name__.lower()

    @abstractmethod
    def rows(self, contrast: Contrast) -> Tensor:
        """Orthonormal rows `[k, d_model]`, float64, each with the harmful mean on its positive side. The rows never
        have NaN. Raises DegenerateError if the classes define no rows."""

    def onto(self, rows: Tensor, target: Contrast) -> Tensor:
        """The rows for another layer, whose classes are `target`, made from the `rows` of the source layer."""
        return rows

    @property
    def varies(self) -> bool:
        """Whether the rows differ between layers (see `onto`)."""
        return type(self).onto is not Method.onto

    @property
    def bisects(self) -> bool:
        """Whether a component of 0 separates the classes by construction. If it does, ρ of `one_sided` is 0."""
        return False
