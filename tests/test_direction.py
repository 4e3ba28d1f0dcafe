"""Direction files: what is written is read back, and nothing else is ever accepted."""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import pickle
import re
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

import steer
from steer import direction as module
from steer.direction import Direction, DirectionMeta, check_fits, digest, read_file
from steer.errors import DirectionError
from steer.files import write_file
from steer.names import check_name
from tests import models

law = settings(deadline=None, max_examples=40)
MODEL = models.tiny("llama")
GOOD = models.direction(MODEL, embedding=True)
assert GOOD.embedding is not None
EMBEDDING = GOOD.embedding
DATA = GOOD.to_bytes()


def safetensors_file(header: dict[str, Any] | str, body: bytes) -> bytes:
    """A file with any header, also one that the library would not write."""
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    return struct.pack("<Q", len(text)) + text + body


def parts(data: bytes = DATA) -> tuple[dict[str, Any], bytes]:
    """The header and the tensors' bytes of a file."""
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def file_of(tensors: dict[str, Tensor], meta: str | None = None) -> bytes:
    text = GOOD.meta.model_dump_json() if meta is None else meta
    return safetensors.torch.save({k: t.contiguous() for k, t in tensors.items()}, {"format": "pt", "steer": text})


def changed(**tensors: Tensor | None) -> bytes:
    """The good file with some tensors replaced, added or (None) left out."""
    return file_of({k: t for k, t in (GOOD.tensors() | tensors).items() if t is not None})


def meta_of(**fields: Any) -> str:
    return json.dumps(GOOD.meta.model_dump(mode="json") | fields)


def condition(layer: int = 1, **sides: float) -> dict[str, Any]:
    one = {"name": "a.txt", "sha256": "0" * 64, "count": 8}
    return {"layer": layer, "harmful": one, "harmless": one, "missed": 1, "caught": 0} | sides


def problems_of(data: bytes) -> tuple[str, ...]:
    with pytest.raises(DirectionError) as caught:
        Direction.from_bytes(data, source="here")
    assert all(problem.startswith("here: ") for problem in caught.value.problems)
    assert str(caught.value).encode(), "a message that can be sent"
    return caught.value.problems


def same(x: Direction, y: Direction) -> bool:
    ours, theirs = x.tensors(), y.tensors()
    return x.meta == y.meta and ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


@pytest.mark.parametrize("embedding", [False, True])
@pytest.mark.parametrize("k", [1, 2, 4])
def test_a_direction_survives_bytes_and_files(k: int, embedding: bool, tmp_path: Path) -> None:
    made = models.direction(MODEL, k=k, embedding=embedding)
    assert same(Direction.from_bytes(made.to_bytes()), made)
    path = tmp_path / "d.safetensors"
    saved = made.save(path)
    assert same(Direction.load(path), made)
    assert saved == digest(path.read_bytes()) == hashlib.sha256(path.read_bytes()).hexdigest()
    assert (made.layers, made.rank, made.d_model) == (models.LAYERS, k, models.D_MODEL)


@given(st.text(max_size=300), st.integers(0, 2**40) | st.none(), st.dictionaries(st.text(max_size=8), st.integers()))
@law
def test_any_metadata_survives(text: str, number: int | None, selection: dict[str, int]) -> None:
    made = GOOD.with_meta(model=text, bos_count=number, system_prompt=text, selection=selection)
    assert same(Direction.from_bytes(made.to_bytes()), made)


def test_no_length_of_the_header_makes_a_file_unreadable() -> None:
    """The header's length stands in the first bytes of the file, where some of its values look like other formats."""
    lengths = set()
    for size in range(0, 600, 8):
        data = GOOD.with_meta(model="m" * size).to_bytes()
        lengths.add(data[0])
        assert Direction.from_bytes(data).meta.model == "m" * size
    assert len(lengths) == 32, "every first byte that the format's padding allows"


def test_a_direction_is_equal_to_what_its_file_holds_and_to_nothing_else() -> None:
    read = Direction.from_bytes(DATA)
    assert read == GOOD
    assert hash(read) == hash(GOOD)
    assert len({read, GOOD, replace(GOOD)}) == 1
    others: list[object] = [DATA, None, GOOD.with_meta(strength=0.5), replace(GOOD, embedding=None)]
    others += [replace(GOOD, weights=w) for w in (GOOD.weights * 0.5, GOOD.weights[:1], GOOD.weights.to_sparse())]
    assert [other for other in others if other == GOOD] == []
    assert len({GOOD, *others}) == len(others) + 1


