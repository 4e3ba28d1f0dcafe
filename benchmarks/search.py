"""Trials per minute of `steer search` beside `heretic-llm`.

`python -m benchmarks.search` makes an environment for the other tool in the user's cache folder, and lets the two take
turns, each in its own process: the same local model, the same prompts for directions and for trials, the same longest
answer, one thread each. Time runs from the first report of a tool to its last, so that loading, measuring and what is
done once are in neither. The other tool is used as a program alone, through its options; what it says of a trial is
read from its output. Both fronts are compared in its terms: refusals of the same prompts, each by its own matcher, and
KL of the first token, as it says it and as `steer eval` finds it for ours.
"""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks.results import Result, benchmark_parser
from steer.demo import MODEL, PROMPTS
from steer.lab.statistics import undominated

VERSION = "1.4.0"
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "steer" / f"heretic-{VERSION}"
#: Prompts of each set that a trial is tried on, and tokens of the longest answer.
COUNT, TOKENS, BATCH = 96, 32, 64
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1") | {"HF_HUB_OFFLINE": "1"}
#: What is written when a trial begins.
BEGIN = re.compile(r"Running trial (\d+) of (\d+)")
#: What it found of each trial.
FOUND = re.compile(r"KL divergence: ([\d.]+).*?Refusals: (\d+)/\d+", re.DOTALL)
OURS = re.compile(r"(\d+) of (\d+) trials, the front so far")


@dataclass(frozen=True, slots=True)
class Run:
    """Seconds by the clock, of processor time, and trials done, each time that some were; and what was written."""

    marks: tuple[tuple[float, float, int], ...]
    output: str

    def per_minute(self, clock: int) -> float:
        """From the first mark to the last; clock 0 is the wall's, 1 the processor's, which other work does not slow."""
        return 60 * (self.marks[-1][2] - self.marks[0][2]) / (self.marks[-1][clock] - self.marks[0][clock])


def environment() -> Path:
    """The other tool's program."""
    program = CACHE / "bin" / "heretic"
    if not program.exists():
        venv.create(CACHE, with_pip=True)
        subprocess.run([CACHE / "bin" / "pip", "install", "-q", f"heretic-llm=={VERSION}"], check=True)
    return program


