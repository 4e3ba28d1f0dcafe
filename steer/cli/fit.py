"""The lab's commands that make a direction from prompts: fit, its two halves measure and derive, and methods."""

from __future__ import annotations

import os
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import typer
from pydantic import BaseModel, Field, ValidationError

from steer.cli import options as opt
from steer.cli.console import echo_json, echo_resumed, quiet_libraries, reported
from steer.errors import InvalidInput, NothingFound, problems_of
from steer.files import read_bytes
from steer.lab.progress import Progress
from steer.lab.prompts import LEAST_SHOWN, SMALL, Split, check_contrast, read_prompts
from steer.lab.tables import terminal_width, wrapped
from steer.names import Mode, check_name
from steer.settings import ModelSettings
from steer.spec import ends, layer_range


@reported(resumes=True)
def fit(
    ctx: typer.Context,
    model: opt.Model,
    *,
    # not `Output | None`: an option inside a union would lose its names
    output: Annotated[Path | None, typer.Option("--output", "-o", help="the direction file to write")] = None,
    harmful: Annotated[str | None, opt.HARMFUL] = None,
    harmless: Annotated[str | None, opt.HARMLESS] = None,
    prompts: opt.Prompts = None,
    limit: Annotated[
        int,
        Field(ge=8),
        "prompts to use from each set, drawn evenly; a quarter of them decides the choice",
    ] = 160,
    counted: opt.Counted,
    method: Annotated[str | None, opt.METHOD_NAME] = None,
    t: opt.T = None,
    parameter: opt.Parameters = None,
    layer: Annotated[
        Literal["auto", "widest", "all"] | int,
        "source layer: auto (chosen by effect), a number, widest, or all (each layer its own)",
    ] = "auto",
    position: opt.Position = -1,
    winsorize: opt.Winsorize = None,
    rendered: opt.Rendered,
    mode: Annotated[Mode | None, opt.FILE_MODE] = None,
    strength: Annotated[float | None, opt.STRENGTH] = None,
    sites: opt.Sites = ("resid_post",),
    max_tokens: Annotated[int, Field(ge=1), "most tokens of an answer"] = 24,
    batch_size: opt.BatchPrompts = None,
    threshold: opt.Threshold = None,
    target: opt.Target = None,
    condition: Annotated[
        Path | None, "a direction file: find the condition on it that --harmful prompts meet and --harmless ones do not"
    ] = None,
    backend: opt.Backend = "transformers",
    opening: ModelSettings,
) -> None:
    """Measure MODEL on two contrast sets and write the direction that removes the behaviour with the least harm.

    Layer, method, mode and their numbers, unless you give them, are chosen by their effect on prompts that were not
    measured. If no direction reduces the behaviour, or all that do harm harmless answers, nothing is written and the
    exit code is 3. If a fit is interrupted, give the same command again and it continues. With --backend vllm the
    model is tried as vLLM serves it, and further options are those of `vllm serve`.

    With --condition no direction is made. The layer and the threshold of a condition on that one are chosen, and its
    errors on prompts that were set aside are printed; the exit code is 3 if it does not tell the sets apart. With
    --output the same direction is written with the condition in its metadata, which no request applies by itself.
    """
    engine = opt.EngineOptions(backend, model, ctx, opening)
    if condition is not None:
        _check_condition(ctx, condition, output, layer)
    elif output is None:
        raise InvalidInput("--output: is missing: the direction file to write")
    if output is not None:
        opt.check_output(output)
    rendering, behaviour = rendered.rendering(), counted.loaded()
    made = opt.chosen_method(method or "slerp", t, parameter) if method or t is not None or parameter else None
    least = LEAST_SHOWN if condition is None else SMALL
    if limit < least:
        raise InvalidInput(f"--limit: {limit} is not accepted here: {least} or more prompts of each set (better 128)")
    split = Split.of(*opt.chosen_sets(harmful, harmless, prompts), limit, least)
    quiet_libraries()
    from steer.direction import Direction
    from steer.lab import fit as lab
    from steer.lab.derive import Recipe
    from steer.lab.evaluation.condition import describe, find
    from steer.lab.measure import MeasurementOptions
    from steer.lab.select import CHOOSING

    probe = None
    if condition is not None:
        probe = Direction.load(condition)
        engine.check_fits({condition: probe})
    with opt.problems_of_options():
        choice = lab.Choice.of(made, layer, mode, strength, threshold, target, sites)
    if winsorize is not None:
        choice = replace(choice, winsorize=())
    options = MeasurementOptions((position,), winsorize, rendering, vectors=choice.needs_vectors)
    with Progress(shown=True) as progress:
        judging = counted.only_judge(behaviour, progress)
        source, evaluator_of = engine.open(progress, sites, batch_size)
        layers = source.facts.layers
        if isinstance(layer, int) and not -layers <= layer < layers:
            raise InvalidInput(f"--layer: {layer} does not exist: this model has the layers 0 to {layers - 1}")
        if condition is not None and probe is not None:
            opt.check_served({condition: probe}, source)
            at = layer % layers if isinstance(layer, int) else None
            name = (output or condition).stem  # of the file that holds the condition
            known = find(source, probe, name, split, rendering, at, batch_size, progress)
            typer.echo("\n".join(describe(known, split)))
            if output is not None:
                digest = probe.with_meta(condition=known.kept(split, rendering)).save(output)
                typer.echo(f"wrote {output}: digest {digest[:12]}")
            return
        assert output is not None, "checked"
        progress.plan(CHOOSING, lab.most_work(split, choice, max_tokens, behaviour))
        work = lab.Work(output.with_suffix(".part"), source, split, options, behaviour, max_tokens, judging)
        if work.cache.resumes:
            echo_resumed(work.folder)
        tried = evaluator_of(choice.rank, max_tokens, rendering)
        measurement = work.measured(tried, batch_size)
        try:
            recipe = Recipe(sites=sites)
            fitted = lab.fit(
                measurement, recipe, choice, split, tried, behaviour=behaviour, judge=judging, cache=work.cache
            )
        except NothingFound:
            work.remove()
            raise
    digest = fitted.direction.save(output)
    work.remove()
    width = terminal_width()
    table, *lines = lab.report(fitted)
    typer.echo(table)
    for line in [*lines, f"wrote {output}: digest {digest[:12]}", "next, with prompts that were not used here:"]:
        typer.echo(wrapped(line, width))
    following = ["steer", "eval", model, "--direction", str(output)]
    following += [] if counted.behaviour == "refusal" else ["--behaviour", counted.behaviour]
    typer.echo(f"{shlex.join(following)} --harmful FILE --harmless FILE")  # not wrapped, so that users can paste it


