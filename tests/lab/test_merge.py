"""A baked model computes what the runtime serves at `writers`, or where a norm stands behind the weights what the plain
reference does; what cannot be baked, or fails its verification, leaves nothing behind."""

from __future__ import annotations

import errno
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from transformers.core_model_loading import Concatenate, MergeModulelist, Transpose

import steer
from steer.direction import Direction
from steer.errors import DirectionError, InvalidInput, UnsupportedModel
from steer.hf.internals import axis_in_file
from steer.hf.load import attention_implementation
from steer.lab import measurement
from steer.lab.merge import model as merge
from steer.lab.merge.model import CONFIG, RECEIPT, WEIGHTS, bake, export_adapter, new_folder
from steer.lab.merge.removal import RemovalPlan, Verdict, removal
from steer.lab.merge.weights import INDEX, Checkpoint, Writer
from tests import models, oracle
from tests.models import IDS, logits, relative

EXACT = [name for name in models.ARCHITECTURES if name not in models.NORM_BEHIND_WRITER]


def at_writers(model: Any, **more: Any) -> Direction:
    options: dict[str, Any] = dict(shared=True, embedding=True, sites=("writers",)) | more
    return models.direction(model, **options)


def served(model: Any, direction: Direction, strength: float = 1.0) -> torch.Tensor:
    entry = {"direction": "d", "strength": strength}
    with steer.attach(model, {"d": direction}, sites=("writers",)) as steering, steering(entry):
        return logits(model)


def made(folder: Path, direction: Direction, strength: float = 1.0, **more: Any) -> tuple[Any, Verdict | None]:
    output = folder.parent / f"baked-{strength}"
    _, verdict = bake(Checkpoint(folder), removal(direction, strength), output, digest="d" * 64, **more)
    attention = attention_implementation(tf.AutoConfig.from_pretrained(output))
    edited = tf.AutoModelForCausalLM.from_pretrained(output, dtype="auto", attn_implementation=attention)
    return edited.eval(), verdict


def baked(folder: Path, direction: Direction, strength: float = 1.0, **more: Any) -> Any:
    return made(folder, direction, strength, **more)[0]


@pytest.mark.parametrize("strength", [1.0, 0.6])
@pytest.mark.parametrize("name", EXACT)
def test_baked_equals_served(name: str, strength: float, tmp_path: Path) -> None:
    model = models.save(name, tmp_path / "model")
    direction = at_writers(model)
    edited, verdict = made(tmp_path / "model", direction, strength)
    expected = served(model, direction, strength)
    assert relative(logits(edited), expected) <= 1e-4
    assert relative(logits(model), expected) > 1e-3, "the edit must do something, or the test shows nothing"
    assert verdict is not None
    assert verdict.logits is not None
    assert verdict.logits <= 1e-4
    assert verdict.served is None
    assert (verdict.left is None) == (strength != 1.0)


@pytest.mark.parametrize("strength", [1.0, 0.6])
@pytest.mark.parametrize("name", models.NORM_BEHIND_WRITER)
def test_baked_through_a_norm_equals_the_reference_and_is_told_apart_from_what_is_served(
    name: str, strength: float, tmp_path: Path
) -> None:
    model = models.save(name, tmp_path / "model")
    direction = at_writers(model)
    edited, verdict = made(tmp_path / "model", direction, strength)
    v = direction.directions[0, 0]
    expected, as_served = (oracle.reference_logits(model, name, v, IDS, strength, before=b) for b in (True, False))
    assert relative(logits(edited), expected) <= 1e-4
    assert relative(served(model, direction, strength), as_served) <= 1e-4
    assert verdict is not None
    assert verdict.logits is not None
    assert verdict.logits <= 1e-4
    assert verdict.served is not None
    assert verdict.served > 1e-3
    assert "from what is served" in str(verdict)
    assert (verdict.left is None) == (strength != 1.0)
    assert json.loads((tmp_path / f"baked-{strength}" / RECEIPT).read_text())["norms_behind_writers"]


