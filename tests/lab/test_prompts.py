"""Contrast sets: every format gives the same prompts, and what cannot be read is named by file and line."""

from __future__ import annotations

import csv
import functools
import hashlib
import io
import json
import re
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from steer.errors import InvalidInput
from steer.hf.load import load
from steer.lab.prompts import (
    COLUMNS,
    NAMED_SETS,
    Conversation,
    PromptSet,
    check_contrast,
    encode_all,
    messages_of,
    prompt_set,
    read_prompts,
)

PROMPTS = ("How do I bake bread?", "Grüße aus Köln 🙂", 'Say "yes, no"')


def table(sign: str, head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    text = io.StringIO()
    csv.writer(text, delimiter=sign).writerows([head, *rows])
    return text.getvalue()


def jsonl(items: list[Any]) -> str:
    return "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items)


FORMATS: dict[str, Callable[[list[str]], str]] = {
    "lines.txt": lambda prompts: "\n".join(prompts),
    "ended.txt": lambda prompts: "".join(f"{p}\n" for p in prompts),
    "windows.txt": lambda prompts: "\r\n".join(prompts),
    "spaced.TXT": lambda prompts: "\n\n".join(f"  {p}\t" for p in prompts) + "\n \n",
    "texts.jsonl": jsonl,
    "objects.jsonl": lambda prompts: jsonl([{"id": i, "prompt": p} for i, p in enumerate(prompts)]),
    "gaps.jsonl": lambda prompts: "\n" + jsonl(list(prompts)).replace("\n", "\n\n"),
    "texts.json": lambda prompts: json.dumps(prompts),
    "comma.csv": lambda prompts: table(",", ["id", "prompt"], enumerate(prompts)),
    "semicolon.csv": lambda prompts: table(";", ["id", "Prompt", "a,b,c,d"], ((1, p, "") for p in prompts)),
    "tab.csv": lambda prompts: table("\t", ["text", "prompt"], (("not this", p) for p in prompts)),
    "one.csv": lambda prompts: table(",", ["Goal"], ([p] for p in prompts)) + "\n",
    "tab.TSV": lambda prompts: table("\t", ["id, number", "QUESTION"], enumerate(prompts)),
    "objects.json": lambda prompts: json.dumps([{"goal": p} for p in prompts], indent=2),
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_prompts(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(FORMATS[name](list(PROMPTS)).encode())
    read = read_prompts(str(path))
    assert read.prompts == PROMPTS
    assert len(read) == 3
    assert read.name == name
    assert read.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert read.dataset.model_dump() == {"name": name, "sha256": read.sha256, "count": 3}


@pytest.mark.parametrize("name", FORMATS)
def test_a_byte_order_mark_is_no_part_of_a_prompt(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(b"\xef\xbb\xbf" + FORMATS[name](list(PROMPTS)).encode())
    assert read_prompts(str(path)).prompts == PROMPTS


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("sign", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c"])
def test_only_a_newline_ends_a_line(name: str, sign: str, tmp_path: Path) -> None:
    """JSON writes U+2028 and others as they are, and a prompt may have them."""
    path = tmp_path / name
    path.write_bytes(FORMATS[name]([f"one{sign}prompt", "another"]).encode())
    assert read_prompts(str(path)).prompts == (f"one{sign}prompt", "another")


@given(st.lists(st.text(min_size=1, max_size=12), min_size=1, max_size=4))
@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_prompts_survive_json(tmp_path: Path, prompts: list[str]) -> None:
    expected = tuple(stripped for p in prompts if (stripped := p.strip()))
    for name in ("p.json", "p.jsonl"):
        (tmp_path / name).write_bytes(FORMATS["texts." + name.split(".")[1]](prompts).encode())
        if expected:
            assert read_prompts(str(tmp_path / name)).prompts == expected
        else:
            with pytest.raises(InvalidInput, match="has no prompts"):
                read_prompts(str(tmp_path / name))


@pytest.mark.parametrize("column", COLUMNS)
def test_every_known_column_is_found(column: str, tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(jsonl([{"category": "x", column: "hello"}]))
    assert read_prompts(str(path)).prompts == ("hello",)


def test_of_several_columns_the_first_known_text_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(jsonl([{"query": "no", "text": "yes"}, {"prompt": None, "goal": "yes"}]))
    assert read_prompts(str(path)).prompts == ("yes", "yes")


def test_upper_case_of_a_column_does_not_matter_and_the_same_spelling_goes_before(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(jsonl([{"Goal": "yes"}, {"PROMPT": "no", "prompt": "yes"}, {"Messages": chat("yes")}]))
    assert read_prompts(str(path)).prompts == ("yes", "yes", Conversation((("user", "yes"),)))


def test_empty_and_repeated_prompts_are_told_in_a_line_and_blank_lines_are_not(tmp_path: Path) -> None:
    for name, text in {
        "p.jsonl": jsonl(["a", "b", {"prompt": " "}, {"text": None}, "a"]) + "\n\n",
        "p.json": json.dumps(["a", "b", "", " ", "a"]),
        "p.csv": "prompt,id\na,1\nb,2\n,3\n ,4\na,5\n",
    }.items():
        (tmp_path / name).write_text(text)
        told = read_prompts(str(tmp_path / name)).oddities
        assert told == f"{name}: without a prompt, and left out: 2; repeated, and counted each time: 1"
    (tmp_path / "p.txt").write_text("a\n\n\nb\n")
    assert read_prompts(str(tmp_path / "p.txt")).oddities == ""


def test_a_column_of_a_file_is_named_after_it(tmp_path: Path) -> None:
    rows = [{"prompt": "one", "Harmful": "bad one"}, {"prompt": "two", "Harmful": "bad two"}]
    for path in [*written(rows, tmp_path), *(tmp_path / f"p.{suffix}" for suffix in ("json", "csv", "tsv"))]:
        if path.suffix == ".json":
            path.write_text(json.dumps(rows))
        elif path.suffix in (".csv", ".tsv"):
            path.write_text(table("\t" if path.suffix == ".tsv" else ";", [*rows[0]], (row.values() for row in rows)))
        read = read_prompts(f"{path}:harmful")
        assert read.prompts == ("bad one", "bad two")
        assert read.name == f"{path.name}:harmful"
        assert read.named(["bad two"]).startswith(f"{path.name}:harmful, ")
        assert re.search(r"(line|row) 2$|item 1$", read.named(["bad two"]))
        with pytest.raises(InvalidInput, match="nothing"):
            read_prompts(f"{path}:nothing")
    (tmp_path / "p.txt").write_text("one\n")
    with pytest.raises(InvalidInput, match="no column 'prompt'"):
        read_prompts(f"{tmp_path}/p.txt:prompt")
    (tmp_path / "q.csv:prompt.txt").write_text("a file of this name\n")
    assert read_prompts(f"{tmp_path}/q.csv:prompt.txt").prompts == ("a file of this name",)
    with pytest.raises(InvalidInput, match=r"none\.csv:prompt: cannot be read"):
        read_prompts(f"{tmp_path}/none.csv:prompt")


def test_conversations_of_sharegpt_are_known(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    said = [("system", "s"), ("human", "one"), ("gpt", "two"), ("human", "three")]
    path.write_text(jsonl([{"id": 1, "conversations": [{"from": who, "value": text} for who, text in said]}]))
    turns = (("system", "s"), ("user", "one"), ("assistant", "two"), ("user", "three"))
    assert read_prompts(str(path)).prompts == (Conversation(turns),)
    path.write_text(jsonl([{"conversations": [{"from": "bing", "value": "x"}]}]))
    with pytest.raises(InvalidInput, match="message 1: needs a role of system, user, assistant and a text"):
        read_prompts(str(path))


def test_prompts_of_a_program_are_those_of_a_file_with_them(tmp_path: Path) -> None:
    items = ["one", {"prompt": "two"}, {"messages": [{"role": "user", "content": "three"}]}, ""]
    (tmp_path / "mine.jsonl").write_text("".join(f"{json.dumps(item)}\n" for item in items))
    read, made = read_prompts(str(tmp_path / "mine.jsonl")), prompt_set("mine", items)
    assert made == read
    assert (made.places, made.oddities) == (read.places, read.oddities)
    for wrong, says in (("one", "a list of prompts"), ([], "has no prompts"), ([7, {"x": "y"}], "mine.jsonl, line")):
        with pytest.raises(InvalidInput, match=says):
            prompt_set("mine", wrong)


def test_the_order_and_repetitions_of_a_file_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_text("b\na\nb\n")
    assert read_prompts(str(path)).prompts == ("b", "a", "b")


BAD: dict[str, tuple[str, bytes, tuple[str, ...]]] = {
    "empty txt": ("p.txt", b"", ("has no prompts",)),
    "blank txt": ("p.txt", b" \n\n\t\n", ("has no prompts",)),
    "empty jsonl": ("p.jsonl", b"\n", ("has no prompts",)),
    "empty json list": ("p.json", b"[]", ("has no prompts",)),
    "empty json": ("p.json", b"", ("not JSON",)),
    "blank json": ("p.json", b'[" ", {"text": ""}]', ("has no prompts",)),
    "bad line": ("p.jsonl", b'"one"\n\n{"prompt": "two"\n', ("line 3", "not JSON")),
    "another key": ("p.jsonl", b'{"promt": "x"}\n', ("line 1", "it has 'promt'")),
    "a number": ("p.jsonl", b'"one"\n2\n', ("line 2", "neither a text nor an object", "prompt")),
    "no column": ("p.jsonl", b'{"x": "one"}\n', ("line 1", *COLUMNS)),
    "column no text": ("p.jsonl", b'{"prompt": 3}\n', ("line 1", "neither")),
    "json object": ("p.json", b'{"prompt": "one"}', ("must be a JSON list", "got an object with 'prompt'")),
    "json number": ("p.json", b"3", ("must be a JSON list", "got int")),
    "a list of some lines as jsonl": (
        "p.jsonl",
        b'[\n"one",\n"two"\n]\n',
        ("this is one JSON list: name it .json",),
    ),
    "a list in one line as jsonl": ("p.jsonl", b'[{"prompt": "one"}]', ("this is one JSON list: name it .json",)),
    "utf-16": ("p.csv", "prompt\nx".encode("utf-16"), ("not UTF-8 text but UTF-16: save it as UTF-8",)),
    "utf-16 without a mark": ("p.txt", "one".encode("utf-16-le"), ("zero bytes", "save it as UTF-8")),
    "empty csv": ("p.csv", b"", ("none of the columns prompt",)),
    "no row in csv": ("p.csv", b"prompt\n", ("has no prompts",)),
    "no column in csv": ("p.csv", b"a;b\n1;2\n", ("none of the columns prompt", "its columns are a, b")),
    "unquoted csv": ("p.csv", b"prompt,id\nOh, no,1\n", ("row 1: 3 fields, and the first row names 2",)),
    "quote without an end": ("p.csv", b'prompt\n"one\n', ("not a table in text",)),
    "json item": ("p.json", b'["one", null]', ("item 1", "neither")),
    "long number": ("p.json", b"[" + b"9" * 5000 + b"]", ("not JSON",)),
    "deep": ("p.jsonl", b"[" * 100_000, ("line 1", "not JSON")),
    "half a surrogate": ("p.json", b'["good", "a \\ud800 b"]', ("item 1", "character 2 is half of a surrogate pair")),
    "half a surrogate in a message": (
        "p.jsonl",
        b'{"messages": [{"role": "user", "content": "\\udc00"}]}',
        ("line 1: message 1", "surrogate"),
    ),
    "latin-1": ("p.txt", "Grüße".encode("latin-1"), ("not UTF-8", "save it as UTF-8")),
    "latin-1 jsonl": ("p.jsonl", '"Grüße"'.encode("latin-1"), ("not UTF-8",)),
    "unknown suffix": ("p.xlsx", b"one", ("'.xlsx' is not known", ".txt", ".jsonl", ".json", ".parquet", "hub:")),
    "no suffix": ("prompts", b"one", ("'' is not known", ".txt")),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_is_no_contrast_set_is_named(kind: str, tmp_path: Path) -> None:
    name, data, expected = BAD[kind]
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(InvalidInput) as caught:
        read_prompts(str(path))
    for words in (str(path), *expected):
        assert words in str(caught.value)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "none.txt", tmp_path):
        with pytest.raises(InvalidInput, match="cannot be read") as caught:
            read_prompts(str(path))
        assert str(path) in str(caught.value)
        assert "accepted: .txt" in str(caught.value)


def test_parquet(tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "p.parquet"
    parquet.write_table(arrow.table({"id": [1, 2, 3, 4], "prompt": [*PROMPTS[:2], None, PROMPTS[2]]}), path)
    assert read_prompts(str(path)).prompts == PROMPTS
    parquet.write_table(arrow.table({"id": [1]}), path)
    with pytest.raises(InvalidInput, match="none of the columns prompt"):
        read_prompts(str(path))
    path.write_bytes(b"PAR1 and nothing else")
    with pytest.raises(InvalidInput, match="not a parquet file"):
        read_prompts(str(path))


@pytest.mark.parametrize(("source", "package"), [("p.parquet", "pyarrow"), ("hub:owner/name", "datasets")])
def test_a_missing_package_is_named_with_its_installation(
    source: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    monkeypatch.chdir(tmp_path)
    Path("p.parquet").write_bytes(b"PAR1")
    with pytest.raises(InvalidInput, match=rf"{source}: .* package {package} .pip install 'steer-llm.data.'"):
        read_prompts(source)


class Hub:
    """Stands for the package `datasets`: one dataset, whatever is asked for, and what was asked."""

    def __init__(self, **columns: list[Any]) -> None:
        self.columns = columns
        self.asked: list[Any] = []

    @property
    def column_names(self) -> list[str]:
        return list(self.columns)

    def __getitem__(self, column: str) -> list[Any]:
        if column not in self.columns:
            raise KeyError(f"Column {column} not in the dataset. Current columns in the dataset: {self.column_names}")
        return self.columns[column]

    def load_dataset(self, name: str, config: str | None, split: str) -> Hub:
        if name == "owner/none":
            raise FileNotFoundError("Dataset 'owner/none' doesn't exist on the Hub")
        self.asked.append((name, split) if config is None else (name, config, split))
        return self


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    made = Hub(id=[1, 2, 3], text=["one ", "", "two"], behaviour=["x", "y", "z"])
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=made.load_dataset))
    return made


def test_a_hub_source_has_a_name_and_perhaps_a_split_and_a_column(hub: Hub) -> None:
    assert read_prompts("hub:owner/name").prompts == ("one", "two")
    assert read_prompts("hub:owner/name:test").prompts == ("one", "two")
    read = read_prompts("hub:owner/name:test:behaviour")
    assert read.prompts == ("x", "y", "z")
    assert hub.asked == [("owner/name", "train"), ("owner/name", "test"), ("owner/name", "test")]
    assert read.name == "hub:owner/name:test:behaviour"
    assert read.sha256 == hashlib.sha256(b"x\ny\nz").hexdigest()


def test_a_hub_source_that_cannot_be_had_is_named(hub: Hub) -> None:
    with pytest.raises(InvalidInput, match="hub:owner/none: cannot be loaded: Dataset 'owner/none'"):
        read_prompts("hub:owner/none")
    with pytest.raises(InvalidInput, match=r"hub:owner/name:train:nothing: .*nothing"):
        read_prompts("hub:owner/name:train:nothing")
    del hub.columns["text"]
    with pytest.raises(InvalidInput, match="hub:owner/name: has none of the columns"):
        read_prompts("hub:owner/name")
    hub.columns["text"] = ["", " "]
    with pytest.raises(InvalidInput, match="hub:owner/name: has no prompts"):
        read_prompts("hub:owner/name")


@pytest.mark.parametrize(
    ("source", "asked"),
    [
        ("name", ("name", "train")),
        ("owner/name/config", ("owner/name", "config", "train")),
        ("owner/name/config:test:text", ("owner/name", "config", "test")),
        ("owner/name:train[:400]:text", ("owner/name", "train[:400]")),
        ("owner/name/config:train[10%:20%]", ("owner/name", "config", "train[10%:20%]")),
        ("owner/name:train[:4]+test[4:]:text", ("owner/name", "train[:4]+test[4:]")),
    ],
)
def test_a_hub_source_names_configurations_and_parts_of_splits(source: str, asked: object, hub: Hub) -> None:
    assert read_prompts(f"hub:{source}").prompts == ("one", "two")
    assert hub.asked == [asked]


@pytest.mark.parametrize("source", ["", "a/b/c/d", "owner/name:train[:4", "owner/name:train]:text"])
def test_a_hub_source_of_another_form_is_refused(source: str, hub: Hub) -> None:
    with pytest.raises(InvalidInput, match="is no dataset of the hub; accepted"):
        read_prompts(f"hub:{source}")
    assert hub.asked == []


def test_a_column_may_hold_chat_messages(hub: Hub, tmp_path: Path) -> None:
    turns = [
        [{"role": "system", "content": "s"}, {"role": "user", "content": "one"}],
        [{"role": "user", "content": "two"}],
    ]
    expected = (Conversation((("system", "s"), ("user", "one"))), Conversation((("user", "two"),)))
    hub.columns = {"id": [1, 2, 3], "messages": [turns[0], None, turns[1]]}
    assert read_prompts("hub:owner/name").prompts == expected
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.table({"messages": turns}), tmp_path / "p.parquet")
    assert read_prompts(str(tmp_path / "p.parquet")).prompts == expected
    hub.columns = {"messages": [turns[0], [{"role": "nobody", "content": "x"}]]}
    with pytest.raises(InvalidInput, match="hub:owner/name, row 2: message 1: needs a role"):
        read_prompts("hub:owner/name")


def chat(text: object) -> list[dict[str, object]]:
    return [{"role": "user", "content": text}]


TABLES: dict[str, tuple[list[dict[str, Any]], tuple[str | Conversation, ...]]] = {
    "a prompt beside its conversation": ([{"prompt": " one ", "messages": chat("two")}], ("one",)),
    "what is missing": ([{"prompt": None, "goal": "a"}, {"prompt": None, "goal": None}, {"prompt": "b"}], ("a", "b")),
    "a conversation in place of a prompt": (
        [{"prompt": None, "messages": chat("two")}, {"prompt": "one", "messages": None}],
        (Conversation((("user", "two"),)), "one"),
    ),
    "the column conversation": ([{"conversation": chat("one")}], (Conversation((("user", "one"),)),)),
    "a prompt that is a conversation": ([{"prompt": chat("one")}], (Conversation((("user", "one"),)),)),
}


def written(rows: list[dict[str, Any]], folder: Path) -> list[Path]:
    """The same table in both formats."""
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    names = dict.fromkeys(name for row in rows for name in row)
    parquet.write_table(arrow.table({name: [row.get(name) for row in rows] for name in names}), folder / "p.parquet")
    (folder / "p.jsonl").write_text(jsonl(rows))
    return [folder / "p.jsonl", folder / "p.parquet"]


@pytest.mark.parametrize("kind", TABLES)
def test_a_table_gives_the_same_prompts_in_every_format(kind: str, tmp_path: Path, hub: Hub) -> None:
    rows, expected = TABLES[kind]
    for path in written(rows, tmp_path):
        assert read_prompts(str(path)).prompts == expected
    hub.columns = {name: [row.get(name) for row in rows] for row in rows for name in row}
    assert read_prompts("hub:owner/name").prompts == expected


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("text", 3),
        ("text", True),
        ("text", float("nan")),
        ("prompt", {"role": "user", "content": "hi"}),
        ("messages", "a text"),
        ("messages", chat(3)),
        ("conversation", []),
        ("prompt", ["a text"]),
    ],
)
def test_what_is_no_text_and_no_conversation_is_refused_in_every_format(
    column: str, value: object, tmp_path: Path, hub: Hub
) -> None:
    for path in written([{column: value}, {column: value}], tmp_path):
        place = "row" if path.suffix == ".parquet" else "line"
        with pytest.raises(InvalidInput, match=f"{place}s 1 and 2: .*(text|message)") as caught:
            read_prompts(str(path))
        assert len(caught.value.problems) == 1
    hub.columns = {"id": [1], "other": [value], column: [value]}
    for source in ("hub:owner/name", f"hub:owner/name:train:{column}"):
        with pytest.raises(InvalidInput, match=f"{source}, row 1: "):
            read_prompts(source)


def test_bytes_are_no_prompt_and_many_problems_are_counted(tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.table({"prompt": [b"How do I"] * 1000}), tmp_path / "p.parquet")
    with pytest.raises(InvalidInput, match=r"rows 1, 2, 3 and 997 more: 'prompt' is neither .* but bytes"):
        read_prompts(str(tmp_path / "p.parquet"))


def test_a_missing_value_of_a_hub_dataset_is_no_prompt(hub: Hub) -> None:
    hub.columns["text"] = ["one", None, "two"]
    assert read_prompts("hub:owner/name").prompts == ("one", "two")


def prompts_of(name: str, *prompts: str) -> PromptSet:
    return PromptSet(name, "0" * 64, prompts)


def test_sets_without_a_common_prompt_are_a_contrast() -> None:
    check_contrast(prompts_of("bad.txt", "a", "a", "b"), prompts_of("good.txt", "c", "A"))


def test_prompts_in_both_sets_are_counted_and_their_places_told_but_never_their_text() -> None:
    """Harmful text has no place in a terminal or the log of a build."""
    with pytest.raises(InvalidInput) as caught:
        check_contrast(
            prompts_of("bad.txt", "never shown", "b", "b", "x" * 500),
            prompts_of("good.txt", "b", "c", "never shown", "x" * 500),
        )
    assert "3 prompts are in both bad.txt and good.txt (bad.txt, lines 1, 2 and 4)" in str(caught.value)
    assert "shown" not in str(caught.value)
    many = [f"never shown {n}" for n in range(40)]
    with pytest.raises(InvalidInput) as caught:
        check_contrast(prompts_of("bad.txt", *many), prompts_of("good.txt", *many))
    assert "9, 10 and 30 more)" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.txt", "one\n\n two \nthree", "a.txt, line 3"),
        ("a.jsonl", '"one"\n\n{"prompt": "two"}\n', "a.jsonl, line 3"),
        ("a.json", '["one", "two"]', "a.json, item 1"),
    ],
)
def test_a_prompt_is_named_by_its_place_in_the_file_also_after_a_draw(
    name: str, text: str, says: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(text)
    read = read_prompts(str(tmp_path / name))
    assert read.named(["two"]) == says
    assert read.distinct.drawn(2).without(prompts_of("b", "one")).named(["two"]) == says


def test_conversations_are_prompts_too(tmp_path: Path) -> None:
    path = tmp_path / "talks.jsonl"
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    path.write_text(json.dumps({"messages": turns}) + '\n"A text."\n')
    conversation, text = read_prompts(str(path)).prompts
    assert isinstance(conversation, Conversation)
    assert messages_of(conversation, "Another one.") == turns  # its own system message goes before
    assert messages_of(text, "Another one.")[0] == {"role": "system", "content": "Another one."}


def test_every_bad_message_of_a_conversation_is_named(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "tool", "content": "x"}, {"role": "user"}]}) + "\n")
    with pytest.raises(InvalidInput, match=r"(?s)line 1: message 1.*line 1: message 2"):
        read_prompts(str(path))
    path.write_text(json.dumps({"messages": [{"role": "system", "content": "x"}]}) + "\n")
    with pytest.raises(InvalidInput, match="the last message must be the user's"):
        read_prompts(str(path))


