"""The HTTP side: authentication, carriers, policy and receipts for the routes of any engine, control routes, and an app
for the transformers engine.

Imports `hf` and what is below it, and neither `lab` nor `vllm`. `vllm` and the commands import it.
"""
