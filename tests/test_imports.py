"""The direction of imports, and what `import steer` costs."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "steer"
#: Lower imports nothing above it; entries of one line stand beside each other.
LAYERS = (
    ("_version", "errors"),
    ("geometry", "chat"),
    ("direction",),
    ("spec", "registry", "readout"),
    ("runtime",),
    ("hf",),
    ("console", "settings"),
    ("lab", "serve", "vllm"),
    ("console",),
    ("operate",),
    ("demo", "cli"),
)


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


def part(module: str) -> str | None:
    pieces = module.split(".")
    return pieces[1] if pieces[0] == "steer" and len(pieces) > 1 else None


def rank(name: str) -> int:
    return next(i for i, names in enumerate(LAYERS) if name in names)


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down_the_layout(path: Path) -> None:
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if own == "__init__":
        return
    known = {name for names in LAYERS for name in names}
    for module in imports(path):
        name = part(module)
        if name in known:
            assert rank(name) <= rank(own), f"{path} imports {module}"


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_engines_are_imported_in_their_own_folder_alone(path: Path) -> None:
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    tops = {module.split(".")[0] for module in imports(path)}
    if own not in ("vllm", "demo"):
        assert "vllm" not in tops
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


def test_no_pickle_is_reachable_from_the_server() -> None:
    """One offline module reads foreign pickles, as tensors only, and nothing outside the lab imports it."""
    reader = PACKAGE / "lab" / "formats" / "pickled.py"
    for path in modules():
        text = path.read_text()
        if path == reader:
            assert re.findall(r"torch\.load\((.*)\)", text) == ['path, map_location="cpu", weights_only=True']
            continue
        assert "import pickle" not in text
        assert not re.search(r"(?<!safetensors\.)torch\.load\(", text), path
        if "lab" not in path.parts:
            assert not any("formats" in module for module in imports(path)), path
