"""Tasks of `lm_eval`, run through a server, so that they score what is served. The plain model is asked for by its name
and each arm by its alias."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any

from steer.errors import InvalidInput, SteerError, imported
from steer.lab.evaluation.arms import PLAIN, Arm
from steer.lab.evaluation.report import Difference, TaskScore
from steer.lab.resume import Cache
from steer.lab.statistics import difference_of_means, difference_of_rates, mcnemar

#: How long a server may take to start.
START_SECONDS = 600.0


@dataclass(frozen=True, slots=True)
class TaskServer:
    """A server at `url` (…/v1), and the name by which it serves the model."""

    url: str
    model: str


@dataclass(frozen=True, slots=True)
class TaskPlan:
    """Which tasks are run.

    Attributes:
        names: of the tasks.
        tokenizer: the model's tokenizer, a local folder or a hub id.
        folder: where tasks are looked for besides lm_eval's own folder.
        limit: the most documents of each task.
    """

    names: Sequence[str]
    tokenizer: str
    folder: Path | None = None
    limit: int | None = None


def check_tasks(names: Sequence[str], folder: Path | None = None) -> None:
    """Raise InvalidInput with every task that lm_eval does not have. lm_eval itself would fail only after all other
    work."""
    known = imported("lm_eval.tasks", "--tasks", "'lm-eval[api]'").TaskManager(
        include_path=None if folder is None else str(folder)
    )
    if unknown := [name for name in names if not Path(name).is_file() and not known.match_tasks([name])]:
        listed = ", ".join(map(repr, unknown))
        raise InvalidInput(f"--tasks: lm_eval has no {listed}; accepted: the names that `lm_eval ls tasks` lists")


def scores(plan: TaskPlan, served: TaskServer, arms: Sequence[Arm], cache: Cache) -> tuple[TaskScore, ...]:
    """Every metric of every task in every arm, with its paired difference from plain. Raises SteerError with the end of
    lm_eval's log if lm_eval fails."""
    kept: dict[str, Any] = {"tasks": list(plan.names), "limit": plan.limit, "tokenizer": plan.tokenizer}
    found: dict[str, Any] = {}
    for name, model in {PLAIN: served.model, **{arm.name: f"{served.model}+{arm.name}" for arm in arms}}.items():
        digest = next((arm.asked.digest for arm in arms if arm.name == name), None)
        found[name] = cache.value(
            f"tasks.{name}", kept | {"digest": digest}, lambda model=model: _run(plan, served.url, model)
        )
    return tuple(
        _score(task, metric, name, values, found[PLAIN][task][metric] if name != PLAIN else None)
        for task in found[PLAIN]
        for metric in found[PLAIN][task]
        for name in found
        for values in [found[name][task][metric]]
    )


def _score(
    task: str, metric: str, arm: str, values: Mapping[str, float], plain: Mapping[str, float] | None
) -> TaskScore:
    """The score of one arm. `values` and `plain` have the value of each sample, by its document."""
    against = None
    if plain is not None:
        both = [(plain[document], values[document]) for document in plain if document in values]
        first, second = [a for a, _ in both], [b for _, b in both]
        if {*first, *second} <= {0.0, 1.0}:
            hits = [v == 1 for v in first], [v == 1 for v in second]
            against = Difference.of(difference_of_rates(*hits), mcnemar(*hits))
        else:
            against = Difference.of(difference_of_means(first, second))
    mean = sum(values.values()) / len(values)
    return TaskScore(task=task, metric=metric, arm=arm, samples=len(values), value=mean, against_plain=against)


