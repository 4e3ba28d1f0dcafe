"""Who may do what: the policy file (TOML), which is parsed and checked as a whole before any of it is in force.

Every problem of a file is reported with its line. A file with a problem never takes effect, not even in part. Of the
secret of a key it has only the SHA-256: a secret has 256 random bits, so nobody finds it by trying, and a slow hash
would only make every request slow.
"""

from __future__ import annotations

import hashlib
import math
import re
import secrets
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    Field,
    PlainValidator,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails, InitErrorDetails
from typing_extensions import TypedDict

from steer import spec
from steer.errors import InvalidInput, brief, noted, problem_text, with_rules
from steer.files import open_file
from steer.names import MAX_SHIFT, MAX_STRENGTH, MODES, TURNING, Mode, check_name

if TYPE_CHECKING:
    from steer.shape import Shape

MAX_BYTES = 2**20
#: Bytes of one line: the time to parse a dotted key of TOML grows with the square of its length.
MAX_LINE = 2**13
#: Characters that are parsed once more to find the lines of problems. Problems after them are reported for line 1.
MAX_SEARCH = 2 * MAX_BYTES
#: No key of a policy is nested more deeply.
DEPTH = 8
#: In a key's list of directions: all of them, also those that are added later.
ANY = "*"
#: A `max_strength`: the calibrated strengths in each direction's file, and no strength if the file has none.
CALIBRATED = "calibrated"
#: How far a sum of strengths may exceed its limit.
ROUNDING = 1e-9
_KEY_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_HASH = re.compile("sha256:[0-9a-f]{64}")


class PolicyError(InvalidInput):
    """A policy file is not acceptable: `problems` has each with its line."""


def new_secret() -> str:
    """The secret of a new key, to be shown once and stored nowhere."""
    return "sk-steer-" + secrets.token_urlsafe(32)


def hash_of(secret: str) -> str:
    """What a policy file keeps of `secret`, which may be any text."""
    return "sha256:" + hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()


def _strength(value: object) -> object:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if value == CALIBRATED or (number and 0 <= value <= MAX_STRENGTH):  # type: ignore[operator]
        return value
    raise ValueError(f"{brief(value)} is not accepted: a number from 0 to {MAX_STRENGTH:g}, or '{CALIBRATED}'")


def _layers(value: object) -> str:
    if (found := spec.layer_range(value)) is None:
        raise ValueError(
            f"{brief(value)} is not accepted: the first and the last layer like '10-20', or one layer like 10"
        )
    return found


def _tokens(value: object) -> str:
    if (found := spec.tokens_rule(value)) is None:
        raise ValueError(f"{brief(value)} is not accepted: {', '.join(spec.TOKENS)}, or with a largest N like last-8")
    return found


Specs = Annotated[tuple[spec.RequestedDirection, ...], BeforeValidator(partial(spec.parse, param="spec"))]
Flag = Annotated[bool, Field(strict=True)]
Strength = Annotated[float | Literal["calibrated"], PlainValidator(_strength)]
Shift = Annotated[float, Field(strict=True, ge=0, le=MAX_SHIFT, allow_inf_nan=False)]
Tokens = Annotated[str, BeforeValidator(_tokens)]
AtOnce = Annotated[int, Field(strict=True, ge=1, le=10**6)]
PerMinute = Annotated[float, Field(strict=True, gt=0, le=1e9, allow_inf_nan=False)]


