"""The engine on transformers: hooks on a loaded model, and its continuous batching with a token index.

Imports `runtime` and what is below it. The server, the lab and the commands import it; what depends on the internals of
transformers is in `internals` alone.
"""
