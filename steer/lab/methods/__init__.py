"""Methods: each makes a direction from the two classes at a layer. A new method needs a class in a module of this
folder and an entry of `METHODS`."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from importlib import import_module
from importlib.resources import files
from typing import TYPE_CHECKING

from pydantic import ValidationError

from steer.errors import InvalidInput, problems_of

if TYPE_CHECKING:
    from steer.lab.methods.base import Method


#: The module and class of each method, by the method's name. A class is imported when it is asked for, because the
#: command line lists the methods and must not wait for torch.
METHODS = {
    "slerp": "means.Slerp",
    "linear": "means.Linear",
    "projected": "means.Projected",
    "biprojected": "means.Biprojected",
    "pca": "subspaces.Pca",
    "whitened": "boundaries.Whitened",
    "logistic": "boundaries.Logistic",
    "subspace": "subspaces.Subspace",
    "cone": "subspaces.Cone",
}


def class_of(name: str) -> type[Method]:
    module, _, kind = METHODS[name].rpartition(".")
    return getattr(import_module(f"{__name__}.{module}"), kind)


def summaries() -> dict[str, str]:
    """The first line of each class's docstring, by the method's name. It is read from the source code, so that no
    class is imported."""
    lines = {
        f"{module}.{node.name}": (ast.get_docstring(node) or "").partition("\n")[0]
        for module in sorted({path.rpartition(".")[0] for path in METHODS.values()})
        for node in ast.parse(files(__name__).joinpath(f"{module}.py").read_text("utf-8")).body
        if isinstance(node, ast.ClassDef)
    }
    return {name: lines[path] for name, path in METHODS.items()}


def make_method(name: str, parameters: Mapping[str, object] | None = None) -> Method:
    """Return the method `name` with `parameters` (values may be texts). Raise InvalidInput naming what is accepted."""
    if name not in METHODS:
        raise InvalidInput(f"method '{name}' is not known; accepted: {', '.join(METHODS)}")
    kind = class_of(name)
    try:
        return kind.model_validate(dict(parameters or {}))
    except ValidationError as error:
        problems = problems_of(error, "of no name", kind)
        raise InvalidInput(f"method '{name}': parameter {problem}" for problem in problems) from error
