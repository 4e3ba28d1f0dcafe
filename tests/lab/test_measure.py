"""Measuring: the means are those of plain forward passes however they are batched, under the server's own template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from steer.errors import InvalidInput
from steer.hf.load import Loaded, load
from steer.lab.measure import Conditions, Measurement, encode, measure
from steer.lab.prompts import PromptSet
from tests import models

HARMFUL = PromptSet("harmful", "0" * 64, tuple("abc" * n + "?" for n in range(1, 14)))
HARMLESS = PromptSet("harmless", "1" * 64, tuple("xy " * n + "z" for n in range(1, 14)))


@pytest.fixture(scope="module")
def loaded(tiny_folder: Path) -> Loaded:
    return load(str(tiny_folder))


def naive(
    loaded: Loaded, prompts: PromptSet, position: int, system: str | None = None
) -> tuple[torch.Tensor, list[Any]]:
    """Means by one prompt at a time and `output_hidden_states`, which holds inputs of blocks: hence the hooks here."""
    rows, everything = [], []
    for prompt in prompts.prompts:
        ids = encode(loaded, prompt, system).ids
        outputs: list[torch.Tensor] = []
        handles = [
            b.register_forward_hook(lambda _m, _a, o, to=outputs: to.append(o)) for b in loaded.model.model.layers
        ]
        with torch.no_grad():
            loaded.model(input_ids=torch.tensor([ids]))
        for handle in handles:
            handle.remove()
        rows.append(torch.stack([x[0, position].double() for x in outputs]))
        everything.append(torch.stack([x[0].double() for x in outputs]))
    return torch.stack(rows).mean(0), everything


@pytest.mark.parametrize("position", [-1, -4, 2])
def test_means_are_those_of_plain_forward_passes(loaded: Loaded, position: int) -> None:
    m = measure(loaded, HARMFUL, HARMLESS, Conditions(position), batch_size=5)
    torch.testing.assert_close(m.mean_harmful, naive(loaded, HARMFUL, position)[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(m.mean_harmless, naive(loaded, HARMLESS, position)[0], rtol=1e-5, atol=1e-5)


def test_the_mean_over_all_positions_is_over_the_prompts_own_text(loaded: Loaded) -> None:
    m = measure(loaded, HARMFUL, HARMLESS)
    _, everything = naive(loaded, HARMLESS, -1)
    own = []
    for prompt, x in zip(HARMLESS.prompts, everything, strict=True):
        ids = encode(loaded, prompt).ids
        start = len(loaded.tokenizer("<bos>[user] ", add_special_tokens=False).input_ids)
        assert loaded.tokenizer.decode(ids[start : start + len(prompt)]) == prompt
        own.append(x[:, start : start + len(prompt)])
    torch.testing.assert_close(m.mean_harmless_all, torch.cat(own, dim=1).mean(1), rtol=1e-5, atol=1e-5)


def test_the_result_does_not_depend_on_batching(loaded: Loaded) -> None:
    def with_size(size: int, winsorize: float | None) -> Measurement:
        return measure(loaded, HARMFUL, HARMLESS, Conditions(winsorize=winsorize), batch_size=size)

    for winsorize in (None, 0.9):
        one, many = with_size(1, winsorize), with_size(13, winsorize)
        for name in ("mean_harmful", "mean_harmless", "mean_harmless_all"):
            torch.testing.assert_close(getattr(one, name), getattr(many, name), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(with_size(4, 0.9).mean_harmful, with_size(4, None).mean_harmful)


def test_every_prompt_begins_with_one_bos_as_on_the_server(loaded: Loaded, tiny_server: Any) -> None:
    """The tokenizer adds a BOS and so does the template: together they would be two."""
    assert loaded.bos_count(loaded.text_ids("x")) == 1
    assert measure(loaded, HARMFUL, HARMLESS).bos_count == 1
    ids = encode(loaded, "hello").ids
    assert loaded.bos_count(ids) == 1
    assert tiny_server.chat("hello").json()["usage"]["prompt_tokens"] == len(ids)


def test_a_system_prompt_is_part_of_what_is_measured(loaded: Loaded) -> None:
    with_system = measure(loaded, HARMFUL, HARMLESS, Conditions(system_prompt="be brief"))
    expected, _ = naive(loaded, HARMFUL, -1, "be brief")
    torch.testing.assert_close(with_system.mean_harmful, expected, rtol=1e-5, atol=1e-5)


def test_bad_sets_are_refused(loaded: Loaded) -> None:
    with pytest.raises(InvalidInput, match="1 prompts stand in both"):
        measure(loaded, HARMFUL, PromptSet("mixed", "2" * 64, (HARMFUL.prompts[0], "other")))
    with pytest.raises(InvalidInput, match=r"prompt 2 has .* tokens, the context is 512"):
        measure(loaded, HARMFUL, PromptSet("long", "2" * 64, ("short", "x" * 600)))
    with pytest.raises(InvalidInput, match="so no position -100"):
        measure(loaded, HARMFUL, HARMLESS, Conditions(position=-100))


def test_activations_that_are_not_finite_are_named(tiny_folder: Path) -> None:
    broken = load(str(tiny_folder))
    with torch.no_grad():
        broken.model.model.layers[1].mlp.down_proj.weight[0, 0] = torch.inf
    with pytest.raises(InvalidInput, match=r"not finite at layers \[1, 2\]"):
        measure(broken, HARMFUL, HARMLESS)


def test_out_of_memory_halves_the_batch_and_goes_on(loaded: Loaded) -> None:
    """A forward pass that fails for more than three prompts, as an accelerator that is full does."""
    decoder = loaded.model.model
    inner, sizes = decoder.forward, []

    def limited(*args: Any, **kwargs: Any) -> Any:
        sizes.append(kwargs["input_ids"].shape[0])
        if sizes[-1] > 3:
            raise torch.OutOfMemoryError("too much")
        return inner(*args, **kwargs)

    expected = measure(loaded, HARMFUL, HARMLESS)
    decoder.forward = limited
    try:
        got = measure(loaded, HARMFUL, HARMLESS)
    finally:
        decoder.forward = inner
    assert sizes[:4] == [13, 13, 13, 3] or max(sizes) == 13
    torch.testing.assert_close(got.mean_harmful, expected.mean_harmful, rtol=1e-5, atol=1e-5)


def test_encode_marks_the_prompts_own_tokens() -> None:
    made = models.tokenizer()
    loaded = Loaded("tiny", None, models.tiny("llama"), made)
    for prompt in ("hello there", "a", "[user]", "x" * 40):
        encoded = encode(loaded, prompt)
        assert made.decode(encoded.ids[encoded.own]) in prompt
        assert len(encoded.ids[encoded.own]) >= len(prompt) - 1
