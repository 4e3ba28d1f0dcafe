"""`make bench`: every benchmark, one process after the other. Given again, it goes on with what is not there yet.

Each benchmark writes Markdown, JSON and a picture into the folder of results. `all.md` and `all.json` there have the
figures of all of them in one table, and say what is missing and why. A benchmark is measured again when its command,
the machine or a version has changed, or with `--again`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from benchmarks.results import ended_as_by_ctrl_c, machine, typed

GPU, VLLM = "an NVIDIA GPU", "vLLM"


@dataclass(frozen=True, slots=True)
class Benchmark:
    """One process: its module and options, the options of a quick trial, minutes on two CPU cores, what it needs."""

    command: str
    quick: str
    minutes: float
    needs: str = ""

    def argv(self, quick: bool) -> list[str]:
        return f"{self.command} {self.quick if quick else ''}".split()


#: By the name of their results, in the order of docs/benchmarks.md.
BENCHMARKS = {
    "vllm": Benchmark("benchmarks.overhead", "--rounds 2 --orders 1 --workloads decode:1", 38, VLLM),
    "vllm-variants": Benchmark(
        "benchmarks.overhead --suite variants --workloads decode:8 prefill:8",
        "--rounds 2 --orders 1 --workloads decode:1",
        18,
        VLLM,
    ),
    "vllm-modes": Benchmark(
        "benchmarks.overhead --suite modes --rounds 10 --orders 1 --workloads decode:8 prefill:1",
        "--rounds 2 --workloads decode:1",
        6,
        VLLM,
    ),
    "hooks": Benchmark("benchmarks.overhead_hf", "--rounds 2", 2),
    "modes": Benchmark("benchmarks.overhead_hf --suite modes --rounds 12", "--rounds 2", 6),
    "transformers": Benchmark("benchmarks.rivals", "--rounds 2", 6),
    "admission": Benchmark("benchmarks.admission", "", 1),
    "control-plane": Benchmark("benchmarks.control_plane", "--rounds 2", 1),
    "latency": Benchmark("benchmarks.latency", "--samples 2", 5),
    "swap": Benchmark("benchmarks.swap", "--swaps 2", 1),
    "growth": Benchmark("benchmarks.growth", "--repeats 2", 2),
    "measure": Benchmark("benchmarks.measure --rounds 2 --lengths uneven", "", 10),
    "search": Benchmark("benchmarks.search", "--trials 1 --rounds 1 --limit 60", 9),
} | {
    f"gpu-{shape}": Benchmark(f"benchmarks.gpu --shapes {shape}", "--batches 8 --rounds 2 --orders 1", 10, GPU)
    for shape in ("0.5b", "7b")
}


def lacking(needs: str) -> bool:
    return (needs == VLLM and find_spec("vllm") is None) or (needs == GPU and not torch.cuda.is_available())


def measured(folder: Path, name: str) -> Mapping[str, Any] | None:
    path = folder / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def is_done(folder: Path, name: str, argv: Sequence[str], here: str) -> bool:
    """Whether this very command was measured with these versions on this machine."""
    result = measured(folder, name)
    return result is not None and (result["command"], result["made"].partition(", ")[2]) == (typed(argv), here)


def summary(folder: Path, names: Sequence[str], missing: Mapping[str, str]) -> tuple[dict[str, Any], str]:
    """The figures of all results in the folder, as data and as one table."""
    found = {name: result for name in names if (result := measured(folder, name))}
    rows = [
        {"benchmark": name, "workload": table["title"], "arm": arm, **ratio, "made": result["made"]}
        for name, result in found.items()
        for table in result["tables"]
        for arm, ratio in table["arms"].items()
    ]
    lines = ["# All benchmarks", "", *sorted({f"{result['made']}." for result in found.values()}), ""]
    lines += [
        "| benchmark | workload | arm | median ratio | 95 % interval | median ms |",
        "|---|---|---|---:|---:|---:|",
    ]
    lines += [
        f"| [{row['benchmark']}]({row['benchmark']}.md) | {row['workload']} | {row['arm']} | {row['median']:.3f} | "
        f"{row['interval'][0]:.3f} – {row['interval'][1]:.3f} | {1000 * row['seconds']:.2f} |"
        for row in rows
    ]
    lines += [
        f"| [{name}]({name}.md) | {result['title']}: see its page | | | | |"
        for name, result in found.items()
        if not result["tables"]
    ]
    lines += ["", *(f"- {name} is not here: {why}" for name, why in missing.items())]
    pages = {name: {key: result[key] for key in ("title", "command", "made")} for name, result in found.items()}
    return {"pages": pages, "missing": dict(missing), "rows": rows}, "\n".join(lines).rstrip() + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=list(BENCHMARKS), choices=BENCHMARKS)
    parser.add_argument("--again", action="store_true", help="measure also what was measured")
    parser.add_argument("--quick", action="store_true", help="the fewest rounds: whether it runs, no figures to use")
    parser.add_argument("--out", type=Path, help="the folder for results (bench, or bench/quick)")
    given = parser.parse_args(arguments)
    ended_as_by_ctrl_c()
    folder, here = given.out or Path("bench/quick" if given.quick else "bench"), machine()
    missing: dict[str, str] = {}
    left = {}
    for name in given.only:
        if lacking(needs := BENCHMARKS[name].needs):
            missing[name] = f"it needs {needs}"
        elif not given.again and is_done(folder, name, BENCHMARKS[name].argv(given.quick), here):
            print(f"{name}: measured before, into {folder / name}.md", flush=True)
        else:
            left[name] = BENCHMARKS[name]
    for name, why in missing.items():
        print(f"{name}: left out, {why}", flush=True)
    expected = spent = 0.0
    try:
        for number, (name, benchmark) in enumerate(left.items()):
            minutes = sum(one.minutes for one in list(left.values())[number:]) * (spent / expected if expected else 1)
            time_left = "" if given.quick and not expected else f", about {minutes:.0f} minutes left"
            print(f"== {number + 1} of {len(left)}: {name}{time_left}", flush=True)
            began = time.monotonic()
            command = [sys.executable, "-m", *benchmark.argv(given.quick), "--out", str(folder)]
            with subprocess.Popen(command) as process:
                try:
                    code = process.wait()
                except KeyboardInterrupt:  # in a terminal, the child has got it too
                    with suppress(subprocess.TimeoutExpired):
                        process.wait(5)
                    process.terminate()
                    process.wait()
                    raise
            if code:
                missing[name] = f"its command failed with exit code {code}"
            else:
                expected, spent = expected + benchmark.minutes, spent + (time.monotonic() - began) / 60
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        folder.mkdir(parents=True, exist_ok=True)
        unmeasured = {name: "it was not measured yet" for name in left if not measured(folder, name)}
        data, table = summary(folder, given.only, unmeasured | missing)
        (folder / "all.json").write_text(json.dumps(data, indent=1) + "\n")
        (folder / "all.md").write_text(table)
        rest = "; the same command measures the rest" if unmeasured else ""
        print(f"{folder / 'all.md'} has what is there{rest}", flush=True)
    if failed := [name for name in missing if name in left]:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
