"""How much of the package one request passes: bounds that keep its way as short as docs/architecture.md tells it."""

from __future__ import annotations

import json
import sys
import threading
from types import FrameType
from typing import Any

import pytest
from fastapi.testclient import TestClient

from steer.demo import MODEL
from steer.serve.app import build, prepare
from steer.serve.policy import hash_of, new_secret
from steer.settings import ServeSettings
from tests.servers import ROOT

PACKAGE = f"{ROOT / 'steer'}/"
POLICY = """[keys.a]
hash = "{}"
directions = ["refusal"]
"""


class Trace:
    """The files of the package in which functions begin, by thread and in order; each again only after another one."""

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        self.visits: dict[int, list[str]] = {}
        self.before_the_route = 0
        self.done = False

    @property
    def files(self) -> set[str]:
        return {file for visits in self.visits.values() for file in visits}

    def __call__(self, frame: FrameType, event: str, _: Any) -> None:
        name = frame.f_code.co_filename
        if event != "call" or not name.startswith(PACKAGE) or self.done or "watch.py" in _callers(frame):
            return
        file = name.removeprefix(PACKAGE)
        visits = self.visits.setdefault(threading.get_ident(), [])
        if file == "serve/completions.py" and not self.before_the_route:
            self.before_the_route = len(visits)
        if visits[-1:] != [file]:
            visits.append(file)


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Trace:
    """Of one steered request of two tokens, by a key, with an audit log."""
    folder, secret, traced = tmp_path_factory.mktemp("way"), new_secret(), Trace()
    (folder / "policy.toml").write_text(POLICY.format(hash_of(secret)))
    settings = ServeSettings(
        port=0, directions=ROOT / "directions", policy=folder / "policy.toml", audit=folder / "audit.jsonl"
    )
    body = {"model": "model", "max_tokens": 2, "steer": "refusal", "messages": [{"role": "user", "content": "hi"}]}
    headers = {"Authorization": f"Bearer {secret}"}
    threading.setprofile(lambda *event: traced(*event))  # of threads that begin from here on: the model's, the app's
    try:
        with TestClient(build(prepare(str(MODEL), settings))) as client:
            assert client.post("/v1/chat/completions", json=body, headers=headers).status_code == 200, (
                "imports are done"
            )
            traced.begin()
            answer = client.post("/v1/chat/completions", json=body, headers=headers)
            traced.done = True
            assert json.loads(answer.headers["x-steer-applied"])
    finally:
        threading.setprofile(None)
        sys.setprofile(None)
    return traced


def _callers(frame: FrameType) -> set[str]:
    """Of the files that called it: what a thread does that follows a file is no part of a request."""
    found, at = set(), frame.f_back
    while at is not None:
        found.add(at.f_code.co_filename.removeprefix(PACKAGE))
        at = at.f_back
    return found


def test_the_way_of_a_request_grows_no_longer(trace: Trace) -> None:
    """Each bound is what was measured when it was set. Whoever makes the way shorter lowers it."""
    assert 0 < trace.before_the_route <= 71
    assert len(trace.files) <= 36
