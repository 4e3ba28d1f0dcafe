"""Tests of the vLLM engine run where vLLM is installed, and are skipped with the reason where it is not."""

from __future__ import annotations

import gc
import importlib.util
import os
from collections.abc import Callable, Generator, Iterator
from typing import Any

import pytest
import torch

from tests.vllm import device

for name, value in device.ENVIRONMENT.items():
    os.environ.setdefault(name, value)
os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

INSTALLED = importlib.util.find_spec("vllm") is not None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = os.path.dirname(__file__)
    for item in items:
        if str(item.path).startswith(here):
            # vLLM and what it imports warn of their own deprecations; their tests are the place to mind them.
            item.add_marker(pytest.mark.filterwarnings("default"))
            if not INSTALLED:
                item.add_marker(pytest.mark.skip(reason="vLLM is not installed"))


#: Which dispatch keys a thread has at its start.
DISPATCH = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol() -> Generator[None, object, object]:
    """Have each test begin with the dispatch keys of the start. PyTorch keeps them for a thread. The objects that
    change them undo it when they are collected: late, if a test before has left one, and then no model can be compiled
    any more."""
    with torch._C._ForceDispatchKeyGuard(*DISPATCH):
        return (yield)


@pytest.fixture(scope="module")
def in_process() -> Iterator[Callable[[Any], Any]]:
    """Keeps engines in this process, which starts them in half the time; `in_process(llm)` ends one."""
    from vllm.distributed import cleanup_dist_env_and_memory

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

        def end(llm: Any) -> None:
            llm.llm_engine.engine_core.shutdown()
            del llm
            gc.collect()
            cleanup_dist_env_and_memory()

        yield end


IN_PROCESS: dict[str, Any] = {"distributed_executor_backend": "uni"}