class Limits(BaseModel, extra="forbid", frozen=True):
    """What a spec may ask for: of one direction by every key, or (`KeyRules`) of all directions by one key. The
    strengths of one file add up."""

    max_strength: Strength = Field(
        MAX_STRENGTH, description="largest strength, on either side of 0; 'calibrated': what a direction's file says"
    )
    max_shift: Shift = Field(
        MAX_SHIFT, description="by how much a threshold may be shifted, up or down: lower, more text is steered"
    )
    norm_preserving: Flag | None = Field(
        None,
        description="true: the norm of the stream must be kept, as it always is in the modes that turn; false: a "
        "spec must not ask for it; by default it may",
    )
    tokens: tuple[Tokens, ...] | None = Field(
        None,
        description="at which tokens it may act, written as in a spec: a spec without `tokens` means all; last-N "
        "allows every N, last-8 at most 8",
    )
    layers: Annotated[str, BeforeValidator(_layers)] | None = Field(
        None, description="at which layers it may act, like '10-20': a spec must then name layers within these"
    )
    conditions: Flag | None = Field(
        None,
        description="whether a spec may have a condition (in `directions`: one on this direction). Whether it holds "
        "reveals something of the component, so by default a key may have conditions if it has `readout`",
    )
    with_tools: Flag = Field(True, description="whether a request with tools, or answers of tools, may be steered")

    @property
    def conditional(self) -> bool:
        """Whether a spec may have a condition."""
        return self.conditions is not False

    @property
    def largest(self) -> float:
        """The largest strength of any direction."""
        return MAX_STRENGTH if isinstance(self.max_strength, str) else self.max_strength

    def broken(self, items: Sequence[spec.RequestedDirection]) -> Iterator[str]:
        """The limits that `items` of one direction break, as far as can be known without its file."""
        total = sum(abs(item.strength or 0) for item in items)
        if total > self.largest + ROUNDING:
            yield f"strength {total:g} is over max_strength"
        for item in items:
            yield from (message for _, message in self.misplaced(item))

    def misplaced(self, item: spec.RequestedDirection | spec.Entry) -> Iterator[tuple[str, str]]:
        """(rule, message) for each limit that `item` breaks by where or when it acts."""
        if item.condition and not self.conditional:
            yield "conditions", "no condition is allowed"
        if item.shift is not None and abs(item.shift) > self.max_shift:
            allowed = f"at most {self.max_shift:g}" if self.max_shift else "none"
            yield "max_shift", f"the shift {item.shift:g} is not allowed; allowed: {allowed}"
        if self.norm_preserving is False and item.norm_preserving:
            yield "norm_preserving", "'norm_preserving' is not allowed"
        if self.norm_preserving and not (item.norm_preserving or item.mode in TURNING):
            yield "norm_preserving", "'norm_preserving' is required, or one of the modes " + ", ".join(TURNING)
        if self.tokens is not None and not any(spec.tokens_within(item.tokens, rule) for rule in self.tokens):
            allowed = ", ".join(self.tokens) or "none"
            yield "tokens", f"the tokens '{item.tokens or 'all'}' are not allowed; allowed: {allowed}"
        if self.layers is not None:
            first, last = spec.ends(self.layers)
            mine = (0, math.inf) if item.layers is None else spec.ends(item.layers)
            if mine[0] < first or mine[1] > last:
                yield "layers", f"the layers {item.layers or '(all)'} are not within {self.layers}, which are allowed"


class Bounds(TypedDict):
    """What the caller may ask for."""

    max_strength: Annotated[float, Field(description="largest strength, on either side of 0")]
    max_shift: Annotated[float, Field(description="largest shift of a threshold, up or down")]
    norm_preserving: Annotated[
        bool | None, Field(description="whether a spec must keep the norm (true) or must not ask for it; null: it may")
    ]
    calibrated: Annotated[bool, Field(description="whether calibrated strengths in the files of directions are limits")]
    tokens: Annotated[
        list[str], Field(description="what a spec may have as `tokens`; last-8 allows last-1 to last-8; [] nothing")
    ]
    layers: Annotated[str | None, Field(description="within which layers a spec must stay; null for all")]
    with_tools: Annotated[bool, Field(description="whether requests with tools may be steered")]
    conditions: Annotated[bool, Field(description="whether a spec may have a condition")]


