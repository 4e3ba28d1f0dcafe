"""How time and memory grow with layers, width, rows, rank and tokens: the formula, and what was measured beside it.

`python -m benchmarks.growth`, on a GPU where there is one. Time is of the operation at all layers, as hooks call it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from benchmarks.results import Result, benchmark_parser, median_seconds
from steer.names import MODES
from steer.runtime.bank import DirectionBank, HookPoint, gather, operate
from steer.runtime.op import COEFFICIENTS
from steer.runtime.token_index import RequestSteer, TokenIndex, fields, slot

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True, slots=True)
class Case:
    layers: int = 32
    width: int = 2048
    rows: int = 32
    rank: int = 1
    tokens: int = 256

    def expected_bytes(self) -> int:
        """Float32 vectors and, in each mode, the coefficients of every row (and row 0) at every layer, and its number;
        for every token the fields of its index, and whether it is lost. Where the rank is not 1, for every token
        whether it is open, and for every request (here of one token) a matrix at every layer."""
        bank = self.layers * ((self.rows + 1) * (4 * self.width + 4 * COEFFICIENTS * len(MODES)) + 4)
        together = self.tokens + self.layers * (self.tokens + 1) * self.rank**2 * 4 if self.rank > 1 else 0
        return bank + self.tokens * (4 * fields(self.rank) + 1) + together

    def run(self, repeats: int) -> tuple[int, float, float]:
        """Bytes, milliseconds of the operation at all layers, microseconds of filling the index for a step."""
        points = [HookPoint("resid_post", layer) for layer in range(self.layers)]
        bank = DirectionBank(
            points, rows=self.rows, rank=self.rank, d_model=self.width, device=DEVICE, requests=self.tokens
        )
        index = TokenIndex(self.rank, self.tokens, DEVICE)
        for bank_slice in bank.slices.values():
            bank_slice.vectors.copy_(torch.nn.functional.normalize(torch.randn(bank_slice.vectors.shape), dim=-1))
        steer = RequestSteer.plain(self.rank)
        steer.slots[:] = [slot(row, "ablate") for row in range(1, self.rank + 1)]
        steer.strengths[:] = 1
        number = index.enter(steer)
        numbers, lengths = np.full(self.tokens, number), np.ones(self.tokens, np.int64)
        x = torch.randn(self.tokens, self.width, dtype=torch.bfloat16, device=DEVICE)
        slices = list(bank.slices.values())

        @torch.inference_mode()
        def operation() -> None:
            for bank_slice in slices:
                operate(x, gather(bank_slice, *index.first(len(x))))

        filling = median_seconds(lambda: index.fill(numbers, lengths), repeats)
        tensors = [t for one in slices for t in (one.vectors, one.coefficients, one.number, one.joint)]
        used = sum(t.nbytes for t in (*tensors, index.packed, index.lost, index.opened) if t is not None)
        return used, 1e3 * median_seconds(operation, repeats), 1e6 * filling


SWEEPS: dict[str, Sequence[int]] = {
    "layers": (16, 32, 64),
    "width": (1024, 2048, 4096, 8192),
    "rows": (8, 32, 128, 512),
    "rank": (1, 2, 4, 8),
    "tokens": (1, 16, 256, 1024),
}


def report(repeats: int) -> str:
    # freed once, such sizes come from glibc's heap and not as new pages each time, as after a model's first pass
    torch.empty(2**25 - 2**12, dtype=torch.uint8)
    parts = [
        f"Everything else at {Case()}; bfloat16 stream on {DEVICE}, not compiled.\n",
        f"Memory: `layers × ((rows + 1) × (4·width + {4 * COEFFICIENTS * len(MODES)}) + 4) + tokens × "
        f"({4 * fields(1)}·rank + 1)` bytes, and where the rank is not 1 "
        f"`tokens × {4 * fields(2) - 8 * fields(1) + 1} + layers × (tokens + 1) × rank² × 4`.\n",
    ]
    for name, values in SWEEPS.items():
        lines = [
            f"| {name} | bytes by formula | bytes measured | operation at all layers, ms | index of a step, µs |",
            "|---:|---:|---:|---:|---:|",
        ]
        for value in values:
            case = replace(Case(), **{name: value})
            size, milliseconds, filling = case.run(repeats)
            lines.append(f"| {value} | {case.expected_bytes():,} | {size:,} | {milliseconds:.2f} | {filling:.1f} |")
        parts.append("\n".join([*lines, ""]))
    return "\n".join(parts)


if __name__ == "__main__":
    parser = benchmark_parser(__doc__)
    parser.add_argument("--repeats", type=int, default=15)
    given = parser.parse_args()
    result = Result("growth", "How time and memory grow", {}, [], report(given.repeats))
    result.publish(given.out)
