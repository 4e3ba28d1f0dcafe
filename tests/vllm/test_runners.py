"""The same answers from every way of running a model: V1 eager, V2, tensor and pipeline parallel, with drafts that the
steered model verifies; models that vLLM serves through transformers' own code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.vllm import device

ROOT = Path(__file__).parents[2]
V1 = {"VLLM_USE_V2_MODEL_RUNNER": "0"}
V2 = {"VLLM_USE_V2_MODEL_RUNNER": "1"}
#: What lets it start on a CPU, in the process that has it warm up as on a GPU.
INTERPRETED = {
    "TRITON_INTERPRET": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "PYTHONPATH": os.pathsep.join(
        [str(Path(__file__).parent / "v2_on_cpu"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    ),
}
TWO = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}

DRAFTS = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}

WAYS: dict[str, tuple[dict[str, str], dict[str, Any]]] = {
    "V1 eager": (V1, {"enforce_eager": True, "runner": "V1"}),
    "V2 eager": (V2, {"enforce_eager": True, "runner": "V2"}),
    "tensor parallel": (TWO, {"tensor_parallel_size": 2, "enforce_eager": True}),  # compiled in `test_launch`
    "pipeline parallel": (TWO, {"pipeline_parallel_size": 2}),
    "transformers' code": ({}, {"model": "gpt_neox"}),
    # never beside other engines: what proposes drafts leaves objects that the next engine's start trips over
    "drafts": ({}, {"speculative_config": DRAFTS, "disable_log_stats": False, "enforce_eager": True}),
}


@pytest.mark.parametrize("way", WAYS)
def test_it_answers_as_transformers_does(way: str, tmp_path: Path) -> None:
    environment, options = WAYS[way]
    if environment is TWO and device.GPUS == 1:
        pytest.skip("two ranks need two GPUs")
    if environment is V2 and not device.GPUS:
        pytest.importorskip("triton", reason="the V2 runner needs Triton")
        environment, options = V2 | INTERPRETED, options | {"warms_up": True, "max_num_seqs": 8}
    done = subprocess.run(
        [sys.executable, "-m", "tests.vllm.run_equal", str(tmp_path), json.dumps(options)],
        env=os.environ | environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert "EQUAL" in done.stdout, done.stdout[-2000:] + done.stderr[-6000:]
