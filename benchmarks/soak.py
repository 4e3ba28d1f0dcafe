"""`make soak`: mixed steered and plain streams with a swap each second, for minutes, against a real server, beside a
client that means ill (`Hostile`).

Every answer to the others must be the one that the digest of its receipt predicts, and what the server holds must not
grow: after a warm-up no line through memory, files or threads may rise by more than noise. A table and a plot come out.

vLLM itself grows with each sequence. `--plain` sends what stock vLLM can have too (plain streams, and of the hostile
acts those that are no request to Steer), and `--backend stock` has the same from vLLM without Steer, so that the two
can be set side by side, for each thousand of sequences.

`--api-servers N` runs vLLM with several front ends: the swaps go through each of them in turn, and by the folder; the
kill switch is moved through each now and then and must be obeyed by all; and at the end one front end is killed while
all are busy, all must end with it, and one chain of audit lines must have what all have written. With `--lives N` that
happens N times: the run is the supervisor, which starts the whole again on the same folder and the same log.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass
from itertools import count
from math import inf
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil

from benchmarks.engines import ENVIRONMENT
from benchmarks.overhead import WITHOUT
from benchmarks.results import Result, benchmark_parser
from steer.direction import digest
from steer.files import write_file
from steer.serve.audit import verify
from tests import models
from tests.hostile import WILD, Hostile, wild
from tests.servers import Client, Server, front_ends, text

CLIENTS, TOKENS = 6, 24
BACKENDS = ("transformers", "vllm", "stock")
PROMPTS = ("one", "two", "three")
FILE = "refusal.safetensors"
#: Share of the time that is not looked at: caches fill, allocators settle.
WARM = 1 / 3
#: What may be added over the whole of a run by the line through the samples, and what is held on average.
MEMORY = "memory MiB"
GROWTH = {MEMORY: 16.0, "files": 3.0, "threads": 2.0, "rows": 0.5}
#: Of memory, for each further front end, which is a process more.
EACH_FRONT_END = 8.0
#: Turns between two moves of the kill switch, the seconds that it is off, and in which all must obey.
TURNS_ON, SECONDS_OFF, OBEYED = 15, 0.5, 0.1


@dataclass
class Off:
    """A time in which steering is off: when that was asked for and answered, and when it was taken back."""

    asked: float
    answered: float = inf
    ends: float = inf
    ended: float = inf


class Life:
    """What one server process held, from its first minute to its end."""

    def __init__(self) -> None:
        self.samples: list[dict[str, float]] = []

    def growth(self) -> dict[str, float]:
        """What a line through the samples after the warm-up adds over the run."""
        lines = {name: self._line(name, "seconds") for name in self.held}
        return {name: slope * span for name, (slope, span) in lines.items()}

    @property
    def held(self) -> list[str]:
        """What is looked at, memory also of each process that is there to the end."""
        return [*GROWTH, *(name for name in self.samples[-1] if name.startswith(f"{MEMORY} of "))]

    def each_sequence(self) -> float:
        """KiB of memory for each sequence after the warm-up, by the line through the samples."""
        return self._line(MEMORY, "sequences")[0] * 1024

    @property
    def kept(self) -> list[dict[str, float]]:
        return self.samples[int(len(self.samples) * WARM) :]

    def _line(self, name: str, over: str) -> tuple[float, float]:
        """The slope, and how much of `over` it covers."""
        kept = self.kept
        along = np.array([sample[over] for sample in kept])
        return float(np.polyfit(along, [sample.get(name, 0.0) for sample in kept], 1)[0]), float(along[-1] - along[0])


class Soak:
    """`files` are the versions that take turns; without any all is plain, also what the hostile client does.
    `fronts` are those of a server that has several. What is counted is of all lives of a server, what is held of the
    one that `begin` has begun."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files
        #: What is answered under which version, None for the plain model, to which prompt; known from the first life.
        self.answers: dict[tuple[str | None, str], str] = {}
        self.offs: list[Off] = []
        self.latest = 0.0  # seconds after a switch's answer at which a steered request was still admitted
        self.counts: Counter[str] = Counter()
        self.hostile_counts: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.lives: list[Life] = []

    def begin(self, server: Server, fronts: dict[int, Client]) -> None:
        self.server, self.fronts = server, fronts
        self.stop, self.dying = threading.Event(), threading.Event()
        self.life = Life()
        self.lives.append(self.life)
        self.hostile = Hostile(server, plain=not self.files)

    def client(self, number: int) -> None:
        rng = random.Random(number)
        with httpx.Client(base_url=self.server.url, timeout=120) as http:
            while not self.stop.is_set():
                steered = bool(self.files) and rng.random() < 0.6
                try:
                    self.ask(http, rng.choice(PROMPTS), steered=steered, leaves=rng.random() < 0.05)
                except httpx.TransportError as error:
                    if not self.dying.is_set():
                        self.wrong.append(f"cut without a death: {error!r}")
                    self.counts["cut by a death"] += 1
                    return

    def harm(self) -> None:
        for number in count():
            if self.stop.is_set():
                break
            try:
                self.hostile.act(number)
            except OSError:
                if not self.dying.is_set():
                    raise
                break
        self.hostile.close()

    def ask(self, http: httpx.Client, prompt: str, *, steered: bool, leaves: bool) -> None:
        body: dict[str, Any] = {"model": self.server.model_name, "prompt": prompt, "max_tokens": TOKENS}
        body |= {"temperature": 0, "stream": True} | ({"steer": "refusal"} if steered else {})
        began = time.monotonic()
        with http.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code != 200:
                self.refused(response.read().decode(), began)
                return
            if steered:
                self.admitted(began, time.monotonic())
            applied = json.loads(response.headers.get("x-steer-applied", "" if self.files else "[]"))
            which = applied[0]["digest"] if applied else None
            said, whole = "", False
            try:
                for line in response.iter_lines():
                    if line.startswith("data: {"):
                        event = json.loads(line[6:])
                        if "choices" not in event and self.dying.is_set():
                            break  # an error: the engine is gone
                        said += "".join(choice["text"] for choice in event["choices"])
                        if leaves:
                            break
                    whole = whole or line == "data: [DONE]"
            finally:
                whole = whole or not (leaves or self.dying.is_set())
                expected = self.answers.get((which, prompt), "no such version")
                if bool(which) != steered or not (expected == said if whole else expected.startswith(said)):
                    self.wrong.append(f"{prompt!r} steered={steered} by {which}: {said!r}, not {expected!r}")
        self.counts["left" if leaves else "steered" if steered else "plain"] += 1

    def refused(self, said: str, began: float) -> None:
        now = time.monotonic()
        if self.dying.is_set():
            self.counts["refused at a death"] += 1
        elif "steering_off" in said and any(off.asked < now and began < off.ended for off in self.offs):
            self.counts["refused by the switch"] += 1
        else:
            self.wrong.append(said)

    def admitted(self, began: float, now: float) -> None:
        """A steered request that began and was admitted then: not while steering was off."""
        for off in self.offs:
            if off.answered < began and now < off.ends:
                self.latest = max(self.latest, began - off.answered)
                if began - off.answered > OBEYED:
                    self.wrong.append(f"steered {began - off.answered:.3f} s after the switch")

    def switch(self, through: Client) -> None:
        off = Off(time.monotonic())
        self.offs.append(off)
        assert through.post("/v1/steering", json={"enabled": False, "reason": "soak"}).status_code == 200
        off.answered = time.monotonic()
        body = {"model": self.server.model_name, "prompt": "one", "max_tokens": 1, "steer": "refusal"}
        while time.monotonic() < off.answered + SECONDS_OFF:
            for front in self.fronts.values():
                began = time.monotonic()
                if front.post("/v1/completions", json=body).status_code == 200:
                    self.admitted(began, time.monotonic())
        off.ends = time.monotonic()
        assert through.post("/v1/steering", json={"enabled": True}).status_code == 200
        off.ended = time.monotonic()
        self.counts["moves of the switch"] += 1

    def swap(self, turn: int, data: bytes) -> None:
        """By the folder, and through each front end in its turn: what is answered must hold in all."""
        number = turn % (len(self.fronts) + 1) - 1
        self.counts["swaps"] += 1
        if number < 0:
            write_file(self.server.directions / FILE, data)  # type: ignore[operator]
            return
        answer = self.fronts[number].put("/v1/directions/refusal", content=data)
        if answer.status_code != 200:
            self.wrong.append(f"a swap through {number}: {answer.text}")
            return
        for other, front in self.fronts.items():
            served = front.get("/v1/directions/refusal").json().get("digest")
            if served != digest(data):
                self.wrong.append(f"{other} serves {served} after a swap to {digest(data)} through {number}")

    def sample(self, seconds: float) -> None:
        told = self.server.client.get("/metrics").text
        rows = sum(float(line.split()[1]) for line in told.splitlines() if line.startswith("steer_rows_in_use "))
        whole = psutil.Process(self.server.process.pid)
        held = dict.fromkeys(GROWTH, 0.0) | {"rows": rows}
        for process in (whole, *whole.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                memory, own = process.memory_info().rss / 2**20, f"{MEMORY} of {process.name()}"
                held[MEMORY] += memory
                held[own] = held.get(own, 0.0) + memory
                held["files"] += process.num_fds()
                held["threads"] += process.num_threads()
        self.life.samples.append({"seconds": seconds, "sequences": self.sequences, **held})

    @property
    def sequences(self) -> int:
        return self.counts["left"] + self.counts["steered"] + self.counts["plain"] + self.hostile.sequences

    def predict(self, folder: Path) -> None:
        """Ask for each answer once, one request at a time."""
        for which, each in (("", b""), *self.files.items()):
            if each:
                write_file(folder / FILE, each)
                while self.server.client.get("/v1/directions/refusal").json().get("digest") != which:
                    time.sleep(0.05)
            for prompt in PROMPTS:
                steer = {"steer": "refusal"} if each else {}
                self.answers[which or None, prompt] = text(self.server.complete(prompt, max_tokens=TOKENS, **steer))

    def run(self, seconds: float) -> None:
        clients = [threading.Thread(target=self.client, args=(number,)) for number in range(CLIENTS)]
        clients.append(threading.Thread(target=self.harm))
        for client in clients:
            client.start()
        started, rng = time.monotonic(), random.Random(0)
        for turn in count():
            if (now := time.monotonic() - started) >= seconds:
                break
            if self.files:
                self.swap(turn, rng.choice(list(self.files.values())))
            if self.fronts and turn % TURNS_ON == TURNS_ON - 1:
                self.switch(self.fronts[turn // TURNS_ON % len(self.fronts)])
            self.sample(now)
            time.sleep(1)
        found = self.hostile.wrong
        if self.fronts:
            found = list(found)  # without what the death makes of its requests
            self.dying.set()
            self.wrong += kill_one(self.server)
        self.stop.set()
        for client in clients:
            client.join()
        self.hostile_counts += self.hostile.counts
        self.wrong += found


def main() -> int:
    parser = benchmark_parser(__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--backend", choices=BACKENDS, default="transformers")
    parser.add_argument("--plain", action="store_true", help="what stock vLLM can have too, without a direction")
    parser.add_argument("--api-servers", type=int, default=1, help="front ends of vLLM")
    parser.add_argument("--lives", type=int, default=1, help="of a server with several front ends, each of its share")
    given = parser.parse_args()
    plain, several = given.plain or given.backend == "stock", given.api_servers > 1
    if several and (plain or given.backend != "vllm"):
        parser.error("--api-servers is of --backend vllm, and not --plain")
    if given.lives > 1 and not several:
        parser.error("--lives is of --api-servers")
    with tempfile.TemporaryDirectory(prefix="steer-soak-") as name:
        folder = Path(name)
        (folder / "directions").mkdir()
        model, command, options = arm(folder, given.backend)
        if several:
            options += ["--api-server-count", str(given.api_servers), "--audit", str(folder / "audit.jsonl")]
        data = [] if plain else [models.direction(model, seed=seed).to_bytes() for seed in (1, 2, 3)]
        soak, alive = Soak({digest(each): each for each in data}), True
        bad = wild(models.direction(model, seed=8, shared=True))
        for _ in range(given.lives):
            with Server(*options, directions=folder / "directions", command=command) as server:
                if soak.files:
                    assert server.client.put(f"/v1/directions/{WILD}", content=bad).status_code in (200, 201)
                soak.begin(server, front_ends(server) if several else {})
                if not soak.answers:
                    soak.predict(folder / "directions")
                soak.run(given.minutes * 60 / given.lives)
                for front in soak.fronts.values():
                    front.close()
                # what a death leaves in the log is vLLM's
                alive = alive and (several or (server.process.poll() is None and "Traceback" not in server.log))
        if several:
            found = verify([path for path in folder.glob("audit.jsonl*") if path.suffix not in (".head", ".lock")])
            soak.counts["audit lines"] += found.lines
            soak.wrong += found.problems
    return report(soak, alive, given.out, given.minutes, given.backend, plain)


def kill_one(server: Server) -> list[str]:
    """Kill a front end, with which vLLM ends all; what goes on."""
    parent = psutil.Process(server.process.pid)
    whole = [parent, *parent.children(recursive=True)]
    next(process for process in whole if "APIServer" in " ".join(process.cmdline())).kill()
    _, alive = psutil.wait_procs(whole, timeout=60)
    return [f"{process.name()} goes on without a front end" for process in alive]


def arm(folder: Path, backend: str) -> tuple[Any, list[str], list[str]]:
    """A tiny model for this backend, and the command and the options that serve it."""
    if backend == "transformers":
        model = models.save("llama", folder / "tiny")
        more: list[str] = []
    else:  # whose attention wants wider heads
        from tests.vllm import device, tiny

        for variable in ("VLLM_CPU_KVCACHE_SPACE", "VLLM_WORKER_MULTIPROC_METHOD", "VLLM_NO_USAGE_STATS"):
            os.environ.setdefault(variable, ENVIRONMENT[variable])
        for variable, value in device.ENVIRONMENT.items():
            os.environ.setdefault(variable, value)
        model = tiny.make("llama", folder / "tiny")
        more = ["--dtype", "float32", "--max-model-len", "256", *device.ARGUMENTS]
    if backend == "stock":
        os.environ |= WITHOUT
        return (
            model,
            [sys.executable, "-m", "vllm.entrypoints.openai.api_server"],
            ["--model", str(folder / "tiny"), *more],
        )
    served = ["--directions", str(folder / "directions"), "--rows", "8"]
    command = [sys.executable, "-m", "steer", "serve", "--backend", backend]
    return model, command, [str(folder / "tiny"), *served, *more]


def report(soak: Soak, alive: bool, folder: Path, minutes: float, backend: str, plain: bool) -> int:
    name, life = "-".join(["soak", *([backend] if backend != "transformers" else [])]), soak.lives[0]
    each_grown = [life.growth() for life in soak.lives]
    grown = {held: max(one.get(held, 0.0) for one in each_grown) for held in life.held}
    name += "-plain" if plain and backend != "stock" else ""
    name += f"-{len(soak.fronts)}-api-servers" if soak.fronts else ""
    allowed = GROWTH | {MEMORY: GROWTH[MEMORY] + EACH_FRONT_END * max(0, len(soak.fronts) - 1)}
    rows = ["| held | at the start | at the end | grown after the warm-up | allowed |", "|---|---:|---:|---:|---:|"]
    for held in life.held:
        first, last = life.samples[0].get(held, 0.0), life.samples[-1][held]
        rows.append(f"| {held} | {first:.0f} | {last:.0f} | {grown[held]:+.2f} | {allowed.get(held, '')} |")
    counted = ", ".join(f"{many} {what}" for what, many in soak.counts.items())
    ill = ", ".join(f"{many} × {what}" for what, many in sorted(soak.hostile_counts.items()))
    wrong = soak.wrong
    text = (
        f"A tiny model on {backend}, {minutes:g} minutes: {counted}; {len(soak.wrong)} wrong answers or receipts.\n\n"
    )
    if soak.fronts:
        text += f"Through {len(soak.fronts)} front ends and the folder in turn; the latest steered request that was "
        text += f"admitted after the switch's answer came {1000 * soak.latest:.1f} ms after it. A front end was killed "
        text += f"{len(soak.lives)} times, with which all ended, and all were started again on the same files; the "
        text += "table has the first life, and of what has grown the life in which it grew most.\n\n"
    text += f"Beside them a client that means ill, by the status of each answer: {ill}.\n\n"
    text += f"{life.samples[-1]['sequences']:.0f} sequences were begun; after the warm-up memory grew by "
    text += f"{life.each_sequence():.2f} KiB with each of them.\n\n"
    text += "\n".join([*rows, "", *wrong[:5], f"![What was held over time]({name}.png)", ""])
    title = "Soak: plain traffic" if plain else "Soak: mixed traffic, a swap each second"
    result = Result(name, f"{title}, a hostile client", {}, [], text)
    result.publish(folder)
    (folder / f"{name}.samples.json").write_text(json.dumps(soak.lives[0].samples))
    plot(life, folder / f"{name}.png")
    return 0 if alive and not wrong and all(grown[held] <= most for held, most in allowed.items()) else 1


def plot(life: Life, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(len(GROWTH), sharex=True, figsize=(8, 9))
    seconds, begun = [sample["seconds"] for sample in life.samples], life.kept[0]
    for axis, name in zip(axes, GROWTH, strict=True):
        if name == MEMORY:
            for held in (held for held in life.held if held.startswith(MEMORY)):
                grown = [sample.get(held, 0.0) - begun.get(held, 0.0) for sample in life.samples]
                axis.plot(seconds, grown, label=held.removeprefix(f"{MEMORY} of ").replace(MEMORY, "all"))
            axis.set_ylim(-2 * GROWTH[MEMORY], 2 * GROWTH[MEMORY])
            axis.legend(fontsize="small")
        else:
            axis.plot(seconds, [sample[name] for sample in life.samples])
            axis.set_ylim(0, 1.1 * max(sample[name] for sample in life.samples) or 1)
        axis.axvline(begun["seconds"], linestyle=":", color="grey")
        axis.set_ylabel(f"{name}, grown" if name == MEMORY else name)
    axes[-1].set_xlabel("seconds")
    figure.savefig(path)


if __name__ == "__main__":
    sys.exit(main())
