"""Fitting: what is chosen is what does most with least harm on prompts that were not measured, and what does nothing or
does harm is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from steer.demo import MODEL, PROMPTS
from steer.direction import Direction
from steer.errors import InvalidInput, NothingFound
from steer.hf.load import Loaded, load
from steer.hf.steering import Steering
from steer.lab.behaviour import REFUSAL
from steer.lab.derive import Recipe, derive
from steer.lab.evaluator import Candidate, each_row
from steer.lab.fit import LEAST_KEPT, Choice, Fitted, Work, described, fit, most_work, report
from steer.lab.measure import MeasurementOptions
from steer.lab.measurement import Measurement
from steer.lab.methods import make_method
from steer.lab.outcome import Answer
from steer.lab.probe import HFEvaluator
from steer.lab.progress import Progress
from steer.lab.prompts import SMALL, PromptSet, Split, encode_all, read_prompts
from steer.lab.race import Screened
from steer.lab.select import HARDLY, Action, Entrant, entrants_of, through
from steer.lab.source import TransformersSource
from steer.names import Mode

TOKENS = 12
CONDITIONS = MeasurementOptions(vectors=True)
CHOICE = Choice(
    methods=(make_method("slerp", {"t": 0}), make_method("slerp", {"t": 1})),
    layers=(2, 6),
    actions=(Action("one_sided", threshold=0.25, target=0.0), Action("ablate")),
)


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    return load(str(MODEL))


@pytest.fixture(scope="module")
def split() -> Split:
    refused, harmless = (read_prompts(str(PROMPTS / f"{cls}.train.txt")).drawn(48) for cls in ("refused", "harmless"))
    return Split.of(refused, harmless)


def evaluator(loaded: Loaded, progress: Progress | None = None) -> HFEvaluator:
    return HFEvaluator(loaded, Steering(loaded.model, rows=64, rank=1), None, TOKENS, progress=progress)


@pytest.fixture(scope="module")
def tried(loaded: Loaded) -> HFEvaluator:
    return evaluator(loaded)


def work(loaded: Loaded, split: Split, folder: Path) -> Work:
    return Work(folder, TransformersSource(loaded), split, CONDITIONS, REFUSAL, TOKENS)


@pytest.fixture(scope="module")
def measured(loaded: Loaded, split: Split, tried: HFEvaluator, tmp_path_factory: pytest.TempPathFactory) -> Measurement:
    return work(loaded, split, tmp_path_factory.mktemp("fit") / "part").measured(tried)


@pytest.fixture(scope="module")
def fitted(tried: HFEvaluator, split: Split, measured: Measurement) -> Fitted:
    return fit(measured, Recipe(), CHOICE, split, tried)


def test_what_is_tried_was_not_measured(split: Split) -> None:
    for measured, tried in ((split.harmful, split.tried_harmful), (split.harmless, split.tried_harmless)):
        assert len(tried) == 12
        assert len(measured) == 36
        assert not set(measured.prompts) & set(tried.prompts)


def test_small_sets_are_tried_whole_and_that_is_said(split: Split, caplog: pytest.LogCaptureFixture) -> None:
    few = Split.of(split.harmful.drawn(SMALL - 1), split.harmless)
    assert few.harmful == few.tried_harmful
    assert len(few.harmful) == SMALL - 1
    assert f"fewer than {SMALL} prompts" in caplog.text


def test_the_choice_leaves_least_at_least_harm_and_the_file_is_its_recipe(
    fitted: Fitted, measured: Measurement, split: Split
) -> None:
    assert sum(fitted.plain.asked) == 12
    shown = [e.figures.shown for e in fitted.finalists if e.figures is not None]
    assert fitted.figures.shown <= min(shown) + 1 / 12
    chosen = next(e for e in fitted.finalists if e.figures is fitted.figures)
    again = derive(measured, chosen.recipe)
    for name, tensor in again.tensors().items():
        assert torch.equal(tensor, fitted.direction.tensors()[name]), name
    meta = fitted.direction.meta
    assert (meta.mode, meta.strength) == (chosen.recipe.mode, chosen.recipe.strength)
    assert meta.selection["prompts"] == 12
    assert meta.harmful is not None
    assert meta.harmful.count == 36
    assert Direction.from_bytes(fitted.direction.to_bytes()).meta == meta
    # every candidate is in the file, and what was not kept of one stage is not in the next
    rows = meta.selection["candidates"]
    assert 2 + 2 + 2 <= len(rows) <= CHOICE.most_screened
    assert all("log_odds" in row for row in rows)


def test_the_report_says_what_was_found_and_what_is_left(fitted: Fitted) -> None:
    told = "\n".join(report(fitted))
    meta = fitted.direction.meta
    assert meta.harmful is not None
    assert meta.harmless is not None
    assert f"made from {meta.harmful.count} + {meta.harmless.count} prompts, tried on 12 + 12 others" in told
    assert f"harmful: refusal in {sum(fitted.plain.asked)} plain answers" in told
    assert "chosen" in told
    assert ("more than 5 % are left" in told) == (fitted.figures.rate_left > 0.05)
    assert described(Recipe(make_method("slerp", {"t": 0.5}), 1, winsorize=0.9, mode="one_sided", target=0.0)) == (
        "slerp t=0.5 winsorized 0.9, one_sided target 0"
    )


@pytest.mark.parametrize(
    ("actions", "says"),
    [
        ((Action("ablate", strength=0.001),), "12 of 12 answers still show it"),
        ((Action("add", strength=-4.0),), "0 of 12 answers still show it, 12 are lost"),
    ],
    ids=["does nothing", "does harm"],
)
def test_what_does_nothing_and_what_does_harm_is_not_given_out(
    tried: HFEvaluator, split: Split, measured: Measurement, actions: tuple[Action, ...], says: str
) -> None:
    choice = replace(CHOICE, methods=CHOICE.methods[:1], layers=(6,), actions=actions, winsorize=())
    with pytest.raises(NothingFound, match=says):
        fit(measured, Recipe(), choice, split, tried)


def test_what_breaks_harmless_answers_is_not_given_out(loaded: Loaded, split: Split, measured: Measurement) -> None:
    class Harming(HFEvaluator):
        def answers(self, prompts: Any, steer: Any, known: Any = None) -> list[Answer]:
            rows = zip(prompts, each_row(steer, len(prompts)), super().answers(prompts, steer, known), strict=True)
            broken = Answer([7] * 9, "a " * 9)
            return [broken if s and p in split.tried_harmless.prompts else one for p, s, one in rows]

    harming = Harming(loaded, Steering(loaded.model, rows=64, rank=1), None, TOKENS)
    choice = replace(CHOICE, methods=CHOICE.methods[:1], layers=(6,), actions=(Action("ablate"),), winsorize=())
    with pytest.raises(NothingFound, match="12 of 12 harmless answers are lost"):
        fit(measured, Recipe(), choice, split, harming)


def test_what_is_tried_is_what_is_written(measured: Measurement) -> None:
    """In each mode, `add` too, whose weights are other ones."""
    modes: tuple[Mode, ...] = ("ablate", "one_sided", "affine", "add")
    for mode in modes:
        recipe = Recipe(CHOICE.methods[0], 6, mode=mode, strength=-1.0 if mode == "add" else 1.0)
        (entrant,) = entrants_of(measured, [recipe])
        written = derive(measured, recipe)
        for name, tensor in entrant.candidate.direction.tensors().items():
            assert torch.equal(tensor, written.tensors()[name]), (mode, name)


def test_a_model_that_does_not_show_it_is_told_at_once(tried: HFEvaluator, split: Split, measured: Measurement) -> None:
    answered = replace(split, tried_harmful=split.tried_harmless)
    with pytest.raises(NothingFound, match="the plain model shows 'refusal' in 0 of the 12 answers"):
        fit(measured, Recipe(), CHOICE, answered, tried)


def test_a_behaviour_without_openings_is_chosen_by_answers(loaded: Loaded, split: Split, measured: Measurement) -> None:
    blind = REFUSAL.model_copy(update={"openings": ()})
    choice = replace(CHOICE, methods=CHOICE.methods[:1], winsorize=())
    progress = Progress()
    found = fit(measured, Recipe(), choice, split, evaluator(loaded, progress), behaviour=blind)
    planned = most_work(split, choice, TOKENS, blind)
    assert progress.done == pytest.approx(planned)
    assert progress.total == pytest.approx(planned)
    assert found.direction.meta.source_layer == 6
    assert found.figures.shown <= 1 / 12


def test_an_interrupted_fit_goes_on_and_chooses_the_same(
    loaded: Loaded, split: Split, fitted: Fitted, tmp_path: Path
) -> None:
    class Interrupting(Progress):
        def advance(self, work: float = 1.0) -> None:
            super().advance(work)
            if self.current == "choosing" and self.done > 0.7 * self.total:
                raise KeyboardInterrupt

    def run(progress: Progress, sets: Split = split) -> Fitted:
        progress.plan("choosing", most_work(sets, CHOICE, TOKENS))
        begun, one = work(loaded, sets, tmp_path / "d.part"), evaluator(loaded, progress)
        assert begun.cache.resumes == bool(parts), "which the command says"
        return fit(begun.measured(one), Recipe(), CHOICE, sets, one, cache=begun.cache)

    parts: list[Path] = []
    with pytest.raises(KeyboardInterrupt):
        run(Interrupting())
    parts += (tmp_path / "d.part").glob("[!.]*")
    (part,) = parts
    assert list((part / "measured").iterdir())
    other = work(loaded, replace(split, harmful=split.harmful.drawn(30)), tmp_path / "d.part")
    assert len(list((tmp_path / "d.part").glob("[!.]*"))) == 2, "what was measured of other prompts is not mixed in"
    with pytest.raises(InvalidInput, match=r"d\.part: another run writes to it"):
        work(loaded, split, tmp_path / "d.part")  # to write the same file at last
    del other
    progress = Progress()
    found = run(progress)
    assert found.direction.meta.model_dump(exclude={"created"}) == fitted.direction.meta.model_dump(exclude={"created"})
    assert progress.done == pytest.approx(progress.total)
    work(loaded, split, tmp_path / "d.part").remove()
    assert list(tmp_path.iterdir()) == []


def test_bad_prompts_are_told_before_anything_runs(loaded: Loaded, split: Split, tmp_path: Path) -> None:
    shared = replace(split, harmless=replace(split.harmless, prompts=split.harmful.prompts[:20]))
    with pytest.raises(InvalidInput, match="20 prompts are in both"):
        work(loaded, shared, tmp_path / "d.part")
    long = replace(split, tried_harmful=replace(split.harmful, prompts=("word " * 5000,)))
    with pytest.raises(InvalidInput, match="the context is"):
        work(loaded, long, tmp_path / "d.part")
    words = [encode_all(loaded, ["word " * n])[0].ids for n in (100, 101)]
    full = "word " * (100 + (loaded.context - len(words[0])) // (len(words[1]) - len(words[0])))
    assert loaded.context - TOKENS < len(encode_all(loaded, [full])[0].ids) <= loaded.context
    long = replace(split, tried_harmful=replace(split.harmful, prompts=(full,)))
    with pytest.raises(InvalidInput, match=f": has .* and its answer may have {TOKENS}; the context"):
        work(loaded, long, tmp_path / "d.part")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "d.part").mkdir()
    (tmp_path / "d.part" / "mine.txt").write_text("of somebody else")
    with pytest.raises(InvalidInput, match="is not the folder of an interrupted fit"):
        work(loaded, split, tmp_path / "d.part")
    with pytest.raises(InvalidInput, match="prompts are in both"):
        Split.of(split.harmful, split.harmful)
    with pytest.raises(InvalidInput, match="gives 1 different prompts, at least 7 are needed"):
        Split.of(replace(split.harmful, prompts=("a",) * 40), split.harmless)


def test_what_is_given_is_not_chosen() -> None:
    every = Choice()
    linear = make_method("linear")
    assert Choice.of() == every
    assert Choice.of(linear, 3).methods == (linear,)
    assert Choice.of(linear, 3).layers == (3,)
    assert Choice.of(linear, 3).winsorize == ()
    assert {action.mode for action in Choice.of(mode="ablate").actions} == {"ablate"}
    assert Choice.of(mode="add").actions == (Action("add", -1.0),)
    assert Choice.of(mode="affine").actions == (Action("affine", 1.0),)
    many = Choice.of(make_method("subspace", {"rank": 3}))
    assert {action.mode for action in many.actions} == {"ablate"}
    assert many.rank == 3
    assert Choice.of(mode="one_sided", strength=2.0, target=0.1).actions == (Action("one_sided", 2.0, None, 0.1),)
    assert {action.strength for action in Choice.of(strength=0.5).actions} == {0.5}
    baked = Choice.of(sites=("writers",))
    assert {action.mode for action in baked.actions} == {"ablate"}
    refused: tuple[tuple[dict[str, Any], str], ...] = (
        ({"mode": "ablate", "threshold": 0.1}, "numbers of the mode one_sided"),
        ({"mode": "one_sided", "sites": ("writers",)}, "at the site 'writers' only the mode 'ablate'"),
        ({"mode": "one_sided", "method": make_method("cone")}, "one_sided is for methods of one row"),
        ({"target": 0.9}, "target must not be above the threshold"),
        ({"strength": float("nan")}, "within ±10 and not 0"),
    )
    for options, says in refused:
        with pytest.raises(InvalidInput, match=says):
            Choice.of(**options)


NOTHING = Direction.load(Path(__file__).parents[2] / "directions" / "refusal.safetensors")
SCREENED = st.builds(Screened, st.floats(-9, 9), st.floats(0, 1), st.floats(0, 2))


@given(st.lists(SCREENED, min_size=1, max_size=30), st.integers(1, 8))
def test_what_goes_on_has_the_least_harm_and_the_most_effect_first(screened: list[Screened], count: int) -> None:
    nothing = NOTHING
    entrants = [
        Entrant(Recipe(layer=i), Candidate.of(nothing, "ablate", 1.0), screened=one) for i, one in enumerate(screened)
    ]
    kept = through(entrants, count)
    assert len(kept) == min(count, len(entrants))
    assert len({e.recipe for e in kept}) == len(kept)
    if len(entrants) <= count:
        return
    bar = min(one.probability for one in screened) + HARDLY
    good = [one for one in screened if one.probability <= bar]
    found = [e.screened for e in kept if e.screened is not None]
    assert found[0].kl == min(one.kl for one in good)
    if count > 1:
        assert min(one.log_odds for one in good) in [one.log_odds for one in found]
    better = [one.probability <= bar for one in found]
    assert better == sorted(better, reverse=True)


def test_sets_are_drawn_evenly_and_the_rest_is_what_was_not_drawn() -> None:
    whole = PromptSet("sorted", "", tuple(f"{topic} {n}" for topic in "abcd" for n in range(25)))
    some = whole.drawn(24)
    assert some == whole.drawn(24)
    assert {str(prompt)[0] for prompt in some.prompts} == set("abcd")
    assert set(whole.without(some).prompts) | set(some.prompts) == set(whole.prompts)
    assert len(whole.without(some)) == 76
    assert whole.drawn(1000).dataset.count == 100


def test_only_prompts_that_the_model_treats_as_their_class_are_measured(
    loaded: Loaded, tried: HFEvaluator, split: Split, tmp_path: Path
) -> None:
    """What is answered is no part of the mean of what is refused; but some of it is, where little else is there."""
    refused, answered = split.harmful.prompts[:20], split.harmless.prompts
    mixed = replace(split, harmful=replace(split.harmful, prompts=(*answered[:10], *refused)))
    mixed = replace(mixed, harmless=replace(split.harmless, prompts=answered[10:]))
    found = work(loaded, mixed, tmp_path / "mixed").measured(tried)
    assert found.meta.harmful is not None
    assert found.meta.harmful.count == 20
    alone = replace(mixed, harmful=replace(split.harmful, prompts=refused))
    torch.testing.assert_close(
        found.harmful.mean, work(loaded, alone, tmp_path / "alone").measured(tried).harmful.mean, rtol=0, atol=1e-6
    )
    few = replace(mixed, harmful=replace(split.harmful, prompts=(*answered[:10], *refused[:7])))
    found = work(loaded, few, tmp_path / "few").measured(tried)
    assert found.meta.harmful is not None
    assert found.meta.harmful.count == LEAST_KEPT
