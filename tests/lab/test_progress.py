"""The one bar: what is planned is done, each command says its whole at the start, and it fits 40 columns."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest

from steer.errors import NothingFound
from steer.hf.load import Loaded
from steer.hf.steering import Steering
from steer.lab.behaviour import REFUSAL
from steer.lab.derive import Recipe
from steer.lab.evaluation.arms import arms_of
from steer.lab.evaluation.run import Evaluation, EvaluationPlan
from steer.lab.measure import MEASURING, measure
from steer.lab.measurement import Measurement
from steer.lab.methods import make_method
from steer.lab.probe import HFEvaluator
from steer.lab.progress import Progress, answering
from steer.lab.race import Race, Sets
from steer.lab.resume import Cache
from steer.lab.select import CHOOSING, SCREEN_OTHER, Grid, select
from steer.lab.source import TransformersSource
from tests import models
from tests.lab.test_measure import HARMFUL, HARMLESS

TOKENS = 3


@pytest.fixture(scope="module")
def measured(loaded: Loaded) -> Measurement:
    return measure(TransformersSource(loaded), HARMFUL, HARMLESS)


def evaluator(loaded: Loaded, progress: Progress, rank: int = 1, tokens: int = TOKENS) -> HFEvaluator:
    return HFEvaluator(loaded, Steering(loaded.model, rows=16 * rank, rank=rank), None, tokens, 4, progress)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_bar_shows_the_whole_and_the_time_left_at_40_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr("tqdm.std._screen_shape_wrapper", lambda: lambda _file: (40, 24))
    with Progress(shown=True) as progress:
        progress.plan("a part with a name that is long", 2)
        progress.plan("second", 2)
        with progress.part("a part with a name that is long"):
            progress._bar.mininterval = 0  # type: ignore[union-attr]
            progress.advance(2)
    shown = terminal.getvalue().split("\r")
    assert max(map(len, shown)) <= 40
    assert any(line.startswith(" 50%") and " left" in line for line in shown), shown
    assert shown[-1].strip() == "", "it is gone at the end"


def test_a_log_has_lines_and_no_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("steer.lab.progress.MINUTE", 0)
    with Progress(shown=True) as progress:
        progress.plan("one part", 4)
        with progress.part("one part"):
            for _ in range(4):
                progress.advance()
    lines = capsys.readouterr().err.splitlines()
    assert any(line.startswith("50%, ") and line.endswith(" left: one part") for line in lines), lines
    assert not any("|" in line or "\r" in line or not line.strip() for line in lines)


def test_nothing_is_shown_where_nobody_looks(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(shown=True) as progress, progress.part("work"):
        progress.advance(2)
    assert capsys.readouterr().err == ""
    assert progress.done == progress.total == 2


def test_what_is_left_of_a_part_is_skipped_and_the_whole_stays() -> None:
    progress = Progress()
    progress.plan("one", 10)
    progress.plan("two", 5)
    with progress.part("one"):
        progress.advance(4)
    assert (progress.done, progress.total, progress.skipped) == (10, 15, 6)


def test_a_measurement_does_what_it_planned_also_when_it_goes_on(loaded: Loaded, tmp_path: Path) -> None:
    progress, source = Progress(), TransformersSource(loaded)
    measure(source, HARMFUL, HARMLESS, progress=progress)
    assert progress.done == progress.total == len(HARMFUL) + len(HARMLESS)
    assert progress.skipped == 0

    class Interrupting(Progress):
        def advance(self, work: float = 1.0) -> None:
            super().advance(work)
            if self.done >= 8:
                raise KeyboardInterrupt

    partial = tmp_path / "m.part"
    with pytest.raises(KeyboardInterrupt):
        measure(source, HARMFUL, HARMLESS, batch_size=4, partial=partial, progress=Interrupting())
    progress = Progress()
    measure(source, HARMFUL, HARMLESS, batch_size=4, partial=partial, progress=progress)
    assert progress.done == progress.total == len(HARMFUL) + len(HARMLESS)
    assert progress.skipped >= 4, "what was done before counts as done, and not for the speed"


def test_a_selection_does_what_it_planned(loaded: Loaded, measured: Measurement) -> None:
    """Also where nothing is found in the end, as with a behaviour that every answer shows."""
    progress = Progress()
    grid = Grid((make_method("linear"), make_method("projected")), layers=(0, 1, 2))
    with pytest.raises(NothingFound, match="none of 6 candidates"):
        select(
            measured,
            Recipe(),
            grid,
            HARMFUL,
            HARMLESS,
            lambda rank, tokens: evaluator(loaded, progress, rank, tokens),
            behaviour=REFUSAL.model_copy(update={"patterns": (".",), "window": None}),
            survivors=2,
            prompts=8,
            tokens=TOKENS,
        )
    screening, plain, tried = 6 * (8 + SCREEN_OTHER), 16 * answering(TOKENS), 2 * (8 * answering(TOKENS) + 8)
    assert progress.done == progress.total == pytest.approx(screening + plain + tried)
    assert progress.skipped == pytest.approx(0)
    assert {CHOOSING, MEASURING} == {"choosing", "measuring"}


def test_candidates_that_stop_early_are_skipped(loaded: Loaded, measured: Measurement) -> None:
    progress = Progress()
    race = Race(evaluator(loaded, progress), REFUSAL, Sets(HARMFUL.prompts, HARMLESS.prompts))
    before = progress.done
    assert before == pytest.approx(race.sets.plain_work(TOKENS))
    assert race.sets.work(TOKENS, start=8) == pytest.approx(5 * answering(TOKENS) + 5)


def test_an_evaluation_does_what_it_planned(loaded: Loaded, tmp_path: Path) -> None:
    path = tmp_path / "d.safetensors"
    models.direction(loaded.model).save(path)
    plan = EvaluationPlan(arms_of([path], None, [0.5, 1]), {"harmful": HARMFUL, "harmless": HARMLESS}, TOKENS)
    progress, again = Progress(), Progress()
    found = Evaluation(evaluator(loaded, progress), plan, Cache(tmp_path, {})).run()
    assert progress.done == progress.total == pytest.approx(3 * 26 * answering(TOKENS) + 2 * 13)
    assert progress.skipped == pytest.approx(0)
    assert Evaluation(evaluator(loaded, again), plan, Cache(tmp_path, {})).run() == found
    assert again.skipped == pytest.approx(again.total), "all of it was there"
