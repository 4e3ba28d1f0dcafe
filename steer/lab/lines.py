"""The items of files that people write, such as JSON lines: each is read alone, and each problem is told once with the
lines that have it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from pydantic import ValidationError

from steer.errors import InvalidInput, describe_expected, field_path, problem_text

T = TypeVar("T")
#: Lines that are named of those with one problem.
NAMED = 3
#: Where in its line `json` stopped, which is another place in each.
_COLUMN = re.compile(r": line 1 column \d+ \(char \d+\)")


def unquoted(error: ValidationError, whole: str) -> Iterator[str]:
    """Each problem of `error` without the value that has it: that may be a prompt or an answer, whose text no message
    shows. `whole` is named where no field is at fault."""
    for item in error.errors(include_url=False):
        what = describe_expected(item["type"], item.get("ctx", {}))
        told = f"must be {what}" if what else problem_text(item)
        yield f"{'.'.join(field_path(item['loc'])) or whole}: {told}"


def from_json(text: str) -> Any:
    """Raises InvalidInput for what is not JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f"not JSON: {error}") from error


def json_lines(source: str, text: str, read: Callable[[Any], T]) -> list[T]:
    """What `read` makes of each line of JSON that is not blank. Raises InvalidInput as `each` does."""
    lines = ((number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip())
    return each(source, "line", lines, lambda line: read(from_json(line)))


def each(source: str, kind: str, items: Iterable[tuple[int, Any]], read: Callable[[Any], T]) -> list[T]:
    """What `read` makes of each of the numbered `items` of `source`, which are lines or of another `kind`. Raises
    InvalidInput with every problem that `read` has with them."""
    found, problems = list[T](), dict[str, list[tuple[int, str]]]()
    for number, item in items:
        try:
            found.append(read(item))
        except InvalidInput as error:
            for problem in error.problems:
                problems.setdefault(_COLUMN.sub("", problem), []).append((number, problem))
    if problems:
        raise InvalidInput(_told(source, kind, problems))
    return found


def _told(source: str, kind: str, problems: dict[str, list[tuple[int, str]]]) -> Iterator[str]:
    for shared, those in problems.items():
        *others, last = (str(number) for number, _ in those)
        if not others:
            yield f"{source}, {kind} {last}: {those[0][1]}"
            continue
        if len(others) >= NAMED:
            others, last = others[:NAMED], f"{len(others) + 1 - NAMED} more"
        yield f"{source}, {kind}s {', '.join(others)} and {last}: {shared}"
