"""The embedded demo model: a tiny Llama with a refusal to find, and the prompts to find it with."""

from pathlib import Path

MODEL: Path = Path(__file__).parent / "model"
"""Folder of the embedded model and its tokenizer, in the layout of the Hugging Face hub."""

PROMPTS: Path = Path(__file__).parent / "prompts"
"""Folder of `<class>.<split>.txt`, one prompt a line."""
