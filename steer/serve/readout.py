"""The read-out in an answer: what was read at each token, in JSON."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from numpy.typing import NDArray
from pydantic import BaseModel, Field

from steer.readout import Readout
from steer.runtime.readout import Reading

#: Significant digits of a number in the answer.
DIGITS = 5

DirectionBank = list[list[float | None]]


class ReadLine(BaseModel):
    """One row of a direction."""

    name: str = Field(description="the name that was asked for")
    digest: str = Field(description="the version that is read, which is the one that steers where both are asked for")
    row: int = Field(description="which of the direction's rows, from 0")
    before: DirectionBank = Field(description="for each token, for each layer: the component before the operation")
    after: DirectionBank = Field(description="and after it; for a plain request the same")


class ReadReport(BaseModel):
    """The field `steer_readout` of one choice, or of one choice in a chunk of a stream."""

    layers: list[int] = Field(description="the layers that were read; the innermost lists follow them")
    tokens: list[str] = Field(description="the generated tokens as text, those of `logprobs`; in a chunk the new ones")
    norms: DirectionBank = Field(description="for each token, for each layer: the stream's norm before the operation")
    directions: list[ReadLine] = Field(description="what was read, in the order that was asked for")


def report(readout: Readout, tokens: Sequence[tuple[str, Reading | None]]) -> ReadReport:
    """The report on `tokens`, each its text and what was read where it was predicted."""
    readings = [reading for _, reading in tokens if reading]
    assert len(readings) == len(tokens), "the engine reads every token of a request that asks"
    return ReadReport(
        layers=list(readout.layers),
        tokens=[text for text, _ in tokens],
        norms=[_numbers(reading.norms) for reading in readings],
        directions=[
            ReadLine(
                name=line.name,
                digest=line.digest,
                row=line.row,
                before=[_numbers(reading.before[:, k]) for reading in readings],
                after=[_numbers(reading.after[:, k]) for reading in readings],
            )
            for k, line in enumerate(readout.lines)
        ],
    )


def _numbers(values: NDArray[Any]) -> list[float | None]:
    """Rounded; JSON has no number for what overflowed."""
    return [float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None for value in values.tolist()]