def test_a_direction_is_shown_in_one_line() -> None:
    shown = repr(GOOD)
    assert "\n" not in shown
    assert len(shown) < 120
    for words in (
        GOOD.meta.method,
        GOOD.meta.mode,
        f"{GOOD.layers} layers",
        f"d_model {GOOD.d_model}",
        digest(DATA)[:12],
    ):
        assert words in shown
    assert "1 problems" in repr(replace(GOOD, weights=GOOD.weights.double()))
    assert "builtins.int" in repr(replace(GOOD, meta=7))  # type: ignore[arg-type]


def test_equal_directions_have_one_digest_and_any_change_another() -> None:
    assert len({digest(replace(GOOD).to_bytes()) for _ in range(12)}) == 1, "however often it is written"
    assert digest(GOOD.with_meta(strength=0.5).to_bytes()) != digest(DATA)
    weights = GOOD.weights.clone()
    weights[0] = 0.5
    assert digest(replace(GOOD, weights=weights).to_bytes()) != digest(DATA)


def test_weights_of_attention_and_mlp_are_for_terms_that_are_told_apart() -> None:
    made = models.apart(MODEL)
    assert same(Direction.from_bytes(made.to_bytes()), made)
    assert [layer["mlp_weight"] for layer in made.profile()] == models.APART[1].tolist()
    assert [layer["mlp_weight"] for layer in GOOD.profile()] == [None] * models.LAYERS
    assert digest(made.to_bytes()) != digest(replace(made, mlp_weights=None).to_bytes())
    for changes, says in (
        ({"mlp_weights": torch.ones(models.LAYERS)}, "'mlp_weights' is for the site 'writers', this file's sites are"),
        ({"mlp_weights": torch.ones(models.LAYERS + 1)}, "'mlp_weights' has shape [4], it must be [3]"),
        ({"mlp_weights": torch.ones(models.LAYERS).half()}, "'mlp_weights' has dtype float16"),
        ({"mlp_weights": torch.full((models.LAYERS,), torch.nan)}, "'mlp_weights' has values that are not finite"),
    ):
        assert any(says in problem for problem in problems_of(changed(**changes)))


def test_unsteered_layers_are_rows_of_zeros() -> None:
    rows = GOOD.directions.clone()
    rows[1] = 0
    assert Direction.from_bytes(changed(directions=rows)).problems() == []
    assert [layer["steered"] for layer in replace(GOOD, directions=rows).profile()] == [True, False, True]


def zip_of_torch() -> bytes:
    out = io.BytesIO()
    torch.save(GOOD.tensors(), out)
    return out.getvalue()


def flawed(tensor: Tensor, at: tuple[int, ...], value: float) -> Tensor:
    out = tensor.clone()
    out[at] = value
    return out


