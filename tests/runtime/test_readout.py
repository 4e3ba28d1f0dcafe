"""The read-out against plain arithmetic, whatever shares the batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steer.runtime.readout import ReadIndex, RequestRead, components

ROWS, WIDTH, LAYERS, RANK = 6, 8, 3, 4


def test_a_component_is_the_inner_product() -> None:
    x, v = torch.randn(5, WIDTH), torch.randn(5, 2, WIDTH)
    for n in range(5):
        for k in range(2):
            assert float(components(x, v)[n, k]) == pytest.approx(float(x[n] @ v[n, k]), abs=1e-5)


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_each_reader_gets_its_own_last_token_rows_and_layers(data: st.DataObject) -> None:
    """Batches of any make-up, one after the other in the same buffers."""
    index = ReadIndex(LAYERS, RANK, "cpu")
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(LAYERS, ROWS, WIDTH, generator=generator)
    rows = st.lists(st.integers(1, ROWS - 1), min_size=1, max_size=RANK)
    layers = st.sets(st.integers(0, LAYERS - 1), min_size=1)
    one = st.tuples(st.integers(1, 5), st.none() | st.tuples(rows, layers))
    for batch in data.draw(st.lists(st.lists(one, min_size=1, max_size=6), min_size=1, max_size=4)):
        lengths = [length for length, _ in batch]
        reads = [r and RequestRead(np.array(r[0], np.int64), tuple(sorted(r[1]))) for _, r in batch]
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
                lines = vectors[layer, read.rows]
                np.testing.assert_allclose(reading.before[at], lines @ x[layer, end], atol=1e-5)
                np.testing.assert_allclose(reading.after[at], lines @ y[layer, end], atol=1e-5)
                assert reading.norms[at] == pytest.approx(float(x[layer, end].norm()), rel=1e-5)
        assert next(found, None) is None
        assert not index.layers, "once collected, nothing is read any more"


def test_a_low_precision_stream_is_read_in_float32() -> None:
    x = torch.randn(1, 4096).bfloat16()
    v = torch.nn.functional.normalize(torch.randn(1, 1, 4096), dim=-1)
    expected = float(x[0].double() @ v[0, 0].double())
    assert float(components(x, v)) == pytest.approx(expected, abs=1e-4)
