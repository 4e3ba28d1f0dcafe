"""Merging: a direction written into a model's weights, or into a LoRA adapter, and verified by its effect.

`removal` says what is removed and `writers` from which tensors. The command `steer bake` imports it.
"""
