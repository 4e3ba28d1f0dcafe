"""The request language: what a client may write to ask for steering, and its one canonical form.

A request names directions, never paths or vectors. As text:

    refusal                      the direction with its file's own mode and strength
    refusal=0.7                  a strength
    refusal:one_sided=0.7        a mode and a strength
    refusal:one_sided^0.25=0.7   the mode's threshold shifted up by a quarter of the distance between the class means
    refusal:ablate:norm=0.7      the stream keeps its norm
    refusal@answer=0.7           only at some tokens; refusal:one_sided@not-first=0.7
    refusal@10-20=0.7            only at some layers; refusal@10-20@answer=0.7
    refusal?harm@12>0.3          only for some requests: see `Condition`; refusal:one_sided@13-20?harm@12<0.3=0.7
    refusal?each:harm@12>0.3     only at tokens that meet the condition, which each token decides for itself
    refusal,verbosity=0.5        several directions, which act together
    off                          plain, also if the server has a default

As JSON: such a text, an object `{"direction", "mode", "strength", "shift", "norm_preserving", "layers", "tokens", "if",
"digest"}`, a list of texts and objects (a receipt is one), `null` or `false`.

Parsing gives `RequestedDirection` items; the registry resolves them into a `Spec` of exact file versions.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import chain, islice
from numbers import Integral, Real

from steer.errors import DirectionError, SpecError, brief, unique_keys, unknown_field
from steer.names import MAX_SHIFT, MAX_STRENGTH, MODES, Mode, check_name
from steer.tokenization import Phase, Thinking

MAX_ITEMS = 16
#: Characters of a spec as text: no longer one could be accepted.
MAX_TEXT = 8192
#: Characters that are compared of a name with non-ASCII characters, each of which can stand for up to 18.
MAX_NAME = 256
_MENTION = re.compile(r"(?<![^\W_])(?:x[\W_]*)?steer", re.IGNORECASE)
OFF_TEXTS = {"off", "none", "null", "false"}
_FIELDS = ("direction", "mode", "strength", "shift", "norm_preserving", "layers", "tokens", "if", "digest")
ACCEPTED = (
    "accepted: a text like 'refusal', 'refusal=0.7' or 'refusal:one_sided=0.7,other=1', an object "
    f"{{{', '.join(map(repr, _FIELDS))}}}, a list of those, or null, false or 'off' for none"
)
#: What follows the mode in a text that asks for the norm to be kept.
NORM = ":norm"
#: The positions of a request at which an entry can act, each with a sentence for users. `N` is a number of positions.
TOKENS = {
    "all": "Every position, which is the default.",
    "prompt": "Every position of the prompt except its last.",
    "answer": "The last position of the prompt, where the answer's first token is predicted, and all after it.",
    "not-first": "All but the first position, which is BOS in most models.",
    "first-N": "The first N positions of the prompt.",
    "last-N": "The last N positions of the prompt.",
    "thinking": "From the position that predicts the first token of the model's thinking to the one before its end.",
    "after-thinking": "From the token that ends the model's thinking on, which predicts the first one of the answer.",
}
#: Those of `TOKENS` that depend on the tokens of the answer.
PHASES = ("thinking", "after-thinking")
#: The first and the last layer, 0-based, or one layer. No model has layers of five digits.
_LAYERS = re.compile(r"(\d{1,4})(?:-(\d{1,4}))?", re.ASCII)
_MEANT_LAYERS = re.compile(r"(l|layers?)?\W?\d", re.ASCII | re.IGNORECASE)
_COUNTED = re.compile(r"(first|last)-([1-9][0-9]{0,8})")
#: The fields of a condition, and its text form: a direction, a layer, a side and a number.
_CONDITION_FIELDS = ("direction", "layer", "above", "below", "each", "digest")
_DIGEST = re.compile(r"[0-9a-f]{12,64}")
_CONDITION = re.compile(r"\s*(?:(each)\s*:)?([^@<>]*)@\s*(\d{1,4})\s*([<>])([^<>]*)", re.ASCII)
_SIDES = {">": "above", "<": "below"}
_NO_SIDE = re.compile(r"[<>]=|=[<>]|[≤≥]")
#: The largest number in a condition; no component is near it.
MAX_COMPONENT = 1e30
#: Beyond every position.
END = 2**62
#: How many different `tokens` the entries of one request can have, and how many combinations of these can act at one
#: token: for A and B that is A, B, and both.
MAX_PLACES, MAX_TOGETHER = 2, 3


@dataclass(frozen=True, slots=True)
class Condition:
    """An entry with a condition acts only in some requests: those in which the component of the stream along the (only)
    row of a direction, at the output of `layer` and at the prompt's last token, is above a number, or below one.

    With `each` (None is False) every token decides for itself, and the entry acts at the tokens that meet the
    condition. `digest`: the version of the direction; empty before it is resolved, if any version will do.
    """

    direction: str
    layer: int
    above: float | None = None
    below: float | None = None
    digest: str = ""
    each: bool | None = None

    def __str__(self) -> str:
        return self.of(self.direction)

    def of(self, direction: str) -> str:
        """The text form, with `direction` in place of the direction's name."""
        side, number = ("<", self.below) if self.above is None else (">", self.above)
        return f"{'each:' if self.each else ''}{direction}@{self.layer}{side}{number!r}"


