"""From settings to a listening server: load, attach, check, fill the registry, serve. Any step that fails ends the
start."""

from __future__ import annotations

import gc
import logging
import sys
from types import FrameType

import uvicorn

from steer.errors import InvalidInput, RequestError, UnsupportedModel
from steer.hf.batching import start_engine
from steer.hf.load import load, template_parameters
from steer.hf.steering import Steering
from steer.registry import Registry
from steer.serve.app import build
from steer.serve.control import Control
from steer.serve.generation import Served
from steer.settings import KEEP_ALIVE, ServeSettings, served_name
from steer.spec import parse
from steer.tokenization import Chat

log = logging.getLogger("steer")
#: Direction rows for each token where the settings do not say: an eager hook pays only for those that are used.
RANK = 4


def prepare(model: str, settings: ServeSettings) -> Served:
    """Everything but the socket. Raises SteerError when the server must not start."""
    control = Control(settings)
    control.listen(settings.host, settings.origins)
    loaded = load(model, **settings.loading)
    warn_of_template(loaded)
    if taken := template_parameters().intersection(settings.template_variables):
        raise InvalidInput(
            f"--chat-template-kwargs: '{name}' is not a variable of a model's template" for name in sorted(taken)
        )
    steering = Steering(loaded.model, sites=settings.site_list, rows=settings.rows, rank=settings.rank or RANK)
    anatomy = steering.anatomy
    log.info(
        "%s: %d layers × %d, attached at %s, self-check passed",
        anatomy.architecture,
        anatomy.layers,
        anatomy.d_model,
        ", ".join(steering.sites),
    )
    if not settings.directions.is_dir():
        raise UnsupportedModel(f"the directions folder '{settings.directions}' does not exist; make it or name another")
    registry = Registry(steering.placement(loaded.thinking), settings.directions)
    registry.sync()
    default = parse(settings.default_steer)
    registry.resolve(default)
    name = settings.served_model_name or served_name(model)
    control.start(registry, name)  # before the engine, whose threads would keep a process that refuses to start alive
    context = min(settings.context or loaded.context, loaded.context)
    engine = start_engine(
        steering, loaded.eos_ids, context=context, capacity=settings.max_requests, cache_tokens=settings.cache_tokens
    )
    log.info("engine: %s, context %d", engine.description, engine.context)
    served = Served(name, loaded, engine, registry, control, default, settings.max_body, settings.template_variables)
    log.info(
        "serving '%s'; directions: %s; requests that name no steering get: %s",
        served.model_name,
        ", ".join(registry.names()) or "none",
        settings.default_steer,
    )
    return served


def warn_of_template(chat: Chat) -> None:
    """Say at start what every request to /v1/chat/completions would be refused for."""
    try:
        chat.chat_ids([{"role": "user", "content": "x"}])
    except RequestError as error:
        log.warning("no chat can be served, only /v1/completions: %s", error)


class _Server(uvicorn.Server):
    """uvicorn raises the signal again when it has drained, which makes a clean stop look like a crash: exit 0 instead.
    A second signal stops without waiting."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.force_exit = self.should_exit
        self.should_exit = True


def stay_responsive() -> None:
    """What was loaded lives as long as the process, so no collection of garbage goes through it again; and a thread
    that computes hands the interpreter to the event loop after a millisecond instead of five."""
    gc.collect()
    gc.freeze()
    sys.setswitchinterval(0.001)


def serve(model: str, settings: ServeSettings) -> None:
    """Run until SIGTERM or SIGINT; running requests are served to their end, if it comes within `settings.drain`."""
    served = prepare(model, settings)
    stay_responsive()
    try:
        config = uvicorn.Config(
            build(served),
            host=settings.host,
            port=settings.port,
            log_level=settings.log_level,
            access_log=False,
            timeout_keep_alive=KEEP_ALIVE,
            timeout_graceful_shutdown=settings.drain,
        )
        _Server(config).run()
    finally:
        served.engine.stop()
        served.control.stop()
