"""The generated documents are those that the code gives today, and what the others tell to type can be typed."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from docs import api, sizes
from experiments.slerp_study.__main__ import app as study
from steer.serve.protocol import ChatRequest, CompletionRequest
from tests.servers import ROOT
from tests.test_readme import blocks_of, environment, shorten


@pytest.fixture(scope="module")
def rendered() -> str:
    return api.render()


def test_the_api_reference_is_fresh(rendered: str) -> None:
    assert rendered == api.TARGET.read_text(), "run `make docs`"


def test_every_field_is_described_and_stands_in_the_reference(rendered: str) -> None:
    for model in (ChatRequest, CompletionRequest):
        for name, field in model.model_fields.items():
            assert field.description, f"{model.__name__}.{name}"
            assert f"| `{name}` |" in rendered


def test_the_openapi_document_names_the_carried_fields() -> None:
    for model in (ChatRequest, CompletionRequest):
        properties: dict[str, Any] = model.model_json_schema()["properties"]
        assert {"steer", "steer_readout", "vllm_xargs"} <= set(properties)


#: The same commands on less, so that they take seconds.
SMALLER = {"--trials 256": "--trials 4 --group 4", "--prompts 192": "--prompts 8", "--save 247": "--save 3"}
TOKENS = "--max-tokens 8"


@pytest.mark.parametrize("page", ["evaluation", "search"])
def test_commands_of_a_page_run(page: str, tmp_path: Path) -> None:
    for name in ("steer/demo/model", "steer/demo/prompts", "directions"):
        shutil.copytree(ROOT / name, tmp_path / name)
    shorten(tmp_path)
    text = (ROOT / "docs" / f"{page}.md").read_text()
    assert page != "search" or all(usual in text for usual in SMALLER), "the page has other numbers now"
    for block in blocks_of(text, "sh"):
        for usual, smaller in SMALLER.items():
            block = block.replace(usual, smaller)
        block = re.sub(r"--max-tokens \d+", TOKENS, block)
        command = ["bash", "-euo", "pipefail", "-c", block]
        done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=1500)
        assert done.returncode == 0, f"{block}\n{done.stdout}\n{done.stderr}"


def test_the_python_page_runs() -> None:
    (block,) = blocks_of((ROOT / "docs/python.md").read_text(), "python")
    done = subprocess.run(
        [sys.executable, "-c", block], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=1500
    )
    assert done.returncode == 0, done.stderr
    shown, shape, taken = done.stdout.strip().splitlines()[-3:]
    assert re.fullmatch(r"<steering of LlamaForCausalLM, attached, at resid_post: refusal [0-9a-f]{12}>", shown)
    assert re.fullmatch(r"\(2, \d+, \d+, 1\)", shape)
    assert float(taken) > 0.1


def test_the_studies_are_commands_that_exist(tmp_path: Path) -> None:
    """What they run takes half an hour and more; that they would run is seen without."""
    *one_model, block = blocks_of((ROOT / "docs/study.md").read_text(), "sh")
    target = block.split()[1]
    told = subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    lines = told.replace("\\\n", " ").splitlines()
    commands = [shlex.split(line) for line in lines if " experiments.slerp_study " in line]
    assert len(commands) == 2
    assert one_model
    for command in [*commands, *map(shlex.split, one_model)]:
        get_command(study).make_context("study", command[3:])


def test_what_make_runs_keeps_what_python_compiles() -> None:
    """pip compiles nothing there, so without it every process would compile all that it imports again."""
    forbidden = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
    command = ["make", "--silent", "--file=Makefile", "--file=-", "shown"]
    told = subprocess.run(
        command, cwd=ROOT, env=forbidden, input="shown: ; @env", capture_output=True, text=True, check=True
    ).stdout
    assert "PATH=" in told
    assert "PYTHONDONTWRITEBYTECODE" not in told


WRITTEN = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "steer").rglob("*.md")]
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


def anchors(page: Path) -> set[str]:
    """Of the headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", WRITTEN, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for link in LINK.findall(page.read_text()):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda path: path.stem)
def test_every_page_can_be_found(page: Path) -> None:
    """From the index, which the README names."""
    assert "docs/README.md" in LINK.findall((ROOT / "README.md").read_text())
    assert page.name in ["README.md", *LINK.findall((ROOT / "docs" / "README.md").read_text())]


def test_the_page_knows_how_large_the_package_is() -> None:
    """To a tenth: `python -m docs.sizes` tells it to the line."""
    rows = [line.strip("| ").split(" | ") for line in sizes.row("now", sizes.tree()).splitlines()]
    page = (ROOT / "docs/architecture.md").read_text()
    (said,) = re.findall(r"^\| now \| (.*) \|$", page, flags=re.MULTILINE)
    for now, then in zip(rows[0][1:], said.split(" | "), strict=True):
        assert int(now.replace(",", "")) == pytest.approx(int(then.replace(",", "")), rel=0.1)


NAMED = re.compile(
    r"`((?:steer|tests|benchmarks|experiments|docs|cli|hf|lab|runtime|serve|vllm)(?:/\w+)+(?:\.\w+|/)?)`"
)


@pytest.mark.parametrize("page", ["architecture", "benchmarks", "backends", "study"])
def test_every_file_that_a_page_names_exists(page: str) -> None:
    for name in NAMED.findall((ROOT / "docs" / f"{page}.md").read_text()):
        below = [ROOT / name, ROOT / "steer" / name]
        assert any(path.exists() or path.with_suffix(".py").exists() for path in below), name
