"""Searching: trials are what their points say, the front is not dominated, and an interruption changes nothing."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from typer.testing import CliRunner

from steer.cli.app import app
from steer.direction import Direction
from steer.errors import InvalidInput
from steer.hf.load import Loaded
from steer.hf.steering import Steering
from steer.lab.derive import Recipe, derive, layer_weights
from steer.lab.measure import MeasurementOptions, measure
from steer.lab.measurement import Measurement
from steer.lab.methods import make_method
from steer.lab.probe import HFEvaluator
from steer.lab.race import Figures, Race
from steer.lab.search import (
    MEASUREMENT,
    TRIALS,
    Search,
    SearchSpace,
    Settings,
    Trial,
    candidate,
    front,
    rank_of,
    write_front,
)
from steer.lab.source import TransformersSource
from tests.lab.test_measure import HARMFUL, HARMLESS
from tests.lab.test_race import CHANCE, SETS

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def quiet() -> None:
    optuna.logging.set_verbosity(optuna.logging.WARNING)


@pytest.fixture(scope="module")
def measured(loaded: Loaded) -> Measurement:
    return measure(TransformersSource(loaded), HARMFUL, HARMLESS, MeasurementOptions(vectors=True))


@pytest.fixture(scope="module")
def probe(loaded: Loaded) -> HFEvaluator:
    return HFEvaluator(loaded, Steering(loaded.model, rows=8, rank=1), max_tokens=3)


def settings(**changes: Any) -> Settings:
    given: dict[str, Any] = dict(
        model="tiny",
        behaviour=CHANCE,
        harmful=HARMFUL.dataset,
        harmless=HARMLESS.dataset,
        borderline=HARMLESS.dataset,
        prompts=20,
        tokens=3,
        group=4,
        startup=4,
        space=SearchSpace(modes=("ablate", "one_sided", "affine", "add")),
    )
    return Settings(**(given | changes))


Begin = Callable[..., Search]


@pytest.fixture
def begin(measured: Measurement) -> Begin:
    return lambda folder, **changes: Search.begin(folder, settings(**changes), lambda _partial: measured)


@pytest.fixture(scope="module")
def whole(measured: Measurement, probe: HFEvaluator, tmp_path_factory: pytest.TempPathFactory) -> Search:
    """A search of 16 trials that nothing interrupted."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    found = Search.begin(tmp_path_factory.mktemp("whole"), settings(), lambda _partial: measured)
    found.run(probe, SETS, 16)
    return found


def told(search: Search) -> list[tuple[int, dict[str, Any], tuple[float, ...], Figures]]:
    return [(trial.number, trial.point, trial.values, trial.figures) for trial in search.trials()]


def test_a_trial_is_what_its_point_makes(whole: Search, probe: HFEvaluator, measured: Measurement) -> None:
    """Its figures are those of its direction alone, whatever ran beside it."""
    race = Race(probe, CHANCE, SETS)
    trials = whole.trials()
    assert [trial.number for trial in trials] == list(range(16))
    for trial in trials[:6]:
        (alone,) = race.run([candidate(measured, trial.point)])
        count = len(trial.figures.asked)
        assert trial.figures.asked == alone.asked[:count]
        assert trial.figures.kls == pytest.approx(alone.kls[: len(trial.figures.kls)], abs=1e-5)
        assert trial.values == pytest.approx((trial.figures.rate_left, trial.figures.kl, trial.figures.over))


