"""A baked model, and a LoRA adapter, compute what the runtime serves at `writers`; what cannot be is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

import steer
from steer.direction import Direction
from steer.errors import DirectionError, InvalidInput, UnsupportedModel
from steer.lab import merge
from steer.lab.merge import RECEIPT, bake, edited, removal, verify
from steer.lab.weights import INDEX, Checkpoint, Writer
from tests import models

IDS = torch.randint(3, models.VOCABULARY, (2, 17), generator=torch.Generator().manual_seed(7))
BAKEABLE = [name for name in models.ARCHITECTURES if name not in models.NORM_BEHIND_WRITER]
#: Whose writers have biases, or experts that are no modules: no adapter reaches those.
NO_ADAPTER = ("gpt2", "gpt_neox", "mixtral", "qwen3_moe")


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits.float()


def relative(x: torch.Tensor, y: torch.Tensor) -> float:
    return float((x - y).abs().max() / y.abs().max())


def at_writers(model: Any, **more: Any) -> Direction:
    options: dict[str, Any] = dict(shared=True, embedding=True, sites=("writers",)) | more
    return models.direction(model, **options)


def served(model: Any, direction: Direction, strength: float = 1.0) -> torch.Tensor:
    entry = {"direction": "d", "strength": strength}
    with steer.attach(model, {"d": direction}, sites=("writers",)) as steering, steering(entry):
        return logits(model)


def baked(folder: Path, direction: Direction, strength: float = 1.0, **more: Any) -> Any:
    output = folder.parent / f"baked-{strength}"
    bake(Checkpoint(folder), removal(direction, strength), output, digest="d" * 64, **more)
    return tf.AutoModelForCausalLM.from_pretrained(output, dtype="auto").eval()


@pytest.mark.parametrize("strength", [1.0, 0.6])
@pytest.mark.parametrize("name", BAKEABLE)
def test_baked_equals_served(name: str, strength: float, tmp_path: Path) -> None:
    model = models.save(name, tmp_path / "model")
    direction = at_writers(model)
    made = baked(tmp_path / "model", direction, strength)
    expected = served(model, direction, strength)
    assert relative(logits(made), expected) <= 1e-4
    assert relative(logits(model), expected) > 1e-3, "the edit must do something, or the test shows nothing"
    verdict = verify(str(tmp_path / "model"), None, tmp_path / f"baked-{strength}", removal(direction, strength))
    assert verdict.logits is not None
    assert verdict.logits <= 1e-4
    assert (verdict.left is None) == (strength != 1.0)


def test_each_layers_own_rows_of_rank_two_are_baked_too(tmp_path: Path) -> None:
    model = models.save("llama", tmp_path / "model")
    direction = at_writers(model, k=2, shared=False)
    direction = replace(direction, weights=torch.tensor([1.0, 0.0, 0.5]))
    assert relative(logits(baked(tmp_path / "model", direction)), served(model, direction)) <= 1e-4


def test_one_vector_for_the_whole_stream_is_baked_as_writers_and_more_are_refused(tmp_path: Path) -> None:
    model = models.save("llama", tmp_path / "model")
    direction = models.direction(model, shared=True, mode="one_sided")
    made = baked(tmp_path / "model", direction)
    expected = replace(
        direction.with_meta(sites=("writers",), mode="ablate"), embedding=direction.directions[0].clone()
    )
    assert relative(logits(made), served(model, expected)) <= 1e-4
    with pytest.raises(InvalidInput, match="--sites writers"):
        removal(models.direction(model))


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_bfloat16_is_stored_as_bfloat16_and_verified(name: str, tmp_path: Path) -> None:
    model = models.save(name, tmp_path / "model", torch.bfloat16)
    direction = at_writers(model)
    made = baked(tmp_path / "model", direction)
    assert next(made.parameters()).dtype == torch.bfloat16
    verify(str(tmp_path / "model"), None, tmp_path / "baked-1.0", removal(direction))


@pytest.mark.parametrize("name", models.NORM_BEHIND_WRITER)
def test_a_norm_behind_the_writers_is_refused(name: str, tmp_path: Path) -> None:
    model = models.save(name, tmp_path / "model")
    with pytest.raises(UnsupportedModel, match="a norm stands between the writers and the stream"):
        baked(tmp_path / "model", at_writers(model))
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_tied_embeddings_are_untied_and_the_unembedding_stays(tmp_path: Path) -> None:
    model = models.save("cohere", tmp_path / "model")
    made = baked(tmp_path / "model", at_writers(model))
    assert not made.config.tie_word_embeddings
    assert torch.equal(made.get_output_embeddings().weight, model.get_output_embeddings().weight)
    assert not torch.equal(made.get_input_embeddings().weight, model.get_input_embeddings().weight)


def test_many_shards_give_the_same_model_and_an_index(tmp_path: Path) -> None:
    model = models.save("llama", tmp_path / "model")
    direction = at_writers(model)
    whole = baked(tmp_path / "model", direction)
    many = tmp_path / "many"
    model.save_pretrained(many / "model", max_shard_size="60KB")
    split = baked(many / "model", direction)
    assert len(list((many / "baked-1.0").glob("*.safetensors"))) > 2
    for (name, one), (_, other) in zip(whole.named_parameters(), split.named_parameters(), strict=True):
        assert torch.equal(one, other), name
    old, new = (json.loads((many / folder / INDEX).read_text()) for folder in ("model", "baked-1.0"))
    assert old["weight_map"] == new["weight_map"]
    assert old["metadata"]["total_size"] == new["metadata"]["total_size"]


def test_what_is_written_beside_the_weights(tmp_path: Path) -> None:
    model = models.save("llama", tmp_path / "model")
    (tmp_path / "model" / "README.md").write_text("of the old model")
    (tmp_path / "model" / "pytorch_model.bin").write_bytes(b"old")
    baked(tmp_path / "model", at_writers(model))
    names = {p.name for p in (tmp_path / "baked-1.0").iterdir()}
    assert {"tokenizer.json", "config.json", "model.safetensors", RECEIPT} <= names
    assert not {"README.md", "pytorch_model.bin"} & names
    assert json.loads((tmp_path / "baked-1.0" / RECEIPT).read_text())["direction"] == "d" * 64
    with pytest.raises(InvalidInput, match="exists already"):
        baked(tmp_path / "model", at_writers(model))


def test_lengths_are_kept_where_that_is_asked_and_the_direction_is_gone(tmp_path: Path) -> None:
    model = models.save("llama", tmp_path / "model")
    direction = at_writers(model)
    made = baked(tmp_path / "model", direction, preserve_norms=True)
    verdict = verify(str(tmp_path / "model"), None, tmp_path / "baked-1.0", removal(direction), preserve_norms=True)
    assert verdict.logits is None
    assert verdict.left is not None
    assert verdict.left <= 1e-5
    old, new = (m.model.layers[1].mlp.down_proj.weight for m in (model, made))
    torch.testing.assert_close(old.norm(dim=0), new.norm(dim=0))
    assert float((direction.directions[0, 0] @ new.detach()).abs().max()) <= 1e-5


@pytest.mark.parametrize("missed", ["model.layers.1.mlp.down_proj.weight", "model.embed_tokens.weight"])
def test_a_writer_that_was_missed_is_found_by_its_effect(
    missed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = models.save("llama", tmp_path / "model")
    direction = at_writers(model)

    def forgetful(writer: Writer, tensor: torch.Tensor, *rest: Any) -> torch.Tensor:
        return tensor if writer.name == missed else edited(writer, tensor, *rest)

    monkeypatch.setattr("steer.lab.merge.edited", forgetful)
    baked(tmp_path / "model", direction)
    with pytest.raises(UnsupportedModel, match="some writer"):
        verify(str(tmp_path / "model"), None, tmp_path / "baked-1.0", removal(direction))


def test_another_models_direction_and_other_weights_are_refused(tmp_path: Path) -> None:
    model = models.save("llama", tmp_path / "model")
    other = at_writers(models.tiny("qwen3"))
    with pytest.raises(DirectionError, match="made for Qwen3ForCausalLM"):
        baked(tmp_path / "model", other)
    config = tmp_path / "model" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"quantization_config": {}}))
    with pytest.raises(UnsupportedModel, match="quantised"):
        Checkpoint(tmp_path / "model")
    with pytest.raises(UnsupportedModel, match=r"config.json: cannot be read"):
        Checkpoint(tmp_path)
    assert model is not None


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("name", [n for n in BAKEABLE if n not in NO_ADAPTER])
@pytest.mark.filterwarnings("ignore")  # peft's own
def test_the_adapter_equals_served(name: str, k: int, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = models.save(name, tmp_path / "model")
    direction = at_writers(model, k=k)
    count = merge.export(Checkpoint(tmp_path / "model"), removal(direction, 0.8), tmp_path / "adapter", base="m")
    assert count == 2 * models.LAYERS + 1
    expected = served(model, direction, 0.8)
    adapted = peft.PeftModel.from_pretrained(model, tmp_path / "adapter").eval()
    assert relative(logits(adapted), expected) <= 1e-4


@pytest.mark.parametrize("name", NO_ADAPTER)
def test_what_an_adapter_cannot_reach_is_refused(name: str, tmp_path: Path) -> None:
    model = models.save(name, tmp_path / "model")
    says = "bias with a component" if name.startswith("gpt") else "no module of its own"
    with pytest.raises(UnsupportedModel, match=says):
        merge.export(Checkpoint(tmp_path / "model"), removal(at_writers(model)), tmp_path / "adapter", base="m")
    assert not (tmp_path / "adapter").exists()
