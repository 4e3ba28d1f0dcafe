"""All that Steer knows of vLLM's internals: one function for each seam, each of which fails with a sentence.

A module for each process; `steer.vllm` asks them for what is done to vLLM, and touches nothing of it but the small
objects in `types`. Supported are the releases that the tests run with. An older one is refused, a newer one is warned
of, and a seam that is missing stops the start and is named; but for `core`, without which the prefix cache shares less.
"""

from steer.vllm.internals import config, core, engine, server, worker
from steer.vllm.internals.base import WORKER, check_version, seam, version

__all__ = ["WORKER", "check_version", "config", "core", "engine", "seam", "server", "version", "worker"]
