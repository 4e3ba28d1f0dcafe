"""The wheel has the demo model in it and runs outside of the repository."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

from tests.servers import ROOT, Server, text


def test_the_wheel_serves_the_demo_model_from_anywhere(tmp_path: Path) -> None:
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
        timeout=300,
    )
    (wheel,) = tmp_path.glob("steer_llm-*.whl")
    installed = tmp_path / "installed"
    zipfile.ZipFile(wheel).extractall(installed)
    assert (installed / "steer" / "demo" / "model" / "model.safetensors").exists()
    assert (installed / "steer" / "py.typed").exists()
    assert not (installed / "tests").exists()
    folder = tmp_path / "directions"
    folder.mkdir()
    program = "import steer, sys; from steer.cli import main; print(steer.__file__); sys.argv[0] = 'steer'; main()"
    command = [sys.executable, "-c", program, "serve"]
    os.environ["PYTHONPATH"] = str(installed)
    try:
        with Server("--directions", str(folder), command=command, cwd=tmp_path) as server:
            assert str(installed) in server.log
            assert server.model_name == "demo"
            assert text(server.chat("Hello!"))
            assert "playground/app.js" in server.client.get("/").text
    finally:
        del os.environ["PYTHONPATH"]
