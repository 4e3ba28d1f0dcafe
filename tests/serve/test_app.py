"""The HTTP side on a real server: carriers, receipts, the OpenAI shapes, and what bad input gets."""

from __future__ import annotations

import json
import shutil
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import AutoTokenizer

from steer.direction import Direction
from steer.errors import InvalidInput, UnsupportedModel
from steer.hf.load import Loaded, template_parameters
from steer.serve.app import prepare, serve, warn_of_template
from steer.settings import ServeSettings
from steer.spec import PHASES
from steer.tokenization import thinking_of
from tests import models
from tests.servers import Server, receipt, text
from tests.waiting import eventually

ROUTES = ("completions", "chat")


def ask(server: Server, route: str, **kwargs: Any) -> httpx.Response:
    return server.complete(**kwargs) if route == "completions" else server.chat(**kwargs)


def carriers(model: str, spec: str) -> dict[str, dict[str, Any]]:
    return {
        "body text": {"steer": spec},
        "header": {"headers": {"X-Steer": spec}},
        "model name": {"model": f"{model}+{spec}"},
        "xargs": {"vllm_xargs": {"steer": spec}},
    }


def error(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    return dict(body["error"])


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("stream", [False, True])
def test_all_carriers_are_equal_and_every_answer_has_its_receipt(tiny_server: Server, route: str, stream: bool) -> None:
    plain = ask(tiny_server, route, stream=stream)
    assert receipt(plain) == []
    answers = set()
    for name, how in carriers(tiny_server.model_name, "refusal=0.7").items():
        response = ask(tiny_server, route, stream=stream, **how)
        assert response.status_code == 200, (name, response.text)
        (applied,) = receipt(response)
        assert applied["direction"] == "refusal"
        assert applied["mode"] == "ablate"
        assert applied["strength"] == 0.7
        assert len(applied["digest"]) == 64
        answers.add(streamed(response) if stream else text(response))
    assert len(answers) == 1
    assert answers != {streamed(plain) if stream else text(plain)}


def streamed(response: httpx.Response) -> str:
    events = [line.removeprefix("data: ") for line in response.text.splitlines() if line]
    assert events[-1] == "[DONE]"
    out = ""
    for event in events[:-1]:
        for choice in json.loads(event)["choices"]:
            out += choice.get("text", "") or choice.get("delta", {}).get("content", "")
    return out


@pytest.mark.parametrize("route", ROUTES)
def test_a_stream_says_what_the_whole_answer_says(tiny_server: Server, route: str) -> None:
    for options in ({}, {"steer": "refusal"}, {"steer": [{"direction": "verbosity", "mode": "add", "strength": -0.5}]}):
        assert streamed(ask(tiny_server, route, stream=True, **options)) == text(ask(tiny_server, route, **options))


@pytest.mark.parametrize("route", ROUTES)
def test_a_request_under_a_condition_is_plain_or_steered_and_its_end_says_which(
    tiny_server: Server, route: str
) -> None:
    logprobs = True if route == "chat" else 1
    plain, steered = (ask(tiny_server, route, logprobs=logprobs, steer=s) for s in ("off", "refusal@1-2@answer=3"))
    assert text(plain) != text(steered)
    for number, holds in ((-1e6, True), (1e6, False)):
        for spec in (
            f"refusal?verbosity@0>{number}=3",
            {"direction": "refusal", "if": f"verbosity@0>{number}", "strength": 3},
        ):
            whole, stream = (ask(tiny_server, route, n=2, steer=spec, **more) for more in ({}, {"stream": True}))
            (applied,) = receipt(whole)
            assert receipt(stream) == [applied]
            probe = applied["if"]
            assert (probe["direction"], probe["layer"], probe["above"]) == ("verbosity", 0, number)
            assert len(probe["digest"]) == 64
            assert (applied["layers"], applied["tokens"]) == ("1-2", "answer")
            assert text(whole) == text(steered if holds else plain)
            assert [choice["steer_applied"] for choice in whole.json()["choices"]] == [holds, holds]
            chunks = [line.removeprefix("data: ") for line in stream.text.splitlines() if line]
            ends = [choice for chunk in chunks[:-1] for choice in json.loads(chunk)["choices"]]
            assert [end["steer_applied"] for end in ends if end["finish_reason"]] == [holds, holds]
            assert all("steer_applied" not in choice for choice in ends if not choice["finish_reason"])
    assert "steer_applied" not in steered.json()["choices"][0]


@pytest.mark.parametrize("off", [None, False, "off", [], "none"])
def test_off_is_plain(tiny_server: Server, off: Any) -> None:
    response = tiny_server.complete(steer=off)
    assert receipt(response) == []
    assert text(response) == text(tiny_server.complete())


def test_composition_modes_and_objects(tiny_server: Server) -> None:
    written = tiny_server.complete(steer="refusal:one_sided=1,verbosity:add=-0.5")
    objects = tiny_server.complete(
        steer=[
            {"direction": "refusal", "mode": "one_sided", "strength": 1},
            {"direction": "verbosity", "mode": "add", "strength": -0.5},
        ]
    )
    assert receipt(written) == receipt(objects)
    assert [(e["direction"], e["mode"], e["strength"]) for e in receipt(written)] == [
        ("refusal", "one_sided", 1.0),
        ("verbosity", "add", -0.5),
    ]
    assert text(written) == text(objects)


def test_carriers_that_say_the_same_agree_and_others_conflict(tiny_server: Server) -> None:
    model = f"{tiny_server.model_name}+refusal"
    same = tiny_server.complete(model=model, steer="refusal=1", headers={"X-Steer": "refusal:ablate"})
    assert len(receipt(same)) == 1
    told = error(tiny_server.complete(model=model, steer="refusal=0.5"), 400)
    assert "body field 'steer'" in told["message"]
    assert "model name" in told["message"]
    error(tiny_server.complete(steer="off", headers={"X-Steer": "refusal"}), 400)
    two = [("X-Steer", "refusal"), ("X-Steer", "off")]
    body = {"model": tiny_server.model_name, "prompt": "x"}
    error(tiny_server.client.post("/v1/completions", json=body, headers=two), 400)


@pytest.mark.parametrize(
    ("steer", "says"),
    [
        ("nobody", "direction 'nobody' is not served; served: refusal, verbosity"),
        (
            {"direction": "refusal", "strenght": 1},
            "strenght: unknown field (did you mean strength?); accepted: direction",
        ),
        ({"direction": "refusal", "strength": "much"}, "a number from -10 to 10"),
        ({"direction": "refusal", "strength": 11}, "11 is not accepted"),
        ({"direction": "refusal", "strength": True}, "true is not accepted"),
        ("refusal=nan", "nan is not accepted"),
        ({"direction": "refusal", "mode": "delete"}, "accepted: ablate, add, affine, clamp, one_sided"),
        ("refusal:one_sided^much", "steer.shift: 'much' is not accepted: a number from -2 to 2"),
        ("refusal@layer7", "steer.layers: 'layer7' is not accepted: the first and the last layer like '10-20'"),
        ("refusal@-1", "steer.layers: '-1' is not accepted: the first and the last layer like '10-20'"),
        ("refusal?refusal@1>=0.3", "steer.if: '>=' is not accepted: '>' or '<'"),
        ("refusal.safetensors", "without the suffix of its file: 'refusal'"),
        ("refusal:ablate^0.5", "the mode 'ablate' has no threshold to shift"),
        ({"strength": 1}, "steer.direction: missing"),
        (7, "7 is not understood"),
        (True, "true is not understood"),
        ("../../etc/passwd", "is not acceptable"),
        (["refusal", 3], "steer[1]"),
        ("refusal,refusal", "named twice"),
        ("refusal,verbosity,refusal:add,verbosity:add,refusal:affine", "needs 5 direction rows"),
        (
            "refusal?verbosity@0>1,verbosity:add?verbosity@0>1,refusal:add?verbosity@0>1,verbosity?verbosity@0>1",
            "needs 5 direction rows for each token (one of them for its condition)",
        ),
        ("refusal?nobody@0>1", "direction 'nobody' is not served; served: refusal, verbosity"),
        (
            "refusal?verbosity@2>1",
            "verbosity@2>1.0: the model has the layers 0 to 2, of which one must come after it: 0",
        ),
        ("refusal@1-2?verbosity@1<1", "'refusal' is to act at the layers 1-2: layers from 2 on are accepted"),
        ("refusal@not-first?verbosity@1>1", "'not-first' is not accepted under a condition"),
        ("refusal?verbosity@0>1,verbosity", "different conditions (if verbosity@0>1.0, always); accepted: one for all"),
        ("refusal@1-2?each:verbosity@1<1", "'refusal' is to act at the layers 1-2: layers from 2 on are accepted"),
        ("refusal@thinking?each:verbosity@1>1", "'thinking' is not accepted under a condition"),
        (
            "refusal?each:verbosity@0>1,verbosity?verbosity@0>1",
            "different conditions (if each:verbosity@0>1.0, if verbosity@0>1.0); accepted: one for all",
        ),
        ("refusal?verbosity@1", "'verbosity@1' is not a condition; accepted: a direction, a layer and a number"),
    ],
)
def test_a_bad_spec_gets_a_400_that_names_it(tiny_server: Server, steer: Any, says: str) -> None:
    told = error(tiny_server.complete(steer=steer), 400)
    assert says in told["message"]
    assert told["type"] == "invalid_request_error"
    assert told["param"] is not None


def test_all_problems_of_a_spec_come_together(tiny_server: Server) -> None:
    told = error(
        tiny_server.complete(steer=[{"direction": "refusal", "mode": "x"}, {"direction": "refusal", "y": 1}]), 400
    )
    assert "steer[0].mode" in told["message"]
    assert "steer[1].y" in told["message"]


def test_nan_in_json_is_refused(tiny_server: Server) -> None:
    raw = json.dumps({"model": tiny_server.model_name, "prompt": "x", "steer": {"direction": "refusal", "strength": 1}})
    kind = {"content-type": "application/json"}
    error(tiny_server.client.post("/v1/completions", content=raw.replace(": 1}", ": NaN}"), headers=kind), 400)


def test_what_else_is_wrong(tiny_server: Server) -> None:
    assert error(tiny_server.complete(model="gpt-4"), 404)["code"] == "model_not_found"
    assert error(tiny_server.complete(model="gpt-4+refusal"), 404)["code"] == "model_not_found"
    assert error(tiny_server.client.get("/v1/models/gpt-4"), 404)["code"] == "model_not_found"
    told = error(tiny_server.client.post("/chat/completions", json={}), 404)
    assert (told["code"], "the base URL of a client ends in /v1" in told["message"]) == ("not_found", True)
    told = error(tiny_server.client.post("/v1/embeddings", json={}), 404)
    assert told["message"] == "there is no route '/v1/embeddings' here"
    for path, allowed in (("/v1/completions", "POST"), ("/v1/directions/x", "DELETE, GET, HEAD, PUT")):
        answer = tiny_server.client.patch(path)
        told = error(answer, 405)
        message = f"the method PATCH is not accepted at {path}; accepted: {allowed}"
        assert (told["code"], told["message"], answer.headers["allow"]) == ("method_not_allowed", message, allowed)
    long = error(tiny_server.complete("x" * 600), 400)
    assert long["code"] == "context_length_exceeded"
    assert "601 tokens" in long["message"]
    assert long["param"] == "prompt"
    for name in ("max_tokens", "max_completion_tokens"):
        told = error(tiny_server.chat(**{"max_tokens": None, name: 10_000}), 400)
        assert (told["code"], told["param"]) == ("context_length_exceeded", name)
    both = error(tiny_server.complete(temperature=-1, max_tokens="many"), 400)["message"]
    assert "temperature" in both
    assert "max_tokens" in both
    assert "tools: not served" in error(tiny_server.chat(tools=[{"type": "function"}]), 400)["message"]
    error(tiny_server.complete(n=0), 400)
    error(tiny_server.complete([]), 400)
    error(tiny_server.complete([10**6]), 400)
    error(tiny_server.chat(messages=[]), 400)
    error(tiny_server.chat(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]), 400)
    error(tiny_server.chat(top_logprobs=3), 400)
    post, kind = tiny_server.client.post, {"content-type": "application/json"}
    error(post("/v1/completions", content=b"{", headers=kind), 400)
    error(post("/v1/completions", content=b"[1]", headers=kind), 400)
    error(post("/v1/completions", content=b'{"model":"m","steer":"refusal","steer":"off"}', headers=kind), 400)
    error(post("/v1/completions", content=b"[" * 100_000, headers=kind), 400)
    error(post("/v1/completions", content=b'{"prompt":"' + b"x" * 9 * 2**20 + b'"}', headers=kind), 413)
    assert text(tiny_server.complete()), "and the server lives"


