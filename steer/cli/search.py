"""The lab's commands that choose a direction by its effect on the model: select, search, trials."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from pydantic import Field

from steer.cli import options as opt
from steer.cli.console import echo_json, quiet_libraries, reported
from steer.errors import InvalidInput, imported
from steer.lab.progress import Progress
from steer.lab.prompts import LEAST_SHOWN, check_contrast, read_prompts
from steer.lab.tables import shown
from steer.names import Mode, Site, site_problem
from steer.settings import ModelSettings

if TYPE_CHECKING:
    from steer.lab.measurement import Measurement


def select(
    ctx: typer.Context,
    measurement: Annotated[Path, typer.Argument(help="a file that `steer measure` wrote")],
    model: Annotated[str, typer.Argument(help="the model that was measured: local folder or hub id")],
    harmful: opt.Harmful,
    harmless: opt.Harmless,
    output: opt.Output,
    *,
    method: opt.MethodList = ("slerp", "linear", "projected"),
    t: Annotated[tuple[float, ...] | None, "values of t of slerp, separated by commas (-1,-0.5,0,0.5)"] = None,
    parameter: opt.Parameters = None,
    layer: Annotated[
        tuple[int, ...] | None,
        opt.AllByDefault,
        "numbers separated by commas, or auto (all layers where the classes separate, the default)",
    ] = None,
    position: Annotated[
        tuple[int, ...] | None, opt.AllByDefault, "numbers separated by commas, or all measured positions (the default)"
    ] = None,
    mode: opt.TriedModes = None,
    strength: Annotated[float, "strength of each candidate"] = 1.0,
    sites: opt.Sites = ("resid_post",),
    counted: opt.Counted,
    survivors: Annotated[
        int, Field(ge=1), "candidates that generate answers, after all were screened by first tokens"
    ] = 16,
    prompts: Annotated[int, Field(ge=LEAST_SHOWN), "most prompts of each set to try candidates on"] = 48,
    max_tokens: Annotated[int, Field(ge=1), "most tokens of an answer"] = 24,
    batch_size: opt.BatchRows = None,
    backend: opt.Backend = "transformers",
    opening: ModelSettings,
) -> None:
    """Try every method, t, position, layer and mode that is named on MODEL, and write the best direction.

    First the log-odds of a first token of the behaviour's answers, then answers of those that survive. The file has the
    figures of each. With --backend vllm, any further options are those of `vllm serve`.
    """
    engine = opt.EngineOptions(backend, model, ctx, opening)
    modes = _modes_at(sites, mode)
    sets, behaviour = (read_prompts(harmful), read_prompts(harmless)), counted.loaded()
    check_contrast(*sets)
    if len(sets[0]) < LEAST_SHOWN:
        raise InvalidInput(f"--harmful: {sets[0].name} has {len(sets[0])} prompts, at least {LEAST_SHOWN} are needed")
    opt.check_output(output, read=(measurement,))
    quiet_libraries()
    from steer.lab.derive import Recipe
    from steer.lab.measurement import Measurement
    from steer.lab.select import Action, Grid
    from steer.lab.select import select as run

    ts = (-1, -0.5, 0, 0.5) if t is None else t
    made = tuple(opt.chosen_method(name, one, parameter) for name in method for one in (ts if _has_t(name) else [None]))
    _check_t(t, method)
    measured = Measurement.load(measurement)
    if (known := engine.described()) is not None:
        _check_same(measured, *known)
    actions = tuple(Action(one, strength) for one in modes)
    grid = Grid(
        made, measured.meta.positions if position is None else position, "auto" if layer is None else layer, actions
    )
    recipe = Recipe(sites=sites)
    with Progress(shown=True) as progress:
        judging = counted.only_judge(behaviour, progress)
        source, evaluator_of = engine.open(progress, sites, batch_size)
        facts = source.facts
        _check_same(measured, facts.architecture, facts.layers, facts.d_model)
        direction = run(
            measured,
            recipe,
            grid,
            *sets,
            lambda rank, tokens: evaluator_of(rank, tokens, measured.meta.rendering),
            behaviour=behaviour,
            judge=judging,
            survivors=survivors,
            prompts=prompts,
            tokens=max_tokens,
        )
    digest = direction.save(output)
    meta = direction.meta
    answered = [row for row in meta.selection["candidates"] if "refused" in row]
    typer.echo(f"{len(meta.selection['candidates'])} candidates, {len(answered)} of them answered:")
    rows = [["the plain model", "", "", "", f"{meta.selection['refused_plain']:.2f}", "", ""]]
    rows += [
        [
            row["method"] + (f" t={row['parameters']['t']:g}" if "t" in row["parameters"] else ""),
            str(row["parameters"]["position"]),
            str(row["layer"]),
            row["mode"],
            f"{row['refused']:.2f}",
            f"{row['kl']:.5f}",
            "stopped" if row["stopped"] else "",
        ]
        for row in sorted(answered, key=lambda row: (row["refused"], row["kl"]))
    ]
    typer.echo(shown(("method", "position", "layer", "mode", "shown", "N-token KL", "note"), rows))
    typer.echo(f"wrote {output}: {meta.method}, layer {meta.source_layer}, {meta.mode}, digest {digest[:12]}")


@reported(resumes=True)
def search(
    ctx: typer.Context,
    model: opt.Model,
    harmful: opt.Harmful,
    harmless: opt.Harmless,
    *,
    folder: Annotated[Path, "folder of the search; the same command continues it"],
    borderline: Annotated[
        str | None, "harmless prompts that look harmful; few of them refused is the third objective"
    ] = None,
    trials: Annotated[int, Field(ge=1), "number of trials, rounded up to whole groups"] = 192,
    method: opt.MethodList = ("slerp", "projected", "linear", "whitened"),
    t: Annotated[tuple[float, float] | None, opt.LeastAndLargest, "least and largest t of slerp (-1,1)"] = None,
    mode: opt.TriedModes = None,
    strength: Annotated[
        tuple[float, float], opt.LeastAndLargest, "least and largest strength; the mode add uses -1/100 of both"
    ] = (
        0.5,
        1.5,
    ),
    sites: opt.Sites = ("resid_post",),
    position: opt.Position = -1,
    rendered: opt.Rendered,
    counted: opt.Counted,
    prompts: Annotated[int, Field(ge=8), "most prompts of each set to try a trial on"] = 96,
    max_tokens: Annotated[int, Field(ge=1), "most tokens of an answer"] = 32,
    group: Annotated[int, Field(ge=1, le=256), "trials that run at once"] = 16,
    startup: Annotated[int, Field(ge=1), "first trials, which are drawn at random"] = 32,
    seed: Annotated[int, "seed of the search"] = 0,
    pick: Annotated[int | None, "write the direction of this trial at the end (with -o)"] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="the direction file to write")] = None,
    batch_size: opt.BatchRows = None,
    backend: opt.Backend = "transformers",
    opening: ModelSettings,
) -> None:
    """Search for directions of MODEL that leave few refusals, little divergence and little over-refusal.

    An interrupted search goes on when the same command is given again, and comes out the same. `steer trials FOLDER`
    shows the front and saves any trial's direction. At the site `writers` the layers' weights of attention and MLPs are
    searched apart, and `steer bake` writes a trial's direction into weights. With --backend vllm, any further options
    are those of `vllm serve`.
    """
    engine = opt.EngineOptions(backend, model, ctx, opening)
    modes = _modes_at(sites, mode)
    _check_output(pick, output)
    most = -(-trials // group) * group
    if pick is not None and pick >= most and not folder.exists():
        raise InvalidInput(f"--pick: {pick} is no trial of a search of {most}, which has those from 0 to {most - 1}")
    sets = read_prompts(harmful), read_prompts(harmless)
    rendering = rendered.rendering()
    border = None if borderline is None else read_prompts(borderline)
    behaviour = counted.loaded()
    quiet_libraries()
    _quiet_optuna()
    imported("matplotlib", "this command", "'steer-llm[lab]'")
    from steer.lab.measure import MeasurementOptions, measure
    from steer.lab.methods import make_method
    from steer.lab.race import Sets
    from steer.lab.search import TRYING, Search, SearchSpace, Settings, Trial, front_table, rank_of, work, write_front

    space = SearchSpace(methods=method, modes=modes, t=t or (-1.0, 1.0), strength=strength, sites=sites)
    progress = Progress(shown=True)
    judging = counted.only_judge(behaviour, progress)
    settings = Settings(
        model=model,
        revision=opening.revision,
        backend=backend,
        behaviour=behaviour,
        judge=judging and judging.identity,
        harmful=sets[0].dataset,
        harmless=sets[1].dataset,
        borderline=None if border is None else border.dataset,
        **asdict(rendering),
        position=position,
        dtype=opening.dtype,
        prompts=prompts,
        tokens=max_tokens,
        group=group,
        startup=startup,
        seed=seed,
        space=space,
    )
    vectors = any(make_method(name).needs != "means" for name in space.methods)
    _check_t(t, space.methods)
    tried = Sets.drawn(*sets, border, limit=prompts)
    with progress:
        progress.plan(TRYING, work(settings, tried, trials))
        source, evaluator_of = engine.open(progress, sites, batch_size)

        def measured(partial: Path) -> Measurement:
            options = MeasurementOptions((position,), None, rendering, vectors=vectors)
            return measure(source, *sets, options, batch_size=batch_size, progress=progress, partial=partial, every=60)

        of_model = {"weights": source.fingerprint(), "chat_template": source.facts.chat_template_sha256 or ""}
        begun = Search.begin(folder, settings.model_copy(update=of_model), measured)
        evaluator = evaluator_of(rank_of(begun.settings.space, begun.measurement), max_tokens, rendering)
        evaluator.check_room([*sets, *([] if border is None else [border])])

        def after(found: list[Trial]) -> None:
            if found:
                progress.write(f"\n{len(found)} of {most} trials, the front so far:\n{front_table(found)}")

        found = begun.run(evaluator, tried, trials, after, judging)
    write_front(begun, found)
    if pick is not None and output is not None:
        begun.save(pick, output)
    typer.echo(f"{len(found)} trials in {folder}, the front:\n{front_table(found)}")
    typer.echo(f"a trial's direction: steer trials {folder} --save NUMBER -o FILE.safetensors")


def trials(
    folder: Annotated[Path, typer.Argument(help="the folder of a search")],
    save: Annotated[int | None, "write the direction of this trial (with -o)"] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="the direction file to write")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="every trial, as JSON")] = False,
) -> None:
    """Show the front of the search in FOLDER, or save a trial's direction. It takes no model."""
    _quiet_optuna()
    from steer.lab.search import Search, front, front_table

    _check_output(save, output)
    found = Search.open(folder)
    if save is not None and output is not None:
        digest = found.save(save, output)
        typer.echo(f"wrote {output}: trial {save}, digest {digest[:12]}")
        return
    known = found.trials()
    if as_json:
        best = front(known)
        echo_json([asdict(trial) | {"front": trial in best} for trial in known])
        return
    typer.echo(f"{len(known)} trials, the front:\n{front_table(known)}")


