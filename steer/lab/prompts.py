"""Read contrast sets from files (a prompt in each line, JSON, JSON lines, tables) or a hub dataset, and tokenize them.

A prompt is a text or a conversation. Its token ids are exactly those that the server would make.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import logging
import random
import re
import urllib.request
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from http.client import HTTPException
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, TypeAlias
from urllib.parse import urlsplit

from steer.errors import InvalidInput, brief, imported, prefixed
from steer.files import read_bytes
from steer.lab.lines import each, from_json, json_lines
from steer.tokenization import Chat

if TYPE_CHECKING:
    from steer.direction import Dataset

log = logging.getLogger("steer")
#: Names under which datasets keep the prompt, a text or a conversation. The first one whose value is not null is used.
COLUMNS = ("prompt", "text", "instruction", "goal", "question", "behavior", "query")
#: Names of conversations only. They come after the other names, because such a conversation often has the answer too.
CONVERSATIONS = ("messages", "conversation", "conversations")
HUB = "hub:"
FORMATS = (
    ".txt (a prompt a line), .jsonl, .json, .csv or .tsv (with a row of names), .parquet, FILE:COLUMN, a URL of one, "
    "or hub:OWNER/NAME[/CONFIG][:SPLIT[:COLUMN]], where a split may be a part, as train[100:200]"
)
_HUB = re.compile(
    r"(?P<name>[^/:]+(?:/[^/:]+)?)(?:/(?P<config>[^/:]+))?(?::(?P<split>(?:\[[^\]]*\]|[^:\[\]])*)(?::(?P<column>.*))?)?"
)
#: By suffix, what a file of prompts consists of and the number of the first; files of all other kinds consist of rows.
KINDS, ROW = {".txt": ("line", 1), ".jsonl": ("line", 1), ".json": ("item", 0)}, ("row", 1)
#: Most prompts whose places a message lists one by one.
NAMED = 10
#: Seconds to wait for the server of a URL, and most bytes that are read from it.
PATIENCE, MOST_BYTES = 10.0, 2**28
ROLES = ("system", "user", "assistant")
#: ShareGPT's names of the roles; its messages have the keys `from` and `value`.
SHARED = {"human": "user", "gpt": "assistant", "system": "system"}


@dataclass(frozen=True, slots=True)
class Conversation:
    """A conversation, which is asked as a prompt.

    Attributes:
        turns: (role, content) of each message. If the last message is the assistant's, it is the beginning of the
            answer.
    """

    turns: tuple[tuple[str, str], ...]

    @property
    def begun(self) -> bool:
        """Whether the conversation ends with the beginning of an answer."""
        return self.turns[-1][0] == "assistant"

    @property
    def several(self) -> bool:
        """Whether the user speaks more than once."""
        return sum(role == "user" for role, _ in self.turns) > 1

    @property
    def emptied(self) -> Conversation:
        """The same conversation with an empty last message."""
        return Conversation((*self.turns[:-1], (self.turns[-1][0], "")))

    def __str__(self) -> str:
        return self.turns[-1][1]


#: One user message, or a conversation.
Prompt: TypeAlias = str | Conversation


def question(prompt: Prompt) -> str:
    """The text of the user's last message."""
    turns = prompt.turns if isinstance(prompt, Conversation) else (("user", prompt),)
    return next((content for role, content in reversed(turns) if role == "user"), "")


def messages_of(prompt: Prompt, system_prompt: str | None = None) -> list[dict[str, Any]]:
    """The chat messages of `prompt`, with `system_prompt` unless the conversation has its own system message."""
    turns = prompt.turns if isinstance(prompt, Conversation) else (("user", prompt),)
    if system_prompt and turns[0][0] != "system":
        turns = (("system", system_prompt), *turns)
    return [{"role": role, "content": content} for role, content in turns]


@dataclass(frozen=True, slots=True)
class Rendering:
    """What surrounds each prompt.

    Attributes:
        system_prompt: the system prompt, if there is one.
        template: variables of the chat template, such as `enable_thinking`.
        response_prefix: the text with which every answer begins. A prompt that has the beginning of its own answer
            keeps that beginning in its place.
    """

    system_prompt: str | None = None
    template: Mapping[str, Any] = field(default_factory=dict)
    response_prefix: str = ""


