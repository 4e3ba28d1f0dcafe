"""The commands that judge answers: eval those of a model, classify those in a file."""

from __future__ import annotations

import hashlib
import json
import logging
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import Field

from steer.cli import options as opt
from steer.cli.console import echo_json, echo_line, echo_resumed, quiet_libraries, reported
from steer.errors import InvalidInput, noted
from steer.files import open_file
from steer.lab.lines import json_lines
from steer.lab.progress import Progress
from steer.lab.prompts import Prompt, PromptSet, Rendering, check_contrast, prompt_of, read_prompts
from steer.lab.tables import shown, terminal_width, wrapped
from steer.names import MODES
from steer.settings import ModelSettings
from steer.spec import NORM, TOKENS

if TYPE_CHECKING:
    from steer.direction import Direction
    from steer.lab.behaviour import Behaviour
    from steer.lab.evaluation.arms import Arm
    from steer.lab.evaluation.report import SetResult, TaskScore
    from steer.lab.resume import Cache

log = logging.getLogger("steer")


@dataclass(frozen=True, slots=True)
class Applied:
    """The options for how the directions are applied: which arms there are, and with which arm they are compared."""

    mode: Annotated[
        tuple[str, ...] | None,
        f"{', '.join(MODES)}, with {NORM} where the norm is to be kept; several by commas; default: the file's",
    ] = None
    strength: Annotated[float | None, "default: the file's, of its own mode; in another mode 1"] = None
    strengths: Annotated[tuple[float, ...] | None, "several strengths instead of --strength, like 0,0.5,1,1.5"] = None
    kl: Annotated[
        tuple[Annotated[float, Field(gt=0, allow_inf_nan=False)], ...] | None,
        "KL doses on harmless, like 0.02,0.05: find the strengths that have these and try them",
    ] = None
    layers: Annotated[tuple[str, ...], "the layers at which it acts, as 10-20 or all; several by commas"] = ("all",)
    tokens: Annotated[tuple[str, ...], f"the tokens: {', '.join(TOKENS)}; several by commas"] = ("all",)
    shifts: Annotated[
        tuple[float, ...] | None,
        "thresholds moved by these shares of the distance between the class means, like -0.25,0,0.25",
    ] = None
    condition: Annotated[
        str | None, "act where this holds alone, as a request says it: refusal@12>0.3, or each:refusal@12>0.3"
    ] = None
    probe: Annotated[Path | None, "the file of --condition's direction, where that is not a --direction"] = None
    controls: Annotated[int, Field(ge=0, le=100), "random directions of the same shape to try for each file"] = 0
    against: Annotated[
        str | None, "an arm that the others are compared with; without a strength at the same, or the same KL"
    ] = None
    calibrate: Annotated[
        Path | None, "write the direction here, with the largest strengths up to which no tried one did harm"
    ] = None

    def files(self, files: Sequence[Path], arms: Sequence[Arm]) -> dict[Path, Direction]:
        """Return the directions of `files` and of --probe, as `arms` hold them."""
        found = {file: arm.direction for file in files for arm in arms if arm.asked.direction == file.stem}
        if self.probe is not None and arms[0].probe is not None:
            found[self.probe] = arms[0].probe
        return found

    def arms(self, files: Sequence[Path]) -> list[Arm]:
        """Return the arms of `files`. If there are KL doses, each arm has the strength of its file."""
        from steer.lab.evaluation.arms import arms_of

        strengths = self.strengths if self.strength is None else (self.strength,)
        where = self.layers, self.tokens, self.shifts or (0.0,)
        arms = arms_of(files, self.mode, strengths, self.controls, *where, self.condition, self.probe)
        named = [arm.way for arm in arms] + [arm.name for arm in arms if not self.kl]
        if self.against is not None and self.against not in named:
            raise InvalidInput(f"--against: {self.against!r} is none of the arms: {', '.join(dict.fromkeys(named))}")
        return arms


