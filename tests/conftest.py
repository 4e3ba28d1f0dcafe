"""What all tests share. One thread for torch: the models are tiny, and threads of several tests would only wait."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import torch

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
torch.set_num_threads(1)

# The same examples at every run, so that what fails was changed; `STEER_EXPLORE=1 make test` looks for others. A busy
# machine is no fault of an example.
hypothesis.settings.register_profile("steer", derandomize=not os.environ.get("STEER_EXPLORE"), deadline=None)
hypothesis.settings.load_profile("steer")

from tests import models  # noqa: E402
from tests.servers import Server  # noqa: E402
from tests.vllm import device  # noqa: E402

for name, value in device.share(os.environ).items():
    os.environ.setdefault(name, value)

#: Modules of a few long tests come first: at the end one process would run them while the others have nothing to do.
LONG = {
    *("test_smollm2.py", "test_readme.py"),
    *("test_equal.py", "test_launch.py", "test_runners.py", "test_server.py", "test_writers.py"),
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in LONG)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama with tokenizer and chat template, as a local folder."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    models.save("llama", folder)
    return folder


@pytest.fixture(scope="session")
def tiny_server(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server on the tiny model with the random directions `refusal` and `verbosity`."""
    folder = tmp_path_factory.mktemp("directions")
    model = models.tiny("llama")
    for seed, name in enumerate(("refusal", "verbosity"), 1):
        models.direction(model, seed=seed).save(folder / f"{name}.safetensors")
    with Server(str(tiny_folder), "--directions", str(folder), "--max-requests", "512", directions=folder) as server:
        yield server
