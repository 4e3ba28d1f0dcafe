"""What users name as a file, and is none: nothing waits for it, and the message says what is wrong in plain words."""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save
from typer.testing import CliRunner, Result

from steer.cli.app import app
from steer.direction import Direction
from steer.errors import InvalidInput, UnsupportedModel
from steer.lab.measurement import load_tensors
from steer.lab.merge.weights import Checkpoint

WHOLE = save({"a": torch.zeros(3)})


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(each) for each in arguments])


@pytest.mark.parametrize(
    "command",
    [
        "inspect {}",
        "measure m --harmful {} --harmless {} -o x.safetensors",
        "fit m --harmful {} --harmless {} -o {}",
        "fit m --harmful {} --harmless {} -o x.safetensors --behaviour {}",
        "fit m --harmful {} --harmless {} -o x.safetensors --chat-template {}",
        "classify {}",
        "derive {} -o x.safetensors",
        "derive {} -o {}",
        "convert {} x.pt",
        "bake m --direction {} -o x",
        "push {} someone/name",
        "audit verify {}",
        "keys list --policy {}",
        "serve --policy {}",
    ],
)
@pytest.mark.parametrize("suffix", [".safetensors", ".gguf", ".pt", ".jsonl"])
def test_no_command_waits_for_a_pipe_that_nobody_writes_to(
    command: str, suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo(tmp_path / f"fifo{suffix}")
    done: list[Result] = []
    given = command.format(*[f"fifo{suffix}"] * 3).split()
    waiting = threading.Thread(target=lambda: done.append(run(*given)), daemon=True)
    waiting.start()
    waiting.join(120)
    assert done, "it waits"
    assert done[0].exit_code == 2, done[0].exception
    assert done[0].stderr.startswith("error: ")


def test_answers_may_come_from_a_pipe_of_the_shell() -> None:
    """A slow writer is waited for."""
    with subprocess.Popen(["sh", "-c", "sleep 0.3; echo '\"Sure.\"'"], stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        done = run("classify", f"/dev/fd/{writer.stdout.fileno()}")
    assert done.exit_code == 0, done.stderr
    assert '"answer": "Sure."' in done.stdout
    assert "/dev/zero: cannot be read: it is not a regular file" in run("classify", "/dev/zero").stderr


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "or cut short: it has 0 bytes, and a header begins with 8 bytes"),
        (b"not a header " * 9, "or cut short: it has 117 bytes, and its first 8 bytes announce a header of"),
        (WHOLE[:20], "or cut short: it has 20 bytes, and its first 8 bytes announce a header of"),
        (WHOLE[:-1], "its tensors do not fill it: it was cut short, or has more behind them"),
        (WHOLE + b"more", "its tensors do not fill it: it was cut short, or has more behind them"),
        (bytes(64), "invalid JSON in header"),
    ],
)
def test_a_damaged_safetensors_file_is_told_in_words(data: bytes, says: str, tmp_path: Path) -> None:
    """By every reader: of directions, of measurements and of models."""
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(data)
    readers: list[Callable[[Path], object]] = [load_tensors, Direction.load, lambda path: Checkpoint(path.parent)]
    for reader in readers:
        with pytest.raises((InvalidInput, UnsupportedModel)) as raised:
            reader(tmp_path / "model.safetensors")
        message = str(raised.value)
        assert "not a safetensors file" in message
        assert says in message
        assert "eserializing" not in message