def test_only_the_last_message_is_a_conversations_own_text(tiny_folder: Path) -> None:
    loaded = load(str(tiny_folder))
    talk = Conversation((("user", "Hello there"), ("assistant", "Hello"), ("user", "How are you?")))
    encoded = encode_all(loaded, [talk])[0]
    assert loaded.tokenizer.decode(encoded.ids[encoded.own]).strip() == "How are you?"
    assert encoded.ids == loaded.chat_ids(messages_of(talk))


def test_a_url_is_read_as_the_file_that_it_names(tmp_path: Path) -> None:
    (tmp_path / "set.json").write_text(json.dumps([{"instruction": p} for p in PROMPTS]), encoding="utf-8")
    handler = functools.partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        base = f"http://127.0.0.1:{server.server_port}"
        try:
            found = read_prompts(f"{base}/set.json?raw=true")
            assert found.prompts == PROMPTS
            assert found.name == "set.json"
            assert found.sha256 == hashlib.sha256((tmp_path / "set.json").read_bytes()).hexdigest()
            arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
            parquet.write_table(arrow.table({"text": list(PROMPTS)}), tmp_path / "set.parquet")
            assert read_prompts(f"{base}/set.parquet").prompts == PROMPTS
            with pytest.raises(InvalidInput, match=r"localhost:abc/x.txt: cannot be read"):
                read_prompts("http://localhost:abc/x.txt")
            with pytest.raises(InvalidInput, match=r"missing\.json: cannot be read: File not found"):
                read_prompts(f"{base}/missing.json")
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("steer.lab.prompts.MOST_BYTES", 10)
                with pytest.raises(InvalidInput, match="has more than 10 bytes"):
                    read_prompts(f"{base}/set.json")
        finally:
            server.shutdown()


def test_the_named_sets_are_pairs_that_can_be_read() -> None:
    """Where they are, and that the pieces are of a form that is read: they are not downloaded here."""
    for name, sets in NAMED_SETS.items():
        for source in sets:
            assert source.startswith("https://") or re.fullmatch(r"hub:[\w-]+/[\w-]+:\w+:\w+", source), (name, source)


@pytest.mark.parametrize("prompts", ["How do I", ["a", "b"], ({"role": "user"},), (1, 2), None, iter("ab")])
def test_a_set_is_of_whole_prompts(prompts: Any) -> None:
    """A text has letters, which are no prompts."""
    with pytest.raises(InvalidInput, match=r"prompts: .* is not accepted: a tuple of texts and Conversations"):
        PromptSet("name", "0" * 64, prompts)
