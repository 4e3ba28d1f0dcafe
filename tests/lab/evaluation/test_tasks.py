"""Tasks of lm_eval through real servers: the alias is scored as it is served, and only the file that is meant."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from steer.errors import InvalidInput, SteerError
from steer.lab.evaluation.arms import arms_of
from steer.lab.evaluation.tasks import TaskPlan, given, scores, serving
from steer.lab.resume import Cache
from tests.harness import CHOSEN, GENERATED, HELLO, TASK
from tests.servers import Server, text


@pytest.fixture(scope="module")
def plan(tiny_server: Server, tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> TaskPlan:
    """A task that the steered model alone can do, and one of choice."""
    folder = tmp_path_factory.mktemp("tasks")
    answer = text(tiny_server.complete(HELLO, steer="refusal", max_tokens=6)).strip()
    assert answer != text(tiny_server.complete(HELLO, max_tokens=6)).strip()
    rows = [{"question": q, "answer": answer, "choices": ["ab", "cd"]} for q in ("hello", "other")]
    (folder / "data.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    for name, kind, metric, more in (
        ("said", "generate_until", "exact_match", GENERATED),
        ("chosen", "multiple_choice", "acc", CHOSEN),
    ):
        task = TASK.format(data=folder / "data.jsonl", kind=kind, metric=metric, more=more)
        (folder / f"{name}.yaml").write_text(task.replace("steer_demo", name))
    return TaskPlan(["said", "chosen"], str(tiny_folder), folder)


def test_scores_of_plain_and_alias_through_a_running_server(
    tiny_server: Server, plan: TaskPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    assert tiny_server.directions is not None
    arms = arms_of([tiny_server.directions / "refusal.safetensors"], None, [1.0])
    served = given(f"{tiny_server.url}/v1", arms)
    assert served.model == tiny_server.model_name
    found = scores(plan, served, arms, Cache(tmp_path, {}))
    by_arm = {(s.task, s.arm): s for s in found}
    plain, steered = by_arm["said", "plain"], by_arm["said", arms[0].name]
    assert (plain.value, plain.samples, plain.against_plain) == (0, 2, None)
    assert steered.value >= 0.5
    assert steered.against_plain is not None
    assert steered.against_plain.value == steered.value
    assert steered.against_plain.p is not None
    assert ("chosen", arms[0].name) in by_arm
    assert scores(plan, served, arms, Cache(tmp_path, {})) == found, "kept, and not run again"


def test_a_server_that_serves_another_file_is_refused(tiny_server: Server, tmp_path: Path) -> None:
    assert tiny_server.directions is not None
    other = tmp_path / "refusal.safetensors"
    other.write_bytes((tiny_server.directions / "verbosity.safetensors").read_bytes())
    stranger = tmp_path / "stranger.safetensors"
    stranger.write_bytes(other.read_bytes())
    with pytest.raises(InvalidInput) as caught:
        given(f"{tiny_server.url}/v1", arms_of([other, stranger], None, None))
    assert len(caught.value.problems) == 2
    with pytest.raises(InvalidInput, match=r"--url: http://127.0.0.1:9/v1"):
        given("http://127.0.0.1:9/v1", arms_of([other], None, None))


def test_a_server_of_our_own_is_started_and_stopped(tiny_server: Server, tiny_folder: Path) -> None:
    assert tiny_server.directions is not None
    arms = arms_of([tiny_server.directions / "refusal.safetensors"], None, None)
    with serving(str(tiny_folder), ["--device", "cpu"], arms) as served:
        assert given(served.url, arms) == served
    with pytest.raises(InvalidInput):
        given(served.url, arms)


def test_a_task_that_does_not_exist_is_an_error_with_the_log(tiny_server: Server, tiny_folder: Path) -> None:
    plan = TaskPlan(["no_such_task"], str(tiny_folder))
    served = given(f"{tiny_server.url}/v1", [])
    with pytest.raises(SteerError, match="no_such_task"):
        scores(plan, served, [], Cache(None, {}))
