"""Where the operation meets a vLLM model: buffers on a module, and hooks that Dynamo traces into the compiled graph.

All tensors that a hook reads are buffers of the hooked module, written in place for the life of the process: what a
graph was compiled or captured with is what later steps read. A plain token has row 0, which adds exactly zero.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from steer.names import Site
from steer.runtime.bank import Plate, apply
from steer.runtime.memory import lasting
from steer.runtime.readout import AFTER, BEFORE, components
from steer.runtime.token_index import TokenIndex

#: How a block hands on the stream: it returns one tensor; a tuple whose first is the whole stream; or (h, r) with the
#: stream being h + r, added by the norm that comes next.
Form = Literal["tensor", "first", "sum"]


class Reads:
    """The tokens that are read in a step, for all seats that read: at `[count]`, which token; rows `[count, rank]`,
    which rows of the table; int64, written in place. Every pass looks at all of them, so those that are not in use must
    be 0, the one token that every pass has."""

    def __init__(self, count: int, rank: int, device: torch.device) -> None:
        self.count, self.rank = count, rank
        with lasting():
            self.at = torch.zeros(count, dtype=torch.int64, device=device)
            self.rows = torch.zeros(count, rank, dtype=torch.int64, device=device)


class Seat(nn.Module):
    """One place's buffers on the module that is hooked. `vectors` and `coefficients` are the place's plate; `rows`,
    `slots`, `strengths` (`[rank, max_tokens]`) and `combinations` (`[max_tokens]`; it and the plate's `joint` are None
    where the rank is 1) are the token index, one storage for all seats; in `lost` (`[max_tokens]`) each of them says
    what tokens it has lost. With `reads` every pass writes `found`
    (`[2, count, rank]`: components before and after) and `norms` (`[count]`) of the tokens that are read."""

    vectors: Tensor
    coefficients: Tensor
    rows: Tensor
    slots: Tensor
    strengths: Tensor
    combinations: Tensor | None
    joint: Tensor | None
    lost: Tensor
    read_at: Tensor
    read_rows: Tensor
    found: Tensor
    norms: Tensor

    def __init__(self, plate: Plate, index: TokenIndex, reads: Reads | None = None) -> None:
        super().__init__()
        self.reading = reads is not None  # fixed for the life of the seat, so that Dynamo traces one way
        tensors = {
            "vectors": plate.vectors,
            "coefficients": plate.coefficients,
            "rows": index.rows,
            "slots": index.slots,
            "strengths": index.strengths,
            "combinations": index.combinations,
            "lost": index.lost,
            "joint": plate.joint,
        }
        if reads is not None:
            with lasting():
                tensors |= {
                    "read_at": reads.at,
                    "read_rows": reads.rows,
                    "found": plate.vectors.new_zeros(2, reads.count, reads.rank),
                    "norms": plate.vectors.new_zeros(reads.count),
                }
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor, persistent=False)


def moved(seat: Seat, x: Tensor, dtype: torch.dtype) -> Tensor:
    """x `[..., tokens, d_model]` after the operation, in float32; `dtype` is the stream's. (vLLM's backend for
    transformers' modelling code has a leading dimension of 1.)"""
    flat = x.reshape(-1, x.shape[-1]).float()
    tokens = flat.shape[0]
    index = (seat.rows[:, :tokens], seat.slots[:, :tokens], seat.strengths[:, :tokens])
    combinations = None if seat.combinations is None else seat.combinations[:tokens]
    # A seat has a plate's tensors; Dynamo is spared the dataclass.
    y, lost = apply(flat, cast(Plate, seat), *index, combinations, dtype)
    seat.lost[:tokens].logical_or_(lost)
    return y.reshape(x.shape)


def moved_term(seat: Seat, h: Tensor, r: Tensor) -> Tensor:
    """h so that h + r is the stream after the operation. The sum is taken in float32, as vLLM's fused norms do."""
    x = h.float() + r.float()
    return (h.float() + (moved(seat, x, h.dtype) - x)).to(h.dtype)