NUMBERS = (
    "top_k",
    "seed",
    "max_tokens",
    "n",
    "temperature",
    "top_p",
    "min_p",
    "logprobs",
    "top_logprobs",
    "max_completion_tokens",
    "presence_penalty",
    "frequency_penalty",
)
#: As JSON: also what its parsers read in ways of their own.
VALUES = (
    "1" + "0" * 400,
    "-1" + "0" * 400,
    "1" + "0" * 5000,
    "9223372036854775808",
    "1e999",
    "-1e308",
    "1e-320",
    "0.5",
    "NaN",
    "true",
    "-0.0",
)


@pytest.mark.parametrize("field", NUMBERS)
def test_no_value_of_a_number_ends_the_engine(tiny_server: Server, field: str) -> None:
    plain, steered = text(tiny_server.complete()), text(tiny_server.complete(steer="refusal"))
    for route, rest in (("completions", '"prompt": "hi"'), ("chat/completions", '"messages": [{"role": "user"}]')):
        for value in VALUES:
            body = {"model": tiny_server.model_name, "temperature": 1, "max_tokens": 2, "logprobs": None}
            fields = [f"{json.dumps(k)}: {json.dumps(v)}" for k, v in body.items() if k != field]
            whole = "{" + ", ".join([*fields, rest, f'"{field}": {value}']) + "}"
            response = tiny_server.client.post(
                f"/v1/{route}", content=whole, headers={"content-type": "application/json"}
            )
            assert response.status_code in (200, 400), (field, value[:40], response.text[:300])
            assert len(response.text) < 20_000
    assert tiny_server.client.get("/health").json()["status"] == "ok"
    assert [text(tiny_server.complete()), text(tiny_server.complete(steer="refusal"))] == [plain, steered]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("route", ROUTES)
