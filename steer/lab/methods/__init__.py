"""Methods: how a direction is made from the two classes at a layer. A new method is one file and its line here."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import ValidationError

from steer.errors import InvalidInput, problems_of
from steer.lab.methods.base import Method
from steer.lab.methods.boundaries import Logistic, Whitened
from steer.lab.methods.means import Biprojected, Linear, Projected, Slerp
from steer.lab.methods.subspaces import Cone, Pca, Subspace

METHODS: dict[str, type[Method]] = {
    method.name: method for method in (Slerp, Linear, Projected, Biprojected, Pca, Whitened, Logistic, Subspace, Cone)
}


def make_method(name: str, parameters: Mapping[str, object] | None = None) -> Method:
    """The method `name` with `parameters` (values may be texts). Raises InvalidInput naming what would be accepted."""
    if name not in METHODS:
        raise InvalidInput(f"method '{name}' is not known; accepted: {', '.join(METHODS)}")
    kind = METHODS[name]
    try:
        return kind.model_validate(dict(parameters or {}))
    except ValidationError as error:
        accepted = ", ".join(kind.model_fields) or "none"
        raise InvalidInput(
            f"method '{name}': parameter {problem}; its parameters: {accepted}"
            for problem in problems_of(error, "of no name")
        ) from error


__all__ = ["METHODS", "Method", "make_method"]