@pytest.mark.parametrize("name", models.NORM_BEHIND_WRITER)
def test_through_a_norm_nothing_of_any_row_is_left(name: str, tmp_path: Path) -> None:
    model = models.save(name, tmp_path / "model")
    direction = at_writers(model, k=2)
    edited, verdict = made(tmp_path / "model", direction)
    assert verdict is not None
    assert verdict.left is not None
    assert verdict.left <= 1e-5
    hidden = edited(input_ids=IDS, output_hidden_states=True, use_cache=False).hidden_states[:-1]
    left = torch.stack(hidden).detach() @ direction.directions[0].T
    assert float(left.abs().max()) <= 1e-4 * float(torch.stack(hidden).detach().norm(dim=-1).min())


def test_each_layers_own_rows_of_rank_two_are_baked_too(tmp_path: Path) -> None:
    model = models.save("llama", tmp_path / "model")
    direction = at_writers(model, k=2, shared=False)
    direction = replace(direction, weights=torch.tensor([1.0, 0.0, 0.5]))
    assert relative(logits(baked(tmp_path / "model", direction)), served(model, direction)) <= 1e-4


@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt_neox", "gemma3"])
def test_attention_and_mlp_are_baked_by_their_own_weights(name: str, tmp_path: Path) -> None:
    model = models.save(name, tmp_path / "model")
    direction = models.apart(model)
    edited, verdict = made(tmp_path / "model", direction)
    if name not in models.NORM_BEHIND_WRITER:
        assert relative(logits(edited), served(model, direction)) <= 1e-4
    assert (
        relative(logits(edited), logits(baked(tmp_path / "model", replace(direction, mlp_weights=None), 0.99))) > 1e-3
    )
    assert verdict is not None
    assert verdict.logits is not None
    assert verdict.logits <= 1e-4
    assert verdict.left is None, "the whole of it is removed nowhere"


def test_two_weights_of_a_block_that_writes_one_term_are_refused(tmp_path: Path) -> None:
    model = models.save("llama", tmp_path / "model")
    model.model.layers[1].mlp.down_proj.weight.data.zero_()
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(DirectionError, match=r"differs from 'weights' at layers \[1\]"):
        baked(tmp_path / "model", models.apart(model))
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_one_vector_for_the_whole_stream_is_baked_as_writers_and_more_are_refused(tmp_path: Path) -> None:
    model = models.save("llama", tmp_path / "model")
    direction = models.direction(model, shared=True, mode="one_sided")
    edited = baked(tmp_path / "model", direction)
    expected = replace(
        direction.with_meta(sites=("writers",), mode="ablate"), embedding=direction.directions[0].clone()
    )
    assert relative(logits(edited), served(model, expected)) <= 1e-4
    with pytest.raises(InvalidInput, match=r"each layer removes its own direction; .*--sites writers"):
        removal(models.direction(model))
    with pytest.raises(InvalidInput, match=r"'resid_post': some layers remove more of it than others \(weights\); "):
        removal(replace(direction, weights=torch.linspace(0, 1, direction.layers)))


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "gemma3"])
def test_16_bits_are_stored_as_16_bits_and_verified_as_32_are(name: str, tmp_path: Path) -> None:
    """With these rows the rounding of bfloat16 sends a token of the Mixtral to another expert."""
    model = models.save(name, tmp_path / "model", torch.bfloat16)
    edited, verdict = made(tmp_path / "model", at_writers(model, k=2, shared=False, seed=2))
    assert next(edited.parameters()).dtype == torch.bfloat16
    assert verdict is not None
    assert verdict.logits is not None
    assert verdict.logits <= 1e-4
    assert "before the weights were rounded" in str(verdict)