ROWS = GOOD.directions
BAD_FILES: dict[str, tuple[Callable[[], bytes], tuple[str, ...]]] = {
    "empty": (lambda: b"", ("not a safetensors file",)),
    "random": (lambda: bytes(range(1, 256)) * 16, ("not a safetensors file",)),
    "truncated": (lambda: DATA[:-1], ("not a safetensors file",)),
    "cut in the header": (lambda: DATA[:100], ("not a safetensors file",)),
    "more behind": (lambda: DATA + b"\0", ("not a safetensors file",)),
    "pickle": (lambda: pickle.dumps({"directions": [1.0]}), ("pickle", "only safetensors")),
    "old pickle": (lambda: pickle.dumps({"directions": [1.0] * 500}, protocol=2), ("pickle", "only safetensors")),
    "gguf": (lambda: b"GGUF" + bytes(60), ("this is GGUF", "`steer convert`")),
    "torch zip": (zip_of_torch, ("pickle or a zip", "only safetensors")),
    "missing": (lambda: changed(weights=None), ("missing tensors: 'weights'",)),
    "extra": (lambda: changed(other=torch.ones(2)), ("unknown tensors: 'other'",)),
    "half": (lambda: changed(weights=GOOD.weights.half()), ("tensor 'weights'", "float16", "must be float32")),
    "integers": (lambda: changed(reference=torch.zeros(3, 1, dtype=torch.int64)), ("'reference'", "int64", "float32")),
    "a layer less": (lambda: changed(directions=ROWS[:2]), ("'directions' has shape [2, 1, 64]", "must be [3, 1, 64]")),
    "another width": (lambda: changed(mean_harmful=torch.ones(3, 8)), ("'mean_harmful' has shape [3, 8]", "[3, 64]")),
    "flat": (lambda: changed(directions=ROWS[:, 0]), ("'directions' has shape [3, 64]",)),
    "a number": (lambda: changed(weights=torch.tensor(1.0)), ("'weights' has shape []", "must be [3]")),
    "no rows": (
        lambda: changed(directions=ROWS[:, :0], reference=GOOD.reference[:, :0], embedding=None),
        ("'directions' has shape [3, 0, 64]",),
    ),
    "embedding of other rank": (
        lambda: changed(embedding=torch.eye(2, 64)),
        ("'embedding' has shape [2, 64]", "[1, 64]"),
    ),
    "nan": (lambda: changed(directions=flawed(ROWS, (1, 0, 5), torch.nan)), ("'directions'", "not finite")),
    "infinite": (lambda: changed(weights=flawed(GOOD.weights, (1,), torch.inf)), ("'weights'", "not finite")),
    "nan mean": (
        lambda: changed(mean_harmless_all=flawed(GOOD.mean_harmless_all, (0, 0), torch.nan)),
        ("'mean_harmless_all'", "not finite"),
    ),
    "not unit": (lambda: changed(directions=ROWS * 1.01), ("'directions'", "not unit vectors", "[0, 1, 2]")),
    "one row not unit": (lambda: changed(directions=flawed(ROWS, (1, 0, 0), 3.0)), ("'directions'", "layers [1]")),
    "target of other shape": (
        lambda: changed(target=GOOD.reference[:, :0]),
        ("'target' has shape", "it must be [3, 1]"),
    ),
    "target above the reference": (
        lambda: changed(target=GOOD.reference + 1),
        ("'target' is above 'reference'",),
    ),
    "embedding not unit": (lambda: changed(embedding=2 * EMBEDDING), ("'embedding'", "not unit vectors")),
    "rows not orthogonal": (
        lambda: changed(
            directions=ROWS.repeat(1, 2, 1), reference=torch.zeros(3, 2), embedding=torch.eye(2, models.D_MODEL)
        ),
        ("'directions'", "not orthonormal rows"),
    ),
    "nothing steered": (lambda: changed(directions=torch.zeros_like(ROWS)), ("'directions' is zero at every layer",)),
    "no metadata": (lambda: safetensors.torch.save(GOOD.tensors()), ("metadata key 'steer' is missing",)),
    "null metadata": (
        lambda: safetensors_file(parts()[0] | {"__metadata__": None}, parts()[1]),
        ("metadata key 'steer' is missing",),
    ),
    "other metadata": (lambda: safetensors.torch.save(GOOD.tensors(), {"format": "pt"}), ("'steer' is missing",)),
    "metadata not JSON": (lambda: file_of(GOOD.tensors(), "{"), ("metadata", "JSON")),
    "metadata a list": (lambda: file_of(GOOD.tensors(), "[]"), ("metadata",)),
    "metadata empty": (lambda: file_of(GOOD.tensors(), "{}"), ("method", "model", "d_model", "layers")),
    "metadata deep": (lambda: file_of(GOOD.tensors(), meta_of()[:-1] + ',"x":' + "[" * 9999), ("metadata",)),
    "unknown field": (lambda: file_of(GOOD.tensors(), meta_of(colour="red")), ("metadata: colour",)),
    "unknown mode": (lambda: file_of(GOOD.tensors(), meta_of(mode="remove")), ("metadata: mode", "ablate")),
    "unknown site": (lambda: file_of(GOOD.tensors(), meta_of(sites=["mlp"])), ("metadata: sites",)),
    "no sites": (lambda: file_of(GOOD.tensors(), meta_of(sites=[])), ("metadata: sites",)),
    "later schema": (lambda: file_of(GOOD.tensors(), meta_of(schema_version=2)), ("metadata: schema_version",)),
    "schema true": (
        lambda: file_of(GOOD.tensors(), meta_of(schema_version=True)),
        ("metadata: schema_version: 'true' is not accepted: 1 or 2",),
    ),
    "strength nan": (lambda: file_of(GOOD.tensors(), meta_of(strength=float("nan"))), ("metadata: strength",)),
    "a parameter nan": (
        lambda: file_of(GOOD.tensors(), meta_of(parameters={"t": float("nan")})),
        ("metadata: not JSON",),
    ),
    "nan in the selection": (
        lambda: file_of(GOOD.tensors(), meta_of(selection={"kl": float("nan")})),
        ("metadata: not JSON",),
    ),
    "a mean that overflows": (
        lambda: changed(mean_harmful=flawed(GOOD.mean_harmful, (1, 0), 1e38)),
        ("'mean_harmful' has values beyond ±1e+15",),
    ),
    "mode without its tensors": (
        lambda: file_of(GOOD.tensors(), meta_of(mode="add", modes=("ablate", "one_sided"))),
        ("mode 'add'", "modes ['ablate', 'one_sided']"),
    ),
    "condition of two sides": (
        lambda: file_of(GOOD.tensors(), meta_of(condition=condition(above=0.3, below=0.3))),
        ("metadata: condition", "one of 'above' and 'below'"),
    ),
    "condition of no number": (
        lambda: file_of(GOOD.tensors(), meta_of(condition=condition(above=float("inf")))),
        ("metadata: condition.above",),
    ),
    "condition at the last layer": (
        lambda: file_of(GOOD.tensors(), meta_of(condition=condition(layer=2, above=0.3))),
        ("metadata: condition: no layer comes after 2",),
    ),
    "layer outside": (lambda: file_of(GOOD.tensors(), meta_of(source_layer=3)), ("source_layer 3", "layers 3")),
    "other width in metadata": (lambda: file_of(GOOD.tensors(), meta_of(d_model=32)), ("'directions'", "[3, 1, 32]")),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_refused_by_source_tensor_and_rule(name: str) -> None:
    make, expected = BAD_FILES[name]
    said = "; ".join(problems_of(make()))
    for words in expected:
        assert words in said


def test_a_file_keeps_a_condition_that_was_found_and_one_without_says_nothing_of_it() -> None:
    made = GOOD.with_meta(condition=condition(above=0.3))
    assert Direction.from_bytes(made.to_bytes()).meta == made.meta
    assert b"condition" not in GOOD.to_bytes()


def test_problems_are_reported_together() -> None:
    tensors = GOOD.tensors() | {"one": torch.ones(1), "two": torch.ones(1)}
    del tensors["weights"], tensors["reference"]
    said = problems_of(file_of(tensors, meta_of(mode="remove", colour="red")))
    for words in ("'weights'", "'reference'", "'one'", "'two'", "metadata: mode", "metadata: colour"):
        assert sum(words in problem for problem in said) == 1

    said = problems_of(changed(weights=torch.ones(4).half(), mean_harmful=torch.ones(3, 8), embedding=torch.ones(5)))
    assert [problem.split("'")[1] for problem in said] == ["weights", "weights", "mean_harmful", "embedding"]

    said = problems_of(changed(weights=GOOD.weights * torch.nan, mean_harmful=GOOD.mean_harmful * torch.inf))
    assert [problem.split("'")[1] for problem in said] == ["weights", "mean_harmful"]

    said = problems_of(changed(directions=2 * ROWS, embedding=2 * EMBEDDING))
    assert [problem.split("'")[1] for problem in said] == ["directions", "embedding"]


def test_a_wrong_shape_hides_no_other_tensors_values() -> None:
    said = problems_of(changed(weights=torch.ones(4), mean_harmful=GOOD.mean_harmful * torch.nan, directions=2 * ROWS))
    assert sorted(problem.split("'")[1] for problem in said) == ["directions", "mean_harmful", "weights"]


def test_a_file_over_the_size_cap_is_refused_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "d.safetensors"
    path.write_bytes(DATA)
    monkeypatch.setattr(module, "MAX_BYTES", len(DATA) - 1)
    with pytest.raises(DirectionError, match=f"{len(DATA)} bytes"):
        read_file(path)
    with pytest.raises(DirectionError, match=f"{len(DATA)} bytes"):
        Direction.from_bytes(DATA)
    monkeypatch.setattr(module, "MAX_BYTES", len(DATA))
    assert same(Direction.load(path), GOOD)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "nothing.safetensors", tmp_path):
        with pytest.raises(DirectionError, match=r"cannot be read|this is a folder") as caught:
            Direction.load(path)
        assert str(path) in str(caught.value)


