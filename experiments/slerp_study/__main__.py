"""The command `python -m experiments.slerp_study MODELS -o FOLDER`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from steer.cli.console import log_warnings, quiet_libraries, reported
from steer.cli.options import Choices, check_folder


@reported(resumes=True)
def study(
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
) -> None:
    """Try slerp from t = 0 to 2, linear, biprojected and whitened, plain and one-sided, on MODELS, with intervals.

    Each method's source layer is chosen by measured effect on the prompts that it was fitted to, and everything is
    counted on the held-out ones. An interrupted study goes on when the same command is given again.
    """
    log_warnings()
    quiet_libraries()
    from experiments.slerp_study.run import study as run
    from experiments.slerp_study.run import subjects
    from steer.lab.progress import Progress

    choices = Choices.model_validate({"batch_size": batch_size})
    check_folder(output)
    with Progress(shown=True) as progress:
        report = run(
            subjects(models, prompts, most),
            output,
            max_tokens=max_tokens,
            batch_size=choices.batch,
            most_layers=source_layers,
            dtype=dtype,
            device=device,
            progress=progress,
        )
    typer.echo(f"wrote {output / 'report.md'}: {len(report['models'])} models")


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
app.command()(study)

if __name__ == "__main__":
    app()
