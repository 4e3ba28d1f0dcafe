"""What imports cost, and what the contracts of `.importlinter` (`make lint`) cannot say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from docs.sizes import cycles, imports, tree
from tests.servers import ROOT

PACKAGE = ROOT / "steer"


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_transformers_is_imported_where_models_are_run(path: Path) -> None:
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    tops = {module.split(".")[0] for module in imports(path.read_text())}
    if own not in ("hf", "vllm", "demo", "console", "cli"):
        assert "transformers" not in tops


def test_the_mathematics_imports_torch_and_nothing_else() -> None:
    for name in ("geometry.py", "runtime/op.py"):
        tops = {module.split(".")[0] for module in imports((PACKAGE / name).read_text())} - {
            "__future__",
            "steer",
            "math",
        }
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
    assert cycles(tree()) == []


def test_a_cycle_is_found_by_any_way() -> None:
    modules = {"a": "def f():\n    import b.c", "b": "from a import f", "b.c": "", "d": "import b"}
    assert cycles(modules) == []
    assert cycles(modules | {"b.c": "import b"}) == [{"a", "b", "b.c"}]
