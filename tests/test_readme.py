"""Every command of the README and of the pages that go on from it runs, as it stands there, against the server that
`make serve` starts, and prints what the page says that it prints."""

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

from experiments.slerp_study.__main__ import app as study
from steer.cli.app import app
from tests.servers import ROOT, Server

README = (ROOT / "README.md").read_text()
#: What is typed on these pages is run here, against the demo server of a newcomer; `test_docs` has the other pages.
NAMES = ("README.md", "docs/tutorial.md", "docs/requests.md", "docs/directions.md")
PAGES = {name: (ROOT / name).read_text() for name in NAMES}
#: Options of curl, pip, docker, vLLM and the benchmarks.
OF_OTHERS = {
    *("--additional-config", "--allowed-origins", "--api-key", "--api-server-count", "--data-binary"),
    *("--extra-index-url", "--gpus", "--ipc", "--max-model-len", "--middleware", "--no-cache-dir", "--no-deps"),
    *("--otlp-traces-endpoint", "--plain", "--root-path", "--shutdown-timeout", "--ssl-certfile"),
    *("--ssl-keyfile", "--tensor-parallel-size", "--value", "--worker-cls", "--worker-urls", "--data-parallel-size"),
    *("--data-parallel-multi-port-external-lb", "--data-parallel-hybrid-lb", "--api-servers", "--lives", "--minutes"),
    *("--only", "--again", "--quick", "--suite", "--rounds", "--busy", "--enforce-eager", "--max-num-seqs"),
    *("--enable-prompt-embeds", "--allowed-media-domains", "--enable-lora", "--speculative-config", "--max-logprobs"),
}
#: Of each file, where commands run on a copy of the tree.
PROMPTS = 8
ADDRESS = "http://127.0.0.1:8000"
#: A block of `text` right after a command is what the command prints.
BLOCK = re.compile(r"```(sh|python)\n(.*?)```(?:\n\n```text\n(.*?)```)?", re.DOTALL)


def blocks_of(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page, flags=re.DOTALL)


def typed_blocks() -> list[Any]:
    """Language, block and output of each, once and in the order of a reader, but for the two commands of the start."""
    found: dict[tuple[str, str, str], str] = {}
    for name, page in PAGES.items():
        for number, block in enumerate(BLOCK.findall(page)):
            found.setdefault(block, f"{Path(name).stem}-{number}")
    return [pytest.param(*block, id=name) for block, name in list(found.items())[1:]]


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
    done = subprocess.run(command, cwd=tree, env=environment(server), capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_the_two_commands_are_targets() -> None:
    first, *_ = blocks_of(README, "sh")
    makefile = (ROOT / "Makefile").read_text()
    commands = re.findall(r"^make (\w+)", first, flags=re.MULTILINE)
    assert commands == ["serve", "test"]
    for command in [*commands, *re.findall(r"`make (\w+)`", README)]:
        assert re.search(rf"^{command}:", makefile, flags=re.MULTILINE), command


@pytest.mark.parametrize(("language", "block", "shown"), typed_blocks())
def test_what_is_typed_runs_and_prints_what_is_shown(
    language: str, block: str, shown: str, server: Server, tree: Path
) -> None:
    out = run(block, language, server, tree).replace("\r", "")
    assert "error" not in out.lower() or '"errors":[]' in out
    if shown:
        assert out == shown


def test_each_output_on_the_first_pages_is_that_of_a_command() -> None:
    for name in NAMES[:2]:
        outputs = [shown for _, _, shown in BLOCK.findall(PAGES[name]) if shown]
        assert outputs == blocks_of(PAGES[name], "text") != [], name


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
        timeout=1500,
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
