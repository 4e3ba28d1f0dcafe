"""What imports cost, and what the contracts of `.importlinter` (`make lint`) cannot say."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "steer"


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def imports(path: Path, top_only: bool = False) -> set[str]:
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_only else list(ast.walk(tree))
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_transformers_is_imported_where_models_are_run(path: Path) -> None:
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    tops = {module.split(".")[0] for module in imports(path)}
    if own not in ("hf", "vllm", "demo", "console", "cli"):
        assert "transformers" not in tops


def test_the_mathematics_imports_torch_and_nothing_else() -> None:
    for name in ("geometry.py", "runtime/op.py"):
        tops = {module.split(".")[0] for module in imports(PACKAGE / name)} - {"__future__", "steer", "math"}
        assert tops == {"torch"}, name


def test_import_steer_loads_no_engine() -> None:
    program = "import sys, steer; print([m for m in ('vllm', 'transformers', 'fastapi') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_what_every_process_of_vllm_imports_loads_no_web_framework() -> None:
    """vLLM loads its plugins in each engine core and worker, also where nothing is steered."""
    program = "import sys, steer.vllm.plugin; print([m for m in ('vllm', 'fastapi', 'starlette') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_no_module_needs_itself_by_any_way() -> None:
    """Not by imports in functions or for types alone either: what is below can be read without what is above."""
    files = {".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts): path for path in modules()}
    known = {name.removesuffix(".__init__"): path for name, path in files.items()}

    def module_of(name: str) -> str:
        return name if name in known else module_of(name.rpartition(".")[0])

    needs = {
        module: {module_of(name) for name in imports(path) if name.split(".")[0] == "steer"} - {module}
        for module, path in known.items()
    }
    graphlib.TopologicalSorter(needs).prepare()  # raises CycleError