def accepted_or_refused(data: bytes) -> None:
    try:
        made = Direction.from_bytes(data)
    except DirectionError:
        return
    assert made.problems() == []


@given(st.binary(max_size=200) | st.binary(max_size=50).map(lambda b: struct.pack("<Q", len(b)) + b))
@law
def test_no_bytes_break_the_reader(data: bytes) -> None:
    accepted_or_refused(data)


@given(st.integers(0, len(DATA) - 1), st.integers(1, 255))
@settings(deadline=None, max_examples=150)
def test_no_changed_byte_breaks_the_reader(at: int, flip: int) -> None:
    accepted_or_refused(DATA[:at] + bytes([DATA[at] ^ flip]) + DATA[at + 1 :])


@given(st.integers(0, len(DATA) - 1))
@law
def test_no_part_of_a_file_is_accepted(length: int) -> None:
    problems_of(DATA[:length])


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@given(JSON.map(json.dumps) | st.text(max_size=20))
@example("\ud800")
@example('{"model": "\\ud800"}')
@example("9" * 5000)
@law
def test_no_metadata_breaks_the_reader(text: str) -> None:
    header, body = parts()
    problems_of(safetensors_file(header | {"__metadata__": {"steer": text}}, body))


@given(st.sampled_from(sorted(DirectionMeta.model_fields)), JSON)
@law
def test_no_value_in_metadata_breaks_the_reader(field: str, value: Any) -> None:
    accepted_or_refused(file_of(GOOD.tensors(), meta_of(**{field: value})))


