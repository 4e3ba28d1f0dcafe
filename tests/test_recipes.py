"""The recipes of docs/architecture.md ("Where a new … goes"), followed to the letter in a copy of the package."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from steer.hf.load import load
from steer.lab.measure import MeasurementOptions, measure
from steer.lab.source import TransformersSource
from tests.lab.test_measure import HARMFUL, HARMLESS
from tests.servers import ROOT

METHOD = '''
class Halfway(Method):
    """The harmful mean, less half of the harmless one.

    Source: none. Pitfalls: it is an example.
    """

    def rows(self, contrast: Contrast) -> Tensor:
        return unit(contrast.harmful.mean - contrast.harmless.mean / 2).unsqueeze(0)
'''
#: What each recipe writes: file, the text before which it goes, and what goes there (None: the end of the file).
RECIPES: dict[str, list[tuple[str, str | None, str]]] = {
    "method": [
        ("steer/lab/methods/means.py", None, METHOD),
        ("steer/lab/methods/__init__.py", '    "linear": "means.Linear",\n', '    "halfway": "means.Halfway",\n'),
    ],
    "mode": [
        (
            "steer/runtime/op.py",
            '        case "affine":\n',
            '        case "reflect":\n            out[..., WEIGHT] = 2 * weights\n',
        ),
        ("steer/names.py", ', "one_sided", "rotate"', ', "reflect"'),
        ("steer/lab/derive.py", '        "one_sided": reference,\n', '        "reflect": True,\n'),
        ("steer/names.py", '    "one_sided": "', '    "reflect": "The component changes its sign.",\n'),
        (
            "steer/names.py",
            '    "one_sided": {"low"',
            '    "reflect": {"low": 0, "high": 1, "means": "1 is the same length on the other side."},\n',
        ),
    ],
}
#: What a user does then, in a process that imports the copy.
USED = """
import json, sys
from pathlib import Path
from fastapi.testclient import TestClient
from typer.testing import CliRunner
from steer.cli.app import app

def run(*arguments):
    done = CliRunner().invoke(app, arguments, env={"COLUMNS": "120"})
    assert done.exit_code == 0, done.output
    return done.stdout

model, measurement, output = sys.argv[1:]
told = {"file": __import__("steer").__file__, "help": run("derive", "--help"), "methods": run("methods", "halfway")}
run("derive", measurement, "--method", "halfway", "--mode", "reflect", "-o", output)
from steer.serve.app import build
from steer.serve.app import prepare
from steer.settings import ServeSettings
served = prepare(model, ServeSettings(directions=Path(output).parent, port=0))
with TestClient(build(served), base_url="http://localhost") as client:
    body = {"model": served.model_name, "prompt": "abc", "max_tokens": 2, "temperature": 0}
    asked = {"steer": "new:reflect=1", "steer_readout": {"layers": [0]}}
    answer = client.post("/v1/completions", json=body | asked)
    assert answer.status_code == 200, answer.text
    told |= {
        "receipt": json.loads(answer.headers["x-steer-applied"]),
        "read": answer.json()["choices"][0]["steer_readout"]["directions"][0],
        "modes": client.get("/v1/steering").json()["modes"],
        "scales": client.get("/v1/steering").json()["scales"],
    }
served.control.stop()
print(json.dumps(told))
"""


def where(new: str) -> str:
    """The recipe's cell of the table."""
    page = (ROOT / "docs/architecture.md").read_text("utf-8")
    found = re.search(rf"^\| {new} \| (.*?) \|", page, re.MULTILINE)
    assert found, new
    return found[1]


@pytest.mark.parametrize("new", RECIPES)
def test_a_recipe_names_the_files_that_it_changes_and_no_others(new: str) -> None:
    named = set(re.findall(r"`(steer/[^`]*)`", where(new)))
    changed = {file for file, _, _ in RECIPES[new]}
    assert all(any(file == one or (one.endswith("/") and file.startswith(one)) for one in named) for file in changed)
    assert all(one.endswith("/") or one in changed for one in named)


def test_what_the_recipes_make_is_listed_derived_and_served(tiny_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "steer", tmp_path / "steer", ignore=shutil.ignore_patterns("model"))
    for file, before, text in (change for changes in RECIPES.values() for change in changes):
        path = tmp_path / file
        source = path.read_text("utf-8")
        if before is None:
            path.write_text(source + "\n" + text, "utf-8")
        else:
            assert source.count(before) == 1, (file, before)
            path.write_text(source.replace(before, text + before), "utf-8")
    measured, output = tmp_path / "m.safetensors", tmp_path / "directions/new.safetensors"
    output.parent.mkdir()
    measure(TransformersSource(load(str(tiny_folder))), HARMFUL, HARMLESS, MeasurementOptions((-1,))).save(measured)
    done = subprocess.run(
        [sys.executable, "-c", USED, str(tiny_folder), str(measured), str(output)],
        env=os.environ | {"PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert done.returncode == 0, done.stderr
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert told["file"] == str(tmp_path / "steer/__init__.py")
    assert "halfway: The harmful mean, less half of the harmless one." in " ".join(told["help"].split())
    assert "clamp|reflect|one_sided" in " ".join(told["help"].split())
    assert "Pitfalls: it is an example." in told["methods"]
    assert told["modes"]["reflect"] == "The component changes its sign."
    assert set(told["scales"]) == set(told["modes"])
    (entry,) = told["receipt"]
    assert (entry["direction"], entry["mode"], entry["strength"]) == ("new", "reflect", 1.0)
    for before, after in zip(told["read"]["before"], told["read"]["after"], strict=True):
        assert after == pytest.approx([-component for component in before], rel=1e-3)
