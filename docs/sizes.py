"""`python -m docs.sizes [REVISION]`: how large the package is, as docs/architecture.md says it, now or at a commit."""

from __future__ import annotations

import ast
import io
import subprocess
import sys
import tarfile
from collections.abc import Iterator, Mapping

import numpy as np
from scipy.sparse.csgraph import connected_components

from tests.servers import ROOT


def tree() -> dict[str, str]:
    """The text of each module of the package, by its dotted name."""
    return dict(_named((str(path.relative_to(ROOT)), path.read_text()) for path in (ROOT / "steer").rglob("*.py")))


def at(revision: str) -> dict[str, str]:
    """The same at a commit."""
    packed = subprocess.run(["git", "archive", revision, "steer"], cwd=ROOT, capture_output=True, check=True).stdout
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        files = {member.name: archive.extractfile(member) for member in archive if member.name.endswith(".py")}
        return dict(_named((name, file.read().decode()) for name, file in files.items() if file))


def _named(files: Iterator[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    for name, text in files:
        yield name.removesuffix(".py").removesuffix("/__init__").replace("/", "."), text


def imports(text: str) -> set[str]:
    """Every name that a module imports, in functions and for types alone too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def cycles(modules: Mapping[str, str]) -> list[set[str]]:
    """Sets of modules that need each other, whatever the way."""
    names = list(modules)
    needs = np.zeros((len(names), len(names)), dtype=bool)
    for number, text in enumerate(modules.values()):
        for name in imports(text):
            while name and name not in modules:
                name = name.rpartition(".")[0]
            if name and name != names[number]:
                needs[number, names.index(name)] = True
    _, labels = connected_components(needs, connection="strong")
    groups = ({name for name, label in zip(names, labels, strict=True) if label == one} for one in set(labels))
    return [group for group in groups if len(group) > 1]


def code_lines(text: str) -> int:
    """How many lines of a module are neither blank nor a comment nor part of a docstring."""
    lines = text.splitlines()
    for node in ast.walk(ast.parse(text)):
        match node:
            case ast.Module() | ast.ClassDef() | ast.FunctionDef() | ast.AsyncFunctionDef() if ast.get_docstring(node):
                docstring = slice(node.body[0].lineno - 1, node.body[0].end_lineno)
                lines[docstring] = [""] * len(lines[docstring])
    return sum(bool(line.strip()) and not line.strip().startswith("#") for line in lines)


def row(name: str, modules: Mapping[str, str]) -> str:
    lines = sum(len(text.splitlines()) for text in modules.values())
    code = sum(map(code_lines, modules.values()))
    classes = sum(isinstance(node, ast.ClassDef) for text in modules.values() for node in ast.walk(ast.parse(text)))
    return f"| {name} | {len(modules)} | {lines:,} | {code:,} | {classes} | {len(cycles(modules))} |"


if __name__ == "__main__":
    revisions = sys.argv[1:]
    print(
        "| package `steer` | files | lines | of these code | classes | import cycles |\n|---|---:|---:|---:|---:|---:|"
    )
    print("\n".join(row(revision, at(revision)) for revision in revisions) if revisions else row("now", tree()))