def test_a_stream_that_overflows_is_an_error_of_its_own(
    tiny_server: Server, tiny_folder: Any, route: str, stream: bool
) -> None:
    wild = models.direction(models.tiny("llama"), seed=8, shared=True)
    data = replace(wild, weights=torch.full_like(wild.weights, 1e12)).to_bytes()
    assert tiny_server.client.put("/v1/directions/wild", content=data).status_code in (200, 201)
    plain = text(ask(tiny_server, route))
    with ThreadPoolExecutor(3) as pool:
        bad = pool.submit(ask, tiny_server, route, steer="wild=-10", stream=stream)
        others = [pool.submit(ask, tiny_server, route) for _ in range(2)]
    answer = bad.result()
    told = answer.json() if not stream else json.loads(answer.text.split("data: ")[-2])
    assert (told["error"]["code"], told["error"]["param"]) == ("not_finite", "steer")
    assert answer.status_code == (200 if stream else 400)
    assert [text(other.result()) for other in others] == [plain] * 2
    assert tiny_server.client.get("/health").json()["status"] == "ok"
    assert tiny_server.client.delete("/v1/directions/wild").status_code == 200


def test_a_file_that_must_overflow_is_refused_with_the_rule(tiny_server: Server) -> None:
    wild = models.direction(models.tiny("llama"), seed=8)
    data = replace(wild, weights=torch.full_like(wild.weights, 1e15)).to_bytes()
    answer = tiny_server.client.put("/v1/directions/wild", content=data)
    assert answer.status_code == 400
    assert "more than float32 can hold" in answer.json()["error"]["message"]
    assert all(problem in answer.json()["error"]["message"] for problem in answer.json()["error"]["problems"])


