"""Read the items of files that people write, such as JSON lines. Each problem is reported once, with its lines."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from pydantic import ValidationError

from steer.errors import InvalidInput, describe_expected, field_path, problem_text

T = TypeVar("T")
#: How many line numbers are listed for one problem.
NAMED = 3
#: The column in a message of `json`, which differs from line to line.
_COLUMN = re.compile(r": line 1 column \d+ \(char \d+\)")


def unquoted(error: ValidationError, whole: str) -> Iterator[str]:
    """Each problem of `error` without its value, which may be a prompt or an answer: no message shows their text. A
    problem of no field is reported for `whole`."""
    for item in error.errors(include_url=False):
        what = describe_expected(item["type"], item.get("ctx", {}))
        message = f"must be {what}" if what else problem_text(item)
        yield f"{'.'.join(field_path(item['loc'])) or whole}: {message}"


def from_json(text: str) -> Any:
    """Raises InvalidInput for what is not JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f"not JSON: {error}") from error


def json_lines(source: str, text: str, read: Callable[[Any], T]) -> list[T]:
    """Apply `read` to each line of JSON that is not blank. Raises InvalidInput as `each` does."""
    lines = ((number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip())
    return each(source, "line", lines, lambda line: read(from_json(line)))


def each(source: str, kind: str, items: Iterable[tuple[int, Any]], read: Callable[[Any], T]) -> list[T]:
    """Apply `read` to each of the numbered `items` of `source`. `kind` names an item in messages, such as "line".
    Raises InvalidInput with every problem that `read` raises."""
    found, problems = list[T](), dict[str, list[tuple[int, str]]]()
    for number, item in items:
        try:
            found.append(read(item))
        except InvalidInput as error:
            for problem in error.problems:
                problems.setdefault(_COLUMN.sub("", problem), []).append((number, problem))
    if problems:
        raise InvalidInput(_summarised(source, kind, problems))
    return found


def _summarised(source: str, kind: str, problems: dict[str, list[tuple[int, str]]]) -> Iterator[str]:
    """One message for each problem, with the numbers of the items that have it."""
    for shared, those in problems.items():
        *others, last = (str(number) for number, _ in those)
        if not others:
            yield f"{source}, {kind} {last}: {those[0][1]}"
            continue
        if len(others) >= NAMED:
            others, last = others[:NAMED], f"{len(others) + 1 - NAMED} more"
        yield f"{source}, {kind}s {', '.join(others)} and {last}: {shared}"
