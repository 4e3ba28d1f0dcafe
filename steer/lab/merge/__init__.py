"""Merging: a direction written into a model's weights, or into a LoRA adapter, and verified by its effect.

`removal` says what is removed and verifies it, `weights` finds the tensors, `model` writes. The command `steer bake`
imports it.
"""
