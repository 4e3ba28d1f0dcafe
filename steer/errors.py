"""Every error that Steer raises on purpose, in one small tree, and the texts of problems in input.

SteerError
├── InvalidInput (ValueError)     the caller's input breaks a rule; `problems` lists every broken one
│   ├── DegenerateError           vectors that define no direction (zero, equal, antipodal, not finite)
│   ├── DirectionError            a direction file or its name is not acceptable
│   ├── SpecError                 the `steer` part of a request is not acceptable
│   └── RequestError              another part of a request is not acceptable
├── UnknownDirection (SpecError)  a request names a direction that is not served
├── NothingFound                  no direction has the wanted effect, so no file was written
├── UnsupportedModel              steering cannot be attached to a model, so nothing starts
│   └── hf.selfcheck.SelfCheckFailed     the transformers engine answers differently from `generate`
├── hf.internals.CannotBatch      transformers cannot batch the model: it is served one request at a time
├── NoRoom                        no rows are free (for a direction), or the queue is full (for a request)
├── RequestFailed                 one admitted request cannot be answered; the engine and all others go on
│   └── NotFinite                 where it is steered, its stream is out of the range of the model's dtype
└── EngineFailed                  the engine failed while it served an admitted request
"""

from __future__ import annotations

import itertools
import reprlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from importlib import import_module
from typing import TYPE_CHECKING, Any, get_args

if TYPE_CHECKING:
    from pydantic import BaseModel, ValidationError
    from pydantic_core import ErrorDetails

#: How many problems of one input are reported, and the characters of one, since an input can be of any size.
MAX_PROBLEMS = 16
MAX_PROBLEM = 1000


def printable(text: str) -> str:
    """`text` for a log, an answer or a terminal: escaped, and cut after MAX_PROBLEM characters."""
    return escaped(text if len(text) <= MAX_PROBLEM else f"{text[:MAX_PROBLEM]}… ({len(text)} characters)")


def escaped(text: str) -> str:
    """`text` with escapes in place of control characters and of halves of surrogate pairs. JSON can carry both; in a
    log, an answer or a terminal they do harm."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type if it has no message."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


class _Brief(reprlib.Repr):
    def repr_bool(self, x: bool, level: int) -> str:
        return str(x).lower()

    def repr_NoneType(self, x: None, level: int) -> str:
        return "null"

    def repr_int(self, x: int, level: int) -> str:
        """A long integer by its size: Python refuses to write one of thousands of digits."""
        return repr(x) if x.bit_length() <= 128 else f"an integer of {x.bit_length()} bits"


def brief(value: object, *, python: bool = False) -> str:
    """A value in at most 60 characters, for a message. Written as in JSON (true, null), or as in Python (True, None) if
    `python`."""
    own = isinstance(value, str) or (python and isinstance(value, bool | None))
    shown = repr(value[:60] if isinstance(value, str) else value) if own else _Brief().repr(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, for `object_pairs_hook`. Raises ValueError for a duplicate key: parsers differ in which value they
    take."""
    if (twice := first_duplicate(pairs)) is not None:
        raise ValueError(f"the key {brief(twice)} stands twice")
    return dict(pairs)


def first_duplicate(pairs: Iterable[tuple[str, object]]) -> str | None:
    """The first key that occurs a second time, or None."""
    seen: set[str] = set()
    for key, _ in pairs:
        if key in seen:
            return key
        seen.add(key)
    return None


#: What is accepted, by pydantic's type of the error. A name that ends in _ stands for all types that begin so.
_ACCEPTED = {
    "bool_": "true or false",
    "bytes_": "a text",
    "dataclass_": "an object",
    "dict_": "an object",
    "enum": "{expected}",
    "finite_": "a number",
    "float_": "a number",
    "int_": "a whole number",
    "iterable_": "a list",
    "list_": "a list",
    "literal_": "{expected}",
    "mapping_": "an object",
    "model_": "an object",
    "multiple_of": "a multiple of {multiple_of}",
    "none_": "null",
    "path_": "a path",
    "string_pattern_mismatch": "a text that matches {pattern}",
    "string_too_long": "a text of at most {max_length} characters",
    "string_too_short": "a text of at least {min_length} characters",
    "string_": "a text",
    "too_long": "at most {max_length} of them",
    "too_short": "at least {min_length} of them",
    "tuple_": "a list",
    "union_tag_": "one of {expected_tags}",
}
#: pydantic's names for the limits of a number.
_ENDS = frozenset(("gt", "ge", "lt", "le"))
#: pydantic's names for the types that it tries for a union.
_UNION_LABELS = frozenset(("str", "int", "float", "bool", "list", "dict", "nullable", "union"))