def hand_on(seat: Seat, x: Tensor, r: Tensor | None = None) -> Tensor:
    """The new x (or the new h, for a stream h + r), in its dtype."""
    new = moved(seat, x, x.dtype).to(x.dtype) if r is None else moved_term(seat, x, r)
    if seat.reading:
        record(seat, x, new, r)
    return new


def record(seat: Seat, x: Tensor, new: Tensor, r: Tensor | None) -> None:
    """Write what the tokens that are read have along their rows, before (x, or x + r) and after (new, or new + r)."""
    lines = seat.vectors[seat.read_rows]
    rest = 0.0 if r is None else r.reshape(-1, r.shape[-1])[seat.read_at].float()
    for place, stream_ in ((BEFORE, x), (AFTER, new)):
        at = stream_.reshape(-1, x.shape[-1])[seat.read_at].float() + rest
        seat.found[place].copy_(components(at, lines))
        if place == BEFORE:
            seat.norms.copy_(torch.linalg.vector_norm(at, dim=-1))


def sit_after(module: nn.Module, form: Form, seat: Seat, site: Site) -> None:
    """Have every output of `module` pass through `seat`."""
    name = f"steer_after_{site}"
    module.add_module(name, seat)

    def after(module: nn.Module, _args: Any, output: Any) -> Any:
        seat = cast(Seat, getattr(module, name))  # found on the module, so that its buffers are the graph's inputs
        if form == "tensor":
            return hand_on(seat, output)
        return (hand_on(seat, output[0], output[1] if form == "sum" else None), *output[1:])

    module.register_forward_hook(after)


@dataclass(frozen=True, slots=True)
class Slot:
    """Which argument of a block is the stream: a position or a keyword."""

    key: int | str

    def get(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        tensor: Tensor = args[self.key] if isinstance(self.key, int) else kwargs[self.key]
        return tensor

    def put(self, args: tuple[Any, ...], kwargs: dict[str, Any], x: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if isinstance(self.key, int):
            return (*args[: self.key], x, *args[self.key + 1 :]), kwargs
        return args, {**kwargs, self.key: x}


def sit_before(module: nn.Module, slot: Slot, seat: Seat, site: Site) -> None:
    """Have the stream that enters `module` pass through `seat`. Before block 0 it arrives whole in one argument."""
    name = f"steer_before_{site}"
    module.add_module(name, seat)

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return slot.put(args, kwargs, hand_on(cast(Seat, getattr(module, name)), slot.get(args, kwargs)))

    module.register_forward_pre_hook(before, with_kwargs=True)


def stream(form: Form, output: Any) -> Tensor:
    """The stream `[tokens, d_model]`, float32, in what a block returned."""
    x: Tensor = output if form == "tensor" else output[0]
    x = x.float() + output[1].float() if form == "sum" else x.float()
    return x.reshape(-1, x.shape[-1])


def exact_stream(form: Form, output: Any) -> Tensor:
    """The same in float64, in which the sum of two is what it is."""
    x: Tensor = output if form == "tensor" else output[0]
    x = x.double() + output[1].double() if form == "sum" else x.double()
    return x.reshape(-1, x.shape[-1])


#: Files whose text is traced into a graph, or decides the layout of what a graph reads.
TRACED = {"steer.runtime": None, "steer.vllm": ("install.py", "steering_layer.py")}


@cache
def code_digest() -> str:
    """Of the code that a graph depends on: part of the key of vLLM's compile cache."""
    whole = hashlib.sha256()
    for package, names in TRACED.items():
        folder = resources.files(package)
        found = sorted(file.name for file in folder.iterdir() if file.name.endswith(".py"))
        for name in found if names is None else names:
            whole.update(f"{package}/{name}\n".encode() + (folder / name).read_bytes())
    return whole.hexdigest()[:16]
