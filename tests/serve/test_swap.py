"""Swapping directions under a running server: by file, by PUT, with garbage, under load."""

from __future__ import annotations

import json
import os
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from steer.direction import Direction, digest
from steer.files import write_file
from tests import models
from tests.servers import Server, receipt, text
from tests.waiting import eventually


@pytest.fixture(scope="module")
def versions() -> list[bytes]:
    model = models.tiny("llama")
    return [models.direction(model, seed=seed).to_bytes() for seed in (11, 12)]


@pytest.fixture
def server(tiny_folder: Path, tmp_path: Path, versions: list[bytes]) -> Iterator[Server]:
    write_file(tmp_path / "refusal.safetensors", versions[0])
    with Server(str(tiny_folder), "--directions", str(tmp_path), directions=tmp_path) as server:
        yield server


def served(server: Server, name: str = "refusal") -> dict[str, Any]:
    response = server.client.get(f"/v1/directions/{name}")
    assert response.status_code == 200, response.text
    return dict(response.json())


def bad_files(good: bytes) -> dict[str, tuple[bytes, str]]:
    """Content that must be refused, with a part of the reason."""
    direction = Direction.from_bytes(good)
    layers, _, width = direction.directions.shape

    def changed(**tensors: torch.Tensor) -> bytes:
        import safetensors.torch

        meta = {"format": "pt", "steer": direction.meta.model_dump_json()}
        return safetensors.torch.save(direction.tensors() | tensors, meta)

    other = models.direction(models.tiny("llama"), seed=3)
    foreign = other.meta.model_copy(update={"d_model": width * 2})
    import safetensors.torch

    wide = {
        name: torch.zeros(*t.shape[:-1], t.shape[-1] * 2) if t.shape[-1] == width else t
        for name, t in other.tensors().items()
    }
    wide["directions"][..., 0] = 1.0
    return {
        "truncated": (good[:-100], "not a safetensors file"),
        "empty": (b"", "not a safetensors file"),
        "wrong shape": (changed(weights=torch.ones(layers + 1)), "'weights' has shape"),
        "wrong dtype": (changed(directions=direction.directions.half()), "'directions' has dtype float16"),
        "nan": (changed(directions=direction.directions * torch.nan), "not finite"),
        "not unit": (changed(directions=direction.directions * 2), "not unit vectors at layers [0, 1, 2]"),
        "pickle": (b"PK\x03\x04" + good, "pickle"),
        "foreign": (
            safetensors.torch.save(wide, {"steer": foreign.model_dump_json()}),
            "it was made for d_model 128, this model has 64",
        ),
    }


def test_a_replaced_file_is_served_without_a_restart(server: Server, versions: list[bytes]) -> None:
    first, answer = served(server)["digest"], text(server.complete(steer="refusal"))
    assert first == digest(versions[0])
    write_file(server.directions / "refusal.safetensors", versions[1])  # type: ignore[operator]
    eventually(lambda: served(server)["digest"] == digest(versions[1]))
    response = server.complete(steer="refusal")
    assert receipt(response)[0]["digest"] == digest(versions[1])
    assert text(response) != answer
    (server.directions / "refusal.safetensors").unlink()  # type: ignore[operator]
    eventually(lambda: server.client.get("/v1/directions/refusal").status_code == 404)
    assert server.complete(steer="refusal").status_code == 400


def test_put_get_delete(server: Server, versions: list[bytes]) -> None:
    put = server.client.put("/v1/directions/other", content=versions[1])
    assert put.status_code == 200, put.text
    assert put.json()["digest"] == digest(versions[1])
    assert receipt(server.complete(steer="other"))[0]["digest"] == digest(versions[1])
    assert (server.directions / "other.safetensors").read_bytes() == versions[1]  # type: ignore[operator]
    known = served(server, "other")
    assert known["meta"]["method"] == "random"
    assert [row["layer"] for row in known["profile"]] == [0, 1, 2]
    listed = {d["id"]: d["status"] for d in server.client.get("/v1/directions").json()["data"]}
    assert listed == {"other": "served", "refusal": "served"}
    assert server.client.delete("/v1/directions/other").json()["deleted"]
    assert server.client.delete("/v1/directions/other").status_code == 404
    assert not (server.directions / "other.safetensors").exists()  # type: ignore[operator]
    assert server.client.put("/v1/directions/..%2Fevil", content=versions[1]).status_code in (400, 404)
    assert server.client.put("/v1/directions/.hidden", content=versions[1]).status_code == 400
    assert server.client.put("/v1/directions/off", content=versions[1]).status_code == 400


