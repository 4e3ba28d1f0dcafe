"""The one place where a pickled file is read: tensors and plain values only, and only in the offline tool."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch

from steer.errors import InvalidInput


def load_pickled(path: Path) -> Any:
    """What torch saved in `path`. `weights_only` refuses every file that would run code. Raises InvalidInput."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, OSError, EOFError, ValueError, KeyError) as error:
        raise InvalidInput(
            f"{path}: cannot be read as a file of tensors (anything else in it is refused): {str(error)[:200]}"
        ) from error
