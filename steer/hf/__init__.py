"""The engine on transformers: hooks on a loaded model, and its continuous batching with a steering index."""