@pytest.mark.parametrize(
    ("route", "body", "param", "says"),
    [
        ("chat", {"tools": [{"type": "function"}]}, "tools", "tools: not served by the transformers backend"),
        ("chat", {"repeat_penalty": 2}, "repeat_penalty", "accepted: null, 1"),
        ("chat", {"tool_choice": "required"}, "tool_choice", "accepted: null, 'none', 'auto'"),
        ("chat", {"whatever": 2}, "whatever", "whatever: unknown field"),
        ("chat", {"prompt": "x"}, "prompt", "prompt: not of this route: /v1/completions takes it"),
        (
            "chat",
            {"stream_options": {"continuous_usage_stats": True}},
            "stream_options.continuous_usage_stats",
            "accepted",
        ),
        ("chat", {"n": 65}, "n", "n: 65 is not accepted: a number from 1 to 64"),
        ("chat", {"n": "many"}, "n", "n: 'many' is not accepted: a whole number"),
        ("chat", {"temperature": -1}, "temperature", "temperature: -1 is not accepted: a number from 0 to 2"),
        ("chat", {"temperature": "0,5"}, "temperature", "temperature: '0,5' is not accepted: a number (with a decimal"),
        ("chat", {"top_p": 0}, "top_p", "top_p: 0 is not accepted: a number above 0 to 1"),
        ("chat", {"stream": "x"}, "stream", "stream: 'x' is not accepted: true or false"),
        ("chat", {"messages": "x"}, "messages", "messages: 'x' is not accepted: a list, like [{'role': 'user'"),
        ("chat", {"messages": ["x"]}, "messages.0", "messages.0: 'x' is not accepted: an object"),
        ("chat", {"messages": [{"content": "x"}]}, "messages.0.role", "messages.0.role: missing; it is required"),
        ("chat", {"messages": [{"role": "user", "content": 1}]}, "messages.0.content", "messages.0.content: 1 is not"),
        (
            "chat",
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url"}]}]},
            "messages.0.content.1",
            "'image_url' is not served; accepted: {'type': 'text'",
        ),
        (
            "chat",
            {"messages": [{"role": "user", "content": [{"type": "text", "txt": "a"}]}]},
            "messages.0.content.0",
            "{'txt': 'a', 'type': 'text'} is not served; accepted: {'type': 'text', 'text': …}",
        ),
        ("chat", {"stop": ["a"] * 65}, "stop", "at most 64 texts, of 8192 characters"),
        ("chat", {"stop": "a" * 8193}, "stop", "at most 64 texts, of 8192 characters"),
        ("chat", {"stop": [1]}, "stop", "a text, or a list of texts"),
        ("completions", {"prompt": [1.5] * 1000}, "prompt", "a text, token ids, or a list of either"),
        ("completions", {"prompt": [1, "a"]}, "prompt", "a text, token ids, or a list of either"),
        ("completions", {"prompt": [[1], []]}, "prompt", "none of them empty"),
        ("completions", {"prompt": ["a", ["a"]]}, "prompt", "a text, token ids, or a list of either"),
        ("completions", {"prompt": None}, "prompt", "prompt: null is not accepted"),
        ("completions", {"steer": ["x"] * 600_000}, None, "values"),
        ("completions", {"steer": ["x"] * 6000}, "steer", "6000 directions, at most 16 are accepted"),
        ("completions", {"steer": "x," * 6000}, "steer", "at most 8192"),
        ("completions", {"vllm_xargs": {"other": 1}}, "vllm_xargs", "accepted: null, {'steer': 'refusal'}"),
        ("completions", {"vllm_xargs": "steer=refusal"}, "vllm_xargs", "'vllm_xargs'"),
    ],
)
def test_a_problem_names_its_field_and_what_is_accepted(
    tiny_server: Server, route: str, body: dict[str, Any], param: str | None, says: str
) -> None:
    told = error(ask(tiny_server, route, **body), 400)
    assert told["param"] == param
    assert says in told["message"]
    assert len(told["message"]) < 1000
    for word in ("Input should", "Value error", "body:", "valid", "list["):
        assert word not in told["message"]


def test_a_client_brings_no_template_but_variables_of_the_models_own(tiny_server: Server) -> None:
    assert {"chat_template", "conversation", "tokenize", "messages", "self"} <= template_parameters()
    for name in template_parameters():
        told = error(tiny_server.chat(chat_template_kwargs={name: "{{ 'x' * 9 ** 9 }}", "mine": 1}), 400)
        assert told["param"] == f"chat_template_kwargs.{name}"
    error(tiny_server.chat(chat_template="{{ 'x' }}"), 400)
    assert text(tiny_server.chat(chat_template_kwargs={"enable_thinking": False}))


def test_a_request_is_counted_before_work_is_done_for_it(tiny_server: Server) -> None:
    too_long = ["x" * 600] * 500  # which is found out by tokenizing
    assert "1000 answers, and at most 512" in error(tiny_server.complete(too_long, n=2), 400)["message"]
    assert error(tiny_server.complete(too_long[:1], n=64), 400)["code"] == "context_length_exceeded"
    longer = error(tiny_server.complete("x" * 8_000_000), 400)
    assert "no text of more than 2560" in longer["message"]
    assert error(tiny_server.chat("x" * 8_000_000), 400)["code"] == "context_length_exceeded"
    given = error(tiny_server.chat(chat_template_kwargs={"bos_token": "hello world " * 500_000}), 400)
    assert (given["code"], "no text of more than" in given["message"]) == ("context_length_exceeded", True)


