"""The audit chain: whatever is edited, cut, moved or torn is found, and what fails is never hidden."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from steer.serve.audit import (
    MAX_LINE,
    Audit,
    AuditError,
    AuditUnavailable,
    Head,
    Verification,
    unseal,
    verify,
    verify_with_rotated,
    with_rotated,
)

law = settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])


def filled(path: Path, lines: int = 12, **options: Any) -> Path:
    audit = Audit(path, fsync="never", **options)
    audit.open()
    for number in range(lines):
        audit.write("refused", key="alice", request_id=f"r{number}", detail={"text": 'é\n"\\ \u2028'})
    audit.close()
    return path


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return filled(tmp_path_factory.mktemp("audit") / "a.jsonl")


def test_a_clock_that_is_set_back_breaks_no_chain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines are in the order of their numbers, whatever their times say."""
    path = filled(tmp_path / "a.jsonl", 2)

    class Earlier(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return datetime.now(tz) - timedelta(days=400)

    monkeypatch.setattr("steer.serve.audit.datetime", Earlier)
    filled(path, 2)
    times = [json.loads(line)["time"] for line in path.read_text().splitlines()]
    assert times[2] < times[1]
    report = verify([path])
    assert (report.problems, report.notes, report.last.seq) == ([], [], 4)


def test_a_head_that_cannot_be_opened_for_a_while_costs_nobody_a_descriptor(tmp_path: Path) -> None:
    """The line is refused each time, and written when the head can be opened again; no other file is closed."""
    audit = Audit(tmp_path / "a.jsonl", fsync="never")
    audit.open()
    audit.write("admitted", key="alice", request_id="r0")
    head = tmp_path / "a.jsonl.head"
    head.rename(tmp_path / "away")
    head.mkdir()
    for _ in range(2):
        with pytest.raises(AuditUnavailable, match="Is a directory"):
            audit.write("admitted", key="alice", request_id="r1")
        with open(os.devnull) as another:  # takes the lowest number that is free
            with pytest.raises(AuditUnavailable, match="Is a directory"):
                audit.write("admitted", key="alice", request_id="r1")
            os.fstat(another.fileno())
    head.rmdir()
    audit.write("admitted", key="alice", request_id="r2")
    audit.close()
    report = verify([tmp_path / "a.jsonl"])
    assert (report.problems, report.last.seq) == ([], report.lines)


def changed(whole: Path, folder: Path, data: bytes) -> list[str]:
    """The problems of a chain whose bytes are `data` and whose head is as it was."""
    path = folder / whole.name
    path.write_bytes(data)
    (folder / "a.jsonl.head").write_bytes((whole.parent / "a.jsonl.head").read_bytes())
    return verify([path]).problems


def test_a_chain_that_nobody_touched_is_whole(whole: Path) -> None:
    report = verify([whole])
    assert (report.problems, report.notes, report.lines) == ([], [], 12)
    assert report.last == Head.parse((whole.parent / "a.jsonl.head").read_text())


@given(st.data())
@law
def test_any_flipped_byte_is_found(whole: Path, tmp_path: Path, data: st.DataObject) -> None:
    content = bytearray(whole.read_bytes())
    at = data.draw(st.integers(0, len(content) - 1))
    content[at] ^= data.draw(st.integers(1, 255))
    found = changed(whole, tmp_path, bytes(content))
    line = whole.read_bytes()[:at].count(b"\n") + 1
    assert any(f"a.jsonl:{n}:" in problem for problem in found for n in (line, line + 1)), found


@given(st.data())
@law
def test_any_lines_that_are_missing_are_found(whole: Path, tmp_path: Path, data: st.DataObject) -> None:
    lines = whole.read_bytes().splitlines(keepends=True)
    gone = data.draw(st.sets(st.integers(0, len(lines) - 1), min_size=1))
    assert changed(whole, tmp_path, b"".join(line for i, line in enumerate(lines) if i not in gone))


@given(st.data())
@law
def test_any_other_order_is_found(whole: Path, tmp_path: Path, data: st.DataObject) -> None:
    lines = whole.read_bytes().splitlines(keepends=True)
    mixed = data.draw(st.permutations(lines))
    assume(mixed != lines)
    assert changed(whole, tmp_path, b"".join(mixed))


@given(st.data())
@law
def test_a_line_that_is_repeated_or_added_is_found(whole: Path, tmp_path: Path, data: st.DataObject) -> None:
    lines = whole.read_bytes().splitlines(keepends=True)
    more = data.draw(st.sampled_from(lines) | st.just(b"\n") | st.just(b"{}\n") | st.binary(min_size=1, max_size=20))
    lines.insert(data.draw(st.integers(0, len(lines))), more)
    assert changed(whole, tmp_path, b"".join(lines))


def test_a_history_that_was_written_anew_is_found_with_a_head_that_was_kept_elsewhere(tmp_path: Path) -> None:
    kept = verify([filled(tmp_path / "a.jsonl")]).last
    for path in tmp_path.iterdir():
        path.unlink()
    forged = filled(tmp_path / "a.jsonl")
    assert verify([forged]).problems == []
    assert "another hash than the anchor" in verify([forged], [kept]).problems[0]
    assert "the end is missing" in verify([forged], [Head(99, "0" * 64)]).problems[0]


def test_rotation_keeps_the_chain(tmp_path: Path) -> None:
    path = filled(tmp_path / "a.jsonl", 60, max_bytes=4096)
    files = [p for p in tmp_path.iterdir() if p.name.startswith("a.jsonl") and p.suffix not in (".head", ".lock")]
    assert len(files) > 3
    assert all(p.stat().st_size <= 4096 for p in files)
    report = verify(sorted(files, reverse=True))
    assert (report.problems, report.notes) == ([], [])
    assert report.last.seq == report.lines
    first = json.loads(path.read_text().splitlines()[0])
    assert (first["event"], first["detail"]["previous"]) == ("rotated", f"a.jsonl.{first['seq'] - 1}")
    [gone] = [p for p in files if p.name == first["detail"]["previous"]]
    assert "lines are missing" in verify([p for p in files if p != gone]).problems[0]


def rotated(path: Path) -> list[Path]:
    """The files of a chain, in their order."""
    older = [p for p in path.parent.iterdir() if p.name.startswith(f"{path.name}.") and p.suffix[1:].isdigit()]
    return [*sorted(older, key=lambda p: int(p.suffix[1:])), path]


def test_any_loss_is_a_problem_unless_an_anchor_vouches_for_it(tmp_path: Path) -> None:
    path = filled(tmp_path / "a.jsonl", 60, max_bytes=4096)
    files = rotated(path)
    head, last = tmp_path / "a.jsonl.head", verify(files).last
    before = Head(int(files[0].suffix[1:]), json.loads(files[0].read_text().splitlines()[-1])["hash"])
    later = files[1:]
    found = verify(later)
    assert len(found.problems) == 1
    assert f"lines 1 to {before.seq} are missing" in found.problems[0]
    assert f"--from {before.seq + 1}" in found.problems[0]
    assert f"--anchor {before}" in found.problems[0]
    assert verify(later, start=before.seq + 1).problems == []
    assert verify(later, start=before.seq).problems, "a line more than was said to be elsewhere"
    assert verify(later, [before]).problems == []
    assert "does not follow the anchor" in verify(later, [Head(before.seq, "0" * 64)]).problems[0]
    assert verify(files, start=before.seq + 1).problems == [], "more than was asked for"
    for cut in (files[:-1], files[:1], [files[1]]):  # the head is beside them
        assert any("the end is missing" in problem for problem in verify(cut, start=before.seq + 1).problems)
    head.unlink()
    assert "no FILE.head and no anchor" in verify(files).problems[0]
    assert verify(files, [last]).problems == []
    assert verify(files[:1], [before]).problems == [], "a part whose end is known"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))
    assert "the end is missing" in verify(files, [last]).problems[0]
    for file in files:
        file.write_bytes(b"")
    assert "no line that can be read" in str(verify(files).problems)
    assert verify(files, [Head(0)]).problems


