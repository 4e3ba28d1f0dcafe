"""Swapping under live traffic: a name moves only to what is valid and resident, and nothing in use is taken away."""

from __future__ import annotations

import errno
import itertools
import json
import os
import pickle
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import BinaryIO

import pytest
import safetensors.torch
import torch

from steer import registry as registry_module
from steer.direction import Direction, digest
from steer.errors import DirectionError, NoRoom, SpecError, UnknownDirection
from steer.files import write_file
from steer.names import Mode, Site
from steer.registry import Admission, Move, Registry
from steer.shape import Shape
from steer.spec import PHASES, Entry, RequestedDirection, parse
from steer.tokenization import Thinking
from tests import models
from tests.waiting import eventually

MODEL = models.tiny("llama")


@cache
def file(
    seed: int, k: int = 1, mode: Mode = "ablate", strength: float = 1.0, sites: tuple[Site, ...] = ("resid_post",)
) -> bytes:
    return models.direction(MODEL, k=k, seed=seed, mode=mode, strength=strength, sites=sites).to_bytes()


A, B, C, D = (file(seed) for seed in range(4))
GARBAGE = b"this is no direction"


class Recorder:
    """A placement with room for `room` rows that writes down what is resident and what was asked of it."""

    def __init__(self, room: int = 8, rank: int = 4) -> None:
        self.room = room
        self.shape = Shape("LlamaForCausalLM", models.LAYERS, models.D_MODEL, frozenset({"resid_post"}), rank)
        self.resident: dict[str, int] = {}
        self.calls: list[tuple[str, str]] = []
        self.on_load: Callable[[], None] = lambda: None

    def load(self, digest: str, direction: Direction, data: bytes) -> None:
        assert digest not in self.resident, "one version is loaded once"
        if sum(self.resident.values()) + direction.rank > self.room:
            raise NoRoom("full")
        self.on_load()
        self.calls.append(("load", digest))
        self.resident[digest] = direction.rank

    def unload(self, digest: str) -> None:
        self.calls.append(("unload", digest))
        del self.resident[digest]


def admit(registry: Registry, wish: str) -> Admission:
    return Admission.of(registry, parse(wish))


def served(registry: Registry) -> dict[str, str]:
    return {name: version.digest for name, version in registry.names().items()}


def write(folder: Path, name: str, data: bytes) -> None:
    """A new file under its name in one step, as tools do it."""
    temporary = folder / f".{name}.part"
    temporary.write_bytes(data)
    os.replace(temporary, folder / f"{name}.safetensors")


# -- swaps -----------------------------------------------------------------------------------------------------------


def test_a_receipt_asks_for_what_it_says_and_for_that_version_alone() -> None:
    registry = Registry(models.placement(rank=4))
    model = models.tiny("llama")
    registry.put("a", models.direction(model, seed=1).to_bytes())
    for spec in ("a=0.5", "a:one_sided^0.25@1-2@answer", "a@1-2?a@0>0.5", "a?each:a@0<0.5=2", "a=1,a:add=0.25"):
        resolved = registry.resolve(parse(spec))
        assert registry.resolve(parse(json.loads(resolved.receipt()))) == resolved, spec
    digest = registry.get("a").digest
    pinned = parse({"direction": "a", "digest": digest[:12]})
    probed = parse({"direction": "a", "if": {"direction": "a", "layer": 0, "above": 1, "digest": digest}})
    for each in (pinned, probed):
        assert registry.resolve(each)
    registry.put("a", models.direction(model, seed=2).to_bytes())
    for each in (pinned, probed):
        with pytest.raises(SpecError, match=f"and {digest[:12]} is asked for"):
            registry.resolve(each)
    for wrong in ("", "abc", digest.upper(), 7, digest + "0"):
        with pytest.raises(SpecError, match="digest"):
            parse({"direction": "a", "digest": wrong})


def test_a_name_points_to_what_was_put() -> None:
    placement = Recorder()
    registry = Registry(placement)
    version = registry.put("refusal", A)
    assert version.digest == digest(A)
    assert served(registry) == {"refusal": digest(A)}
    assert registry.get("refusal") is version
    assert placement.resident.keys() == {digest(A)}
    registry.put("refusal", B)
    assert served(registry) == {"refusal": digest(B)}
    assert placement.calls == [("load", digest(A)), ("load", digest(B)), ("unload", digest(A))]
    assert registry.resident == 1


