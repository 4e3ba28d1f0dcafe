"""How long /health and the kill switch take while the worst bodies are in flight: on a real server, from outside it.

Each kind of body is posted again and again by several clients at once, up to 1 MiB and up to the size limit; meanwhile
the two routes are asked one after the other, on a connection of their own each time.
"""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.results import Result, benchmark_parser
from tests import models
from tests.servers import Server

MIB = 2**20
#: Milliseconds at the 99th percentile that may pass, by the largest body in flight.
LIMITS = {MIB: 50.0, 8 * MIB: 250.0}
ROUTES = ("GET /health", "POST /v1/steering")


def filled(size: int, head: str, unit: str, tail: str) -> bytes:
    return (head + unit * ((size - len(head) - len(tail)) // len(unit)) + tail).encode()


#: What is worst in its own way, at a size: (route, body).
BODIES: dict[str, Callable[[int], tuple[str, bytes]]] = {
    "a key twice": lambda n: ("completions", filled(n, "{", '"a":1,', '"a":1}')),
    "keys": lambda n: ("completions", filled(n, '{"model":"tiny","metadata":[', '{"a":1},', "1]}")),
    "numbers": lambda n: ("completions", filled(n, '{"model":"tiny","prompt":[', "5,", "5]}")),
    "most numbers": lambda n: ("completions", filled(min(n, 390_000), '{"model":"tiny","prompt":[', "5,", "5]}")),
    "depth": lambda n: ("completions", filled(n, "", "[", "")),
    "prompts": lambda n: ("completions", filled(min(n, 780_000), '{"model":"tiny","n":64,"prompt":[', '"a",', '"a"]}')),
    "wrong prompts": lambda n: ("completions", filled(min(n, 780_000), '{"model":"tiny","prompt":[', "0.5,", "0]}")),
    "messages": lambda n: (
        "chat/completions",
        filled(min(n, 400_000), '{"model":"tiny","messages":[', '{"role":"u"},', "1]}"),
    ),
    "text": lambda n: ("completions", filled(n, '{"model":"tiny","prompt":"', "x", '"}')),
    "escapes": lambda n: ("completions", filled(n, '{"model":"tiny","prompt":"', "\\n", '"}')),
    "stops": lambda n: (
        "completions",
        filled(min(n, 780_000), '{"model":"tiny","prompt":"a","stop":[', '"z",', '"z"]}'),
    ),
    "names": lambda n: ("completions", filled(n, '{"model":"tiny","prompt":"a","steer":"', "a,", 'a"}')),
    "JSON in a text": lambda n: ("completions", filled(n, '{"model":"tiny","prompt":"a","metadata":"', "[", '"}')),
}


@contextmanager
def in_flight(port: int, path: str, body: bytes, clients: int) -> Iterator[list[int]]:
    """While it lasts, each of the clients posts the body again as soon as it is answered. Statuses of the answers."""
    ended, statuses = threading.Event(), list[int]()

    def post() -> None:
        while not ended.is_set():
            with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=120)) as connection:
                connection.request("POST", path, body, {"Content-Type": "application/json"})
                statuses.append(connection.getresponse().status)

    threads = [threading.Thread(target=post) for _ in range(clients)]
    for thread in threads:
        thread.start()
    try:
        yield statuses
    finally:
        ended.set()
        for thread in threads:
            thread.join()


def asked(port: int, route: str) -> float:
    """Milliseconds from the connection to the answer."""
    method, path = route.split()
    body = json.dumps({"enabled": True}) if method == "POST" else None
    started = time.perf_counter()
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=120)) as connection:
        connection.request(method, path, body, {"Content-Type": "application/json"})
        assert connection.getresponse().read()
    return 1000 * (time.perf_counter() - started)


def percentile(times: list[float], share: float) -> float:
    return sorted(times)[min(len(times) - 1, int(share * len(times)))]


def row(name: str, size: str, times: dict[str, list[float]], statuses: list[int]) -> str:
    cells = [f"{percentile(each, 0.5):.1f} / {percentile(each, 0.99):.1f} / {max(each):.1f}" for each in times.values()]
    answered = ", ".join(f"{statuses.count(status)} × {status}" for status in sorted(set(statuses)))
    return f"| {name} | {size} | {' | '.join(cells)} | {answered} |"


def measure(samples: int, clients: int, kinds: list[str]) -> tuple[str, dict[int, float]]:
    """The table, and the worst 99th percentile by the largest size of a body."""
    lines = ["| in flight | body | " + " | ".join(f"`{route}`" for route in ROUTES) + " | answers to the bodies |"]
    lines.append("|---|---:|---:|---:|---|")
    worst = dict.fromkeys(LIMITS, 0.0)
    with TemporaryDirectory() as name:
        folder = Path(name)
        models.save("llama", folder / "tiny")
        (folder / "directions").mkdir()
        with Server(str(folder / "tiny"), "--directions", str(folder / "directions")) as server:
            asked(server.port, ROUTES[0])
            times = {route: [asked(server.port, route) for _ in range(samples)] for route in ROUTES}
            lines.append(row("nothing", "", times, []))
            print(lines[-1], flush=True)
            for size in LIMITS:
                for kind in kinds:
                    path, body = BODIES[kind](size)
                    with in_flight(server.port, f"/v1/{path}", body, clients) as statuses:
                        time.sleep(0.2)
                        times = {route: [] for route in ROUTES}
                        for _ in range(samples):
                            for route in ROUTES:
                                times[route].append(asked(server.port, route))
                    worst[size] = max(worst[size], *(percentile(each, 0.99) for each in times.values()))
                    lines.append(row(kind, f"{len(body) / MIB:.2f} MiB", times, statuses))
                    print(lines[-1], flush=True)
    return "\n".join(lines), worst


if __name__ == "__main__":
    parser = benchmark_parser(__doc__)
    parser.add_argument("--samples", type=int, default=200, help="times that each route is asked for each kind of body")
    parser.add_argument("--clients", type=int, default=2, help="that post the body at once")
    parser.add_argument("--only", nargs="+", default=list(BODIES), choices=BODIES)
    given = parser.parse_args()
    table, worst = measure(given.samples, given.clients, given.only)
    said = "".join(
        f"Bodies up to {size // MIB} MiB: {worst[size]:.1f} ms at the 99th percentile in the worst case, at most "
        f"{limit:g} wanted.\n\n"
        for size, limit in LIMITS.items()
    )
    result = Result(
        "latency",
        "The event loop under the worst bodies",
        {},
        [],
        f"Milliseconds at the median, the 99th percentile and at most, while {given.clients} clients post such bodies "
        f"without a pause ({given.samples} samples of each; all on one machine).\n\n{table}\n\n{said}",
    )
    result.publish(given.out)
