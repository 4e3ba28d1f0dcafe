"""The lab's commands that exchange directions with other tools, models and hubs: convert, bake, push, pull."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated, Literal

import typer

from steer.cli import options as opt
from steer.cli.console import quiet_libraries
from steer.errors import DirectionError, InvalidInput, noted, prefixed
from steer.lab.progress import Progress
from steer.names import Mode
from steer.settings import ModelOrigin


def convert(
    source: Annotated[Path, typer.Argument(metavar="INPUT", help="a file of ours or of another tool, or its folder")],
    output: Annotated[
        Path,
        typer.Argument(help="NAME.safetensors, NAME.measurement.safetensors, NAME.gguf or FOLDER/direction.pt"),
    ],
    model: Annotated[str | None, "the model that another tool's file was made for (its config is read)"] = None,
    layer: Annotated[
        Literal["widest", "all"] | int | None,
        "source layer, 0 for block 0; for a file of class means also widest (the default) or all",
    ] = None,
    position: Annotated[int | None, "position, where the file has several"] = None,
    tensor: Annotated[
        str | None, "which tensor of a plain safetensors file; of class means refuse or refusenorm, its direction"
    ] = None,
    method: Annotated[str | None, f"of class means: {opt.METHOD_NAMES}; default: slerp"] = None,
    t: opt.T = None,
    parameter: opt.Parameters = None,
    mode: Annotated[Mode | None, "the default mode of the direction that is written"] = None,
    strength: Annotated[float | None, "the default strength of the direction that is written"] = None,
    *,
    origin: ModelOrigin,
) -> None:
    """Convert directions and measurements from and to the files of other tools."""
    opt.check_output(output, "OUTPUT", (source,), converted=True)
    quiet_libraries()
    from steer.hf.load import describe
    from steer.lab import formats
    from steer.lab.derive import Recipe, derive
    from steer.lab.evaluation.check import acting
    from steer.lab.formats.foreign import METADATA, Foreign
    from steer.lab.measurement import Measurement, ModelFacts

    facts = None
    if model is not None:
        opt.check_model(model, origin.revision)
        architecture, layers, d_model = describe(model, origin.revision, trust_remote_code=origin.trust_remote_code)
        facts = ModelFacts(
            name=model, revision=origin.revision, architecture=architecture, layers=layers, d_model=d_model
        )
    number = layer if isinstance(layer, int) else None
    found = formats.read(source, Foreign(facts, number, position, tensor))
    if isinstance(found, Measurement):
        if output.name.endswith(formats.MEASUREMENT_SUFFIX):
            made = {"method": method, "t": t, "parameter": parameter, "mode": mode, "strength": strength}
            _refuse("a measurement", **made, layer=layer, position=position)
            found.save(output)
            typer.echo(f"wrote {output}: {found.layers} of {found.meta.model.layers} layers")
            return
        made_by = opt.chosen_method(method or "slerp", t, parameter)
        recipe = Recipe(made_by, "widest" if layer is None else layer, position, mode=mode or "ablate")
        found = derive(found, recipe)
    elif output.name.endswith(formats.MEASUREMENT_SUFFIX):
        raise InvalidInput(f"{source}: is a direction; a measurement cannot be made from it")
    else:
        unread = {"method": method, "t": t, "parameter": parameter, "layer": layer if number is None else None}
        _refuse("a direction, which is made already", **unread)
    changes = {key: value for key, value in (("mode", mode), ("strength", strength)) if value is not None}
    if mode is not None and strength is None:
        changes["strength"] = found.meta.strength_in(mode)
    direction = found.with_meta(**changes)
    for sentence in formats.write(output, direction):
        typer.echo(f"warning: {sentence}", err=True)
    meta = direction.meta
    added = acting(direction, "add") if meta.mode == "add" and output.suffix == ".safetensors" else []
    if len(added) > 1:
        layer = added[len(added) // 2] if meta.source_layer is None else meta.source_layer
        typer.echo(
            f"warning: its mode is add, at all of {len(added)} layers, which is many times as much as at one; a "
            f"request for one layer is {output.stem}:add@{layer}, and `steer check` shows what it does",
            err=True,
        )
    beside = f" and {output.with_name(METADATA)}" if output.suffix == ".pt" else ""
    typer.echo(
        f"wrote {output}{beside} from a direction: {meta.method}, mode {meta.mode}, modes {', '.join(meta.modes)}"
    )


def _refuse(what: str, **options: object) -> None:
    """Raise InvalidInput with each option that is given, because it is not for `what`."""
    InvalidInput.raise_for(f"--{name}: is not for {what}" for name, value in options.items() if value is not None)


def bake(
    model: Annotated[str, typer.Argument(help="local folder or hub id, with safetensors weights")],
    direction: Annotated[Path, "the direction file"],
    output: Annotated[Path, typer.Option("--output", "-o", help="the new folder")],
    strength: Annotated[float | None, "default: the file's, of its own mode; in another mode 1"] = None,
    mode: Annotated[str | None, "ablate, to bake plain removal of a direction whose file says another mode"] = None,
    lora: Annotated[bool, "write a LoRA adapter (PEFT) instead of a whole model"] = False,
    preserve_norms: Annotated[
        bool, "each vector that a weight writes keeps its length (not each row of the weight, and not the stream)"
    ] = False,
    verify: Annotated[
        bool, "compare what is written with the original, block by block, and keep nothing that fails"
    ] = True,
    *,
    origin: ModelOrigin,
) -> None:
    """Write an ordinary model, or a LoRA adapter, without the direction: what MODEL is at the site `writers`.

    Shard by shard and block by block, so that models of any size can be baked and verified; tied embeddings are untied.
    """
    problems: list[str] = []
    with noted(problems):
        opt.check_folder(output)
    with noted(problems):
        opt.check_model(model, origin.revision)
    if mode not in (None, "ablate"):
        problems.append(f"--mode: '{mode}' is not accepted: 'ablate', since weights can only lose the direction")
    if lora and preserve_norms:
        problems.append("--preserve-norms: is not an edit of low rank, so it cannot be an adapter (--lora)")
    InvalidInput.raise_for(problems)
    quiet_libraries()
    from steer.direction import Direction, digest, read_file
    from steer.lab.merge.model import bake as write_model
    from steer.lab.merge.model import export_adapter
    from steer.lab.merge.removal import removal
    from steer.lab.merge.weights import Checkpoint, resolve

    data = read_file(direction)
    loaded = Direction.from_bytes(data, source=str(direction))
    if mode is None and loaded.meta.mode != "ablate":
        raise InvalidInput(
            f"{direction}: the mode '{loaded.meta.mode}' cannot be baked: only plain removal is possible in weights; "
            "--mode ablate bakes that"
        )
    with opt.problems_of_options():
        removed = removal(loaded, strength)
    if loaded.meta.sites != removed.direction.meta.sites:
        typer.echo(
            "note: weights can do what the site writers does, not what resid_post does: the embedding and each part of "
            "a block write without the direction",
            err=True,
        )
    checkpoint = Checkpoint(resolve(model, origin.revision), trust_remote_code=origin.trust_remote_code)
    with prefixed(str(direction), DirectionError), Progress(shown=True) as progress:
        if lora:
            count, verdict = export_adapter(checkpoint, removed, output, base=model, verified=verify, progress=progress)
            summary = f"an adapter of rank {loaded.rank} for {count} modules"
            if checkpoint.config.get("tie_word_embeddings"):
                summary += "; do not merge it: the embedding is tied, and the unembedding would be edited with it"
        else:
            count, verdict = write_model(
                checkpoint,
                removed,
                output,
                digest=digest(data),
                preserve_norms=preserve_norms,
                verified=verify,
                progress=progress,
            )
            summary = f"{count} tensors edited"
    typer.echo(f"wrote {output}: {summary}")
    typer.echo("not verified, as --no-verify says" if verdict is None else f"verified: {verdict}")


def push(
    file: Annotated[Path, typer.Argument(help="a direction file")],
    repo: Annotated[str, typer.Argument(help="OWNER/NAME on the hub")],
    name: Annotated[str | None, "name of the direction there; default: the file's"] = None,
    private: Annotated[bool, "where the repository is made new: private"] = False,
    folder: Annotated[Path | None, "write the repository's files (with the card) there, and upload nothing"] = None,
) -> None:
    """Upload a direction with a model card to a hub (the token is that of `hf auth login`)."""
    from steer.lab import hub

    if folder is not None and private:
        raise InvalidInput("--private: is for an upload, but --folder uploads nothing")
    if folder is not None:
        typer.echo(f"wrote {hub.assemble(file, folder, name)}: nothing was uploaded")
        return
    with tempfile.TemporaryDirectory() as temporary:
        address = hub.push(hub.assemble(file, Path(temporary), name), repo, private=private)
    typer.echo(f"pushed to {address}")


def pull(
    repo: Annotated[str, typer.Argument(help="OWNER/NAME on the hub")],
    output: opt.Output,
    file: Annotated[str | None, "which file, where the repository has several"] = None,
    revision: Annotated[str | None, "branch, tag or commit"] = None,
) -> None:
    """Fetch a direction from a hub, check it, and write it in place."""
    from steer.lab import hub

    opt.check_output(output)
    digest = hub.pull(repo, output, file=file, revision=revision)
    typer.echo(f"wrote {output}: digest {digest[:12]}")
