"""Structures in which a block's first output is not the stream, or a hook on it does not run once: made of the blocks
of a working model. Each takes the decoder and its list of blocks."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Break = Callable[[nn.Module, Sequence[nn.Module]], None]


def branch(_decoder: nn.Module, blocks: Sequence[nn.Module]) -> None:
    """Blocks return only what they add: whoever calls them adds it."""
    for block in blocks:
        inner = block.forward
        block.forward = lambda x, *args, inner=inner, **kwargs: inner(x, *args, **kwargs) - x

        class Added(type(block)):
            def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
                return x + super().__call__(x, *args, **kwargs)  # outside of the module's own call, so behind its hooks

        block.__class__ = Added


def twice(_decoder: nn.Module, blocks: Sequence[nn.Module]) -> None:
    """Every block's hooks are on it twice, whatever hangs them there."""
    for block in blocks:
        original = block.register_forward_hook

        def double(hook: Any, original: Any = original, **options: Any) -> Any:
            if not options.get("prepend") and "transform" in getattr(
                getattr(getattr(hook, "hook", hook), "__code__", None), "co_freevars", ()
            ):  # the steering module's
                original(hook, **options)
            return original(hook, **options)

        block.register_forward_hook = double  # type: ignore[method-assign]


def functional(_decoder: nn.Module, blocks: Sequence[nn.Module]) -> None:
    """A block's forward calls the block itself, as where weights are swapped in for each call."""
    for block in blocks:
        inner = block.forward
        busy: list[bool] = []

        def forward(*args: Any, block: Any = block, inner: Any = inner, busy: Any = busy, **kwargs: Any) -> Any:
            if busy:
                return inner(*args, **kwargs)
            busy.append(True)
            try:
                state = dict(block.named_parameters()) | dict(block.named_buffers())
                return torch.func.functional_call(block, state, args, kwargs)
            finally:
                busy.clear()

        block.forward = forward


def beside(decoder: nn.Module, blocks: Sequence[nn.Module]) -> None:
    """Blocks hand on their last branch, and beside it a stream of four vectors a token that it is still to be mixed
    into."""
    for block in blocks:
        inner = block.forward

        def forward(x: Any, *args: Any, inner: Any = inner, **kwargs: Any) -> Any:
            pending, wide = x if isinstance(x, tuple) else (torch.zeros_like(x), x.unsqueeze(-2).repeat(1, 1, 4, 1))
            wide = wide + pending.unsqueeze(-2) / 4
            left = wide.mean(-2)
            return inner(left, *args, **kwargs) - left, wide

        block.forward = forward
    norm = decoder.norm.forward  # type: ignore[union-attr]
    decoder.norm.forward = lambda x: norm(x[1].mean(-2) + x[0])  # type: ignore[union-attr]


def part(_decoder: nn.Module, blocks: Sequence[nn.Module]) -> None:
    """What leaves a block is changed before the next one takes it: a part of the stream joins it on the way."""
    for block, following in itertools.pairwise(blocks):
        inner = block.forward
        rest: list[Tensor] = []

        def forward(x: Tensor, *args: Any, inner: Any = inner, rest: Any = rest, **kwargs: Any) -> Tensor:
            out: Tensor = inner(x, *args, **kwargs)
            rest.append(out / 2)
            return out / 2

        def joined(_m: Any, args: tuple[Any, ...], rest: Any = rest) -> Any:
            return (args[0] + rest.pop(), *args[1:])

        block.forward = forward
        following.register_forward_pre_hook(joined)


STRUCTURES: dict[str, Break] = {
    "branch": branch,
    "beside": beside,
    "twice": twice,
    "functional": functional,
    "part": part,
}