def test_json_says_that_it_is_json(tiny_server: Server) -> None:
    raw = json.dumps({"model": tiny_server.model_name, "prompt": "x", "max_tokens": 1}).encode()
    for kind, says in ({}, "application/json' (got none)"), ({"content-type": "text/plain"}, "(got 'text/plain')"):
        told = error(tiny_server.client.post("/v1/completions", content=raw, headers=kind), 415)
        assert says in told["message"]
    for said in ("application/json", "Application/JSON; charset=utf-8"):
        headers = {"content-type": said}
        assert tiny_server.client.post("/v1/completions", content=raw, headers=headers).status_code == 200
    assert error(tiny_server.client.post("/v1/steering", json={"enabled": True, "reason": "x" * 20_000}), 413)
    told = error(tiny_server.client.post("/v1/steering", json={"enabled": True, "reson": "x"}), 400)["message"]
    assert told == "reson: unknown field (did you mean reason?); accepted: enabled, reason"


def test_what_a_message_carries_reaches_the_template_or_is_refused(tiny_server: Server) -> None:
    def asked(**more: Any) -> httpx.Response:
        return tiny_server.chat(messages=[{"role": "user", "content": "x"}, {"role": "user", "content": "y", **more}])

    plain = text(asked())
    for name in ("name", "reasoning_content", "anything"):
        assert error(asked(**{name: "Ann"}), 400)["param"] == f"messages.1.{name}"
        assert text(asked(**{name: None})) == plain
    assert error(asked(tool_calls=[{"id": "1"}]), 400)["param"] == "messages.1.tool_calls"
    assert text(asked(tool_calls=[], annotations=[], refusal=None)) == plain


def test_the_developer_is_the_system_where_the_template_knows_no_other(tiny_server: Server) -> None:
    said = [{"role": "user", "content": "x"}]
    told = text(tiny_server.chat(messages=[{"role": "system", "content": "y"}, *said]))
    assert text(tiny_server.chat(messages=[{"role": "developer", "content": "y"}, *said])) == told
    assert text(tiny_server.chat(messages=[{"role": "user", "content": "y"}, *said])) != told


def test_a_begun_answer_is_gone_on_with(tiny_server: Server) -> None:
    begun = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "well,"}]
    response = tiny_server.chat(messages=begun, continue_final_message=True, add_generation_prompt=False)
    assert text(response) == text(tiny_server.chat(messages=begun, continue_final_message=True))
    assert text(response) == text(tiny_server.complete(tiny_ids("[user] x\n[assistant] well,")))
    ended = tiny_server.chat(messages=begun, add_generation_prompt=False)
    assert text(ended) == text(tiny_server.complete(tiny_ids("[user] x\n[assistant] well,\n")))
    both = {"continue_final_message": True, "add_generation_prompt": True}
    assert error(tiny_server.chat(messages=begun, **both), 400)["param"] == "add_generation_prompt"


def tiny_ids(text: str) -> list[int]:
    return list(models.tokenizer()(text).input_ids)


def test_openai_shapes(tiny_server: Server) -> None:
    body = tiny_server.chat(n=2, logprobs=True, top_logprobs=2).json()
    assert body["object"] == "chat.completion"
    assert body["system_fingerprint"].startswith("steer-")
    assert [c["index"] for c in body["choices"]] == [0, 1]
    assert body["usage"]["completion_tokens"] == 16
    assert body["usage"]["total_tokens"] == body["usage"]["prompt_tokens"] + 16
    for choice in body["choices"]:
        assert choice["finish_reason"] == "length"
        for token in choice["logprobs"]["content"]:
            assert token["logprob"] == pytest.approx(token["top_logprobs"][0]["logprob"])
            assert len(token["top_logprobs"]) == 2
    body = tiny_server.complete(["ab", "cd"], n=2, logprobs=1, echo=True, seed=3, temperature=1).json()
    assert [c["index"] for c in body["choices"]] == [0, 1, 2, 3]
    assert [c["text"][:2] for c in body["choices"]] == ["ab", "ab", "cd", "cd"]
    reported = body["choices"][0]["logprobs"]
    assert reported["token_logprobs"][0] is None
    assert len(reported["tokens"]) == 3 + 8
    ids = tiny_server.complete([[1, 5, 6], [1, 7]]).json()
    assert len(ids["choices"]) == 2
    assert ids["usage"]["prompt_tokens"] == 5


