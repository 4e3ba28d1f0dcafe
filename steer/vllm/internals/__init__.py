"""All that Steer knows of vLLM's internals: one function for each seam, and each raises an error with a clear message.

There is one module for each process. `steer.vllm` calls them for everything that it does to vLLM, and touches no vLLM
object itself except the small ones in `types`. Supported are the releases that the tests run with. An older release is
refused, a newer one gives a warning, and a missing seam stops the start with its name. The exception is `core`: without
it the prefix cache shares less.
"""

from steer.vllm.internals import config, core, engine, server, worker
from steer.vllm.internals.base import WORKER, check_version, seam, version

__all__ = ["WORKER", "check_version", "config", "core", "engine", "seam", "server", "version", "worker"]
