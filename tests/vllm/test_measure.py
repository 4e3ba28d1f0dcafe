"""Measuring through vLLM: the means of its own passes are those of transformers, and `steer fit` takes them."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from steer.direction import Direction
from steer.hf.load import load
from steer.lab.measure import MeasurementOptions, measure
from steer.lab.prompts import PromptSet
from steer.lab.source import TransformersSource
from tests.vllm import device, tiny

ROOT = Path(__file__).parents[2]
PROMPTS = ROOT / "steer/demo/prompts"
RANKS = "1" if device.GPUS == 1 else "2"


def prompts(name: str, seed: int, count: int = 20) -> PromptSet:
    choose = random.Random(seed)
    texts = ["".join(choose.choices("abcdefgh ", k=choose.randrange(3, 90))) + name for _ in range(count)]
    return PromptSet(name, "", tuple(texts))


def distance(a: Tensor, b: Tensor) -> float:
    return float(((a - b).norm(dim=-1) / b.norm(dim=-1)).max())


@pytest.mark.parametrize(("name", "dtype"), [("llama", "float32"), ("gemma3", "float32"), ("llama", "bfloat16")])
def test_means_and_vectors_are_those_of_transformers(
    name: str, dtype: str, tmp_path: Path, in_process: Callable[[Any], None]
) -> None:
    """With prompts longer than a step, so that they come in chunks beside each other. In bfloat16 both are as far from
    the truth as its rounding takes them."""
    from steer.vllm.offline import VllmSource, start

    tiny.make(name, tmp_path)
    sets = prompts("x", 1), prompts("y", 2)
    conditions = MeasurementOptions((-1, 2), last_layer=1, vectors=True)
    expected = measure(TransformersSource(load(str(tmp_path), dtype="float32")), *sets, conditions)
    limit = 1e-4
    if dtype != "float32":
        rounded = measure(TransformersSource(load(str(tmp_path), dtype=dtype)), *sets, conditions)
        limit = 2 * distance(rounded.harmful.mean, expected.harmful.mean)
    llm = start(
        str(tmp_path),
        [
            *("--dtype", dtype, "--max-model-len", "256", "--max-num-batched-tokens", "48", "--max-num-seqs", "16"),
            *("--distributed-executor-backend", "uni"),
            *device.ARGUMENTS,
        ],
    )
    try:
        source = VllmSource(llm, str(tmp_path))
        found = measure(source, *sets, conditions, batch_size=8)
        assert source.fingerprint() == source.fingerprint()
    finally:
        in_process(llm)
    assert found.meta.model.layers == expected.meta.model.layers
    assert found.meta.bos_count == expected.meta.bos_count
    for one, other in ((found.harmful, expected.harmful), (found.harmless, expected.harmless)):
        assert distance(one.mean, other.mean) < limit
        assert one.mean_all is not None
        assert other.mean_all is not None
        assert one.vectors is not None
        assert other.vectors is not None
        assert distance(one.mean_all, other.mean_all) < limit
        assert distance(one.vectors.double(), other.vectors.double()) < 3 * max(limit, 1e-2)  # kept in bfloat16


GIVEN = ("--method", "slerp", "--t", "0.5", "--threshold", "0.25", "--target", "0", "--limit", "64", "--layer", "6")


def test_fit_through_vllm_makes_the_direction_that_transformers_makes(tmp_path: Path) -> None:
    """The embedded model, on two ranks where there are two devices. There is one candidate: KL is an estimate on vLLM,
    and may order candidates that are close another way."""
    sets = ["--harmful", str(PROMPTS / "refused.train.txt"), "--harmless", str(PROMPTS / "harmless.train.txt")]
    made = {}
    for backend, more in (
        ("transformers", []),
        ("vllm", ["--max-model-len", "512", "--tensor-parallel-size", RANKS, *device.ARGUMENTS]),
    ):
        file = tmp_path / f"{backend}.safetensors"
        command = [sys.executable, "-m", "steer", "fit", "steer/demo/model", *sets, "--backend", backend]
        done = subprocess.run(
            [*command, "-o", str(file), *GIVEN, "--dtype", "float32", *more],
            capture_output=True,
            text=True,
            timeout=1500,
            cwd=ROOT,
            env=os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_CPU_OMP_THREADS_BIND": "0|1"},
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        made[backend] = Direction.load(file)
    ours, theirs = made["vllm"], made["transformers"]
    (row,), (other,) = (one.meta.selection["candidates"] for one in (ours, theirs))
    assert row["log_odds"] == pytest.approx(other["log_odds"], abs=0.05)
    assert abs(row["refused"] - other["refused"]) <= 1 / 16
    assert ours.meta.selection["refused_plain"] == theirs.meta.selection["refused_plain"]
    assert ours.meta.harmful == theirs.meta.harmful
    assert ours.meta.source_layer == theirs.meta.source_layer
    cosine = torch.einsum("lkd,lkd->l", ours.directions, theirs.directions)
    assert float(cosine.min()) > 0.9999