def set_by_rendering(names: Collection[str]) -> list[str]:
    """The `names` that are no variables of a chat template but set by rendering, such as the conversation itself."""
    if not names:
        return []
    from steer.hf.load import template_parameters  # imports transformers

    return sorted((template_parameters() - {"tools", "documents"}).intersection(names))


@dataclass(frozen=True, slots=True)
class PromptSet:
    """The prompts of one class in file order, without empty lines, and the file that they came from."""

    name: str
    sha256: str
    prompts: tuple[Prompt, ...]
    #: The number of each prompt in the file, which stays the same after some were drawn. Messages name this number and
    #: not the text, because the text may be harmful and would get into terminals and logs. For a prompt without an
    #: entry its number in `prompts` is used.
    places: Mapping[Prompt, int] = field(default_factory=dict, compare=False, repr=False)
    #: How many items or rows of the file were left out because their prompt is empty.
    empty: int = field(default=0, compare=False, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.prompts, tuple) or not all(isinstance(one, str | Conversation) for one in self.prompts):
            raise InvalidInput(
                f"prompts: {brief(self.prompts, python=True)} is not accepted: a tuple of texts and Conversations"
            )

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def dataset(self) -> Dataset:
        """Name, digest and size of the set, as metadata has them."""
        from steer.direction import Dataset  # imports torch, which takes seconds; a wrong file is reported before that

        return Dataset(name=self.name, sha256=self.sha256, count=len(self.prompts))

    @property
    def fingerprint(self) -> str:
        """A digest that is equal for the same prompts in the same order."""
        return hashlib.sha256(repr(self.prompts).encode()).hexdigest()

    @property
    def oddities(self) -> str:
        """One line with what the author of the file may not know: empty and repeated prompts. "" if there are none."""
        notes = [f"without a prompt, and left out: {self.empty}"] if self.empty else []
        if repeated := len(self.prompts) - len(set(self.prompts)):
            notes.append(f"repeated, and counted each time: {repeated}")
        return f"{self.name}: {'; '.join(notes)}" if notes else ""

    def named(self, prompts: Iterable[Prompt]) -> str:
        """The file's name and the places of `prompts` in it, such as "harmful.txt, lines 1, 4 and 3 more"."""
        places = {prompt: number for number, prompt in reversed([*enumerate(self.prompts, 1)])}
        places.update(self.places)
        numbers = sorted(places[prompt] for prompt in prompts)
        shown = list(map(str, numbers[:NAMED]))
        if more := len(numbers) - len(shown):
            shown.append(f"{more} more")
        listed = " and ".join(filter(None, [", ".join(shown[:-1]), shown[-1]]))
        kind, _ = _kind(self.name)
        return f"{self.name}, {kind}{'s' * (len(numbers) > 1)} {listed}"

    @property
    def distinct(self) -> PromptSet:
        """The set with each repeated prompt only once."""
        return replace(self, prompts=tuple(dict.fromkeys(self.prompts)))

    def drawn(self, count: int) -> PromptSet:
        """Draw at most `count` of the prompts at random, since files are often sorted by topic; each time the same."""
        return replace(self, prompts=tuple(random.Random(0).sample(self.prompts, min(count, len(self)))))

    def without(self, other: PromptSet) -> PromptSet:
        """The set without the prompts that `other` has too."""
        taken = set(other.prompts)
        return replace(self, prompts=tuple(prompt for prompt in self.prompts if prompt not in taken))


_ARDITI = "https://raw.githubusercontent.com/andyrdt/refusal_direction/main/dataset/splits"
#: The names that --prompts accepts: pairs of published sets, one with prompts that models refuse and one with prompts
#: that they answer. These are the authors' training splits, because the test splits are for `steer eval`.
NAMED_SETS = {
    # Arditi et al. 2024: harmful from AdvBench, MaliciousInstruct and TDC 2023 (MIT), harmless from Alpaca
    # (CC BY-NC 4.0); the same folder has `_val` and `_test`
    "arditi": (f"{_ARDITI}/harmful_train.json", f"{_ARDITI}/harmless_train.json"),
    # harmful from AdvBench (MIT), harmless from Alpaca (CC BY-NC 4.0); the datasets also have the split `test`
    "mlabonne": ("hub:mlabonne/harmful_behaviors:train:text", "hub:mlabonne/harmless_alpaca:train:text"),
}


