"""The command `steer`: one module for each group of subcommands.

It may import everything, and nothing imports it but the experiments. Modules import torch inside of functions only, so
that help and completion are there at once.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command `steer` with `arguments`, those of the process by default."""
    try:
        # here, so that an interruption while it is imported ends with a line as well
        from steer.cli.app import app

        app(arguments)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)
    except OSError as error:  # what is printed outside of a command, as its help, where the disk is full
        print(f"error: {error.strerror or error}", file=sys.stderr)
        sys.exit(2)
