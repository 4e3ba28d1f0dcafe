"""What steering costs on transformers, beside plain transformers and beside other libraries that do the same.

`python -m benchmarks.rivals`. Each library has an environment of its own, made where it is missing; all remove the same
direction of every layer, of the same model, at the same prompts, and what they generate is compared.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import venv
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.engines import Process
from benchmarks.results import Result, Table, benchmark_parser, interleave, rounds
from benchmarks.shapes import SMALL_LAYERS, SMALL_WIDTH, small
from tests import models

CHILD = Path(__file__).with_name("child.py")
ROOT = Path(__file__).parents[2]
VOCABULARY = 2048
#: (batch, prompt tokens, new tokens)
WORKLOADS = {
    "batch 1, 16 + 24 tokens": (1, 16, 24),
    "batch 8, 16 + 24 tokens": (8, 16, 24),
    "batch 8, 128 + 1 tokens": (8, 128, 1),
}
OURS = "steer"
PLAIN = "transformers, plain"
#: Library → what is installed for it. One wants transformers below 5, so its own plain transformers runs beside it.
LIBRARIES = {
    "steering-vectors": ("steering-vectors==0.12.2", "transformers==4.57.6"),
    "repeng": ("repeng==0.4.0", "transformers==5.19.0"),
    "nnsight": ("nnsight==0.8.1", "transformers==5.19.0"),
    "transformer-lens": ("transformer-lens==4.3.0", "transformers==5.19.0"),
}


@dataclass(frozen=True, slots=True)
class Arm:
    name: str
    package: str
    python: Path


class Child(Process):
    """One library with the model loaded."""

    def __init__(self, arm: Arm, model: Path, direction: Path) -> None:
        # only ours finds this repository
        found = {"PYTHONPATH": str(ROOT) if arm.package == OURS else "", "HF_HUB_OFFLINE": "1"}
        super().__init__([str(arm.python), str(CHILD), arm.package, str(model), str(direction)], os.environ | found)

    def run(self, ids: list[list[int]], tokens: int) -> dict[str, Any]:
        return self.ask({"ids": ids, "tokens": tokens})

    def arm(self, ids: list[list[int]], tokens: int) -> Callable[[], float]:
        return lambda: float(self.run(ids, tokens)["seconds"])


def environment(folder: Path, name: str) -> Path:
    """The Python of the environment of a library, made if it is not there."""
    home, done = folder / name, folder / name / "made"
    if not done.exists():
        print(f"making the environment of {name}", file=sys.stderr, flush=True)
        venv.create(home, with_pip=True)
        packages = [f"torch=={torch.__version__.partition('+')[0]}", *LIBRARIES[name]]
        subprocess.run([home / "bin/python", "-m", "pip", "install", "--quiet", *packages], check=True)
        done.touch()
    return home / "bin" / "python"


def arms(environments: Path) -> list[Arm]:
    own = Path(sys.executable)
    found = [Arm(PLAIN, "transformers", own), Arm(f"{PLAIN} again", "transformers", own), Arm(OURS, OURS, own)]
    for name, (library, transformers) in LIBRARIES.items():
        python = environment(environments, name)
        found.append(Arm(library.replace("==", " "), name.replace("-", "_"), python))
        if "==4" in transformers:
            found.append(Arm(f"{transformers.replace('==', ' ')}, plain", "transformers", python))
    return found


def home(folder: Path) -> tuple[Path, Path]:
    """A random float32 Llama with a tokenizer that every version of transformers reads, and a direction for it."""
    # so that greedy answers are not decided by rounding
    model = small(VOCABULARY, initializer_range=0.05)
    model.save_pretrained(folder / "model")
    models.tokenizer().save_pretrained(folder / "model")
    models.direction(model).save(folder / "direction.safetensors")
    return folder / "model", folder / "direction.safetensors"


def measure(environments: Path, rounds: int) -> list[Table]:
    tables = []
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        model, direction = home(Path(folder))
        children = {arm.name: stack.enter_context(Child(arm, model, direction)) for arm in arms(environments)}
        for title, (batch, prompt, tokens) in WORKLOADS.items():
            generator = torch.Generator().manual_seed(1)
            ids = torch.randint(3, VOCABULARY, (batch, prompt), generator=generator).tolist()
            said = {name: child.run(ids, tokens)["ids"] for name, child in children.items()}
            timed = {name: child.arm(ids, tokens) for name, child in children.items()}
            tables.append(Table(title, interleave(timed, rounds, title), [agreement(said)]))
    return tables


def agreement(said: dict[str, list[list[int]]]) -> str:
    """Which libraries generated the same tokens as ours, and that ours differ from plain ones at all."""
    assert said[OURS] != said[PLAIN], "steering changed nothing: this compares nothing"
    parts = []
    for name, rows in said.items():
        if "plain" not in name and name != OURS:
            same = sum(a == b for row, own in zip(rows, said[OURS], strict=True) for a, b in zip(row, own, strict=True))
            parts.append(f"{name} {same} of {sum(map(len, rows))}")
    return f"Tokens that are the same as ours: {', '.join(parts)}."


if __name__ == "__main__":
    parser = benchmark_parser(__doc__)
    parser.add_argument("--rounds", type=rounds, default=30)
    parser.add_argument("--environments", type=Path, default=ROOT / ".rivals", help="where their environments are made")
    given = parser.parse_args()
    result = Result(
        name="transformers",
        title="What steering costs on transformers, beside other libraries",
        versions={},
        tables=measure(given.environments, given.rounds),
        more=f"Random float32 Llama, {SMALL_LAYERS} layers × {SMALL_WIDTH}; {given.rounds} interleaved rounds; one "
        "direction removed from every block's output. transformer-lens runs its own loop and eager attention.\n",
    )
    result.publish(given.out)