@given(JSON)
@example(None)
@law
def test_no_header_breaks_the_reader(value: Any) -> None:
    header, body = parts()
    problems_of(safetensors_file(header | {"__metadata__": value}, body))
    problems_of(safetensors_file(header | {"weights": value}, body))


def test_what_would_not_be_read_is_not_written(tmp_path: Path) -> None:
    path = tmp_path / "d.safetensors"
    with pytest.raises(DirectionError, match="not unit vectors"):
        replace(GOOD, directions=2 * ROWS).save(path)
    assert list(tmp_path.iterdir()) == []
    for changes, says in (
        ({"mode": "remove"}, "metadata: mode: 'remove' is not accepted"),
        ({"strength": "x"}, "metadata: strength: 'x' is not accepted: a number"),
        ({"foo": 1}, "metadata: foo: unknown field"),
        ({"Mode": 1}, "metadata: Mode: unknown field"),
        ({"str": 1}, "metadata: str: unknown field"),
        ({"function-a": 1}, "metadata: function-a: unknown field"),
    ):
        with pytest.raises(DirectionError, match=says):
            GOOD.with_meta(**cast(Any, changes))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"weights": None}, "tensor 'weights' is of the type builtins.NoneType, it must be a dense tensor of float32"),
        ({"weights": GOOD.weights.numpy()}, "tensor 'weights' is of the type numpy.ndarray, it must be a dense tensor"),
        ({"axis": [1.0]}, "tensor 'axis' is of the type builtins.list"),
        ({"weights": GOOD.weights.to_sparse()}, "tensor 'weights' is on the device 'cpu', sparse_coo"),
        ({"weights": GOOD.weights.to("meta")}, "tensor 'weights' is on the device 'meta'"),
        ({"meta": None}, "metadata: of the type builtins.NoneType is not accepted: a DirectionMeta"),
        ({"meta": {"selection": {"a": math.nan}}}, "metadata: cannot be written as JSON"),
        ({"meta": {"selection": {"a": object()}}}, "metadata: cannot be written as JSON"),
        ({"meta": {"selection": {"a": np.float32(1)}}}, "metadata: cannot be written as JSON"),
        ({"meta": {"parameters": {"a": math.inf}}}, "metadata: cannot be written as JSON"),
        ({"meta": {"strength": "x"}}, "metadata: cannot be written as JSON"),
        ({"meta": {"strength": 99.0}}, "metadata: strength: 99.0 is not accepted"),
        ({"weights": torch.zeros(models.LAYERS), "embedding": None}, "the weights are zero at every layer with rows"),
        (
            {"mean_harmful": GOOD.mean_harmless, "meta": {"mode": "add"}},
            "metadata: the mode 'add' adds the difference of the class means, which is zero wherever it acts",
        ),
    ],
)
def test_a_direction_that_no_file_can_hold_is_told_and_not_written(change: dict[str, Any], says: str) -> None:
    if isinstance(change.get("meta"), dict):
        change = change | {"meta": GOOD.meta.model_copy(update=change["meta"])}
    with pytest.raises(DirectionError, match=re.escape(says)):
        replace(GOOD, **change).to_bytes()