def test_bad_content_is_refused_with_its_reason_and_the_old_version_serves_on(
    server: Server, versions: list[bytes]
) -> None:
    answer = text(server.complete(steer="refusal"))
    path = server.directions / "refusal.safetensors"  # type: ignore[operator]
    for name, (content, reason) in bad_files(versions[0]).items():
        refused = server.client.put("/v1/directions/refusal", content=content)
        assert refused.status_code == 400, (name, refused.text)
        assert reason in refused.json()["error"]["message"], name
        os.utime(path)
        write_file(path, content)
        eventually(lambda: served(server)["status"] == "stale")
        assert any(reason in problem for problem in served(server)["errors"]), (name, served(server)["errors"])
        assert text(server.complete(steer="refusal")) == answer, name
        write_file(path, versions[0])
        eventually(lambda: served(server)["status"] == "served")
    write_file(server.directions / "new.safetensors", b"garbage")  # type: ignore[operator]
    eventually(lambda: {"new"} <= {d["id"] for d in server.client.get("/v1/directions").json()["data"]})
    assert server.client.get("/health").json()["failed_directions"] == ["new"]
    assert "steer_failed_directions 1.0" in server.client.get("/metrics").text


def test_swap_under_load(server: Server, versions: list[bytes]) -> None:
    """8 clients stream while the file is replaced 100 times, now and then with garbage: no request fails, and every
    answer is the one that its receipt's digest predicts."""
    prompts = ["one", "two", "three"]
    expected: dict[tuple[str, str], str] = {}
    for i, version in enumerate(versions):
        assert server.client.put(f"/v1/directions/v{i}", content=version).status_code == 200
        for prompt in prompts:
            expected[digest(version), prompt] = text(server.complete(prompt, steer=f"v{i}", max_tokens=24))
    assert len(set(expected.values())) > len(prompts)
    stop = threading.Event()
    seen: list[tuple[str, str, str]] = []
    failures: list[str] = []

    def client(number: int) -> None:
        rng = random.Random(number)
        with httpx.Client(base_url=server.url, timeout=60) as http:
            while not stop.is_set():
                prompt = rng.choice(prompts)
                body = {
                    "model": server.model_name,
                    "prompt": prompt,
                    "max_tokens": 24,
                    "temperature": 0,
                    "stream": True,
                }
                with http.stream("POST", "/v1/completions", json={**body, "steer": "refusal"}) as response:
                    if response.status_code != 200:
                        failures.append(response.read().decode())
                        continue
                    which = json.loads(response.headers["x-steer-applied"])[0]["digest"]
                    events = [line[6:] for line in response.iter_lines() if line.startswith("data: {")]
                answer = "".join(c["text"] for event in events for c in json.loads(event)["choices"])
                seen.append((which, prompt, answer))

    threads = [threading.Thread(target=client, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    path, rng = server.directions / "refusal.safetensors", random.Random(0)  # type: ignore[operator]
    for i in range(100):
        content = b"not a direction" if i % 9 == 5 else versions[rng.randrange(2)]
        write_file(path, content)
        time.sleep(0.1)
    write_file(path, versions[1])
    eventually(lambda: served(server)["digest"] == digest(versions[1]))
    time.sleep(0.5)
    stop.set()
    for thread in threads:
        thread.join(timeout=60)
    assert not failures
    assert len(seen) > 40
    assert {which for which, _, _ in seen} == {digest(v) for v in versions}, "both versions were really served"
    for which, prompt, answer in seen:
        assert answer == expected[which, prompt]
    assert "steer_resident_versions 2.0" in server.client.get("/metrics").text, "no version is left behind"
    assert server.client.get("/health").json()["in_flight"] == 0
