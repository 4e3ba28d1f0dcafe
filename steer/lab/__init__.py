"""Offline: measure a model on two prompt sets, make a direction, and find out what it does.

Imports `hf` and what is below it, and neither `serve` nor `vllm`, which has its own source and evaluator. Only the
commands and the experiments import it.
"""