#: Parameters of `fit` that may be given with --condition, beside the options for loading the model.
OF_CONDITION = (
    *("model", "output", "condition", "harmful", "harmless", "prompts", "limit", "layer", "batch_size", "backend"),
    *("system_prompt", "template", "response_prefix"),
)


def _check_condition(ctx: typer.Context, file: Path, output: Path | None, layer: str | int) -> None:
    """Raise InvalidInput, before any work, for options that do not go together with --condition.

    Also refuse a file whose name no condition could have.
    """
    known = {*OF_CONDITION, *ModelSettings.model_fields}
    problems = [
        f"--{name.replace('_', '-')}: is for a direction to be fitted: --condition FILE takes one as it is"
        for name in ctx.params
        if name not in known and (source := ctx.get_parameter_source(name)) and source.name == "COMMANDLINE"
    ]
    if layer in ("widest", "all"):
        problems.append(f"--layer: '{layer}' is not for --condition: auto, or the number of a layer")
    if output is not None and os.path.realpath(output) == os.path.realpath(file):
        problems.append(f"--output: {output} is the file of --condition, which is not changed: give another name")
    InvalidInput.raise_for(problems)
    check_name(file.stem)


@reported(resumes=True)
def measure(
    ctx: typer.Context,
    model: opt.Model,
    harmful: opt.Harmful,
    harmless: opt.Harmless,
    *,
    output: Annotated[Path, typer.Option("--output", "-o", help="the measurement file to write (.safetensors)")],
    positions: Annotated[tuple[int, ...], "token positions, separated by commas; −1 is the last of the template"] = (
        -1,
    ),
    last_layer: Annotated[int | None, "last layer to measure; the layers after it do not run"] = None,
    vectors: Annotated[bool, "keep each prompt's vectors (bfloat16), which some methods need"] = False,
    moments: Annotated[bool, "keep second moments: layers × d_model² × 16 bytes for each position"] = False,
    winsorize: opt.Winsorize = None,
    rendered: opt.Rendered,
    batch_size: opt.BatchPrompts = None,
    every: Annotated[
        float, Field(ge=0), "seconds of work between saves of the running sums, next to the output"
    ] = 60.0,
    backend: opt.Backend = "transformers",
    opening: ModelSettings,
) -> None:
    """Measure MODEL on two contrast sets once; `steer derive` makes directions of it without the model.

    An interrupted measurement goes on when the same command is given again. With --backend vllm the model is measured
    as vLLM serves it, and any further options are those of `vllm serve`.
    """
    opt.check_output(output, read=(harmful, harmless), kind="a measurement")
    engine = opt.EngineOptions(backend, model, ctx, opening)
    sets = read_prompts(harmful), read_prompts(harmless)
    check_contrast(*sets)
    for one in sets:
        if one.oddities:
            typer.echo(one.oddities, err=True)
    rendering = rendered.rendering()
    quiet_libraries()
    from steer.lab.measure import MeasurementOptions
    from steer.lab.measure import measure as run

    options = MeasurementOptions(positions, winsorize, rendering, last_layer, vectors, moments)
    partial = output.with_name(f"{output.name}.part")
    with Progress(shown=True) as progress:
        source = engine.open(progress)[0]
        measurement = run(
            source, *sets, options, batch_size=batch_size, progress=progress, partial=partial, every=every
        )
    measurement.save(output)
    partial.unlink(missing_ok=True)
    meta = measurement.meta
    typer.echo(
        f"wrote {output}: {len(sets[0])} and {len(sets[1])} prompts, {meta.measured} of {meta.model.layers} layers, "
        f"positions {', '.join(map(str, meta.positions))}"
    )