@pytest.mark.parametrize("strength", [1.0, 0.02])
def test_the_part_of_a_change_that_16_bits_lose_is_told(strength: float, tmp_path: Path) -> None:
    """It is the part of the removal: how much of vᵀW is gone, of what should be."""
    model = models.save("llama", tmp_path / "model", torch.bfloat16)
    direction = at_writers(model)
    edited, verdict = made(tmp_path / "model", direction, strength)
    assert verdict is not None
    assert verdict.kept is not None
    v = direction.directions[0].T
    gone, all_of_it = torch.tensor(0.0), torch.tensor(0.0)
    for name, weight in edited.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight", "embed_tokens.weight")):
            old = model.get_parameter(name).detach().float()
            before, after = ((w @ v if "embed" in name else w.T @ v) for w in (old, weight.detach().float()))
            gone += ((before - after) * before).sum()
            all_of_it += strength * before.square().sum()
    assert verdict.kept == pytest.approx(float(gone / all_of_it), abs=1e-4)
    assert f"leaves {verdict.kept:.1%} of the change" in str(verdict)
    assert (verdict.kept > 0.99) == (strength == 1)
    assert made(tmp_path / "model", direction, 0.0)[1].kept is None  # type: ignore[union-attr]


def test_weights_that_are_not_edited_may_be_anything(tmp_path: Path) -> None:
    """NaN, or a dtype of which torch cannot compare two tensors."""
    model = models.save("llama", tmp_path / "model", torch.bfloat16)
    file = tmp_path / "model/model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"][0, 0] = torch.nan
    for name in [name for name in tensors if name.endswith("q_proj.weight")]:
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    save_file(tensors, file, {"format": "pt"})
    written, verdict = bake(
        Checkpoint(tmp_path / "model"), removal(at_writers(model)), tmp_path / "made", digest="d" * 64, verified=False
    )
    assert written
    assert verdict is None


def test_a_file_that_holds_something_else_than_was_written_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a single number that no logit shows."""
    model = models.save("llama", tmp_path / "model", torch.bfloat16)
    written = measurement.save_tensors

    def worn(path: Path, tensors: dict[str, torch.Tensor], *rest: Any) -> None:
        tensors["model.layers.1.mlp.down_proj.weight"][0, 0] *= 1.01
        written(path, tensors, *rest)

    monkeypatch.setattr(merge, "save_tensors", worn)
    with pytest.raises(UnsupportedModel, match=r"layers\.1\.mlp\.down_proj\.weight is not as it was written"):
        baked(tmp_path / "model", at_writers(model))
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_experts_of_a_class_that_is_not_known_are_refused_and_not_guessed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are square: nothing but the class tells which side is the stream's."""
    model = models.save("llama4", tmp_path / "model")
    monkeypatch.setattr("steer.lab.merge.weights._INPUTS_FIRST", ("Conv1D",))
    with pytest.raises(UnsupportedModel, match="how a Llama4TextExperts lays out its weights is not known"):
        baked(tmp_path / "model", at_writers(model))
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    ("operations", "parameter", "file", "axis"),
    [
        ([], (4, 5), (4, 5), -2),
        ([MergeModulelist(dim=0)], (3, 4, 5), (4, 5), -2),
        ([Transpose(1, 2)], (3, 4, 5), (3, 5, 4), -1),
        ([MergeModulelist(dim=0), Transpose(1, 2)], (3, 4, 5), (5, 4), -1),
        ([Transpose(1, 2, check_dims=True)], (3, 4, 5), (3, 5, 4), -1),
        ([Transpose(1, 2, check_dims=True)], (3, 4, 5), (3, 4, 5), -2),
        ([MergeModulelist(dim=0), Concatenate(dim=1)], (3, 4, 5), (2, 5), None),
        ([], (3, 4, 5), (4, 5), None),
    ],
)
def test_the_axis_in_the_file_is_what_loading_makes_the_parameters_of(
    operations: list[Any], parameter: tuple[int, ...], file: tuple[int, ...], axis: int | None
) -> None:
    """The second dimension from the end, of the size 4, of a parameter that transformers makes by these operations."""
    assert axis_in_file(operations, -2, parameter, file) == axis
    if axis is not None:
        assert file[axis] == parameter[-2]


