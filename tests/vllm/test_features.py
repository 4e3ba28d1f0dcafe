"""Steering beside what else vLLM has: LoRA adapters and quantised weights."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.vllm import device
from tests.vllm.conftest import IN_PROCESS
from tests.vllm.engines import PROMPTS, SPECS, Home, Reference, generate, parameters

#: vLLM's kernels for adapters take float32 on a CPU alone.
HALF: dict[str, Any] = {"dtype": "bfloat16"} if device.GPUS else {}
JOBS = [(prompt, spec) for spec in SPECS for prompt in PROMPTS]


@contextmanager
def started(home: Home, end: Callable[[Any], None], **options: Any) -> Iterator[Any]:
    llm = home.start(**IN_PROCESS, **options)
    try:
        yield llm
    finally:
        end(llm)


#: One token with its rivals, for `check_changes`.
ODDS: dict[str, Any] = {"max_tokens": 1, "logprobs": 20}


def check_changes(outputs: Sequence[Any], reference: Reference) -> None:
    """Where arithmetic is coarser than the reference's: the changes of log-probabilities that steering makes in answers
    to JOBS are there, with the noise of that."""
    expected: list[float] = []
    found: list[float] = []
    for (_, spec), output in zip(JOBS, outputs, strict=True):
        prompt = list(output.prompt_token_ids)
        steered, plain = (reference.logprobs(prompt, s, len(prompt))[-1] for s in (spec, "off"))
        for token, said in output.outputs[0].logprobs[0].items():
            expected.append(float(steered[token] - plain[token]))
            found.append(said.logprob - float(plain[token]))
    assert torch.corrcoef(torch.tensor([expected, found]))[0, 1] > 0.9


def adapted(model: Any, folder: Path, rank: int = 4) -> Any:
    """A random LoRA adapter on every output projection, written to `folder`; a copy of `model` with it merged."""
    merged, tensors = copy.deepcopy(model), {}
    generator = torch.Generator().manual_seed(3)
    for name, module in merged.named_modules():
        if name.endswith("o_proj"):
            down = 0.2 * torch.randn(rank, module.in_features, generator=generator)
            up = 0.2 * torch.randn(module.out_features, rank, generator=generator)
            tensors[f"base_model.model.{name}.lora_A.weight"] = down
            tensors[f"base_model.model.{name}.lora_B.weight"] = up
            module.weight.data += up @ down
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": ["o_proj"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return merged


def test_adapters_are_steered_like_the_model_that_they_make(tmp_path: Path, in_process: Callable[[Any], None]) -> None:
    from vllm.lora.request import LoRARequest

    home = Home.make("llama", tmp_path)
    merged = adapted(home.model, tmp_path / "adapter")
    plain, with_adapter = Reference(home), Reference(Home(merged, home.folder, home.directions))
    adapter = LoRARequest("adapter", 1, str(tmp_path / "adapter"))
    with started(home, in_process, enable_lora=True, max_lora_rank=8, enforce_eager=True, **HALF) as llm:
        # in batches of their own: stock vLLM on a CPU gives every request of a batch the adapter of its first
        for reference, lora in ((with_adapter, adapter), (plain, None), (with_adapter, adapter)):
            prompts, specs = zip(*JOBS, strict=True)
            asked = [parameters(spec, **(ODDS if HALF else {})) for spec in specs]
            outputs = llm.generate(prompts, asked, lora_request=[lora] * len(JOBS), use_tqdm=False)
            if HALF:
                check_changes(outputs, reference)
                continue
            for spec, output in zip(specs, outputs, strict=True):
                reference.check(output, spec)


#: CPUs without instructions for int8 add two products in 16 bits, which larger weights overflow.
LARGEST = 63


class Int8(torch.nn.Module):
    """A linear layer as vLLM's int8 kernels compute it: each row of the input is rounded to int8 with a scale of its
    own, the sums are whole numbers, the output is in the input's dtype."""

    def __init__(self, whole: torch.Tensor, scale: torch.Tensor) -> None:
        super().__init__()
        self.whole, self.scale = whole, scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        own = x.float().abs().amax(-1, keepdim=True) / 127
        rounded = (x.float() / own).round()
        return (rounded @ self.whole.mT * own * self.scale.mT).to(x.dtype)


def quantised(home: Home) -> Any:
    """The model in `home.folder` with int8 weights in the layout of compressed-tensors; a copy of it in bfloat16 that
    computes with int8 as well."""
    tensors = load_file(home.folder / "model.safetensors")
    rounded = copy.deepcopy(home.model).to(torch.bfloat16)
    for name, module in home.model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            scale = module.weight.data.abs().amax(1, keepdim=True) / LARGEST
            whole = (module.weight.data / scale).round()
            rounded.set_submodule(name, Int8(whole, scale))
            tensors[f"{name}.weight"], tensors[f"{name}.weight_scale"] = whole.to(torch.int8), scale
    save_file(tensors, home.folder / "model.safetensors", {"format": "pt"})
    int8 = {"num_bits": 8, "type": "int", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": int8 | {"strategy": "channel"},
        "input_activations": int8 | {"strategy": "token", "dynamic": True},
    }
    config = json.loads((home.folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }
    (home.folder / "config.json").write_text(json.dumps(config))
    return rounded


def test_a_quantised_model_is_steered_as_far_as_its_arithmetic_allows(
    tmp_path: Path, in_process: Callable[[Any], None]
) -> None:
    """In bfloat16, which the int8 kernels of every CPU take; some take float32 as well."""
    home = Home.make("llama", tmp_path)
    reference = Reference(Home(quantised(home), home.folder, home.directions))
    with started(home, in_process, dtype="bfloat16", enforce_eager=True) as llm:
        check_changes(generate(llm, JOBS, **ODDS), reference)