def read_prompts(source: str) -> PromptSet:
    """Read a contrast set from a file, a URL or a hub dataset (`FORMATS`).

    Raises:
        InvalidInput: the set cannot be read; the message names the file, the line and what would be accepted.
    """
    if source.startswith(HUB):
        return _from_hub(source)
    file, _, only = source.rpartition(":")
    if not (file and only) or Path(source).exists() or not Path(file).is_file():  # else FILE:COLUMN
        file, only = source, ""
    path, data = _fetched(source) if source.startswith(("https://", "http://")) else _read(file)
    name = f"{path.name}:{only}" if only else path.name
    return _set(source, name, hashlib.sha256(data).hexdigest(), _parse(path, data, only))


def prompt_set(name: str, prompts: Iterable[object]) -> PromptSet:
    """A contrast set of texts, conversations or objects that a program has: the set that `read_prompts` reads from a
    file NAME.jsonl with these as its lines.

    Raises:
        InvalidInput: they are no prompts; the message names the line and what would be accepted.
    """
    if isinstance(prompts, str):
        raise InvalidInput(f"{name}: one text is not accepted: a list of prompts, or `read_prompts` for a file")
    data = "".join(f"{json.dumps(prompt)}\n" for prompt in prompts).encode()
    file = f"{name}.jsonl"
    return _set(file, file, hashlib.sha256(data).hexdigest(), _parse(Path(file), data, ""))


def _kind(name: str) -> tuple[str, int]:
    """What the file `name` consists of (lines, items or rows) and the number of the first. `name` may have a column."""
    return KINDS.get(PurePosixPath(name).suffix.lower().partition(":")[0], ROW)


def _set(source: str, name: str, sha256: str, parsed: Sequence[Prompt | None]) -> PromptSet:
    """Make a set of what was `parsed` from a file: prompts, "" for an item without a prompt, None for a blank line."""
    prompts = tuple(prompt for prompt in parsed if prompt)
    if not prompts:
        raise InvalidInput(f"{source}: has no prompts")
    _, first = _kind(name)
    places: dict[Prompt, int] = {}
    for number, prompt in enumerate(parsed, first):
        if prompt:
            places.setdefault(prompt, number)
    return PromptSet(name, sha256, prompts, places, parsed.count(""))


def _read(source: str) -> tuple[Path, bytes]:
    try:
        return Path(source), read_bytes(source)
    except OSError as error:
        raise InvalidInput(f"{source}: cannot be read: {error.strerror}; accepted: {FORMATS}") from error


def _fetched(url: str) -> tuple[Path, bytes]:
    try:
        with urllib.request.urlopen(url, timeout=PATIENCE) as answer:
            data: bytes = answer.read(MOST_BYTES + 1)
    except (OSError, ValueError, HTTPException) as error:  # a server refuses or is missing, or the URL is invalid
        raise InvalidInput(f"{url}: cannot be read: {getattr(error, 'reason', error)}") from error
    if len(data) > MOST_BYTES:
        raise InvalidInput(f"{url}: has more than {MOST_BYTES} bytes")
    return Path(PurePosixPath(urlsplit(url).path).name), data


def check_contrast(harmful: PromptSet, harmless: PromptSet) -> None:
    """Raise InvalidInput if a prompt is in both sets, because it would weaken the difference that is measured."""
    both = set(harmful.prompts) & set(harmless.prompts)
    if both:
        problem = f"{len(both)} prompts are in both {harmful.name} and {harmless.name}"
        if (harmful.name, harmful.sha256) == (harmless.name, harmless.sha256):
            raise InvalidInput(f"{problem}: it is one file, given twice")
        raise InvalidInput(f"{problem} ({harmful.named(both)}): keep each in one of them")


#: Most prompts of each class that candidates are tried on.
TRIED = 32
#: Least prompts of a set that is split. With a smaller set, candidates are tried on the measured prompts.
SMALL = 32
#: Least answers of the plain model that must show the behaviour. If 7 of them stop showing it under a candidate and no
#: other answer begins to, the chance of that is 1/128, and 4 % for one of five candidates.
LEAST_SHOWN = 7


