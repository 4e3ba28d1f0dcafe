"""Files that people write: policies, behaviours, prompts; and audit logs that something has gone over."""

from __future__ import annotations

import json
import tempfile
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

from steer.lab.behaviour import FOLDER, Behaviour
from steer.lab.prompts import messages_of, read_prompts
from steer.serve import audit, policy
from tests.fuzz import mutate
from tests.fuzz.surface import Surface
from tests.serve.rules import POLICY

#: What TOML has and a mutation would hardly find.
STATEMENTS = (
    *(
        f"x = {'1' * 5000}",
        "x = 0x" + "f" * 9000,
        "x = 1979-05-27T07:32:00Z",
        "x = inf",
        "x = -nan",
        "[[x]]",
        "x.y.z = 1",
    ),
    *("a." * 600 + "b = 1", "x = " + "[" * 900 + "]" * 900, '[keys."\\u0000"]', 'x = """\n' + "line\n" * 40 + '"""'),
    *("max_strength = 0x" + "f" * 5000, "steer = 1", "hash = []", 'required = ["refusal", {direction = "x"}]'),
)
_SCRATCH = tempfile.TemporaryDirectory(prefix="steer-fuzz-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None)


def _toml(rng: Random, source: str) -> bytes:
    lines = source.split("\n")
    for _ in range(rng.choice((1, 1, 2))):
        if rng.random() < 0.3:
            lines.insert(rng.randrange(len(lines) + 1), rng.choice(STATEMENTS))
        else:
            at = rng.randrange(len(lines))
            lines[at] = mutate.characters(rng, lines[at])
    data = "\n".join(lines).encode("utf-8", "surrogatepass")
    return mutate.octets(rng, data) if rng.random() < 0.05 else data


def _file(name: str, data: bytes) -> Path:
    path = Path(_SCRATCH.name) / name
    path.write_bytes(data)
    return path


def make_policy(rng: Random) -> bytes:
    return _toml(rng, POLICY)


def feed_policy(data: bytes) -> None:
    found = policy.read(data)
    assert found.keys


PATTERNS = (
    "(",
    "(?i)a",
    "x{2,1}",
    "x{99999999999999999999}",
    "(?P<a>x)",
    "\\1",
    "(?x)# ",
    "[[a]",
    "(" * 500 + ")" * 500,
)


def make_behaviour(rng: Random) -> bytes:
    source = rng.choice(sorted(FOLDER.glob("*.toml"))).read_text(encoding="utf-8")
    if rng.random() < 0.3:
        return f'description = "x"\npatterns = {json.dumps([rng.choice(PATTERNS), rng.choice(PATTERNS)])}'.encode()
    return _toml(rng, source)


def feed_behaviour(data: bytes) -> None:
    behaviour = Behaviour.load(str(_file("behaviour.toml", data)))
    behaviour.shown("I'm sorry, I can't help with that.")


@cache
def _parquet() -> bytes:
    import pyarrow
    import pyarrow.parquet

    path = Path(_SCRATCH.name) / "good.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["one", "two", None], "number": [1, 2, 3]}), path)
    return path.read_bytes()


ROWS: tuple[Any, ...] = (
    "a text",
    {"prompt": "a text"},
    {"messages": [{"role": "system", "content": "x"}, {"role": "user", "content": "hello"}]},
)


def make_prompts(rng: Random) -> tuple[str, bytes]:
    kind = rng.random()
    if kind < 0.3:
        return "x.txt", mutate.octets(rng, "one prompt\nanother, é\n\n".encode())
    if kind < 0.6:
        lines = [mutate.dumped(rng, mutate.within(rng, rng.choice(ROWS))) for _ in range(rng.randrange(4))]
        return "x.jsonl", "\n".join(lines).encode("utf-8", "surrogatepass")
    if kind < 0.97:
        tree = mutate.within(rng, [rng.choice(ROWS) for _ in range(rng.randrange(4))])
        return "x.json", mutate.dumped(rng, tree).encode("utf-8", "surrogatepass")
    return "x.parquet", mutate.octets(rng, _parquet())


def feed_prompts(source: tuple[str, bytes]) -> None:
    found = read_prompts(str(_file(*source)))
    for prompt in found.prompts:
        for message in messages_of(prompt):
            message["content"].encode()  # else no tokenizer takes it


@cache
def _log() -> bytes:
    path = Path(_SCRATCH.name) / "good.jsonl"
    log = audit.Audit(path, fsync="never")
    log.open()
    for number in range(6):
        log.write("admitted", key="alice", request_id=f"req-{number}", entries=[])
    log.close()
    return path.read_bytes()


def make_audit(rng: Random) -> bytes:
    lines = _log().splitlines(keepends=True)
    kind = rng.random()
    if kind < 0.3:
        rng.shuffle(lines)
    elif kind < 0.5:
        at = rng.randrange(len(lines))
        try:
            lines[at] = audit.seal(mutate.within(rng, json.loads(lines[at])))[0]
        except (TypeError, ValueError, AttributeError):  # no record, or none that can be written
            lines[at] = b"[1]\n"
    elif kind < 0.6:
        lines = lines[: rng.randrange(len(lines))]
    else:
        return mutate.octets(rng, b"".join(lines))
    return b"".join(lines)


def feed_audit(data: bytes) -> None:
    """Nothing that was changed is taken for whole."""
    good = Path(_SCRATCH.name) / "good.jsonl.head"
    report = audit.verify([_file("log.jsonl", data)], [audit.Head.parse(good.read_text())])
    assert report.problems or data == _log()


SURFACES = (
    Surface("policies", make_policy, feed_policy),
    Surface("behaviours", make_behaviour, feed_behaviour),
    Surface("prompts", make_prompts, feed_prompts),
    Surface("audits", make_audit, feed_audit),
)
