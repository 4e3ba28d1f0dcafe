"""The engine on stock vLLM: a worker class, a plugin for the front end, and an ASGI middleware for its server.

Path of a request: `server` (carriers in, receipt out) → `frontend` (names to versions, prefix-cache salt, pins) →
`worker` (which rows act on which token of a step) → `steering_module` (the operation, traced into the compiled model).
Everything that knows vLLM's internals is in `internals`.
"""
