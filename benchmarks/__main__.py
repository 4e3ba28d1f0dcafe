"""`make bench`: run the benchmarks and print Markdown. `python -m benchmarks --rounds 10` is quicker and noisier."""

from __future__ import annotations

import argparse
from datetime import date

from benchmarks import control_plane, measure, overhead_hf
from benchmarks.timing import machine

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=40)
    rounds = parser.parse_args().rounds
    print(f"{date.today()}, {machine()}\n\n{overhead_hf.report(rounds)}")
    print(control_plane.report(rounds))
    print(measure.report(max(3, rounds // 4)))