@dataclass(frozen=True, slots=True)
class Tasks:
    """The options for the tasks of lm_eval, and for the server that they run on."""

    tasks: Annotated[str | None, "tasks of lm_eval, separated by commas"] = None
    tasks_folder: Annotated[Path | None, "a folder with more tasks for lm_eval"] = None
    tasks_limit: Annotated[int | None, Field(ge=1), "documents of each task"] = None
    url: Annotated[str | None, "API (…/v1) of your server for --tasks, which serves MODEL and the direction"] = None

    def check(self) -> None:
        """Raise InvalidInput for tasks that do not exist."""
        if self.tasks is not None:
            from steer.lab.evaluation.tasks import check_tasks

            check_tasks(opt.split(self.tasks), self.tasks_folder)

    def scores(self, model: str, opening: ModelSettings, arms: Sequence[Arm], cache: Cache) -> tuple[TaskScore, ...]:
        from steer.lab.evaluation.tasks import TaskPlan, given, scores, serving

        if self.tasks is None:
            return ()
        running = serving(model, opening.options, arms) if self.url is None else nullcontext(given(self.url, arms))
        with running as served:
            plan = TaskPlan(opt.split(self.tasks), model, self.tasks_folder, self.tasks_limit)
            return scores(plan, served, arms, cache)