def test_stream_options_usage_and_finish_reason(tiny_server: Server) -> None:
    response = tiny_server.chat(stream=True, stream_options={"include_usage": True}, n=2)
    chunks = [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: {")]
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == 16
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    finishes = [c["finish_reason"] for chunk in chunks for c in chunk["choices"] if c["finish_reason"]]
    assert finishes == ["length", "length"]
    assert len({chunk["id"] for chunk in chunks}) == 1


def test_stop_strings_end_the_answer(tiny_server: Server) -> None:
    whole = text(tiny_server.complete(max_tokens=30))
    stop = whole[len(whole) // 2 : len(whole) // 2 + 2]
    response = tiny_server.complete(max_tokens=30, stop=[stop, "never there"])
    assert text(response) == whole[: whole.index(stop)]
    assert response.json()["choices"][0]["finish_reason"] == "stop"
    assert streamed(tiny_server.complete(max_tokens=30, stop=stop, stream=True)) == whole[: whole.index(stop)]


def test_a_seed_repeats_and_another_differs(tiny_server: Server) -> None:
    def sampled(seed: int) -> str:
        return text(tiny_server.complete(temperature=1, seed=seed, max_tokens=20))

    assert sampled(1) == sampled(1)
    assert sampled(1) != sampled(2)


def test_what_ends_an_answer_and_what_may_not_come(tiny_server: Server) -> None:
    whole = tiny_ids(text(tiny_server.complete(max_tokens=20, ignore_eos=True)))[1:]
    stop = next(token for token in whole if whole.index(token) >= 3)
    at = whole.index(stop)
    ended = tiny_server.complete(max_tokens=20, ignore_eos=True, stop_token_ids=[stop])
    assert tiny_ids(text(ended))[1:] == whole[:at]
    assert ended.json()["choices"][0]["finish_reason"] == "stop"
    made = ended.json()["usage"]["completion_tokens"]  # of which some may have no text
    later = tiny_server.complete(max_tokens=20, ignore_eos=True, stop_token_ids=[stop], min_tokens=made)
    assert later.json()["usage"]["completion_tokens"] > made
    letters = text(tiny_server.complete(max_tokens=20, ignore_eos=True))
    for without in (
        {"bad_words": [letters[1]]},
        {"logit_bias": {str(tiny_ids(letters[1])[1]): -100}},
    ):
        assert letters[1] not in text(tiny_server.complete(max_tokens=20, ignore_eos=True, **without))
    always = {"logit_bias": {str(tiny_ids("q")[1]): 100}}
    assert text(tiny_server.complete(max_tokens=5, **always)) == "qqqqq"
    assert text(tiny_server.complete(max_tokens=5, **always, frequency_penalty=2, presence_penalty=-2)) == "qqqqq"
    for penalty in ({"repetition_penalty": 100}, {"presence_penalty": 2, "frequency_penalty": 2}):
        assert text(tiny_server.complete(max_tokens=20, **penalty)) != letters
    neutral = {"repetition_penalty": 1.0, "presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {}}
    neutral |= {"min_tokens": 0, "stop_token_ids": [], "bad_words": []}
    assert text(tiny_server.complete(max_tokens=20, ignore_eos=True, **neutral)) == letters


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"stop_token_ids": [10**6]}, "stop_token_ids"),
        ({"stop_token_ids": ["x"] * 1000}, "stop_token_ids.0"),
        ({"stop_token_ids": [1] * 2000}, "stop_token_ids"),
        ({"logit_bias": {"1000000": 1}}, "logit_bias"),
        ({"logit_bias": {"x": 1}}, "logit_bias.x"),
        ({"logit_bias": {"5": 101}}, "logit_bias.5"),
        ({"logit_bias": {"-1": 1}}, "logit_bias.-1"),
        ({"bad_words": ["a"] * 65}, "bad_words"),
        ({"min_tokens": 9}, "min_tokens"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"repetition_penalty": 10**400}, "repetition_penalty"),
    ],
)
def test_so_are_their_problems_named(tiny_server: Server, body: dict[str, Any], param: str) -> None:
    assert error(tiny_server.complete(**body), 400)["param"] == param


def test_no_limit_is_what_the_context_leaves(tiny_server: Server) -> None:
    for response in (
        tiny_server.chat(max_tokens=-1, ignore_eos=True),
        tiny_server.complete(max_tokens=-1, ignore_eos=True),
        tiny_server.chat(max_tokens=None, max_completion_tokens=-1, ignore_eos=True),
    ):
        assert response.json()["usage"]["total_tokens"] == 512
    error(tiny_server.chat(max_tokens=-2), 400)


def test_models_lists_an_alias_for_each_direction(tiny_server: Server) -> None:
    name = tiny_server.model_name
    cards = {card["id"]: card for card in tiny_server.client.get("/v1/models").json()["data"]}
    assert set(cards) == {name, f"{name}+refusal", f"{name}+verbosity"}
    assert cards[f"{name}+refusal"]["parent"] == name
    assert cards[f"{name}+refusal"]["root"] == "refusal"
    assert tiny_server.client.get(f"/v1/models/{name}+refusal").json() == cards[f"{name}+refusal"]


def test_health_and_metrics(tiny_server: Server) -> None:
    tiny_server.complete(steer="refusal")
    health = tiny_server.client.get("/health").json()
    assert health["status"] == "ok"
    assert health["engine"] == "continuous batching"
    metrics = tiny_server.client.get("/metrics").text
    assert 'steer_requests_total{direction="refusal",mode="ablate",outcome="ok"}' in metrics
    assert "steer_resident_versions 2.0" in metrics
    assert 'steer_direction_info{digest="' in metrics


def test_head_is_get_without_the_body(tiny_server: Server) -> None:
    for path in ("/health", "/v1/models", "/v1/directions/refusal", "/", "/nowhere"):
        head, get = tiny_server.client.head(path), tiny_server.client.get(path)
        assert (head.status_code, head.content) == (get.status_code, b"")
        assert head.headers["content-type"] == get.headers["content-type"]
    assert tiny_server.client.head("/v1/completions").status_code == 405
    assert tiny_server.client.get("/health").status_code == 200, "the connection is still in step"