@dataclass(frozen=True, slots=True)
class RequestedDirection:
    """One direction as a client asked for it; None for what the client leaves to the direction's file. `digest`: of the
    only acceptable version, or the beginning of it."""

    direction: str
    mode: Mode | None = None
    strength: float | None = None
    layers: str | None = None
    tokens: str | None = None
    condition: Condition | None = None
    shift: float | None = None
    digest: str | None = None
    norm_preserving: bool | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all directions that it needs."""
        return (self.direction,) if self.condition is None else (self.direction, self.condition.direction)


@dataclass(frozen=True, slots=True)
class Entry:
    """One direction as it is applied.

    Attributes:
        digest: the exact version.
        layers: where it acts, like 10-20; None for all layers. With a condition: layers after the condition's.
        tokens: where it acts, see `TOKENS`; None for all. With a condition: the answer, unless each token decides.
        shift: how far the mode's threshold is shifted up, in distances between the class means; None for not at all.
        norm_preserving: whether the stream keeps its norm; None for False.
    """

    direction: str
    digest: str
    mode: Mode
    strength: float
    layers: str | None = None
    tokens: str | None = None
    condition: Condition | None = None
    shift: float | None = None
    norm_preserving: bool | None = None

    @property
    def range(self) -> tuple[int, int]:
        """The first and the last of its `layers`, which must not be None."""
        return ends(self.layers or "")

    def span(self, prompt: int) -> tuple[int, int]:
        """The half-open range of positions at which it acts in a request whose prompt has `prompt` tokens; for `PHASES`
        the positions at which it may act."""
        if self.tokens is None:
            return 0, END
        match self.tokens:
            case "prompt":
                return 0, prompt - 1
            case "answer" | "thinking" | "after-thinking":
                return prompt - 1, END
            case "not-first":
                return 1, END
        counted = _COUNTED.fullmatch(self.tokens)
        assert counted is not None, "parsed"
        number = min(int(counted[2]), prompt)
        return (0, number) if counted[1] == "first" else (prompt - number, prompt)


@dataclass(frozen=True, slots=True)
class Spec:
    """The steering of one request, resolved: entries that act together, in any order. Empty for a plain request."""

    entries: tuple[Entry, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.entries)

    def receipt(self) -> str:
        """Canonical compact JSON, ASCII: the value of the header `X-Steer-Applied`."""
        return json.dumps(self.described, separators=(",", ":"))

    @classmethod
    def of(cls, receipt: str) -> Spec:
        """Parse a receipt."""
        entries = []
        for fields in json.loads(receipt):
            condition = fields.pop("if", None)
            entries.append(Entry(**fields, condition=condition and Condition(**condition)))
        return cls(tuple(entries))

    @property
    def described(self) -> list[dict[str, object]]:
        """Each entry as JSON, without its null fields."""
        return [_described(asdict(entry)) for entry in self.entries]

    @property
    def condition(self) -> Condition | None:
        """The condition of all entries, if they have one."""
        return next((entry.condition for entry in self.entries), None)

    @property
    def decided_once(self) -> bool:
        """Whether the entries have a condition that is decided once for the whole request."""
        return self.condition is not None and not self.condition.each

    @property
    def phased(self) -> str | None:
        """The phase (of `PHASES`) in which all entries act, if they act in one."""
        return next((entry.tokens for entry in self.entries if entry.tokens in PHASES), None)

    def phase(self, thinking: Thinking | None, prompt: Sequence[int]) -> Phase | None:
        """`phased` for a request with this prompt. `thinking`: the model's."""
        if self.phased is None:
            return None
        assert thinking is not None, "the registry admits no other"
        return thinking.phase(self.phased, prompt)

    @property
    def everywhere(self) -> bool:
        """Whether every entry acts at all tokens."""
        return all(entry.tokens is None for entry in self.entries)

    def key(self, prompt: int = 0) -> str:
        """A text that is equal for two requests exactly if the same is computed: digests, modes, whether the norm is
        kept, shifts, strengths, layers, and positions in a request whose prompt has `prompt` tokens. Two names of one
        file give the same key."""
        return ",".join(
            f"{e.digest}:{e.mode}{variant(e)}={e.strength!r}{_layers(e)}{_positions(e, prompt)}" for e in self.entries
        )


