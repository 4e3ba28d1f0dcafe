"""`python -m tests.vllm.run_equal FOLDER OPTIONS`: start an engine with these options (JSON) and compare a mixed batch
with transformers, swaps in between. A process of its own, for engines that need another environment."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tests import models
from tests.vllm import device
from tests.vllm.engines import PROMPTS, SPECS, Home, Reference, generate


def main(folder: Path, options: dict[str, object]) -> None:
    from steer.vllm import frontend

    name = str(options.pop("model", "llama"))
    expected = options.pop("runner", device.RUNNER)
    home = Home.make(name, folder)
    reference = Reference(home)
    llm = home.start(**options)
    claims = llm.collective_rpc("steer_hello")
    assert {claim["runner"] for claim in claims} == {expected}, claims
    registries = (frontend.of(llm).registry, reference.registry)
    jobs = [(prompt, spec) for spec in (*SPECS, "swapped") for prompt in PROMPTS]
    for seed in (11, 12):
        for registry in registries:
            registry.put("swapped", models.direction(home.model, seed=seed).to_bytes(), store=False)
        for (_, spec), output in zip(jobs, generate(llm, jobs), strict=True):
            reference.check(output, spec)
    if "speculative_config" in options:
        assert sum(m.value for m in llm.get_metrics() if m.name == "vllm:spec_decode_num_draft_tokens") > 0
    print("EQUAL", [claim["layers"] for claim in claims])


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