def test_a_norm_that_is_no_rms_norm_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = models.save("olmo2", tmp_path / "model")

    class Shifted(tf.models.olmo2.modeling_olmo2.Olmo2RMSNorm):
        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            return super().forward(hidden_states - hidden_states.mean(-1, keepdim=True))

    monkeypatch.setattr(tf.models.olmo2.modeling_olmo2, "Olmo2RMSNorm", Shifted)
    with pytest.raises(UnsupportedModel, match=r"\(Shifted\) stands between .* and is no RMS norm"):
        baked(tmp_path / "model", at_writers(model))
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_block_that_adds_up_otherwise_is_refused(tmp_path: Path) -> None:
    """BLOOM's attention hands on the stream with what it adds to it."""
    config = tf.BloomConfig(vocab_size=models.VOCABULARY, hidden_size=models.D_MODEL, n_layer=models.LAYERS, n_head=4)
    model = tf.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(UnsupportedModel, match="write what the block adds to the stream"):
        baked(tmp_path / "model", at_writers(model))
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_tied_embeddings_are_untied_and_the_unembedding_stays(tmp_path: Path) -> None:
    model = models.save("cohere", tmp_path / "model")
    edited = baked(tmp_path / "model", at_writers(model))
    assert not edited.config.tie_word_embeddings
    assert torch.equal(edited.get_output_embeddings().weight, model.get_output_embeddings().weight)
    assert not torch.equal(edited.get_input_embeddings().weight, model.get_input_embeddings().weight)


def test_a_tied_embedding_whose_copy_is_stored_too_is_untied(tmp_path: Path) -> None:
    """Of such files an engine that ties would take the edited embedding for the unembedding."""
    model = models.save("cohere", tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    tensors = load_file(path)
    assert "lm_head.weight" not in tensors
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, path, {"format": "pt"})
    edited = baked(tmp_path / "model", at_writers(model))
    assert not edited.config.tie_word_embeddings
    assert torch.equal(edited.get_output_embeddings().weight, model.get_output_embeddings().weight)


def test_a_tied_embedding_from_which_nothing_is_removed_stays_tied(tmp_path: Path) -> None:
    model = models.save("gemma3", tmp_path / "model")
    edited = baked(tmp_path / "model", at_writers(model, embedding=False))
    assert edited.config.tie_word_embeddings
    assert torch.equal(edited.get_input_embeddings().weight, model.get_input_embeddings().weight)


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


def test_of_two_sets_of_weights_the_one_that_is_loaded_is_baked(tmp_path: Path) -> None:
    """An index of another model stands beside them."""
    model = models.save("llama", tmp_path / "model")
    models.tiny("llama", seed=5).save_pretrained(tmp_path / "other", max_shard_size="60KB")
    for file in (tmp_path / "other").glob("*safetensors*"):
        shutil.copy(file, tmp_path / "model")
    loaded = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert torch.equal(logits(loaded.eval()), logits(model))
    direction = at_writers(model)
    assert relative(logits(baked(tmp_path / "model", direction)), served(model, direction)) < 1e-4


def test_a_model_with_an_adapter_is_refused(tmp_path: Path) -> None:
    """transformers applies it, and it would not be baked."""
    models.save("llama", tmp_path / "model")
    (tmp_path / "model" / "adapter_config.json").write_text("{}")
    with pytest.raises(UnsupportedModel, match="PEFT adapter, which transformers applies: merge it"):
        Checkpoint(tmp_path / "model")


