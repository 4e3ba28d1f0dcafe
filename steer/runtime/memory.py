"""Tensors that live as long as the process and are written in place in every step, and how they are written."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


def lasting() -> torch.inference_mode:
    """A context in which tensors are made that can be written, and read by a pass that autograd records, in any mode. A
    tensor that is made under `torch.inference_mode()` can be changed nowhere else."""
    return torch.inference_mode(False)


def copies_from_pinned(device: torch.device) -> bool:
    """Whether the host goes on while `device` copies from pinned memory."""
    return device.type in ("cuda", "xpu")


class CopyEvent(Protocol):
    """A point in a copy queue."""

    def synchronize(self) -> None:
        """Wait until the device has passed it."""


class CopyQueue(Protocol):
    """An ordered queue of copies from the host to a device."""

    pinned: bool

    def copy(self, to: Tensor, source: Tensor) -> None:
        """Enqueue a copy; `source` must stay as it is until the device has passed a later event."""

    def record_event(self) -> CopyEvent: ...


class CurrentStream:
    """The queue of the copying thread's current stream."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.pinned = device, copies_from_pinned(device)

    def copy(self, to: Tensor, source: Tensor) -> None:
        to.copy_(source, non_blocking=True)

    def record_event(self) -> CopyEvent:
        event = torch.Event(self.device)
        event.record()
        return event


def copy_queue_to(device: torch.device) -> CopyQueue | None:
    """The queue of copies to `device`; None if the host writes its memory directly."""
    return None if device.type == "cpu" else CurrentStream(device)
