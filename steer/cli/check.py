"""The command `check`, which says whether a direction fits a model and works there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from pydantic import Field

from steer.cli import options as opt
from steer.cli.console import echo_json, quiet_libraries
from steer.errors import DirectionError
from steer.lab.progress import Progress
from steer.lab.prompts import Rendering, read_prompts
from steer.lab.tables import shown, terminal_width, wrapped
from steer.names import MODES
from steer.settings import ModelSettings

if TYPE_CHECKING:
    from steer.lab.evaluation.check import CheckResult

EXIT_CODES = {"works": 0, "fails": 1, "unknown": 3}


def check(
    ctx: typer.Context,
    file: Annotated[Path, typer.Argument(help="a direction file")],
    model: Annotated[str | None, typer.Argument(help="local folder or hub id; default: the embedded model")] = None,
    harmful: Annotated[
        str | None, "prompts that show the behaviour; default: prompts that only the embedded model refuses"
    ] = None,
    harmless: Annotated[str | None, "prompts that do not show it; default: 8 that come with Steer"] = None,
    mode: Annotated[str | None, f"{', '.join(MODES)}; default: the file's"] = None,
    strength: Annotated[float | None, "default: the file's, of its own mode; in another mode 1"] = None,
    behaviour: opt.BehaviourOption = "refusal",
    prompts: Annotated[int, Field(ge=2), "most prompts of each class"] = 8,
    max_tokens: Annotated[int, Field(ge=1), "most tokens of an answer"] = 32,
    backend: opt.Backend = "transformers",
    as_json: Annotated[bool, typer.Option("--json", help="as JSON")] = False,
    *,
    opening: ModelSettings,
) -> None:
    """Say whether a direction fits MODEL, where it acts, whether its sign is right, and what it does on 16 prompts.

    The exit code is 0 where it works, 1 where it does not, 2 where it does not fit, and 3 where prompts cannot tell.
    """
    from steer.demo import MODEL, PROMPTS

    if model is not None and model.startswith("-"):  # no MODEL is given, and an unknown option was read as it
        ctx.args, model = [model, *ctx.args], None
    named, model = model, model or str(MODEL)
    engine = opt.EngineOptions(backend, model, ctx, opening)
    quiet_libraries()
    from steer.lab.behaviour import Behaviour
    from steer.lab.evaluation.arms import arms_of
    from steer.lab.evaluation.check import HARMFUL
    from steer.lab.evaluation.check import check as run
    from steer.lab.evaluation.run import HARMLESS

    (arm,) = arms_of([file], mode and [mode], None if strength is None else [strength])
    meta = arm.direction.meta
    given = {HARMFUL: harmful or PROMPTS / "refused.test.txt", HARMLESS: harmless or PROMPTS / "harmless.test.txt"}
    sets = {name: read_prompts(str(source)).drawn(prompts) for name, source in given.items()}
    looked_for = Behaviour.load(behaviour)
    try:
        engine.check_fits({file: arm.direction})
    except DirectionError as error:
        if named:
            raise
        raise DirectionError([*error.problems, "this model is the embedded one: name yours"]) from error
    rendering = Rendering(meta.system_prompt, meta.template, meta.response_prefix)
    with Progress(shown=True) as progress:
        source, evaluator_of = engine.open(progress, meta.sites)
        opt.check_served({file: arm.direction}, source)
        evaluator = evaluator_of(arm.rows, max_tokens, rendering)
        found = run(arm, source, evaluator, sets, rendering, looked_for)
    summary = {"file": str(file), "digest": arm.asked.digest, "model": model, "verdict": found.verdict}
    if as_json:
        echo_json(summary | asdict(found) | {"sets": [one.model_dump(mode="json") for one in found.sets]})
    else:
        typer.echo(_text(found, f"{file} on {model}", meta.layers))
    raise typer.Exit(EXIT_CODES[found.verdict])


def _ranges(layers: Sequence[int]) -> str:
    """Return the layers as a text like "1 to 5, 7", or "none" if there are none."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(f"{run[0]} to {run[-1]}" if run[1:] else str(run[0]) for run in runs) or "none"


def _text(found: CheckResult, what: str, layers: int) -> str:
    sign, at = found.sign, _ranges(found.layers)
    sides = {
        "right": "points to the harmful side",
        "wrong": "points to the harmless side",
        "none": "does not separate these prompts",
    }
    lines = [
        f"fits, and acts at {len(found.layers)} of {layers} layers ({at}), {found.mode} at strength {found.strength:g}",
        f"{sides[sign.side]}: at layer {sign.layer} a harmful prompt is above a harmless one {sign.auc:.0%} of "
        f"the time (p {sign.p:.1g})",
        f"KL(plain ‖ steered) on harmless: {found.kl:.5f} nats",
        *(f"note: {note}" for note in found.notes),
    ]
    head = ("answers to", "shown plain", "shown steered", "broken plain", "broken steered")
    rows = [
        [f"{one.dataset.count} {one.name}", *(str(a.shown.hits) for a in one.arms)]
        + [str(a.degenerate.hits) for a in one.arms]
        for one in found.sets
    ]
    plain, steered = (sum(one.arms[arm].degenerate.hits for one in found.sets) for arm in (0, 1))
    count = sum(one.arms[1].degenerate.count for one in found.sets)
    works = f"it changes the behaviour as it should; broken answers: {steered} of {count}, without it {plain}"
    verdict = "; ".join([*found.problems, *found.unknown]) or works
    width = terminal_width()
    paragraphs = [wrapped(what, width), *(wrapped(line, width, first="  ", further="    ") for line in lines)]
    return "\n".join([*paragraphs, "", shown(head, rows), "", wrapped(f"{found.verdict}: {verdict}", width)])
