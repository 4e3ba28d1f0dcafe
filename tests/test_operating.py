"""The page for operators: its policy is one, its commands run, and what it names is there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from steer.serve import policy
from steer.serve.access import ORDINARY
from steer.serve.policy import KeyRules, Policy
from tests.servers import ROOT
from tests.test_readme import blocks_of

PAGE = (ROOT / "docs" / "operating.md").read_text()


def test_the_example_is_a_policy_that_says_everything_there_is_to_say() -> None:
    [text] = blocks_of(PAGE, "toml")
    found = policy.read(text.encode())
    said = found.model_fields_set | {name for rules in found.keys.values() for name in rules.model_fields_set}
    said |= {name for rules in found.directions.values() for name in rules.model_fields_set}
    assert said == {*Policy.model_fields, *KeyRules.model_fields}


def test_the_commands_for_keys_run(tmp_path: Path) -> None:
    block = next(block for block in blocks_of(PAGE, "sh") if "steer keys new" in block)
    text = block.replace("steer keys", f"{sys.executable} -m steer keys")
    done = subprocess.run(["bash", "-euc", text], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("sk-steer-") == 2
    found = policy.load(tmp_path / "policy.toml").keys
    assert (found["alice"].directions, found["boss"].manage) == (("refusal",), True)


@pytest.mark.parametrize("method", ORDINARY)
def test_the_paths_that_it_names_are_those_that_a_key_reaches(method: str) -> None:
    start = PAGE.index("Any key reaches")
    named = PAGE[start : PAGE.index("Everything else", start)]
    get, post = named.split("`POST`")
    paths = re.findall(r"`(/[^`]+)`", get if method == "GET" else post)
    assert len(paths) > 5
    assert all(ORDINARY[method].fullmatch(path) for path in paths)
