"""The command `python -m experiments.slerp_study MODELS -o FOLDER`, of many small models or of one real one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from steer.cli.console import log_warnings, quiet_libraries, reported
from steer.cli.options import check_folder, rows, split
from steer.errors import InvalidInput, prefixed

#: The options of one real model.
DRAWS = "One real model"


@reported(resumes=True)
def study(
    ctx: typer.Context,
    models: Annotated[list[str], typer.Argument(help="local folders or hub ids; NAME-1, NAME-2 … are seeds of NAME")],
    output: Annotated[Path, typer.Option("--output", "-o", help="the folder for results, report and pictures")],
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="folder with refused.train.txt, harmless.train.txt, refused.test.txt, harmless.test.txt and if there "
            "is one borderline.test.txt; expected.jsonl says what right answers hold, as for `steer eval`; default: "
            "the folder `prompts` beside each model"
        ),
    ] = None,
    most: Annotated[int | None, typer.Option(min=1, help="held-out prompts of each class, at most")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="longest answer")] = 48,
    source_layers: Annotated[
        int, typer.Option(min=1, help="source layers tried, at most; spread evenly up to the last")
    ] = 16,
    batch_size: Annotated[str, typer.Option(help="prompts in a pass, or auto")] = "auto",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or auto")] = "auto",
    device: Annotated[str, typer.Option(help="cpu, cuda, mps or auto")] = "auto",
    harmful: Annotated[str | None, typer.Option(help="prompts as for `steer fit`", rich_help_panel=DRAWS)] = None,
    harmless: Annotated[str | None, typer.Option(help="the same", rich_help_panel=DRAWS)] = None,
    draws: Annotated[int, typer.Option(min=2, help="disjoint sets of 32 + 32", rich_help_panel=DRAWS)] = 4,
    arms: Annotated[
        str | None, typer.Option(help="names by commas, or all; default: eight of them", rich_help_panel=DRAWS)
    ] = None,
    kl: Annotated[str, typer.Option(help="doses of KL in nats, by commas", rich_help_panel=DRAWS)] = "0.02,0.05",
    layer: Annotated[
        int | None, typer.Option(help="source layer; default: at two thirds", rich_help_panel=DRAWS)
    ] = None,
) -> None:
    """Compare slerp at several t, linear and other methods on MODELS, with intervals.

    Many small models: each method's source layer is chosen by measured effect on the prompts that it was fitted to, and
    everything is counted on the held-out ones. One real model, with --harmful and --harmless: at one layer, on disjoint
    draws of the fitting prompts, at strength 1 and at equal KL. An interrupted study goes on when the same command is
    given again.
    """
    log_warnings()
    quiet_libraries()
    from experiments.slerp_study.run import study as run
    from experiments.slerp_study.run import subjects
    from steer.lab.progress import Progress

    with prefixed("--batch-size"):
        batch = rows(batch_size)
    try:
        doses = [float(each) for each in split(kl)]
    except ValueError:
        raise InvalidInput(f"--kl: numbers separated by commas, got {kl!r}") from None
    check_folder(output)
    _check_design(ctx, models)
    if harmful is not None and harmless is not None:
        from experiments.slerp_study.contrasts import figures, write
        from experiments.slerp_study.draws import HELD_OUT, SUBSET, WAYS, draws_study
        from steer.lab.prompts import read_prompts

        with Progress(shown=True) as progress:
            trial = draws_study(
                models[0],
                read_prompts(harmful),
                read_prompts(harmless),
                output,
                draws=draws,
                test=most or HELD_OUT,
                ways=SUBSET if arms is None else list(WAYS) if arms == "all" else split(arms),
                doses=doses,
                layer=layer,
                max_tokens=max_tokens,
                batch_size=batch,
                dtype=dtype,
                device=device,
                progress=progress,
            )
        write(figures(trial, Path(models[0]).name), output)
        typer.echo(f"wrote {output / 'draws.md'}")
        return
    with Progress(shown=True) as progress:
        report = run(
            subjects(models, prompts, most),
            output,
            max_tokens=max_tokens,
            batch_size=batch,
            most_layers=source_layers,
            dtype=dtype,
            device=device,
            progress=progress,
        )
    typer.echo(f"wrote {output / 'report.md'}: {len(report['models'])} models")


#: The options that belong to one of the two designs.
OF_MANY, OF_ONE = {"prompts", "source_layers"}, {"harmful", "harmless", "draws", "arms", "kl", "layer"}


def _check_design(ctx: typer.Context, models: Sequence[str]) -> None:
    """Refuse options of the design that is not asked for: none is ignored in silence."""
    given = {
        name
        for name in OF_MANY | OF_ONE
        if (s := ctx.get_parameter_source(name)) is not None and s.name == "COMMANDLINE"
    }
    one = bool(given & {"harmful", "harmless"})
    other = "many models: leave it out" if one else "one real model, with --harmful and --harmless"
    problems = [f"--{name.replace('_', '-')}: is for {other}" for name in sorted(given & (OF_MANY if one else OF_ONE))]
    if one and {"harmful", "harmless"} - given:
        problems.append("--harmful and --harmless: give both")
    if one and len(models) != 1:
        problems.append(f"MODELS: {len(models)} are given: --harmful and --harmless are for one")
    if problems:
        raise InvalidInput(problems)


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
app.command()(study)

if __name__ == "__main__":
    app()
