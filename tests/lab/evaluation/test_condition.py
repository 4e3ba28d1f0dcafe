"""A condition that is found decides other prompts as it says, at run time too; where there is none, that is said."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from steer.demo import MODEL, PROMPTS
from steer.direction import Direction
from steer.errors import NothingFound, SpecError
from steer.hf.load import load
from steer.lab.evaluation.condition import _between, _cut, find
from steer.lab.prompts import SMALL, PromptSet, Split, read_prompts
from steer.lab.source import TransformersSource, prompt_components
from steer.lab.statistics import mean_of_rates
from steer.spec import Condition
from tests import models
from tests.servers import ROOT, Server, receipt
from tests.test_cli import run

SHIPPED = ROOT / "directions" / "refusal.safetensors"


def sets(count: int) -> tuple[PromptSet, PromptSet]:
    refused, harmless = (read_prompts(str(PROMPTS / f"{of}.train.txt")).drawn(count) for of in ("refused", "harmless"))
    return refused, harmless


@pytest.fixture(scope="module")
def source() -> TransformersSource:
    return TransformersSource(load(str(MODEL)))


@pytest.fixture(scope="module")
def split() -> Split:
    return Split.of(*sets(48))


def noisy(angle: float) -> Direction:
    """The shipped direction, with each layer's row turned by this angle towards a random one."""
    own = Direction.load(SHIPPED)
    drawn = torch.randn(own.directions.shape, generator=torch.Generator().manual_seed(0))
    other = torch.nn.functional.normalize(
        drawn - (drawn * own.directions).sum(-1, keepdim=True) * own.directions, dim=-1
    )
    return replace(own, directions=own.directions * math.cos(angle) + other * math.sin(angle), axis=None, angles=None)


def test_it_is_at_the_layer_that_tells_the_sets_apart_on_the_side_of_the_harmful(
    source: TransformersSource, split: Split
) -> None:
    own = Direction.load(SHIPPED)
    for layer in (2, 5):
        # of the shipped rows this one alone; the others are those of nothing that the model knows of
        rows = noisy(math.pi / 2).directions
        rows[layer] = own.directions[layer]
        for side, direction in (("above", rows), ("below", -rows)):
            found = find(source, replace(own, directions=direction), "harm", split)
            assert (found.condition.layer, found.condition.direction) == (layer, "harm")
            assert getattr(found.condition, side) is not None
            assert (sum(found.harmful), sum(found.harmless)) == (12, 0)
            assert found.auc == 1.0
            assert found.balanced_accuracy.value == 1.0


def test_no_other_layer_and_threshold_has_fewer_errors(source: TransformersSource, split: Split) -> None:
    direction = noisy(1.4)
    found = find(source, direction, "harm", split)
    encoded = (source.encode(one.prompts, None) for one in (split.harmful, split.harmless))
    harmful, harmless = (prompt_components(source, direction.directions[:, 0], each) for each in encoded)
    best = 0.0
    for layer in range(direction.layers - 1):
        for threshold in torch.cat([harmful[layer], harmless[layer]]):
            right = (harmful[layer] > threshold).double().mean(), (harmless[layer] <= threshold).double().mean()
            best = max(best, float(right[0] + right[1]) / 2, 1 - float(right[0] + right[1]) / 2)
    assert found.front[-1].accuracy == pytest.approx(best)
    assert [cut.accuracy for cut in found.front] == sorted({cut.accuracy for cut in found.front})
    assert [cut.condition.layer for cut in found.front] == sorted({cut.condition.layer for cut in found.front})


def test_sets_that_do_not_differ_have_none(source: TransformersSource) -> None:
    refused, harmless = sets(64)
    first, second = [
        replace(refused, prompts=refused.prompts[part] + harmless.prompts[part])
        for part in (slice(0, None, 2), slice(1, None, 2))
    ]
    with pytest.raises(NothingFound, match="no condition on 'harm' tells the sets apart: the best is harm@"):
        find(source, Direction.load(SHIPPED), "harm", Split.of(first, second))


def test_only_what_a_server_would_take_is_looked_at(source: TransformersSource, split: Split) -> None:
    own = Direction.load(SHIPPED)
    assert find(source, own, "harm", split, layer=3).condition.layer == 3
    with pytest.raises(SpecError, match="one must come after it: 0 to 6 are accepted"):
        find(source, own, "harm", split, layer=7)
    with pytest.raises(SpecError, match="acts at the sites writers: what is read is 'resid_post'"):
        find(source, noisy(0).with_meta(sites=("writers",), mode="ablate"), "harm", split)
    rows = own.directions.clone()
    rows[:6] = 0
    assert find(source, replace(own, directions=rows), "harm", split).condition.layer == 6


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e3))
def test_a_threshold_is_short_and_not_near_the_components_beside_it(low: float, gap: float) -> None:
    high = low + gap
    number = _between(low, high)
    assert abs(number - (low + high) / 2) <= (high - low) / 4
    digits = len(f"{number:e}".split("e")[0].rstrip("0").strip("-."))
    assert digits <= 2 or float(f"{number:.1g}") != number


def test_components_that_are_all_equal_tell_nothing() -> None:
    cut = _cut("harm", 0, torch.ones(4).double().numpy(), torch.ones(5).double().numpy())
    assert cut.accuracy == 0.5


