"""Where the operation meets a vLLM model: buffers on a module, and hooks that Dynamo traces into the compiled graph.

All tensors that a hook reads are buffers of the hooked module, written in place for the life of the process: what a
graph was compiled or captured with is what later steps read. A plain token has row 0, which adds exactly zero.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Literal, TypeAlias, cast

import torch
from torch import Tensor, nn

from steer.names import Site
from steer.runtime.bank import BankSlice, apply, decide
from steer.runtime.memory import lasting
from steer.runtime.readout import AFTER, BEFORE, components
from steer.runtime.token_index import Conditional, TokenIndex

#: How a block hands on the stream: it returns one tensor; a tuple whose first is the whole stream; or (h, r) with the
#: stream being h + r, added by the norm that comes next.
Form = Literal["tensor", "first", "sum"]
#: What a block returns (see `Form`).
Output: TypeAlias = "Tensor | tuple[Tensor, ...]"
#: The arguments of a block, as far as they are the stream.
Args: TypeAlias = "tuple[Tensor, ...]"
Kwargs: TypeAlias = "dict[str, Tensor]"


class Reads:
    """The tokens that are read in a step, for all steering modules that read: at `[count]`, which token; rows `[count,
    rank]`, which rows of the bank; int64, written in place. Every pass looks at all of them, so those that are not in
    use must be 0, the one token that every pass has."""

    def __init__(self, count: int, rank: int, device: torch.device) -> None:
        self.count, self.rank = count, rank
        with lasting():
            self.at = torch.zeros(count, dtype=torch.int64, device=device)
            self.rows = torch.zeros(count, rank, dtype=torch.int64, device=device)


class SteeringModule(nn.Module):
    """One place's buffers on the module that is hooked. `vectors`, `coefficients` and `number` are the place's bank
    slice; `rows`, `slots`, `strengths`, `bounds` (`[rank, max_tokens]`) and `combinations` (`[max_tokens]`; it and the
    bank slice's `joint` are None where the rank is 1, and so are `opened`, `deciding` and `thresholds`) are the token
    index, one storage for all steering modules; in `lost` (`[max_tokens]`) each of them says what tokens it has lost,
    and in `opened`, where it `decides`, which are steered behind it. With `reads` every pass writes `found` (`[2,
    count, rank]`: components before and after) and `norms` (`[count]`) of the tokens that are read."""

    vectors: Tensor
    coefficients: Tensor
    rows: Tensor
    slots: Tensor
    strengths: Tensor
    bounds: Tensor
    number: Tensor
    combinations: Tensor | None
    joint: Tensor | None
    opened: Tensor | None
    deciding: Tensor | None
    thresholds: Tensor | None
    lost: Tensor
    read_at: Tensor
    read_rows: Tensor
    found: Tensor
    norms: Tensor

    def __init__(
        self, bank_slice: BankSlice, index: TokenIndex, reads: Reads | None = None, *, decides: bool = False
    ) -> None:
        super().__init__()
        # fixed for the life of the steering module, so that Dynamo traces one way
        self.reading, self.decides = reads is not None, decides
        tensors = {
            "vectors": bank_slice.vectors,
            "coefficients": bank_slice.coefficients,
            "rows": index.rows,
            "slots": index.slots,
            "strengths": index.strengths,
            "bounds": index.bounds,
            "number": bank_slice.number,
            "combinations": index.combinations,
            "lost": index.lost,
            "joint": bank_slice.joint,
            **(index.conditional._asdict() if index.conditional else dict.fromkeys(Conditional._fields)),
        }
        if reads is not None:
            with lasting():
                tensors |= {
                    "read_at": reads.at,
                    "read_rows": reads.rows,
                    "found": bank_slice.vectors.new_zeros(2, reads.count, reads.rank),
                    "norms": bank_slice.vectors.new_zeros(reads.count),
                }
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor, persistent=False)


def moved(steering_module: SteeringModule, x: Tensor, dtype: torch.dtype) -> Tensor:
    """x `[..., tokens, d_model]` after the operation, in float32; `dtype` is the stream's. (vLLM's backend for
    transformers' modelling code has a leading dimension of 1.)"""
    flat = x.reshape(-1, x.shape[-1]).float()
    tokens = flat.shape[0]
    own = steering_module
    index = (own.rows[:, :tokens], own.slots[:, :tokens], own.strengths[:, :tokens], own.bounds[:, :tokens])
    combinations = None if steering_module.combinations is None else steering_module.combinations[:tokens]
    opened = None if own.opened is None else own.opened[:tokens]
    # A steering module has a bank slice's tensors; Dynamo is spared the dataclass.
    y, lost = apply(flat, cast(BankSlice, steering_module), *index, combinations, dtype, opened)
    steering_module.lost[:tokens].logical_or_(lost)
    if own.decides and opened is not None and own.deciding is not None and own.thresholds is not None:
        conditional = Conditional(opened, own.deciding[:tokens], own.thresholds[:tokens])
        decide(flat, cast(BankSlice, steering_module), own.rows[:, :tokens], conditional)
    return y.reshape(x.shape)


def moved_term(steering_module: SteeringModule, h: Tensor, r: Tensor) -> Tensor:
    """h so that h + r is the stream after the operation. The sum is taken in float32, as vLLM's fused norms do."""
    x = h.float() + r.float()
    return (h.float() + (moved(steering_module, x, h.dtype) - x)).to(h.dtype)


def hand_on(steering_module: SteeringModule, x: Tensor, r: Tensor | None = None) -> Tensor:
    """The new x (or the new h, for a stream h + r), in its dtype."""
    new = moved(steering_module, x, x.dtype).to(x.dtype) if r is None else moved_term(steering_module, x, r)
    if steering_module.reading:
        record(steering_module, x, new, r)
    return new


def record(steering_module: SteeringModule, x: Tensor, new: Tensor, r: Tensor | None) -> None:
    """Write what the tokens that are read have along their rows, before (x, or x + r) and after (new, or new + r)."""
    lines = steering_module.vectors[steering_module.read_rows]
    rest = 0.0 if r is None else r.reshape(-1, r.shape[-1])[steering_module.read_at].float()
    for place, stream_ in ((BEFORE, x), (AFTER, new)):
        at = stream_.reshape(-1, x.shape[-1])[steering_module.read_at].float() + rest
        steering_module.found[place].copy_(components(at, lines))
        if place == BEFORE:
            steering_module.norms.copy_(torch.linalg.vector_norm(at, dim=-1))


def attach_after(module: nn.Module, form: Form, steering_module: SteeringModule, site: Site) -> None:
    """Have every output of `module` pass through `steering_module`."""
    name = f"steer_after_{site}"
    module.add_module(name, steering_module)

    def after(module: nn.Module, _args: object, output: Output) -> Output:
        steering_module = cast(
            SteeringModule, getattr(module, name)
        )  # found on the module, so that its buffers are the graph's inputs
        if isinstance(output, Tensor):
            return hand_on(steering_module, output)
        return (hand_on(steering_module, output[0], output[1] if form == "sum" else None), *output[1:])

    module.register_forward_hook(after)


@dataclass(frozen=True, slots=True)
class Slot:
    """Which argument of a block is the stream: a position or a keyword."""

    key: int | str

    def get(self, args: Args, kwargs: Kwargs) -> Tensor:
        return args[self.key] if isinstance(self.key, int) else kwargs[self.key]

    def put(self, args: Args, kwargs: Kwargs, x: Tensor) -> tuple[Args, Kwargs]:
        if isinstance(self.key, int):
            return (*args[: self.key], x, *args[self.key + 1 :]), kwargs
        return args, {**kwargs, self.key: x}


def attach_before(module: nn.Module, slot: Slot, steering_module: SteeringModule, site: Site) -> None:
    """Have the stream that enters `module` pass through `steering_module`. Before block 0 it is one whole argument."""
    name = f"steer_before_{site}"
    module.add_module(name, steering_module)

    def before(module: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        return slot.put(args, kwargs, hand_on(cast(SteeringModule, getattr(module, name)), slot.get(args, kwargs)))

    module.register_forward_pre_hook(before, with_kwargs=True)


def stream(form: Form, output: Output) -> Tensor:
    """The stream `[tokens, d_model]`, float32, in what a block returned."""
    parts = (output,) if isinstance(output, Tensor) else output
    x = parts[0].float() + parts[1].float() if form == "sum" else parts[0].float()
    return x.reshape(-1, x.shape[-1])


def exact_stream(form: Form, output: Output) -> Tensor:
    """The same in float64, in which the sum of two is what it is."""
    parts = (output,) if isinstance(output, Tensor) else output
    x = parts[0].double() + parts[1].double() if form == "sum" else parts[0].double()
    return x.reshape(-1, x.shape[-1])


#: Files whose text is traced into a graph, or decides the layout of what a graph reads.
TRACED = {"steer": ("names.py",), "steer.runtime": None, "steer.vllm": ("install.py", "steering_module.py")}


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