def _described(fields: dict[str, object]) -> dict[str, object]:
    return {
        "if" if key == "condition" else key: _described(value) if isinstance(value, dict) else value
        for key, value in fields.items()
        if value is not None
    }


def variant(item: RequestedDirection | Entry) -> str:
    """What follows the mode in a text: that the norm is kept, and the shift."""
    shift = "" if item.shift is None else f"^{item.shift!r}"
    return f"{NORM if item.norm_preserving else ''}{shift}"


def _layers(entry: Entry) -> str:
    return f"@layers {entry.layers}" if entry.layers else ""


def _positions(entry: Entry, prompt: int) -> str:
    condition = f"?{entry.condition.of(entry.condition.digest)}" if entry.condition else ""
    if entry.tokens is None:
        return condition
    start, stop = entry.span(prompt)
    phase = entry.tokens if entry.tokens in PHASES else ""
    return (f"@{phase}{start}-" if stop == END else f"@{start}-{stop}") + condition


def parse(value: object, param: str = "steer") -> tuple[RequestedDirection, ...]:
    """Parse one carrier's value: text, or parsed JSON. An empty result means plain.

    Raises SpecError with every problem. Each names `param`.
    """
    problems: list[str] = []
    items = _items(value, param, problems)
    seen: set[tuple[str, Mode | None]] = set()
    for item in items:
        if (item.direction, item.mode) in seen:
            problems.append(f"{param}: direction '{item.direction}' is named twice")
        seen.add((item.direction, item.mode))
    if problems:
        raise SpecError(problems, param)
    return tuple(items)


def bare(name: str) -> str:
    """A name in lower case, with letters and digits only, since people vary the rest. A very long name is cut."""
    letters = name[:MAX_TEXT].casefold() if name.isascii() else chain.from_iterable(map(_alike, name[:MAX_NAME]))
    return "".join(islice(filter(str.isalnum, letters), 64))


@lru_cache(2**14)
def _alike(char: str) -> str:
    """The compatibility characters (NFKC) of a character, in lower case; up to 18."""
    return unicodedata.normalize("NFKC", char).casefold()


def nearly(name: str) -> bool:
    """Whether a field or header with this name is meant to steer: its name, or the part after the last dot, begins with
    `steer` or `X-Steer`."""
    return any(bare(each).startswith(("steer", "xsteer")) for each in {name, name.rpartition(".")[2]})


def decimal_comma_hint(name: str) -> str:
    """A hint for a direction that does not exist and has a number for a name: a comma begins another direction."""
    hint = "; in a number write a decimal point, as refusal=0.7, and layers as a range, as refusal@7-8"
    return hint if name.isdecimal() else ""


def mentions(words: str) -> bool:
    """Whether one of these words begins like the name of a field or header that is meant to steer."""
    return _MENTION.search(words) is not None


def text(wanted: Sequence[RequestedDirection | Entry]) -> str:
    """The text form, which `parse` reads back. It has no digests."""
    return ",".join(_text(item) for item in wanted) or "off"


