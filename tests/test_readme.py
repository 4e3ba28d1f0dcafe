"""Every command of the README and of the pages that go on from it runs, as it stands there, against the server that
`make serve` starts."""

from __future__ import annotations

import json
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

from experiments.slerp_study.__main__ import app as study
from steer.cli.app import app
from tests.servers import ROOT, Server

README = (ROOT / "README.md").read_text()
#: What is typed on these pages is run here, against the demo server of a newcomer; `test_docs` has the other pages.
PAGES = {name: (ROOT / name).read_text() for name in ("README.md", "docs/requests.md", "docs/directions.md")}
#: Options of curl, pip, docker, vLLM and the benchmarks.
OF_OTHERS = {
    *("--additional-config", "--allowed-origins", "--api-key", "--api-server-count", "--data-binary"),
    *("--extra-index-url", "--gpus", "--ipc", "--max-model-len", "--middleware", "--no-cache-dir", "--no-deps"),
    *("--otlp-traces-endpoint", "--plain", "--root-path", "--shutdown-timeout", "--ssl-certfile"),
    *("--ssl-keyfile", "--tensor-parallel-size", "--value", "--worker-cls", "--worker-urls", "--data-parallel-size"),
    *("--data-parallel-multi-port-external-lb", "--data-parallel-hybrid-lb", "--api-servers", "--minutes"),
}
#: Of each file, where commands run on a copy of the tree.
PROMPTS = 8
ADDRESS = "http://127.0.0.1:8000"
CONTENT = re.compile(r'^"content": ".*"$', re.MULTILINE)


def blocks_of(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page, flags=re.DOTALL)


def blocks(language: str) -> list[str]:
    return blocks_of(README, language)


def shell_blocks() -> list[Any]:
    """Each once, in the order of a reader; but the two commands of the start, and the two first requests."""
    found: dict[str, str] = {}
    for name, page in PAGES.items():
        for number, block in enumerate(blocks_of(page, "sh")):
            found.setdefault(block, f"{Path(name).stem}-{number}")
    return [pytest.param(block, id=name) for block, name in list(found.items())[3:]]


def shorten(tree: Path) -> None:
    for file in (tree / "steer/demo/prompts").iterdir():
        if not file.name.startswith("expected"):
            file.write_text("".join(file.read_text().splitlines(keepends=True)[:PROMPTS]))


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tree, since commands of the README write into it, with few prompts, so that they take seconds."""
    copy = tmp_path_factory.mktemp("tree")
    for name in ("steer", "directions"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    shorten(copy)
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
    _, plain, steered = (run(block, "sh", server, tree) if i else "" for i, block in enumerate(blocks("sh")[:3]))
    shown = [json.loads(f"{{{line}}}")["content"] for page in blocks("text") for line in CONTENT.findall(page)]
    assert shown == [
        json.loads(answer[answer.index('{"id"') :])["choices"][0]["message"]["content"] for answer in (plain, steered)
    ]
    (said,) = re.findall(r"x-steer-applied: .*", README)
    (sent,) = re.findall(r"x-steer-applied: .*", steered)
    assert re.fullmatch(re.escape(said).replace("…", "[0-9a-f]+"), sent.strip())


@pytest.mark.parametrize("block", shell_blocks())
def test_shell_blocks(block: str, server: Server, tree: Path) -> None:
    out = run(block, "sh", server, tree)
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
    assert f"{plain}\n{steered}\n" == blocks("text")[-1]
    assert plain != steered


def test_vllm_block(server: Server, tree: Path) -> None:
    if find_spec("vllm") is None:
        pytest.skip("vLLM is not installed")
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_WORKER_MULTIPROC_METHOD": "spawn"}
    script = tree / "offline.py"  # a file, since vLLM's workers are spawned and import it again
    (block,) = blocks_of((ROOT / "docs/backends.md").read_text(), "python")
    script.write_text(block)
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


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda path: path.stem
)
def test_every_option_that_a_page_names_exists(page: Path) -> None:
    known = options(get_command(app)) | options(get_command(study)) | OF_OTHERS | {"--help"}
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", page.read_text())) - known == set()