def test_two_runs_do_not_write_one_folder(tmp_path: Path) -> None:
    """And what a run that was killed has left is not in the next one's."""
    left = tmp_path / ".out.tmp"
    (left / "sub").mkdir(parents=True)
    (left / "sub" / "old").touch()
    (left / "old").touch()
    with new_folder(tmp_path / "out") as folder:
        (folder / "mine").touch()
        with pytest.raises(InvalidInput, match="another run writes to it"), new_folder(tmp_path / "out"):
            pass
        assert [each.name for each in folder.iterdir() if each.name != ".lock"] == ["mine"]
    assert [each.name for each in tmp_path.iterdir()] == ["out"]
    assert [each.name for each in (tmp_path / "out").iterdir()] == ["mine"]
    with pytest.raises(RuntimeError), new_folder(tmp_path / "none"):
        raise RuntimeError
    assert [each.name for each in tmp_path.iterdir()] == ["out"]


def test_the_strength_is_one_of_removal(tmp_path: Path) -> None:
    direction = at_writers(models.tiny("llama"), mode="ablate", strength=0.6)
    assert removal(direction).strength == 0.6
    assert removal(direction, 0.3).strength == 0.3
    shared = models.direction(models.tiny("llama"), shared=True, mode="add", strength=-1.0)
    assert removal(shared).strength == 1.0
    for wrong in (10.5, -1000.0, float("nan"), float("inf")):
        with pytest.raises(InvalidInput, match="is not accepted: a number from -10 to 10"):
            removal(direction, wrong)


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
    edited, verdict = made(tmp_path / "model", direction, preserve_norms=True)
    assert verdict is not None
    assert verdict.logits is None
    assert verdict.left is not None
    assert verdict.left <= 1e-5
    old, new = (m.model.layers[1].mlp.down_proj.weight for m in (model, edited))
    torch.testing.assert_close(old.norm(dim=0), new.norm(dim=0))
    assert float((direction.directions[0, 0] @ new.detach()).abs().max()) <= 1e-5


def test_what_nothing_can_be_compared_with_is_written_only_where_that_is_told(tmp_path: Path) -> None:
    model = models.save("llama", tmp_path / "model")
    direction = at_writers(model)
    with pytest.raises(InvalidInput, match="nothing to verify this by"):
        baked(tmp_path / "model", direction, 0.5, preserve_norms=True)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    assert made(tmp_path / "model", direction, 0.5, preserve_norms=True, verified=False)[1] is None