def test_rotation_overwrites_nothing(tmp_path: Path) -> None:
    """Neither files of an older chain that have the names which come, nor anything else."""
    kept = {tmp_path / f"a.jsonl.{seq}": f"older {seq}" for seq in range(1, 80)}
    for path, text in kept.items():
        path.write_text(text)
    path = filled(tmp_path / "a.jsonl", 60, max_bytes=4096)
    filled(path, 60, max_bytes=4096)
    assert all(old.read_text() == text for old, text in kept.items() if old.exists())
    assert all(old.exists() for old in kept)
    files = [p for p in tmp_path.glob("a.jsonl*") if p not in kept and p.suffix not in (".head", ".lock")]
    assert len(files) > 5
    report = verify(files)
    assert (report.problems, report.notes, report.last.seq) == ([], [], report.lines)


def test_a_disk_that_is_full_as_a_new_file_begins_costs_no_descriptors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each line that is refused looks again where the chain ends; no sync comes in between."""
    audit = Audit(tmp_path / "a.jsonl", max_bytes=4096, fsync="always")
    monkeypatch.setattr(audit, "_sync", lambda: None)
    audit.open()
    while audit._size < 3000:
        audit.write("admitted", key="alice", detail="x" * 600)

    def full(fd: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        counts = []
        for _ in range(8):
            with pytest.raises(AuditUnavailable, match="No space left"):
                audit.write("admitted", key="alice", detail="x" * 1200)
            counts.append(len(os.listdir("/proc/self/fd")))
    assert audit._size == 0, "the file was begun"
    assert len(set(counts)) == 1
    audit.write("admitted", key="alice")
    audit.close()
    assert not verify_with_rotated(audit.path).problems


def test_a_file_that_cannot_be_renamed_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    audit = Audit(tmp_path / "a.jsonl", fsync="never", max_bytes=2000)
    audit.open()

    def busy(*_: object) -> None:
        raise OSError(errno.EBUSY, "Device or resource busy")

    monkeypatch.setattr(os, "rename", busy)
    before, refused = set(tmp_path.iterdir()), 0
    for number in range(60):
        try:
            audit.write("refused", key="alice", request_id=f"r{number}")
        except AuditUnavailable:
            refused += 1
    assert refused > 20
    assert set(tmp_path.iterdir()) == before
    monkeypatch.undo()
    audit.write("refused", key="alice", request_id="again")
    audit.close()
    assert verify_with_rotated(audit.path).problems == []


def test_a_log_is_whole_while_a_server_rotates_it(tmp_path: Path) -> None:
    audit = Audit(tmp_path / "a.jsonl", fsync="never", max_bytes=20_000)
    audit.open()
    audit.note("start")  # or the first look may come before the first line
    ended = threading.Event()

    def write() -> None:
        while not ended.is_set():
            audit.write("refused", key="alice", request_id="r")
            time.sleep(1e-4)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        while len(with_rotated(audit.path)) < 12:
            assert verify_with_rotated(audit.path).problems == []
    finally:
        ended.set()
        writer.join()
    audit.close()


@pytest.mark.parametrize("first", [FileNotFoundError("between its two names"), "the line is torn"])
def test_what_is_seen_only_once_of_a_log_is_no_problem(
    first: Exception | str, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[Exception | str | None] = [first, None]

    def looked(*given: Any) -> Verification:
        if isinstance(seen := looks.pop(0), Exception):
            raise seen
        report = verify(*given)
        return replace(report, problems=[seen]) if seen else report

    monkeypatch.setattr("steer.serve.audit.verify", looked)
    assert verify_with_rotated(whole).problems == []


def test_a_crash_in_the_middle_of_a_rotation_is_healed(tmp_path: Path) -> None:
    """The full file has its new name, which a file of an older chain had before, and the next one is not begun."""
    path = filled(tmp_path / "a.jsonl", 5)
    (tmp_path / "a.jsonl.5").write_text("older")
    os.rename(path, tmp_path / "a.jsonl.5-2")
    filled(path, 2)
    report = verify([path, tmp_path / "a.jsonl.5-2"])
    assert (report.problems, report.notes, report.last.seq) == ([], [], 8)


def test_no_line_is_longer_than_can_be_read_again(tmp_path: Path) -> None:
    audit = Audit(tmp_path / "a.jsonl", fsync="never")
    audit.open()
    audit.write("admitted")
    with pytest.raises(AuditUnavailable, match="at most 262144 are accepted"):
        audit.write("admitted", model="x" * MAX_LINE)
    audit.note("ended", model="x" * MAX_LINE)
    audit.write("admitted")
    audit.close()
    report = verify([tmp_path / "a.jsonl"])
    assert (report.problems, report.lines) == ([], 3)


def test_what_is_no_file_is_no_log(tmp_path: Path) -> None:
    """A FIFO would swallow every line."""
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(AuditError, match="not a regular file"):
        Audit(tmp_path / "fifo").open()
    audit = Audit(tmp_path / "a.jsonl", fsync="never")
    audit.open()
    os.rename(audit.path, tmp_path / "moved")
    os.mkfifo(audit.path)
    with pytest.raises(AuditUnavailable, match="not a regular file"):
        audit.write("admitted")
    audit.close()


def test_a_restart_goes_on_with_the_chain(tmp_path: Path) -> None:
    path = filled(tmp_path / "a.jsonl", 3)
    filled(path, 3)
    report = verify([path])
    assert (report.problems, report.notes, report.last.seq) == ([], [], 6)


@pytest.mark.parametrize("cut", [1, 2, 40])
def test_a_line_that_a_crash_has_torn_is_healed_and_said(tmp_path: Path, cut: int) -> None:
    path = filled(tmp_path / "a.jsonl", 3)
    audit = Audit(path, fsync="never")
    audit.open()
    audit.write("refused", key="torn")
    audit.close()
    data = path.read_bytes()
    torn = data.splitlines(keepends=True)[-1][:-cut]
    path.write_bytes(data[: -len(torn) - cut] + torn)
    (tmp_path / "a.jsonl.head").write_text(str(Head(3, json.loads(data.splitlines()[2])["hash"])))  # as a crash has it
    assert "torn" in verify([path]).problems[0]
    filled(path, 1)
    report = verify([path])
    assert report.problems == []
    assert len(report.notes) == 1
    event = json.loads(path.read_text().splitlines()[3])
    assert (event["event"], event["detail"]["torn"]["bytes"]) == ("recovered", len(torn))
    assert event["detail"]["torn"]["begins"].startswith('{"time"')


def test_a_tail_that_was_cut_between_two_runs_stays_a_problem(tmp_path: Path) -> None:
    path = filled(tmp_path / "a.jsonl", 5)
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:3]))
    filled(path, 2)
    assert any("lines 4 to 5" in problem for problem in verify([path]).problems)


def test_a_file_that_is_gone_between_two_runs_stays_a_problem(tmp_path: Path) -> None:
    path = filled(tmp_path / "a.jsonl", 5)
    path.unlink()
    filled(path, 2)
    assert verify([path]).problems


def test_an_edited_last_line_is_not_taken_for_a_good_one(tmp_path: Path) -> None:
    path = filled(tmp_path / "a.jsonl", 3)
    path.write_text(path.read_text().replace("r2", "r9"))
    filled(path, 1)
    found = verify([path]).problems
    assert any("a.jsonl:3: the hash of the line is wrong" in problem for problem in found)


@pytest.mark.parametrize("fsync", ["always", "never"])
def test_several_processes_write_one_chain(tmp_path: Path, fsync: str) -> None:
    """Also over rotations, which any of them does, and when one of them dies in the middle of a line."""
    path, lines = tmp_path / "a.jsonl", 150
    program = f"""