def test_the_interval_of_a_mean_of_rates_is_newcombes() -> None:
    """His example (a) of method 10: 56 of 70 less 48 of 80 is 0.2, from 0.0524 to 0.3339."""
    first, second = ([True] * hits + [False] * (count - hits) for hits, count in ((56, 70), (48, 80)))
    found = mean_of_rates(first, [not each for each in second])
    assert [2 * each - 1 for each in (found.value, found.low, found.high)] == pytest.approx(
        [0.2, 0.0524, 0.3339], abs=1e-4
    )


def test_what_is_printed_decides_each_prompt_at_run_time_as_it_was_counted(
    source: TransformersSource, tmp_path: Path
) -> None:
    """Also those that it decides wrongly: a twentieth of each set are prompts of the other kind."""
    own, other = (one.prompts for one in sets(160))
    harmful, harmless = tmp_path / "harmful.txt", tmp_path / "harmless.txt"
    harmful.write_text("\n".join(map(str, own[8:] + other[:8])))
    harmless.write_text("\n".join(map(str, other[8:] + own[:8])))
    shutil.copy(SHIPPED, tmp_path / "harm.safetensors")
    given = ("--condition", str(tmp_path / "harm.safetensors"), "--harmful", str(harmful), "--harmless", str(harmless))
    kept = tmp_path / "kept.safetensors"
    printed = run("fit", str(MODEL), *given, "--output", str(kept)).stdout
    split = Split.of(read_prompts(str(harmful)), read_prompts(str(harmless)), 160)
    found = find(source, Direction.load(SHIPPED), "harm", split)
    wrong = len(found.harmful) - sum(found.harmful), sum(found.harmless)
    assert all(wrong)
    for name, count, told in (
        ("harmful", wrong[0], "do not meet it (false negatives)"),
        ("harmless", wrong[1], "meet it (false positives)"),
    ):
        [line] = [line for line in printed.splitlines() if line.startswith(f"{name}.txt: {count} of 32 (")]
        assert line.endswith(f") {told}")
    own_file, written = Direction.load(SHIPPED), Direction.load(kept)
    assert all(torch.equal(written.tensors()[name], tensor) for name, tensor in own_file.tensors().items())
    said = written.meta.condition
    assert said is not None
    assert Condition("harm", said.layer, said.above, said.below) == found.condition
    assert ((said.missed, said.harmful.count), (said.caught, said.harmless.count)) == ((wrong[0], 32), (wrong[1], 32))
    spec = printed.partition('"steer": "')[2].partition('"')[0]
    assert spec == f"kept?{found.condition.of('kept')}", "as the file that has it is served"
    shown = " ".join(run("inspect", str(kept)).stdout.split())
    assert (
        f"condition that was found: {spec}: {wrong[0]} of 32 of harmful.txt do not meet it, {wrong[1]} of 32" in shown
    )
    with Server(str(MODEL), "--directions", str(tmp_path)) as server:
        for one, counted in ((split.tried_harmful, found.harmful), (split.tried_harmless, found.harmless)):
            answers = [server.chat(prompt, steer=spec, max_tokens=1).json() for prompt in one.prompts]
            assert [answer["choices"][0]["steer_applied"] for answer in answers] == list(counted)
        told = server.client.get("/v1/directions/kept").json()
        assert told["condition"] == found.condition.of("kept")
        assert told["meta"]["condition"] == said.model_dump(mode="json")
        answer = server.chat(split.tried_harmless.prompts[0], steer="kept", max_tokens=1)
        assert "if" not in receipt(answer)[0], "a request that does not write it has no condition"
        assert "steer_applied" not in answer.json()["choices"][0]


def test_options_of_a_fit_are_refused_and_nothing_is_found_with_exit_code_3(tmp_path: Path) -> None:
    given = ("--condition", str(SHIPPED), "--harmful", str(PROMPTS / "refused.train.txt"))
    both = (*given, "--harmless", str(PROMPTS / "harmless.train.txt"))
    for more, says in (
        (("-o", "x.txt"), "x.txt"),
        (("-o", str(SHIPPED)), "is the file of --condition, which is not changed"),
        (("--method", "slerp"), "--method: is for a direction to be fitted"),
        (("--layer", "all"), "--layer: 'all' is not for --condition"),
        (("--layer", "9"), "--layer: 9 does not exist"),
        (("--layer", "-1"), "the condition refusal@7>0.0: the model has the layers 0 to 7"),
        (("--limit", "8"), f"--limit: 8 is not accepted here: {SMALL} or more prompts of each set"),
    ):
        refused = run("fit", str(MODEL), *both, *more, code=2).stderr
        assert says in refused
        assert "warning" not in refused.lower()
    assert "--output: is missing" in run("fit", str(MODEL), *both[2:], code=2).stderr
    other = tmp_path / "other.safetensors"
    models.direction(models.tiny("llama")).save(other)
    assert "made for d_model 64" in run("fit", str(MODEL), "--condition", str(other), *both[2:], code=2).stderr
    (tmp_path / "other.txt").write_text("\n".join(map(str, read_prompts(both[5]).prompts[:96])))
    (tmp_path / "more.txt").write_text("\n".join(map(str, read_prompts(both[5]).prompts[96:])))
    same = ("--harmful", str(tmp_path / "other.txt"), "--harmless", str(tmp_path / "more.txt"))
    assert "nothing found: no condition on 'refusal'" in run("fit", str(MODEL), *given[:2], *same, code=3).stderr
