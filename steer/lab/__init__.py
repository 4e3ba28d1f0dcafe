"""Offline: measure a model on two prompt sets, make a direction, and find out what it does.

In the order of the work: `prompts`; `source`, `measure` and `measurement`; `derive` with `methods`; `evaluator` and
`probe`, which try candidates on a model; `behaviour`, `outcome` and `judge`, which tell what an answer does; `race`,
`select`, `fit` and `search`, which choose; `evaluation`, which reports. `formats`, `hub` and `merge` bring directions
in and out. All of them use `plots`, `progress`, `resume`, `statistics` and `tables`.

Imports `hf` and what is below it, and neither `serve` nor `vllm`, which has its own source and evaluator. Only the
commands and the experiments import it.
"""
