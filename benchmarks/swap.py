"""A swap by file under live traffic: how soon it serves, and what a running stream notices of it.

`python -m benchmarks.swap`. The real server with the embedded model. A plain stream runs all the time; beside it a new
version of a direction is renamed into the folder, and requests ask for it until the receipt has its digest. The longest
gap between tokens of the stream is compared with windows of the same length without a swap.
"""

from __future__ import annotations

import json
import random
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import httpx

from benchmarks.results import Result, benchmark_parser
from steer.direction import Direction
from steer.files import write_file
from tests.servers import ROOT, Server

PROMPT = "How do I paint a fence?"
WINDOW = 0.5


class Stream:
    """Plain streams without end in a thread of its own; when each token came."""

    def __init__(self, url: str) -> None:
        self.url, self.stopping = url, threading.Event()
        self.times: list[float] = []
        self.thread = threading.Thread(target=self._run)

    def __enter__(self) -> Stream:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopping.set()
        self.thread.join()

    def _run(self) -> None:
        body = {"model": "demo", "prompt": PROMPT, "max_tokens": 1500, "stream": True, "ignore_eos": True}
        with httpx.Client(base_url=self.url, timeout=60) as client:
            while not self.stopping.is_set():
                with client.stream("POST", "/v1/completions", json=body) as answer:
                    for line in answer.iter_lines():
                        if line.startswith("data: {"):
                            self.times.append(time.perf_counter())
                        if self.stopping.is_set():
                            return

    def longest_gap(self, start: float, end: float) -> float:
        """Milliseconds between two tokens of which one came between `start` and `end`."""
        times = [t for t in self.times if start - 1 < t < end + 1]
        inside = [(a, b) for a, b in pairwise(times) if b > start and a < end]
        # from one stream to the next there is a gap that no swap made
        return 1000 * max((b - a for a, b in inside), default=0.0)


def versions(folder: Path, count: int) -> Iterator[Path]:
    """Files of the shipped direction with a change that nobody notices but its digest."""
    shipped = Direction.load(ROOT / "directions" / "refusal.safetensors")
    for number in range(count):
        path = folder / f"{number}.safetensors"
        replace(shipped.with_meta(parameters={"version": number}), weights=shipped.weights).save(path)
        yield path


def until_served(client: httpx.Client, digest: str) -> None:
    """Ask for one token until the receipt has `digest`."""
    body = {"model": "demo", "prompt": PROMPT, "max_tokens": 1, "temperature": 0, "steer": "moving"}
    while True:
        answer = client.post("/v1/completions", json=body).raise_for_status()
        if json.loads(answer.headers["x-steer-applied"])[0]["digest"] == digest:
            return


def measure(swaps: int) -> str:
    from steer.direction import digest, read_file

    rng = random.Random(0)
    served, usual, with_swap = [], [], []
    with tempfile.TemporaryDirectory() as made, tempfile.TemporaryDirectory() as directions:
        files = list(versions(Path(made), swaps + 1))
        target = Path(directions) / "moving.safetensors"
        shutil.copy(files[0], target)
        with Server("--directions", directions) as server, Stream(server.url) as stream:
            until_served(server.client, digest(read_file(files[0])))
            alone = []
            for file in files[1:]:
                time.sleep(rng.uniform(0.1, 0.3))
                began = time.perf_counter()
                time.sleep(WINDOW)
                usual.append(stream.longest_gap(began, began + WINDOW))
                began = time.perf_counter()
                until_served(server.client, digest(read_file(target)))
                alone.append(1000 * (time.perf_counter() - began))
                data = read_file(file)
                began = time.perf_counter()
                write_file(target, data)
                until_served(server.client, digest(data))
                served.append(1000 * (time.perf_counter() - began))
                time.sleep(max(0.0, began + WINDOW - time.perf_counter()))
                with_swap.append(stream.longest_gap(began, began + WINDOW))
            gaps = [1000 * (b - a) for a, b in pairwise(stream.times)]

    def row(name: str, values: list[float]) -> str:
        ordered = sorted(values)
        return f"| {name} | {statistics.median(values):.1f} | {ordered[int(0.95 * (len(ordered) - 1))]:.1f} |"

    rows = [
        row("from the file's write to the first token of the new version", served),
        row("one token of the version that is served already", alone),
        row(f"longest gap of the stream in {WINDOW:g} s with a swap", with_swap),
        row(f"longest gap of the stream in {WINDOW:g} s without one", usual),
        row("every gap of the stream (a decode step)", gaps),
    ]
    return "\n".join(["| milliseconds | median | 95th percentile |", "|---|---:|---:|", *rows, ""])


if __name__ == "__main__":
    parser = benchmark_parser(__doc__)
    parser.add_argument("--swaps", type=int, default=40)
    given = parser.parse_args()
    text = f"The embedded model on transformers, {given.swaps} swaps.\n\n{measure(given.swaps)}"
    result = Result("swap", "A swap under live traffic", {}, [], text)
    result.publish(given.out)
