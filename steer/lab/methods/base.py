"""The interface of a method: from the two classes at one layer to the rows of its direction."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Literal

from pydantic import BaseModel
from torch import Tensor

from steer.lab.measurement import Contrast

#: What a method reads: the class means alone; how the prompts spread around them (their vectors, or the second
#: moments); the prompts' own vectors.
Need = Literal["means", "spread", "vectors"]


class Method(BaseModel, ABC, extra="forbid", frozen=True, allow_inf_nan=False):
    """A method with its parameters, which are its fields. They go into the direction's metadata."""

    #: The class's name in lower case.
    name: ClassVar[str]
    needs: ClassVar[Need] = "means"
    #: Prompts that each class must have at least.
    prompts: ClassVar[int] = 1

    @classmethod
    def __pydantic_init_subclass__(cls, **_options: object) -> None:
        cls.name = cls.__name__.lower()

    @abstractmethod
    def rows(self, contrast: Contrast) -> Tensor:
        """Orthonormal rows `[k, d_model]`, float64, each with the harmful mean on its positive side. Raises
        DegenerateError where the classes define none; never gives NaN."""

    def onto(self, rows: Tensor, target: Contrast) -> Tensor:
        """What the `rows` of the source layer become at another layer with the classes `target`."""
        return rows

    @property
    def varies(self) -> bool:
        """Are its rows other ones at other layers than the source's?"""
        return type(self).onto is not Method.onto

    @property
    def bisects(self) -> bool:
        """Does a component of 0 separate the classes by construction? Then that is ρ of `one_sided`."""
        return False
