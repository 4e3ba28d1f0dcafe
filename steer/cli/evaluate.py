"""The commands that tell what answers are: eval of a model's, classify of those in a file."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from importlib.metadata import version
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from steer.cli import options as opt
from steer.cli.console import echo_json, echo_line, log_warnings, quiet_libraries, reported
from steer.errors import InvalidInput
from steer.names import MODES
from steer.settings import ModelSettings
from steer.spec import PHASES, TOKENS

log = logging.getLogger("steer")

if TYPE_CHECKING:
    from steer.lab.evaluation.arms import Arm
    from steer.lab.evaluation.figures import Text
    from steer.lab.evaluation.report import Report, SteeredArm, TaskScore
    from steer.lab.evaluation.run import Found
    from steer.lab.judge import Judges
    from steer.lab.prompts import PromptSet
    from steer.lab.source import Source


@opt.with_settings(ModelSettings)
def evaluate(
    ctx: typer.Context,
    model: opt.Model,
    direction: Annotated[list[Path], typer.Option(help="the direction file; repeatable")],
    harmful: Annotated[str, typer.Option(help="prompts that show the behaviour, texts or conversations")],
    harmless: Annotated[str, typer.Option(help="prompts that do not show it; the divergence is measured on these")],
    borderline: Annotated[str | None, typer.Option(help="harmless prompts that look harmful")] = None,
    multi_turn: Annotated[
        str | None, typer.Option(help="conversations of several turns (.jsonl with messages)")
    ] = None,
    mode: Annotated[
        str | None, typer.Option(help=f"{', '.join(MODES)}; several by commas; default: the file's")
    ] = None,
    strength: Annotated[float | None, typer.Option(help="default: the file's")] = None,
    strengths: Annotated[
        str | None, typer.Option(help="several strengths instead of --strength, like 0,0.5,1,1.5")
    ] = None,
    kl: Annotated[
        str | None,
        typer.Option(help="KL doses on harmless, like 0.02,0.05: find the strengths that have these and try them"),
    ] = None,
    layers: Annotated[
        str | None, typer.Option(help="the layers at which it acts, as 10-20 or all; several by commas; default: all")
    ] = None,
    tokens: Annotated[
        str | None,
        typer.Option(
            help=f"the tokens: {', '.join(t for t in TOKENS if t not in PHASES)}; several by commas; default: all"
        ),
    ] = None,
    controls: Annotated[
        int, typer.Option(min=0, max=100, help="random directions of the same shape to try for each file")
    ] = 0,
    against: Annotated[
        str | None,
        typer.Option(help="an arm that the others are compared with; without a strength at the same, or the same KL"),
    ] = None,
    calibrate: Annotated[
        Path | None,
        typer.Option(help="write the direction here, with the largest strengths up to which no tried one did harm"),
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="most tokens of an answer")] = 64,
    behaviour: opt.BehaviourOption = "refusal",
    judge: opt.JudgeOption = None,
    judge_model: opt.JudgeModel = None,
    judge_shown: opt.JudgeShown = None,
    judge_text: opt.JudgeText = None,
    expected: Annotated[
        Path | None, typer.Option(help=".jsonl of prompts with what a right answer contains and lacks")
    ] = None,
    text: Annotated[Path | None, typer.Option(help="plain text whose perplexity is measured")] = None,
    tasks: Annotated[str | None, typer.Option(help="tasks of lm_eval, separated by commas")] = None,
    tasks_folder: Annotated[Path | None, typer.Option(help="a folder with more tasks for lm_eval")] = None,
    tasks_limit: Annotated[int | None, typer.Option(min=1, help="documents of each task")] = None,
    url: Annotated[
        str | None, typer.Option(help="API (…/v1) of your server for --tasks, which serves MODEL and the direction")
    ] = None,
    system_prompt: opt.SystemPrompt = None,
    template: opt.Template = None,
    response_prefix: opt.ResponsePrefix = "",
    batch_size: Annotated[str, typer.Option(help="prompts in a pass, or auto")] = "auto",
    backend: opt.Backend = "transformers",
    report: Annotated[
        Path | None, typer.Option(help="folder for report.json, report.md and pictures; continues an interrupted run")
    ] = None,
    answers: Annotated[
        bool, typer.Option("--answers", help="also write every answer, to answers.jsonl in the folder of --report")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="as JSON")] = False,
    *,
    opening: ModelSettings,
) -> None:
    """Report what a direction does: the behaviour before and after, broken answers, divergence on harmless text.

    With --backend vllm the model is tried as vLLM serves it, and any further options are those of `vllm serve`.
    """
    with reported(resumes=report is not None), ExitStack() as stack:
        log_warnings()
        opt.check_bench(backend, model, ctx.args, opening)
        quiet_libraries()
        from steer.lab.behaviour import Behaviour
        from steer.lab.evaluation.arms import arms_of, projected
        from steer.lab.evaluation.figures import agreements, read_expected
        from steer.lab.evaluation.report import Conditions, Report
        from steer.lab.evaluation.run import Evaluation, Plan
        from steer.lab.evaluation.tasks import TaskPlan, scores, server
        from steer.lab.progress import Progress
        from steer.lab.prompts import read_prompts
        from steer.lab.resume import Cache
        from steer.tokenization import rendered_otherwise

        judges = _check(
            (judge, judge_model, judge_shown, judge_text),
            strength,
            strengths,
            kl,
            controls,
            tasks,
            tasks_folder,
            tasks_limit,
            url,
            report,
            answers,
        )
        if calibrate is not None and (len(direction) != 1 or (strengths is None and kl is None)):
            raise InvalidInput("--calibrate: is for one --direction and several --strengths (or --kl)")
        at, when = (["all"] if each is None else opt.split(each) for each in (layers, tokens))
        _check_places(at, when, calibrate, text, tasks, backend)
        wanted = [strength] if strength is not None else opt.floats("--strengths", strengths) if strengths else None
        doses = _doses(kl)
        arms = arms_of(direction, mode.split(",") if mode else None, wanted, controls, at, when)
        named = [arm.way for arm in arms] + [arm.name for arm in arms if not doses]
        if against is not None and against not in named:
            raise InvalidInput(f"--against: {against!r} is none of the arms: {', '.join(dict.fromkeys(named))}")
        choices = opt.Choices.model_validate({"sites": arms[0].direction.meta.sites, "batch_size": batch_size})
        given = {"harmful": harmful, "harmless": harmless, "borderline": borderline, "multi-turn": multi_turn}
        sets = {name: read_prompts(source) for name, source in given.items() if source is not None}
        _warn_of_known(arms, sets)
        looked_for = Behaviour.load(behaviour)
        rendering = opt.chosen_rendering(system_prompt, template, response_prefix)
        for one in arms:
            if told := rendered_otherwise(one.direction.meta.template, rendering.template):
                log.warning("%s: %s: give the same --template as for the fit", one.name, told)
        known = read_expected(expected) if expected else {}
        progress = stack.enter_context(Progress(shown=True))
        judging = judges.opened(looked_for, progress)
        bench = opt.open_bench(backend, model, ctx.args, opening, choices, progress)
        plain_text = _text(text, bench.source) if text else None
        conditions: dict[str, Any] = {
            "model": model,
            "revision": opening.revision,
            "backend": backend,
            "dtype": opening.dtype,
        }
        conditions |= asdict(rendering)
        # what was measured of other weights, on another machine or in another precision, is not mixed in
        fingerprint = {} if report is None else {"fingerprint": bench.source.fingerprint()}
        cache = Cache(report, conditions | fingerprint)
        evaluator = bench.evaluator(max(arm.direction.acting(arm.mode) for arm in arms), max_tokens, rendering)
        plan = Plan(arms, sets, max_tokens, looked_for, judging, known, plain_text, doses, against)
        found = Evaluation(evaluator, plan, cache).run()
        arms = list(found.arms)
        scored: tuple[TaskScore, ...] = ()
        if tasks is not None:
            with server(url, model, opening.options, arms) as served:
                scored = scores(TaskPlan(tasks.split(","), model, tasks_folder, tasks_limit), served, arms, cache)
        made = Report(
            conditions=Conditions(
                **conditions,
                max_tokens=max_tokens,
                behaviour=looked_for.name,
                judges=tuple(one.name for one in judging),
                tasks_url=url,
                software={name: version(name) for name in ("torch", "transformers")},
            ),
            arms=tuple(_arm(arm) for arm in arms),
            sets=found.sets,
            divergence=found.divergence,
            doses=found.doses,
            comparisons=found.comparisons,
            agreements=agreements(one for told in found.told.values() for one in told),
            text=found.text,
            tasks=scored,
        )
        if report is not None:
            two = {name: sets[name] for name in ("harmful", "harmless")}
            projections = projected(bench.source, plan.arms[0].direction, two, rendering, choices.batch)
            _write(made, found, sets, report, projections, answers)
        if calibrate is not None:
            own = next(arm.direction for arm in plan.arms if not arm.control)
            doses_of = made.calibrated(direction[0].stem)
            own.with_meta(calibrated=own.meta.calibrated | doses_of).save(calibrate)
            said = ", ".join(f"{mode} from {low:g} to {high:g}" for mode, (low, high) in doses_of.items())
            typer.echo(f"wrote {calibrate}: no harm seen for {said}", err=True)
    if as_json:
        echo_json(made.model_dump(mode="json"))
        return
    from steer.lab.evaluation.pages import tables
    from steer.lab.tables import shown

    typer.echo(tables(made, paired=False, table=shown))
    if report is not None:
        typer.echo(f"\nwrote {report / 'report.md'} and report.json")


def _check(
    judging: tuple[list[str] | None, list[str] | None, list[str] | None, str | None],
    strength: float | None,
    strengths: str | None,
    kl: str | None,
    controls: int,
    tasks: str | None,
    tasks_folder: Path | None,
    tasks_limit: int | None,
    url: str | None,
    report: Path | None,
    answers: bool,
) -> Judges:
    from importlib.util import find_spec

    problems = []
    if strength is not None and strengths is not None:
        problems.append("--strength and --strengths set the same value: give one of them")
    if kl is not None and (strength is not None or strengths is not None):
        problems.append("--kl finds the strengths: do not give --strength or --strengths with it")
    if controls and url is not None:
        problems.append("--controls: not possible with --url, whose server does not have these random directions")
    for option, value in (("--url", url), ("--tasks-folder", tasks_folder), ("--tasks-limit", tasks_limit)):
        if value is not None and tasks is None:
            problems.append(f"{option}: is for --tasks")
    if answers and report is None:
        problems.append("--answers: needs --report, the folder in which they are kept")
    if report is not None and find_spec("matplotlib") is None:
        problems.append("--report needs the package matplotlib (pip install 'steer-llm[lab]')")
    if tasks is not None and find_spec("lm_eval") is None:
        problems.append("--tasks needs the package lm-eval (pip install 'lm-eval[api]')")
    if report is not None and report.exists() and not report.is_dir():
        problems.append(f"--report: {report} is not a folder")
    try:
        judges = opt.chosen_judges(*judging)
    except InvalidInput as error:
        problems += error.problems
    if problems:
        raise InvalidInput(problems)
    return judges


def _check_places(
    layers: list[str], tokens: list[str], calibrate: Path | None, text: Path | None, tasks: str | None, backend: str
) -> None:
    problems = [
        f"{option}: names none: give one, or leave the option out"
        for option, given in (("--layers", layers), ("--tokens", tokens))
        if not given
    ]
    if calibrate is not None and (layers, tokens) != (["all"], ["all"]):
        problems.append("--calibrate: is for all layers and tokens: give it without --layers and --tokens")
    for option, value in (("--text", text), ("--tasks", tasks)):
        if value is not None and tokens != ["all"]:
            problems.append(f"--tokens: {option} scores texts, which have no prompt and no answer: give one of the two")
    if phases := [each for each in tokens if each in PHASES]:
        problems.append(f"--tokens: {', '.join(phases)}: for requests to a server, whose answers decide: give others")
    if backend == "vllm" and (last := [each for each in tokens if each.startswith("last-")]):
        problems.append(
            f"--tokens: {', '.join(last)}: vLLM scores an answer as the end of a prompt, whose middle no request can "
            "name: give others, or --backend transformers"
        )
    if problems:
        raise InvalidInput(problems)


def _warn_of_known(arms: Sequence[Arm], sets: Mapping[str, PromptSet]) -> None:
    """Say where a direction was made from the very file that it is measured on."""
    for arm in {arm.digest: arm for arm in arms if not arm.control}.values():
        made_from = {"harmful": arm.direction.meta.harmful, "harmless": arm.direction.meta.harmless}
        for name, dataset in made_from.items():
            if dataset is not None and dataset.sha256 == sets[name].sha256:
                log.warning(
                    "--%s: %s is the file that %s was made from: give other prompts, its figures on these are too good",
                    name,
                    sets[name].name,
                    arm.name.partition(":")[0],
                )


def _doses(text: str | None) -> list[float]:
    found = opt.floats("--kl", text or "")
    if problems := [
        f"--kl: {dose:g} is not accepted: a number of nats above 0" for dose in found if not 0 < dose < inf
    ]:
        raise InvalidInput(problems)
    return list(dict.fromkeys(found))


def classify(
    answers: Annotated[
        Path,
        typer.Argument(
            help="answers, .jsonl: on each line a text, or an object with `answer` and `prompt`; - is standard input"
        ),
    ],
    behaviour: opt.BehaviourOption = "refusal",
    judge: opt.JudgeOption = None,
    judge_model: opt.JudgeModel = None,
    judge_shown: opt.JudgeShown = None,
    judge_text: opt.JudgeText = None,
) -> None:
    """Tell of each answer whether it shows the behaviour, and if not, whether it is an answer.

    Writes the lines that it reads, with `outcome` (shown, late, unanswered, degenerate or complied; with a judge
    deflected too) and `why`. A judge's word is in place of the behaviour's own patterns.
    """
    from steer.lab.behaviour import Behaviour
    from steer.lab.judge import judged
    from steer.lab.outcome import Answer, Outcome, tell
    from steer.lab.progress import Progress

    looked_for = Behaviour.load(behaviour)
    judging = opt.chosen_judges(judge, judge_model, judge_shown, judge_text).one(looked_for, Progress())
    items = _answers(answers)
    verdicts: list[Outcome | None] = [None] * len(items)
    if judging is not None:
        verdicts = judged(judging, [str(item.get("prompt", "")) for item in items], [item["answer"] for item in items])
    for item, verdict in zip(items, verdicts, strict=True):
        told = tell(looked_for, Answer.of(item["answer"]), verdict=verdict)
        echo_line(item | {"outcome": told.outcome, "why": told.why})


def _answers(path: Path) -> list[dict[str, Any]]:
    """The answers of a file. Raises InvalidInput with every line that is none."""
    found, problems = [], []
    for number, line in enumerate(_read(path, str(path))[1].split("\n"), 1):
        if not line.strip():
            continue
        try:
            item = json.loads(line)
            json.dumps(item, allow_nan=False)  # it will be written again
        except (ValueError, RecursionError) as error:
            problems.append(f"{path}, line {number}: not JSON: {error}")
            continue
        item = {"answer": item} if isinstance(item, str) else item
        if isinstance(item, dict) and isinstance(item.get("answer"), str):
            found.append(item)
        else:
            problems.append(f"{path}, line {number}: neither a text nor an object with a text `answer`")
    if not found and not problems:
        problems.append(f"{path}: has no answers; accepted: .jsonl, a text each line, or an object with `answer`")
    if problems:
        raise InvalidInput(problems)
    return found


def _read(path: Path, said: str) -> tuple[bytes, str]:
    """The bytes of a file (of standard input for -), and their text. Raises InvalidInput, which begins with `said`."""
    try:
        data = sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()
        return data, data.decode("utf-8-sig")
    except OSError as error:
        raise InvalidInput(f"{said}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InvalidInput(f"{said}: is not UTF-8 text: {error}") from error


def _text(path: Path, source: Source) -> Text:
    import hashlib

    from steer.direction import Dataset
    from steer.lab.evaluation.figures import WINDOW, Text, windows

    data, text = _read(path, f"--text: {path}")
    pieces = windows(source.text_ids(text), min(WINDOW, source.context))
    return Text(Dataset(name=path.name, sha256=hashlib.sha256(data).hexdigest(), count=1), pieces)


def _arm(arm: Arm) -> SteeredArm:
    from steer.lab.evaluation.report import SteeredArm

    return SteeredArm(
        name=arm.name,
        file=arm.name.partition(":")[0],
        digest=arm.digest,
        method=arm.direction.meta.method,
        mode=arm.mode,
        strength=arm.strength,
        layers=arm.layers,
        tokens=arm.tokens,
    )


def _write(
    made: Report,
    found: Found,
    sets: dict[str, PromptSet],
    folder: Path,
    projections: dict[str, dict[str, list[float]]],
    answers: bool,
) -> None:
    from steer.lab.evaluation.pages import draw, render
    from steer.lab.prompts import messages_of

    pictures = draw(made, folder, projections)
    (folder / "report.json").write_text(json.dumps(made.model_dump(mode="json"), indent=2) + "\n", "utf-8")
    (folder / "report.md").write_text(render(made, pictures), "utf-8")
    if answers:
        with (folder / "answers.jsonl").open("w", encoding="utf-8") as file:
            for (name, arm), told in found.told.items():
                for prompt, one in zip(sets[name].prompts, told, strict=True):
                    asked = {"set": name, "arm": arm, "messages": messages_of(prompt)}
                    file.write(json.dumps(asked | asdict(one)) + "\n")


def register(app: typer.Typer) -> None:
    app.command("eval", context_settings=opt.VLLM_OPTIONS)(evaluate)
    app.command()(classify)
