"""vLLM's own server with steering on: carriers and receipts on every route, aliases, control routes, swaps."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

import steer
from steer.direction import Direction
from steer.spec import PHASES
from steer.vllm.frontend import MAX_LOGPROBS
from tests import clients, harness, models, oracle
from tests.fuzz.life import Life, by_field
from tests.fuzz.surface import Outcome
from tests.servers import Server, outlives_clients, receipt
from tests.vllm.engines import Home, Reference, are_likeliest
from tests.vllm.swaps import swap_under_load
from tests.waiting import eventually

KEY = {"Authorization": "Bearer secret"}
MESSAGES = [{"role": "user", "content": "hello"}]
ROUTES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "hello", "max_tokens": 8},
    "/v1/chat/completions": {"messages": MESSAGES, "max_tokens": 8},
    "/v1/responses": {"input": "hello", "max_output_tokens": 16},
    "/v1/messages": {"messages": MESSAGES, "max_tokens": 8},
}
READ_ROUTES = ("/v1/completions", "/v1/chat/completions")
OPTIONS = ["--dtype", "float32", "--max-model-len", "256", "--max-num-seqs", "32", "--served-model-name", "tiny"]
THINKING = ("<think>", "</think>")
#: A random model that may put spaces between the parts of a shaped answer puts nothing else.
TIGHT = ["--structured-outputs-config", '{"backend": "xgrammar", "disable_any_whitespace": true}']


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    made = Home.make("llama", tmp_path_factory.mktemp("server"))
    tokenizer = AutoTokenizer.from_pretrained(made.folder)
    tokenizer.add_tokens([*THINKING])
    tokenizer.save_pretrained(made.folder)
    return made


@pytest.fixture(scope="module")
def server(home: Home) -> Iterator[Server]:
    command = [sys.executable, "-m", "tests.vllm.run_server", str(home.folder), str(home.directions)]
    with Server(*OPTIONS, *TIGHT, "--api-key", "secret", command=command) as running:
        running.client.headers.update(KEY)
        yield running


def ask(server: Server, route: str, headers: dict[str, str] | None = None, **more: Any) -> Any:
    body = {"model": "tiny", "temperature": 0} | ROUTES[route] | more
    return server.client.post(route, json=body, headers=headers or {})


def is_idle(server: Server) -> bool:
    """Whether the engine has no request."""
    found = re.findall(r"^vllm:num_requests_(?:running|waiting){\S* (\S+)", server.client.get("/metrics").text, re.M)
    return len(found) >= 2 and not any(map(float, found))


def words(answer: Any) -> str:
    body = answer.json()
    if "choices" in body:
        choice = body["choices"][0]
        return str(choice["text"] if "text" in choice else choice["message"]["content"])
    if "output" in body:
        return str(body["output"][0]["content"][0]["text"])
    return str(body["content"][0]["text"])


@pytest.mark.parametrize("route", ROUTES)
def test_all_carriers_mean_the_same_on_every_route(server: Server, route: str) -> None:
    plain = ask(server, route)
    answers = [
        ask(server, route, steer="refusal=0.9"),
        ask(server, route, headers={"X-Steer": "refusal=0.9"}),
        ask(server, route, model="tiny+refusal=0.9"),
        ask(server, route, vllm_xargs={"steer": "refusal=0.9"}),
    ]
    assert [answer.status_code for answer in (plain, *answers)] == [200] * 5
    assert receipt(plain) == []
    for answer in answers:
        [entry] = receipt(answer)
        assert (entry["direction"], entry["mode"], entry["strength"]) == ("refusal", "ablate", 0.9)
        assert words(answer) == words(answers[0]) != words(plain)


@pytest.mark.parametrize("route", ROUTES)
def test_streams_have_receipts_and_are_steered(server: Server, route: str) -> None:
    whole = ask(server, route, steer="verbosity")
    streamed = ask(server, route, steer="verbosity", stream=True)
    assert streamed.headers["content-type"].startswith("text/event-stream")
    assert receipt(streamed) == receipt(whole)
    pieces = [json.loads(line[6:]) for line in streamed.text.splitlines() if line.startswith("data: {")]
    said = ""
    for piece in pieces:
        if "choices" in piece:
            choice = piece["choices"][0] if piece["choices"] else {}
            said += choice.get("text") or choice.get("delta", {}).get("content") or ""
        elif piece.get("type") == "content_block_delta":
            said += piece["delta"].get("text", "")
        elif piece.get("type") == "response.output_text.delta":
            said += piece["delta"]
    assert said == words(whole)


def test_what_is_served_is_what_transformers_says(server: Server, home: Home) -> None:
    reference = Reference(home)
    shifted = ("refusal:clamp^-0.25", "refusal:one_sided^0.5=2,verbosity:clamp")
    for spec in ("off", "refusal", "refusal:one_sided=0.5,verbosity=-0.5", "verbosity:add=0.5", *shifted):
        body = ask(server, "/v1/completions", steer=spec, logprobs=1, return_token_ids=True).json()["choices"][0]
        prompt, answer = body["prompt_token_ids"], body["token_ids"]
        expected = reference.logprobs(prompt + answer, spec)[len(prompt) - 1 : -1]
        assert are_likeliest(answer, expected)
        for position, (token, said) in enumerate(zip(answer, body["logprobs"]["token_logprobs"], strict=True)):
            assert said == pytest.approx(expected[position, token].item(), abs=1e-3)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"steer": "nobody"}, "not served"),
        ({"steer": "refusal=99"}, "strength"),
        ({"steer": "refusal,verbosity,refusal:affine"}, "needs 3 direction rows"),
        ({"steer": "refusal", "vllm_xargs": {"steer": "verbosity"}}, "disagree"),
        ({"vllm_xargs": {"steer.resolved": "[]"}}, "steering cannot be requested like this"),
        ({"vllm_xargs": {"steer": "ticket:00"}}, "not a mode"),
    ],
)
def test_bad_requests_get_a_400(server: Server, more: dict[str, Any], message: str) -> None:
    answer = ask(server, "/v1/completions", **more)
    assert answer.status_code == 400, answer.text
    assert message in answer.json()["error"]["message"]
    assert "x-steer-applied" not in answer.headers


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("route", ROUTES)
def test_a_stream_that_overflows_is_an_error_of_its_own(server: Server, home: Home, route: str, stream: bool) -> None:
    wild = models.direction(home.model, seed=8, shared=True)
    data = dataclasses.replace(wild, weights=torch.full_like(wild.weights, 1e12)).to_bytes()
    assert server.client.put("/v1/directions/wild", content=data).status_code in (200, 201)
    plain = words(ask(server, route))
    several: dict[str, Any] = {"n": 2, "temperature": 1}
    for more in ({}, several) if route in READ_ROUTES and not stream else ({},):
        with ThreadPoolExecutor(3) as pool:
            bad = pool.submit(ask, server, route, steer="wild=-10", stream=stream, **more)
            others = [pool.submit(ask, server, route) for _ in range(2)]
        answer = bad.result()
        begun = answer.status_code == 200  # a stream may be lost before or after it has begun
        assert json.loads(answer.text.split("data: ")[-2] if begun else answer.text)["error"]["code"] == "not_finite"
        assert answer.status_code == 400 or (begun and stream), answer.text
        assert [words(other.result()) for other in others] == [plain] * 2
    assert words(ask(server, route)) == plain
    assert server.client.delete("/v1/directions/wild").status_code == 200


def test_nothing_is_told_without_the_key(server: Server) -> None:
    stranger = {"Authorization": "Bearer wrong"}
    assert server.client.get("/v1/directions", headers=stranger).status_code == 401
    assert server.client.put("/v1/directions/x", content=b"", headers=stranger).status_code == 401
    answer = ask(server, "/v1/completions", headers=stranger, steer="nobody")
    assert answer.status_code == 401
    assert "refusal" not in answer.text


@pytest.mark.parametrize("name", [name for name in clients.SECTIONS if name != "instructor"])
def test_a_client_of_the_page_gets_the_answers_and_the_receipt(server: Server, tmp_path: Path, name: str) -> None:
    route = {"openai-responses": "/v1/responses", "anthropic": "/v1/messages"}.get(name, "/v1/chat/completions")
    question: dict[str, Any] = {
        "messages": [{"role": "user", "content": clients.QUESTION}],
        "max_tokens": clients.TOKENS,
    }
    if route == "/v1/responses":
        question = {"input": clients.QUESTION, "max_output_tokens": clients.TOKENS}
    asked = [ask(server, route, steer=steer, **question) for steer in ("off", "refusal")]
    plain, steered = (words(answer).strip() for answer in asked)
    assert plain != steered
    assert clients.said(name, server, tmp_path, "secret") == (plain, steered, receipt(asked[1]))


def test_a_client_gets_answers_of_the_shape_that_it_asks_for(server: Server, tmp_path: Path) -> None:
    plain, steered, applied = clients.said("instructor", server, tmp_path, "secret")
    assert {plain, steered} <= {"yes", "no"}
    assert applied == receipt(server.chat(steer="refusal"))


def test_the_openai_and_the_anthropic_client(server: Server) -> None:
    """By the name of the model, which is the carrier that every client has."""
    import anthropic
    import openai

    chat = openai.OpenAI(base_url=f"{server.url}/v1", api_key="secret", max_retries=0).chat.completions
    options: dict[str, Any] = {"messages": MESSAGES, "max_tokens": 8, "temperature": 0}
    plain = chat.create(model="tiny", **options).choices[0].message.content
    steered = chat.create(model="tiny", extra_body={"steer": "refusal"}, **options).choices[0].message.content
    assert steered != plain
    assert chat.create(model="tiny+refusal", **options).choices[0].message.content == steered
    with pytest.raises(openai.BadRequestError, match="not served"):
        chat.create(model="tiny+nobody", **options)
    messages = anthropic.Anthropic(base_url=server.url, auth_token="secret", api_key=None, max_retries=0).messages
    said: dict[str, Any] = {"messages": MESSAGES, "max_tokens": 8, "extra_body": {"temperature": 0}}
    assert messages.create(model="tiny", **said).content[0].text == plain
    assert messages.create(model="tiny+refusal", **said).content[0].text == steered
    with messages.stream(model="tiny+refusal", **said) as stream:
        assert "".join(stream.text_stream) == steered


def test_a_connection_outlives_the_patience_of_clients(server: Server) -> None:
    assert outlives_clients(server)


def test_aliases_are_listed_as_models(server: Server) -> None:
    cards = {card["id"]: card for card in server.client.get("/v1/models").json()["data"]}
    assert {"tiny", "tiny+refusal", "tiny+verbosity"} <= cards.keys()
    assert (cards["tiny+refusal"]["parent"], cards["tiny+refusal"]["root"]) == ("tiny", "refusal")


def test_directions_are_put_read_and_deleted(server: Server, home: Home) -> None:
    data = models.direction(home.model, seed=9).to_bytes()
    put = server.client.put("/v1/directions/guest", content=data)
    assert put.status_code == 200, put.text
    assert (home.directions / "guest.safetensors").read_bytes() == data
    assert receipt(ask(server, "/v1/completions", steer="guest"))[0]["digest"] == put.json()["digest"]
    bad = server.client.put("/v1/directions/guest", content=b"junk")
    assert (bad.status_code, bad.json()["error"]["code"]) == (400, "invalid_direction")
    assert server.client.get("/v1/directions/guest").json()["status"] == "stale"
    assert server.client.delete("/v1/directions/guest").json()["deleted"] is True
    missing = server.client.get("/v1/directions/guest")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "direction_not_found")
    assert "steer_swaps" in server.client.get("/metrics").text


def test_swaps_under_load_give_one_version_or_the_other(server: Server, home: Home) -> None:
    swap_under_load(server, home)


@pytest.mark.parametrize("kind", ["generate_until", "multiple_choice"])
def test_lm_eval(server: Server, home: Home, tmp_path: Path, kind: str) -> None:
    options: dict[str, Any] = {"prompt": harness.HELLO, "max_tokens": 6}
    answer = words(ask(server, "/v1/completions", steer="refusal", **options)).strip()
    assert answer != words(ask(server, "/v1/completions", **options)).strip()
    score = harness.evaluate(
        server.url, "tiny+refusal", str(home.folder), tmp_path, kind=kind, answer=answer, key="secret"
    )
    assert score in ((1.0,) if kind == "generate_until" else (0.0, 1.0))


def test_vllms_own_benchmark(server: Server, home: Home, tmp_path: Path) -> None:
    """`vllm bench serve`, steered by the body, by the model's name and not at all."""
    for more in (["--extra-body", '{"steer": "refusal"}'], ["--served-model-name", "tiny+refusal"], []):
        name = [] if "--served-model-name" in more else ["--served-model-name", "tiny"]
        done = subprocess.run(
            [
                *(sys.executable, "-m", "tests.vllm.command", "bench", "serve", "--backend", "openai"),
                *("--base-url", server.url, "--model", str(home.folder), *name, *more),
                *("--dataset-name", "random", "--random-input-len", "16", "--random-output-len", "8"),
                *("--num-prompts", "8", "--ignore-eos", "--save-result", "--result-dir", str(tmp_path)),
                *("--result-filename", "result.json"),
            ],
            capture_output=True,
            text=True,
            timeout=1500,
            env=os.environ | {"OPENAI_API_KEY": "secret"},
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        result = json.loads((tmp_path / "result.json").read_text())
        assert (result["completed"], result["total_output_tokens"]) == (8, 64)


def numbers(read: dict[str, Any]) -> torch.Tensor:
    """All that was measured, as one row."""
    parts = [read["norms"], *(one[when] for one in read["directions"] for when in ("before", "after"))]
    return torch.cat([torch.tensor(part).flatten() for part in parts])


@pytest.mark.parametrize("route", READ_ROUTES)
@pytest.mark.parametrize("steer", ["off", "refusal=0.5"])
def test_what_is_read_is_what_a_forward_pass_has(server: Server, home: Home, route: str, steer: str) -> None:
    """Whole and streamed, beside others that are not read; the numbers are those of hooks on transformers."""
    options: dict[str, Any] = {
        "steer": steer,
        "steer_readout": {"directions": ["refusal", "verbosity"], "layers": [0, 2]},
    }
    options |= {"logprobs": True} if "chat" in route else {"logprobs": 1}
    with ThreadPoolExecutor() as pool:
        others = [pool.submit(ask, server, route, steer="verbosity") for _ in range(4)]
        whole = ask(server, route, return_token_ids=True, **options)
        streamed = ask(server, route, stream=True, **options)
        assert all(other.result().status_code == 200 for other in others)
    assert whole.status_code == 200, whole.text
    [choice] = whole.json()["choices"]
    read = choice["steer_readout"]
    pieces = [json.loads(line[6:]) for line in streamed.text.splitlines() if line.startswith("data: {")]
    found = [part["steer_readout"] for piece in pieces for part in piece["choices"] if "steer_readout" in part]
    [other] = found  # a GPU rounds otherwise in another batch
    assert other["tokens"] == read["tokens"]
    assert other["layers"] == read["layers"]
    torch.testing.assert_close(numbers(other), numbers(read), rtol=1e-3, atol=1e-3)
    prompt = choice.get("prompt_token_ids") or whole.json()["prompt_token_ids"]
    answer = choice["token_ids"]
    assert read["tokens"] == [models.tokenizer().decode([token]) for token in answer]
    strength = 0.0 if steer == "off" else 0.5
    directions = {n: Direction.load(home.directions / f"{n}.safetensors") for n in ("refusal", "verbosity")}
    seen: list[tuple[Any, Any]] = []

    def act(layer: int) -> Any:
        def hook(_module: Any, _args: Any, output: Any) -> Any:
            after = oracle.ablated(output, directions["refusal"].directions[layer, 0], strength)
            seen.append((output[0], after[0]))
            return after

        return hook

    model = copy.deepcopy(home.model)
    embedding = directions["refusal"].embedding
    assert embedding is not None
    v = embedding[0]
    model.model.embed_tokens.register_forward_hook(lambda _m, _a, out: oracle.ablated(out, v, strength))
    for layer, block in enumerate(model.model.layers):
        block.register_forward_hook(act(layer))
    with torch.no_grad():
        model(input_ids=torch.tensor([prompt + answer]), use_cache=False)
    positions = slice(len(prompt) - 1, -1)
    for at, layer in enumerate([0, 2]):
        for line in read["directions"]:
            row = directions[line["name"]].directions[layer, 0]
            for side, stream in zip(("before", "after"), seen[layer], strict=True):
                told = np.array(line[side])[:, at]
                np.testing.assert_allclose(told, (stream[positions] @ row).numpy(), rtol=1e-3, atol=2e-3)
        norms = seen[layer][0][positions].norm(dim=-1).numpy()
        np.testing.assert_allclose(np.array(read["norms"])[:, at], norms, rtol=1e-3)


def choices(answer: Any) -> list[dict[str, Any]]:
    """Those of a whole answer, or of the chunks of a stream."""
    assert answer.status_code == 200, answer.text
    if "event-stream" not in answer.headers["content-type"]:
        return list(answer.json()["choices"])
    assert answer.text.splitlines()[-2:] == ["data: [DONE]", ""]
    pieces = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
    return [choice for piece in pieces for choice in piece["choices"]]


def said_of(answer: Any) -> list[bool | None]:
    """What the end of each choice says, in their order, and nothing before it does."""
    found = choices(answer)
    assert not any("steer_applied" in choice for choice in found if not choice["finish_reason"])
    ends = sorted((choice for choice in found if choice["finish_reason"]), key=lambda choice: choice["index"])
    return [choice.get("steer_applied") for choice in ends]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("route", READ_ROUTES)
def test_the_end_of_a_choice_says_whether_it_is_steered(server: Server, home: Home, route: str, stream: bool) -> None:
    """Where a condition decides, or a phase that may not come; and nothing where neither does."""
    asked: dict[str, Any] = {"stream": stream, "temperature": 1, "ignore_eos": True}
    for number, holds in ((-1e6, True), (1e6, False)):
        spec = f"refusal?verbosity@0>{number}"
        assert said_of(ask(server, route, steer=spec, n=2, **asked)) == [holds, holds]
        read = ask(server, route, steer=spec, steer_readout="refusal", **asked)
        assert said_of(read) == [holds]
        assert sum("steer_readout" in choice for choice in choices(read)) == 1
    begin, end = AutoTokenizer.from_pretrained(home.folder).convert_tokens_to_ids([*THINKING])
    for tokens, sign in zip(PHASES, (begin, end), strict=True):
        for bias, comes in (({begin: -100, end: -100}, False), ({sign: 100}, True)):
            biased = {str(token): value for token, value in bias.items()}
            answer = ask(server, route, steer=f"refusal@{tokens}", n=2, logit_bias=biased, **asked)
            assert said_of(answer) == [comes, comes]
    for spec in ("off", "refusal", "refusal@answer"):
        assert said_of(ask(server, route, steer=spec, n=2, **asked)) == [None, None]


@pytest.mark.parametrize("stream", [False, True])
def test_each_prompt_of_a_completion_has_its_own_end(server: Server, stream: bool) -> None:
    prompts, route = ["hello", "this is another one"], "/v1/completions"
    reads = [ask(server, route, prompt=p, steer_readout={"directions": "verbosity", "layers": [0]}) for p in prompts]
    one, other = (choices(read)[0]["steer_readout"]["directions"][0]["before"][0][0] for read in reads)
    spec = f"refusal?verbosity@0>{(one + other) / 2}"
    asked: dict[str, Any] = {"prompt": prompts, "steer": spec, "stream": stream}
    assert said_of(ask(server, route, **asked)) == [one > other, one < other]
    both = [one > other] * 3 + [one < other] * 3
    assert said_of(ask(server, route, n=3, temperature=1, **asked)) == both


def test_the_angle_is_what_transformers_has(server: Server, home: Home) -> None:
    """Of a plain stream, and of one that is turned by half of its angle at each layer and only there."""
    for spec, left in (("off", 1.0), ("refusal:rotate=0.5", 0.5)):
        angles = {"directions": "refusal", "angle": True}
        answer = ask(server, "/v1/completions", steer=spec, steer_readout=angles, return_token_ids=True)
        assert answer.status_code == 200, answer.text
        [choice] = answer.json()["choices"]
        [line] = choice["steer_readout"]["directions"]
        before, after = (np.array(line[f"angle_{side}"]) for side in ("before", "after"))
        np.testing.assert_allclose(after, left * before, atol=1e-2)
        prompt = choice.get("prompt_token_ids") or answer.json()["prompt_token_ids"]
        model = copy.deepcopy(home.model)
        with steer.attach(model, {"refusal": home.directions / "refusal.safetensors"}, rank=2) as steering:
            with torch.no_grad(), steering(spec), steering.read("refusal", angle=True) as reading:
                model(input_ids=torch.tensor([prompt + choice["token_ids"]]), use_cache=False)
        np.testing.assert_allclose(before, reading.angles[0, 0, len(prompt) - 1 : -1, :, 0], atol=1e-2)
    refused = ask(server, "/v1/completions", steer_readout={"directions": "verbosity", "angle": True})
    assert (refused.status_code, "'verbosity' holds no plane" in refused.text) == (400, True)


def test_log_probabilities_are_a_requests_own(server: Server) -> None:
    """Whatever tokens one beside it names. vLLM's V1 runner would give them to both."""
    asked: dict[str, Any] = {"max_tokens": 48, "ignore_eos": True}

    def told(**more: Any) -> Any:
        return ask(server, "/v1/completions", **asked, **more)

    def own() -> Any:
        return told(logprobs=3).json()["choices"][0]["logprobs"]["top_logprobs"]

    alone = own()
    with ThreadPoolExecutor(4) as threads:
        others = [threads.submit(told, logprob_token_ids=[5, 6], logprobs=2) for _ in range(6)]
        beside = [threads.submit(own) for _ in range(4)]
    assert [[set(each) for each in one.result()] for one in beside] == [[set(each) for each in alone]] * 4
    for other in others:
        answer = other.result()
        assert answer.status_code == 200 or "would give all requests of the batch" in answer.text


@pytest.mark.parametrize("route", ["/v1/completions", "/v1/chat/completions", "/invocations"])
def test_log_probabilities_that_are_made_at_once_are_bounded(server: Server, route: str) -> None:
    """vLLM makes them on its event loop, which answers nothing else meanwhile. They are counted as they come, so it
    does not matter by which fields, or by what text, an answer gets long."""
    asked: dict[str, Any] = {"logprobs": True, "top_logprobs": 20} if "chat" in route else {"logprobs": 20}
    tokens = MAX_LOGPROBS // 32 // 21 + 1  # a stream that is read comes to them only if nothing of it was
    asked |= {"n": 32, "min_tokens": tokens, "max_tokens": str(tokens), "model": "tiny"}
    body = ROUTES.get(route, {"prompt": "x"}) | asked
    told = server.client.post(route, json=body)
    assert (told.status_code, told.json()["error"]["param"]) == (400, "logprobs"), told.text
    assert f"at most {MAX_LOGPROBS} log-probabilities" in told.json()["error"]["message"]
    eventually(lambda: is_idle(server))
    for more, ended in (({}, False), ({"stream_interval": tokens}, True), ({"stream_interval": 17}, False)):
        with server.client.stream("POST", route, json=body | {"stream": True} | more) as streamed:
            text = streamed.read().decode()
            assert text.endswith("data: [DONE]\n\n") or (ended and streamed.status_code == 400)  # it never began
            assert (f"at most {MAX_LOGPROBS} log-probabilities" in text) == ended
    for fits in (body | {"n": 30}, {name: body[name] for name in body if "logprobs" not in name}):
        assert server.client.post(route, json=fits).status_code == 200


@pytest.mark.parametrize("route", ["/tokenize", "/v1/completions"])
def test_what_is_no_json_is_told_as_such(server: Server, route: str) -> None:
    answer = server.client.post(route, content=b'{"prompt": "x",}', headers={"Content-Type": "application/json"})
    told = answer.json()["error"]
    assert (answer.status_code, told["code"], told["param"]) == (400, "invalid_json", None), told
    assert told["message"].startswith("the body is not JSON: ")


@pytest.mark.parametrize("prompts", [1, 128])
def test_streams_that_are_read_are_never_too_much(server: Server, prompts: int) -> None:
    """The loop makes their chunks more slowly than this engine makes steps, and is not left behind."""
    more: dict[str, Any] = {"n": 128 // prompts, "max_tokens": 150, "ignore_eos": True, "logprobs": 20, "stream": True}
    body = {"model": "tiny", "prompt": ["hello"] * prompts} | more
    with server.client.stream("POST", "/v1/completions", json=body) as streamed:
        assert streamed.read().endswith(b"data: [DONE]\n\n")
    assert "error" not in streamed.text


@pytest.mark.parametrize("more", [{}, {"stream": True}, {"steer": "refusal"}])
def test_nor_may_those_of_prompts_be_more(server: Server, more: dict[str, Any]) -> None:
    body: dict[str, Any] = {"prompt": [[5] * 200] * 32, "max_tokens": 1, "echo": True, "logprobs": 20}
    told = ask(server, "/v1/completions", **body, **more)
    assert told.status_code == (200 if "stream" in more else 400)  # a stream has begun by then
    assert f"at most {MAX_LOGPROBS} log-probabilities" in told.text
    eventually(lambda: is_idle(server))
    fits = ask(server, "/v1/completions", **body | {"prompt": [[5] * 200] * 30}, **more)
    assert fits.status_code == 200
    assert "error" not in fits.text


def test_beams_count_where_the_answer_has_their_log_probabilities(server: Server) -> None:
    beams: dict[str, Any] = {"n": 10, "use_beam_search": True, "prompt": ["hello"] * 7, "max_tokens": 100}
    assert ask(server, "/v1/completions", **beams).status_code == 200
    for logprobs in (0, False, 1):
        told = ask(server, "/v1/completions", **beams, logprobs=logprobs)
        assert (told.status_code, told.json()["error"]["param"]) == (400, "logprobs"), told.text
        eventually(lambda: is_idle(server))


def test_reading_changes_no_answer_and_its_bounds_are_told(server: Server) -> None:
    asked = ask(server, "/v1/completions", steer="refusal", steer_readout=True)
    assert words(asked) == words(ask(server, "/v1/completions", steer="refusal"))
    assert "steer_readout" not in ask(server, "/v1/completions", steer="refusal").text
    for more, message in (
        ({"steer_readout": True}, "but none does; name them"),
        ({"steer_readout": "nobody"}, "not served"),
        ({"steer_readout": "refusal", "n": 2}, "one prompt, and n = 1"),
        ({"steer_readout": {"directions": "refusal", "layers": [7]}}, "this model has the layers 0 to 2"),
        ({"vllm_xargs": {"steer.read": "{}"}}, "steering cannot be requested like this"),
    ):
        refused = ask(server, "/v1/completions", **more)
        assert refused.status_code == 400, refused.text
        assert message in refused.json()["error"]["message"]
    for route in ("/v1/messages", "/v1/responses"):
        refused = ask(server, route, steer_readout="refusal")
        assert refused.status_code == 400
        assert "this route gives no read-out: ask /v1/chat/completions or /v1/completions" in refused.text


def test_positions_of_one_step_are_not_read_in_the_next(server: Server) -> None:
    """Two long prompts are read at once and one ends first: the step after has fewer tokens than were read at."""
    with ThreadPoolExecutor() as pool:
        asked = [
            pool.submit(
                ask, server, "/v1/completions", prompt="x" * 200, max_tokens=n, ignore_eos=True, steer_readout="refusal"
            )
            for n in (1, 16)
        ]
        read = [request.result().json()["choices"][0]["steer_readout"] for request in asked]
    assert [len(one["tokens"]) for one in read] == [1, 16]
    assert read[0]["norms"][0] == pytest.approx(read[1]["norms"][0], rel=1e-3)
    assert ask(server, "/v1/completions").status_code == 200


def test_no_more_are_read_at_once_than_the_server_was_started_for(server: Server) -> None:
    with ThreadPoolExecutor(8) as pool:
        asked = [
            pool.submit(ask, server, "/v1/completions", max_tokens=48, ignore_eos=True, steer_readout="refusal")
            for _ in range(8)
        ]
        codes = {request.result().status_code for request in asked}
    assert codes == {200, 429}
    assert ask(server, "/v1/completions", steer_readout="refusal").status_code == 200


def test_the_playground_is_served_without_a_key(server: Server) -> None:
    page = server.client.get("/", headers={"Authorization": ""})
    assert page.status_code == 200
    assert "<title>" in page.text


def test_no_value_of_any_field_gets_past_its_row(server: Server, home: Home) -> None:
    """Of vLLM's request types too: each is served or refused by its name, and the engine is what it was."""
    outcome = Outcome()
    life = Life(server, [(home.directions / "refusal.safetensors").read_bytes()], outcome)
    by_field(life, 2500)
    life.look()
    assert not outcome.findings, "\n".join(f"{kind}: {what}" for kind, what in outcome.findings.items())
    assert set(outcome.counts) >= {"200", "400"}
