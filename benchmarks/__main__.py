"""`make bench`: every benchmark, one process after the other; `python -m benchmarks --only swap growth` runs some.

Each writes Markdown, JSON and a picture into `docs/benchmarks`.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from importlib.util import find_spec

#: In the order of their pages.
BENCHMARKS = {
    "overhead": ["benchmarks.overhead"],
    "variants": ["benchmarks.overhead", "--suite", "variants", "--workloads", "decode:8", "prefill:8"],
    "hooks": ["benchmarks.overhead_hf"],
    "rivals": ["benchmarks.rivals"],
    "admission": ["benchmarks.admission"],
    "control_plane": ["benchmarks.control_plane"],
    "latency": ["benchmarks.latency"],
    "swap": ["benchmarks.swap"],
    "growth": ["benchmarks.growth"],
    "measure": ["benchmarks.measure"],
    "search": ["benchmarks.search"],
}
NEEDS_VLLM = ("overhead", "variants")

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=list(BENCHMARKS), choices=BENCHMARKS)
    failed = []
    for name in parser.parse_args().only:
        if name in NEEDS_VLLM and find_spec("vllm") is None:
            print(f"{name}: left out, vLLM is not installed", flush=True)
            continue
        print(f"== {name}", flush=True)
        if subprocess.run([sys.executable, "-m", *BENCHMARKS[name]]).returncode:
            failed.append(name)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")