@pytest.mark.parametrize("strength", [1.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("missed", ["model.layers.1.mlp.down_proj.weight", "model.embed_tokens.weight"])
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_a_writer_that_was_missed_is_found_by_its_effect_and_nothing_is_kept(
    name: str, missed: str, dtype: torch.dtype, strength: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = models.save(name, tmp_path / "model", dtype)
    direction, edited = at_writers(model), RemovalPlan.edited

    def forgetful(plan: RemovalPlan, writer: Writer, tensor: torch.Tensor, *rest: Any) -> torch.Tensor:
        return tensor if writer.name == missed else edited(plan, writer, tensor, *rest)

    monkeypatch.setattr(RemovalPlan, "edited", forgetful)
    with pytest.raises(UnsupportedModel, match=r"some writer.*Nothing was kept"):
        baked(tmp_path / "model", direction, strength)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    assert made(tmp_path / "model", direction, strength, verified=False)[1] is None
    assert not json.loads((tmp_path / f"baked-{strength}" / RECEIPT).read_text())["verified"]


def test_no_more_than_a_block_is_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights of more than one block, or of a block and an embedding, are never there together."""
    from steer.hf.streamed import Streamed

    model = models.save("qwen3_moe", tmp_path / "model")
    largest = max(sum(p.numel() for p in b.parameters()) for b in model.model.layers)
    largest = max(largest, model.lm_head.weight.numel())
    load, most = Streamed._load, 0

    def watched(streamed: Streamed, own: list[str]) -> None:
        nonlocal most
        load(streamed, own)
        most = max(most, sum(p.numel() for p in streamed.model.parameters() if any(p.stride())))  # others are empty

    monkeypatch.setattr(Streamed, "_load", watched)
    baked(tmp_path / "model", at_writers(model))
    assert 0 < most <= largest


def test_a_full_disk_is_an_error_of_the_file_and_nothing_is_kept(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    model = models.save("llama", tmp_path / "model")
    checkpoint, removed = Checkpoint(tmp_path / "model"), removal(at_writers(model, embedding=False))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    half = (tmp_path / "model" / "model.safetensors").stat().st_size // 2
    cases: list[tuple[Any, int, dict[str, str]]]
    cases = [(bake, half, {"digest": "d" * 64}), (export_adapter, 2000, {"base": "m"})]
    for write, most, more in cases:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
        try:
            with pytest.raises(OSError, match="File too large") as raised:
                write(checkpoint, removed, tmp_path / "made", **more)
            assert raised.value.strerror == os.strerror(errno.EFBIG), "and no words of the library"
            assert str(raised.value.filename).endswith("safetensors")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert [path.name for path in tmp_path.iterdir()] == ["model"]


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


#: Whose writers have biases, or experts that are no modules: no adapter reaches those.
NO_ADAPTER = ("gpt2", "gpt_neox", "phi", "mixtral", "qwen3_moe", "gpt_oss", "llama4")


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("name", [n for n in models.ARCHITECTURES if n not in NO_ADAPTER])
@pytest.mark.filterwarnings("ignore")  # peft's own
def test_the_adapter_equals_served_or_the_reference(name: str, k: int, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = models.save(name, tmp_path / "model")
    direction = at_writers(model, k=k)
    removed = removal(direction, 0.8)
    count, verdict = export_adapter(Checkpoint(tmp_path / "model"), removed, tmp_path / "adapter", base="m")
    assert count == 2 * models.LAYERS + 1
    assert verdict is not None
    assert verdict.logits is not None
    assert verdict.logits <= 1e-4
    if name not in models.NORM_BEHIND_WRITER:
        expected = served(model, direction, 0.8)
    elif k == 1:
        expected = oracle.reference_logits(model, name, direction.directions[0, 0], IDS, 0.8, before=True)
    else:
        return
    adapted = peft.PeftModel.from_pretrained(model, tmp_path / "adapter").eval()
    assert relative(logits(adapted), expected) <= 1e-4


@pytest.mark.filterwarnings("ignore")  # peft's own
def test_the_adapter_of_two_weights_equals_what_is_served(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = models.save("llama", tmp_path / "model")
    direction = models.apart(model)
    export_adapter(Checkpoint(tmp_path / "model"), removal(direction), tmp_path / "adapter", base="m")
    expected = served(model, direction)
    adapted = peft.PeftModel.from_pretrained(model, tmp_path / "adapter").eval()
    assert relative(logits(adapted), expected) <= 1e-4


@pytest.mark.parametrize("name", NO_ADAPTER)
def test_what_an_adapter_cannot_reach_is_refused(name: str, tmp_path: Path) -> None:
    model = models.save(name, tmp_path / "model")
    says = "bias with a component" if name in ("gpt2", "gpt_neox", "phi") else "no module of its own"
    with pytest.raises(UnsupportedModel, match=says):
        export_adapter(Checkpoint(tmp_path / "model"), removal(at_writers(model)), tmp_path / "adapter", base="m")
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def small(kind: Any, folder: Path, **more: Any) -> Any:
    """A tiny model of a configuration of `kind`, saved."""
    sizes = dict(vocab_size=models.VOCABULARY, hidden_size=models.D_MODEL, num_hidden_layers=models.LAYERS)
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(kind(**sizes, **more)).eval()
    model.save_pretrained(folder)
    return model


#: OPT without biases, which an adapter does not reach.
OPT: dict[str, Any] = dict(num_attention_heads=4, ffn_dim=96, max_position_embeddings=128, enable_bias=False)


@pytest.mark.parametrize(
    ("kind", "more", "says"),
    [
        (tf.OPTConfig, OPT | {"word_embed_proj_dim": models.D_MODEL}, "embed_positions.* is given attention_mask"),
        (tf.MambaConfig, {"state_size": 8}, "mixer.out_proj.weight: is no module that PEFT takes in mamba"),
    ],
)
def test_what_peft_would_refuse_or_run_otherwise_is_refused_before_anything_is_written(
    kind: Any, more: dict[str, Any], says: str, tmp_path: Path
) -> None:
    model = small(kind, tmp_path / "model", **more)
    with pytest.raises(UnsupportedModel, match=says):
        export_adapter(Checkpoint(tmp_path / "model"), removal(at_writers(model)), tmp_path / "adapter", base="m")
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_model_that_changes_its_weights_where_it_runs_is_refused_in_a_sentence(tmp_path: Path) -> None:
    model = small(tf.RwkvConfig, tmp_path / "model", context_length=64, rescale_every=2)
    with pytest.raises(UnsupportedModel, match=r"reads one weight after the other fails .* cannot be baked"):
        baked(tmp_path / "model", at_writers(model))


def test_an_embedding_of_another_width_than_the_stream_is_refused(tmp_path: Path) -> None:
    """What it writes goes through a projection first."""
    model = small(tf.OPTConfig, tmp_path / "model", **OPT, word_embed_proj_dim=32)
    with pytest.raises(UnsupportedModel, match=r"embed_tokens.weight: writes vectors of 32, and the stream has 64"):
        baked(tmp_path / "model", at_writers(model))
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_the_class_that_an_adapter_fits_is_told_where_it_is_not_that_of_the_text_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("qwen3_5", "llava"):
        model = models.save(name, tmp_path / name)
        adapter = tmp_path / f"{name}-adapter"
        export_adapter(Checkpoint(tmp_path / name), removal(at_writers(model)), adapter, base="m", verified=False)
        told = "fits Qwen3_5ForConditionalGeneration, and not Qwen3_5ForCausalLM, as AutoModelForCausalLM loads it"
        assert (told in caplog.text) == (name == "qwen3_5")
        caplog.clear()


@pytest.mark.parametrize("spoilt", ["scale", "factor"])
def test_an_adapter_that_does_something_else_is_found_by_its_effect_and_not_kept(
    spoilt: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is verified is what was written: read again from the files, as PEFT reads them."""
    model = models.save("llama", tmp_path / "model")
    given: dict[str, Any] = dict(output=tmp_path / "adapter", base="m")
    checkpoint, removed, factors = Checkpoint(tmp_path / "model"), removal(at_writers(model)), merge._factors

    def wrong(*args: Any) -> dict[str, torch.Tensor]:
        found = factors(*args)
        return {
            name: -t if spoilt == "factor" and "layers.1.mlp" in name and "_A" in name else t
            for name, t in found.items()
        }

    monkeypatch.setattr(merge, "_factors", wrong)
    if spoilt == "scale":
        write = merge._write_json
        monkeypatch.setattr(merge, "_write_json", lambda path, config: write(path, config | {"lora_alpha": 2}))
    with pytest.raises(UnsupportedModel, match="Nothing was kept"):
        export_adapter(checkpoint, removed, **given)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    assert export_adapter(checkpoint, removed, verified=False, **given)[1] is None
    assert {p.name for p in (tmp_path / "adapter").iterdir()} == {WEIGHTS, CONFIG}
    with pytest.raises(InvalidInput, match="exists already"):
        export_adapter(checkpoint, removed, **given)


def test_a_failed_check_names_only_what_was_measured() -> None:
    assert Verdict(0.5, None, None).found == "logits differ by 0.5"
    assert Verdict(None, None, 0.25).found == "0.25 of the stream is left along it"
    assert Verdict(0.5, 0.1, 0.25).found == "logits differ by 0.5, 0.25 of the stream is left along it"
