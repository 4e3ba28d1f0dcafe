"""Every command of the README runs, as it stands there, against the server that `make serve` starts."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from steer.cli import app
from tests.servers import ROOT, Server

README = (ROOT / "README.md").read_text()
CURL_PIP_AND_VLLM = (
    *("--data-binary", "--extra-index-url", "--no-deps", "--root-path"),
    *("--max-model-len", "--worker-cls", "--middleware", "--additional-config", "--tensor-parallel-size", "--api-key"),
)
ADDRESS = "http://127.0.0.1:8000"


def blocks_of(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page, flags=re.DOTALL)


def blocks(language: str) -> list[str]:
    return blocks_of(README, language)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tree, since commands of the README write into it."""
    copy = tmp_path_factory.mktemp("tree")
    for name in ("steer", "directions"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    return copy


@pytest.fixture(scope="module")
def server(tree: Path) -> Iterator[Server]:
    with Server("--directions", str(tree / "directions")) as server:
        yield server


def environment(server: Server | None = None) -> dict[str, str]:
    found = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    return os.environ | found | ({"STEER_PORT": str(server.port)} if server else {})


def run(block: str, language: str, server: Server, tree: Path) -> str:
    text = block.replace(ADDRESS, server.url)
    command = ["bash", "-euo", "pipefail", "-c", text] if language == "sh" else [sys.executable, "-c", text]
    done = subprocess.run(command, cwd=tree, env=environment(server), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_the_two_commands_are_targets() -> None:
    first, *_ = blocks("sh")
    makefile = (ROOT / "Makefile").read_text()
    commands = re.findall(r"^make (\w+)", first, flags=re.MULTILINE)
    assert commands == ["serve", "test"]
    for command in [*commands, *re.findall(r"`make (\w+)`", README)]:
        assert re.search(rf"^{command}:", makefile, flags=re.MULTILINE), command


def test_plain_is_refused_and_steered_is_answered(server: Server, tree: Path) -> None:
    out = run(blocks("sh")[1], "sh", server, tree)
    plain, steered = out.split("HTTP/1.1 200 OK", 1)
    assert re.search(r"sorry|cannot|can't|Unfortunately", plain, re.IGNORECASE), plain
    assert "first get" in steered
    assert '"direction":"refusal"' in steered


@pytest.mark.parametrize("number", range(2, len(blocks("sh"))))
def test_shell_blocks(number: int, server: Server, tree: Path) -> None:
    out = run(blocks("sh")[number], "sh", server, tree)
    assert "error" not in out.lower() or '"errors":[]' in out


def test_openai_block(server: Server, tree: Path) -> None:
    plain, *steered, applied = run(blocks("python")[0], "python", server, tree).strip().splitlines()
    assert len(steered) == 4
    assert len({line.removeprefix("steered:") for line in steered}) == 1
    assert "first get" in steered[0]
    assert "first get" not in plain
    assert '"strength":0.7' in applied


def test_python_api_block(server: Server, tree: Path) -> None:
    plain, steered = run(blocks("python")[1], "python", server, tree).strip().splitlines()
    assert "first get" in steered
    assert "first get" not in plain


def test_vllm_block(server: Server, tree: Path) -> None:
    if find_spec("vllm") is None:
        pytest.skip("vLLM is not installed")
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_WORKER_MULTIPROC_METHOD": "spawn"}
    script = tree / "offline.py"  # a file, since vLLM's workers are spawned and import it again
    script.write_text(blocks("python")[2])
    done = subprocess.run(
        [sys.executable, str(script)],
        cwd=tree,
        env=environment(server) | settings,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    # vLLM logs to the same stream
    plain, steered = [line for line in done.stdout.splitlines() if line.startswith(("I", "Sorry", "Sure"))]
    assert "first get" in steered
    assert "first get" not in plain


def options(command: Any) -> set[str]:
    """Every option of `command` and of the commands below it."""
    own = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    return own.union(*(options(below) for below in getattr(command, "commands", {}).values()))


def test_every_option_that_the_readme_names_exists() -> None:
    known = options(get_command(app)) | {*CURL_PIP_AND_VLLM, "--help"}
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", README)) - known == set()
