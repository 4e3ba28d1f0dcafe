"""Memory that lives as long as the process and is written in place in every step, and the ways to write it."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


def lasting() -> torch.inference_mode:
    """What is made inside can be written, and read by a pass that autograd records, in whatever mode the caller is: a
    tensor made under `torch.inference_mode()` could be changed nowhere else."""
    return torch.inference_mode(False)


def copies_from_pinned(device: torch.device) -> bool:
    """Does the host go on while `device` copies from pinned memory?"""
    return device.type in ("cuda", "xpu")


class CopyEvent(Protocol):
    """A point in a queue."""

    def synchronize(self) -> None:
        """Return when the device has passed it."""


class CopyQueue(Protocol):
    """The way of copies from the host to a device."""

    pinned: bool

    def copy(self, to: Tensor, source: Tensor) -> None:
        """Enqueue a copy; `source` must stay as it is until the device has passed a later event."""

    def record_event(self) -> CopyEvent: ...


class CurrentStream:
    """The stream that is current in the thread that copies."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.pinned = device, copies_from_pinned(device)

    def copy(self, to: Tensor, source: Tensor) -> None:
        to.copy_(source, non_blocking=True)

    def record_event(self) -> CopyEvent:
        event = torch.Event(self.device)
        event.record()
        return event


def copy_queue_to(device: torch.device) -> CopyQueue | None:
    """None where the host writes the device's memory itself."""
    return None if device.type == "cpu" else CurrentStream(device)
