"""Whatever byte an interruption stopped at, what is kept is a beginning of what was written, and goes on."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from steer.errors import InvalidInput
from steer.lab.resume import CHUNK, Alone, Cache, ResultFile

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(st.dictionaries(st.text(), JSON), st.lists(JSON, max_size=6), st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_what_was_cut_off_goes_on(
    tmp_path: Path, head: dict[str, object], lines: list[object], data: st.DataObject
) -> None:
    path = tmp_path / "record.jsonl"
    path.unlink(missing_ok=True)
    ResultFile(path, head).append(*lines)
    whole = path.read_bytes()
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole)))])
    again = ResultFile(path, head)
    kept = len(again.lines)
    assert again.lines == lines[:kept]
    again.append(*lines[kept:])
    assert path.read_bytes() == whole
    again.keep(kept)
    assert ResultFile(path, head).lines == lines[:kept]


def test_what_is_not_ours_is_refused_with_its_name(tmp_path: Path) -> None:
    path = tmp_path / "record.jsonl"
    ResultFile(path, {"a": 1}).append("kept")
    path.write_bytes(path.read_bytes() + b'"\xff\xfe"\n"after"\n')
    assert ResultFile(path, {"a": 1}).lines == ["kept"], "up to the line that cannot be read"
    (tmp_path / Alone.file).mkdir()
    with pytest.raises(InvalidInput, match=r"\.lock: cannot be opened"):
        Alone(tmp_path)


def test_another_head_is_refused_with_all_that_differs(tmp_path: Path) -> None:
    path = tmp_path / "record.jsonl"
    ResultFile(path, {"model": "m", "same": 1, "gone": 2}).append("kept")
    with pytest.raises(InvalidInput) as caught:
        ResultFile(path, {"model": "other", "same": 1, "new": 3})
    assert len(caught.value.problems) == 3
    assert ResultFile(path, {"model": "m", "same": 1, "gone": 2}).lines == ["kept"]


class Counting:
    """Makes its row numbers, and breaks once it has made `until` of them."""

    def __init__(self, until: int = 10**9) -> None:
        self.until, self.spans = until, list[tuple[int, int]]()

    def __call__(self, start: int, stop: int) -> list[int]:
        if start >= self.until:
            raise KeyboardInterrupt
        self.spans.append((start, stop))
        return list(range(start, stop))


COUNT = 2 * CHUNK + 5


def test_a_folder_is_one_runs_at_a_time(tmp_path: Path) -> None:
    held = Cache(tmp_path, {})
    with pytest.raises(InvalidInput, match=re.escape(f"{tmp_path / 'measured'}: another run")):
        Cache(tmp_path, {})
    assert held.value("a", {}, lambda: 1) == 1
    del held
    assert Cache(tmp_path, {}).value("a", {}, lambda: 2) == 1


@pytest.mark.parametrize("folder", [True, False])
def test_rows_are_made_in_chunks_and_kept(tmp_path: Path, folder: bool) -> None:
    cache, make = Cache(tmp_path if folder else None, {"model": "m"}), Counting()
    assert cache.rows("a.b", {}, COUNT, make) == list(range(COUNT))
    assert make.spans == [(0, CHUNK), (CHUNK, 2 * CHUNK), (2 * CHUNK, COUNT)]
    again = Counting()
    assert cache.rows("a.b", {}, COUNT, again) == list(range(COUNT))
    assert again.spans == ([] if folder else make.spans)


def test_no_two_names_share_a_file(tmp_path: Path) -> None:
    names = ["a:rotate_one_sided=1", "a_rotate:one_sided=1", "x y", "x_y", "x%20y", "d@3>0.3", "d@3<0.3", "a/b"]
    names += ["模型" * 30, "模型" * 31, "a" * 1000, "not text: \udcff"]
    cache = Cache(tmp_path, {})
    for at, name in enumerate(names):
        assert cache.value(name, {}, lambda at=at: at) == at
    assert [cache.value(name, {}, lambda: None) for name in names] == list(range(len(names)))


def test_an_interrupted_run_goes_on_with_the_same_chunks(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        Cache(tmp_path, {}).rows("a", {}, COUNT, Counting(until=2 * CHUNK))
    (file,) = (tmp_path / "measured").glob("*.jsonl")
    file.write_text(file.read_text()[:-3])  # the machine went down amid a line
    make = Counting()
    assert Cache(tmp_path, {}).rows("a", {}, COUNT, make) == list(range(COUNT))
    assert make.spans == [(CHUNK, 2 * CHUNK), (2 * CHUNK, COUNT)]


def test_other_conditions_are_refused_by_name(tmp_path: Path) -> None:
    Cache(tmp_path, {"model": "m", "dtype": "auto"}).value("a", {"max_tokens": 8}, lambda: 1)
    with pytest.raises(InvalidInput) as caught:
        Cache(tmp_path, {"model": "other", "dtype": "auto"}).value("a", {"max_tokens": 9}, lambda: 2)
    assert len(caught.value.problems) == 2
    assert "max_tokens = 8, this command has 9" in str(caught.value)
    assert "another folder" in str(caught.value)


def test_a_file_whose_first_line_was_cut_begins_anew(tmp_path: Path) -> None:
    cache = Cache(tmp_path, {})
    cache.value("a", {}, lambda: 1)
    (file,) = (tmp_path / "measured").glob("*.jsonl")
    file.write_text(file.read_text()[:5])
    assert cache.value("a", {}, lambda: 2) == 2
    assert cache.value("a", {}, lambda: 3) == 2