def derive(
    measurement: Annotated[Path, typer.Argument(help="a file that `steer measure` wrote")],
    output: opt.Output,
    method: Annotated[str, opt.METHOD_NAME] = "slerp",
    t: opt.T = None,
    parameter: opt.Parameters = None,
    layer: Annotated[
        Literal["widest", "all"] | int,
        "source layer: widest (where the class means are widest apart), a number, or all (each its own)",
    ] = "widest",
    position: Annotated[int | None, "one of the measured positions; default: the first"] = None,
    winsorize: Annotated[
        float | None, "clip each prompt's vector at this quantile of its magnitudes (needs --vectors)"
    ] = None,
    sparsify: Annotated[float | None, "share of the dimensions to keep, those with the largest entries"] = None,
    bootstrap: Annotated[int, "resamples of the prompts to average over (needs --vectors)"] = 0,
    seed: Annotated[int | None, "seed of the resamples of --bootstrap; default: 0"] = None,
    mode: Annotated[Mode, opt.FILE_MODE] = "ablate",
    strength: Annotated[float, opt.STRENGTH] = 1.0,
    sites: opt.Sites = ("resid_post",),
    threshold: opt.Threshold = None,
    target: opt.Target = None,
    layers: Annotated[str | None, "the layers at which it acts, as 10-20; the others get the weight 0"] = None,
    weights: Annotated[
        str | None,
        "how much each layer does: a bell, as peak=16,width=6,least=0.1,most=1 (most at the layer peak, by default 1; "
        "the share least of that far from it, by default 0), or a .json file with a number for each layer",
    ] = None,
    mlp_weights: Annotated[
        str | None, "at the site writers: the same of what MLPs write; --weights is then of what attention writes"
    ] = None,
) -> None:
    """Make a direction from a MEASUREMENT, without the model."""
    if seed is not None and not bootstrap:
        raise InvalidInput("--seed: needs --bootstrap, because nothing else here is random")
    opt.check_output(output, read=(measurement,))
    from steer.lab.derive import Recipe
    from steer.lab.derive import derive as run
    from steer.lab.fit import described
    from steer.lab.measurement import Measurement

    made = opt.chosen_method(method, t, parameter)
    measured = Measurement.load(measurement)
    with opt.problems_of_options():
        recipe = Recipe(
            made,
            layer,
            position,
            winsorize,
            sparsify,
            bootstrap,
            seed or 0,
            mode,
            strength,
            sites,
            threshold,
            target,
            *_weights(layers, weights, mlp_weights, measured.meta.model.layers),
        )
        direction = run(measured, recipe)
    meta = direction.meta
    if not {"one_sided", "rotate_one_sided"}.intersection(meta.modes):
        unread = [f"--{name}" for name, value in (("threshold", threshold), ("target", target)) if value is not None]
        InvalidInput.raise_for(
            f"{option}: is for one_sided and rotate_one_sided, and this direction's modes are "
            f"{', '.join(meta.modes)}: leave it out"
            for option in unread
        )
    digest = direction.save(output)
    source = "each layer's own" if meta.source_layer is None else f"layer {meta.source_layer}"
    at = "" if set(meta.sites) == {"resid_post"} else f" at {', '.join(meta.sites)}"
    typer.echo(f"wrote {output}: {described(recipe)}{at}, source {source}, digest {digest[:12]}")


