"""The read-out against plain arithmetic, whatever shares the batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from steer.readout import Line, Readout
from steer.runtime.readout import ReadIndex, components

ROWS, WIDTH, LAYERS, RANK = 6, 8, 3, 4


def rows_of(digests: Sequence[str], axes: bool = False) -> NDArray[np.int64]:
    """Here a digest is the number of its bank row, and the axis is the row in front of it."""
    return np.array([row for digest in digests for row in (int(digest), int(digest) - 1)[: 1 + axes]], np.int64)


def readout(rows: Sequence[int], layers: Sequence[int]) -> Readout:
    return Readout(tuple(Line(f"d{row}", str(row), 0) for row in rows), tuple(layers))


def test_a_component_is_the_inner_product() -> None:
    x, v = torch.randn(5, WIDTH), torch.randn(5, 2, WIDTH)
    for n in range(5):
        for k in range(2):
            assert float(components(x, v)[n, k]) == pytest.approx(float(x[n] @ v[n, k]), abs=1e-5)


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_each_reader_gets_its_own_last_token_rows_and_layers(data: st.DataObject) -> None:
    """Batches of any make-up, one after the other in the same buffers."""
    index = ReadIndex("cpu", rows_of)
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(LAYERS, ROWS, WIDTH, generator=generator)
    rows = st.lists(st.integers(1, ROWS - 1), min_size=1, max_size=RANK, unique=True)
    layers = st.sets(st.integers(0, LAYERS - 1), min_size=1)
    one = st.tuples(st.integers(1, 5), st.none() | st.tuples(rows, layers))
    for batch in data.draw(st.lists(st.lists(one, min_size=1, max_size=6), min_size=1, max_size=4)):
        lengths = [length for length, _ in batch]
        reads = [r and readout(r[0], sorted(r[1])) for _, r in batch]
        index.fill(reads, lengths)
        x, y = torch.randn(2, LAYERS, sum(lengths), WIDTH, generator=generator)
        assert index.layers == {layer for read in reads if read for layer in read.layers}
        for layer in index.layers:
            index.record(layer, x[layer], y[layer], vectors[layer])
        found = iter(index.collect())
        for read, end in zip(reads, np.cumsum(lengths) - 1, strict=True):
            if read is None:
                continue
            reading = next(found)
            for at, layer in enumerate(read.layers):
                lines = vectors[layer, rows_of(read.digests)]
                np.testing.assert_allclose(reading.before[at], lines @ x[layer, end], atol=1e-5)
                np.testing.assert_allclose(reading.after[at], lines @ y[layer, end], atol=1e-5)
                assert reading.norms[at] == pytest.approx(float(x[layer, end].norm()), rel=1e-5)
        assert next(found, None) is None
        assert not index.layers, "once collected, nothing is read any more"


def test_a_later_request_is_read_at_the_rows_that_its_version_has_then() -> None:
    """A version that was unloaded and came back has other rows, and its read-out is equal to the one before."""
    row = 1
    index = ReadIndex("cpu", lambda *_: np.array([row]))
    x, vectors = torch.ones(1, WIDTH), torch.arange(1.0, 4.0)[:, None].expand(3, WIDTH)
    before = readout([0], [0])

    def found(read: Readout) -> float:
        index.fill([read], [1])
        index.record(0, x, x, vectors)
        return float(index.collect()[0].before[0, 0])

    assert [found(before), found(before)] == [2 * WIDTH] * 2
    row = 2
    assert found(readout([0], [0])) == 3 * WIDTH


def test_a_request_that_has_ended_takes_no_other_ones_read_out_with_it() -> None:
    """Its version may be unloaded before the model's thread knows that it has ended."""
    resident = {"old": [1], "new": [2]}
    index = ReadIndex("cpu", lambda digests, _: np.array([row for d in digests for row in resident[d]]))
    old, new = (Readout((Line("refusal", digest, 0),), (0,)) for digest in resident)
    x, vectors = torch.ones(2, WIDTH), torch.tensor([0.0, 2.0, 3.0])[:, None].expand(3, WIDTH)

    def found(reads: list[Readout]) -> list[float]:
        index.fill(reads, [1] * len(reads))
        index.record(0, x[: len(reads)], x[: len(reads)], vectors)
        return [float(reading.before[0, 0]) for reading in index.collect()]

    assert found([old]) == [2 * WIDTH]
    del resident["old"]
    assert found([old, new]) == [0, 3 * WIDTH]


def test_an_angle_is_that_in_the_plane_of_direction_and_axis() -> None:
    """Of a stream that is made of its angle, among others that are read without; where there is no plane it is NaN."""
    index = ReadIndex("cpu", rows_of)
    vectors = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(0)))[0][:ROWS]
    v, u = vectors[2], vectors[1]
    turned = [torch.tensor(angle).deg2rad() for angle in (100.0, -35.0)]
    x, y = (3 * (angle.cos() * u + angle.sin() * v) + 5 * vectors[4] for angle in turned)
    index.fill([readout([2], [0, 1]), replace(readout([2, 4], [0, 1]), angle=True)], [1, 1])
    for layer, rows in ((0, vectors), (1, torch.zeros_like(vectors))):
        index.record(layer, x.expand(2, -1), y.expand(2, -1), rows)
    alone, reading = index.collect()
    assert alone.angles is None
    assert reading.angles is not None
    np.testing.assert_allclose(reading.angles[:, 0, 0], [100, -35], atol=1e-3)
    np.testing.assert_allclose(reading.angles[:, 0, 1], [90, 90], atol=1e-3)
    assert np.isnan(reading.angles[:, 1]).all()
    np.testing.assert_array_equal(reading.before[:, 0], alone.before[:, 0])
    assert reading.before.shape == (2, 2)


def test_a_low_precision_stream_is_read_in_float32() -> None:
    x = torch.randn(1, 4096).bfloat16()
    v = torch.nn.functional.normalize(torch.randn(1, 1, 4096), dim=-1)
    expected = float(x[0].double() @ v[0, 0].double())
    assert float(components(x, v)) == pytest.approx(expected, abs=1e-4)
