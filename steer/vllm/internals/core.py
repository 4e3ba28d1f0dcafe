"""The process of the engine core: how it begins to serve, and from which block of the prefix cache on the salt of a
request counts."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from steer.vllm.internals.base import seam

if TYPE_CHECKING:
    from steer.vllm.internals.types import EngineCoreRequest, VllmConfig

_NAME = "generate_block_hash_extra_keys"


def salt_later(parted: Callable[[EngineCoreRequest], tuple[str, int, str]]) -> None:
    """Have a part of the salt of a steered request count only from the first steered token on. A second call of this
    function in a process has no effect.

    vLLM puts a salt only into the hash of the first block, and each hash into the next one. So a steered request could
    never find the blocks that others have left of the same tokens, even of the tokens before its steering begins.

    Args:
        parted: returns for a salted request its own salt, which goes into the hash of its first block as before, the
            first token from which the other part of the salt counts, and this other part. With the token 0 all of the
            salt goes into the first block.
    """
    from vllm.v1.core import kv_cache_utils

    original = seam(kv_cache_utils, _NAME, ["request", "start_token_idx", "end_token_idx", "start_mm_idx"])
    if hasattr(original, "steer"):
        return

    @functools.wraps(original)
    def keys_of(request: EngineCoreRequest, start_token_idx: int, end_token_idx: int, start_mm_idx: int) -> Any:
        salt = request.cache_salt
        own, first, ours = parted(request) if salt else ("", 0, "")
        if not first:
            return original(request, start_token_idx, end_token_idx, start_mm_idx)
        request.cache_salt = own or None
        try:
            found, following = original(request, start_token_idx, end_token_idx, start_mm_idx)
        finally:
            request.cache_salt = salt
        if start_token_idx <= first < end_token_idx:
            found = (*(found or ()), ("cache_salt", ours))
        return found, following

    keys_of.steer = True  # type: ignore[attr-defined]
    for module in [kv_cache_utils, *sys.modules.values()]:  # some modules have imported the function already
        if getattr(module, "__name__", "").startswith("vllm.v1.") and vars(module).get(_NAME) is original:
            setattr(module, _NAME, keys_of)


def before_serving(call: Callable[[VllmConfig], None]) -> None:
    """If this is the process of an engine core, have `call` called with its configuration before it serves. A second
    call of this function in a process has no effect."""
    home = sys.modules.get("vllm.v1.engine.core")
    for name in () if home is None else ("EngineCoreProc", "DPEngineCoreProc"):
        owner = seam(home, name)
        run = seam(owner, "run_busy_loop")
        if not hasattr(run, "steer"):
            owner.run_busy_loop = _beginning(run, call)


def _beginning(run: Callable[[Any], None], call: Callable[[VllmConfig], None]) -> Callable[[Any], None]:
    @functools.wraps(run)
    def running(engine: Any) -> None:
        call(engine.vllm_config)
        run(engine)

    running.steer = True  # type: ignore[attr-defined]
    return running
