"""On a GPU: what is captured in CUDA graphs steers when it is replayed, in each of vLLM's graph modes.

The reference is stock vLLM on the same device: plain requests are what it says of the same weights, and requests from
which a direction is removed are what it says of a copy whose weights were orthogonalised. Neither needs another
implementation to do its arithmetic as that device does. Modes that no edit of weights expresses are compared with
transformers, as everywhere.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import combinations
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from tests import models, oracle
from tests.servers import ROOT
from tests.vllm import device
from tests.vllm.engines import SPECS, TOLERANCE, Home, Reference, are_likeliest
from tests.vllm.run_gpu import STEPS, STOCK, Said

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not device.GPUS, reason="needs an NVIDIA GPU: CUDA graphs exist nowhere else"),
]

MODES = ("FULL", "PIECEWISE", "FULL_AND_PIECEWISE")
#: Engines that start at once.
TOGETHER = 4


class Runs:
    """All engines of this file, each in a process of its own, and what they said."""

    def __init__(self, folder: Path, pool: ThreadPoolExecutor) -> None:
        self.folder, self.home = folder, Home.make("llama", folder)
        for seed, version in ((11, "first"), (12, "second")):
            made = models.direction(self.home.model, seed=seed, shared=True, embedding=True, sites=("writers",))
            (folder / version).write_bytes(made.to_bytes())
            for name, (spec, of) in STOCK.items():
                if of == version:
                    edited = oracle.orthogonalised(self.home.model, made.directions[0, 0], 0.5 if "=" in spec else 1.0)
                    self._save(edited, name)
        self._save(self.home.model, "plain")
        started = [*([mode] for mode in MODES), *(["stock", name] for name in STOCK)]
        self._said: dict[str, Future[list[Said]]] = {each[-1]: pool.submit(self._run, *each) for each in started}

    def _save(self, model: Any, name: str) -> None:
        model.save_pretrained(self.folder / f"{name}.stock")
        AutoTokenizer.from_pretrained(self.home.folder).save_pretrained(self.folder / f"{name}.stock")

    def _run(self, *engine: str) -> list[Said]:
        done = subprocess.run(
            [sys.executable, "-m", "tests.vllm.run_gpu", str(self.folder), *engine],
            env=os.environ | ({"VLLM_PLUGINS": ""} if engine[0] == "stock" else {}),
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=1500,
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(engine)}:\n{done.stdout[-2000:]}{done.stderr[-6000:]}")
        return [Said(**each) for each in json.loads((self.folder / f"{engine[-1]}.json").read_text())]

    def of(self, mode: str, part: str) -> list[Said]:
        return [said for said in self._said[mode].result() if said.part == part]

    def stock(self) -> Mapping[tuple[str, int], Said]:
        """By name of the weights and number of the prompt."""
        return {(name, said.prompt): said for name in STOCK for said in self._said[name].result()}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with ThreadPoolExecutor(TOGETHER) as pool:
        yield Runs(tmp_path_factory.mktemp("gpu"), pool)


@pytest.fixture(scope="module")
def reference(runs: Runs) -> Reference:
    return Reference(runs.home)


def weights(said: Said) -> str:
    """The name of the weights that say the same."""
    if said.spec == "off":
        return "plain"
    return next(name for name, (spec, version) in STOCK.items() if (spec, version) == (said.spec, said.version))


def same(said: Said, expected: Said) -> None:
    count = len(said.tokens)
    assert said.tokens == expected.tokens[:count], f"{said.part}, {said.spec} by {said.version}: other tokens"
    error = max(abs(a - b) for a, b in zip(said.logprobs, expected.logprobs, strict=False))
    assert error < TOLERANCE, f"{said.part}, {said.spec} by {said.version}: log-probabilities are off by {error:.1e}"


def as_transformers_says(said: Said, reference: Reference) -> None:
    expected = reference.logprobs(said.ids + said.tokens, said.spec)[len(said.ids) - 1 : -1]
    assert are_likeliest(said.tokens, expected), f"{said.spec}: other tokens"
    error = (expected[range(len(said.tokens)), said.tokens] - torch.tensor(said.logprobs)).abs().max().item()
    assert error < TOLERANCE, f"{said.spec}: log-probabilities are off by {error:.1e}"


def test_what_is_removed_shows(runs: Runs) -> None:
    """Else the tests below would compare plain answers with plain ones."""
    found = runs.stock()
    for prompt in (0, 1):
        first = [found[name, prompt].logprobs[0] for name in STOCK]
        assert min(abs(a - b) for a, b in combinations(first, 2)) > 10 * TOLERANCE, first


@pytest.mark.parametrize("mode", MODES)
def test_plain_and_ablated_requests_are_what_stock_vllm_says(mode: str, runs: Runs) -> None:
    stock = runs.stock()
    found = [said for said in runs.of(mode, "together") if said.spec.startswith(("off", "swapped"))]
    assert {weights(said) for said in found if said.version == "first"} == {"plain", "first", "half"}
    for said in found:
        if (said.spec, said.version) != ("swapped=0.5", "second"):
            same(said, stock[weights(said), said.prompt])


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_is_what_transformers_says(mode: str, runs: Runs, reference: Reference) -> None:
    found = [said for said in runs.of(mode, "together") if said.spec in SPECS]
    assert len(found) == 2 * 2 * len(SPECS)
    for said in found:
        as_transformers_says(said, reference)


@pytest.mark.parametrize("mode", MODES)
def test_each_token_follows_its_own_row_when_a_row_of_its_batch_changes(
    mode: str, runs: Runs, reference: Reference
) -> None:
    stock = runs.stock()
    found = runs.of(mode, "changing")
    assert len(found) == 5
    for said in found:
        if said.spec == "refusal":
            as_transformers_says(said, reference)
        else:
            same(said, stock[weights(said), said.prompt])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("part", ["together", "changing"])
def test_graphs_are_replayed(mode: str, part: str, runs: Runs) -> None:
    """A decode step is one graph where all of it is captured, else one for each piece between attentions."""
    steps = runs.of(mode, part)[-1].replays
    assert len(steps) >= STEPS
    usual = median(steps)
    if mode == "PIECEWISE":
        assert usual > 1, steps
    else:
        assert usual == 1, steps
    if mode == "FULL_AND_PIECEWISE":
        assert max(steps) > 1, f"prompts are not run in pieces: {steps}"
