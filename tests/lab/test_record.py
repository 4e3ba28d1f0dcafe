"""Whatever byte an interruption stopped at, what is kept is a beginning of what was written, and goes on."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from steer.errors import InvalidInput
from steer.lab.resume import Record

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
    Record(path, head).append(*lines)
    whole = path.read_bytes()
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole)))])
    again = Record(path, head)
    kept = len(again.lines)
    assert again.lines == lines[:kept]
    again.append(*lines[kept:])
    assert path.read_bytes() == whole
    again.keep(kept)
    assert Record(path, head).lines == lines[:kept]


def test_another_head_is_refused_with_all_that_differs(tmp_path: Path) -> None:
    path = tmp_path / "record.jsonl"
    Record(path, {"model": "m", "same": 1, "gone": 2}).append("kept")
    with pytest.raises(InvalidInput) as caught:
        Record(path, {"model": "other", "same": 1, "new": 3})
    assert len(caught.value.problems) == 3
    assert Record(path, {"model": "m", "same": 1, "gone": 2}).lines == ["kept"]
