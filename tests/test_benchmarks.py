"""`make bench` measures what is missing, keeps what is there, and says why something is missing."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch

from benchmarks import __main__ as bench
from benchmarks.growth import Case
from benchmarks.results import Ratio, Result, Table, machine, processor, typed
from tests.servers import ROOT
from tests.waiting import eventually


def run(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks", "--quick", "--out", str(folder), *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1500)


def test_a_command_is_told_without_the_folder_of_results() -> None:
    assert typed(["benchmarks.swap", "--swaps", "2", "--out", "x"]) == "python -m benchmarks.swap --swaps 2"
    assert typed(["benchmarks.rivals.__main__", "--out", "x"]) == "python -m benchmarks.rivals"


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_the_formula_of_memory_is_what_is_held(rank: int) -> None:
    case = Case(layers=3, width=32, rows=5, rank=rank, tokens=7)
    size, _, _ = case.run(repeats=1)
    assert size == case.expected_bytes()


def test_it_goes_on_where_it_was(tmp_path: Path) -> None:
    first = run(tmp_path, "--only", "admission", "gpu-7b")
    assert first.returncode == 0, first.stderr
    assert "== 1 of 1: admission" in first.stdout
    second = run(tmp_path, "--only", "admission", "gpu-7b")
    assert "admission: measured before" in second.stdout
    assert "==" not in second.stdout
    if not torch.cuda.is_available():
        assert "gpu-7b: left out, it needs an NVIDIA GPU" in second.stdout
        assert json.loads((tmp_path / "all.json").read_text())["missing"] == {"gpu-7b": "it needs an NVIDIA GPU"}
    assert "[admission](admission.md)" in (tmp_path / "all.md").read_text()


def test_what_is_ended_ends_what_it_has_started(tmp_path: Path) -> None:
    """By SIGTERM too, as a job runner sends it, and where a shell has it ignore Ctrl-C in the background."""
    command = [sys.executable, "-m", "benchmarks", "--quick", "--out", str(tmp_path), "--only", "swap"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            asked = psutil.Process(process.pid)
            eventually(lambda: len(asked.children(recursive=True)) > 1, 300)
            started = asked.children(recursive=True)
            process.terminate()
            said, _ = process.communicate(timeout=120)
        finally:
            process.kill()
    assert process.returncode == 130
    assert "the same command measures the rest" in said
    _, left = psutil.wait_procs(started, timeout=60)
    assert not left, [each.name() for each in left]


def test_what_has_changed_is_measured_again(tmp_path: Path) -> None:
    argv = bench.BENCHMARKS["hooks"].argv(quick=True)
    result = Result("hooks", "Hooks", {}, [], command=typed(argv))
    assert not bench.is_done(tmp_path, "hooks", argv, machine())
    result.save(tmp_path)
    assert bench.is_done(tmp_path, "hooks", argv, machine())
    assert not bench.is_done(tmp_path, "hooks", bench.BENCHMARKS["hooks"].argv(quick=False), machine())
    assert not bench.is_done(tmp_path, "hooks", argv, machine().replace(processor(), "another processor"))


def test_all_figures_stand_in_one_table(tmp_path: Path) -> None:
    ratio = Ratio(1.5, 1.4, 1.6, (1.3, 1.7), 0.002, (1.5, 1.5))
    tables = [Table(title, {"plain": replace(ratio, median=1.0), "steered": ratio}) for title in ("decode", "prefill")]
    Result("hooks", "Hooks", {}, tables, command="python -m benchmarks.overhead_hf").save(tmp_path)
    data, text = bench.summary(tmp_path, ["hooks", "swap"], {"swap": "it was not measured yet"})
    assert [(row["workload"], row["arm"], row["median"]) for row in data["rows"]] == [
        ("decode", "plain", 1.0),
        ("decode", "steered", 1.5),
        ("prefill", "plain", 1.0),
        ("prefill", "steered", 1.5),
    ]
    assert "| [hooks](hooks.md) | decode | steered | 1.500 | 1.300 – 1.700 | 2.00 |" in text
    assert "- swap is not here: it was not measured yet" in text


def test_a_benchmark_that_fails_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setitem(bench.BENCHMARKS, "swap", bench.Benchmark("benchmarks.nothing", "", 1))
    with pytest.raises(SystemExit, match="failed: swap"):
        bench.main(["--only", "swap", "--out", str(tmp_path)])
    assert "swap is not here: its command failed" in (tmp_path / "all.md").read_text()
