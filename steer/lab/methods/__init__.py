"""Methods: how a direction is made from the two classes at a layer. A new method is a class in a module of this folder
and an entry of `METHODS`."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from importlib import import_module
from importlib.resources import files
from typing import TYPE_CHECKING

from pydantic import ValidationError

from steer.errors import InvalidInput, problems_of

if TYPE_CHECKING:
    from steer.lab.methods.base import Method


class Methods(Mapping[str, "type[Method]"]):
    """The classes of methods by name, which is the class's in lower case. A class is imported when it is asked for: the
    command line lists the methods and must not wait for torch."""

    def __init__(self, *paths: str) -> None:
        self._paths = {path.rpartition(".")[2].lower(): path for path in paths}

    def __getitem__(self, name: str) -> type[Method]:
        module, _, kind = self._paths[name].rpartition(".")
        return getattr(import_module(f"{__name__}.{module}"), kind)

    def __iter__(self) -> Iterator[str]:
        return iter(self._paths)

    def __len__(self) -> int:
        return len(self._paths)

    def summaries(self) -> dict[str, str]:
        """The first line of each class's docstring by name, read from the source without importing it."""
        modules = sorted({path.rpartition(".")[0] for path in self._paths.values()})
        told = {
            f"{module}.{node.name}": (ast.get_docstring(node) or "").partition("\n")[0]
            for module in modules
            for node in ast.parse(files(__name__).joinpath(f"{module}.py").read_text("utf-8")).body
            if isinstance(node, ast.ClassDef)
        }
        return {name: told[path] for name, path in self._paths.items()}


METHODS = Methods(
    "means.Slerp",
    "means.Linear",
    "means.Projected",
    "means.Biprojected",
    "subspaces.Pca",
    "boundaries.Whitened",
    "boundaries.Logistic",
    "subspaces.Subspace",
    "subspaces.Cone",
)


def make_method(name: str, parameters: Mapping[str, object] | None = None) -> Method:
    """Return the method `name` with `parameters` (values may be texts). Raise InvalidInput naming what is accepted."""
    if name not in METHODS:
        raise InvalidInput(f"method '{name}' is not known; accepted: {', '.join(METHODS)}")
    kind = METHODS[name]
    try:
        return kind.model_validate(dict(parameters or {}))
    except ValidationError as error:
        accepted = ", ".join(kind.model_fields) or "none"
        raise InvalidInput(
            f"method '{name}': parameter {problem}; its parameters: {accepted}"
            for problem in problems_of(error, "of no name", kind)
        ) from error
