"""The general plugin of vLLM (entry point `vllm.general_plugins`): called in every process, maybe more than once.

It does nothing to an engine that is started without `additional_config={"steer": ...}`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from steer.errors import UnsupportedModel
from steer.vllm import frontend, internals, settings

if TYPE_CHECKING:
    from steer.vllm.internals.types import AsyncLLM, VllmConfig


def register() -> None:
    internals.engine.on_engine_start(_prepare, frontend.attach_sync, _attach_async)


def _attach_async(engine: AsyncLLM, found: settings.EngineSettings, serves: bool) -> None:
    from steer.vllm.server import check_app

    frontend.attach_async(engine, found, serves)
    internals.server.on_app_built(check_app)


def _prepare(config: VllmConfig) -> settings.EngineSettings | None:
    """The settings of an engine that is about to start, or None where steering is off. `config`: VllmConfig."""
    found = settings.read(config.additional_config)
    if found is None:
        return None
    worker = config.parallel_config.worker_cls
    if worker != internals.WORKER:
        raise UnsupportedModel(
            f"additional_config['{settings.KEY}'] needs worker_cls='{internals.WORKER}', it is {worker!r}"
        )
    internals.check_version()
    internals.config.check_config(config, readout=bool(found.readout))
    return found