def _run(plan: TaskPlan, url: str, model: str) -> dict[str, dict[str, dict[str, float]]]:
    """The value of each sample, by task, metric and document."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            *(sys.executable, "-m", "lm_eval", "run", "--model", "local-completions", "--log_samples"),
            *("--tasks", ",".join(plan.names), "--output_path", folder),
            *(("--include_path", str(plan.folder.resolve())) if plan.folder else ()),
            *(("--limit", str(plan.limit)) if plan.limit else ()),
            "--model_args",
            f"model={model},base_url={url}/completions,tokenizer_backend=huggingface,tokenizer={plan.tokenizer},"
            "num_concurrent=8,max_retries=3",
        ]
        # lm_eval's client needs a key even if the server has none
        environment = {"OPENAI_API_KEY": "none", "HF_HUB_DISABLE_PROGRESS_BARS": "1"} | os.environ
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
        if done.returncode:
            raise SteerError(f"lm_eval failed for {model} at {url}:\n{done.stdout[-2000:]}")
        found: dict[str, dict[str, dict[str, float]]] = {}
        for file in sorted(Path(folder).rglob("samples_*.jsonl")):
            task = file.name.removeprefix("samples_").rpartition("_")[0]
            for line in file.read_text("utf-8").splitlines():
                sample = json.loads(line)
                for metric in sample["metrics"]:
                    if isinstance(sample[metric], int | float):
                        rows = found.setdefault(task, {}).setdefault(f"{metric},{sample['filter']}", {})
                        rows[str(sample["doc_id"])] = float(sample[metric])
        if not found:
            raise SteerError(f"lm_eval gave no samples for {', '.join(plan.names)}:\n{done.stdout[-2000:]}")
        return found


def given(url: str, arms: Sequence[Arm]) -> TaskServer:
    """The server at `url`. Raises InvalidInput if it lists no model, and with every direction of `arms` that it does
    not serve from the same file."""
    url = url.rstrip("/")
    models, directions = _get(f"{url}/models"), _get(f"{url}/directions")
    base = next((card["id"] for card in models["data"] if card.get("parent") is None), None)
    served = {entry["id"]: entry.get("digest") for entry in directions["data"]}
    problems = [] if base else [f"--url: {url} lists no model"]
    for name, digest in {arm.asked.direction: arm.asked.digest for arm in arms}.items():
        if served.get(name) != digest:
            has = f"{served[name][:12]}" if served.get(name) else "none of that name"
            problems.append(f"--url: {url} does not serve the direction '{name}' {digest[:12]}: it has {has}")
    InvalidInput.raise_for(problems)
    return TaskServer(url, str(base))


def _get(url: str) -> Any:
    key = os.environ.get("OPENAI_API_KEY")
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {key}"} if key else {})
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)
    except (OSError, ValueError, HTTPException, RecursionError) as error:
        raise InvalidInput(f"--url: {url}: {error}; accepted: the API of a running `steer serve`, …/v1") from error


@contextmanager
def serving(model: str, options: Sequence[str], arms: Sequence[Arm]) -> Iterator[TaskServer]:
    """Run a server for `model` and the directions of `arms` during the `with` block, as a child process on a free port.
    `options` are passed to `steer serve`."""
    with tempfile.TemporaryDirectory() as folder, socket.socket() as probe:
        directions, log = Path(folder) / "directions", Path(folder) / "log"
        directions.mkdir()
        for arm in arms:
            (directions / f"{arm.asked.direction}.safetensors").write_bytes(arm.direction.to_bytes())
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        command = [
            *(sys.executable, "-m", "steer", "serve", model, "--backend", "transformers", "--port", str(port)),
            *("--directions", str(directions), "--served-model-name", "model", *options),
            *("--sites", ",".join(arms[0].direction.meta.sites)),
            *("--rank", str(max(arm.rows for arm in arms))),
        ]
        with log.open("w") as output:
            process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        try:
            _wait(f"http://127.0.0.1:{port}/health", process, log)
            yield TaskServer(f"http://127.0.0.1:{port}/v1", "model")
        finally:
            process.terminate()
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            time.sleep(0.2)
    raise SteerError(f"--tasks: the server for them did not start:\n{log.read_text()[-2000:]}")