def other(program: Path, trials: int, folder: Path) -> Sequence[str | Path]:
    def given(name: str, cls: str, part: str = "train[:]") -> Iterator[str]:
        yield from (f"--{name}.dataset", str(PROMPTS / f"{cls}.train.txt"), f"--{name}.split", part)

    return [
        *(program, "--model", str(MODEL), "--dtypes", '["float32"]', "--device-map", "cpu", "--system-prompt", ""),
        *("--n-trials", str(trials), "--n-startup-trials", str(max(1, trials // 4)), "--seed", "0"),
        *("--max-response-length", str(TOKENS), "--batch-size", str(BATCH)),
        *("--study-checkpoint-dir", str(folder / "checkpoints")),
        *given("good-prompts", "harmless"),
        *given("bad-prompts", "refused"),
        *given("good-evaluation-prompts", "harmless", f"train[:{COUNT}]"),
        *given("bad-evaluation-prompts", "refused", f"train[:{COUNT}]"),
    ]


def ours(trials: int, folder: Path) -> Sequence[str | Path]:
    return [
        *(sys.executable, "-m", "steer", "search", str(MODEL), "--folder", folder / "search"),
        *("--harmful", PROMPTS / "refused.train.txt", "--harmless", PROMPTS / "harmless.train.txt"),
        *("--trials", str(trials), "--startup", str(max(1, trials // 4)), "--seed", "0", "--dtype", "float32"),
        *("--prompts", str(COUNT), "--max-tokens", str(TOKENS)),
    ]


def watched(command: Sequence[str | Path], mark: re.Pattern[str], folder: Path, limit: float) -> Run:
    """Run `command` without a terminal and note when its marks come by; it is ended after `limit` seconds."""
    marks, lines, started = [], [], time.monotonic()
    environ: Mapping[str, str] = os.environ | ONE_THREAD | {"PYTHONUNBUFFERED": "1", "COLUMNS": "200"}
    with subprocess.Popen(
        list(map(str, command)),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=folder,
        env=environ,
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            if found := mark.search(line):
                used = psutil.Process(process.pid).cpu_times()
                marks.append((time.monotonic() - started, used.user + used.system, int(found[1])))
                if time.monotonic() - started > limit:
                    process.terminate()
    if len(marks) < 2:
        raise RuntimeError("the program made too few trials:\n" + "".join(lines[-30:]))
    return Run(tuple(marks), "".join(lines))


def our_points(folder: Path) -> list[tuple[int, float]]:
    """Refusals and first-token KL of each trial of our front, on the prompts that both tried theirs on."""
    sets = {}
    for cls in ("refused", "harmless"):
        sets[cls] = folder / f"{cls}.txt"
        sets[cls].write_text("".join((PROMPTS / f"{cls}.train.txt").read_text().splitlines(keepends=True)[:COUNT]))
    steer = [sys.executable, "-m", "steer"]
    trials = [*steer, "trials", str(folder / "search")]
    shown = subprocess.run([*trials, "--json"], capture_output=True, text=True, check=True).stdout
    directions = []
    for number in [str(trial["number"]) for trial in json.loads(shown) if trial["front"]]:
        file = folder / f"t{number}.safetensors"
        subprocess.run([*trials, "--save", number, "-o", str(file)], check=True)
        directions += ["--direction", str(file)]
    files = ("--harmful", str(sets["refused"]), "--harmless", str(sets["harmless"]), "--max-tokens", str(TOKENS))
    done = subprocess.run(
        [*steer, "eval", str(MODEL), *directions, *files, "--json"], capture_output=True, text=True, check=True
    )
    report = json.loads(done.stdout)
    harmful = next(one for one in report["sets"] if one["name"] == "harmful")
    refused = {arm["arm"]: arm["shown"]["hits"] for arm in harmful["arms"]}
    return [(refused[one["arm"]], one["first_mean"]) for one in report["divergence"]]


def main() -> None:
    parser = benchmark_parser(__doc__)
    parser.add_argument("--trials", type=int, default=8, help="trials of the other tool in each round; ours: 12 times")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--limit", type=float, default=130, help="seconds for a run")
    arguments = parser.parse_args()
    program = environment()
    rates: dict[str, list[tuple[float, float]]] = {"heretic": [], "steer": []}
    points: dict[str, list[tuple[int, float]]] = {"heretic": [], "steer": []}
    for number in range(arguments.rounds):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            arms = {
                "heretic": (other(program, arguments.trials, folder), BEGIN),
                "steer": (ours(12 * arguments.trials, folder), OURS),
            }
            for arm in sorted(arms, reverse=bool(number % 2)):
                command, mark = arms[arm]
                run = watched(command, mark, folder, arguments.limit)
                rates[arm].append((run.per_minute(0), run.per_minute(1)))
                print(f"round {number + 1}, {arm}: {run.marks[-1][2]} trials, {rates[arm][-1]}", flush=True)
                if arm == "heretic":
                    points[arm] += [(int(refused), float(kl)) for kl, refused in FOUND.findall(run.output)]
            points["steer"] += our_points(folder)
    lines = ["| trials a minute | heretic | steer | times |", "|---|---:|---:|---:|"]
    for clock, name in enumerate(("by the clock", "of processor time")):
        steer, heretic = (statistics.median(pair[clock] for pair in rates[arm]) for arm in ("steer", "heretic"))
        lines.append(f"| {name} | {heretic:.1f} | {steer:.1f} | {steer / heretic:.1f} |")
    for arm in points:
        said = ", ".join(f"{refused} with {kl:.4f}" for refused, kl in undominated(points[arm], lambda point: point))
        lines.append(f"\nFront of {arm} (refusals of {COUNT}, KL of the first token): {said}.")
    result = Result(
        "search",
        "Searching, beside heretic-llm",
        {"heretic-llm": VERSION},
        [],
        f"The embedded model, {COUNT} prompts of each set a trial, at most {TOKENS} tokens, one thread each; "
        f"{arguments.rounds} rounds of {arguments.trials} trials of heretic, {12 * arguments.trials} of ours. Trials "
        f"that are stopped early count for ours; heretic stops none.\n\n" + "\n".join(lines) + "\n",
    )
    result.publish(arguments.out)


if __name__ == "__main__":
    main()