def _weights(layers: str | None, weights: str | None, mlp: str | None, depth: int) -> list[tuple[float, ...] | None]:
    """Return the weights that --layers, --weights and --mlp-weights give, one number for each layer.

    The first item has the weights of --weights and the second those of --mlp-weights; an item is None if nothing is
    given for it. `depth` is the number of layers of the model, which is not known when the options are parsed.
    """
    first, last = 0, depth - 1
    if layers is not None:
        span = layer_range(layers)
        first, last = (0, depth) if span is None else ends(span)
        if last >= depth:
            raise InvalidInput(
                f"--layers: {layers!r} is not accepted: the first and the last layer like 10-20, or one, of 0 to "
                f"{depth - 1}"
            )
    found: list[tuple[float, ...] | None] = []
    for option, text, needed in (("--weights", weights, layers is not None), ("--mlp-weights", mlp, False)):
        if text is None and not needed:
            found.append(None)
            continue
        each = [1.0] * depth
        if text is not None:
            each = _kernel(option, text, depth) if "=" in text else _listed(option, text)
        found.append(tuple(weight if first <= layer <= last else 0.0 for layer, weight in enumerate(each)))
    return found


class Bell(BaseModel, extra="forbid"):
    """The parameters of `derive.layer_weights`, and the weight at the peak."""

    peak: Annotated[float, Field(ge=0, description="the layer that does most")]
    width: Annotated[float, Field(ge=0.01, le=1e6, description="layers from the peak to 0.61 of it")]
    least: Annotated[float, Field(ge=0, le=1, description="the share of that far from the peak")] = 0.0
    most: Annotated[float, Field(gt=0, le=100, description="the weight at the peak")] = 1.0


def _kernel(option: str, text: str, depth: int) -> list[float]:
    from steer.lab.derive import layer_weights

    try:
        bell = Bell.model_validate(opt.assigned(option, opt.split(text)))
    except ValidationError as error:
        raise InvalidInput(f"{option}: {problem}" for problem in problems_of(error, "the bell", Bell)) from error
    if bell.peak >= depth:
        raise InvalidInput(f"{option}: peak is {bell.peak:g}: the layers are 0 to {depth - 1}")
    return (bell.most * layer_weights(depth, bell.peak, bell.width, bell.least)).tolist()


def _listed(option: str, file: str) -> list[float]:
    import json

    try:
        numbers = json.loads(read_bytes(file).decode("utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise InvalidInput(
            f"{option}: {file}: cannot be read as JSON: {getattr(error, 'strerror', error)}; accepted: "
            "peak=LAYER,width=LAYERS,least=SHARE,most=WEIGHT, or a JSON file with a number for each layer"
        ) from error
    if not isinstance(numbers, list) or not all(type(n) in (int, float) and abs(n) <= 100 for n in numbers):
        raise InvalidInput(f"{option}: {file}: accepted: a list with a number from -100 to 100 for each layer")
    return numbers


def methods(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME]...", help="methods to show; default: all")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="as JSON")] = False,
) -> None:
    """Explain each method: its formula, its source, its parameters and its pitfalls."""
    import inspect

    from steer.lab.methods import METHODS, class_of

    InvalidInput.raise_for(
        f"method {name!r} is not known; accepted: {', '.join(METHODS)}" for name in names or () if name not in METHODS
    )
    chosen = {name: class_of(name) for name in names or METHODS}
    if as_json:
        echo_json(
            {
                name: {
                    "description": inspect.cleandoc(kind.__doc__ or ""),
                    "needs": kind.needs,
                    "parameters": kind.model_json_schema()["properties"] if kind.model_fields else {},
                }
                for name, kind in chosen.items()
            }
        )
        return
    width = terminal_width(120)
    for name, kind in chosen.items():
        paragraphs = inspect.cleandoc(kind.__doc__ or "").split("\n\n")
        paragraphs += [
            f"-p {parameter}={field.get_default()}: {field.description}"
            for parameter, field in kind.model_fields.items()
        ]
        typer.echo("\n\n".join([name, *(wrapped(one, width, "    ", "    ") for one in paragraphs)]) + "\n")
