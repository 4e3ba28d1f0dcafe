"""A direction as a repository on a hub: its file, and a model card made from its metadata."""

from __future__ import annotations

import json
import re
from pathlib import Path

from huggingface_hub import HfApi, ModelCard, ModelCardData, hf_hub_download

from steer.direction import Direction, digest, read_file
from steer.errors import InvalidInput, SteerError
from steer.files import write_file
from steer.names import check_name
from steer.spec import Condition

#: The form OWNER/NAME of a repository on a hub.
REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
#: The line of a model card that shows that Steer wrote the card.
LIBRARY = b"\nlibrary_name: steer\n"


def card(direction: Direction, name: str, sha256: str) -> ModelCard:
    """The model card (README) of a repository that holds `name`.safetensors."""
    meta, found = direction.meta, direction.meta.condition
    public = REPOSITORY.fullmatch(meta.model) is not None and not Path(meta.model).exists()
    model = meta.model if public else Path(meta.model).name  # a local path is not published
    data = ModelCardData(
        base_model=model if public else None,
        base_model_relation="adapter" if public else None,
        library_name="steer",
        tags=["steer", "steering-vector", "interpretability"],
    )
    weights = (f"{float(w.min()):g} to {float(w.max()):g}" for w in map(direction.weights_of, (0, 1)))
    facts = {
        "made for": f"{model} ({meta.architecture}, {meta.layers} layers × {meta.d_model})",
        "model revision": meta.revision,
        "method": meta.method,
        "parameters": ", ".join(f"{k} {v}" for k, v in meta.parameters.items() if v is not None),
        "source layer": "each layer's own" if meta.source_layer is None else meta.source_layer,
        "rows for each layer": direction.rank,
        "default mode and strength": f"{meta.mode}, {meta.strength:g}",
        "modes": ", ".join(meta.modes),
        "sites": ", ".join(meta.sites),
        "weights of attention and MLP": None if direction.mlp_weights is None else " and ".join(weights),
        "condition that was found": found
        and f"`{name}?{Condition(name, found.layer, found.above, found.below)}`: {found.errors}",
        "set that shows the behaviour": meta.harmful and f"{meta.harmful.name}, {meta.harmful.count} prompts",
        "set that does not": meta.harmless and f"{meta.harmless.name}, {meta.harmless.count} prompts",
        "system prompt": meta.system_prompt,
        "variables of the chat template": ", ".join(f"{k} {json.dumps(v)}" for k, v in meta.template.items()),
        "answers begin with": meta.response_prefix,
        "sha256": sha256,
        "made with": f"{meta.tool}, {meta.created}",
    }
    rows = "\n".join(f"| {key} | {_cell(value)} |" for key, value in facts.items() if value not in (None, ""))
    text = f"""# {name}

A direction for [Steer](https://pypi.org/project/steer-llm/): unit vectors that are removed from (or added to) a model's
residual stream, for each request that asks for it. The model's weights are not in this repository and not changed.

| | |
|---|---|
{rows}

```
steer pull OWNER/REPOSITORY -o directions/{name}.safetensors
steer serve {model} --directions directions
```

It is for research into how models behave. With it a model answers requests that it was trained to refuse: whoever
serves it is responsible for what it is used for.
"""
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}")


def assemble(file: Path, folder: Path, name: str | None = None) -> Path:
    """Write the repository's files into `folder`: the unchanged direction file and its card. Return `folder`.

    Args:
        name: the name of the direction in the repository; default: the name of `file`.

    Raises:
        DirectionError: `file` is not a valid direction, or the name is not acceptable.
        InvalidInput: the folder has files and no card that Steer wrote.
    """
    data = read_file(file)
    direction = Direction.from_bytes(data, source=str(file))
    name = check_name(name or file.stem)
    readme = folder / "README.md"
    if folder.exists() and any(folder.iterdir()) and not (readme.exists() and LIBRARY in readme.read_bytes()):
        raise InvalidInput(f"{folder}: has files that no push has written: give a new or empty folder")
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / f"{name}.safetensors", data)
    write_file(readme, card(direction, name, digest(data)).content.encode())
    return folder


def push(folder: Path, repo: str, *, private: bool = False) -> str:
    """Upload an assembled `folder`, and create the repository if it does not exist.

    Returns:
        The address of the repository.

    Raises:
        SteerError: the hub cannot be reached or refuses the upload.
    """
    api = HfApi()
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message="A direction made with steer")
    except Exception as error:  # the library's own errors, network errors and file errors
        raise SteerError(f"cannot push to {repo}: {error}") from error
    return f"{api.endpoint}/{repo}"


def pull(repo: str, output: Path, *, file: str | None = None, revision: str | None = None) -> str:
    """Fetch a direction, check it, and write it to `output`.

    Args:
        file: the file in the repository; needed if it has several .safetensors files.

    Returns:
        The digest of the direction.

    Raises:
        SteerError: the file cannot be fetched, or it is not clear which file is meant.
        DirectionError: the file is not a valid direction.
    """
    try:
        names = [file] if file else _directions(HfApi().list_repo_files(repo, revision=revision), repo)
        path = hf_hub_download(repo, names[0], revision=revision)
    except SteerError:
        raise
    except Exception as error:  # as in `push`
        raise SteerError(f"cannot pull from {repo}: {error}") from error
    data = read_file(path)
    Direction.from_bytes(data, source=f"{repo}/{names[0]}")
    write_file(output, data)
    return digest(data)


def _directions(files: list[str], repo: str) -> list[str]:
    """The only .safetensors file of the repository, as a list. Raises SteerError if there is not exactly one."""
    found = [name for name in files if name.endswith(".safetensors")]
    if len(found) != 1:
        raise SteerError(f"{repo} has {len(found)} .safetensors files ({', '.join(found) or 'none'}): give --file")
    return found


def _cell(value: object) -> str:
    """`value` as the text of a cell in a Markdown table."""
    return str(value).replace("|", "\\|").replace("\n", " ")
