"""The Python API: steer `model.generate` and plain forward passes of a loaded model, outside any server."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from steer.direction import Direction, Site
from steer.hf.attach import Steering
from steer.registry import Registry
from steer.runtime.placement import LocalPlacement, Shape
from steer.spec import parse


class Attached:
    """Hooks on `model` from `with` to its end. Directions are given by name, as paths or `Direction`s.

    Inside, the model is plain until it is called with a spec in the request language:

        with steer.attach(model, refusal="directions/refusal.safetensors") as steering:
            with steering("refusal=0.7"):                 # the whole batch
                model.generate(**inputs)
            with steering("off", "refusal", "refusal"):   # row by row
                model.generate(**inputs)

    Raises UnsupportedModel when a block cannot be claimed, DirectionError for a file that does not fit the model.
    """

    def __init__(
        self,
        model: Any,
        *,
        sites: tuple[Site, ...] = ("resid_post",),
        rows: int = 32,
        rank: int = 4,
        **directions: str | os.PathLike[str] | Direction,
    ) -> None:
        self._steering = Steering(model, sites=sites, rows=rows, rank=rank)
        anatomy = self._steering.anatomy
        shape = Shape(anatomy.architecture, anatomy.layers, anatomy.d_model, self._steering.table.sites, rank)
        self.registry = Registry(LocalPlacement(shape, self._steering.table))
        for name, direction in directions.items():
            self.load(name, direction)

    def load(self, name: str, direction: str | os.PathLike[str] | Direction) -> None:
        """Serve `direction` under `name`, in place of what had that name."""
        loaded = direction if isinstance(direction, Direction) else Direction.load(direction)
        self.registry.put(name, loaded.to_bytes())

    @contextmanager
    def __call__(self, *specs: Any) -> Iterator[None]:
        """While it lasts, one spec steers every row of every forward pass, several steer row by row."""
        admissions = [self.registry.admit(parse(spec)) for spec in specs]
        try:
            with self._steering.batch([admission.spec for admission in admissions]):
                yield
        finally:
            for admission in admissions:
                admission.release()

    def __enter__(self) -> Attached:
        self._steering.attach()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._steering.detach()