def test_tensors_are_written_whatever_else_holds_their_memory() -> None:
    both = torch.randn(2 * models.LAYERS, models.D_MODEL)
    parts: dict[str, Any] = {"mean_harmful": both[: models.LAYERS], "mean_harmless": both[: models.LAYERS]}
    parts |= {"mean_harmless_all": both[models.LAYERS :], "weights": torch.ones(()).expand(models.LAYERS)}
    made = replace(GOOD, **parts, directions=ROWS.clone().requires_grad_())
    assert same(Direction.from_bytes(made.to_bytes()), made)
    turned = replace(GOOD, mean_harmful=GOOD.mean_harmful.T.contiguous().T)
    assert turned.to_bytes() == GOOD.to_bytes()


def test_a_key_that_stands_twice_is_refused() -> None:
    """Readers differ in which they take."""
    text = meta_of()
    for twice in (
        text[:-1] + ', "strength": -3.0}',
        text[:-1] + ', "selection": {"a": 1, "a": 2}}',
        text[:-1] + ', "method": "random"}',
    ):
        (problem,) = problems_of(file_of(GOOD.tensors(), twice))
        assert "stands twice" in problem
    header, body = parts()
    told = json.dumps(header["__metadata__"])
    whole = json.dumps(header).replace(told, told[:-1] + ', "steer": "{}"}')
    assert "stands twice" in "; ".join(problems_of(safetensors_file(whole, body)))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("strength", True),
        ("strength", "1"),
        ("layers", "3"),
        ("layers", 3.0),
        ("d_model", "64"),
        ("created", 5),
        ("modes", "ablate"),
        ("bos_count", "1"),
        ("parameters", {"t": True}),
    ],
)
def test_metadata_of_another_type_is_refused(field: str, value: Any) -> None:
    said = problems_of(file_of(GOOD.tensors(), meta_of(**{field: value})))
    assert f"metadata: {field}" in said[0]


def test_the_files_of_the_repository_are_read(tmp_path: Path) -> None:
    for path in sorted((Path(steer.__file__).parents[1] / "directions").glob("*.safetensors")):
        made = Direction.load(path)
        assert same(Direction.from_bytes(made.to_bytes()), made)


@pytest.mark.parametrize("path", [None, ["a.safetensors"], "a\0b", b"a.safetensors", 0, True])
def test_what_is_no_path_is_told(path: Any) -> None:
    for use in (Direction.load, GOOD.save):
        with pytest.raises(DirectionError, match="is not accepted: the path of a direction file"):
            use(path)


@pytest.mark.parametrize("failing", ["replace", "fsync"])
@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    failing: str, error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "d.safetensors"
    write_file(path, b"old")

    def fail(*_: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(os, failing, fail)
        with pytest.raises(type(error)):
            write_file(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
    write_file(path, b"new")
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_the_new_file_is_complete_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "d.safetensors"
    path.write_bytes(b"old")
    rename, seen = os.replace, []

    def watching(source: str, target: str) -> None:
        seen.append((Path(source).read_bytes(), Path(target).read_bytes(), Path(source).parent == Path(target).parent))
        rename(source, target)

    monkeypatch.setattr(os, "replace", watching)
    write_file(path, b"new")
    assert seen == [(b"new", b"old", True)]


LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"


def acceptable(name: str) -> bool:
    return (
        1 <= len(name) <= 64
        and name[0] in LETTERS
        and all(c in LETTERS + "._-" for c in name)
        and name.lower() not in {"off", "none", "null", "false", "true"}
        and not name.endswith(".safetensors")
    )


@given(
    st.text(max_size=70)
    | st.text(alphabet=LETTERS + "._-", min_size=1, max_size=66)
    | st.text(alphabet="./\\aß١+:=, \n\0", max_size=6)
    | st.sampled_from(
        ["off", "OFF", "None", "nUll", "true", "False", "offf", "a" * 64, "a" * 65, "a.safetensors", "a\n", "١", "é"]
    )
)
@settings(deadline=None, max_examples=300)
def test_a_name_is_a_short_plain_word(name: str) -> None:
    if acceptable(name):
        assert check_name(name) == name
        assert Path("folder", f"{name}.safetensors").resolve().parent == Path("folder").resolve()
    else:
        with pytest.raises(DirectionError, match="1 to 64 of a to z") as caught:
            check_name(name)
        assert caught.value.param == "name"
        assert str(caught.value).encode()


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "../x", "a/b", "/etc/passwd", "a\\b", ".hidden", "~x", "a b", "a\0b", "a+b", "a=1", "a:add", "-x"],
)
def test_no_path_and_no_part_of_the_request_language_is_a_name(name: str) -> None:
    with pytest.raises(DirectionError):
        check_name(name)