def evaluate(
    ctx: typer.Context,
    model: opt.Model,
    direction: Annotated[list[Path], "the direction file; repeatable"],
    harmful: Annotated[str, "prompts that show the behaviour, texts or conversations"],
    harmless: Annotated[str, "prompts that do not show it; the divergence is measured on these"],
    *,
    borderline: Annotated[str | None, "harmless prompts that look harmful"] = None,
    multi_turn: Annotated[str | None, "conversations of several turns (.jsonl with messages)"] = None,
    applied: Applied,
    max_tokens: Annotated[int, Field(ge=1), "most tokens of an answer"] = 64,
    counted: opt.Counted,
    expected: Annotated[Path | None, ".jsonl of prompts with what a right answer contains and lacks"] = None,
    text: Annotated[Path | None, "plain text whose perplexity is measured"] = None,
    lm_eval: Tasks,
    rendered: opt.Rendered,
    batch_size: opt.BatchRows = None,
    backend: opt.Backend = "transformers",
    report: Annotated[
        Path | None, "folder for report.json, report.md and pictures; continues an interrupted run"
    ] = None,
    answers: Annotated[bool, "also write every answer, to answers.jsonl in the folder of --report"] = False,
    as_json: Annotated[bool, typer.Option("--json", help="as JSON")] = False,
    opening: ModelSettings,
) -> None:
    """Report what a direction does: the behaviour before and after, broken answers, divergence on harmless text.

    With --backend vllm the model is tried as vLLM serves it, and any further options are those of `vllm serve`.
    """
    with reported(resumes=report is not None), Progress(shown=True) as progress:
        engine = opt.EngineOptions(backend, model, ctx, opening)
        rendering, behaviour = _checked(applied, lm_eval, counted, rendered, direction, text, backend, report, answers)
        quiet_libraries()
        from steer.direction import Dataset
        from steer.lab.evaluation.arms import projected
        from steer.lab.evaluation.figures import WINDOW, agreements, in_windows, read_expected
        from steer.lab.evaluation.pages import tables, write
        from steer.lab.evaluation.report import Report, RunSettings, SteeredArm
        from steer.lab.evaluation.run import Evaluation, EvaluationPlan
        from steer.lab.resume import Cache
        from steer.tokenization import rendered_otherwise

        doses, arms = tuple(dict.fromkeys(applied.kl or ())), applied.arms(direction)
        files = applied.files(direction, arms)
        engine.check_fits(files)
        lm_eval.check()
        given = {"harmful": harmful, "harmless": harmless, "borderline": borderline, "multi-turn": multi_turn}
        sets = {name: read_prompts(source) for name, source in given.items() if source is not None}
        check_contrast(sets["harmful"], sets["harmless"])
        _warn_of_known(arms, sets)
        for one in arms:
            if difference := rendered_otherwise(one.direction.meta.template, rendering.template):
                log.warning("%s: %s: give the same --template as for the fit", one.name, difference)
        known = read_expected(expected) if expected else {}
        written = _read(text, f"--text: {text}") if text else None
        judging = counted.judges(behaviour, progress)
        source, evaluator_of = engine.open(progress, arms[0].direction.meta.sites, batch_size)
        opt.check_served(files, source)
        loading = {"model": model, "revision": opening.revision, "backend": backend, "dtype": opening.dtype}
        conditions: dict[str, Any] = loading | asdict(rendering)
        # keeps apart what was measured with other weights or another chat template, on another machine or in another
        # precision
        template = {"chat_template_sha256": source.facts.chat_template_sha256}
        cache = Cache(report, conditions | ({} if report is None else template | {"fingerprint": source.fingerprint()}))
        if report is not None and cache.resumes:
            echo_resumed(report)
        evaluator = evaluator_of(max(arm.rows for arm in arms), max_tokens, rendering)
        plain_text = None
        if text and written:
            dataset = Dataset(name=text.name, sha256=hashlib.sha256(written[0]).hexdigest(), count=1)
            plain_text = in_windows(dataset, source.text_ids(written[1]), min(WINDOW, source.context))
        plan = EvaluationPlan(arms, sets, max_tokens, behaviour, judging, known, plain_text, doses, applied.against)
        found = Evaluation(evaluator, plan, cache).run()
        made = Report(
            conditions=RunSettings(
                **conditions,
                max_tokens=max_tokens,
                behaviour=behaviour.name,
                judges=tuple(one.name for one in judging),
                tasks_url=lm_eval.url,
                software={name: version(name) for name in ("torch", "transformers")},
            ),
            arms=tuple(SteeredArm.of(arm) for arm in found.arms),
            sets=found.sets,
            divergence=found.divergence,
            doses=found.doses,
            comparisons=found.comparisons,
            agreements=agreements(row for rows in found.rows.values() for row in rows),
            text=found.text,
            tasks=lm_eval.scores(model, opening, found.arms, cache),
        )
        _warn_of_swapped(found.sets, behaviour.name)
        if report is not None:
            two = {name: sets[name] for name in ("harmful", "harmless")}
            projections = projected(source, arms[0].direction, two, rendering, batch_size)
            write(made, report, projections, found.rows if answers else {}, sets)
        if applied.calibrate is not None:
            own = next(arm.direction for arm in arms if not arm.control)
            calibrated = made.calibrated(direction[0].stem)
            own.with_meta(calibrated=own.meta.calibrated | calibrated).save(applied.calibrate)
            ranges = ", ".join(f"{mode} from {low:g} to {high:g}" for mode, (low, high) in calibrated.items())
            typer.echo(f"wrote {applied.calibrate}: no harm seen for {ranges}", err=True)
    if as_json:
        echo_json(made.model_dump(mode="json"))
        return
    width = terminal_width()
    for line in tables(made, paired=False, table=shown).splitlines():
        typer.echo(line if line.startswith(("|", "#")) or len(line) <= width else wrapped(line, width))
    if report is not None:
        typer.echo(f"\nwrote {report / 'report.md'} and report.json")


