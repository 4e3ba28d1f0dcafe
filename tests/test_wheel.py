"""The wheel has the demo model in it and runs outside of the repository."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from steer._version import __version__
from tests.release import main_job
from tests.servers import ROOT


def test_one_version_is_named_everywhere() -> None:
    cited = re.search(r"^version: (.*)\ndate-released: (.*)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    newest = re.search(r"^## \[(\d.*)\] - (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert cited
    assert newest
    assert cited.groups() == newest.groups()
    assert cited[1] == __version__


def test_the_wheel_serves_the_demo_model_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "--quiet",
            "--no-deps",
            "--no-build-isolation",
            "-w",
            str(tmp_path),
            str(ROOT),
        ],
        check=True,
        timeout=1500,
    )
    (wheel,) = tmp_path.glob("steer_llm-*.whl")
    installed = tmp_path / "installed"
    zipfile.ZipFile(wheel).extractall(installed)
    assert (installed / "steer" / "demo" / "model" / "model.safetensors").exists()
    assert (installed / "steer" / "py.typed").exists()
    folders = {path.name for path in installed.iterdir() if path.is_dir() and path.suffix != ".dist-info"}
    assert folders == {"steer"}
    (about,) = installed.glob("*.dist-info")
    assert "License-Expression: Apache-2.0" in (about / "METADATA").read_text()
    assert list(about.rglob("LICENSE"))
    program = "import steer, sys; from steer.cli import main; print(steer.__file__); sys.argv[0] = 'steer'; main()"
    monkeypatch.setenv("PYTHONPATH", str(installed))
    assert str(installed) in main_job([sys.executable, "-c", program, "serve"], tmp_path)


def test_a_clone_named_steer_does_not_shadow_an_editable_install(tmp_path: Path) -> None:
    """Its files are a path entry, and of path entries one with a package goes before a folder of that name."""
    program = f"from setuptools import build_meta; print(build_meta.build_editable({str(tmp_path)!r}))"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, timeout=1500, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as packed:
        (entry,) = [name for name in packed.namelist() if name.endswith((".pth", ".py"))]
        assert packed.read(entry).decode().strip() == str(ROOT)
    (tmp_path / "steer").mkdir()
    where = [sys.executable, "-c", f"import sys; sys.path.append({str(ROOT)!r}); import steer; print(steer.__file__)"]
    found = subprocess.run(where, cwd=tmp_path, check=True, timeout=1500, capture_output=True, text=True).stdout.strip()
    assert Path(found) == ROOT / "steer" / "__init__.py"
