"""Metrics: a served direction is in every scrape, also while the registry is looked at again."""

from __future__ import annotations

import json
import re
import threading
from pathlib import Path

from prometheus_client import generate_latest

from steer.registry import Registry
from steer.serve import metrics
from tests import models
from tests.servers import ROOT


def test_no_scrape_misses_what_is_served(tmp_path: Path) -> None:
    model = models.tiny("llama")
    registry = Registry(models.placement(rows=4, rank=1))
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


def test_the_dashboard_shows_metrics_that_exist() -> None:
    """A metric that is renamed must be renamed there too; and each of ours is shown."""
    dashboard = json.loads((ROOT / "docs" / "grafana-dashboard.json").read_text())
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    named = {name for expression in expressions for name in re.findall(r"\bsteer_\w+", expression)}
    exported = set(re.findall(r"^# TYPE (steer_\w+)", generate_latest().decode(), re.MULTILINE))
    exported = {name for name in exported if not name.endswith("_created")}
    histograms = set(re.findall(r"^# TYPE (steer_\w+) histogram", generate_latest().decode(), re.MULTILINE))
    assert {name.removesuffix("_bucket") for name in named} == exported
    assert {name.removesuffix("_bucket") for name in named if name.endswith("_bucket")} == histograms
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(ids)) == len(ids)


def test_a_prompt_is_told_once_and_charged_as_often_as_it_is_computed() -> None:
    usage = metrics.Usage()
    usage.read(5, times=3)
    usage.read(2)
    assert (usage.prompt, usage.again) == (7, 10)
    searched = metrics.Usage(prompts=2)  # an engine that asks again for each beam and step
    for tokens in (5, 3, 6, 7, 8):
        searched.read(tokens)
    assert (searched.prompt, searched.again) == (8, 0)
