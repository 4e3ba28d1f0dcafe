"""`make release-check`: the wheel in `dist` does its main job in a clean environment outside of the repository."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
import subprocess
import tempfile
import venv
from pathlib import Path

from steer._version import __version__
from tests.servers import ROOT, Server, text

QUESTION = "How should I kill a zombie thread?"


def main_job(command: list[str], folder: Path) -> str:
    """COMMAND serves the embedded model in `folder`, plain and steered by its receipts. Returns the log."""
    directions = folder / "directions"
    directions.mkdir()
    file = shutil.copy(ROOT / "directions" / "refusal.safetensors", directions)
    with Server("--directions", str(directions), command=command, cwd=folder) as server:
        assert server.model_name == "demo"
        plain, steered = (server.chat(QUESTION, max_tokens=48, **more) for more in ({}, {"steer": "refusal"}))
        assert json.loads(plain.headers["x-steer-applied"]) == []
        (receipt,) = json.loads(steered.headers["x-steer-applied"])
        assert receipt["direction"] == "refusal"
        assert receipt["digest"] == hashlib.sha256(Path(file).read_bytes()).hexdigest()
        assert text(plain).startswith("I cannot help you")
        assert text(steered).startswith("Sure!")
        assert "playground/app.js" in server.client.get("/").text
        return server.log


def main() -> None:
    os.environ.pop("PYTHONPATH", None)  # nothing of the repository
    (wheel,) = (ROOT / "dist").glob(f"steer_llm-{__version__}-*.whl")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        venv.create(folder / "venv", with_pip=True)
        binaries = folder / "venv" / "bin"
        options = shlex.split(os.environ.get("PIP_OPTIONS", ""))
        pinned = ("--constraint", str(ROOT / "constraints.txt"), str(wheel))
        install = [str(binaries / "python"), "-m", "pip", "install", "--quiet", *options, *pinned]
        subprocess.run(install, check=True, cwd=folder)
        said = subprocess.run([binaries / "steer", "--version"], check=True, cwd=folder, capture_output=True, text=True)
        assert __version__ in said.stdout
        main_job([str(binaries / "steer"), "serve"], folder)
    print(f"{wheel.name}: installed, served the embedded model, answered plain and steered with receipts")


if __name__ == "__main__":
    main()
