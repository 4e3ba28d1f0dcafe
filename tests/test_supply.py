"""Nothing that a server reads is ever executed: no way from it to pickle or `eval`, and files that try get nowhere."""

from __future__ import annotations

import ast
import io
import json
import pickle
import re
import tomllib
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from packaging.requirements import Requirement
from packaging.version import Version
from typer.main import get_command

from steer.cli.app import app
from steer.direction import Direction
from steer.errors import DirectionError
from tests import clients, models
from tests.servers import Server

PACKAGE = Path(__file__).parents[1] / "steer"
#: Where bytes of others come in while a server runs.
ROOTS = ("serve", "vllm", "hf", "runtime", "registry", "direction", "spec", "readout", "settings")
#: Modules that execute what they read.
EXECUTING = {"pickle", "_pickle", "cPickle", "dill", "joblib", "cloudpickle", "marshal", "shelve", "runpy", "code"}
#: The one offline reader of foreign pickles, as tensors only.
READER = "steer.lab.formats.foreign"


def file_of(module: str) -> Path | None:
    path = PACKAGE.parent.joinpath(*module.split("."))
    return next((p for p in (path / "__init__.py", path.with_suffix(".py")) if p.exists()), None)


def imported(tree: ast.AST) -> set[str]:
    """Every module that a source names, lazy imports too."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def reachable() -> dict[str, ast.Module]:
    """Modules of ours that a server can come to import, but for the commands of the lab, which no server runs."""
    assert all(file_of(f"steer.{root}") for root in ROOTS)
    paths = [p for root in ROOTS for p in (PACKAGE / root).rglob("*.py")]
    paths += [p for root in ROOTS if (p := PACKAGE / f"{root}.py").exists()]
    waiting = [".".join(p.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__") for p in paths]
    found: dict[str, ast.Module] = {}
    while waiting:
        module = waiting.pop()
        path = file_of(module)
        if module in found or path is None or not module.startswith("steer"):
            continue
        found[module] = ast.parse(path.read_text())
        waiting += imported(found[module])
    return found


def test_no_server_path_leads_to_what_executes_data() -> None:
    modules = reachable()
    assert {"steer.serve.app", "steer.vllm.worker", "steer.hf.batching", "steer.registry"} <= modules.keys()
    assert READER not in modules
    for name, tree in modules.items():
        tops = {module.split(".")[0] for module in imported(tree)}
        assert not tops & EXECUTING, name
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            assert called not in ("eval", "exec", "compile", "__import__", "torch.load", "np.load", "numpy.load"), (
                f"{name}:{node.lineno} calls {called}"
            )


def test_the_one_reader_of_pickles_reads_tensors_only() -> None:
    for path in PACKAGE.rglob("*.py"):
        calls = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
        loads = [n for n in calls if ast.unparse(n.func) == "torch.load"]
        if path == file_of(READER):
            keywords = [ast.unparse(k) for n in loads for k in n.keywords]
            assert [k for k in keywords if k.startswith("weights_only")] == ["weights_only=True"]
        else:
            assert not loads, path


class Trap:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def traps(sprung: Path) -> dict[str, bytes]:
    good = models.direction(models.tiny("llama"), seed=5)
    pickled = pickle.dumps(Trap(sprung))
    zipped = io.BytesIO()
    torch.save({"directions": good.directions, "trap": Trap(sprung)}, zipped)
    meta = {"format": "pt", "steer": good.meta.model_dump_json()}
    inside = good.meta.model_dump(mode="json") | {"selection": {"__reduce__": pickled.decode("latin-1")}}
    data = good.to_bytes()
    return {
        "pickle": pickled,
        "zip": zipped.getvalue(),
        "pickle in the metadata": safetensors.torch.save(good.tensors(), meta | {"pickle": pickled.decode("latin-1")}),
        "pickle as metadata": safetensors.torch.save(good.tensors(), {"steer": pickled.decode("latin-1")}),
        "pickle in a field": safetensors.torch.save(good.tensors(), {"steer": json.dumps(inside)}),
        "pickle behind": data + pickled,
        "pickle before": pickled + data,
    }


@pytest.mark.parametrize("way", ["put", "file"])
def test_what_tries_to_be_executed_is_not(tiny_server: Server, way: str, tmp_path: Path) -> None:
    sprung = tmp_path / "sprung"
    for name, data in traps(sprung).items():
        if way == "put":
            status = tiny_server.client.put("/v1/directions/trap", content=data).status_code
            # metadata of any text is only ever text
            assert status == (200 if name in ("pickle in the metadata", "pickle in a field") else 400), name
        else:
            path = tmp_path / "trap.safetensors"
            path.write_bytes(data)
            with suppress(DirectionError):
                Direction.load(path)
    assert not sprung.exists()
    tiny_server.client.delete("/v1/directions/trap")
    pickle.loads(pickle.dumps(Trap(sprung)))
    assert sprung.exists(), "the trap would have worked"


@pytest.mark.parametrize("name", ["torch", "transformers"])
def test_what_was_run_is_what_is_let_in(name: str) -> None:
    """From the version of `make test` up to the newest that the documentation says was run, and no further."""
    root = PACKAGE.parent
    required = map(Requirement, tomllib.loads((root / "pyproject.toml").read_text())["project"]["dependencies"])
    (allowed,) = (r.specifier for r in required if r.name == name)
    pins = [Requirement(line) for line in (root / "constraints.txt").read_text().splitlines() if line[0] != "#"]
    ((pinned,),) = (r.specifier for r in pins if r.name == name)
    said = re.findall(rf"{name}\s(\d+\.\d+)\.\d+", (root / "docs/backends.md").read_text())
    newest = max(map(Version, said))
    oldest = Version(pinned.version)
    assert {str(bound) for bound in allowed} == {
        f">={oldest.major}.{oldest.minor}",
        f"<{newest.major}.{newest.minor + 1}",
    }


def test_one_range_of_vllm_is_named_everywhere() -> None:
    """What the extra lets in is what the code takes and the documentation promises."""
    root = PACKAGE.parent
    tree = ast.parse((PACKAGE / "vllm" / "internals" / "base.py").read_text())
    constants = {
        ast.unparse(node.targets[0]): ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "SUPPORTED"
    }
    oldest, newest = constants["SUPPORTED"]
    major, minor, _ = map(int, newest.split("."))
    (extra,) = tomllib.loads((root / "pyproject.toml").read_text())["project"]["optional-dependencies"]["vllm"]
    allowed = Requirement(extra).specifier
    assert {str(bound) for bound in allowed} == {f">={oldest.removesuffix('.0')}", f"<{major}.{minor + 1}"}
    assert f"vLLM {oldest} and {newest}" in " ".join((root / "docs/backends.md").read_text().split())
    assert f"\nFROM vllm/vllm-openai:v{newest}\n" in (root / "Dockerfile").read_text()
    assert f"\nvllm-cpu=={newest}\n" in (root / "constraints.txt").read_text(), "the one of `make test`"


def test_the_image_runs_our_command_as_nobody_special() -> None:
    """Without a builder: its recipe has a base in one version, our wheel and nothing else of the tree, no variable that
    could hold a secret, a user by number, and a command that exists."""
    root = PACKAGE.parent
    lines = re.sub(r"\\\n", " ", re.sub(r"(?m)^#.*\n", "", (root / "Dockerfile").read_text())).splitlines()
    steps = [(name, rest) for name, _, rest in (line.partition(" ") for line in lines if line)]
    assert [name for name, _ in steps] == ["FROM", "COPY", "RUN", "USER", "EXPOSE", "ENTRYPOINT"]
    given = dict(steps)
    assert re.fullmatch(r"[\w/-]+:v\d+\.\d+\.\d+", given["FROM"])
    assert given["COPY"].split()[0] == "dist/*.whl"
    assert (root / ".dockerignore").read_text().split() == ["*", "!dist/*.whl"]
    assert int(given["USER"]) > 0
    assert f"useradd --create-home --uid {given['USER']} " in given["RUN"]
    script, command = json.loads(given["ENTRYPOINT"])
    assert script in tomllib.loads((root / "pyproject.toml").read_text())["project"]["scripts"]
    assert command in get_command(app).commands  # type: ignore[attr-defined]  # a group, since there are several


def test_the_clients_are_those_of_the_page_in_one_version_each() -> None:
    lines = (PACKAGE.parent / "requirements-clients.txt").read_text().splitlines()
    pinned = [Requirement(line) for line in lines if line[0] != "#"]
    assert all([bound.operator for bound in one.specifier] == ["=="] for one in pinned)
    names = [one.name.lower().replace("_", "-") for one in pinned]
    assert len(names) == len(set(names))
    assert {client.removesuffix("-responses") for client in clients.SECTIONS} <= set(names)
