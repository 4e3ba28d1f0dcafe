"""The read-out in an answer: what was read at each token, in JSON."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from numpy.typing import NDArray

from steer.readout import Readout
from steer.runtime.readout import Reading

#: Significant digits of a number in the answer.
DIGITS = 5


def report(readout: Readout, tokens: Sequence[tuple[str, Reading | None]]) -> dict[str, Any]:
    """The field `steer_readout` of one choice: parallel lists with one item for each of `tokens` (text and what was
    read), which are those of `logprobs`; each item has one number for each of `layers`. Items of one answer's chunks,
    put behind each other, are those of the whole answer."""
    readings = [reading for _, reading in tokens if reading]
    assert len(readings) == len(tokens), "the engine reads every token of a request that asks"
    return {
        "layers": list(readout.layers),
        "tokens": [text for text, _ in tokens],
        "norms": [_numbers(reading.norms) for reading in readings],
        "directions": [
            {
                "name": line.name,
                "digest": line.digest,
                "row": line.row,
                "before": [_numbers(reading.before[:, k]) for reading in readings],
                "after": [_numbers(reading.after[:, k]) for reading in readings],
            }
            for k, line in enumerate(readout.lines)
        ],
    }


def _numbers(values: NDArray[Any]) -> list[float | None]:
    """Rounded; JSON has no number for what overflowed."""
    return [float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None for value in values.tolist()]
