"""The device that vLLM runs on here, and what every engine of the tests is told because of it, in one place.

Tests compare with transformers in float32 on the CPU. A GPU can agree with that to the same tolerance, where its
arithmetic is float32's: cuBLAS's is unless it is told otherwise, and Triton's dot products (attention, experts) take
TF32 unless `TRITON_F32_DEFAULT` says `ieee`, which made plain answers differ by 1e-2.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch

GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0
#: The model runner that vLLM takes by itself.
RUNNER = "V2" if GPUS else "V1"
#: On a GPU an engine takes nearly all of its memory unless it is told otherwise, and no other one starts beside it, or
#: behind it in the same process. With a fixed size of the cache nothing is measured, so that several may start at once.
MEMORY: dict[str, Any] = {"gpu_memory_utilization": 0.05, "kv_cache_memory_bytes": 2**28} if GPUS else {}
#: The same for a command line.
ARGUMENTS = [word for name, value in MEMORY.items() for word in (f"--{name.replace('_', '-')}", str(value))]
ENVIRONMENT = {"TRITON_F32_DEFAULT": "ieee"} if GPUS else {"VLLM_CPU_KVCACHE_SPACE": "1"}


def share(environment: Mapping[str, str]) -> dict[str, str]:
    """Of several processes of pytest-xdist each has its engines on cores of its own, where there are as many: vLLM
    would bind the threads of all of them to all cores, and they wait for each other in turns."""
    number, count = environment.get("PYTEST_XDIST_WORKER", ""), int(environment.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    cores = sorted(os.sched_getaffinity(0))
    if GPUS or not number or len(cores) < count:
        return {}
    mine = cores[int(number.removeprefix("gw")) :: count]
    return {"VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, mine))}
