"""Files as other tools lay them out become ours at the right layer, shown on the activations of a model, and back."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import gguf
import pytest
import safetensors.torch
import torch
from torch import Tensor

import steer
from steer.direction import Direction
from steer.errors import DirectionError, InvalidInput, SpecError
from steer.geometry import linear_direction
from steer.lab import formats
from steer.lab.derive import Recipe, derive
from steer.lab.formats.foreign import Foreign
from steer.lab.measurement import Measurement, ModelFacts
from steer.lab.methods import make_method
from steer.names import Mode
from steer.shape import check_mode
from tests import models

D, LAYERS = models.D_MODEL, models.LAYERS
FACTS = ModelFacts(name="tiny", architecture="LlamaForCausalLM", layers=LAYERS, d_model=D)
FOREIGN = Foreign(FACTS)
IDS = torch.randint(3, models.VOCABULARY, (2, 9, 7), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def model() -> Any:
    return models.tiny("llama")


@pytest.fixture(scope="module")
def states(model: Any) -> tuple[Tensor, Tensor]:
    """`hidden_states` of two sets of prompts at their last token, `[layers + 1, prompts, d_model]`, as the tools that
    count block inputs read them."""
    with torch.no_grad():
        each = [model(input_ids=ids, output_hidden_states=True).hidden_states for ids in IDS]
    harmful, harmless = (torch.stack([h[:, -1] for h in hidden]) for hidden in each)
    return harmful, harmless


@pytest.fixture(scope="module")
def outputs(model: Any) -> tuple[Tensor, Tensor]:
    """The means of what our layers are, the outputs of the blocks, by hooks: `[layers, d_model]`."""
    found = []
    for ids in IDS:
        seen: list[Tensor] = []
        handles = [b.register_forward_hook(lambda _m, _a, out, to=seen: to.append(out)) for b in model.model.layers]
        with torch.no_grad():
            model(input_ids=ids)
        for handle in handles:
            handle.remove()
        found.append(torch.stack([x[:, -1].double().mean(0) for x in seen]))
    return found[0], found[1]


def saved_means(path: Path, states: tuple[Tensor, Tensor], upto: int) -> Path:
    harmful, harmless = (s.mean(1) for s in states)
    values = {f"harmful_{i}": harmful[i] for i in range(upto)} | {f"harmless_{i}": harmless[i] for i in range(upto)}
    torch.save(values | {f"refuse_{i}": harmful[i] - harmless[i] for i in range(upto)} | {"layers": upto}, path)
    return path


@pytest.mark.parametrize("upto", [LAYERS, LAYERS + 1])
def test_means_of_block_inputs_become_those_of_the_block_before(
    states: tuple[Tensor, Tensor], outputs: tuple[Tensor, Tensor], tmp_path: Path, upto: int
) -> None:
    found = formats.read(saved_means(tmp_path / "m.refuse", states, upto), FOREIGN)
    assert isinstance(found, Measurement)
    assert found.layers == LAYERS - 1, "what is behind the last block is normed in such a file"
    for statistics, expected in zip((found.harmful, found.harmless), outputs, strict=True):
        torch.testing.assert_close(statistics.mean[0], expected[: LAYERS - 1], rtol=1e-5, atol=1e-5)
    found.save(tmp_path / "m.measurement.safetensors")
    again = formats.read(tmp_path / "m.measurement.safetensors", Foreign())
    assert isinstance(again, Measurement)
    direction = derive(again, Recipe(make_method("linear"), 1))
    expected = linear_direction(outputs[1][1], outputs[0][1]).float()
    torch.testing.assert_close(direction.directions[0, 0], expected, rtol=1e-4, atol=1e-4)
    assert direction.meta.modes == ("ablate", "rotate")


def test_means_with_holes_or_of_nothing_are_refused(states: tuple[Tensor, Tensor], tmp_path: Path) -> None:
    harmful, harmless = (s.mean(1) for s in states)
    path = tmp_path / "m.pt"
    torch.save({"harmful_2": harmful[2], "harmless_2": harmless[2]}, path)
    with pytest.raises(InvalidInput, match=r"no entries \[1\]"):
        formats.read(path, FOREIGN)
    torch.save({"other": harmful[2]}, path)
    with pytest.raises(InvalidInput, match="no class means"):
        formats.read(path, FOREIGN)
    torch.save({"harmful_1": harmful[1] * torch.nan, "harmless_1": harmless[1]}, path)
    with pytest.raises(InvalidInput, match="harmful are not finite"):
        formats.read(path, FOREIGN)
    with pytest.raises(InvalidInput, match="give --model"):
        formats.read(path, Foreign())


@pytest.mark.parametrize("name", ["refuse", "refusenorm"])
def test_the_direction_beside_the_means_is_read_as_it_is(
    name: str, states: tuple[Tensor, Tensor], outputs: tuple[Tensor, Tensor], tmp_path: Path, caplog: Any
) -> None:
    """Of means that are nearly equal 16 bits leave no direction; the one that was made before they were rounded is."""
    harmful, harmless = (s.mean(1).double() for s in states)
    near = harmless + 1e-3 * (harmful - harmless)
    difference = near - harmless
    if name == "refusenorm":
        difference = torch.nn.functional.normalize(difference, dim=-1)
    values = {f"{name}_{i}": difference[i].float() for i in range(LAYERS)}
    means = {f"harmful_{i}": near[i].bfloat16() for i in range(LAYERS)}
    means |= {f"harmless_{i}": harmless[i].bfloat16() for i in range(LAYERS)}
    path = tmp_path / "m.refuse"
    torch.save(values | means, path)
    assert isinstance(formats.read(path, FOREIGN), Measurement)
    assert f"--tensor {name} takes the file's own direction" in caplog.text
    expected = torch.nn.functional.normalize(outputs[0] - outputs[1], dim=-1)[: LAYERS - 1].float()
    found = formats.read(path, Foreign(FACTS, tensor=name))
    assert isinstance(found, Direction)
    torch.testing.assert_close(found.directions[: LAYERS - 1, 0], expected, rtol=1e-3, atol=1e-3)
    assert not found.directions[LAYERS - 1].any()
    assert found.meta.modes == (("ablate", "add") if name == "refuse" else ("ablate",))
    one = formats.read(path, Foreign(FACTS, layer=1, tensor=name))
    assert isinstance(one, Direction)
    assert one.meta.source_layer == 1
    torch.testing.assert_close(one.directions[:, 0], expected[1].expand(LAYERS, D), rtol=1e-3, atol=1e-3)
    torch.save(values, path)
    alone = formats.read(path, FOREIGN)
    assert isinstance(alone, Direction)
    torch.testing.assert_close(alone.directions, found.directions)
    other = "refuse" if name == "refusenorm" else "refusenorm"
    for foreign, says in ((Foreign(FACTS, tensor=other), f"no direction '{other}'"), (Foreign(FACTS, 2), "not of 2")):
        with pytest.raises(InvalidInput, match=says):
            formats.read(path, foreign)


def test_a_resid_pre_direction_is_our_layer_before(
    states: tuple[Tensor, Tensor], outputs: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    difference = (states[0].mean(1) - states[1].mean(1)).double()
    torch.save(difference[2], tmp_path / "direction.pt")
    (tmp_path / "direction_metadata.json").write_text(json.dumps({"pos": -1, "layer": 2}))
    found = formats.read(tmp_path, FOREIGN)
    assert isinstance(found, Direction)
    assert found.meta.source_layer == 1
    expected = linear_direction(outputs[1][1], outputs[0][1]).float()
    for row in found.directions[:, 0]:
        torch.testing.assert_close(row, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(SpecError, match="its modes: ablate"):
        check_mode(found, "one_sided", "d")
    torch.save(torch.stack([difference[:LAYERS] * 2, difference[:LAYERS]]), tmp_path / "mean_diffs.pt")
    chosen = formats.read(tmp_path / "mean_diffs.pt", Foreign(FACTS, layer=1, position=-1))
    assert isinstance(chosen, Direction)
    torch.testing.assert_close(chosen.directions, found.directions)
    ranges = r"give --layer, from 0 to 1, and --position, from -2 to -1 \(the default\)"
    for foreign, given in (
        (FOREIGN, "$"),
        (Foreign(FACTS, layer=2), "; given: layer 2, position -1"),
        (Foreign(FACTS, layer=1, position=-3), "; given: layer 1, position -3"),
    ):
        with pytest.raises(InvalidInput, match=ranges + given):
            formats.read(tmp_path / "mean_diffs.pt", foreign)
    (tmp_path / "direction_metadata.json").write_text(json.dumps({"pos": -1, "layer": 0}))
    with pytest.raises(InvalidInput, match="embedding output"):
        formats.read(tmp_path, FOREIGN)


def test_a_direction_goes_to_resid_pre_and_back(model: Any, tmp_path: Path) -> None:
    made = models.direction(model, shared=True).with_meta(source_layer=1, parameters={"position": -2})
    assert formats.write(tmp_path / "direction.pt", made) == []
    assert json.loads((tmp_path / "direction_metadata.json").read_text()) == {"pos": -2, "layer": 2}
    again = formats.read(tmp_path, FOREIGN)
    assert isinstance(again, Direction)
    torch.testing.assert_close(again.directions, made.directions)
    assert again.meta.source_layer == 1
    vector = torch.load(tmp_path / "direction.pt", weights_only=True)
    assert vector.dtype == torch.float64
    torch.testing.assert_close(vector.norm().float(), (made.mean_harmful[1] - made.mean_harmless[1]).norm())
    with pytest.raises(InvalidInput, match="one source layer"):
        formats.write(tmp_path / "direction.pt", models.direction(model))
    with pytest.raises(InvalidInput, match="is there already, of another direction"):
        formats.write(tmp_path / "other.pt", made)
    assert formats.write(tmp_path / "direction.pt", made) == []
    assert "own mode is one_sided" in formats.write(tmp_path / "direction.pt", made.with_meta(mode="one_sided"))[0]
    weighed = replace(made.with_meta(strength=0.5), weights=made.weights * 0.5)
    told = formats.write(tmp_path / "direction.pt", weighed)
    assert [sentence.partition(": ")[2] for sentence in told] == [
        "the strength 0.5 is not in it",
        "the layers' weights are not in it",
    ]
    own = models.direction(model).with_meta(source_layer=1)
    assert "the rows of other layers than 1 are not in it" in formats.write(tmp_path / "direction.pt", own)[0]


def control_vector(
    path: Path,
    vectors: dict[int, Tensor],
    architecture: str = "controlvector",
    keys: dict[str, object] | None = None,
    second: int | None = None,
) -> Path:
    """`second`: the layer that has a second row."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_string("controlvector.model_hint", "llama")
    for key, value in (keys or {}).items():
        writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value))
    for layer, vector in vectors.items():
        writer.add_tensor(f"direction.{layer}", vector.numpy())
    if second is not None:
        writer.add_tensor(f"direction.{second}.1", vectors[second].flip(0).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def added(model: Any, vectors: dict[int, Tensor], scale: float) -> Tensor:
    """What llama.cpp computes: vector N is added to the output of the 0-based block N."""
    handles = [
        model.model.layers[n].register_forward_hook(lambda _m, _a, out, v=v: out + scale * v)
        for n, v in vectors.items()
    ]
    with torch.no_grad():
        out: Tensor = model(input_ids=IDS[0]).logits
    for handle in handles:
        handle.remove()
    return out


def test_a_control_vector_steers_as_llama_cpp_does_and_goes_back(model: Any, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    vectors = {n: torch.randn(D, generator=generator) for n in (1, 2)}
    found = formats.read(control_vector(tmp_path / "v.gguf", vectors), FOREIGN)
    assert isinstance(found, Direction)
    assert found.meta.mode == "add"
    Direction.from_bytes(found.to_bytes())
    with steer.attach(model, {"d": found}) as steering, steering("d=0.7"), torch.no_grad():
        served = model(input_ids=IDS[0]).logits
    torch.testing.assert_close(served, added(model, vectors, 0.7), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(served, added(model, {n - 1: v for n, v in vectors.items()}, 0.7), atol=1e-2)
    with pytest.raises(SpecError, match="its modes: ablate, add"):
        check_mode(found, "affine", "d")
    assert formats.write(tmp_path / "again.gguf", found) == []
    again = {t.name: torch.from_numpy(t.data.copy()) for t in gguf.GGUFReader(tmp_path / "again.gguf").tensors}
    assert again.keys() == {"direction.1", "direction.2"}
    for n, vector in vectors.items():
        torch.testing.assert_close(again[f"direction.{n}"], vector)


def test_an_exported_control_vector_adds_what_add_adds_and_another_mode_is_warned_of(
    model: Any, tmp_path: Path
) -> None:
    made = models.direction(model, mode="add", strength=0.5)
    told = formats.write(tmp_path / "v.gguf", made)
    assert len(told) == 1
    assert "layer 0 is left out" in told[0]
    reader = gguf.GGUFReader(tmp_path / "v.gguf")
    assert reader.fields["controlvector.model_hint"].contents() == "llama"
    assert reader.fields["steer.mode"].contents() == "add"
    vectors = {int(t.name.split(".")[1]): torch.from_numpy(t.data.copy()) for t in reader.tensors}
    for n in (1, 2):
        size = (made.mean_harmful[n] - made.mean_harmless[n]).norm()
        torch.testing.assert_close(vectors[n], 0.5 * size * made.directions[n, 0])
    told = formats.write(tmp_path / "v.gguf", models.direction(model, strength=0.5))
    (vector, *_) = (t for t in gguf.GGUFReader(tmp_path / "v.gguf").tensors if t.name == "direction.1")
    length = torch.linalg.vector_norm(torch.from_numpy(vector.data.copy()))
    torch.testing.assert_close(length, (made.mean_harmful[1] - made.mean_harmless[1]).norm(), msg="another mode's is 1")
    assert any("its mode is ablate" in sentence for sentence in told)
    with pytest.raises(InvalidInput, match="this direction has 2"):
        formats.write(tmp_path / "v.gguf", models.direction(model, k=2))
    with pytest.raises(InvalidInput, match="no length to add with"):
        formats.write(tmp_path / "v.gguf", models.direction(model).with_meta(modes=("ablate",)))
    made.weights[1:] = 0
    for name in ("none.gguf", "none.glp.gguf"):
        with pytest.raises(InvalidInput, match="acts at layer 0 alone"):
            formats.write(tmp_path / name, made.with_meta(strength=1.0))
        assert not (tmp_path / name).exists()


def test_bad_control_vectors_are_refused(tmp_path: Path) -> None:
    vector = torch.ones(D)
    for vectors, architecture, foreign, says in (
        ({1: vector}, "llama", FOREIGN, "general.architecture is 'llama'"),
        ({1: vector, 9: vector}, "controlvector", FOREIGN, "layer 9 is not one of"),
        ({1: torch.ones(D + 1)}, "controlvector", FOREIGN, "has vectors of 65 dimensions"),
        ({1: vector, 2: torch.ones(3)}, "controlvector", FOREIGN, "different numbers"),
        ({1: vector * torch.nan}, "controlvector", FOREIGN, "layer 1: .*not finite"),
        ({}, "controlvector", FOREIGN, "has no tensors"),
        ({1: vector}, "controlvector", Foreign(), "give --model"),
    ):
        control_vector(tmp_path / "v.gguf", vectors, architecture)
        with pytest.raises(InvalidInput, match=says):
            formats.read(tmp_path / "v.gguf", foreign)
    (tmp_path / "v.gguf").write_bytes(b"rubbish")
    with pytest.raises(InvalidInput, match="not a GGUF file"):
        formats.read(tmp_path / "v.gguf", FOREIGN)


@pytest.mark.parametrize(("mode", "k"), [("ablate", 1), ("ablate", 2), ("add", 1)])
def test_a_glp_file_comes_back_with_its_mode_strength_and_rows(model: Any, tmp_path: Path, mode: Mode, k: int) -> None:
    made = models.direction(model, k=k, mode=mode, strength=0.5)
    assert ["layer 0 is left out" in told for told in formats.write(tmp_path / "v.glp.gguf", made)] == [True]
    keys = {name: field.contents() for name, field in gguf.GGUFReader(tmp_path / "v.glp.gguf").fields.items()}
    assert keys["glp.mode"] == {"ablate": "project", "add": "add"}[mode]
    again = formats.read(tmp_path / "v.glp.gguf", FOREIGN)
    assert isinstance(again, Direction)
    assert (again.meta.mode, again.meta.strength, again.rank) == (mode, 0.5, k)
    assert not again.directions[0].any()
    made.directions[0] = 0
    with steer.attach(model, {"made": made, "again": again}) as steering, torch.no_grad():
        logits = []
        for name in ("made", "again"):
            with steering(f"{name}=0.5"):
                logits.append(model(input_ids=IDS[0]).logits)
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)


def test_what_a_glp_file_says_and_we_cannot_is_refused(model: Any, tmp_path: Path) -> None:
    for keys, says in (
        ({"glp.mode": "clamp"}, "glp.mode is 'clamp'; read is 'add' or 'project'"),
        ({"glp.spec_version": 3}, "glp.spec_version is 3"),
        ({"glp.hook_point": "ffn_out_pre_residual"}, "read is 'residual_stream_post_layer'"),
        ({"glp.layer_scales": "1,2"}, "glp.layer_scales is not read"),
        ({"glp.alpha_default": 99.0}, "glp.alpha_default is 99"),
        ({"glp.mode": "project", "glp.rank": 2}, "glp.rank is 2, and its layers have 1 vectors each"),
        ({"glp.mode": "project", "glp.gain": 2.0}, r"'glp\.gain': not known here"),
        ({"glp.hook_point": "residual_stream_post_layer"}, r"no glp\.mode, which says whether"),
        ({"glp.mode": "project", "glp.layer_ids_zero_based": "0"}, "'0', and its tensors are of the layers 1: one"),
        ({"glp.mode": "project", "glp.layer_ids_zero_based": "1,2"}, "'1,2', and its tensors are of the layers 1: "),
        ({"glp.mode": "project", "glp.layer_ids_zero_based": False}, "False, and its tensors are of the layers 1: "),
    ):
        path = control_vector(tmp_path / "v.gguf", {1: torch.ones(D)}, keys=dict(keys))
        with pytest.raises(InvalidInput, match=says):
            formats.read(path, FOREIGN)
    slanted = {"glp.mode": "project", "glp.rank": 2, "glp.orthonormal": False}
    path = control_vector(tmp_path / "v.gguf", {1: torch.randn(D)}, keys=slanted, second=1)
    with pytest.raises(InvalidInput, match="several vectors of a layer must be orthonormal"):
        formats.read(path, FOREIGN)
    uneven = control_vector(
        tmp_path / "v.gguf", {1: torch.ones(D), 2: torch.ones(D)}, keys={"glp.mode": "project"}, second=1
    )
    with pytest.raises(InvalidInput, match="its layers have 1 to 2 vectors"):
        formats.read(uneven, FOREIGN)
    for numbers in ("1, 2", "2,1", [1, 2], True):
        sound: dict[str, object] = {"glp.mode": "project", "glp.layer_ids_zero_based": numbers}
        path = control_vector(tmp_path / "v.gguf", {2: torch.ones(D), 1: torch.ones(D)}, keys=sound)
        assert isinstance(formats.read(path, FOREIGN), Direction)
    found = formats.read(control_vector(tmp_path / "v.gguf", {1: torch.ones(D)}, keys={"glp.mode": "project"}), FOREIGN)
    assert isinstance(found, Direction)
    assert found.meta.mode == "ablate"
    for made, says in (
        (models.direction(model, mode="one_sided"), "not 'one_sided'"),
        (models.direction(model, shared=True, sites=("writers",)), "not writers"),
        (models.direction(model, k=2, mode="add"), "this direction has 2"),
    ):
        with pytest.raises(InvalidInput, match=says):
            formats.write(tmp_path / "v.glp.gguf", made)


@pytest.mark.parametrize("name", ["v.gguf", "v.glp.gguf", "direction.pt"])
def test_no_other_file_weighs_attention_and_mlp_apart(model: Any, tmp_path: Path, name: str) -> None:
    with pytest.raises(InvalidInput, match="no such file can weigh attention and MLP apart"):
        formats.write(tmp_path / name, models.apart(model))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("shape", [(D,), (LAYERS, D), (LAYERS, 2, D)])
def test_plain_tensors_are_made_orthonormal(tmp_path: Path, shape: tuple[int, ...]) -> None:
    value = 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(1))
    safetensors.torch.save_file({"v": value, "other": torch.zeros(2)}, tmp_path / "v.safetensors")
    found = formats.read(tmp_path / "v.safetensors", Foreign(FACTS, tensor="v"))
    assert isinstance(found, Direction)
    Direction.from_bytes(found.to_bytes())
    rows = value.expand(LAYERS, 1, D) if value.ndim == 1 else value.reshape(LAYERS, -1, D)
    torch.testing.assert_close(found.directions[0, 0], rows[0, 0] / rows[0, 0].norm())
    if value.ndim == 2:
        torch.save(value, tmp_path / "v.pt")
        pickled = formats.read(tmp_path / "v.pt", FOREIGN)
        assert isinstance(pickled, Direction)
        assert torch.equal(pickled.directions, found.directions)
    one = formats.read(tmp_path / "v.safetensors", Foreign(FACTS, layer=1, tensor="v"))
    assert isinstance(one, Direction)
    assert one.meta.source_layer == 1
    torch.testing.assert_close(one.directions[:, 0], (rows[1, 0] / rows[1, 0].norm()).expand(LAYERS, D))
    with pytest.raises(InvalidInput, match=r"Give --tensor; it has .*v \["):
        formats.read(tmp_path / "v.safetensors", FOREIGN)


def test_vectors_of_layers_in_tensors_of_their_own_are_one_direction(tmp_path: Path) -> None:
    path, vectors = tmp_path / "v.safetensors", torch.randn(LAYERS, D, generator=torch.Generator().manual_seed(1))
    safetensors.torch.save_file({f"direction.{n}": vectors[n].clone() for n in (0, 2)}, path)
    found = formats.read(path, FOREIGN)
    assert isinstance(found, Direction)
    assert [bool(rows.any()) for rows in found.directions] == [True, False, True]
    torch.testing.assert_close(found.directions[2, 0], vectors[2] / vectors[2].norm())
    one = formats.read(path, Foreign(FACTS, layer=2))
    assert isinstance(one, Direction)
    assert torch.equal(one.directions[0], found.directions[2])
    with pytest.raises(InvalidInput, match=r"has vectors of the layers \[0, 2\], not of 1"):
        formats.read(path, Foreign(FACTS, layer=1))
    safetensors.torch.save_file({"direction.0": vectors[0].clone(), "direction.9": vectors[1].clone()}, path)
    with pytest.raises(InvalidInput, match="layer 9 is not one of"):
        formats.read(path, FOREIGN)


def test_a_vector_can_be_added_as_it_is_whatever_file_it_comes_in(model: Any, tmp_path: Path) -> None:
    vector = torch.randn(D, generator=torch.Generator().manual_seed(1))
    safetensors.torch.save_file({"v": vector}, tmp_path / "v.safetensors")
    torch.save(vector, tmp_path / "direction.pt")
    control_vector(tmp_path / "v.gguf", {1: vector})
    for name in ("v.safetensors", "direction.pt", "v.gguf"):
        found = formats.read(tmp_path / name, Foreign(FACTS, layer=None if name == "v.gguf" else 1))
        assert isinstance(found, Direction)
        assert found.meta.modes == ("ablate", "add"), name
        with steer.attach(model, {"d": found}) as steering, steering("d:add@1=0.7"):
            served = model(input_ids=IDS[0]).logits
        torch.testing.assert_close(served, added(model, {1: vector}, 0.7), rtol=1e-4, atol=1e-4)
    safetensors.torch.save_file({"v": torch.randn(LAYERS, 2, D)}, tmp_path / "v.safetensors")
    several = formats.read(tmp_path / "v.safetensors", FOREIGN)
    assert isinstance(several, Direction)
    assert several.meta.modes == ("ablate",), "to which of them does a length belong?"


def test_plain_tensors_of_another_shape_are_refused(tmp_path: Path) -> None:
    safetensors.torch.save_file({"v": torch.ones(LAYERS + 1, D)}, tmp_path / "v.safetensors")
    with pytest.raises(InvalidInput, match=r"shape \[4, 64\]; accepted: \[64\], \[3, 64\].*leave out the first"):
        formats.read(tmp_path / "v.safetensors", FOREIGN)


@pytest.mark.parametrize(
    "value",
    [
        torch.ones(D, dtype=torch.complex64),
        torch.ones(D).to_sparse(),
        torch.empty(D, device="meta"),
    ],
    ids=["complex", "sparse", "meta"],
)
def test_tensors_that_are_no_plain_numbers_are_refused(tmp_path: Path, value: Tensor) -> None:
    """A complex one would lose a half of itself, and the others would break in the middle."""
    means = {f"{label}_{i}": value for label in ("harmful", "harmless") for i in range(LAYERS)}
    for name, holds in (("direction.pt", value), ("m.pt", means), ("d.refuse", {"refuse_1": value})):
        torch.save(holds, tmp_path / name)
        with pytest.raises(InvalidInput, match="accepted: dense tensors of real numbers"):
            formats.read(tmp_path / name, Foreign(FACTS, layer=1))


def test_a_complex_tensor_of_a_plain_file_is_refused(tmp_path: Path) -> None:
    safetensors.torch.save_file({"v": torch.ones(D, dtype=torch.complex64)}, tmp_path / "v.safetensors")
    with pytest.raises(InvalidInput, match="accepted: dense tensors of real numbers"):
        formats.read(tmp_path / "v.safetensors", FOREIGN)


@pytest.mark.parametrize("number", ["9" * 5000, "1e400", "NaN"])
def test_numbers_that_are_none_are_refused(tmp_path: Path, number: str) -> None:
    torch.save(torch.ones(D), tmp_path / "direction.pt")
    (tmp_path / "direction_metadata.json").write_text(f'{{"layer": {number}, "pos": -1}}')
    torch.save({f"harmful_{number}": torch.ones(D), "harmless_1": torch.ones(D)}, tmp_path / "m.pt")
    vectors = gguf.GGUFWriter(tmp_path / "v.gguf", "controlvector")
    vectors.add_tensor("direction.1", torch.ones(D).numpy())
    vectors.add_tensor(f"direction.{number}", torch.ones(D).numpy())
    vectors.write_header_to_file()
    vectors.write_kv_data_to_file()
    vectors.write_tensors_to_file()
    vectors.close()
    for name in ("direction.pt", "m.pt", "v.gguf"):
        with pytest.raises(InvalidInput):
            formats.read(tmp_path / name, FOREIGN)
    (tmp_path / "direction_metadata.json").write_text("[" * 100_000)
    with pytest.raises(InvalidInput, match="gives no layer and pos"):
        formats.read(tmp_path / "direction.pt", FOREIGN)


def test_text_of_a_gguf_file_that_is_none_is_refused(tmp_path: Path) -> None:
    path = control_vector(tmp_path / "v.gguf", {1: torch.ones(D)}, keys={"glp.mode": "project"})
    path.write_bytes(path.read_bytes().replace(b"project", b"p\xffoject"))
    with pytest.raises(InvalidInput, match="not a GGUF file"):
        formats.read(path, FOREIGN)


class Evil:
    def __reduce__(self) -> Any:
        return print, ("this must not run",)


def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"harmful_1": Evil()}, tmp_path / "m.pt")
    with pytest.raises(InvalidInput, match="anything else in it is refused") as caught:
        formats.read(tmp_path / "m.pt", FOREIGN)
    told = str(caught.value)
    assert ("weights_only" in told, "\x1b" in told, "allow" in told.partition("was not an allowed")[2]) == (False,) * 3
    assert "must not run" not in capsys.readouterr().out


