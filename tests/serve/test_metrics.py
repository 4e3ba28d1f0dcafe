"""Metrics: a served direction is in every scrape, also while the registry is looked at again."""

from __future__ import annotations

import threading
from pathlib import Path

from prometheus_client import generate_latest

from steer.registry import Registry
from steer.runtime.placement import LocalPlacement, Shape
from steer.runtime.table import Place, Table
from steer.serve import metrics
from tests import models


def test_no_scrape_misses_what_is_served(tmp_path: Path) -> None:
    model = models.tiny("llama")
    places = [Place("resid_post", layer) for layer in range(models.LAYERS)]
    table = Table(places, rows=4, rank=1, d_model=models.D_MODEL)
    shape = Shape(type(model).__name__, models.LAYERS, models.D_MODEL, table.sites, 1)
    registry = Registry(LocalPlacement(shape, table))
    first, second = (registry.put(f"d{i}", models.direction(model, seed=i).to_bytes()) for i in range(2))
    stop = threading.Event()

    def again() -> None:
        while not stop.is_set():
            metrics.refresh(registry)

    metrics.refresh(registry)
    thread = threading.Thread(target=again)
    thread.start()
    try:
        for _ in range(200):
            assert first.digest in generate_latest().decode()
    finally:
        stop.set()
        thread.join()
    registry.delete("d1")
    metrics.refresh(registry)
    assert second.digest not in generate_latest().decode()