def bounds(limits: Sequence[Limits], shape: Shape | None) -> Bounds:
    """What all of `limits` allow together. `shape`: that of the served model; None while it is not known."""
    known = spec.TOKENS if shape is None else shape.tokens
    tokens: list[str] | None = None
    layers: tuple[int, int] | None = None
    for each in limits:
        if each.tokens is not None:
            tokens = list(each.tokens) if tokens is None else spec.tokens_in_both(tokens, each.tokens)
        if each.layers is not None:
            first, last = spec.ends(each.layers)
            layers = (first, last) if layers is None else (max(first, layers[0]), min(last, layers[1]))
    kept = {each.norm_preserving for each in limits} - {None}
    if (layers is not None and layers[0] > layers[1]) or len(kept) > 1:
        tokens = []  # nothing is left
    return {
        "max_strength": min((each.largest for each in limits), default=MAX_STRENGTH),
        "max_shift": min((each.max_shift for each in limits), default=MAX_SHIFT),
        "norm_preserving": next(iter(kept), None),
        "calibrated": any(each.max_strength == CALIBRATED for each in limits),
        "tokens": [
            name for name in (spec.TOKENS if tokens is None else tokens) if name in known or name not in spec.TOKENS
        ],
        "layers": None if layers is None else spec.layer_range(f"{layers[0]}-{layers[1]}"),
        "with_tools": all(each.with_tools for each in limits),
        "conditions": (shape is None or shape.rank > 1) and all(each.conditional for each in limits),
    }