def test_the_name_moves_only_after_the_load() -> None:
    placement = Recorder()
    registry = Registry(placement)
    registry.put("refusal", A)
    seen: list[str] = []
    placement.on_load = lambda: seen.append(admit(registry, "refusal").spec.entries[0].digest)
    registry.put("refusal", B)
    assert seen == [digest(A)]
    assert placement.resident.keys() == {digest(A), digest(B)}, "and the request of that moment keeps its version"


def test_a_running_request_keeps_its_version_until_it_is_released() -> None:
    placement = models.placement()
    registry = Registry(placement)
    registry.put("refusal", A)
    first, second = admit(registry, "refusal"), admit(registry, "refusal=0.5")
    registry.put("refusal", B)
    assert registry.resident == 2
    assert admit(registry, "refusal").spec.entries[0].digest == digest(B)
    first.release()
    assert placement.bank.steer(second.spec) is not None
    second.release()
    assert registry.resident == 1
    assert placement.bank.rows_in_use == 1
    with pytest.raises(KeyError):
        placement.bank.steer(second.spec)


def test_releasing_twice_is_releasing_once() -> None:
    registry = Registry(Recorder())
    registry.put("refusal", A)
    first, second = admit(registry, "refusal"), admit(registry, "refusal")
    first.release()
    first.release()
    registry.put("refusal", B)
    assert registry.resident == 2, "the second request still has its version"
    second.release()
    assert registry.resident == 1


def test_going_back_to_a_version_still_in_use_loads_nothing() -> None:
    placement = Recorder()
    registry = Registry(placement)
    registry.put("refusal", A)
    held = admit(registry, "refusal")
    registry.put("refusal", B)
    registry.put("refusal", A)
    assert [call for call in placement.calls if call[0] == "load"] == [("load", digest(A)), ("load", digest(B))]
    held.release()
    assert served(registry) == {"refusal": digest(A)}
    assert placement.resident.keys() == {digest(A)}


def test_two_names_of_one_file_share_it() -> None:
    placement = Recorder()
    registry = Registry(placement)
    assert registry.put("one", A) is registry.put("two", A)
    assert registry.resident == 1
    registry.delete("one")
    assert placement.resident.keys() == {digest(A)}
    registry.put("two", B)
    assert placement.resident.keys() == {digest(B)}


def test_the_same_file_again_is_no_swap() -> None:
    registry = Registry(Recorder())
    registry.put("refusal", A)
    before = registry.swaps
    registry.put("refusal", A)
    assert registry.swaps == before
    registry.put("refusal", B)
    assert registry.swaps == before + 1


@pytest.mark.parametrize("held", [False, True])
def test_a_deleted_name_is_gone_and_its_version_follows_its_last_request(held: bool) -> None:
    placement = Recorder()
    registry = Registry(placement)
    registry.put("refusal", A)
    admission = admit(registry, "refusal") if held else None
    registry.delete("refusal")
    assert served(registry) == {}
    with pytest.raises(UnknownDirection):
        registry.get("refusal")
    with pytest.raises(UnknownDirection):
        admit(registry, "refusal")
    assert registry.resident == held
    if admission:
        admission.release()
    assert registry.resident == 0
    assert placement.resident == {}


def test_deleting_what_is_not_served_is_an_error() -> None:
    with pytest.raises(UnknownDirection, match="'refusal' is not served; served: none"):
        Registry(Recorder()).delete("refusal")


@pytest.mark.parametrize("text", ["refusal=0,7", "refusal:one_sided^-0,5=1", "refusal?refusal@0>0,3", "refusal@7,8"])
def test_a_decimal_comma_is_told_to_be_one(text: str) -> None:
    """A comma begins another direction, which nobody has asked for."""
    registry = Registry(Recorder())
    registry.put("refusal", models.direction(models.tiny("llama")).to_bytes())
    with pytest.raises(
        UnknownDirection, match=r"write a decimal point, as refusal=0\.7, and layers as a range, as refusal@7-8"
    ):
        registry.resolve(parse(text))


@pytest.mark.parametrize("folder", [False, True])
def test_a_bad_file_leaves_the_old_version_serving(folder: bool, tmp_path: Path) -> None:
    placement = Recorder()
    registry = Registry(placement, tmp_path if folder else None)
    registry.put("refusal", A)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(DirectionError, match=r"refusal: .*not a safetensors file"):
        registry.put("refusal", GARBAGE)
    assert served(registry) == {"refusal": digest(A)}
    assert "not a safetensors file" in registry.failures["refusal"][0]
    assert placement.calls == [("load", digest(A))]
    assert sorted(tmp_path.iterdir()) == before
    admit(registry, "refusal").release()
    registry.put("refusal", B)
    assert registry.failures == {}