def _quiet_optuna() -> None:
    optuna = imported("optuna", "this command", "'steer-llm[lab]'")
    optuna.logging.set_verbosity(optuna.logging.WARNING)


def _check_output(number: int | None, output: Path | None) -> None:
    if (number is None) != (output is None):
        raise InvalidInput("a trial's number and --output belong together: give both or none")
    if output is not None:
        opt.check_output(output)


def _check_same(measured: Measurement, architecture: str, layers: int, d_model: int) -> None:
    """Raise InvalidInput if the measured model has another architecture, d_model or number of layers than this one."""
    known = measured.meta.model
    InvalidInput.raise_for(
        f"{name}: the measurement is of {getattr(known, name)}, the model has {value}"
        for name, value in (("architecture", architecture), ("d_model", d_model), ("layers", layers))
        if getattr(known, name) != value
    )


def _modes_at(sites: tuple[Site, ...], named: tuple[Mode, ...] | None) -> tuple[Mode, ...]:
    """The modes to try at `sites`: those that are named, by default all of `opt.TRIED_MODES` that are defined there.
    Raises InvalidInput for a named one that is not."""
    if named is None:
        return tuple(mode for mode in opt.TRIED_MODES if site_problem(sites, mode) is None)
    InvalidInput.raise_for(f"--mode: {problem}" for mode in named if (problem := site_problem(sites, mode)))
    return named


def _has_t(name: str) -> bool:
    from steer.lab.methods import METHODS, class_of

    return name in METHODS and "t" in class_of(name).model_fields


def _check_t(t: tuple[float, ...] | None, methods: Sequence[str]) -> None:
    if t is not None and not any(map(_has_t, methods)):
        raise InvalidInput(f"--t: no method of {', '.join(methods)} has a t: leave it out, or name slerp in --method")
