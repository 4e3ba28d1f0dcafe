"""The command `steer`: one module for each group of subcommands.

It may import everything, and nothing imports it but the experiments. Modules import torch inside of functions only, so
that help and completion are there at once.
"""

from __future__ import annotations


def main() -> None:
    from steer.cli.app import app

    app()
