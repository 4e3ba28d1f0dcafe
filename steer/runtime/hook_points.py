"""Where the operation acts in a model. This is found by structure and checked by measurement, never by model names.

* The **blocks** are the one `ModuleList` of the decoder with as many entries as the config has layers.
* `resid_post` is a block's output. The stream before block 0 is the input of block 0, so it contains scaled, normed and
  position embeddings.
* The **writers** of a block are the children whose outputs add up to (block output − block input) in a probe pass.
  If a norm follows a writer (Gemma 2, OLMo 2), this finds the norm. A block may multiply the outputs of its writers, or
  the whole sum, by one number (Granite): removing a component before or after the multiplication gives the same result.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from steer.errors import UnsupportedModel

#: What a block or one of its children returns: a tensor, or a tuple that begins with one.
Output: TypeAlias = "Tensor | tuple[Tensor, ...]"
#: The arguments of a block that may hold the stream, by position and by keyword.
Args: TypeAlias = "tuple[Tensor, ...]"
Kwargs: TypeAlias = "dict[str, Tensor]"
Transform = Callable[[Tensor], Tensor | None]
#: The largest error of the writers' sum against what the block added, in roundings of the model's dtype.
ROUNDINGS = 8


def find_blocks(decoder: nn.Module, layers: int) -> list[nn.Module]:
    """The `layers` decoder blocks. Raises UnsupportedModel when there is not exactly one such list."""
    return list(find_list(decoder, layers))


def find_list(decoder: nn.Module, layers: int) -> nn.ModuleList:
    """The `ModuleList` that holds the blocks (`find_blocks`). Raises UnsupportedModel as `find_blocks` does."""
    found = [(n, m) for n, m in decoder.named_modules() if isinstance(m, nn.ModuleList) and len(m) == layers > 0]
    outer = [(n, m) for n, m in found if not any(n.startswith(f"{other}.") for other, _ in found)]
    if len(outer) != 1:
        names = [n for n, _ in outer] or "none"
        raise UnsupportedModel(
            f"{type(decoder).__name__}: expected one list of {layers} decoder blocks (the config's layer count), "
            f"found {names}"
        )
    blocks = outer[0][1]
    if len({id(block) for block in blocks}) != layers:
        raise UnsupportedModel(
            f"{type(decoder).__name__}: some blocks are shared between layers, which is not supported"
        )
    return blocks


def stream_of(output: Output) -> Tensor:
    """The hidden state in what a module returns."""
    return output[0] if isinstance(output, tuple) else output


def stream_given(args: Args, kwargs: Kwargs) -> Tensor:
    """The hidden state in the arguments of a block: the first argument, or `hidden_states=`. Raises UnsupportedModel if
    there is neither."""
    if not args and "hidden_states" not in kwargs:
        raise UnsupportedModel(
            f"a block is called with {', '.join(kwargs) or 'nothing'}: its stream is expected as the first argument, "
            "or as `hidden_states`"
        )
    return args[0] if args else kwargs["hidden_states"]


class Hung:
    """A hook on a module, which calls `hook` with all arguments of a hook but the module.

    A copy of the module has this hook too, but the hook does nothing there, so the copy is not steered. A hook cannot
    be pickled, because it would be useless in a file.
    """

    def __init__(self, module: nn.Module, hook: Callable[..., object]) -> None:
        self.module, self.hook = module, hook

    def __call__(self, called: nn.Module, *given: Any) -> Any:
        return self.hook(*given) if called is self.module else None

    def __deepcopy__(self, _memo: object) -> Hung:
        return self

    def __reduce__(self) -> str:
        raise TypeError("a model cannot be pickled with its steering, nor a part of it: detach first")


def on_output(module: nn.Module, transform: Transform) -> RemovableHandle:
    """Hook `transform` on the tensor that `module` returns; a copy of `module` is not affected. If the transform
    returns None, the tensor stays as it is. A pass raises UnsupportedModel if `module` returns no tensor, nor a tuple
    that begins with one."""

    def hook(_args: object, output: Output) -> Output | None:
        stream = output[0] if isinstance(output, tuple) and output else output
        if not isinstance(stream, Tensor):
            within = f" of {type(stream).__name__}" if isinstance(output, tuple) else ""
            raise UnsupportedModel(
                f"{type(module).__name__} returns a {type(output).__name__}{within}: a tensor is expected, or a tuple "
                "that begins with one"
            )
        new = transform(stream)
        return (new, *output[1:]) if isinstance(output, tuple) and new is not None else new

    return module.register_forward_hook(Hung(module, hook))


def on_input(module: nn.Module, transform: Transform) -> RemovableHandle:
    """Hook `transform` on the hidden state that `module` is called with (`stream_given`); a copy of `module` is not
    affected. If the transform returns None, the hidden state stays as it is."""

    def hook(args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs] | None:
        if (new := transform(stream_given(args, kwargs))) is None:
            return None
        return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": new})

    return module.register_forward_pre_hook(Hung(module, hook), with_kwargs=True)


@contextmanager
def hooks(handles: Sequence[RemovableHandle]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def find_writers(
    blocks: Sequence[nn.Module],
    run: Callable[[], object],
    entering: Callable[[Args, Kwargs], Tensor] = stream_given,
    leaving: Callable[[Output], Tensor] = stream_of,
    eps: float | None = None,
    first: int = 0,
) -> list[tuple[nn.Module, ...]]:
    """For each block the children that write to the stream, found by a probe pass with recording hooks.

    Args:
        blocks: the blocks.
        run: makes the probe pass.
        entering: returns the stream in the arguments and keywords of a block.
        leaving: returns the stream in the output of a block.
        eps: the rounding of the model's dtype; if None, the rounding of the stream's dtype.
        first: the number of the first of these blocks in the model.

    Raises:
        UnsupportedModel: the change that a block makes is not the sum of one or two of its children's outputs, each
            multiplied by a number.
    """
    entered: dict[int, Tensor] = {}
    left: dict[int, Tensor] = {}
    wrote: list[dict[str, Tensor]] = [{} for _ in blocks]

    def enter(i: int, _module: nn.Module, args: Args, kwargs: Kwargs) -> None:
        entered.setdefault(i, entering(args, kwargs).detach().clone())

    def leave(i: int, _module: nn.Module, _args: object, output: Output) -> None:
        left.setdefault(i, leaving(output).detach().float().clone())

    def write(store: dict[str, Tensor], name: str, _module: nn.Module, _args: object, output: Output) -> None:
        stream = stream_of(output)
        if isinstance(stream, Tensor) and stream.is_floating_point():
            store.pop(name, None)  # keeps the order of the last calls: one dropout may follow several children
            store[name] = stream.detach().float().clone()

    handles = []
    for i, block in enumerate(blocks):
        handles.append(block.register_forward_pre_hook(partial(enter, i), with_kwargs=True))
        handles.append(block.register_forward_hook(partial(leave, i)))
        handles += [
            child.register_forward_hook(partial(write, wrote[i], name)) for name, child in block.named_children()
        ]
    with hooks(handles):
        run()
    writers = []
    for i, block in enumerate(blocks):
        named = f"block {first + i} ({type(block).__name__})"
        if i not in entered or i not in left:
            raise UnsupportedModel(f"{named} did not run in the probe pass")
        rounding = eps or torch.finfo(entered[i].dtype).eps
        names = summands(entered[i].float(), left[i], wrote[i], rounding)
        if names is None:
            raise UnsupportedModel(
                f"site 'writers': in {named} no one or two of the children {sorted(wrote[i])} write what the block "
                "adds to the stream; use the site 'resid_post'"
            )
        writers.append(tuple(block.get_submodule(name) for name in names))
    return writers


def summands(entered: Tensor, left: Tensor, wrote: dict[str, Tensor], eps: float) -> tuple[str, ...] | None:
    """The names of the one or two children whose outputs sum to what the block added, in the order in which they ran.

    Of all sums that fit, the best one is taken. If no plain sum fits, the
    result is the fewest children whose sum fits when each term is multiplied by a number of its own (`scales`).

    A child that only hands on the output of another child (dropout) does not count. The error of each element is
    measured against the numbers that were rounded there, so that a few huge dimensions (every large model has them) do
    not hide a wrong sum.

    Args:
        entered: the stream that entered the block.
        left: the stream that left the block.
        wrote: the output of each child by its name, in the order in which the children ran.
        eps: the rounding of the stream's dtype.

    Returns:
        The names, or None if no sum is within rounding.
    """
    fitting: dict[str, Tensor] = {}
    for name, t in wrote.items():
        if t.numel() == entered.numel() and not any(torch.equal(t.flatten(), o.flatten()) for o in fitting.values()):
            fitting[name] = t.reshape(entered.shape)
    best: tuple[str, ...] | None = None
    lowest = ROUNDINGS * eps
    for scaled in (False, True):
        for count in (1, 2):
            for names in itertools.combinations(fitting, count):
                terms = torch.stack([entered, *(fitting[n] for n in names)])
                if scaled:
                    if (factors := scales(left, terms)) is None:
                        continue
                    terms = terms * factors.to(terms.dtype).view(-1, *[1] * entered.dim())
                off = left - terms.sum(0) if scaled else left - entered - terms[1:].sum(0)
                error = float((off.abs() / (left.abs() + terms.abs().sum(0)).clamp_min(1e-30)).max())
                if error < lowest:
                    best, lowest = names, error
            if best and scaled:
                return best  # more terms would always fit better
        if best:
            return best
    return None


#: The least absolute value of a factor: a term with a smaller factor is not a part of the sum.
LEAST_SCALE = 1e-3


def scales(total: Tensor, terms: Tensor) -> Tensor | None:
    """The numbers by which the terms must be multiplied so that they sum to `total`, by least squares.

    Args:
        total: the sum, `[…, d_model]`.
        terms: the terms, `[count, …, d_model]`, the stream first.

    Returns:
        The numbers, `[count]` float64. None if a term is not a part of the sum, for example the stream if a child has
        already added it (BLOOM), or if a value is not finite.
    """
    columns = terms.double().flatten(1).T
    if not (columns.isfinite().all() and total.isfinite().all()):
        return None
    factors: Tensor = torch.linalg.lstsq(columns, total.double().flatten()[:, None]).solution[:, 0]
    return factors if bool((factors.abs() > LEAST_SCALE).all()) else None
