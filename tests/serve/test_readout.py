"""The field `steer_readout` on a real server: streamed or not, steered or plain, across a swap, and bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch

from steer.direction import Direction, digest
from tests import models
from tests.oracle import ablated
from tests.serve.test_app import ROUTES, ask, error
from tests.servers import Server, receipt

#: Of a line, what has a value for each token.
SIDES = {"before", "after", "angle_before", "angle_after"}


def choice(response: httpx.Response) -> dict[str, Any]:
    assert response.status_code == 200, response.text
    return dict(response.json()["choices"][0])


def gathered(response: httpx.Response, index: int = 0) -> dict[str, Any]:
    """The read-outs of a stream's chunks, put behind each other."""
    whole: dict[str, Any] = {}
    for line in response.text.splitlines():
        if not line.startswith("data: {"):
            continue
        for part in json.loads(line.removeprefix("data: "))["choices"]:
            new = part.get("steer_readout")
            if part["index"] != index or new is None:
                continue
            if not whole:
                whole = new
                continue
            assert new["layers"] == whole["layers"]
            for key in ("tokens", "norms"):
                whole[key] += new[key]
            for mine, more in zip(whole["directions"], new["directions"], strict=True):
                for side in SIDES & mine.keys():
                    mine[side] += more.pop(side)
                assert more == {key: mine[key] for key in more}
    return whole


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("steer", ["off", "refusal=0.7"])
def test_a_stream_reads_what_the_whole_answer_reads(tiny_server: Server, route: str, steer: str) -> None:
    options = {"steer": steer, "steer_readout": {"directions": ["verbosity", "refusal"], "layers": [0, 2]}}
    whole = choice(ask(tiny_server, route, **options))["steer_readout"]
    assert gathered(ask(tiny_server, route, stream=True, **options)) == whole
    assert whole["layers"] == [0, 2]
    assert [d["name"] for d in whole["directions"]] == ["verbosity", "refusal"]


@pytest.mark.parametrize("route", ROUTES)
def test_entries_follow_the_tokens_of_logprobs(tiny_server: Server, route: str) -> None:
    logprobs = {"logprobs": True} if route == "chat" else {"logprobs": 0}
    for stop in (None, "e"):
        answer = choice(ask(tiny_server, route, max_tokens=24, stop=stop, steer_readout="refusal", n=2, **logprobs))
        shown = answer["logprobs"]
        tokens = [t["token"] for t in shown["content"]] if route == "chat" else shown["tokens"]
        read = answer["steer_readout"]
        assert read["tokens"] == tokens
        assert len(read["norms"]) == len(tokens)
        for side in ("before", "after"):
            assert np.array(read["directions"][0][side]).shape == (len(tokens), models.LAYERS)


