"""What all commands share: errors as messages with an exit code, JSON on the standard output, quiet libraries."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import typer
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from steer.errors import InvalidInput, NothingFound, SteerError, problems_by_field

#: The place of a problem that is of no one option.
WHOLE = "the options"


@contextmanager
def reported(*, resumes: bool = False) -> Iterator[None]:
    """Turn our errors and those of the file system into messages and exit code 2, "nothing was found" into exit code 3,
    and an interruption into one line and exit code 130; anything else is a bug and keeps its traceback. To decorate
    commands with.

    `resumes`: the same command goes on where it was interrupted, which the line then says.
    """
    try:
        yield
    except KeyboardInterrupt:
        again = ": give the same command again to go on from here" if resumes else ""
        typer.echo(f"\ninterrupted{again}", err=True)
        raise typer.Exit(130) from None
    except BrokenPipeError:  # whoever reads the output has enough of it
        raise
    except OSError as error:  # no space, no permission, a disk that is gone
        file = f"{error.filename2 or error.filename}: " if error.filename else ""
        kept = ": give the same command again, and it goes on from what it has kept" if resumes else ""
        typer.echo(f"error: {file}{error.strerror or error}{kept}", err=True)
        raise typer.Exit(2) from None
    except ValidationError as error:  # options that do not go together, in a model that a command has made of them
        for problem in option_problems(error.errors(include_url=False)):
            typer.echo(f"error: {problem}", err=True)
        raise typer.Exit(2) from None
    except NothingFound as error:
        typer.echo(f"nothing found: {error}", err=True)
        raise typer.Exit(3) from None
    except SteerError as error:
        for problem in error.problems if isinstance(error, InvalidInput) else [str(error)]:
            typer.echo(f"error: {problem}", err=True)
        raise typer.Exit(2) from None


def option_problems(items: Iterable[ErrorDetails]) -> list[str]:
    """The items of a ValidationError as sentences, each with the option that is not accepted."""
    found = problems_by_field(items, WHOLE)
    names = {field: field.partition(".")[0].rstrip("_").replace("_", "-") for field in found}  # of a list too
    return [problem if field == WHOLE else f"--{names[field]}: {problem}" for field, problem in found.items()]


def quiet_libraries() -> None:
    """Progress bars and hints of libraries are not for the users of this command."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for name in ("ContinuousBatchingLogger", "httpx", "watchfiles"):
        logging.getLogger(name).setLevel(logging.ERROR)
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def log_warnings() -> None:
    logging.basicConfig(level="WARNING", format="%(levelname)s %(name)s: %(message)s")


def echo_resumed(folder: object) -> None:
    typer.echo(f"going on with what is in {folder} from before", err=True)


def echo_json(value: object) -> None:
    json.dump(value, sys.stdout, indent=2)
    typer.echo()


def echo_line(value: object) -> None:
    """Write a line of JSON, with its letters as they are where the standard output can have them."""
    text = json.dumps(value, ensure_ascii=False)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:  # halves of surrogate pairs, or a terminal of few letters
        text = json.dumps(value)
    typer.echo(text)