def describe_expected(kind: str, limits: Mapping[str, object]) -> str:
    """What is accepted, for pydantic's type of an error and its limits; empty for a type that `_ACCEPTED` lacks."""
    exact = kind if kind in _ACCEPTED else next((k for k in _ACCEPTED if k.endswith("_") and kind.startswith(k)), None)
    shown = {name: f"{limit:g}" if isinstance(limit, float) else str(limit)[:200] for name, limit in limits.items()}
    if _ENDS & shown.keys():
        return f"a number{_range(**shown)}"
    if exact is None:
        return ""
    try:
        return _ACCEPTED[exact].format(**shown)
    except KeyError:
        return ""


def _range(gt: str = "", ge: str = "", lt: str = "", le: str = "", **_: str) -> str:
    low = f" above {gt}" if gt else f" from {ge}" if ge else ""
    high = f" below {lt}" if lt else f" {'to' if low else 'up to'} {le}" if le else " up" if ge else ""
    return low + high


def with_rules(items: Iterable[ErrorDetails], model: type[BaseModel]) -> list[ErrorDetails]:
    """The items of a ValidationError of `model`, each with what pydantic leaves out: both ends of the range of a number
    (it gives only the end that the number is beyond), and for an unknown field the names of the fields."""
    out: list[ErrorDetails] = list(items)
    for item in out:
        if item["type"] == "extra_forbidden" and len(item["loc"]) == 1:
            item["ctx"] = {"fields": list(model.model_fields)}
        field = model.model_fields.get(str(next(iter(item["loc"]), "")))
        if field is not None and _ENDS & (ctx := item.get("ctx", {})).keys():
            of_union = [info for kind in get_args(field.annotation) for info in getattr(kind, "__metadata__", ())]
            rules = [rule for info in (field, *of_union) for rule in getattr(info, "metadata", ())]
            item["ctx"] = ctx | {name: getattr(rule, name) for rule in rules for name in _ENDS if hasattr(rule, name)}
    return out


def unknown_field(name: str, fields: Iterable[str], listed: bool = True) -> str:
    """The problem of a field that is none of `fields`, with the one that may be meant; `listed`: with all of them."""
    fields = list(fields)
    near = get_close_matches(name[:40], fields, 1, 0.8)
    meant = f" (did you mean {near[0]}?)" if near else ""
    return f"unknown field{meant}" + (f"; accepted: {', '.join(fields) or 'none'}" if listed else "")


def problem_text(item: ErrorDetails) -> str:
    """An item of a pydantic ValidationError as a sentence: the value, and what would be accepted."""
    if item["type"] == "missing":
        return "missing; it is required"
    if item["type"] == "extra_forbidden":
        fields = item.get("ctx", {}).get("fields")
        return unknown_field(str(item["loc"][-1]), fields or (), listed=fields is not None)
    if item["type"] == "json_invalid":
        return f"not JSON: {item['ctx']['error']}"
    if item["type"] == "value_error":
        return str(item["ctx"]["error"])[:MAX_PROBLEM]
    what = describe_expected(item["type"], item.get("ctx", {}))
    if what == "a number" and isinstance(item.get("input"), str) and "," in item["input"]:
        what += " (with a decimal point, like 0.5)"
    if what == "a list" and isinstance(item.get("input"), str):
        what = f"a list, like [{brief(item['input'])}]"
    return f"{brief(item.get('input'))} is not accepted{what and f': {what}'}"


def field_path(place: Iterable[int | str], unknown: bool = False) -> list[str]:
    """The path of a field, from pydantic's, which also names validators and types of a union. `unknown`: the last part
    is the name of an unknown field, whatever it looks like."""
    parts = [str(part)[:100] for part in place]
    own = parts[-1:] if unknown else []
    parts = [part for part in parts[: len(parts) - len(own)] if not part.startswith("function-")]
    path = list(itertools.takewhile(lambda part: not _names_a_type(part), parts))
    return path + own if len(path) == len(parts) else path


def _names_a_type(part: str) -> bool:
    return "[" in part or part in _UNION_LABELS or part[:1].isupper() or part.startswith("constrained-")