import os, sys
from pathlib import Path
from steer.serve.audit import Audit
audit = Audit(Path({str(path)!r}), max_bytes=8192, fsync={fsync!r})
audit.open()
for number in range({lines}):
    audit.write("admitted", key=sys.argv[1], request_id=str(number))
if sys.argv[1] == "1":
    with audit._alone():  # as `write` does: another process may have rotated the file
        audit._catch_up()
        os.write(audit._fd, b'{{"time": "torn')
        os._exit(0)
if audit.kept(audit.head.seq):
    audit.kept(audit.head.seq).result(30)
audit.close()
"""
    writers = [subprocess.Popen([sys.executable, "-c", program, str(n)]) for n in range(3)]
    assert [writer.wait(120) for writer in writers] == [0, 0, 0]
    filled(path, 1)
    files = [p for p in tmp_path.iterdir() if p.suffix not in (".head", ".lock")]
    assert len(files) > 3
    report = verify(files)
    assert report.problems == []
    told = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    for n in range(3):
        mine = sorted((line["seq"], int(line["request_id"])) for line in told if line.get("key") == str(n))
        assert [number for _, number in mine] == list(range(lines))


def test_what_cannot_be_written_at_all_is_said_at_once(tmp_path: Path) -> None:
    with pytest.raises(AuditError, match="cannot be written"):
        Audit(tmp_path / "none" / "a").open()


def test_what_cannot_be_written_is_refused_counted_and_said(tmp_path: Path) -> None:
    """A file that cannot grow, as on a full disk: the write takes a part of the line and then fails."""
    program = f"""