@given(st.booleans(), st.booleans(), st.booleans())
@law
def test_every_difference_from_the_model_is_listed(width: bool, depth: bool, kind: bool) -> None:
    meta = GOOD.meta
    model: dict[str, Any] = {
        "d_model": meta.d_model + width,
        "layers": meta.layers + depth,
        "architecture": meta.architecture + "X" * kind,
    }
    if not (width or depth or kind):
        check_fits(GOOD, **model)
        return
    with pytest.raises(DirectionError) as caught:
        check_fits(GOOD, **model)
    expected = [
        *([f"d_model {meta.d_model}, this model has {meta.d_model + 1}"] if width else []),
        *([f"{meta.layers} layers, this model has {meta.layers + 1}"] if depth else []),
        *([f"{meta.architecture}, this model is {meta.architecture}X"] if kind else []),
    ]
    assert len(caught.value.problems) == len(expected)
    for problem, words in zip(caught.value.problems, expected, strict=True):
        assert words in problem


def test_a_profile_says_only_what_is_defined() -> None:
    rows, means = GOOD.directions.clone(), GOOD.mean_harmful.clone()
    rows[1], means[2] = 0, 0
    profile = replace(GOOD, directions=rows, mean_harmful=means).profile()
    assert [layer["layer"] for layer in profile] == [0, 1, 2]
    assert [layer["cosine_next"] for layer in profile] == [None, None, None]
    assert profile[2]["angle"] is None
    assert profile[0]["angle"] == pytest.approx(
        torch.rad2deg(torch.acos(torch.cosine_similarity(means[0], GOOD.mean_harmless[0], dim=0))).item(), abs=1e-2
    )
    first = GOOD.profile()[0]
    for name, mean in (("component_harmful", GOOD.mean_harmful), ("component_harmless", GOOD.mean_harmless)):
        assert first[name] == pytest.approx(float(mean[0] @ ROWS[0, 0]), abs=1e-5)  # type: ignore[literal-required]
        assert profile[1][name] is None  # type: ignore[literal-required]
    assert (first["threshold"] is None) == ("one_sided" not in GOOD.meta.modes) == (first["target"] is None)
    sided = GOOD.with_meta(modes=("ablate", "one_sided")).profile()[0]
    assert sided["threshold"] == pytest.approx(float(GOOD.reference[0, 0]))
    assert sided["target"] == sided["threshold"], "the threshold, in a file that has no target"
    unknown = replace(GOOD, mean_harmless=torch.zeros_like(GOOD.mean_harmless)).profile()[0]
    for name in ("angle", "norm_harmful", "norm_harmless", "component_harmful", "component_harmless"):
        assert unknown[name] is None, "of a file of another tool the difference alone"  # type: ignore[literal-required]
    along = first["cosine_next"]
    assert along == pytest.approx(float(ROWS[0, 0] @ ROWS[1, 0]), abs=1e-6)


def test_a_head_that_would_take_seconds_to_read_is_refused() -> None:
    head = json.dumps({"__metadata__": {f"key{i}": "" for i in range(400_000)}}).encode()
    with pytest.raises(DirectionError, match=r"a header of \d+ bytes, a direction file's has at most 4194304"):
        Direction.from_bytes(len(head).to_bytes(8, "little") + head)