def test_a_route_of_the_other_backend_says_where_it_is(tiny_server: Server) -> None:
    told = error(tiny_server.client.post("/v1/responses", json={"model": "m", "input": "x"}), 404)
    assert "--backend vllm" in told["message"]
    assert "/v1/responses" not in tiny_server.client.get("/openapi.json").json()["paths"]


def test_losing_the_client_frees_its_place_and_its_version(tiny_server: Server) -> None:
    whole = {"model": tiny_server.model_name, "prompt": "x", "max_tokens": 400, "steer": "refusal"}
    whole |= {"n": 24, "ignore_eos": True}  # long enough to be looked at

    def state() -> tuple[int, int]:
        pinned = tiny_server.client.get("/v1/directions/refusal").json()["requests"]
        return tiny_server.client.get("/health").json()["in_flight"], pinned

    for stream in (True, False):
        with httpx.Client(base_url=tiny_server.url) as client:
            if stream:
                with client.stream("POST", "/v1/completions", json={**whole, "stream": True}) as response:
                    lines = response.iter_lines()  # kept: a dropped iterator closes the connection
                    next(lines)
                    assert state() == (24, 1)
            else:
                with pytest.raises(httpx.ReadTimeout):
                    client.post("/v1/completions", json=whole, timeout=0.2)
        eventually(lambda: state() == (0, 0), told=f"stream={stream}: requests and pins are left")


def test_a_full_queue_gets_a_429_with_retry_after(tiny_folder: Any, tmp_path: Any) -> None:
    with Server(str(tiny_folder), "--directions", str(tmp_path), "--max-requests", "2") as server:
        never = error(server.complete(n=3), 400)
        assert (never["param"], "3 answers, and at most 2 can be in flight" in never["message"]) == ("n", True)
        long = {
            "model": server.model_name,
            "prompt": "x",
            "n": 2,
            "max_tokens": 480,
            "ignore_eos": True,
            "stream": True,
        }
        refused: list[httpx.Response] = []

        def full() -> bool:
            with server.client.stream("POST", "/v1/completions", json=long) as answer:
                next(answer.iter_lines())
                refused.append(server.complete())  # unless the others ended before it came
            return refused[-1].status_code == 429

        eventually(full)
        assert error(refused[-1], 429)["code"] == "queue_full"
        assert int(refused[-1].headers["retry-after"]) >= 1
        eventually(lambda: server.complete(n=2).status_code == 200)


def test_a_server_default_and_how_to_switch_it_off(tiny_server: Server, tiny_folder: Any) -> None:
    arguments = (str(tiny_folder), "--directions", str(tiny_server.directions), "--default-steer", "refusal=0.7")
    with Server(*arguments) as server:
        assert receipt(server.complete())[0]["strength"] == 0.7
        assert text(server.complete()) == text(tiny_server.complete(steer="refusal=0.7"))
        assert receipt(server.complete(steer="off")) == []
        assert receipt(server.complete(headers={"X-Steer": "verbosity"}))[0]["direction"] == "verbosity"
        assert text(server.complete(steer=None)) == text(tiny_server.complete())


def test_a_default_that_cannot_be_served_refuses_to_start(tiny_folder: Any, tmp_path: Any) -> None:
    (tmp_path / "refusal.safetensors").write_bytes(b"no direction")
    with pytest.raises(RuntimeError, match="direction 'refusal' is not served; served: none"):
        Server(str(tiny_folder), "--directions", str(tmp_path), "--default-steer", "refusal").__enter__()


def test_an_address_where_nothing_can_listen_is_told_before_the_model_is_loaded(tmp_path: Path) -> None:
    tiny_model = str(tmp_path)  # which could not be loaded
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(InvalidInput, match=rf"--port {port}: Address .*in use.*; give another \(--port 0 takes"):
            prepare(tiny_model, ServeSettings(port=port))
    with pytest.raises(InvalidInput, match=r"--host 192\.0\.2\.1: .*; accepted: an address of this machine"):
        prepare(tiny_model, ServeSettings(host="192.0.2.1", insecure=True))
    with pytest.raises(UnsupportedModel):  # the next problem: the address is one
        prepare(tiny_model, ServeSettings(host="localhost", port=port))