def _checked(
    applied: Applied,
    lm_eval: Tasks,
    counted: opt.Counted,
    rendered: opt.Rendered,
    files: Sequence[Path],
    text: Path | None,
    backend: str,
    report: Path | None,
    answers: bool,
) -> tuple[Rendering, Behaviour]:
    """Return the rendering of prompts, and the behaviour that is counted.

    Raises InvalidInput, before anything is read, with all options that are wrong or do not go together.
    """
    calibrated = applied.calibrate is not None
    one, several, kl = (given is not None for given in (applied.strength, applied.strengths, applied.kl))
    tasks, url, kept = (given is not None for given in (lm_eval.tasks, lm_eval.url, report))
    scored = ["--text"] * (text is not None) + ["--tasks"] * tasks
    condition = applied.condition
    everywhere = ("all",)
    placed = (applied.layers, applied.tokens, applied.shifts, condition) != (everywhere, everywhere, None, None)
    placed |= any(mode.endswith(NORM) for mode in applied.mode or ())
    messages = {
        "--strength and --strengths set the same value: give one of them": one and several,
        "--kl finds the strengths: do not give --strength or --strengths with it": kl and (one or several),
        "--controls: not possible with --url, whose server does not have these random directions": applied.controls
        and url,
        "--url: is for --tasks": url and not tasks,
        "--tasks-folder: is for --tasks": lm_eval.tasks_folder is not None and not tasks,
        "--tasks-limit: is for --tasks": lm_eval.tasks_limit is not None and not tasks,
        "--tasks needs the package lm-eval (pip install 'lm-eval[api]')": tasks and find_spec("lm_eval") is None,
        "--answers: needs --report, the folder in which they are kept": answers and not kept,
        "--report needs the package matplotlib (pip install 'steer-llm[lab]')": kept and not find_spec("matplotlib"),
        f"--report: {report} is not a folder": report is not None and report.exists() and not report.is_dir(),
        "--calibrate: is for one --direction and several --strengths (or --kl)": calibrated
        and (len(files) != 1 or not (several or kl)),
        "--calibrate: is for what acts everywhere: give it without --layers, --tokens, --shifts, --condition and "
        f"{NORM}": placed and calibrated,
        "--mode: names none: give one, or leave the option out": applied.mode is not None and not applied.mode,
        "--kl: names none: give one, or leave the option out": kl and not applied.kl,
        "--layers: names none: give one, or leave the option out": not applied.layers,
        "--tokens: names none: give one, or leave the option out": not applied.tokens,
        f"--tokens: does not go with {' and '.join(scored)}, whose texts have no prompts: leave one out": scored
        and applied.tokens != everywhere,
        f"--condition: does not go with {' and '.join(scored)}, whose texts have no prompts: leave one out": scored
        and condition is not None,
        "--probe: is for --condition": applied.probe is not None and condition is None,
        "--shifts: names none: give one, or leave the option out": not applied.shifts and applied.shifts is not None,
    }
    problems = [message for message, holds in messages.items() if holds]
    with noted(problems):
        rendering = rendered.rendering()
    with noted(problems):
        behaviour = counted.loaded(several=True)
    with noted(problems):
        if report is not None:
            opt.check_folder(report, "--report")
    with noted(problems):
        if applied.calibrate is not None:
            opt.check_output(applied.calibrate, "--calibrate")
    InvalidInput.raise_for(problems)
    return rendering, behaviour


def _warn_of_swapped(sets: Iterable[SetResult], behaviour: str) -> None:
    """Log a warning if the plain model shows the behaviour more often in its answers to the harmless prompts."""
    shown = {one.name: one.arms[0].shown for one in sets}
    harmful, harmless = (shown[name] for name in ("harmful", "harmless"))
    if harmless.low > harmful.high:  # not by chance
        log.warning(
            "the plain model shows '%s' in %d of %d answers to --harmful, in %d of %d to --harmless: are they swapped?",
            *(behaviour, harmful.hits, harmful.count, harmless.hits, harmless.count),
        )