import resource
from pathlib import Path
from steer.serve.audit import Audit, AuditUnavailable
path = Path({str(tmp_path / "a.jsonl")!r})
audit = Audit(path, fsync="never")
audit.open()
audit.write("admitted", key="alice")
resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 60, resource.RLIM_INFINITY))
for _ in range(2):
    try:
        audit.write("admitted", key="bob")
    except AuditUnavailable as error:
        print(error, audit.failed is not None)
audit.note("ended", key="alice")
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
audit.write("admitted", key="carol")
print(audit.failed)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["the audit log cannot be written: File too large True"] * 2 + ["None"]
    report = verify([tmp_path / "a.jsonl"])
    assert report.problems == []
    said = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert [(line["event"], line.get("key")) for line in said] == [
        ("admitted", "alice"),
        ("recovered", None),
        ("admitted", "carol"),
    ]
    assert said[1]["detail"] == {"lost": {"ended": 1}}


def test_a_file_that_is_moved_away_is_begun_anew_with_the_chain(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    audit = Audit(path, fsync="never")
    audit.open()
    audit.write("admitted")
    os.rename(path, tmp_path / "a.jsonl.1")
    audit.write("admitted")
    os.rename(path, tmp_path / "elsewhere")
    path.mkdir()
    with pytest.raises(AuditUnavailable):
        audit.write("admitted")
    path.rmdir()
    os.rename(tmp_path / "elsewhere", path)
    audit.write("admitted")
    audit.close()
    report = verify([path, tmp_path / "a.jsonl.1"])
    assert (report.problems, report.lines) == ([], 4)


def test_a_head_of_no_line_vouches_for_none(tmp_path: Path) -> None:
    """A log that was cut, beside a head of zeros, would be whole."""
    path = filled(tmp_path / "a.jsonl", 5)
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:2]))
    (tmp_path / "a.jsonl.head").write_text(f"{0:020d}:{'0' * 64}\n")
    for anchors in ((), (Head(),)):
        assert "nobody would notice lines missing" in str(verify([path], anchors).problems)