class KeyRules(Limits):
    """What the holder of one key may do. A key with nothing but a hash may make plain requests only."""

    hash: str | tuple[str, ...] = Field(
        description="what `steer keys new` printed: 'sha256:' and 64 hexadecimal digits; a list of two while a secret "
        "is being replaced"
    )
    steer: Flag = Field(True, description="whether it may ask for steering at all")
    directions: tuple[str, ...] = Field((), description="directions that it may see and use; '*' is all")
    modes: tuple[Mode, ...] = Field(MODES, description="modes that it may use")
    max_shift: Shift = Field(0.0, description="by how much it may shift a threshold, up or down")
    default: Specs | None = Field(None, description="steering of its requests that ask for none")
    required: Specs = Field((), description="steering of all its requests: applied last, and never switched off")
    manage: Flag = Field(False, description="whether it may upload and delete directions, and move the kill switch")
    readout: Flag = Field(False, description="whether it may read components along directions (`steer_readout`)")
    forms: Flag = Field(
        False,
        description="whether it may constrain answers to a schema, a grammar, a regular expression, a choice or its "
        "tools: the time and memory that an engine needs for one have no bound, and all other requests wait",
    )
    metrics: Flag = Field(False, description="whether it may read /metrics, which names all directions")
    requests_per_minute: PerMinute | None = Field(None, description="generation requests in a minute")
    tokens_per_minute: PerMinute | None = Field(None, description="tokens of prompts and answers in a minute")
    requests_at_once: AtOnce | None = Field(None, description="answers (prompts × n) generated at the same time")

    @property
    def conditional(self) -> bool:
        return self.readout if self.conditions is None else self.conditions

    @property
    def hashes(self) -> tuple[str, ...]:
        return (self.hash,) if isinstance(self.hash, str) else self.hash

    @property
    def named(self) -> set[str]:
        """The directions that are allowed by their names."""
        return {name for name in self.directions if name != ANY}

    def allows(self, direction: str) -> bool:
        return ANY in self.directions or direction in self.directions

    @field_validator("hash")
    @classmethod
    def _is_a_hash(cls, value: str | tuple[str, ...]) -> str | tuple[str, ...]:
        each = (value,) if isinstance(value, str) else value
        if not each or not all(map(_HASH.fullmatch, each)):
            raise ValueError("not a hash: 'sha256:' and 64 hexadecimal digits, as `steer keys new` prints it")
        return value

    @field_validator("directions")
    @classmethod
    def _are_names(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        _raise(((str(i),), problem) for i, name in enumerate(value) if name != ANY for problem in _name_problems(name))
        return value

    @model_validator(mode="after")
    def _default_is_within_the_rules(self) -> KeyRules:
        problems = []
        if self.default and not self.steer:
            problems.append("a key that may not steer has none; use 'required' to impose a direction")
        for item in self.default or ():
            for name in (each for each in item.names if not self.allows(each)):
                problems.append(f"'{name}' is not among this key's directions")
            if item.mode and item.mode not in self.modes:
                problems.append(f"'{item.mode}' is not among this key's modes")
            if item.direction in by_direction(self.required) and item not in self.required:
                problems.append(f"'{item.direction}' is required, and cannot be had in another way")
        for items in by_direction(self.default or ()).values():
            problems += self.broken(items)
        _raise((("default",), problem) for problem in problems)
        return self


class Policy(BaseModel, extra="forbid", frozen=True):
    """The whole file."""

    metrics_public: Flag = Field(False, description="whether /metrics can be read without a key")
    on_kill: Literal["finish", "abort"] = Field(
        "finish",
        description="what happens to running requests: to the steered ones when steering is switched off, and to all "
        "of a key when it is removed",
    )
    required_when_off: Literal["refuse", "plain"] = Field(
        "refuse", description="while steering is off, what requests of a key with required directions get"
    )
    directions: dict[str, Limits] = Field({}, description="rules of single directions")
    keys: dict[str, KeyRules] = Field(description="keys by name", min_length=1)
    _digest: str = ""

    @property
    def digest(self) -> str:
        """The SHA-256 of the file."""
        return self._digest

    @cached_property
    def names(self) -> dict[str, str]:
        """The names of keys by the stored hashes of their secrets. The time of a look-up reveals nothing about the
        stored hashes: Python's dict hashes strings with a random key of the process, and no other secret has the same
        SHA-256."""
        return {each: name for name, rules in self.keys.items() for each in rules.hashes}

    @field_validator("directions")
    @classmethod
    def _are_names(cls, value: dict[str, Limits]) -> dict[str, Limits]:
        _raise(((name,), problem) for name in value for problem in _name_problems(name))
        return value

    @field_validator("keys")
    @classmethod
    def _are_consistent(cls, value: dict[str, KeyRules], info: ValidationInfo) -> dict[str, KeyRules]:
        problems: list[tuple[tuple[str, ...], str]] = []
        owner: dict[str, str] = {}
        for name, rules in value.items():
            if not _KEY_NAME.fullmatch(name):
                problems.append(
                    ((name,), f"'{name}' is not a key's name: 1 to 64 of a to z, A to Z, 0 to 9, '.', '_' and '-'")
                )
            for each in rules.hashes:
                if owner.setdefault(each, name) != name:
                    problems.append(((name, "hash"), f"'{owner[each]}' and '{name}' have the same hash"))
            for direction, items in by_direction(rules.default or ()).items():
                if (limits := info.data.get("directions", {}).get(direction)) is not None:
                    broken = limits.broken(items)
                    problems += [((name, "default"), f"'{direction}': for any key {problem}") for problem in broken]
        _raise(problems)
        return value


def by_direction(items: Sequence[spec.RequestedDirection]) -> dict[str, list[spec.RequestedDirection]]:
    out: dict[str, list[spec.RequestedDirection]] = {}
    for item in items:
        out.setdefault(item.direction, []).append(item)
    return out


def _name_problems(name: str) -> Sequence[str]:
    problems: list[str] = []
    with noted(problems):
        check_name(name)
    return problems


def _raise(problems: Iterable[tuple[tuple[str, ...], str]]) -> None:
    """Raise a ValidationError with all problems, each with its place relative to the calling validator; nothing if
    there are none."""
    if found := [
        InitErrorDetails(type="value_error", loc=place, input=None, ctx={"error": ValueError(message)})
        for place, message in problems
    ]:
        raise ValidationError.from_exception_data("policy", found)


def load(path: Path) -> Policy:
    """Raises PolicyError with every problem, each with its line."""
    return read(fetch(path), path.name)


def fetch(path: Path) -> bytes:
    """The bytes of a policy file, at most MAX_BYTES + 1. Raises PolicyError, also for a path that is not a regular
    file."""
    try:
        with open_file(path) as file:
            return file.read(MAX_BYTES + 1)
    except OSError as error:
        raise PolicyError(f"{path}: cannot be read: {error.strerror}") from None


def read(data: bytes, name: str = "policy") -> Policy:
    """A policy from the bytes of its file. Raises PolicyError."""
    if len(data) > MAX_BYTES:
        raise PolicyError(f"{name}: over {MAX_BYTES} bytes")
    PolicyError.raise_for(
        f"{name}:{n}: over {MAX_LINE} bytes in one line"
        for n, line in enumerate(data.split(b"\n"), 1)
        if len(line) > MAX_LINE
    )
    try:
        text = data.decode("utf-8-sig")
        tree = tomllib.loads(text)
    except UnicodeDecodeError as error:
        raise PolicyError(f"{name}:{data[: error.start].count(10) + 1}: not UTF-8") from None
    except ValueError as error:  # not always a TOMLDecodeError: an integer of thousands of digits
        found = re.search(r"at line (\d+)", str(error))
        line = int(found[1]) if found else data.count(b"\n") + 1
        raise PolicyError(f"{name}:{line}: not TOML: {error}") from None
    except RecursionError:
        raise PolicyError(f"{name}:1: nested too deeply") from None
    try:
        policy = Policy.model_validate(tree)
    except ValidationError as error:
        lines = dict(_lines(text))
        problems = sorted({_problem(item, lines) for item in error.errors(include_url=False)})
        raise PolicyError(f"{name}:{line}: {message}" for line, message in problems) from None
    policy._digest = hashlib.sha256(data).hexdigest()
    return policy


def _problem(item: ErrorDetails, lines: dict[tuple[str, ...], int]) -> tuple[int, str]:
    """The line of a problem, and its message."""
    path = tuple(str(part) for part in item["loc"])
    while path and path not in lines and path[:-1]:
        path = path[:-1]
    where = ".".join(str(part) for part in item["loc"] if part not in ("str", "tuple[str, ...]"))
    table: type[BaseModel] = Policy if len(item["loc"]) == 1 else KeyRules
    if len(item["loc"]) > 1 and item["loc"][0] == "directions":
        table = Limits
    own = item["loc"] if table is Policy else item["loc"][2:]
    message = problem_text(*with_rules([{**item, "loc": own}], table))
    if item["type"] in ("dict_type", "model_type"):
        message = f"{brief(item['input'])} is not accepted: a table"
    if item["loc"] == ("keys",):
        message += "; `steer keys new NAME --policy FILE` adds a [keys.NAME]"
    return lines.get(path, 1), f"{where}: {message}"


def _lines(text: str) -> Iterator[tuple[tuple[str, ...], int]]:
    """Each key path of a valid TOML text, of tables and values, with the line on which it begins.

    Lines are joined until they parse as a statement of their own, so TOML's own rules decide where one ends.
    """
    table: tuple[str, ...] = ()
    pending, start, searched = "", 1, 0
    for number, line in enumerate(text.split("\n"), 1):
        pending, start = (f"{pending}\n{line}", start) if pending else (line, number)
        searched += len(pending)
        if searched > MAX_SEARCH:
            return
        try:
            found = tomllib.loads(pending)
        except ValueError:
            continue
        header = pending.lstrip().startswith("[")
        pending = ""
        paths = list(_paths(found))
        if header and paths:
            table = max(paths, key=len)
            yield table, start
        else:
            for path in paths:
                yield table + path, start


def _paths(tree: dict[str, object], depth: int = DEPTH) -> Iterator[tuple[str, ...]]:
    for key, value in tree.items():
        yield (key,)
        if isinstance(value, dict) and depth > 1:
            yield from ((key, *rest) for rest in _paths(value, depth - 1))
