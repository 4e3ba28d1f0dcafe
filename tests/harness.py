"""The evaluation harness `lm_eval` as a client of a running server, on a task of one question made on the fly."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

TASK = """\
task: steer_demo
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{question}}}}"
{more}
metric_list: [{{metric: {metric}, aggregation: mean, higher_is_better: true}}]
"""
GENERATED = 'doc_to_target: "{{answer}}"\ngeneration_kwargs: {until: ["NEVER"], max_gen_toks: 6, do_sample: false}'
CHOSEN = 'doc_to_target: 0\ndoc_to_choice: "{{choices}}"'
#: The question "hello" as the harness sends it: token ids of `tests.models.tokenizer`, without a BOS.
HELLO = [3 + ord(letter) - 32 for letter in "hello"]


def evaluate(url: str, model: str, tokenizer: str, folder: Path, *, kind: str, answer: str, key: str = "none") -> float:
    """The score of `model` at `url` by `local-completions`.

    kind `generate_until`: does it answer "hello" with `answer`? kind `multiple_choice`: does it find the first of two
    choices likelier, by log-probabilities of an echoed prompt?
    """
    (folder / "data.jsonl").write_text(json.dumps({"question": "hello", "answer": answer, "choices": ["ab", "cd"]}))
    metric, more = ("exact_match", GENERATED) if kind == "generate_until" else ("acc", CHOSEN)
    (folder / "task.yaml").write_text(TASK.format(data=folder / "data.jsonl", kind=kind, metric=metric, more=more))
    done = subprocess.run(
        [
            *(sys.executable, "-m", "lm_eval", "run", "--model", "local-completions", "--tasks", "steer_demo"),
            *("--include_path", str(folder), "--output_path", str(folder / "out"), "--model_args"),
            f"model={model},base_url={url}/v1/completions,tokenizer_backend=huggingface,tokenizer={tokenizer},"
            "num_concurrent=1,max_retries=1",
        ],
        capture_output=True,
        text=True,
        timeout=1500,
        cwd=folder,
        env={
            "HF_HOME": str(folder / "hf"),
            "PATH": os.defpath,
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "OPENAI_API_KEY": key,
        },
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (results,) = (folder / "out").rglob("results*.json")
    return float(json.loads(results.read_text())["results"]["steer_demo"][f"{metric},none"])