@pytest.mark.parametrize("kept", [0, 4, 7, 10, 15])
def test_what_was_lost_of_a_search_comes_out_the_same(
    whole: Search, probe: HFEvaluator, tmp_path: Path, kept: int
) -> None:
    """With whole groups in the journal, and with a part of one, as a kill between two of its lines leaves it."""
    folder = tmp_path / "f"
    shutil.copytree(whole.folder, folder)
    lines = (folder / TRIALS).read_bytes().splitlines(keepends=True)
    studies = len(lines) - 16  # a line for each trial, behind those that make the study
    (folder / TRIALS).write_bytes(b"".join(lines[: studies + kept]))
    assert len(Search.open(folder).trials()) == kept
    reported: list[int] = []
    Search.open(folder).run(probe, SETS, 16, lambda trials: reported.append(len(trials)))
    assert reported == list(range(kept // 4 * 4, 17, 4))
    assert told(Search.open(folder)) == told(whole)


def test_a_folder_is_one_searchs_at_a_time(whole: Search, begin: Begin, probe: HFEvaluator, tmp_path: Path) -> None:
    def measure_in_vain(_partial: Path) -> Measurement:
        with pytest.raises(InvalidInput, match=f"{tmp_path}: another run"):
            begin(tmp_path)
        return whole.measurement

    found = Search.begin(tmp_path, settings(), measure_in_vain)

    def try_in_vain(_trials: object) -> None:
        with pytest.raises(InvalidInput, match=f"{tmp_path}: another run"):
            Search.open(tmp_path).run(probe, SETS, 4)

    found.run(probe, SETS, 4, try_in_vain)
    assert told(found) == told(whole)[:4]


def test_another_seed_is_another_search(whole: Search, begin: Begin, probe: HFEvaluator, tmp_path: Path) -> None:
    other = begin(tmp_path, seed=1)
    other.run(probe, SETS, 4)
    assert told(other)[0][1] != told(whole)[0][1]


VALUES = st.lists(st.tuples(*[st.sampled_from([0.0, 0.25, 0.5, 1.0])] * 3, st.booleans()), min_size=1, max_size=24)


@given(VALUES)
def test_the_front_is_what_nothing_dominates(rows: list[tuple[float, float, float, bool]]) -> None:
    trials = [
        Trial(n, {}, tuple(values), Figures(stopped="shown" if stopped else None))
        for n, (*values, stopped) in enumerate(rows)
    ]
    found = front(trials)
    tried = [trial for trial in trials if trial.figures.stopped is None]

    def dominates(a: Trial, b: Trial) -> bool:
        return tuple(a.values) != tuple(b.values) and all(x <= y for x, y in zip(a.values, b.values, strict=True))

    assert not any(dominates(a, b) for a in tried for b in found)
    for trial in tried:
        assert any(dominates(b, trial) or tuple(b.values) == tuple(trial.values) for b in found)
    assert len({tuple(trial.values) for trial in found}) == len(found)


@given(st.integers(1, 90), st.floats(0, 89), st.floats(0.5, 180), st.floats(0, 1))
def test_weights_are_a_bell_on_a_floor(depth: int, peak: float, width: float, least: float) -> None:
    weights = layer_weights(depth, min(peak, depth - 1), width, least)
    assert weights.shape == (depth,)
    assert float(weights.max()) <= 1 + 1e-6
    assert float(weights.min()) >= least - 1e-6
    middle = round(min(peak, depth - 1))
    assert float(weights[middle]) == float(weights.max())
    assert bool((weights[:middle].diff() >= 0).all())
    assert bool((weights[middle:].diff() <= 0).all())


def test_a_saved_trial_is_its_direction(whole: Search, measured: Measurement, tmp_path: Path) -> None:
    for number in (0, 5):
        whole.save(number, tmp_path / "d.safetensors")
        saved, trial = Direction.load(tmp_path / "d.safetensors"), whole.trials()[number]
        made = candidate(measured, trial.point)
        for name, tensor in made.direction.tensors().items():
            assert torch.equal(saved.tensors()[name], tensor), name
        assert (saved.meta.mode, saved.meta.strength) == (made.asked.mode, made.asked.strength)
        assert saved.meta.selection["point"] == trial.point
    with pytest.raises(InvalidInput, match=r"trial 16 is not in .* it has 16"):
        whole.save(16, tmp_path / "no.safetensors")


def test_a_point_is_derived_and_weighted(measured: Measurement) -> None:
    point: dict[str, str | float | int] = dict(
        method="slerp", t=0.25, layer=1, mode="add", strength=0.5, peak=1.0, width=0.5, least=0.2
    )
    made = candidate(measured, point)
    plain = derive(measured, Recipe(make_method("slerp", {"t": 0.25}), 1))
    assert torch.equal(made.direction.directions, plain.directions)
    assert made.asked.strength == -0.005
    torch.testing.assert_close(made.direction.weights, layer_weights(3, 1.0, 0.5, 0.2))
    own = candidate(measured, {name: value for name, value in point.items() if name != "layer"})
    assert own.direction.meta.source_layer is None


def test_the_front_is_written_as_table_and_picture(whole: Search) -> None:
    trials = whole.trials()
    write_front(whole, trials)
    text = (whole.folder / "front.md").read_text()
    assert text.count("\n| ") == 2 + len(front(trials))
    assert (whole.folder / "front.png").read_bytes()[:4] == b"\x89PNG"


def test_other_settings_are_another_search(whole: Search, begin: Begin, tmp_path: Path) -> None:
    folder = tmp_path / "f"
    shutil.copytree(whole.folder, folder)
    assert begin(folder).settings == whole.settings
    with pytest.raises(InvalidInput) as caught:
        begin(folder, seed=3, tokens=9, borderline=None, space=SearchSpace(t=(0.0, 1.0)))
    text, border = "\n".join(caught.value.problems), whole.settings.borderline
    assert border is not None
    for part in (
        *("started with --seed 0, not 3", "--max-tokens 3, not 9", "with --t [-1.0, 1.0], not [0.0, 1.0]"),
        f"--borderline {border.name} ({border.count} prompts, sha256 {border.sha256[:8]}…)",
    ):
        assert part in text
    replace(whole.measurement, meta=whole.measurement.meta.model_copy(update={"tool": "other"})).save(
        folder / MEASUREMENT
    )
    older = whole.settings
    assert older.weights is older.chat_template is None
    begin(whole.folder, weights="a", chat_template="b")  # older files do not say
    new = begin(tmp_path / "new", weights="a", chat_template="b")
    for change, told in {"weights": "other weights", "chat_template": "another chat template"}.items():
        with pytest.raises(InvalidInput, match=f"was started with {told}"):
            begin(new.folder, **{"weights": "a", "chat_template": "b", change: "c"})
    with pytest.raises(InvalidInput, match="not the measurement that this search was started with"):
        Search.open(folder)
    with pytest.raises(InvalidInput, match="there is no search in this folder"):
        Search.open(tmp_path)


def test_a_space_that_cannot_be_searched_is_refused_with_all_reasons(measured: Measurement) -> None:
    bare = replace(measured, harmful=replace(measured.harmful, vectors=None))
    with pytest.raises(InvalidInput) as caught:
        SearchSpace(methods=("slerp", "no", "logistic")).bounded(bare)
    assert len(caught.value.problems) == 2
    with pytest.raises(ValidationError, match="2 validation errors"):
        SearchSpace(t=(1.0, 1.0), strength=(2.0, float("nan")))
    with pytest.raises(ValidationError, match="only the mode 'ablate' is defined, not 'affine'"):
        SearchSpace(modes=("ablate", "affine"), sites=("writers",))
    less = replace(measured, harmless=replace(measured.harmless, mean_all=None))
    with pytest.raises(InvalidInput, match="the mode 'affine' needs means"):
        SearchSpace(modes=("affine",)).bounded(less)
    assert rank_of(SearchSpace(methods=("slerp", "subspace")).bounded(measured), measured) == 2


# -- the commands ------------------------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path: Path) -> Path:
    for name, prompts in (("harmful", HARMFUL), ("harmless", HARMLESS)):
        (tmp_path / f"{name}.txt").write_text("\n".join(map(str, prompts.prompts)))
    (tmp_path / "chance.toml").write_text("description = 'by chance'\npatterns = ['^[!-O]']\nwindow = 1\n")
    return tmp_path


def arguments(model: Path, files: Path, folder: Path, **more: object) -> list[str]:
    options = {
        "harmful": files / "harmful.txt",
        "harmless": files / "harmless.txt",
        "borderline": files / "harmless.txt",
        "behaviour": files / "chance.toml",
        "folder": folder,
        "trials": 12,
        "group": 4,
        "startup": 4,
        "prompts": 8,
        "max-tokens": 3,
        "dtype": "float32",
    } | more
    return ["search", str(model), *(part for key, value in options.items() for part in (f"--{key}", str(value)))]


def test_a_killed_search_goes_on_with_the_same_command(tiny_folder: Path, files: Path) -> None:
    command = [sys.executable, "-m", "steer", *arguments(tiny_folder, files, files / "killed")]
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}
    ) as process:
        assert process.stderr is not None
        assert any("4 of 12 trials" in line for line in process.stderr)
        process.send_signal(signal.SIGKILL)
    after_kill = Search.open(files / "killed").trials()
    assert 4 <= len(after_kill) < 12
    outcomes = []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for name in ("killed", "not"):
            done = CliRunner().invoke(
                app, arguments(tiny_folder, files, files / name, pick=2, output=files / "d.safetensors")
            )
            assert done.exit_code == 0, done.output
            outcomes.append(told(Search.open(files / name)))
            assert Direction.load(files / "d.safetensors").meta.selection["by"] == "trial 2 of a search"
    finally:
        torch.set_num_threads(threads)
    assert outcomes[0] == outcomes[1]
    shown = CliRunner().invoke(app, ["trials", str(files / "killed")])
    assert shown.exit_code == 0
    assert "12 trials, the front" in shown.output
    saved = CliRunner().invoke(
        app, ["trials", str(files / "killed"), "--save", "3", "-o", str(files / "e.safetensors")]
    )
    assert saved.exit_code == 0
    assert Direction.load(files / "e.safetensors").meta.selection["point"] == outcomes[0][3][1]