def test_what_is_no_log_is_said_once(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("a line\n" * 80 + "and its end")
    (problem,) = verify([path]).problems
    assert "notes.txt: this is not an audit log: none of its 81 lines" in problem
    log = filled(tmp_path / "a.jsonl", 3)
    assert len(verify([log, path]).problems) == 1
    log.write_text(log.read_text().replace("r1", "r9"))
    assert verify([log]).problems[0].startswith("a.jsonl:2: the hash")


def test_what_never_ended_is_a_note_and_no_problem(tmp_path: Path) -> None:
    audit = Audit(tmp_path / "a.jsonl", fsync="never")
    audit.open()
    for front_end in (0, 1):
        audit.write("start", detail={"front_end": front_end})
    first, second = audit.write("admitted"), audit.write("admitted")
    audit.write("ended", admitted=first)
    audit.write("stop", detail={"front_end": 0})
    assert [note for note in verify([audit.path]).notes if f"lines {second} (1 in all)" in note]
    audit.write("start", detail={"front_end": 0})
    assert len(verify([audit.path]).notes) == 1, "one of two front ends was stopped and is started again"
    restarted = audit.write("start", detail={"front_end": 1})
    report = verify([audit.path])
    assert report.problems == []
    assert report.notes[0].startswith(f"line {restarted}: a server starts, and no `stop` came after")
    audit.close()


def test_the_command_finds_the_files_that_a_log_was_rotated_to(tmp_path: Path) -> None:
    path = filled(tmp_path / "a.jsonl", 40, max_bytes=2000)
    (tmp_path / "a.jsonl.old").write_text("of somebody else")
    command = [sys.executable, "-m", "steer", "audit", "verify"]
    done = subprocess.run([*command, str(tmp_path / "a.jsonl.old")], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, ""), "no head of what is no log"
    assert len(list(tmp_path.glob("a.jsonl.*[0-9]"))) > 2
    for files in ([path], [path, *tmp_path.glob("a.jsonl.*[0-9]")]):
        done = subprocess.run([*command, *map(str, files)], capture_output=True, text=True)
        assert (done.returncode, "whole" in done.stdout) == (0, True), done.stderr


@given(st.binary(max_size=80))
def test_any_bytes_are_an_audit_line_or_an_error(data: bytes) -> None:
    try:
        unseal(data + b"\n")
    except ValueError:
        return
    raise AssertionError("no random bytes have their own hash")


def test_the_command_names_the_line_and_says_it_with_its_exit_code(whole: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "steer", "audit", "verify"]
    done = subprocess.run([*command, str(whole)], capture_output=True, text=True)
    assert (done.returncode, done.stdout.split(";")[0]) == (0, "12 lines, whole")
    report = verify([whole])
    later = tmp_path / "c.jsonl"
    later.write_text("".join(whole.read_text().splitlines(keepends=True)[4:]))
    assert subprocess.run([*command, str(later), "--anchor", str(report.last)]).returncode == 1
    told = [*command, str(later), "--anchor", str(report.last), "--from", "5"]
    assert subprocess.run(told, capture_output=True).returncode == 0
    broken = tmp_path / "b.jsonl"
    broken.write_text(whole.read_text().replace("r7", "r8"))
    done = subprocess.run([*command, str(broken)], capture_output=True, text=True)
    assert done.returncode == 1
    assert "problem: b.jsonl:8: the hash of the line is wrong" in done.stderr
    done = subprocess.run([*command, str(tmp_path / "none")], capture_output=True, text=True)
    assert done.returncode == 2