def test_what_the_placement_refuses_is_reported_whole() -> None:
    registry = Registry(Recorder())
    direction = models.direction(MODEL)
    shallow = Direction(
        direction.meta.model_copy(update={"layers": 1, "architecture": "Other"}),
        *(t[:1] for t in direction.tensors().values()),
    ).to_bytes()
    with pytest.raises(DirectionError) as caught:
        registry.put("refusal", shallow, store=False)
    assert caught.value.problems == (
        f"refusal: it was made for 1 layers, this model has {models.LAYERS}",
        "refusal: it was made for Other, this model is LlamaForCausalLM",
    )
    assert registry.failures["refusal"] == caught.value.problems
    assert registry.resident == 0


@pytest.mark.parametrize("name", ["", "../x", "a b", "off", ".x", "a/b"])
def test_a_bad_name_is_refused(name: str, tmp_path: Path) -> None:
    registry = Registry(Recorder(), tmp_path)
    with pytest.raises(DirectionError):
        registry.put(name, A)
    assert registry.resident == 0
    assert list(tmp_path.iterdir()) == []


# -- room ------------------------------------------------------------------------------------------------------------


def test_a_load_waits_for_running_requests_of_old_versions() -> None:
    placement = models.placement(rows=2)
    registry = Registry(placement, patience=30)
    registry.put("refusal", A)
    held = admit(registry, "refusal")
    registry.put("refusal", B)
    timer = threading.Timer(0.3, held.release)
    began = time.monotonic()
    timer.start()
    registry.put("refusal", C)
    assert 0.2 < time.monotonic() - began < 20
    assert served(registry) == {"refusal": digest(C)}
    assert placement.bank.rows_in_use == 1
    timer.join()


def test_requests_are_admitted_while_a_load_waits() -> None:
    registry = Registry(models.placement(rows=2), patience=30)
    registry.put("refusal", A)
    held = admit(registry, "refusal")
    registry.put("refusal", B)
    swap = threading.Thread(target=registry.put, args=("refusal", C))
    swap.start()
    time.sleep(0.1)
    assert swap.is_alive()
    between = admit(registry, "refusal")
    assert between.spec.entries[0].digest == digest(B)
    held.release()
    swap.join(20)
    assert served(registry) == {"refusal": digest(C)}
    between.release()
    assert registry.resident == 1


def test_a_load_that_waited_in_vain_says_so_and_changes_nothing() -> None:
    placement = models.placement(rows=2)
    registry = Registry(placement, patience=0.1)
    registry.put("refusal", A)
    held = admit(registry, "refusal")
    registry.put("refusal", B)
    with pytest.raises(NoRoom, match="1 free bank rows, 0 of 2"):
        registry.put("refusal", C)
    assert served(registry) == {"refusal": digest(B)}
    assert "0 of 2" in registry.failures["refusal"][0]
    assert registry.resident == 2
    held.release()
    registry.put("refusal", C)
    assert registry.failures == {}


def test_a_load_that_nothing_can_make_room_for_fails_at_once() -> None:
    registry = Registry(models.placement(rows=1), patience=60)
    registry.put("one", A)
    began = time.monotonic()
    with pytest.raises(NoRoom):
        registry.put("two", B)
    assert time.monotonic() - began < 10
    assert served(registry) == {"one": digest(A)}
    registry.delete("one")
    registry.put("two", B)


# -- admission -------------------------------------------------------------------------------------------------------


def test_the_file_decides_what_the_request_leaves_open() -> None:
    registry = Registry(models.placement())
    registry.put("d", file(7, mode="one_sided", strength=0.25))
    name = digest(file(7, mode="one_sided", strength=0.25))
    cases: list[tuple[str, Mode, float]] = [
        ("d", "one_sided", 0.25),
        ("d=0.5", "one_sided", 0.5),
        ("d^-0.0=0.5", "one_sided", 0.5),
        ("d:one_sided", "one_sided", 0.25),
        ("d:add", "add", 1.0),  # the file's strength is of its own mode
        ("d:add=-2", "add", -2.0),
    ]
    for wish, mode, strength in cases:
        assert admit(registry, wish).spec.entries == (Entry("d", name, mode, strength),)


def test_the_order_of_the_request_is_kept() -> None:
    registry = Registry(models.placement())
    registry.put("one", A)
    registry.put("two", B)
    assert [e.direction for e in admit(registry, "two,one").spec.entries] == ["two", "one"]
    assert [e.direction for e in admit(registry, "one,two").spec.entries] == ["one", "two"]