def _text(item: RequestedDirection | Entry) -> str:
    mode = f":{item.mode}" if item.mode else ""
    where = "".join(f"@{each}" for each in (item.layers, item.tokens) if each)
    condition = f"?{item.condition}" if item.condition else ""
    strength = "" if item.strength is None else f"={item.strength!r}"
    return f"{item.direction}{mode}{variant(item)}{where}{condition}{strength}"


def _items(value: object, param: str, problems: list[str]) -> list[RequestedDirection]:
    if value is None or value is False:
        return []
    if isinstance(value, str):
        return _from_text(value, param, problems)
    if isinstance(value, Mapping):
        item = _from_object(value, param, problems)
        return [item] if item else []
    if isinstance(value, list | tuple):
        if len(value) > MAX_ITEMS:
            problems.append(f"{param}: {len(value)} directions, at most {MAX_ITEMS} are accepted")
            return []
        items: list[RequestedDirection] = []
        for index, part in enumerate(value):
            where = f"{param}[{index}]"
            if isinstance(part, str) and len(value) > 1 and part.strip().lower() in OFF_TEXTS:
                problems.append(f"{where}: {brief(part)} cannot be combined with other items")
            elif isinstance(part, str | Mapping):
                items += _items(part, where, problems)
            else:
                problems.append(f"{where}: {brief(part)} is not a direction; {ACCEPTED}")
        return items
    problems.append(f"{param}: {brief(value)} is not understood; {ACCEPTED}")
    return []


def _from_text(value: str, param: str, problems: list[str]) -> list[RequestedDirection]:
    stripped = value.strip()
    if len(stripped) > MAX_TEXT:
        problems.append(f"{param}: a text of {len(stripped)} characters, at most {MAX_TEXT} are accepted")
        return []
    if stripped.lower() in OFF_TEXTS:
        return []
    if not stripped:
        problems.append(f"{param}: is empty; {ACCEPTED}")
        return []
    if stripped[:1] in ("{", "["):
        try:
            loaded = json.loads(stripped, object_pairs_hook=unique_keys)
        except (ValueError, RecursionError) as error:  # a plain ValueError for an integer of thousands of digits
            problems.append(f"{param}: not JSON: {error}")
            return []
        return _items(loaded, param, problems)
    items: list[RequestedDirection] = []
    parts = stripped.split(",")
    if len(parts) > MAX_ITEMS:
        problems.append(f"{param}: {len(parts)} directions, at most {MAX_ITEMS} are accepted")
        return []
    for part in parts:
        if side := _NO_SIDE.search(part):
            problems.append(f"{param}.if: '{side[0]}' is not accepted: '>' or '<', like 'harm@12>0.3'")
            continue
        head, equals, number = part.strip().partition("=")
        head, question, condition = head.partition("?")
        head, *where = (each.strip() for each in head.split("@"))
        head, caret, shift = head.partition("^")
        before, colon, last = head.rpartition(":")
        keeps = f"{colon}{last.strip()}" == NORM
        name, colon, mode = (before if keeps else head).partition(":")
        fields: dict[object, object] = {
            "direction": name.strip(),
            "mode": mode.strip() if colon else None,
            "strength": _number(number) if equals else None,
            "shift": _number(shift) if caret else None,
            "norm_preserving": keeps,
            **_where(param, where, problems),
            "if": condition if question else None,
        }
        if item := _from_object(fields, param, problems):
            items.append(item)
    return items


