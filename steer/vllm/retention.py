"""Protect the steering modules from what vLLM does to a running model: a second reference to their tensors is kept
outside the model.

While an engine runs, weights can be reloaded, put to sleep, and moved, and each of these operations treats the buffers
of unknown modules in its own way. This module knows none of the operations. Whatever was called, before the next step
every tensor is restored to its place, or the step fails with a clear message.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from steer.errors import UnsupportedModel
from steer.vllm.steering_module import SteeringModule


@dataclass(frozen=True, slots=True)
class _Attached:
    """A steering module, by its name on the module that is hooked, with that module's hooks and the steering module's
    tensors."""

    module: nn.Module
    name: str
    steering_module: SteeringModule
    tensors: Mapping[str, Tensor]
    hooks: frozenset[object]


class Kept:
    """The steering modules of `model` as they are now."""

    def __init__(self, model: nn.Module) -> None:
        self._attached = [
            _Attached(module, name, child, dict(child.named_buffers()), _hooks(module))
            for module in model.modules()
            for name, child in module.named_children()
            if isinstance(child, SteeringModule)
        ]
        tensors = [tensor for attached in self._attached for tensor in attached.tensors.values()]
        # Captured graphs have addresses, not tensors.
        self._addresses = {id(tensor): tensor.data_ptr() for tensor in tensors}
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
        self.nbytes = sum(storages.values())

    def put_back(self, model: nn.Module) -> list[str]:
        """Make every steering module and buffer of `model` be where it was; the names of those that were not.

        Raises UnsupportedModel where that cannot be: blocks or hooks that are gone, memory that has moved.
        """
        there = set(model.modules())
        mended: list[str] = []
        for attached in self._attached:
            kind = type(attached.module).__name__
            if attached.module not in there:
                raise UnsupportedModel(f"a {kind} that was steered has been replaced: restart the engine")
            if not attached.hooks <= _hooks(attached.module):
                raise UnsupportedModel(f"the hooks of a {kind} have been removed: restart the engine")
            if attached.module._modules.get(attached.name) is not attached.steering_module:
                setattr(attached.module, attached.name, attached.steering_module)
                mended.append(f"{kind}.{attached.name}")
            for name, tensor in attached.tensors.items():
                if tensor.data_ptr() != self._addresses[id(tensor)]:
                    raise UnsupportedModel(f"{kind}.{attached.name}.{name} has moved in memory: restart the engine")
                if attached.steering_module._buffers.get(name) is not tensor:
                    attached.steering_module._buffers.pop(name, None)
                    attached.steering_module.register_buffer(name, tensor, persistent=False)
                    mended.append(f"{kind}.{attached.name}.{name}")
        return mended


def _hooks(module: nn.Module) -> frozenset[object]:
    return frozenset([*module._forward_hooks, *module._forward_pre_hooks, vars(module).get("forward")])