@pytest.mark.parametrize("wish", ["off", "one=0", "one=0,two=-0.0", "one=1e-50"])
def test_strength_0_is_plain_and_pins_nothing(wish: str) -> None:
    registry = Registry(models.placement())
    registry.put("one", A)
    registry.put("two", B)
    admission = admit(registry, wish)
    assert not admission.spec
    assert admission.spec.receipt() == "[]"
    assert [version.pins for version in registry.names().values()] == [0, 0]
    admission.release()


def test_strength_0_is_dropped_beside_others() -> None:
    registry = Registry(models.placement(rank=1))
    registry.put("one", A)
    registry.put("two", B)
    assert [e.direction for e in admit(registry, "one=0,two").spec.entries] == ["two"]


def test_every_unknown_name_is_named_with_what_is_served() -> None:
    registry = Registry(models.placement())
    registry.put("one", A)
    registry.put("two", B)
    with pytest.raises(UnknownDirection) as caught:
        admit(registry, "three,one,four=0.5")
    assert [problem.split("'")[1] for problem in caught.value.problems] == ["three", "four"]
    assert all("served: one, two" in problem for problem in caught.value.problems)
    assert caught.value.param == "steer"


def test_more_rows_than_a_token_can_have_are_refused() -> None:
    registry = Registry(models.placement(rank=3))
    registry.put("one", file(1, k=2))
    registry.put("two", file(2, k=2))
    admit(registry, "one")
    with pytest.raises(SpecError, match=r"needs 4 direction rows .* rank here is 3"):
        admit(registry, "one,two")
    with pytest.raises(SpecError, match=r"needs 4 direction rows .* rank here is 3"):
        admit(registry, "one:ablate,one:add")


def test_one_version_twice_in_one_mode_is_refused_also_under_two_names() -> None:
    registry = Registry(models.placement())
    registry.put("one", A)
    registry.put("same", A)
    for wish in ("one,one:ablate", "one,same", "one=0.5,same=0.25"):
        with pytest.raises(SpecError, match="listed twice in the mode 'ablate'"):
            admit(registry, wish)
    assert len(admit(registry, "one:ablate,same:add").spec.entries) == 2


def test_one_file_under_two_names_is_told_by_both() -> None:
    registry = Registry(Recorder())
    for name in ("one", "two"):
        registry.put(name, A)
    with pytest.raises(SpecError, match="the directions 'one' and 'two' are one file, listed twice in the mode"):
        registry.resolve(parse("one,two=0.5"))


def test_all_problems_of_a_request_are_reported_and_nothing_is_pinned() -> None:
    registry = Registry(Recorder())
    registry.put("one", A)
    with pytest.raises(UnknownDirection) as caught:
        admit(registry, "none-such,one:rotate,one:ablate,one")
    said = "; ".join(caught.value.problems)
    for words in ("none-such", "holds no plane", "twice"):
        assert words in said
    assert registry.get("one").pins == 0


def test_a_mode_without_a_meaning_at_the_site_is_refused() -> None:
    registry = Registry(models.placement(sites=("resid_post", "writers")))
    registry.put("d", file(3, sites=("writers",)))
    admit(registry, "d:ablate").release()
    with pytest.raises(SpecError, match="'writers'"):
        admit(registry, "d:add")


def test_pins_count_admissions() -> None:
    registry = Registry(models.placement())
    registry.put("one", A)
    admissions = [admit(registry, "one:ablate,one:add") for _ in range(3)]
    for left, admission in zip((2, 1, 0), admissions, strict=True):
        admission.release()
        assert registry.get("one").pins == left


@pytest.mark.parametrize("order", list(itertools.permutations([None, "a", "b"])))
def test_an_admission_lasts_until_its_last_holder_releases(order: tuple[str | None, ...]) -> None:
    registry = Registry(models.placement())
    registry.put("one", A)
    admission = admit(registry, "one")
    for holder in ("a", "b", "a"):
        admission.hold(holder)
    for left, released in zip((1, 1, 0), order, strict=True):
        admission.release(released)
        admission.release(released)
        assert registry.get("one").pins == left
    with pytest.raises(RuntimeError, match="has ended"):
        admission.hold("c")


# -- the folder ------------------------------------------------------------------------------------------------------


def test_put_keeps_the_very_bytes_as_a_file_and_nothing_else(tmp_path: Path) -> None:
    registry = Registry(models.placement(), tmp_path)
    registry.put("refusal", A)
    assert [path.name for path in tmp_path.iterdir()] == ["refusal.safetensors"]
    assert (tmp_path / "refusal.safetensors").read_bytes() == A
    registry.sync()
    assert served(registry) == {"refusal": digest(A)}
    registry.put("memory", B, store=False)
    registry.sync()
    assert [path.name for path in tmp_path.iterdir()] == ["refusal.safetensors"]
    assert served(registry) == {"memory": digest(B), "refusal": digest(A)}