def problems_by_field(items: Iterable[ErrorDetails], whole: str) -> dict[str, str]:
    """The problem of each field, from the items of a pydantic ValidationError. For a field with several types it says
    what each of them accepts. A problem of no field is under the name `whole`."""
    found: dict[str, list[ErrorDetails]] = {}
    for item in items:
        path = field_path(item["loc"], item["type"] == "extra_forbidden")
        found.setdefault(".".join(path) or whole, []).append(item)
    problems = {}
    for field, (first, *others) in found.items():
        also = dict.fromkeys(describe_expected(item["type"], item.get("ctx", {})) for item in others)
        own = describe_expected(first["type"], first.get("ctx", {}))
        problems[field] = ", or ".join([problem_text(first), *(each for each in also if own and each and each != own)])
    return problems


def problems_of(error: ValidationError, whole: str, model: type[BaseModel]) -> Iterator[str]:
    """Each problem of `error`, a ValidationError of `model`, as "field: problem"; see `problems_by_field`."""
    for field, problem in problems_by_field(with_rules(error.errors(include_url=False), model), whole).items():
        yield f"{field}: {problem}"


class SteerError(Exception):
    """Root of the tree."""


class InvalidInput(SteerError, ValueError):
    """Input that breaks rules. `problems` has every broken rule once, and the message joins them. `param`: the field of
    the request or file that is at fault, if there is one."""

    def __init__(self, problems: str | Iterable[str], param: str | None = None) -> None:
        each = (problems,) if isinstance(problems, str) else tuple(dict.fromkeys(problems))
        more = [f"and {len(each) - MAX_PROBLEMS} more"] if len(each) > MAX_PROBLEMS else []
        self.problems: tuple[str, ...] = (*map(printable, each[:MAX_PROBLEMS]), *more)
        self.param = param
        super().__init__("; ".join(self.problems))

    @classmethod
    def raise_for(cls, problems: Iterable[str], param: str | None = None) -> None:
        """Raise the error if there are problems."""
        if each := tuple(problems):
            raise cls(each, param)


@contextmanager
def noted(problems: list[str], kind: type[InvalidInput] = InvalidInput) -> Iterator[None]:
    """Collect the problems of an error of this `kind`, which ends the block, to report all of them together later."""
    try:
        yield
    except kind as error:
        problems += error.problems


@contextmanager
def prefixed(begin: str, kind: type[InvalidInput] = InvalidInput) -> Iterator[None]:
    """Put `begin` (a file, a layer) before each problem of an error of this `kind`."""
    try:
        yield
    except kind as error:
        raise type(error)((f"{begin}: {problem}" for problem in error.problems), param=error.param) from error


def imported(module: str, what: str, install: str) -> Any:
    """Import a module that is not installed with Steer. Raises InvalidInput, which says that `what` needs it."""
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        if error.name not in (package, module):
            raise  # the package is installed, and one of its own dependencies is missing
        raise InvalidInput(f"{what} needs the package {package} (pip install {install})") from error


class DegenerateError(InvalidInput):
    """Vectors that define no direction."""


class DirectionError(InvalidInput):
    """A direction file, or the name to serve it under, is not acceptable."""


class SpecError(InvalidInput):
    """The `steer` part of a request is not acceptable."""


class RequestError(InvalidInput):
    """A part of a request other than `steer` is not acceptable."""


class UnknownDirection(SpecError):
    """A request names a direction that is not served."""


class NothingFound(SteerError):
    """No direction was found that removes the behaviour without harm."""


class UnsupportedModel(SteerError):
    """The model cannot be loaded, or steering cannot be attached to all of its layers and checked."""


class NoRoom(SteerError):
    """A bounded resource (rows of the direction bank, the request queue) is full at this moment."""


class RequestFailed(SteerError):
    """One admitted request cannot be answered; the engine and all other requests go on."""


class NotFinite(RequestFailed):
    """Where a request is steered, its residual stream would be out of the range of the model's dtype."""

    def __init__(self, where: str = "") -> None:
        super().__init__(
            f"{where and where + ': '}the steered residual stream is out of the range of the model's numbers, so there "
            "is no answer: ask for less strength, or, where it is so unsteered too, load the model in a dtype of more "
            "range (bfloat16, float32)"
        )


class EngineFailed(SteerError):
    """The engine failed while it served an admitted request."""
