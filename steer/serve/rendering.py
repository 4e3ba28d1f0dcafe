"""Says once in the log where chats are rendered otherwise than the prompts that a direction was measured on were."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from steer.registry import Registry
from steer.spec import Spec
from steer.tokenization import rendered_otherwise

log = logging.getLogger("steer")
FIELD = "chat_template_kwargs"
#: Different warnings that are given: what clients send must not fill memory or the log.
MOST = 256


class RenderingWatch:
    """`default` are the template's variables where a request gives none. A direction of answers without thinking is
    another one than that of answers with it, so who steers the one with the other should know."""

    def __init__(self, registry: Registry, default: Mapping[str, object] | None = None) -> None:
        self.registry, self.default = registry, dict(default or {})
        self._told: set[tuple[str, str]] = set()

    def look(self, spec: Spec, body: Mapping[str, object]) -> None:
        """At an admitted request: `body` is its JSON."""
        if not spec or "messages" not in body or len(self._told) >= MOST:
            return
        given = body.get(FIELD)
        variables = self.default | given if isinstance(given, dict) else self.default
        for entry, meta in zip(spec.entries, self.registry.metas(spec), strict=False):
            told = rendered_otherwise(meta.template, variables)
            if told and (entry.digest, told) not in self._told:
                self._told.add((entry.digest, told))
                log.warning("direction '%s' acts on chats of another form: %s", entry.direction, told)