@pytest.mark.parametrize("where", ["stay_responsive", "Registry.names"])
def test_an_interrupt_behind_the_start_of_the_engine_leaves_no_thread(
    where: str, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One thread would keep the process alive for good."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(f"steer.serve.app.{where}", interrupt)
    before = set(threading.enumerate())
    with pytest.raises(KeyboardInterrupt):
        serve(str(tiny_folder), ServeSettings(directions=tmp_path, port=0))
    assert not [thread for thread in set(threading.enumerate()) - before if not thread.daemon]


def test_a_default_that_goes_away_is_never_silently_plain(tiny_server: Server, tiny_folder: Any, tmp_path: Any) -> None:
    (tmp_path / "refusal.safetensors").write_bytes((tiny_server.directions / "refusal.safetensors").read_bytes())  # type: ignore[operator]
    with Server(str(tiny_folder), "--directions", str(tmp_path), "--default-steer", "refusal") as server:
        assert server.client.delete("/v1/directions/refusal").status_code == 200
        assert error(server.complete(), 503)["code"] == "default_unavailable"
        assert receipt(server.complete(steer="off")) == []
        assert server.stop() == 0


def test_the_template_has_variables_of_the_server_and_says_where_they_are_not_those_of_the_direction(
    tiny_folder: Path, tmp_path: Path, tiny_server: Server
) -> None:
    shutil.copytree(tiny_folder, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
        "{% if enable_thinking is defined and not enable_thinking %}<>{% endif %}"
    )
    tokenizer.save_pretrained(tmp_path / "model")
    made = Direction.load(tiny_server.directions / "refusal.safetensors")  # type: ignore[operator]
    (tmp_path / "directions").mkdir()
    made.with_meta(template={"enable_thinking": False}).save(tmp_path / "directions" / "refusal.safetensors")
    options = ("--directions", str(tmp_path / "directions"))
    default = ("--chat-template-kwargs", '{"enable_thinking": false}')
    with Server(str(tmp_path / "model"), *options, *default) as server:
        lengths = [
            server.chat("ab", steer="refusal", **more).json()["usage"]["prompt_tokens"]
            for more in ({}, {}, {"chat_template_kwargs": {"enable_thinking": True}})
        ]
        assert lengths[0] == lengths[1] == lengths[2] + 2
        assert server.stop() == 0
        said = server.log.count("acts on chats of another form")
        assert said == 1
        assert "'enable_thinking' false, and a chat has 'enable_thinking' true" in server.log


def test_a_phase_is_steered_where_the_model_has_it_and_refused_where_it_has_none(
    tiny_folder: Path, tmp_path: Path, tiny_server: Server
) -> None:
    problem = error(tiny_server.chat(steer="refusal@after-thinking"), 400)
    assert (problem["param"], "'after-thinking'" in problem["message"]) == ("steer", True)
    assert not {*PHASES} & tiny_server.client.get("/v1/steering").json()["tokens"].keys()
    shutil.copytree(tiny_folder, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    tokenizer.add_tokens(["<think>", "</think>"])
    end = tokenizer.convert_tokens_to_ids("</think>")
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
        "{% if enable_thinking %}<think>\n{% else %}<think>\n</think>\n{% endif %}"
    )
    tokenizer.save_pretrained(tmp_path / "model")
    with Server(str(tmp_path / "model"), "--directions", str(tiny_server.directions)) as server:
        assert {*PHASES} <= {*server.client.get("/v1/steering").json()["may"]["tokens"]}

        def said(spec: str, *, thinks: bool, **more: Any) -> tuple[str, bool | None]:
            kwargs = {"enable_thinking": thinks}
            answer = server.chat("ab", steer=spec, chat_template_kwargs=kwargs, max_tokens=8, temperature=0, **more)
            assert [f"refusal@{entry['tokens']}=3" for entry in receipt(answer)] == [spec] * (spec != "off")
            return text(answer), answer.json()["choices"][0].get("steer_applied")

        never, at_once = {"logit_bias": {str(end): -100}}, {"logit_bias": {str(end): 100}}
        plain = {thinks: said("off", thinks=thinks, **never)[0] for thinks in (True, False)}
        answer = {thinks: said("refusal@answer=3", thinks=thinks, **never)[0] for thinks in (True, False)}
        assert plain[True] != answer[True]
        assert plain[False] != answer[False]
        assert said("refusal@thinking=3", thinks=True, **never) == (answer[True], True)
        assert said("refusal@thinking=3", thinks=False, **never) == (plain[False], False)
        assert said("refusal@after-thinking=3", thinks=True, **never) == (plain[True], False)
        assert said("refusal@after-thinking=3", thinks=False, **never) == (answer[False], True)
        assert said("refusal@after-thinking=3", thinks=True, **at_once)[1]


def test_a_turn_that_came_after_ends_what_an_earlier_one_said_of_thinking(tiny_folder: Path) -> None:
    """Also where the tokens between turns were added, and are not said to be special."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    tokenizer.add_tokens(["<think>", "</think>", "<|assistant|>"])
    begin, end, turn = (tokenizer.convert_tokens_to_ids(t) for t in ("<think>", "</think>", "<|assistant|>"))
    assert turn not in tokenizer.all_special_ids
    thinking = thinking_of(tokenizer)
    assert thinking is not None
    never = thinking.phase("thinking", [7])
    assert thinking.phase("thinking", [7, end, 7, turn]) == never
    assert thinking.phase("thinking", [7, begin, 7, turn]) == never
    assert thinking.phase("thinking", [turn, 7, begin, 7]).begun
    assert thinking.phase("after-thinking", [turn, begin, 7, end, 7]).begun
    assert not thinking.phase("after-thinking", [7, end, turn]).begun


def test_what_is_no_variable_of_a_template_is_no_default(tiny_folder: Path) -> None:
    for value in ("[1]", "x", '{"chat_template": "x"}'):
        with pytest.raises(RuntimeError, match=r"chat[-_]template[-_]kwargs"):
            Server(str(tiny_folder), "--chat-template-kwargs", value).__enter__()


def test_a_model_whose_template_serves_no_chat_is_told_at_start(
    tiny_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    for template, said in ((None, "no chat template"), ("{{ raise_exception('never') }}", "never"), ("x", "")):
        tokenizer.chat_template = template
        caplog.clear()
        warn_of_template(Loaded("tiny", None, None, tokenizer))
        assert (said in caplog.text and "no chat can be served" in caplog.text) if said else not caplog.text