def test_the_numbers_are_those_of_a_forward_pass(tiny_server: Server) -> None:
    """Ablated at half strength, over HTTP, against hooks on a model of the test's own."""
    direction = Direction.load(tiny_server.directions / "refusal.safetensors")  # type: ignore[operator]
    model, tokenizer = models.tiny("llama"), models.tokenizer()
    prompt = [1, 40, 41, 42]
    read = choice(tiny_server.complete(prompt, steer="refusal=0.5", steer_readout=True))["steer_readout"]
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def act(layer: int) -> Any:
        def hook(_module: Any, _args: Any, output: torch.Tensor) -> torch.Tensor:
            after = ablated(output, direction.directions[layer, 0], 0.5)
            seen.append((output[0], after[0]))
            return after

        return hook

    for layer, block in enumerate(model.model.layers):
        block.register_forward_hook(act(layer))
    ids = list(prompt)
    with torch.no_grad():
        for _ in read["tokens"]:
            seen.clear()
            ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    assert [tokenizer.decode([token]) for token in ids[len(prompt) :]] == read["tokens"]
    positions = slice(len(prompt) - 1, None)
    for layer, (before, after) in enumerate(seen):
        v = direction.directions[layer, 0]
        for side, stream in (("before", before), ("after", after)):
            told = np.array(read["directions"][0][side])[:, layer]
            np.testing.assert_allclose(told, (stream[positions] @ v).numpy(), rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(np.array(read["norms"])[:, layer], before[positions].norm(dim=-1).numpy(), rtol=1e-4)


@pytest.mark.parametrize("route", ROUTES)
def test_angles_are_read_in_a_stream_too_and_rotation_turns_them(tiny_server: Server, route: str) -> None:
    made = models.direction(models.tiny("llama"), seed=3, plane=True)
    assert tiny_server.client.put("/v1/directions/flat", content=made.to_bytes()).status_code == 200
    options = {"steer": "flat:rotate=0.5", "steer_readout": {"directions": "flat", "angle": True}}
    whole = choice(ask(tiny_server, route, **options))["steer_readout"]
    assert gathered(ask(tiny_server, route, stream=True, **options)) == whole
    [line] = whole["directions"]
    before, after = (np.array(line[f"angle_{side}"]) for side in ("before", "after"))
    assert before.shape == (len(whole["tokens"]), models.LAYERS)
    np.testing.assert_allclose(after, 0.5 * before, atol=1e-2)
    asked = {"steer_readout": {"directions": ["flat", "refusal"], "angle": True}}
    assert "'refusal' holds no plane" in error(ask(tiny_server, route, **asked), 400)["message"]
    assert tiny_server.client.delete("/v1/directions/flat").status_code == 200


def test_reading_changes_no_answer_and_nothing_is_read_unasked(tiny_server: Server) -> None:
    for steer in ("off", "refusal"):
        asked = choice(tiny_server.complete(steer=steer, steer_readout="verbosity"))
        unasked = choice(tiny_server.complete(steer=steer))
        assert asked["text"] == unasked["text"]
        assert "steer_readout" not in unasked
        assert "steer_readout" not in choice(tiny_server.complete(steer=steer, steer_readout=False))


def test_a_plain_request_is_read_along_a_named_direction(tiny_server: Server) -> None:
    response = tiny_server.complete(steer_readout="refusal")
    assert receipt(response) == []
    (line,) = choice(response)["steer_readout"]["directions"]
    assert line["before"] == line["after"]
    assert any(value for token in line["before"] for value in token)


def test_what_is_read_is_the_version_that_steers_whatever_is_swapped_in_between(
    tiny_folder: Path, tmp_path: Path
) -> None:
    """Both versions are read by requests that began with them, and the old one goes when they end."""
    model = models.tiny("llama")
    old, new = (models.direction(model, seed=seed).to_bytes() for seed in (21, 22))
    (tmp_path / "d.safetensors").write_bytes(old)
    body = {"prompt": "x", "temperature": 0, "max_tokens": 200, "stream": True, "ignore_eos": True}
    with Server(str(tiny_folder), "--directions", str(tmp_path)) as server:
        body |= {"model": server.model_name}
        expected = gathered(server.client.post("/v1/completions", json=body | {"steer_readout": "d"}))
        with server.client.stream("POST", "/v1/completions", json=body | {"steer_readout": "d"}) as response:
            lines = response.iter_lines()
            seen = [next(lines)]
            assert server.client.put("/v1/directions/d", content=new).status_code == 200
            assert server.client.get("/v1/directions/d").json()["digest"] == digest(new)
            seen += list(lines)
        read = gathered(httpx.Response(200, text="\n".join(seen)))
        assert {line["digest"] for line in read["directions"]} == {digest(old)}
        assert read == expected, "the rows were its own to the end"
        after = choice(server.complete(steer="d", steer_readout=True))["steer_readout"]
        assert {line["digest"] for line in after["directions"]} == {digest(new)}
        assert "steer_resident_versions 1.0" in server.client.get("/metrics").text


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("nobody", "direction 'nobody' is not served; served: refusal, verbosity"),
        (True, "but none does; name them"),
        (7, "7 is not understood"),
        ({"directions": "refusal", "layers": [7]}, "7: this model has the layers 0 to 2"),
        ({"directions": "refusal", "layers": "source"}, "refusal: each layer has its own direction"),
        ({"directions": "refusal", "depth": 1}, "steer_readout.depth: unknown field"),
        (["a", "b", "c", "d", "e"], "at most 4"),
        ("../../etc/passwd", "is not served"),
    ],
)
def test_a_bad_read_out_gets_a_400_that_names_it(tiny_server: Server, value: Any, says: str) -> None:
    told = error(tiny_server.complete(steer_readout=value), 400)
    assert says in told["message"]
    assert told["param"] == "steer_readout"
    assert tiny_server.client.get("/v1/directions/refusal").json()["requests"] == 0


def test_a_server_that_claims_no_block_outputs_says_that_it_reads_none(tiny_folder: Path, tmp_path: Path) -> None:
    with Server(str(tiny_folder), "--directions", str(tmp_path), "--sites", "writers") as server:
        assert "offers no read-out" in error(server.complete(steer_readout="refusal"), 400)["message"]
        assert server.complete(steer_readout=None).status_code == 200