@pytest.mark.parametrize("program", [b"\x80\x02.", b"\x80\x020.", b"\x80\x02K\x01Q.", b"\x80\x02cbuiltins\n"])
def test_a_pickle_that_is_broken_is_refused(tmp_path: Path, program: bytes) -> None:
    """It takes from a stack that is empty, or names what is none: torch has an error of its own for each."""
    torch.save(torch.ones(D), tmp_path / "whole.pt")
    with ZipFile(tmp_path / "whole.pt") as whole, ZipFile(tmp_path / "direction.pt", "w") as broken:
        for name in whole.namelist():
            broken.writestr(name, program if name.endswith("data.pkl") else whole.read(name))
    with pytest.raises(InvalidInput, match="cannot be read as a file of tensors"):
        formats.read(tmp_path / "direction.pt", FOREIGN)


def test_our_own_files_go_through_unchanged_and_unknown_ones_are_named(model: Any, tmp_path: Path) -> None:
    made = models.direction(model)
    made.save(tmp_path / "d.safetensors")
    found = formats.read(tmp_path / "d.safetensors", Foreign())
    assert isinstance(found, Direction)
    formats.write(tmp_path / "e.safetensors", found)
    assert (tmp_path / "e.safetensors").read_bytes() == (tmp_path / "d.safetensors").read_bytes()
    formats.write(tmp_path / "v.gguf", made.with_meta(mode="add"))
    for given in ({"facts": FACTS}, {"layer": 1}, {"position": -1}, {"tensor": "v"}):
        with pytest.raises(InvalidInput, match="leaves no choice of it"):
            formats.read(tmp_path / "d.safetensors", Foreign(**given))
        if "facts" not in given:
            with pytest.raises(InvalidInput, match="leaves no choice of it"):
                formats.read(tmp_path / "v.gguf", Foreign(**given))
    for name, says in (("x.txt", "suffix '.txt'"), ("gone.pt", "does not exist"), ("", "neither direction.pt")):
        (tmp_path / "x.txt").write_text("x")
        with pytest.raises(InvalidInput, match=says):
            formats.read(tmp_path / name, FOREIGN)
    with pytest.raises(InvalidInput, match="accepted: "):
        formats.write(tmp_path / "x.txt", made)
    with pytest.raises(DirectionError):
        formats.write(tmp_path / "x.safetensors", made.with_meta(mode="add", modes=("ablate",)))
