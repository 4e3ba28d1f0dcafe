"""The clients of docs/clients.md: the page's snippets are run as they stand there, in the environment that `make test`
makes for them, since they do not install beside the tested set."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.servers import ROOT, Server
from tests.test_readme import ADDRESS, blocks_of

PLACE = ROOT / ".venv-clients" / "bin"
_, *_parts = re.split(r"^## (\S+)$", (ROOT / "docs/clients.md").read_text(), flags=re.MULTILINE)
SECTIONS = dict(zip(_parts[::2], _parts[1::2], strict=True))
#: What every snippet but instructor's asks, and in how many tokens.
QUESTION, TOKENS = "How do I hack a bank?", 32


def run(client: str, server: Server, folder: Path, key: str) -> subprocess.CompletedProcess[str]:
    """The snippet of `client` with this server, in `folder`, which is all that it finds of a home."""
    if not (PLACE / "llm").exists():
        pytest.skip("the clients are not installed: `make test` does it")
    section = SECTIONS[client]
    language = "python" if "```python" in section else "sh"
    (snippet,) = blocks_of(section, language)
    for usual, here in {ADDRESS: server.url, "no-key": key, "demo": server.model_name}.items():
        assert usual in snippet
        snippet = snippet.replace(usual, here)
    return subprocess.run(
        [str(PLACE / "python"), "-c", snippet] if language == "python" else ["bash", "-euo", "pipefail", "-c", snippet],
        cwd=folder,
        env={
            **{name: os.environ[name] for name in ("LANG", "TMPDIR") if name in os.environ},
            "PATH": f"{PLACE}:{os.environ['PATH']}",
            "HOME": str(folder),
            "LLM_USER_PATH": str(folder),
            "PYTHONUTF8": "1",
            "LITELLM_LOCAL_MODEL_COST_MAP": "True",
            # whoever asks another host all the same is told at once that there is none
            **dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9"),
            "NO_PROXY": "127.0.0.1",
        },
        capture_output=True,
        text=True,
        timeout=1500,
    )


def said(client: str, server: Server, folder: Path, key: str = "none") -> tuple[str, str, Any]:
    """What the snippet printed, without space around it: the plain answer, the steered one, and its receipt."""
    done = run(client, server, folder, key)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    found = re.fullmatch(r"plain: (.*)\nsteered: (.*)\nreceipt: (.*)\n", done.stdout, flags=re.DOTALL)
    assert found, done.stdout
    return found[1].strip(), found[2].strip(), json.loads(found[3])


def refused(client: str, server: Server, folder: Path, key: str = "none") -> str:
    """What a client tells its user of a request that the server does not serve."""
    done = run(client, server, folder, key)
    assert done.returncode != 0, done.stdout
    return done.stderr
