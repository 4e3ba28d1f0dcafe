"""The repository that is pushed: the file byte for byte, and a card whose front matter the hub's own library reads."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from steer.direction import Dataset, Direction, FoundCondition, digest
from steer.errors import DirectionError, InvalidInput, SteerError
from steer.lab import hub
from tests import models
from tests.lab import hubs


@pytest.fixture
def file(tmp_path: Path) -> Path:
    made = models.direction(models.tiny("llama")).with_meta(
        model="someone/model",
        system_prompt="a | b\nc",
        harmful=(refused := Dataset(name="refused.txt", sha256="0" * 64, count=12)),
        condition=FoundCondition(layer=1, above=0.3, harmful=refused, harmless=refused, missed=2, caught=1),
    )
    made.save(tmp_path / "refusal.safetensors")
    return tmp_path / "refusal.safetensors"


def test_what_is_assembled_is_the_file_and_its_card(file: Path, tmp_path: Path) -> None:
    folder = hub.assemble(file, tmp_path / "repo")
    assert {p.name for p in folder.iterdir()} == {"README.md", "refusal.safetensors"}
    assert (folder / "refusal.safetensors").read_bytes() == file.read_bytes()
    Direction.load(folder / "refusal.safetensors")
    card = ModelCard.load(folder / "README.md")
    assert card.data.base_model == "someone/model"
    assert card.data.to_dict()["library_name"] == "steer"
    for part in (digest(file.read_bytes()), "refused.txt, 12 prompts", "LlamaForCausalLM", "a \\| b c"):
        assert part in card.text
    assert "`refusal?refusal@1>0.3`: 2 of 12 of refused.txt do not meet it, 1 of 12 of refused.txt do" in card.text
    assert "None" not in card.text
    assert "weights of" not in card.text


def test_the_card_tells_weights_of_attention_and_mlp(tmp_path: Path) -> None:
    models.apart(models.tiny("llama")).save(tmp_path / "apart.safetensors")
    card = ModelCard.load(hub.assemble(tmp_path / "apart.safetensors", tmp_path / "repo") / "README.md")
    assert "| weights of attention and MLP | 0 to 1 and 0 to 1 |" in card.text


def test_a_local_model_is_not_named_as_a_hub_model(file: Path, tmp_path: Path) -> None:
    Direction.load(file).with_meta(model=str(tmp_path)).save(file)
    assert ModelCard.load(hub.assemble(file, tmp_path / "repo", "other") / "README.md").data.base_model is None
    assert (tmp_path / "repo" / "other.safetensors").exists()


@pytest.mark.parametrize("model", ["/home/someone/models/x", "./models/x", "../x", "models/private/x", "x", "~/x"])
def test_what_has_not_the_form_of_a_repository_is_no_base_model(file: Path, tmp_path: Path, model: str) -> None:
    Direction.load(file).with_meta(model=model).save(file)
    card = ModelCard.load(hub.assemble(file, tmp_path / "repo") / "README.md")
    assert card.data.base_model is None
    assert model == "x" or model not in card.content
    assert "steer serve x " in card.text


def test_only_a_folder_that_was_assembled_is_written_again(file: Path, tmp_path: Path) -> None:
    (tmp_path / "repo").mkdir()
    folder = hub.assemble(file, tmp_path / "repo")
    assert hub.assemble(file, folder) == folder
    (folder / "README.md").write_text("# mine")
    for lacking in (False, True):
        if lacking:
            (folder / "README.md").unlink()
        kept = {path.name: path.read_bytes() for path in folder.iterdir()}
        with pytest.raises(InvalidInput, match="new or empty folder"):
            hub.assemble(file, folder, "again")
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == kept


def test_bad_files_and_names_are_not_assembled(file: Path, tmp_path: Path) -> None:
    with pytest.raises(DirectionError, match="not acceptable"):
        hub.assemble(file, tmp_path / "repo", "../x")
    file.write_bytes(b"rubbish")
    with pytest.raises(DirectionError, match="not a safetensors file"):
        hub.assemble(file, tmp_path / "repo")
    assert not (tmp_path / "repo").exists()


def test_a_hub_that_cannot_be_reached_is_an_error_of_ours(file: Path, tmp_path: Path) -> None:
    folder = hub.assemble(file, tmp_path / "repo")
    with pytest.raises(SteerError, match="cannot push to someone/x"):
        hub.push(folder, "someone/x")
    with pytest.raises(SteerError, match="cannot pull from someone/x"):
        hub.pull("someone/x", tmp_path / "d.safetensors")


def steer(home: Path, endpoint: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, since the hub's library reads its environment when it is imported."""
    hub_settings = {"HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_x", "HF_HOME": str(home)}
    environment = os.environ | hub_settings | {"HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-m", "steer", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=1500)


def test_what_is_pushed_is_pulled_byte_for_byte(file: Path, tmp_path: Path) -> None:
    with hubs.hub() as (endpoint, repos):
        pushed = steer(tmp_path, endpoint, "push", str(file), "someone/directions", "--name", "calm")
        assert pushed.returncode == 0, pushed.stderr
        assert f"{endpoint}/someone/directions" in pushed.stdout
        files = repos["someone/directions"]
        assert set(files) == {"README.md", "calm.safetensors"}
        assert files["calm.safetensors"] == file.read_bytes()
        output = tmp_path / "pulled.safetensors"
        pulled = steer(tmp_path, endpoint, "pull", "someone/directions", "-o", str(output))
        assert pulled.returncode == 0, pulled.stderr
        assert output.read_bytes() == file.read_bytes()
        repos["someone/bad"] = {"x.safetensors": b"rubbish", "y.safetensors": b"rubbish"}
        for arguments, says in (
            (("someone/gone",), "cannot pull from someone/gone"),
            (("someone/bad",), "has 2 .safetensors files"),
            (("someone/bad", "--file", "x.safetensors"), "not a safetensors file"),
        ):
            done = steer(tmp_path, endpoint, "pull", *arguments, "-o", str(tmp_path / "never.safetensors"))
            assert done.returncode == 2, done.stdout
            assert says in done.stderr
            assert "Traceback" not in done.stderr
        assert not (tmp_path / "never.safetensors").exists()
