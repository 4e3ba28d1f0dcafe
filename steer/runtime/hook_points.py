"""Where the operation acts in a model, found by structure and checked by measurement, never by a list of model names.

* The **blocks** are the one `ModuleList` of the decoder with as many entries as the config has layers.
* `resid_post` is a block's output; the stream before block 0 is that block's input, so that scaled, normed and position
  embeddings are all in it.
* The **writers** of a block are the children whose outputs add up to (block output − block input) in a probe pass.
  This finds the norm after a writer where there is one (Gemma 2, OLMo 2). A block may multiply what they write, or the
  whole sum, by one number (Granite): to remove a component before or after that is the same.
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
#: What a block is called with, as far as it is the stream.
Args: TypeAlias = "tuple[Tensor, ...]"
Kwargs: TypeAlias = "dict[str, Tensor]"
Transform = Callable[[Tensor], Tensor | None]
#: How many roundings of the model's dtype writers may be off from what the block added.
ROUNDINGS = 8


def find_blocks(decoder: nn.Module, layers: int) -> list[nn.Module]:
    """The `layers` decoder blocks. Raises UnsupportedModel when there is not exactly one such list."""
    return list(find_list(decoder, layers))


def find_list(decoder: nn.Module, layers: int) -> nn.ModuleList:
    """What holds the blocks (`find_blocks`)."""
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
    """The hidden state in what a block is called with: the first argument, or `hidden_states=`. Raises UnsupportedModel
    where it is neither."""
    if not args and "hidden_states" not in kwargs:
        raise UnsupportedModel(
            f"a block is called with {', '.join(kwargs) or 'nothing'}: its stream is expected as the first argument, "
            "or as `hidden_states`"
        )
    return args[0] if args else kwargs["hidden_states"]


class Hung:
    """What stands on a module as a hook, and calls `hook` with what hooks get beside that. A copy of the module has it
    too, and is not steered; in a file it would be nothing."""

    def __init__(self, module: nn.Module, hook: Callable[..., object]) -> None:
        self.module, self.hook = module, hook

    def __call__(self, called: nn.Module, *given: Any) -> Any:
        return self.hook(*given) if called is self.module else None

    def __deepcopy__(self, _memo: object) -> Hung:
        return self

    def __reduce__(self) -> str:
        raise TypeError("a model cannot be pickled with its steering, nor a part of it: detach first")


def on_output(module: nn.Module, transform: Transform) -> RemovableHandle:
    """Hook `transform` on the tensor that `module` returns, and no copy of it. A transform that returns None leaves it
    alone. A pass raises UnsupportedModel where it returns something else."""

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
    """Hook `transform` on the hidden state that `module`, and no copy of it, is called with (`stream_given`)."""

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
    """For each block the children that write to the stream, as a probe pass shows (`run`) with recording hooks.

    entering, leaving: give the stream in the arguments and keywords of a block, and in what it returns.
    eps: of the model's dtype; None for that of the stream.
    first: the number of the first of these blocks in the model.

    Raises UnsupportedModel for a block whose change is not the sum of one or two of its children's outputs, each times
    a number.
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
            store.pop(name, None)  # in the order of their last calls: one dropout may follow several children
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
    """The one or two of `wrote`, first in the order they ran, that best sum to what the block added to the stream;
    where none do, the fewest that do when each of the terms is multiplied by a number of its own (`scales`).

    A child that hands on what another wrote (dropout) is none. The error is taken for each element against what was
    rounded there, so that a few huge dimensions (every large model has them) do not hide a wrong sum. None where no sum
    is within rounding.
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
                return best  # more terms always come nearer
        if best:
            return best
    return None


#: A term that is multiplied by less than this is none.
LEAST_SCALE = 1e-3


def scales(total: Tensor, terms: Tensor) -> Tensor | None:
    """The numbers by which the `terms` `[count, …, d_model]`, the stream first, are multiplied where they sum to
    `total` `[…, d_model]`: `[count]` float64, by least squares. None where a term is no part of it, as the stream that
    a child has added already (BLOOM), and where something is not finite."""
    columns = terms.double().flatten(1).T
    if not (columns.isfinite().all() and total.isfinite().all()):
        return None
    factors: Tensor = torch.linalg.lstsq(columns, total.double().flatten()[:, None]).solution[:, 0]
    return factors if bool((factors.abs() > LEAST_SCALE).all()) else None