@dataclass(frozen=True, slots=True)
class Split:
    """For each class, the prompts that are measured and the prompts that candidates are tried on."""

    harmful: PromptSet
    harmless: PromptSet
    tried_harmful: PromptSet
    tried_harmless: PromptSet

    @classmethod
    def of(cls, harmful: PromptSet, harmless: PromptSet, limit: int | None = None, least: int = LEAST_SHOWN) -> Split:
        """Draw prompts from each set, and set a quarter of them aside, at most TRIED, to try candidates on.

        If a set has fewer than SMALL prompts, all prompts are both measured and tried.

        Args:
            limit: how many different prompts to draw from each set; None takes all.
            least: the least number of different prompts that each set must have.

        Raises:
            InvalidInput: the sets share prompts, or a set has fewer than `least` prompts.
        """
        check_contrast(harmful, harmless)
        harmful, harmless = (
            one.distinct if limit is None else one.distinct.drawn(limit) for one in (harmful, harmless)
        )
        InvalidInput.raise_for(
            f"{one.name}: gives {len(one)} different prompts, at least {least} are needed (better 128)"
            for one in (harmful, harmless)
            if len(one) < least
        )
        if min(len(harmful), len(harmless)) < SMALL:
            log.warning(
                "a set has fewer than %d prompts: candidates are tried on the prompts that they were made from, so "
                "their figures say little about other prompts",
                SMALL,
            )
            return cls(harmful, harmless, harmful, harmless)
        tried = [one.drawn(min(TRIED, len(one) // 4)) for one in (harmful, harmless)]
        return cls(harmful.without(tried[0]), harmless.without(tried[1]), *tried)


def _parse(path: Path, data: bytes, only: str) -> Sequence[Prompt | None]:
    """The prompts of a file, from the column `only` if one is given. "" is an empty prompt, None a blank line."""
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return _from_parquet(path, data, only)
    if suffix not in (".txt", ".jsonl", ".json", ".csv", ".tsv"):
        raise InvalidInput(f"{path}: the suffix '{suffix}' is not known; accepted: {FORMATS}")
    text, read_one = _decoded(path, data), partial(prompt_of, names=(only,)) if only else prompt_of
    if suffix == ".txt":
        if only:
            raise InvalidInput(f"{path}: has a prompt in each line, and no column '{only}'")
        return [line.strip() or None for line in text.split("\n")]
    if suffix == ".jsonl":
        whole = None
        try:
            read = iter(json_lines(str(path), text, read_one))
        except InvalidInput as error:
            with suppress(InvalidInput):
                whole = from_json(text)
            if isinstance(whole, list):
                raise InvalidInput(f"{path}: this is one JSON list: name it .json") from error
            raise
        return [next(read) if line.strip() else None for line in text.split("\n")]
    if suffix == ".json":
        with prefixed(str(path)):
            value = from_json(text)
        if not isinstance(value, list):
            got = f"an object with {_keys(value)}" if isinstance(value, dict) and value else type(value).__name__
            raise InvalidInput(f"{path}: must be a JSON list of texts or objects, got {got}")
        return each(str(path), "item", enumerate(value), read_one)
    return _from_csv(path, text, only)


def _decoded(path: Path, data: bytes) -> str:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        was = " but UTF-16" if data.startswith((b"\xff\xfe", b"\xfe\xff")) else ""
        raise InvalidInput(f"{path}: not UTF-8 text{was}: save it as UTF-8 ({error})") from error
    if "\0" in text:
        raise InvalidInput(f"{path}: not UTF-8 text: it has zero bytes, as UTF-16 does; save it as UTF-8")
    return text


def _keys(item: Mapping[object, object]) -> str:
    return ", ".join(brief(key) for key in [*item][:NAMED])


def _meant(names: Iterable[str], there: Collection[str]) -> list[str]:
    """The names in `there` that match `names`, in the order of `names`.

    Case does not matter, but a name with the same case is preferred to another.
    """
    folded = {key.lower(): key for key in reversed([*there]) if isinstance(key, str)}
    found = (name if name in there else folded.get(name.lower()) for name in names)
    return list(dict.fromkeys(name for name in found if name is not None))


def prompt_of(item: object, names: Sequence[str] = (*COLUMNS, *CONVERSATIONS)) -> Prompt:
    """The prompt in `item`, which is an item of JSON or a row of a table.

    Returns:
        The item if it is a text, otherwise its value under the first of `names` that is not null; "" if all are null.

    Raises:
        InvalidInput: the item has no prompt, or the prompt is neither a text nor a list of messages.
    """
    if isinstance(item, str):
        return _text(item).strip()
    known = _meant(names, item) if isinstance(item, dict) else []
    if not isinstance(item, dict) or not known:
        there = _keys(item) if isinstance(item, dict) else ""
        problem = f"neither a text nor an object with one of {', '.join(names)}"
        raise InvalidInput(f"{problem}; it has {there}" if there else problem)
    name = next((name for name in known if item[name] is not None), None)
    if name is None:
        return ""
    if isinstance(item[name], list):
        return _conversation(item[name])
    if isinstance(item[name], str) and name.lower() not in CONVERSATIONS:
        return _text(item[name]).strip()
    accepted = "not a list of messages" if name.lower() in CONVERSATIONS else "neither a text nor a list of messages"
    raise InvalidInput(f"'{name}' is {accepted}, but {type(item[name]).__name__}")


def _text(value: str, where: str = "") -> str:
    """Return `value`. Raises InvalidInput, beginning with `where`, if the text has half of a surrogate pair."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InvalidInput(f"{where}character {error.start} is half of a surrogate pair, not text") from None
    return value


def _conversation(messages: list[object]) -> Conversation:
    if not messages:
        raise InvalidInput("a list of messages must have at least one message")
    problems, turns = [], []
    for number, message in enumerate(messages, 1):
        role, content = _turn(message)
        if role not in ROLES or not isinstance(content, str):
            problems.append(f"message {number}: needs a role of {', '.join(ROLES)} and a text as content")
        turns.append((str(role), _text(str(content), f"message {number}: ")))
    if not problems and turns[-1][0] == "system":
        problems.append("the last message must be the user's, or the beginning of the assistant's answer")
    InvalidInput.raise_for(problems)
    return Conversation(tuple(turns))


def _turn(message: object) -> tuple[object, object]:
    """(role, content) of a message in OpenAI's or ShareGPT's format; None for a part that the message does not have."""
    if not isinstance(message, dict):
        return None, None
    if "role" not in message and "from" in message:
        role = message["from"]
        return SHARED.get(role) if isinstance(role, str) else None, message.get("value")
    return message.get("role"), message.get("content")


def _from_table(
    columns: Collection[str], column: Callable[[str], Iterable[object]], where: str, only: str | None
) -> list[Prompt]:
    """The prompts of a table. Each row is read like an object of JSON lines."""
    accepted = (only,) if only else (*COLUMNS, *CONVERSATIONS)
    names = _meant(accepted, columns)
    if not names:
        raise InvalidInput(
            f"{where}: has none of the columns {', '.join(accepted)}; its columns are {', '.join(columns)}"
        )
    rows = zip(*map(column, names), strict=True)
    items = ((number, dict(zip(names, row, strict=True))) for number, row in enumerate(rows, 1))
    return each(where, "row", items, partial(prompt_of, names=names))


def _from_csv(path: Path, text: str, only: str) -> list[Prompt]:
    """The prompts of a table in text form, whose first row names the columns.

    The separator is a sign with which the first row has one of the accepted columns; otherwise the sign with which the
    row has the most columns.
    """

    def rows(sign: str) -> Iterator[list[str]]:
        return filter(None, csv.reader(io.StringIO(text, newline=""), delimiter=sign, strict=True))

    def head(sign: str) -> tuple[bool, int]:
        names = next(rows(sign), [])
        return bool(_meant((only,) if only else (*COLUMNS, *CONVERSATIONS), names)), len(names)

    try:
        names, *found = [*rows(max("\t" if path.suffix.lower() == ".tsv" else ",;\t", key=head))] or [[]]
    except csv.Error as error:
        raise InvalidInput(f"{path}: not a table in text: {error}") from error

    def whole(row: list[str]) -> dict[str, str | None]:
        if len(row) != len(names):
            raise InvalidInput(
                f"{len(row)} fields, and the first row names {len(names)}; a text that has the sign between fields "
                'stands in "quotes"'
            )
        return {name: field or None for name, field in zip(names, row, strict=True)}

    table = each(str(path), "row", enumerate(found, 1), whole)
    return _from_table(names, lambda name: (row[name] for row in table), str(path), only)


def _from_parquet(path: Path, data: bytes, only: str) -> list[Prompt]:
    parquet = imported("pyarrow.parquet", f"{path}: reading parquet", "'steer-llm[data]'")
    try:
        table = parquet.read_table(io.BytesIO(data))
    except (OSError, ValueError) as error:
        raise InvalidInput(f"{path}: not a parquet file: {error}") from error
    return _from_table(table.column_names, lambda name: table.column(name).to_pylist(), str(path), only)


def _from_hub(source: str) -> PromptSet:
    datasets = imported("datasets", f"{source}: reading a hub dataset", "'steer-llm[data]'")
    if (named := _HUB.fullmatch(source.removeprefix(HUB))) is None:
        raise InvalidInput(f"{source}: is no dataset of the hub; accepted: {FORMATS}")
    try:
        data = datasets.load_dataset(named["name"], named["config"], split=named["split"] or "train")
    except Exception as error:  # the library's own errors, network errors and file errors
        raise InvalidInput(f"{source}: cannot be loaded: {error}") from error
    found = _from_table(data.column_names, lambda name: data[name], source, named["column"])
    texts = (prompt if isinstance(prompt, str) else repr(prompt.turns) for prompt in found if prompt)
    return _set(source, source, hashlib.sha256("\n".join(texts).encode()).hexdigest(), found)


@dataclass(frozen=True, slots=True)
class Encoded:
    """A prompt that was rendered with the chat template.

    Attributes:
        ids: its token ids.
        own: which of the ids are the text of its last message; the others come from the template and other messages.
    """

    ids: list[int]
    own: slice


def encode_all(chat: Chat, prompts: Sequence[Prompt], rendering: Rendering | None = None) -> list[Encoded]:
    """Encode each prompt exactly as the server would.

    For prompts of one message, the ids that the template adds around it are found only once.

    Raises:
        InvalidInput: `rendering` sets a name that is no variable of a chat template, or a variable or a system prompt
            that the model's template does not use.
    """
    rendering = rendering or Rendering()
    if taken := set_by_rendering(rendering.template):  # a file may name anything
        raise InvalidInput(
            f"--template: '{name}' cannot be set: it is no variable of a chat template" for name in taken
        )
    InvalidInput.raise_for(
        f"--template: the chat template of this model does not mention '{name}'"
        for name in chat.unread(rendering.template)
    )

    def ids_of(prompt: Prompt, **more: bool) -> list[int]:
        return chat.chat_ids(messages_of(prompt, rendering.system_prompt), **rendering.template, **more)

    if rendering.system_prompt:
        other = messages_of("", f"{rendering.system_prompt}!")
        if chat.chat_ids(other, **rendering.template) == ids_of(""):
            raise InvalidInput("--system-prompt: the chat template of this model leaves it out")

    around, prefix = ids_of(""), chat.piece_ids(rendering.response_prefix) if rendering.response_prefix else []

    def one(prompt: Prompt) -> Encoded:
        if not isinstance(prompt, Conversation):
            found = _marked(ids_of(prompt), around)
        elif prompt.begun:
            # the assistant's message at the end is the beginning of the answer, which continues where the message stops
            begun = {"add_generation_prompt": False, "continue_final_message": True}
            return _marked(ids_of(prompt, **begun), ids_of(prompt.emptied, **begun))
        else:
            found = _marked(ids_of(prompt), ids_of(prompt.emptied))
        return Encoded(found.ids + prefix, found.own)

    return [one(prompt) for prompt in prompts]


def _marked(ids: list[int], empty: list[int]) -> Encoded:
    """Find the prompt's own text: the part of `ids` that differs from `empty`, the ids with an empty last message."""
    start = next((i for i, (x, y) in enumerate(zip(ids, empty, strict=False)) if x != y), min(len(ids), len(empty)))
    same = zip(reversed(ids[start:]), reversed(empty[start:]), strict=False)
    after = next((i for i, (x, y) in enumerate(same) if x != y), min(len(ids), len(empty)) - start)
    return Encoded(ids, slice(start, len(ids) - after))