def test_a_trial_at_the_writers_can_be_written_into_weights(tiny_folder: Path, files: Path) -> None:
    """`steer bake` compares what it writes with what is served. Attention and MLPs have weights of their own."""

    def run(*command: object) -> str:
        done = CliRunner().invoke(app, list(map(str, command)))
        assert done.exit_code == 0, done.output
        return done.output

    picked = files / "d.safetensors"
    shown = run(*arguments(tiny_folder, files, files / "f", trials=4, sites="writers", pick=3, output=picked))
    assert ", attention 0." in shown
    found, (*_, trial) = Direction.load(picked), Search.open(files / "f").trials()
    point = trial.point
    assert (found.meta.sites, found.meta.mode, found.embedding) == (("writers",), "ablate", None)
    assert point["sites"] == "writers"
    mlp = point["mlp_most"] * layer_weights(
        found.layers, *(point[f"mlp_{name}"] for name in ("peak", "width", "least"))
    )
    assert found.mlp_weights is not None
    torch.testing.assert_close(found.mlp_weights, mlp)
    torch.testing.assert_close(
        found.weights, layer_weights(found.layers, *(point[name] for name in ("peak", "width", "least")))
    )
    assert "verified: logits as served" in run("bake", tiny_folder, "--direction", picked, "-o", files / "baked")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"strength": "1"}, "the least and the largest value"),
        ({"t": "1,-1"}, "--t: the least, 1, must be below the most, -1, and both finite"),
        ({"strength": "0.5,inf"}, "--strength: the least, 0.5, must be"),
        ({"t": "0,nan"}, "--t: the least, 0, must be"),
        ({"t": "a,b"}, "--t: 'a' is not accepted: a number"),
        ({"method": "linear,projected", "t": "0,1"}, "--t: no method of linear, projected has a t"),
        ({"mode": "ablate,gone"}, "--mode: 'gone' is not accepted: 'ablate'"),
        ({"mode": "ablate,one_sided", "sites": "writers"}, "--mode: at the site 'writers' only the mode 'ablate' is"),
        ({"method": "nope"}, "method 'nope' is not known"),
        ({"pick": 3}, "belong together"),
        ({"harmful": "/no/such.txt"}, "cannot be read"),
        ({"behaviour": "nothing"}, "behaviour 'nothing': cannot be read"),
    ],
)
def test_bad_options_are_errors_of_the_command(
    tiny_folder: Path, files: Path, changes: dict[str, Any], said: str
) -> None:
    done = CliRunner().invoke(app, arguments(tiny_folder, files, files / "f", **changes))
    assert done.exit_code == 2, done.output
    assert said in done.output
    assert not (files / "f" / TRIALS).exists()
    assert not (files / "f" / MEASUREMENT).exists() or "method" in changes