def _from_object(value: Mapping[object, object], param: str, problems: list[str]) -> RequestedDirection | None:
    for key in islice((str(key) for key in value if key not in _FIELDS), MAX_ITEMS):
        problems.append(f"{param}.{key[:40]}: {unknown_field(key, _FIELDS)}")
    if "direction" not in value:
        problems.append(f"{param}.direction: missing; it names the direction, like {{'direction': 'refusal'}}")
        return None
    name, mode, strength, shift, keeps, layers, tokens, condition, digest = map(value.get, _FIELDS)
    before = len(problems)
    known = next((each for each in MODES if each == mode), None)
    named = ""
    if not isinstance(name, str):
        problems.append(f"{param}.direction: {brief(name)} is not a text")
    else:
        try:
            named = check_name(name)
        except DirectionError as error:
            several = "; several are separated by commas" if re.search(r"\w[;+|&\s]+\w", name[:MAX_NAME]) else ""
            problems.append(f"{param}: {error}{several}")
    if mode is not None and known is None:
        number = isinstance(mode, str) and not isinstance(_number(mode), _Unread)
        strength_of = f"; a strength stands after '=', as {named or 'refusal'}={mode}" if number else ""
        problems.append(
            f"{param}.mode: {brief(mode)} is not a mode; accepted: {', '.join(MODES)}{strength_of}{_order(mode)}"
        )
    strength_ = None if strength is None else _within(strength, MAX_STRENGTH, f"{param}.strength", problems)
    shift_ = None if shift is None else _within(shift, MAX_SHIFT, f"{param}.shift", problems)
    if not isinstance(keeps, bool | None):
        problems.append(f"{param}.norm_preserving: {brief(keeps)} is not accepted: true or false")
    place = None
    if tokens is not None:
        if isinstance(tokens, str) and (tokens in TOKENS.keys() - {"first-N", "last-N"} or _COUNTED.fullmatch(tokens)):
            place = None if tokens == "all" else tokens
        else:
            problems.append(f"{param}.tokens: {brief(tokens)} is not accepted: {', '.join(TOKENS)}{_order(tokens)}")
    span = None if layers is None else layer_range(layers)
    if layers is not None and span is None:
        problems.append(
            f"{param}.layers: {brief(layers)} is not accepted: the first and the last layer like '10-20' (the first "
            f"not after the last), or one layer like 10, and the first of all is 0{_order(layers)}"
        )
    version = None if digest is None else _digest(digest, param, problems)
    decided = None if condition is None else _condition(condition, param, problems)
    if decided is not None and decided.each:
        if place in PHASES:
            problems.append(f"{param}.tokens: '{place}' is not accepted under a condition")
    elif condition is not None and tokens not in (None, "answer"):
        problems.append(
            f"{param}.tokens: {brief(tokens)} is not accepted under a condition, which is decided at the prompt's last "
            "token: 'answer', or nothing, which means the same"
        )
    if len(problems) > before:
        return None
    place = "answer" if decided and not decided.each else place
    kept = True if keeps else None
    return RequestedDirection(named, known, strength_, span, place, decided, shift_ or None, version, kept)


def _digest(value: object, param: str, problems: list[str]) -> str | None:
    """The digest of a version, or the beginning of one; None for anything else, with a problem."""
    if isinstance(value, str) and _DIGEST.fullmatch(value):
        return value
    problems.append(
        f"{param}.digest: {brief(value)} is not accepted: the first 12 to 64 digits of a digest, 0 to 9 and a to f"
    )
    return None


def _within(value: object, most: float, field: str, problems: list[str], accepted: str = "") -> float | None:
    """A number from -most to most; None for anything else, with a problem. `accepted`: another name for such a
    number."""
    value = float(value) if isinstance(value, Real) and not isinstance(value, int) else value  # of numpy too
    if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= most:
        return float(value) + 0.0  # which turns -0.0 into 0.0
    shown = value if isinstance(value, _Unread) else brief(value)  # NaN too
    accepted = accepted or f"a number from {-most:g} to {most:g}"
    problems.append(f"{field}: {shown} is not accepted: {accepted}{_order(value)}")
    return None


def _order(value: object) -> str:
    """A hint about the order of the parts of a spec, for a value that seems to contain another part."""
    misplaced = isinstance(value, str) and any(sign in value for sign in ":^@?=")
    return "; the order is name:mode:norm^shift@where?condition=strength" if misplaced else ""


