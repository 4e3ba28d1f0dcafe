"""`steer eval` through vLLM finds what it finds through transformers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from steer.demo import PROMPTS
from tests.servers import ROOT
from tests.vllm import device

pytest.importorskip("vllm")
COUNT = 12


def report(folder: Path, backend: str, *more: str) -> dict[str, Any]:
    sets = []
    for option, file in (("--harmful", "refused.test.txt"), ("--harmless", "harmless.test.txt")):
        path = folder / file
        path.write_text("\n".join((PROMPTS / file).read_text().splitlines()[:COUNT]))
        sets += [option, str(path)]
    text = folder / "text.txt"
    text.write_text("\n".join((PROMPTS / "text.test.txt").read_text().splitlines()[:COUNT]))
    command = [sys.executable, "-m", "steer", "eval", "steer/demo/model", *sets, "--backend", backend, "--text"]
    command += [
        str(text),
        "--direction",
        "directions/refusal.safetensors",
        "--expected",
        str(PROMPTS / "expected.jsonl"),
    ]
    done = subprocess.run(
        [*command, "--max-tokens", "48", "--dtype", "float32", "--report", str(folder / backend), *more],
        capture_output=True,
        text=True,
        timeout=1500,
        cwd=ROOT,
        env=os.environ | device.ENVIRONMENT,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    found: dict[str, Any] = json.loads((folder / backend / "report.json").read_text())
    return found


def test_outcomes_and_perplexity_are_those_of_transformers(tmp_path: Path) -> None:
    ours = report(tmp_path, "vllm", "--max-model-len", "512", "--enforce-eager", *device.ARGUMENTS)
    theirs = report(tmp_path, "transformers")
    for one, other in zip(ours["sets"], theirs["sets"], strict=True):
        for arm, same in zip(one["arms"], other["arms"], strict=True):
            for figure in ("shown", "degenerate", "complied", "right"):
                assert abs(arm[figure]["hits"] - same[figure]["hits"]) <= 1, (one["name"], arm["arm"], figure)
    plain, steered = ours["sets"][0]["arms"]
    assert plain["shown"]["hits"] == COUNT
    assert steered["right"]["hits"] >= COUNT - 1
    for arm, same in zip(ours["text"]["arms"], theirs["text"]["arms"], strict=True):
        assert arm["perplexity"] == pytest.approx(same["perplexity"], rel=1e-2)
    assert ours["divergence"][0]["mean"] < 1e-3
