"""What front ends share: what one writes holds for all, whatever becomes of it."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from steer.errors import NoRoom, UnsupportedModel
from steer.shared import RECORDS, Shared


def test_what_one_writes_the_others_read(tmp_path: Path) -> None:
    first, second = Shared(tmp_path / "met", 0, 2), Shared(tmp_path / "met", 1, 2)
    assert second.get("switch") is None
    first.put("switch", 1, 2.5)
    assert second.get("switch") == (1, 2.5)
    second.put("switch", 0)
    assert first.number("switch") == 0
    first.text = "why: ünïcode"
    assert second.text == "why: ünïcode"
    assert Shared().get("switch") is None, "one that is alone shares nothing"


def test_processes_that_count_together_lose_nothing(tmp_path: Path) -> None:
    program = f"""
import sys
from pathlib import Path
from steer.shared import Shared
shared = Shared(Path({str(tmp_path / "met")!r}), int(sys.argv[1]), 3)
for n in range(2000):
    with shared.lock():
        shared.put("sum", shared.number("sum") + 1)
    shared.count_own("running", 1)
    shared.put(f"name {{n}} of {{sys.argv[1]}}", n)
"""
    (tmp_path / "met").mkdir(mode=0o700)
    counting = [subprocess.Popen([sys.executable, "-c", program, str(n)]) for n in range(2)]
    assert [each.wait(120) for each in counting] == [0, 0]
    here = Shared(tmp_path / "met", 2, 3)
    assert here.number("sum") == here.total("running") == 4000
    assert [here.number(f"name {n} of {who}") for who in range(2) for n in range(2000)] == 2 * list(range(2000))


def test_what_a_front_end_counts_ends_with_it(tmp_path: Path) -> None:
    here, other = Shared(tmp_path / "met", 0, 2), Shared(tmp_path / "met", 1, 2)
    other.count_own("running", 3)
    here.count_own("running", 1)
    assert here.total("running") == 4
    again = Shared(tmp_path / "met", 1, 2)
    assert here.total("running") == again.total("running") == 1


def test_what_is_done_once_is_done_by_one_and_waited_for(tmp_path: Path) -> None:
    fronts = [Shared(tmp_path / "met", index, 4) for index in range(4)]
    done: list[bool] = []

    def start(shared: Shared) -> None:
        with shared.once("check") as first:
            assert first or done == [True] + [False] * (len(done) - 1)
            done.append(first)

    with pytest.raises(ZeroDivisionError), fronts[0].once("check") as first:
        done.append(bool(first / 0))
    threads = [threading.Thread(target=start, args=(shared,)) for shared in fronts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert done == [True, False, False, False]


def test_who_asks_waits_until_the_others_have_looked(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    here, other = Shared(tmp_path / "met", 0, 3), Shared(tmp_path / "met", 1, 3)
    here.settle()  # nobody follows yet
    here.follows()
    other.follows()
    waiting = threading.Thread(target=here.settle)
    waiting.start()
    while not other.asked > 1:
        pass
    assert waiting.is_alive()
    other.has_looked(1)
    assert waiting.is_alive()
    other.has_looked(other.asked)
    waiting.join()
    assert not caplog.records


def test_a_full_table_takes_no_name_more_and_keeps_those_that_it_has() -> None:
    shared = Shared()
    for n in range(RECORDS - 1):  # one it has from the beginning
        shared.put(str(n), n)
    with pytest.raises(NoRoom, match="full"):
        shared.put("one more", 1)
    shared.put("5", 6)
    assert (shared.number("5"), shared.number("one more")) == (6, 0)


def test_the_folder_is_theirs_alone_and_goes_with_the_last(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir(mode=0o777)
    (tmp_path / "open").chmod(0o777)
    with pytest.raises(UnsupportedModel, match="other users can write"):
        Shared(tmp_path / "open", 0, 2)
    made = Shared.make_folder()
    first, second = Shared(made, 0, 2), Shared(made, 1, 2)
    first.close()
    assert made.exists()
    second.put("still", 1)
    second.close()
    assert not made.exists()