def test_what_another_process_puts_at_the_same_time_is_not_missed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may replace the file as soon as that is there; whoever was last is then served by both."""
    first, second = (Registry(Recorder(), tmp_path) for _ in range(2))
    with monkeypatch.context() as patch:

        def overtaken(path: Path, data: bytes) -> None:
            write_file(path, data)
            patch.setattr(registry_module, "write_file", write_file)
            second.put("refusal", B)

        patch.setattr(registry_module, "write_file", overtaken)
        first.put("refusal", A)
    for registry in (first, second):
        registry.sync()
        assert served(registry) == {"refusal": digest(B)}


def test_what_cannot_be_stored_is_not_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    placement = models.placement()
    registry = Registry(placement, tmp_path)
    registry.put("refusal", A)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "disk full", str(tmp_path / "x.tmp"))

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(OSError, match="disk full"):
            registry.put("refusal", B)
    assert served(registry) == {"refusal": digest(A)}
    assert placement.bank.rows_in_use == 1
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [A]
    assert registry.failures["refusal"] == ("disk full",), "clients read it: no path of the server"


def test_a_refused_upload_leaves_nothing_behind(tmp_path: Path) -> None:
    registry = Registry(models.placement(), tmp_path)
    with pytest.raises(DirectionError):
        registry.put("refusal", GARBAGE)
    assert registry.failures == {}
    assert [*tmp_path.iterdir()] == []
    registry.put("refusal", A)
    with pytest.raises(DirectionError):
        registry.put("refusal", GARBAGE)
    assert registry.failures.keys() == {"refusal"}, "what is served is not the newest"


def test_delete_removes_the_file(tmp_path: Path) -> None:
    registry = Registry(models.placement(), tmp_path)
    registry.put("refusal", A)
    registry.delete("refusal")
    assert list(tmp_path.iterdir()) == []
    registry.sync()
    assert served(registry) == {}


def test_a_file_that_could_have_no_name_is_removed_all_the_same(tmp_path: Path) -> None:
    registry = Registry(models.placement(), tmp_path)
    (tmp_path / "a b\n.safetensors").write_bytes(b"")
    registry.sync()
    (name,) = registry.failures
    registry.delete(name)
    assert (list(tmp_path.iterdir()), registry.failures) == ([], {})


@pytest.mark.parametrize("way", ["put", "folder"])
def test_reasons_are_bounded_and_can_be_shown_anywhere(
    way: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Whoever writes a file writes its reasons too: into the list, the log and the terminals of others."""
    registry = Registry(models.placement(), tmp_path)
    direction = models.direction(MODEL, seed=5)
    rogue = "\x1b[2J\r\nERROR steer: all is well \u2028\u202e" + "x" * 2**20
    meta = direction.meta.model_copy(update={"architecture": rogue})
    many = direction.tensors() | {f"{n}\x1b": torch.zeros(1) for n in range(2000)}
    for tensors in (direction.tensors(), many):
        data = safetensors.torch.save(tensors, {"format": "pt", "steer": meta.model_dump_json()})
        if way == "put":
            with pytest.raises(DirectionError):
                registry.put("rogue", data, store=False)
        else:
            write(tmp_path, "rogue", data)
            registry.sync()
        problems = registry.failures["rogue"]
        assert sum(map(len, problems)) < 2**17
        assert all(problem.isprintable() for problem in problems)
    for record in caplog.records:
        assert len(record.getMessage()) < 2**17
        assert record.getMessage().isprintable()


def test_sync_follows_new_changed_and_removed_files(tmp_path: Path) -> None:
    placement = models.placement()
    registry = Registry(placement, tmp_path)
    registry.sync()
    assert served(registry) == {}
    write(tmp_path, "one", A)
    write(tmp_path, "two", B)
    registry.sync()
    assert served(registry) == {"one": digest(A), "two": digest(B)}
    write(tmp_path, "one", C)
    registry.sync()
    assert served(registry) == {"one": digest(C), "two": digest(B)}
    (tmp_path / "two.safetensors").unlink()
    registry.sync()
    assert served(registry) == {"one": digest(C)}
    assert placement.bank.rows_in_use == 1
    assert registry.failures == {}


