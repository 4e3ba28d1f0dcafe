"""What tests of the lab share."""

from __future__ import annotations

from pathlib import Path

import pytest

from steer.hf.load import Loaded, load


@pytest.fixture(scope="module")
def loaded(tiny_folder: Path) -> Loaded:
    """The tiny model, which a module's tests may steer: each has its own."""
    return load(str(tiny_folder))
