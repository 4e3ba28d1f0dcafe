"""Plain `vllm serve` with documented options, and no command of ours: by middleware, by plugin, or not at all; on
several ranks and several engines."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from steer.errors import InvalidInput
from steer.vllm.internals.server import server_arguments
from steer.vllm.plugin import serve
from steer.vllm.settings import EngineSettings
from tests import models
from tests.servers import Server, front_ends, receipt, text
from tests.vllm import device
from tests.vllm.engines import Home, Reference, are_likeliest
from tests.vllm.swaps import swap_under_load

COMMAND = [sys.executable, "-m", "tests.vllm.command", "serve"]
OPTIONS = (
    *("--host", "127.0.0.1", "--dtype", "float32", "--max-model-len", "256", "--max-num-seqs", "32"),
    *("--served-model-name", "tiny"),
    *device.ARGUMENTS,
)
#: Of two ranks, or two engines.
CORES = ("VLLM_CPU_OMP_THREADS_BIND", "0|1")
MIDDLEWARE = ("--middleware", "steer.vllm.server.Middleware")


def arguments(home: Home, *more: str) -> Sequence[str]:
    settings = json.dumps({"steer": {"directions": str(home.directions), "rank": 2}})
    return (
        *(str(home.folder), "--worker-cls", "steer.vllm.worker.Worker", "--additional-config", settings),
        *(*OPTIONS, *more),
    )


def check(server: Server, home: Home) -> None:
    """Plain and steered answers are what transformers says, on every engine behind the server."""
    reference = Reference(home)
    for spec in ("off", "refusal", "refusal:one_sided=0.5,verbosity=-0.5", "verbosity:add=0.5") * 3:
        answer = server.complete(steer=spec, logprobs=1, return_token_ids=True)
        body = answer.json()["choices"][0]
        prompt, ids = body["prompt_token_ids"], body["token_ids"]
        expected = reference.logprobs(prompt + ids, spec)[len(prompt) - 1 : -1]
        assert are_likeliest(ids, expected)
        assert len(receipt(answer)) == (0 if spec == "off" else spec.count(",") + 1)
    for number, holds in ((-1e6, True), (1e6, False)) * 3:
        answer = server.complete(steer=f"refusal?verbosity@0>{number}", n=2, temperature=1)
        assert [choice["steer_applied"] for choice in answer.json()["choices"]] == [holds, holds]


@pytest.mark.skipif(device.GPUS == 1, reason="two ranks need two GPUs")
def test_two_ranks_by_middleware(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(*CORES)
    home = Home.make("llama", tmp_path)
    with Server(*arguments(home, *MIDDLEWARE, "--tensor-parallel-size", "2"), command=COMMAND) as server:
        check(server, home)
        swap_under_load(server, home)


@pytest.mark.skipif(device.GPUS == 1, reason="two engines need two GPUs")
def test_two_engines_by_plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both of `VLLM_PLUGINS`: the general plugin in every process, the routes in the servers', of which vLLM starts one
    for each engine."""
    monkeypatch.setenv("VLLM_PLUGINS", "steer")
    monkeypatch.setenv(*CORES)
    home = Home.make("llama", tmp_path)
    options = ("--data-parallel-size", "2", "--enforce-eager")
    with Server(*arguments(home, *options), command=COMMAND) as server:
        fronts = front_ends(server)
        assert fronts.keys() == {0, 1}
        check(server, home)
        put = server.client.put("/v1/directions/guest", content=models.direction(home.model, seed=9).to_bytes())
        assert put.status_code == 200, put.text
        whole = {"model": "tiny", "prompt": "hello", "max_tokens": 8, "temperature": 0, "steer": "guest"}
        answers = [fronts[n % 2].post("/v1/completions", json=whole) for n in range(8)]  # and on either engine
        assert {receipt(answer)[0]["digest"] for answer in answers} == {put.json()["digest"]}
        assert len({text(answer) for answer in answers}) == 1
        assert text(server.complete()) != text(answers[0])
        for front in fronts.values():
            front.close()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--max-model-lenn", "100"), "unrecognized arguments: --max-model-lenn 100; did you mean --max-model-len?"),
        (("--block-size=3x",), "argument --block-size: invalid int value: '3x'"),
    ],
)
def test_a_wrong_option_of_vllms_is_one_line(options: Sequence[str], says: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput) as caught:
        server_arguments(str(tmp_path), options)
    assert str(caught.value) == says


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            ("--additional-config", '{"steer": {"default": "refusal"}}'),
            "--additional-config: 'steer' is not accepted here",
        ),
        (("--worker-cls", "somebody.Else"), "--worker-cls: 'somebody.Else' does not steer"),
    ],
)
def test_what_steer_serve_would_overwrite_is_refused(options: Sequence[str], says: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=re.escape(says)):
        serve(str(tmp_path), EngineSettings(), options)


def test_a_server_that_would_ignore_the_field_does_not_start(tmp_path: Path) -> None:
    home = Home.make("llama", tmp_path)
    with pytest.raises(RuntimeError, match=r"would ignore the field 'steer': start it with --middleware"):
        Server(*arguments(home, "--enforce-eager"), command=COMMAND).__enter__()


def test_the_batch_runner_would_ignore_it_as_well(tmp_path: Path) -> None:
    home = Home.make("llama", tmp_path)
    settings = json.dumps({"steer": {"directions": str(home.directions)}})
    body = {"model": str(home.folder), "prompt": "hello", "steer": "refusal"}
    request = {"custom_id": "1", "method": "POST", "url": "/v1/completions", "body": body}
    (tmp_path / "in.jsonl").write_text(json.dumps(request))
    done = subprocess.run(
        [
            *(*COMMAND[:-1], "run-batch", "-i", str(tmp_path / "in.jsonl"), "-o", str(tmp_path / "out.jsonl")),
            *("--model", str(home.folder), "--worker-cls", "steer.vllm.worker.Worker"),
            *("--additional-config", settings, "--dtype", "float32"),
        ],
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert done.returncode != 0
    assert "batch runner would ignore the field 'steer'" in done.stdout + done.stderr
    assert not (tmp_path / "out.jsonl").exists()
