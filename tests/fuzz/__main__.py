"""`python -m tests.fuzz`: the full budgets. Every pure parser together gets `--inputs`, the HTTP routes `--requests`.

Ends with exit code 1 where anything was found.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
import warnings

import torch
from tqdm import tqdm

from tests.fuzz import SURFACES, routes
from tests.fuzz.surface import Outcome, run


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--inputs", type=int, default=1_000_000, help="inputs of all pure parsers together")
    parser.add_argument("--requests", type=int, default=50_000, help="requests to the routes")
    parser.add_argument("--vllm", type=int, default=20_000, help="requests to vLLM's server, where it is installed")
    parser.add_argument("--first", type=int, default=0, help="number of each surface's first input")
    parser.add_argument("--only", nargs="*", help="surfaces to run, among: " + ", ".join(s.name for s in SURFACES))
    given = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")  # of Python's own `re`, for odd patterns
    surfaces = [s for s in SURFACES if not given.only or s.name in given.only]
    share, bad = given.inputs // len(surfaces), 0
    for surface in surfaces if share else ():
        started, outcome = time.monotonic(), Outcome()
        with tqdm(total=share, desc=surface.name, mininterval=5) as bar:
            run(surface, range(given.first, given.first + share), outcome, bar.update)
        bad += report(surface.name, outcome, time.monotonic() - started)
    if given.requests:
        started = time.monotonic()
        bad += report("routes", routes.run(given.requests), time.monotonic() - started)
    if given.vllm and routes.has_vllm():
        started = time.monotonic()
        bad += report("vllm", routes.run_vllm(given.vllm), time.monotonic() - started)
    return 1 if bad else 0


def report(name: str, outcome: Outcome, seconds: float) -> int:
    print(name, json.dumps(dict(outcome.counts)), f"{seconds:.0f} s", flush=True)
    for kind, shown in outcome.findings.items():
        print(f"  {kind}\n{shown}", flush=True)
    return len(outcome.findings)


if __name__ == "__main__":
    sys.exit(main())
