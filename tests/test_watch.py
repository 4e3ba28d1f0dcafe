"""Whatever a thread that follows a folder meets, it goes on, and whoever asks is told how it is with it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import watchfiles

from steer import watch
from steer.watch import Follower
from tests.waiting import eventually


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "EVERY", 0.05)


def test_it_looks_again_after_every_error(tmp_path: Path) -> None:
    errors: list[Exception] = [RuntimeError("Event loop is closed"), OSError("disk"), KeyError("x"), MemoryError()]
    looks: list[int] = []

    def look() -> None:
        looks.append(1)
        if len(looks) <= len(errors):
            raise errors[len(looks) - 1]

    follower = Follower(tmp_path, look, name="test")
    follower.start()
    try:
        eventually(lambda: len(looks) > len(errors) and follower.state == "ok")
        assert follower.problem is None
    finally:
        follower.stop()
    assert follower.state == "dead"


def test_an_error_that_stays_is_told(tmp_path: Path) -> None:
    def look() -> None:
        raise RuntimeError("Event loop is closed")

    follower = Follower(tmp_path, look, name="test")
    follower.start()
    try:
        eventually(lambda: follower.state == "failing")
        assert follower.problem == "RuntimeError: Event loop is closed"
    finally:
        follower.stop()


def test_a_folder_that_cannot_be_watched_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> Iterator[Any]:
        raise OSError("OS file watch limit reached")
        yield

    monkeypatch.setattr(watchfiles, "watch", full)
    looks: list[int] = []
    follower = Follower(tmp_path, lambda: looks.append(1), name="test")
    follower.start()
    try:
        eventually(lambda: len(looks) > 3)
        assert follower.state == "ok", "looking is what counts"
    finally:
        follower.stop()


def test_a_folder_that_comes_goes_and_comes_again_is_followed(tmp_path: Path) -> None:
    folder, seen = tmp_path / "folder", set[str]()
    follower = Follower(folder, lambda: seen.update(path.name for path in folder.iterdir()), name="test")
    follower.start()
    try:
        eventually(lambda: follower.state == "failing")
        for name in ("one", "two"):
            folder.mkdir()
            (folder / name).touch()
            eventually(lambda: name in seen and follower.state == "ok")  # noqa: B023
            (folder / name).unlink()
            folder.rmdir()
            eventually(lambda: follower.state == "failing")
    finally:
        follower.stop()


def test_a_look_that_does_not_end_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "STALLED", 0.2)
    ending = threading.Event()

    def look() -> None:
        ending.wait(60)

    follower = Follower(tmp_path, look, name="test")
    follower.start()
    try:
        eventually(lambda: follower.state == "stalled")
        assert follower.age > 0.2
        ending.set()
        eventually(lambda: follower.state == "ok")
    finally:
        ending.set()
        follower.stop()


def test_it_ends_at_once_and_looks_no_more(tmp_path: Path) -> None:
    looks: list[int] = []
    follower = Follower(tmp_path, lambda: looks.append(1), name="test")
    follower.start()
    eventually(lambda: bool(looks))
    started = time.monotonic()
    follower.stop()
    assert time.monotonic() - started < 4
    before = len(looks)
    time.sleep(0.2)
    assert len(looks) == before
