"""One server that lives on, whatever it is sent: what must be right about it, looked at after every so many inputs."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from itertools import cycle, islice
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx

from steer.direction import digest
from steer.files import write_file
from tests.fuzz import fields
from tests.fuzz.surface import Outcome
from tests.serve.rules import POLICY, bearer
from tests.servers import Server, receipt, text

#: Inputs between two looks.
EVERY = 1000
#: Directions that stay.
KEPT = ("refusal", "verbosity")
#: The policy of its keys, with and without one of them.
GUEST = "eager"
WITHOUT = re.sub(rf"\[keys\.{GUEST}\].*?(?=\n\[)", "", POLICY, flags=re.DOTALL)


class Life:
    """`files` are versions of the direction `refusal`; `policy` is the server's file of keys, None where it has none.
    `step` is called at each input."""

    def __init__(
        self,
        server: Server,
        files: list[bytes],
        outcome: Outcome,
        policy: Path | None = None,
        step: Callable[[], object] = lambda: None,
        every: int = EVERY,
    ) -> None:
        self.server, self.outcome, self.policy, self.step, self.every = server, outcome, policy, step, every
        self.files = {digest(data): data for data in files}
        self.inputs = self.looks = 0
        self.plain, self.steered = text(server.complete()), dict[str, str]()
        for which, data in self.files.items():
            self._put(data)
            self.steered[which] = text(server.complete(steer="refusal"))
        assert len({self.plain, *self.steered.values()}) == 1 + len(files), "versions that can be told apart"
        self._versions = cycle(self.files.items())

    def seen(self, answer: httpx.Response, what: str) -> None:
        """Note one answer, and now and then look whether all is as it was."""
        self.outcome.counts[str(answer.status_code)] += 1
        off = answer.status_code == 503 and answer.json()["error"]["code"] == "steering_off"
        if answer.status_code >= 500 and answer.status_code != 501 and not off:
            self.found(f"{answer.status_code} {answer.text[:80]}", what)
        self.step()
        self.inputs += 1
        if self.inputs % self.every == 0:
            self.look()

    def ask(self, what: str, method: str, path: str, **more: Any) -> httpx.Response | None:
        try:
            answer = self.server.client.request(method, path, **more)
        except httpx.TransportError as error:
            self.found(type(error).__name__, f"{what}: {error}")
            return None
        self.seen(answer, what)
        return answer

    def found(self, kind: str, what: str) -> None:
        self.outcome.findings.setdefault(kind, what[:3000])

    def look(self) -> None:
        """The control plane does what it is for, and a plain and a steered answer are exactly the right ones."""
        self.looks += 1
        which, data = next(self._versions)
        try:
            self._switch(True)
            self._tidy()
            if self.looks % 2 or self.server.directions is None:
                self._put(data)
            else:
                write_file(self.server.directions / "refusal.safetensors", data)
                self._until(lambda: self._get("/v1/directions/refusal").get("digest") == which, "a swap by file")
            self._right(which)
            self._switch(False)
            off = self.server.complete(steer="refusal")
            self._must((off.status_code, text(self.server.complete())) == (503, self.plain), "the kill switch")
            self._switch(True)
            self._right(which)
            if self.policy:
                there = self.looks % 2 == 0
                write_file(self.policy, (POLICY if there else WITHOUT).encode())
                self._until(lambda: self._guest() == (200 if there else 401), f"the key {GUEST} there={there}")
        except (AssertionError, KeyError, ValueError, httpx.HTTPError) as error:
            self.found(
                f"no longer right: {type(error).__name__}", f"look {self.looks} at {self.inputs}: {error!s:.2000}"
            )

    def _right(self, which: str) -> None:
        for stream in (False, True):
            answer = self.server.complete(steer="refusal", stream=stream)
            self._must([each["digest"] for each in receipt(answer)] == [which], f"the receipt: {answer.text[:300]}")
        self._must(text(self.server.complete(steer="refusal")) == self.steered[which], "the steered answer")
        self._must(text(self.server.complete()) == self.plain, "the plain answer")
        health = self._get("/health")
        self._must(health["status"] == "ok", f"the health: {health}")

    def _tidy(self) -> None:
        """Nothing is served that the inputs have put there: rows are few."""
        for each in self._get("/v1/directions")["data"]:
            if each["id"] not in KEPT and each["status"] != "failed":
                answer = self.server.client.delete(f"/v1/directions/{quote(each['id'], safe='')}")
                self._must(answer.status_code == 200, f"a deletion: {answer.text[:300]}")

    def _put(self, data: bytes) -> None:
        answer = self.server.client.put("/v1/directions/refusal", content=data)
        self._must(answer.status_code in (200, 201), f"an upload: {answer.text[:300]}")

    def _switch(self, on: bool) -> None:
        answer = self.server.client.post("/v1/steering", json={"enabled": on})
        self._must(answer.status_code == 200, f"the switch: {answer.text[:300]}")

    def _get(self, path: str) -> Any:
        return self.server.client.get(path).json()

    def _guest(self) -> int:
        return self.server.client.get("/v1/steering", headers=bearer(GUEST)).status_code

    def _until(self, true: Callable[[], bool], what: str, seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while not true():
            self._must(time.monotonic() < deadline, what)
            time.sleep(0.05)

    def _must(self, true: bool, what: str) -> None:
        if not true:
            raise AssertionError(what)


def by_field(life: Life, requests: int) -> None:
    """Every field × every value, in the order of `fields.cases`, and from the beginning again."""
    cases = list(fields.cases(life.server.client.get("/openapi.json").json()))
    for case in islice(cycle(cases), requests):
        data = case.body(life.server.model_name)
        answer = life.ask(str(case), "POST", case.route, content=data, headers=fields.JSON)
        if answer is not None and (wrong := fields.wrong(case, answer)):
            life.found(f"{case.route}: {wrong}", f"{case}: {answer.text}")