def test_sync_leaves_alone_what_did_not_change(tmp_path: Path) -> None:
    placement = Recorder()
    registry = Registry(placement, tmp_path)
    write(tmp_path, "one", A)
    write(tmp_path, "bad", GARBAGE)
    registry.sync()
    failure = registry.failures["bad"]
    registry.sync()
    assert placement.calls == [("load", digest(A))]
    assert registry.failures["bad"] is failure


def test_sync_without_a_folder_keeps_what_was_put() -> None:
    registry = Registry(Recorder())
    registry.put("refusal", A)
    registry.sync()
    assert served(registry) == {"refusal": digest(A)}


BAD_CONTENT = {
    "garbage": GARBAGE,
    "empty": b"",
    "half": A[: len(A) // 2],
    "pickle": pickle.dumps({"directions": [1.0] * 100}),
    "null metadata": (42).to_bytes(8, "little") + b'{"__metadata__":null}'.ljust(42),
    "other model": models.direction(models.tiny("gpt2")).to_bytes(),
}


@pytest.mark.parametrize("kind", BAD_CONTENT)
def test_a_bad_file_in_the_folder_shows_and_disturbs_nothing(kind: str, tmp_path: Path) -> None:
    registry = Registry(models.placement(), tmp_path)
    write(tmp_path, "one", A)
    write(tmp_path, "two", B)
    registry.sync()
    write(tmp_path, "one", BAD_CONTENT[kind])
    write(tmp_path, "new", BAD_CONTENT[kind])
    write(tmp_path, "three", C)
    registry.sync()
    assert served(registry) == {"one": digest(A), "three": digest(C), "two": digest(B)}
    assert registry.failures.keys() == {"one", "new"}
    assert all("one: " in problem for problem in registry.failures["one"])
    write(tmp_path, "one", D)
    (tmp_path / "new.safetensors").unlink()
    registry.sync()
    assert registry.failures == {}
    assert served(registry)["one"] == digest(D)


def test_a_half_written_file_is_served_once_it_is_complete(tmp_path: Path) -> None:
    registry = Registry(models.placement(), tmp_path)
    path = tmp_path / "one.safetensors"
    with path.open("wb") as out:
        out.write(A[:1000])
        out.flush()
        registry.sync()
        assert served(registry) == {}
        assert registry.failures.keys() == {"one"}
        out.write(A[1000:])
    registry.sync()
    assert served(registry) == {"one": digest(A)}
    assert registry.failures == {}


@pytest.mark.parametrize("name", ["a b", "off", "-x", "é", "a" * 65])
def test_a_file_with_a_bad_name_shows_and_is_not_served(name: str, tmp_path: Path) -> None:
    registry = Registry(models.placement(), tmp_path)
    write(tmp_path, name, A)
    registry.sync()
    assert served(registry) == {}
    assert "is not acceptable" in registry.failures[name][0]
    (tmp_path / f"{name}.safetensors").unlink()
    registry.sync()
    assert registry.failures == {}


def test_a_name_that_is_no_text_is_told_as_one(tmp_path: Path) -> None:
    """Or what lists the failures could not be sent."""
    registry = Registry(models.placement(), tmp_path)
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/n\xff.safetensors")).write_bytes(A)
    write(tmp_path, "good", A)
    registry.sync()
    assert served(registry) == {"good": digest(A)}
    assert [*registry.failures] == ["n\\xff"]
    registry.failures["n\\xff"][0].encode()
    registry.delete("n\\xff")
    assert not list(tmp_path.glob("n*"))


def test_other_files_are_not_looked_at(tmp_path: Path) -> None:
    registry = Registry(models.placement(), tmp_path)
    for name in (".hidden.safetensors", ".one.safetensors.x.tmp", "notes.txt", "old.pt"):
        (tmp_path / name).write_bytes(A)
    registry.sync()
    assert served(registry) == {}
    assert registry.failures == {}


def test_a_file_of_another_tool_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    registry = Registry(Recorder(), tmp_path)
    for name in ("control.gguf", "direction.pt", "notes.txt"):
        (tmp_path / name).write_bytes(b"")
    for _ in range(2):
        registry.sync()
    told = [record.getMessage() for record in caplog.records]
    assert [line.split()[0] for line in told] == ["control.gguf", "direction.pt"]
    assert all("`steer convert`" in line for line in told)
    assert registry.names() == {} == registry.failures


def test_a_file_without_room_is_served_when_there_is_room(tmp_path: Path) -> None:
    registry = Registry(models.placement(rows=1), tmp_path, patience=0.05)
    write(tmp_path, "one", A)
    registry.sync()
    write(tmp_path, "two", B)
    registry.sync()
    assert served(registry) == {"one": digest(A)}
    assert "1 free bank rows" in registry.failures["two"][0]
    registry.delete("one")
    registry.sync()
    assert served(registry) == {"two": digest(B)}
    assert registry.failures == {}


def test_the_failure_of_a_file_goes_with_the_file(tmp_path: Path) -> None:
    registry = Registry(models.placement(rows=1), tmp_path, patience=0.05)
    registry.put("one", A)
    write(tmp_path, "two", B)
    registry.sync()
    assert registry.failures.keys() == {"two"}
    (tmp_path / "two.safetensors").unlink()
    registry.sync()
    assert registry.failures == {}


def test_a_directory_with_the_name_of_a_file_is_a_failure_like_others(tmp_path: Path) -> None:
    registry = Registry(models.placement(), tmp_path)
    (tmp_path / "one.safetensors").mkdir()
    write(tmp_path, "two", B)
    registry.sync()
    assert served(registry) == {"two": digest(B)}
    assert "this is a folder" in registry.failures["one"][0]


def test_the_watcher_sees_files_come_change_and_go(tmp_path: Path) -> None:
    registry, changes = Registry(models.placement(), tmp_path), list[int]()
    registry.follow(lambda: changes.append(1))
    assert registry.follower
    try:
        write(tmp_path, "one", A)
        eventually(lambda: served(registry) == {"one": digest(A)})
        write(tmp_path, "one", B)
        eventually(lambda: served(registry) == {"one": digest(B)})
        write(tmp_path, "one", GARBAGE)
        eventually(lambda: "one" in registry.failures)
        assert served(registry) == {"one": digest(B)}
        (tmp_path / "one.safetensors").unlink()
        eventually(lambda: served(registry) == {})
        eventually(lambda: bool(changes))
        assert registry.follower.state == "ok"
    finally:
        registry.stop()
    assert registry.follower.state == "dead"  # type: ignore[comparison-overlap]


UNFORESEEN = (RuntimeError("Event loop is closed"), KeyError("rank"), OSError(24, "Too many open files"), MemoryError())


@pytest.mark.parametrize("error", UNFORESEEN, ids=lambda error: type(error).__name__)
def test_what_nobody_foresaw_is_kept_for_its_name_and_tried_again(tmp_path: Path, error: Exception) -> None:
    placement = Recorder()
    registry = Registry(placement, tmp_path)

    def broken() -> None:
        raise error

    placement.on_load = broken
    with pytest.raises(type(error)):
        registry.put("put", C, store=False)
    assert registry.failures["put"]
    write(tmp_path, "one", A)
    registry.sync()
    failure = registry.failures["one"]
    assert failure[0].startswith(error.strerror or "" if isinstance(error, OSError) else type(error).__name__)
    registry.sync()
    assert registry.failures["one"] is failure, "said once"
    assert registry.resident == 0
    placement.on_load = lambda: None
    registry.sync()
    assert served(registry) == {"one": digest(A)}
    assert registry.failures.keys() == {"put"}


def test_one_name_that_fails_holds_up_no_other(tmp_path: Path) -> None:
    placement = Recorder()
    registry = Registry(placement, tmp_path)

    def broken() -> None:
        if "a" in registry.failures:
            return
        raise RuntimeError("Event loop is closed")

    placement.on_load = broken
    write(tmp_path, "a", A)
    write(tmp_path, "b", B)
    registry.sync()
    assert served(registry) == {"b": digest(B)}
    assert registry.failures.keys() == {"a"}


def test_a_file_that_the_disk_did_not_give_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = Registry(Recorder(), tmp_path)
    write(tmp_path, "one", A)

    def failing(path: Path) -> BinaryIO:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr("steer.direction.open_file", failing)
        registry.sync()
    assert "Input/output error" in registry.failures["one"][0]
    registry.sync()
    assert served(registry) == {"one": digest(A)}


def test_who_is_told_of_moves_cannot_end_the_following(tmp_path: Path) -> None:
    registry = Registry(Recorder(), tmp_path)
    write(tmp_path, "one", A)
    registry.sync()

    def broken(move: Move) -> None:
        raise RuntimeError("no audit")

    registry.on_move = broken
    write(tmp_path, "one", B)
    write(tmp_path, "two", C)
    registry.sync()
    assert registry.failures.keys() == {"one", "two"}
    registry.on_move = lambda move: None
    registry.sync()
    assert served(registry) == {"one": digest(B), "two": digest(C)}
    assert registry.failures == {}


# -- many at once ----------------------------------------------------------------------------------------------------


def test_a_request_that_ends_while_a_new_version_is_stored_takes_nothing_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between its load and its name a version is neither named nor pinned, and a file takes its time to be written."""
    placement = models.placement()
    registry = Registry(placement, tmp_path)
    registry.put("refusal", A)
    admission = admit(registry, "refusal")
    sync_to_disk = os.fsync

    def slow(handle: int) -> None:
        ending = threading.Thread(target=admission.release)
        ending.start()
        ending.join(1)
        sync_to_disk(handle)

    monkeypatch.setattr(os, "fsync", slow)
    registry.put("refusal", B)
    assert served(registry) == {"refusal": digest(B)}
    assert placement.bank.steer(admit(registry, "refusal").spec) is not None
    eventually(lambda: registry.resident == 1)


@pytest.mark.parametrize("stored", [False, True])
def test_no_request_ever_misses_its_version_during_swaps(stored: bool, tmp_path: Path) -> None:
    placement = models.placement(rows=16)
    registry = Registry(placement, tmp_path if stored else None)
    registry.put("refusal", A)
    registry.put("other", D)
    over, wrong = threading.Event(), []
    admitted = [0] * 3

    def client(number: int) -> None:
        wishes: list[tuple[RequestedDirection, ...]] = [
            parse("refusal"),
            parse("refusal=0.5,other"),
            parse("other:add"),
        ]
        try:
            while not over.is_set():
                admission = Admission.of(registry, wishes[number])
                placement.bank.steer(admission.spec)  # a version that is not resident is a KeyError
                time.sleep(0.0005)
                placement.bank.steer(admission.spec)
                admission.release()
                admitted[number] += 1
        except Exception as error:
            wrong.append(error)

    clients = [threading.Thread(target=client, args=(number,)) for number in range(3)]
    for thread in clients:
        thread.start()
    try:
        for n in range(200):
            registry.put("refusal", (B, C, A)[n % 3])
    finally:
        over.set()
        for thread in clients:
            thread.join(20)
    assert wrong == []
    assert all(admitted)
    assert served(registry) == {"other": digest(D), "refusal": digest(C)}
    assert registry.resident == 2
    assert placement.bank.rows_in_use == 2
    assert [version.pins for version in registry.names().values()] == [0, 0]


def test_a_folder_that_vanishes_takes_nothing_away(tmp_path: Path) -> None:
    """An unmounted disk is not a wish to stop serving."""
    folder = tmp_path / "directions"
    folder.mkdir()
    (folder / "d.safetensors").write_bytes(A)
    registry = Registry(Recorder(), folder)
    registry.sync()
    folder.rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError):
        registry.sync()
    assert list(registry.names()) == ["d"]
    (tmp_path / "elsewhere").rename(folder)
    registry.sync()
    assert list(registry.names()) == ["d"]


def test_the_directions_of_one_request_act_at_two_different_places_at_most() -> None:
    """More would be more combinations in one step than there is room for."""
    registry = Registry(models.placement())
    for name, data in (("a", A), ("b", B), ("c", C)):
        registry.put(name, data, store=False)
    registry.resolve(parse("a@answer,b@prompt"))
    with pytest.raises(SpecError, match=r"at 3 different tokens \(all, answer, prompt\), at most 2"):
        registry.resolve(parse("a@answer,b@prompt,c"))


@pytest.mark.parametrize("phase", PHASES)
def test_a_phase_is_of_models_that_have_it_and_of_all_that_a_request_asks_for(phase: str) -> None:
    placements = [models.placement(), models.placement(), models.placement(rank=1)]
    for placement in placements[1:]:
        placement.shape = replace(placement.shape, thinking=Thinking(5, 6, frozenset()))
    for placement, offered in zip(placements, (False, True, False), strict=True):
        assert (phase in placement.shape.tokens) == offered
    without, registry, narrow = map(Registry, placements)
    for each in (without, registry, narrow):
        for name, data in (("a", A), ("b", B)):
            each.put(name, data, store=False)
    assert registry.resolve(parse(f"a@{phase},b@{phase}=0.5")).phased == phase
    with pytest.raises(SpecError, match=rf"tokens: '{phase}': no tokenizer here has tokens .*<think> and </think>"):
        without.resolve(parse(f"a@{phase}"))
    with pytest.raises(SpecError, match=r"2 direction rows .*two are the least with the tokens"):
        narrow.resolve(parse(f"a@{phase}"))
    for other in ("answer", "all", *({*PHASES} - {phase})):
        with pytest.raises(SpecError, match="does not go together with others in one request"):
            registry.resolve(parse(f"a@{phase},b@{other}"))