def _condition(value: object, param: str, problems: list[str]) -> Condition | None:
    """Parse a condition, from text or from an object."""
    given, found = value, _CONDITION.fullmatch(value) if isinstance(value, str) else None
    if found:
        value = {"direction": found[2].strip(), "layer": int(found[3]), _SIDES[found[4]]: _number(found[5])}
        value |= {"each": True} if found[1] else {}
    if not isinstance(value, Mapping) or "direction" not in value or "layer" not in value:
        problems.append(
            f"{param}.if: {brief(given)} is not a condition; accepted: a direction, a layer and a number like "
            "'harm@12>0.3', 'harm@12<0.3' or 'each:harm@12>0.3', or an object {'direction', 'layer', 'above' or "
            "'below', 'each'}"
        )
        return None
    before, name, layer, number = len(problems), value["direction"], value["layer"], None
    for key in islice((str(key) for key in value if key not in _CONDITION_FIELDS), MAX_ITEMS):
        problems.append(f"{param}.if.{key[:40]}: {unknown_field(key, _CONDITION_FIELDS)}")
    try:
        name = check_name(name if isinstance(name, str) else "")
    except DirectionError as error:
        problems.append(f"{param}.if.direction: {error}")
    layer = int(layer) if isinstance(layer, Integral) and not isinstance(layer, bool) else layer
    if not isinstance(layer, int) or isinstance(layer, bool) or not 0 <= layer <= 9999:
        problems.append(f"{param}.if.layer: {brief(layer)} is not accepted: one layer like 12")
    sides = [side for side in _SIDES.values() if value.get(side) is not None]
    if len(sides) != 1:
        problems.append(f"{param}.if: it says {' and '.join(sides) or 'neither side'}; accepted: 'above' or 'below'")
    for side in sides:
        accepted = "a number, the component to compare with"
        number = _within(value[side], MAX_COMPONENT, f"{param}.if.{side}", problems, accepted)
    if (each := value.get("each")) is not None and not isinstance(each, bool):
        problems.append(f"{param}.if.each: {brief(each)} is not accepted: true or false")
    version = None if value.get("digest") is None else _digest(value["digest"], f"{param}.if", problems)
    if len(problems) > before:
        return None
    above, below = (number if side in sides else None for side in _SIDES.values())
    return Condition(name, layer, above, below, version or "", True if each else None)


def ends(layers: str) -> tuple[int, int]:
    """The first and the last layer of a range in its canonical text."""
    first, _, last = layers.partition("-")
    return int(first), int(last or first)


def tokens_rule(value: object) -> str | None:
    """A policy's rule on tokens: one of `TOKENS`, or a largest number like last-8; None for anything else."""
    return value if isinstance(value, str) and (value in TOKENS or _COUNTED.fullmatch(value)) else None


def tokens_within(tokens: str | None, rule: str) -> bool:
    """Whether a rule allows the `tokens` of an entry. last-8 allows last-1 to last-8, and last-N every number."""
    mine, most = _COUNTED.fullmatch(tokens or "all"), _COUNTED.fullmatch(rule)
    if mine is None:
        return (tokens or "all") == rule
    return rule == f"{mine[1]}-N" or (most is not None and mine[1] == most[1] and int(mine[2]) <= int(most[2]))


def tokens_in_both(some: Sequence[str], others: Sequence[str]) -> list[str]:
    """The rules on tokens that allow what both `some` and `others` allow, those of `some` first."""

    def within(rule: str, rules: Sequence[str]) -> bool:
        return any(rule == other or tokens_within(rule, other) for other in rules)

    kept = [rule for rule in some if within(rule, others)]
    return kept + [rule for rule in others if rule not in kept and within(rule, some)]


def layer_range(layers: object) -> str | None:
    """The canonical text of a range of layers; None for anything else."""
    if isinstance(layers, Integral) and not isinstance(layers, bool):
        layers = str(int(layers))
    found = _LAYERS.fullmatch(layers) if isinstance(layers, str) else None
    if found is None:
        return None
    first, last = int(found[1]), int(found[2] or found[1])
    return None if first > last else f"{first}-{last}" if first < last else str(first)


def _where(param: str, parts: list[str], problems: list[str]) -> dict[object, object]:
    """The layers and the tokens among the parts after each @ of a text: layers begin with a digit, or seem meant to."""
    layers = [part for part in parts if _MEANT_LAYERS.match(part)]
    tokens = [part for part in parts if not _MEANT_LAYERS.match(part)]
    problems += [
        f"{param}: {brief('@'.join(found))}: {kind} are given twice"
        for kind, found in (("layers", layers), ("tokens", tokens))
        if len(found) > 1
    ]
    return {"layers": next(iter(layers), None), "tokens": next(iter(tokens), None)}


class _Unread(str):
    """A text where a number was expected."""


def _number(text: str) -> float | _Unread:
    try:
        if text.isascii() and "_" not in text:  # `float` also reads '1_0' and the digits of other scripts
            return float(text)
    except ValueError:
        pass
    return _Unread(repr(text.strip()[:40]))
