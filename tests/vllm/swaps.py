"""Swaps under the load of several clients: every answer is the one that its receipt's digest predicts."""

from __future__ import annotations

import threading
import time

from tests import models
from tests.servers import Server, receipt, text
from tests.vllm.engines import Home


def swap_under_load(server: Server, home: Home, clients: int = 6, swaps: int = 20) -> None:
    """`clients` ask, half of them steered, while the direction `moving` is replaced, at least `swaps` times and until
    both versions have been served."""
    versions = [models.direction(home.model, seed=seed).to_bytes() for seed in (31, 32)]
    expected: dict[str, str] = {}
    for data in versions:
        digest = server.client.put("/v1/directions/moving", content=data).json()["digest"]
        expected[digest] = text(server.complete(steer="moving"))
    plain = text(server.complete())
    stop = threading.Event()
    problems: list[str] = []
    served: set[str] = set()

    def load(number: int) -> None:
        while not stop.is_set():
            answer = server.complete(steer="moving" if number % 2 else "off")
            if answer.status_code != 200:
                problems.append(answer.text)
                continue
            applied = receipt(answer)
            served.add(applied[0]["digest"] if applied else "")
            if text(answer) != (expected[applied[0]["digest"]] if applied else plain):
                problems.append(f"{applied}: {text(answer)}")

    threads = [threading.Thread(target=load, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    deadline, turn = time.monotonic() + 60, 0
    while turn < swaps or (served != {"", *expected} and time.monotonic() < deadline):
        assert server.client.put("/v1/directions/moving", content=versions[turn % 2]).status_code == 200
        turn += 1
    stop.set()
    for thread in threads:
        thread.join()
    server.client.delete("/v1/directions/moving")
    assert not problems, problems[:3]
    assert served == {"", *expected}
    pins = [card["requests"] for card in server.client.get("/v1/directions").json()["data"]]
    assert not any(pins)
