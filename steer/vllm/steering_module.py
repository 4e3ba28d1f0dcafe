"""The operation on a vLLM model: buffers on a module, and hooks that Dynamo traces into the compiled graph.

All tensors that a hook reads are buffers of the hooked module, and are written in place for the life of the process:
later steps read the tensors with which a graph was compiled or captured. A plain token has row 0, which adds exactly
zero.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache
from importlib import resources
from types import MethodType
from typing import TYPE_CHECKING, Literal, TypeAlias, cast

import torch
from torch import Tensor, nn

from steer.names import Site
from steer.runtime.bank import BankSlice, Operands, decide, gather, operate, operate_before_norm
from steer.runtime.hook_points import Args, Kwargs, Output
from steer.runtime.readout import measured
from steer.runtime.token_index import TokenIndex, conditions, unpacked

if TYPE_CHECKING:
    from steer.vllm.internals.types import Norm

#: How a block hands on the stream. "tensor": the block returns one tensor. "first": it returns a tuple whose first
#: element is the whole stream. "sum": it returns (h, r), the stream is h + r, and the next norm adds them.
Form = Literal["tensor", "first", "sum"]


#: The tokens that are read in a step, the rows of the bank along which they are read, and the tensor that takes what
#: was `measured` (`readout.ReadRunner`).
ReadBuffers: TypeAlias = tuple[Tensor, Tensor, Tensor]


class SteeringModule(nn.Module):
    """The buffers of one hook point on the module that is hooked.

    Attributes:
        vectors, coefficients, number, joint: the bank slice of the hook point.
        packed: the token index, `[max_tokens, fields]`, one for all steering modules.
        lost: `[max_tokens]`; each steering module marks the tokens that it has lost.
        opened: `[max_tokens]`, None if the rank is 1; a steering module that `decides` marks the tokens at which the
            later ones act.
        read_at, read_rows, found: the buffers of `reads`. With them every pass writes what is `measured` at the tokens
            that are read into `found`, `[count, 2 × rank + 1]`.
    """

    vectors: Tensor
    coefficients: Tensor
    number: Tensor
    packed: Tensor
    joint: Tensor | None
    opened: Tensor | None
    lost: Tensor
    read_at: Tensor
    read_rows: Tensor
    found: Tensor

    def __init__(
        self, bank_slice: BankSlice, index: TokenIndex, reads: ReadBuffers | None = None, *, decides: bool = False
    ) -> None:
        super().__init__()
        self.rank = index.rank
        # These are fixed for the life of the steering module, so that Dynamo traces one branch.
        self.reading, self.decides = reads is not None, decides
        tensors = {
            "vectors": bank_slice.vectors,
            "coefficients": bank_slice.coefficients,
            "number": bank_slice.number,
            "packed": index.packed,
            "lost": index.lost,
            "joint": bank_slice.joint,
            "opened": index.opened,
        }
        if reads is not None:
            tensors |= dict(zip(("read_at", "read_rows", "found"), reads, strict=True))
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor, persistent=False)


def acting(steering_module: SteeringModule, tokens: int) -> list[Operands]:
    """What acts at the hook point of a steering module on the first `tokens` tokens of the batch."""
    opened = None if steering_module.opened is None else steering_module.opened[:tokens]
    acts = unpacked(steering_module.packed[:tokens], steering_module.rank, opened)
    # A steering module has the tensors of a bank slice, so Dynamo need not trace the dataclass.
    return gather(cast(BankSlice, steering_module), *acts)


def note(steering_module: SteeringModule, x: Tensor, lost: Tensor) -> None:
    """Write which tokens are `lost`, and the decisions of the tokens that decide here.

    Args:
        x: the stream before the operation, `[tokens, d_model]`.
    """
    own, tokens = steering_module, x.shape[0]
    own.lost[:tokens].logical_or_(lost)
    if own.decides and own.opened is not None:
        packed = own.packed[:tokens]
        conditional = conditions(packed, own.rank, own.opened[:tokens])
        decide(x, cast(BankSlice, own), unpacked(packed, own.rank).rows, conditional)


def moved(steering_module: SteeringModule, x: Tensor, dtype: torch.dtype) -> Tensor:
    """x `[..., tokens, d_model]` after the operation, in float32; `dtype` is the dtype of the stream. (vLLM's backend
    for transformers' modelling code has a leading dimension of 1.)"""
    flat = x.reshape(-1, x.shape[-1]).float()
    y, lost = operate(flat, acting(steering_module, flat.shape[0]), dtype)
    note(steering_module, flat, lost)
    return y.reshape(x.shape)


def moved_term(steering_module: SteeringModule, h: Tensor, r: Tensor) -> Tensor:
    """The new h with which h + r is the stream after the operation. The sum is computed in float32, as vLLM's fused
    norms do."""
    x = h.float() + r.float()
    return (h.float() + (moved(steering_module, x, h.dtype) - x)).to(h.dtype)


def hand_on(steering_module: SteeringModule, x: Tensor, r: Tensor | None = None) -> Tensor:
    """The new x (or the new h, for a stream h + r), in the dtype of x. Also records the tokens that are read."""
    new = moved(steering_module, x, x.dtype).to(x.dtype) if r is None else moved_term(steering_module, x, r)
    if steering_module.reading:
        rest = () if r is None else (r,)
        record(steering_module, (x, *rest), (new, *rest))
    return new


def record(steering_module: SteeringModule, before: tuple[Tensor, ...], after: tuple[Tensor, ...]) -> None:
    """Write the components of the tokens that are read along their rows. The stream is the sum of `before`, and after
    the operation the sum of `after`."""

    def read(parts: tuple[Tensor, ...]) -> Tensor:
        each = [part.reshape(-1, part.shape[-1])[steering_module.read_at].float() for part in parts]
        return sum(each[1:], each[0])

    lines = steering_module.vectors[steering_module.read_rows]
    steering_module.found.copy_(measured(read(before), read(after), lines))


#: The name of a steering module on a norm.
WITHIN = "steer_within"


def attach_within(norm: Norm, steering_module: SteeringModule) -> None:
    """Have `norm` itself operate on the stream that it adds up. `norm` is one of `internals.worker.open_norms`.

    The compiled code then makes as many passes over the stream as the norm alone; a hook in front of the norm needs two
    more.
    """
    norm.add_module(WITHIN, steering_module)
    norm.forward = MethodType(forward, norm)


def forward(norm: Norm, x: Tensor, residual: Tensor | None = None) -> Output:
    """The norm's output for the stream x + residual `[tokens, d_model]` after the operation, and this stream. Without
    `residual` it is the norm's own output for x."""
    if residual is None:
        return cast(Tensor, norm.forward_native(x))
    steering_module = cast(SteeringModule, getattr(norm, WITHIN))
    whole = x.float() + residual.float()
    new, lost, mean_square = operate_before_norm(whole, acting(steering_module, x.shape[0]), x.dtype)
    note(steering_module, whole, lost)
    handed_on = new.to(x.dtype)
    if steering_module.reading:
        record(steering_module, (x, residual), (handed_on,))
    # From here on this is the formula of `vllm.ir.ops.fused_add_rms_norm`.
    weight = norm.weight if hasattr(norm, "pass_weight_add") else norm.weight.float() + 1.0  # Gemma stores it less 1
    normed = new * torch.rsqrt(mean_square + norm.variance_epsilon)
    return (normed.to(weight.dtype) * weight).to(x.dtype), handed_on


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
class StreamArgument:
    """Which argument of a block is the stream: a position or a keyword."""

    key: int | str

    def get(self, args: Args, kwargs: Kwargs) -> Tensor:
        return args[self.key] if isinstance(self.key, int) else kwargs[self.key]

    def put(self, args: Args, kwargs: Kwargs, x: Tensor) -> tuple[Args, Kwargs]:
        if isinstance(self.key, int):
            return (*args[: self.key], x, *args[self.key + 1 :]), kwargs
        return args, {**kwargs, self.key: x}


def attach_before(module: nn.Module, slot: StreamArgument, steering_module: SteeringModule, site: Site) -> None:
    """Have the stream that enters `module` pass through `steering_module`. Before block 0 it is one whole argument."""
    name = f"steer_before_{site}"
    module.add_module(name, steering_module)

    def before(module: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        return slot.put(args, kwargs, hand_on(cast(SteeringModule, getattr(module, name)), slot.get(args, kwargs)))

    module.register_forward_pre_hook(before, with_kwargs=True)


def stream(form: Form, output: Output, dtype: torch.dtype = torch.float32) -> Tensor:
    """The stream `[tokens, d_model]` in the output of a block; in float64 the sum of two parts is exact."""
    parts = (output,) if isinstance(output, Tensor) else output
    x = parts[0].to(dtype) + parts[1].to(dtype) if form == "sum" else parts[0].to(dtype)
    return x.reshape(-1, x.shape[-1])


#: Files of each package whose code is traced into a graph, or decides the layout of what a graph reads; None for all.
TRACED = {"steer": ("names.py",), "steer.runtime": None, "steer.vllm": ("install.py", "steering_module.py")}


@cache
def code_digest() -> str:
    """The digest of the code that a graph depends on. It is a part of the key of vLLM's compile cache."""
    whole = hashlib.sha256()
    for package, names in TRACED.items():
        folder = resources.files(package)
        found = sorted(file.name for file in folder.iterdir() if file.name.endswith(".py"))
        for name in found if names is None else names:
            whole.update(f"{package}/{name}\n".encode() + (folder / name).read_bytes())
    return whole.hexdigest()[:16]