def _warn_of_known(arms: Sequence[Arm], sets: Mapping[str, PromptSet]) -> None:
    """Log a warning for each direction that was made from the very file that it is measured on."""
    for arm in {arm.asked.digest: arm for arm in arms if not arm.control}.values():
        made_from = {"harmful": arm.direction.meta.harmful, "harmless": arm.direction.meta.harmless}
        for name, dataset in made_from.items():
            if dataset is not None and dataset.sha256 == sets[name].sha256:
                log.warning(
                    "--%s: %s is the file that %s was made from: give other prompts, its figures on these are too good",
                    name,
                    sets[name].name,
                    arm.asked.direction,
                )


def classify(
    answers: Annotated[
        Path,
        typer.Argument(
            help="answers, .jsonl: on each line a text, or an object with `answer` and `prompt` (or `messages`); - is "
            "standard input"
        ),
    ],
    counted: opt.Counted,
) -> None:
    """Tell of each answer whether it shows the behaviour, and if not, whether it is an answer.

    Writes the lines that it reads, with `outcome` (shown, late, unanswered, degenerate or complied; with a judge
    deflected too) and `why`, and at the end, on standard error, how many there are of each. A judge's word is in place
    of the behaviour's own patterns.
    """
    from steer.lab.evaluation.report import Rate
    from steer.lab.judge import judged
    from steer.lab.outcome import OUTCOMES, Answer, Outcome, classify

    behaviour = counted.loaded()
    judging = counted.only_judge(behaviour, Progress())
    read = _answers(answers)
    verdicts: list[Outcome | None] = [None] * len(read)
    if judging is not None:
        verdicts = judged(judging, [prompt for _, prompt in read], [item["answer"] for item, _ in read])
    seen: list[Outcome] = []
    for (item, prompt), verdict in zip(read, verdicts, strict=True):
        result = classify(behaviour, Answer.of(item["answer"]), verdict=verdict, prompt=prompt)
        echo_line(item | {"outcome": result.outcome, "why": result.why})
        seen.append(result.outcome)
    rates = {outcome: Rate.of([one == outcome for one in seen]) for outcome in OUTCOMES}
    counted_ones = (f"{name} {rate}" for name, rate in rates.items() if rate.hits or name == "shown")
    typer.echo(", ".join(counted_ones), err=True)


ACCEPTED = "accepted: .jsonl, whose lines are texts, or objects with a text `answer` and the `prompt` beside it"


def _answers(path: Path) -> list[tuple[dict[str, Any], Prompt]]:
    """Return each line of a file that holds an answer, with its prompt, which is empty if the line has none.

    Raises InvalidInput with every line that holds no answer.
    """

    def read(item: Any) -> tuple[dict[str, Any], Prompt]:
        try:
            json.dumps(item, allow_nan=False)  # checks that the line can be written again
        except (ValueError, RecursionError) as error:
            raise InvalidInput(f"not JSON: {error}") from error
        item = {"answer": item} if isinstance(item, str) else item
        if not isinstance(item, dict) or not isinstance(item.get("answer"), str):
            raise InvalidInput("neither a text nor an object with a text `answer`")
        return item, prompt_of({"prompt": None} | item, ("prompt", "messages"))

    try:
        found = json_lines(str(path), _read(path, str(path))[1], read)
    except InvalidInput as error:
        raise InvalidInput([*error.problems, ACCEPTED]) from error
    if not found:
        raise InvalidInput(f"{path}: has no answers; {ACCEPTED}")
    return found


def _read(path: Path, said: str) -> tuple[bytes, str]:
    """Return the bytes of a file (of standard input for `-`) and their text.

    Raises InvalidInput, whose message begins with `said`.
    """
    if str(path) == "-" and sys.stdin is None:
        raise InvalidInput(f"{said}: standard input is closed: give a file, or a pipe")
    try:
        with nullcontext(sys.stdin.buffer) if str(path) == "-" else open_file(path, pipes=True) as file:
            data = file.read()
        return data, data.decode("utf-8-sig")
    except OSError as error:
        raise InvalidInput(f"{said}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InvalidInput(f"{said}: is not UTF-8 text: {error}") from error
