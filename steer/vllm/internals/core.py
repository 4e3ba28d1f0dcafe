"""The engine core's process: from which block of the prefix cache on a request's salt separates it from others."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from steer.vllm.internals.base import seam

if TYPE_CHECKING:
    from steer.vllm.internals.types import EngineCoreRequest

_NAME = "generate_block_hash_extra_keys"


def salt_later(parted: Callable[[EngineCoreRequest], tuple[str, int, str]]) -> None:
    """Have `parted(request)` tell of each salted request its own salt, which goes into the hash of its first block
    as ever, and from which token on what else of the salt does; 0 for all of it at the first block. Once a process.

    vLLM puts a salt into the first block's hash alone, and each hash into the next: so a request whose first tokens are
    nobody's but its own could never find what others have left of the same tokens.
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
    for module in [kv_cache_utils, *sys.modules.values()]:  # some have it under its name already
        if getattr(module, "__name__", "").startswith("vllm.v1.") and vars(module).get(_NAME) is original:
            setattr(module, _NAME, keys_of)
