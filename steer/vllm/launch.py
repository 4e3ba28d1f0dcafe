"""`steer serve --backend vllm`: vLLM's own OpenAI server, started with steering on."""

from __future__ import annotations

from collections.abc import Sequence

from steer.serve.control import Control
from steer.settings import KEEP_ALIVE
from steer.vllm import internals, plugin
from steer.vllm.server import Middleware, check_door
from steer.vllm.settings import KEY, EngineSettings

#: Seconds in which several API servers may end, where the options say none.
SHUTDOWN = 5


def serve(model: str, settings: EngineSettings, options: Sequence[str] = ()) -> None:
    """Run vLLM's OpenAI server until SIGTERM or SIGINT. `options`: any of `vllm serve`, as on its command line.

    In this process, or in as many processes of vLLM's as there are API servers.
    """
    plugin.register()
    args = internals.server.server_arguments(model, options)
    check_door(Control(settings.control), args)  # before the minute that the engine takes to start
    if not any(option.partition("=")[0] in ("--allowed-origins", "--allowed_origins") for option in options):
        args.allowed_origins = []  # vLLM's own default lets every page in the world call the server
    args.worker_cls = internals.WORKER
    args.additional_config = dict(args.additional_config or {}) | {KEY: settings.model_dump(mode="json")}
    if (args.api_server_count or args.data_parallel_size) > 1:  # or vLLM kills them, and no log is closed
        args.shutdown_timeout = args.shutdown_timeout or SHUTDOWN
    args.middleware = [*args.middleware, f"{Middleware.__module__}.{Middleware.__name__}"]
    internals.server.run_server(args, keep_alive=KEEP_ALIVE)
