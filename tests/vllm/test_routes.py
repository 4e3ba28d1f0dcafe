"""The way from a route to the engine, through all layers of a server: the routes here ask the real front end, and there
is no engine behind it."""

from __future__ import annotations

import asyncio
import json
import sys
import time
import types
from argparse import Namespace
from collections.abc import AsyncIterator, Iterator
from contextlib import nullcontext
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from fastapi import APIRouter, FastAPI, Request, WebSocket
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

from steer import readout
from steer.errors import InvalidInput, NoRoom, SpecError, UnsupportedModel
from steer.registry import Registry
from steer.serve.authorise import Caller, Refusal, admit
from steer.serve.carriers import Carried
from steer.serve.errors import HTTPProblem
from steer.serve.policy import KeyRules
from steer.spec import parse as parse_spec
from steer.vllm import internals
from steer.vllm.frontend import TURN, Passage, in_turn, passage
from tests import models

MODEL = models.tiny("llama")
PREFIX = "/api"
#: Every way to ask for steering, or nearly: (body, headers, query).
ASKING: dict[str, tuple[dict[str, Any], dict[str, str], str]] = {
    "field": ({"steer": "refusal"}, {}, ""),
    "header": ({}, {"X-Steer": "refusal"}, ""),
    "alias": ({"model": "tiny+refusal"}, {}, ""),
    "xargs": ({"vllm_xargs": {"steer": "refusal"}}, {}, ""),
    "read-out": ({"steer_readout": "refusal"}, {}, ""),
}
NEARLY: dict[str, tuple[dict[str, Any], dict[str, str], str]] = {
    "another field": ({"Steering": "refusal"}, {}, ""),
    "another header": ({}, {"X-Steering": "refusal"}, ""),
    "inside": ({"extra_body": {"steer": "refusal"}}, {}, ""),
    "nested": ({"requests": [{"steer": "refusal"}]}, {}, ""),
    "query": ({}, {}, "?steer=refusal"),
    "a header's name in the body": ({"X-Steer": "refusal"}, {}, ""),
    "another spelling": ({"extraBody": {"_steer": "refusal"}}, {}, ""),
}


class Engine:
    """Stands for an AsyncLLM. What it was asked for is in `asked`: the spec that the workers would get, or None."""

    def __init__(self) -> None:
        from steer.vllm.frontend import Frontend
        from steer.vllm.settings import EngineSettings

        text = types.SimpleNamespace(num_hidden_layers=3, model_type="llama")
        config = types.SimpleNamespace(
            hf_config=types.SimpleNamespace(architectures=["LlamaForCausalLM"]),
            hf_text_config=text,
            get_hidden_size=lambda: models.D_MODEL,
            dtype="torch.float32",
            max_model_len=512,
            get_vocab_size=lambda: 256,
        )
        front = Frontend(
            types.SimpleNamespace(model_config=config),
            EngineSettings(rank=4),
            lambda *_: [],
            serves=True,
        )
        front.registry = Registry(models.placement())
        front.registry.put("refusal", models.direction(MODEL, seed=1).to_bytes())
        self.steer = front
        self.asked: list[str | None] = []

    def shutdown(self, timeout: float | None = None) -> None:
        pass

    def generate(self, extra_args: dict[str, Any] | None) -> str:
        from vllm import SamplingParams

        from steer.vllm.settings import receipt_of

        with self.steer.admitted(SamplingParams(extra_args=extra_args)) as params:
            self.asked.append(receipt_of(params))
        return "answer"


def app_of(engine: Engine) -> FastAPI:
    """Routes as vLLM's are, and some as they are not yet."""
    app = FastAPI(root_path=PREFIX)
    app.state.args = Namespace(
        api_key=None,
        host="127.0.0.1",
        middleware=[],
        additional_config={"steer": {}},
        allowed_origins=["*"],
        allowed_methods=["*"],
        allowed_headers=["*"],
        allow_credentials=False,
    )
    app.state.engine_client = engine
    app.state.openai_serving_models = types.SimpleNamespace(base_model_paths=[types.SimpleNamespace(name="tiny")])

    async def carrying(request: Request) -> Response:
        return JSONResponse({"choices": [{"text": engine.generate((await request.json()).get("vllm_xargs"))}]})

    async def dropping(request: Request) -> Response:
        await request.body()
        return JSONResponse({"choices": [{"text": engine.generate(None)}]})

    async def raw(request: Request) -> Response:
        return JSONResponse({"text": engine.generate({"steer": "refusal"})})

    async def streaming(request: Request) -> Response:
        """Begins its stream before it asks, and goes on when it is refused."""
        await request.body()

        async def events() -> AsyncIterator[str]:
            yield "event: start\n\n"
            try:
                yield f"data: {engine.generate(None)}\n\n"
            except SpecError:
                yield "data: error\n\n"
            yield "data: [DONE]\n\n"

        return StreamingResponse(events(), media_type="text/event-stream")

    async def breaking(request: Request) -> Response:
        try:
            engine.generate(None)
        except SpecError as error:
            raise RuntimeError("what vLLM does not expect") from error
        return JSONResponse({})

    async def listed() -> Any:
        return {"data": []}

    app.add_api_route("/v1/completions", carrying, methods=["POST"])
    app.add_api_route("/v1/chat/completions", dropping, methods=["POST"])
    app.add_api_route("/v1/messages", streaming, methods=["POST"])
    app.add_api_route("/v1/responses", breaking, methods=["POST"])
    app.add_api_route("/v1/models", listed)
    app.add_api_route("/health", listed)
    app.add_api_route("/invocations", dropping, methods=["POST"])
    app.add_api_route("/stream", streaming, methods=["POST"])
    app.add_api_route("/raw", raw, methods=["POST"])
    app.add_api_route("/get", dropping, methods=["GET"])
    inner = APIRouter()
    inner.add_api_route("/batch", dropping, methods=["PUT"])
    mounted = FastAPI()
    mounted.include_router(inner)
    app.mount("/mounted", mounted)

    @app.websocket("/v1/realtime")
    async def realtime(socket: WebSocket) -> None:
        await socket.accept()
        await socket.send_text(engine.generate(None))

    return app


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine()


@pytest.fixture(scope="module")
def client(engine: Engine) -> Iterator[TestClient]:
    from steer.vllm import server

    app = app_of(engine)
    app.add_middleware(server.Middleware)
    with TestClient(app, "http://127.0.0.1", raise_server_exceptions=False) as client:
        [route] = [route for route in app.routes if getattr(route, "path", "") == "/raw"]
        app.add_api_route("/later", route.endpoint, methods=["POST"])  # type: ignore[attr-defined]
        yield client


@pytest.fixture(autouse=True)
def asked(engine: Engine) -> list[str | None]:
    engine.asked.clear()
    return engine.asked


@pytest.mark.parametrize("prefix", ["", PREFIX])
@pytest.mark.parametrize("how", list(ASKING)[:4])
def test_a_prefix_is_no_way_past_the_carriers(
    client: TestClient, asked: list[str | None], prefix: str, how: str
) -> None:
    body, headers, _ = ASKING[how]
    plain = client.post(f"{prefix}/v1/completions", json={"model": "tiny"})
    steered = client.post(f"{prefix}/v1/completions", json={"model": "tiny"} | body, headers=headers)
    assert (plain.status_code, steered.status_code) == (200, 200)
    assert plain.headers["x-steer-applied"] == "[]"
    assert [None, steered.headers["x-steer-applied"]] == asked
    assert "refusal" in (asked[1] or "")


@pytest.mark.parametrize("path", ["/invocations", "/stream", "/api/invocations", "/api/stream", "/api/mounted/batch"])
def test_other_routes_generate_plain_answers_alone(client: TestClient, asked: list[str | None], path: str) -> None:
    method = "PUT" if path.endswith("/batch") else "POST"
    plain = client.request(method, path, json={"model": "tiny", "tools": [{"steer": 1}]})
    assert (plain.status_code, plain.headers["x-steer-applied"], asked) == (200, "[]", [None])
    asked.clear()
    for name, (body, headers, query) in {**ASKING, **NEARLY}.items():
        answer = client.request(method, path + query, json=body, headers=headers)
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "unsupported"), name
    form = client.request(method, path, data={"steer": "refusal"}, files={"file": b"x"})
    assert (form.status_code, form.json()["error"]["param"]) == (400, "steer")
    assert client.request(method, path, files={"file": b"x"}).status_code == 200
    kind = {"content-type": "application/x-www-form-urlencoded"}  # and yet what the route may read is JSON
    told = client.request(method, path, content=b'{"steer": "refusal"}', headers=kind)
    assert (told.status_code, told.json()["error"]["param"]) == (400, "steer")
    for unclear in (b"steer", b'{"a": 1, "a": {"steer": 1}}'):
        answer = client.request(method, path, content=unclear)
        assert answer.status_code == 400, answer.text
    assert asked == [None]  # of the form without steering


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/messages"])
@pytest.mark.parametrize("how", NEARLY)
def test_near_misses_are_told_of(client: TestClient, asked: list[str | None], path: str, how: str) -> None:
    body, headers, query = NEARLY[how]
    answer = client.post(path + query, json={"model": "tiny"} | body, headers=headers)
    assert (answer.status_code, asked) == (400, [])
    assert "'X-Steer'" in answer.json()["error"]["message"]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages", "/v1/responses"])
def test_what_does_not_carry_the_ticket_is_refused_before_it_is_asked_for(
    client: TestClient, asked: list[str | None], engine: Engine, path: str
) -> None:
    """Also where a stream has begun, and where the server makes a 500 of it."""
    assert client.post(path, json={"model": "tiny"}).status_code == 200
    assert asked == [None]
    answer = client.post(path, json={"model": "tiny", "steer": "refusal"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "unsupported"), answer.text
    assert "x-steer-applied" not in answer.headers
    assert asked == [None]
    assert [version.pins for version in engine.steer.registry.names().values()] == [0]


@pytest.mark.parametrize(
    "key",
    ["steering", "Steer", "x-steer", "steer_readout", "steer.resolved", "steer.read", "steer.scored", "steer.capture"],
)
def test_a_program_is_told_of_near_misses_too(engine: Engine, key: str) -> None:
    with pytest.raises(SpecError, match=f"'{key}' is not for requests to set; ask with 'steer'"):
        engine.generate({key: "refusal"})


@pytest.mark.parametrize(("path", "field"), [("/v1/completions", "use_beam_search"), ("/v1/responses", "background")])
def test_fields_that_part_a_request_from_its_ticket_are_named(
    client: TestClient, asked: list[str | None], path: str, field: str
) -> None:
    answer = client.post(path, json={"model": "tiny", "steer": "refusal", field: True})
    assert (answer.status_code, answer.json()["error"]["param"], asked) == (400, field, [])
    assert client.post(path, json={"model": "tiny", field: True}).status_code == 200


def test_routes_that_steer_by_themselves_and_those_without_a_layer_are_refused(
    client: TestClient, asked: list[str | None]
) -> None:
    assert "does not take steering" in client.post("/raw", json={}).text
    assert client.post("/later", json={}).status_code >= 400
    assert client.get("/get").status_code >= 400
    with pytest.raises(WebSocketDisconnect), client.websocket_connect("/v1/realtime") as socket:
        socket.receive_text()
    assert asked == []


def test_with_a_default_no_other_route_is_plain(
    client: TestClient, engine: Engine, asked: list[str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    from steer.spec import parse

    monkeypatch.setattr(engine.steer, "default", parse("refusal"))
    for path in ("/invocations", "/stream"):
        answer = client.post(path, json={})
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "unsupported"), answer.text
    assert asked == []
    answer = client.post("/v1/completions", json={"model": "tiny"})
    assert [answer.headers["x-steer-applied"]] == asked
    assert client.post("/v1/completions", json={"model": "tiny", "steer": "off"}).headers["x-steer-applied"] == "[]"


@pytest.mark.parametrize("path", ["/invocations", "/v1/completions"])
def test_what_would_be_tokenized_is_bounded_and_images_are_not(
    client: TestClient, asked: list[str | None], path: str
) -> None:
    long = "a " * 2**20
    schema = {"properties": {"url": {"description": long}, "content": {"data": long}}}
    bodies: list[dict[str, Any]] = [
        {"prompt": long + "a"},
        {"messages": [{"content": [{"type": "text", "text": long + "a"}]}]},
        {"tools": [{"type": "function", "function": {"name": "a", "parameters": schema}}]},
        {"messages": [{"content": [{"type": "tool_use", "name": "a", "input": {"url": long, "data": long}}]}]},
        {"chat_template_kwargs": {"image": long + "a"}},
    ]
    for body in bodies:
        told = client.post(path, json={"model": "tiny"} | body)
        assert (told.status_code, told.json()["error"]["code"], asked) == (413, "body_too_large", []), told.text
    image = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{long}"}}
    output = {"type": "tool_result", "content": [{"type": "image", "source": {"type": "base64", "data": long}}]}
    for content in (image, output):
        assert client.post(path, json={"model": "tiny", "messages": [{"content": [content]}]}).status_code == 200


@pytest.mark.parametrize("path", ["/invocations", "/v1/completions"])
@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"response_format": {"json_schema": "a" * 40_000}}, "response_format"),
        ({"messages": [[{"role": "user", "content": "a"}]] * 1025}, "messages"),
        ({"prompt": ["a"] * 1000, "vllm_xargs": {str(i): "x" for i in range(3000)}}, "vllm_xargs"),
    ],
)
def test_what_is_too_much_for_any_engine_is_too_much_on_every_route(
    client: TestClient, asked: list[str | None], path: str, body: dict[str, Any], param: str
) -> None:
    told = client.post(path, json={"model": "tiny"} | body)
    assert (told.status_code, told.json()["error"]["param"], asked) == (400, param, []), told.text


def test_requests_of_one_are_added_in_turn_and_others_run_in_between() -> None:
    order: list[str] = []

    async def adding(name: str) -> None:
        async with in_turn():
            time.sleep(2 * TURN)  # noqa: ASYNC251 - adding takes the loop
            order.append(name)

    async def other() -> None:
        while len(order) < 200:
            order.append("other")
            await asyncio.sleep(0)

    async def run() -> None:
        passage.set(Passage())
        await asyncio.gather(*(adding(f"added {n}") for n in range(20)), other())

    asyncio.run(run())
    added = [i for i, name in enumerate(order) if name != "other"]
    assert [order[i] for i in added] == [f"added {n}" for n in range(20)]
    assert all(after - before > 1 for before, after in pairwise(added))


def test_many_answers_to_a_long_prompt_are_bounded_together(client: TestClient, asked: list[str | None]) -> None:
    """The engine keeps and hashes the prompt for each of them, and gives the log-probabilities of it with each."""
    ids = {"model": "tiny", "prompt": [123] * 2**15}
    for more in ({"n": 1024}, {"n": 64, "prompt_logprobs": "20"}, {"n": 64, "logprobs": 20, "echo": True}):
        told = client.post("/v1/completions", json=ids | more)
        assert (told.status_code, told.json()["error"]["param"], asked) == (413, "n", []), told.text
    for more in ({"n": 256}, {"prompt_logprobs": 20}, {"n": 64, "logprobs": 20, "max_tokens": 90}):
        assert client.post("/v1/completions", json=ids | more).status_code == 200
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "a" * 2**20}}
    body = {"model": "tiny", "messages": [{"role": "user", "content": [image]}], "n": 128}
    assert client.post("/v1/completions", json=body).status_code == 200


def test_limits_count_where_vllm_reads_them() -> None:
    """On one route in `sampling_params` alone: a limit beside them would be charged and not kept."""
    from steer.serve.body import tokens_of
    from steer.vllm.server import NESTING_ROUTE, _fields

    for params, tokens in (({}, 1000), ({"max_tokens": 5}, 5)):
        fields = _fields({"token_ids": [], "max_tokens": 1, "sampling_params": params}, NESTING_ROUTE)
        assert tokens_of(fields, 0, 1000, NESTING_ROUTE) == tokens


@pytest.mark.parametrize(
    ("read", "repeats", "chunk", "steps"),
    [(True, False, 1, 99), (True, False, 10, 99), (True, False, 11, 0), (False, False, 1, 10), (True, True, 1, 10)],
    ids=["read", "long chunks", "too long chunks", "unread", "all again at the end"],
)
def test_what_streams_get_in_one_piece_is_bounded(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, read: bool, repeats: bool, chunk: int, steps: int
) -> None:
    """vLLM puts what is unread into one chunk, and makes that at once."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest
    from vllm.v1.engine.output_processor import OutputProcessor, RequestOutputCollector
    from vllm.v1.outputs import LogprobsLists

    monkeypatch.setattr("steer.vllm.frontend.MAX_LOGPROBS", 100)
    outputs = OutputProcessor(None, log_stats=False)
    internals.engine.wrap_requests(outputs, engine.steer)
    options: dict[str, Any] = {"logprob_token_ids": list(range(4)), "detokenize": False, "max_tokens": 99}
    options |= {"stream_interval": chunk}
    params = SamplingParams(output_kind=RequestOutputKind.DELTA, **options)
    given: dict[str, Any] = dict.fromkeys(("mm_features", "lora_request", "cache_salt", "data_parallel_rank"))
    token = passage.set(Passage(True, repeats=repeats))
    queue = RequestOutputCollector(RequestOutputKind.DELTA, "one")
    for name in ("1", "2"):
        request = EngineCoreRequest(
            request_id=name,
            external_req_id="one",
            prompt_token_ids=[1],
            sampling_params=params,
            pooling_params=None,
            arrival_time=0.0,
            **given,
        )
        outputs.add_request(request, None, queue=queue)
    passage.reset(token)

    def made(step: int) -> list[str]:
        logprobs = LogprobsLists(*(np.zeros((1, 5), kind) for kind in (np.int32, np.float32)), np.zeros(1, np.int32))
        found = outputs.process_outputs([EngineCoreOutput(each, [step], new_logprobs=logprobs) for each in ("1", "2")])
        return sorted(found.reqs_to_abort)

    ended: list[str] = []
    for step in range(min(steps, 30) + 2):  # the first may be counted before the second has begun
        assert not ended or step > steps
        if read and not ended:
            assert queue.get_nowait() is not None or step == 0 or chunk > 1
        ended += made(step)
    assert sorted(ended) == ([] if steps == 99 else ["1", "2"])
    with pytest.raises(Exception, match="at most 100 log-probabilities are made") if ended else nullcontext():
        queue.get_nowait()
    assert len(outputs.request_states) == (0 if ended else 2)


def test_beams_of_a_program_are_steered_at_all_tokens_or_refused(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They carry no spec, so they have the default: where this acts at the answer alone, the beams so far would be a
    prompt."""
    from vllm import SamplingParams

    monkeypatch.setattr(engine.steer, "serves", False)
    step = SamplingParams(max_tokens=1, logprobs=4, skip_clone=True)
    for default in ("off", "refusal", "refusal?each:refusal@0>0", "refusal@answer", "refusal?refusal@0>0"):
        monkeypatch.setattr(engine.steer, "default", parse_spec(default))
        acts_at_some = default in ("refusal@answer", "refusal?refusal@0>0")
        with nullcontext() if not acts_at_some else pytest.raises(SpecError, match="beam search"):
            with engine.steer.admitted(step):
                pass
        with engine.steer.admitted(SamplingParams(max_tokens=1)):
            pass


def test_a_form_needs_its_right_whoever_makes_it(engine: Engine) -> None:
    """A parser of vLLM's makes some of tools, which no field of a body tells."""
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    from steer.vllm.frontend import Passage, passage

    def ask(form: Any, **rules: Any) -> None:
        token = passage.set(Passage(True, KeyRules.model_construct(hash="", **rules).forms))
        try:
            with engine.steer.admitted(SamplingParams(structured_outputs=form)):
                pass
        finally:
            passage.reset(token)

    ask(None)
    ask(StructuredOutputsParams(json_object=True))
    forms: list[dict[str, Any]] = [{"json": {}}, {"regex": "a"}, {"grammar": "a"}, {"choice": ["a"]}]
    for form in [*forms, {"structural_tag": "{}"}]:
        with pytest.raises(Refusal, match="forms = true"):
            ask(StructuredOutputsParams(**form))
        ask(StructuredOutputsParams(**form), forms=True)
    with pytest.raises(Refusal):
        ask(StructuredOutputsParams(json_object=True, whitespace_pattern="((a*)*)*"))


def test_some_fields_need_the_managing_role() -> None:
    from steer.vllm.server import MANAGER_FIELDS, check_reserved

    ordinary, managing = (Caller("a", KeyRules.model_construct(hash="", manage=manages)) for manages in (False, True))
    for field in MANAGER_FIELDS:
        check_reserved({field: {"min_pixels": 1}}, managing)
        check_reserved({field: None}, ordinary)
        bodies: list[dict[str, object]] = [{field: {"min_pixels": 1}}, {"vllm_xargs": {field: "x"}}]
        for body in bodies:
            with pytest.raises(HTTPProblem, match="needs a key with the managing role") as caught:
                check_reserved(body, ordinary)
            assert caught.value.param == field
    check_reserved({}, ordinary)


def test_another_priority_needs_the_managing_role_whatever_gives_it(engine: Engine) -> None:
    """A header of vLLM's does too."""
    from vllm import SamplingParams

    from steer.vllm.frontend import Passage, passage

    for priority, manages in ((0, False), (-1, True), (-1, False), (1, False)):
        request: Any = types.SimpleNamespace(
            sampling_params=SamplingParams(), prompt_token_ids=[1], priority=priority, cache_salt=None
        )
        way = Passage(True, manages=manages)
        token = passage.set(way)
        try:
            with engine.steer.admitted(request.sampling_params):
                engine.steer.check_added(request)
            assert manages or not priority
        except SpecError as error:
            assert (error.param, manages) == ("priority", False)
            assert "needs a key with the managing role" in str(way.refused)
            assert priority
        finally:
            passage.reset(token)


def test_no_request_brings_what_no_model_computes_with(engine: Engine) -> None:
    """It would be in blocks of the cache that others get later."""
    import torch

    check = engine.steer.check_added

    def asking(embeds: torch.Tensor | None = None, **fields: Any) -> Any:
        data = {name: types.SimpleNamespace(data=value) for name, value in fields.items()}
        features = [types.SimpleNamespace(data=data or None)]
        return types.SimpleNamespace(
            prompt_embeds=embeds,
            mm_features=features,
            cache_salt=None,
            sampling_params=None,
            prompt_token_ids=[1],
            priority=0,
        )

    fine, image = torch.full((5, 8), 100.0, dtype=torch.bfloat16), torch.rand(3, 4, 4)
    check(asking())
    check(asking(fine, pixel_values=image, sizes=[torch.tensor([1e6])], grid=torch.tensor([1, 2])))
    for wrong in (float("nan"), float("inf"), 1e5):
        spoilt = fine.clone()
        spoilt[3, 2] = wrong
        with pytest.raises(InvalidInput, match="prompt_embeds: holds NaN, infinity or too large"):
            check(asking(spoilt))
        with pytest.raises(InvalidInput, match="image_embeds"):
            check(asking(fine, image_embeds=[fine, spoilt]))
    image[0, 0, 0] = float("nan")
    with pytest.raises(InvalidInput, match="pixel_values"):
        check(asking(pixel_values=image))


def test_no_request_harms_those_beside_it(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm import SamplingParams

    refused = {"logprob_token_ids": [1], "top_k": 4, "prompt_logprobs": 0}
    for unsafe in ({}, dict.fromkeys(refused, "it harms others")):
        monkeypatch.setattr(engine.steer, "unsafe", unsafe)
        for name, value in [("top_k", -1), ("top_k", 0), ("logprob_token_ids", None), *refused.items()]:
            params = SamplingParams(**{name: value})
            request: Any = types.SimpleNamespace(
                sampling_params=params, prompt_token_ids=[1], priority=0, cache_salt=None, request_id="1"
            )
            told = pytest.raises(InvalidInput, match=f"'{name}' is not served here: it harms others")
            with told if unsafe and refused[name] == value else nullcontext():
                engine.steer.check_added(request)


def test_a_prompt_of_embeddings_is_counted(engine: Engine) -> None:
    """By which a key's tokens in a minute are, and the audit log."""
    import torch
    from vllm import SamplingParams

    from steer.serve.metrics import counting_usage
    from steer.vllm.frontend import Passage, passage

    token = passage.set(Passage(True))
    for ids, embeds in ((None, torch.zeros(5, 8)), ([1, 2, 3, 4, 5], torch.zeros(5, 8)), ([1, 2, 3, 4, 5], None)):
        request: Any = types.SimpleNamespace(
            sampling_params=SamplingParams(), prompt_token_ids=ids, prompt_embeds=embeds, priority=0, cache_salt=None
        )
        with counting_usage() as usage, engine.steer.admitted(request.sampling_params):
            engine.steer.check_added(request)
            engine.steer.check_added(request)  # a second answer finds it in the cache
            assert (usage.prompt, usage.again) == (5, 0)
            request.sampling_params = SamplingParams(prompt_logprobs=1)  # for which no cache is read
            engine.steer.check_added(request)
        assert (usage.prompt, usage.again) == (5, 5)
    passage.reset(token)


def test_a_request_that_is_refused_for_its_prompt_is_not_counted(engine: Engine) -> None:
    import torch
    from vllm import SamplingParams

    from steer.serve.metrics import counting_usage

    front = engine.steer
    admission = admit(Carried({"field": parse_spec("refusal@answer")}, None), front.registry)
    ticket = front.ticket(admission)
    given = SamplingParams(extra_args={"steer": ticket.name})
    with counting_usage() as usage, front.admitted(given) as params:
        request: Any = types.SimpleNamespace(
            request_id="one",
            sampling_params=params,
            prompt_token_ids=None,
            prompt_embeds=torch.zeros(5, 8),
            priority=0,
            cache_salt=None,
        )
        with pytest.raises(SpecError, match="given as embeddings"):
            front.check_added(request)
    assert (usage.prompt, usage.again, front.forget(ticket)) == (0, 0, [])
    admission.release()


def test_what_comes_after_the_end_of_its_request_is_made_no_more(engine: Engine) -> None:
    """And what is read is counted until the engine has let it go, which is later than its answer was ended."""
    from vllm import SamplingParams

    from steer.vllm.frontend import READING, Passage, passage

    def request(name: str, params: Any) -> Any:
        return types.SimpleNamespace(
            request_id=name,
            sampling_params=params,
            prompt_token_ids=[1, 2, 3],
            mm_features=None,
            cache_salt=None,
            priority=0,
        )

    front = engine.steer
    front.settings = front.settings.model_copy(update={"readout": 1})
    admission = admit(
        Carried({"field": parse_spec("refusal")}, None), front.registry, (), readout.parse("refusal"), readable=3
    )
    ticket = front.ticket(admission)
    given = SamplingParams(extra_args={"steer": ticket.name})
    with front.admitted(given) as params:
        front.check_added(request("one", params))
        assert front.forget(ticket) == ["one"]
        with pytest.raises(asyncio.CancelledError):
            front.check_added(request("two", params))
    assert (front.shared.total(READING), list(front.held)) == (1, ["one"])
    with pytest.raises(NoRoom, match="1 requests are being read"):
        front.ticket(admission)
    front.let_go("one")
    assert front.shared.total(READING) == 0
    way = Passage()
    way.over = True
    token = passage.set(way)
    with pytest.raises(asyncio.CancelledError), front.admitted(given):
        pass
    passage.reset(token)
    admission.release()
    assert not any(loaded.pins for loaded in front.registry.names().values())


def test_servers_without_a_layer_of_ours_do_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    internals.engine.check_entry("OPENAI_API_SERVER")
    with pytest.raises(UnsupportedModel, match="batch runner"):
        internals.engine.check_entry("OPENAI_BATCH_RUNNER")
    name = "vllm.entrypoints.launchers.grpc_server"
    monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    with pytest.raises(UnsupportedModel, match="gRPC"):
        internals.engine.check_entry("OPENAI_API_SERVER")


def test_the_app_is_checked_wherever_it_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    """As when vLLM's server is run with `python -m`: its functions are in `__main__` then."""
    from steer.vllm import server

    main = sys.modules["__main__"]
    monkeypatch.setattr(main, "build_app", lambda: FastAPI(), raising=False)
    internals.server.on_app_built(server.check_app)
    with pytest.raises(UnsupportedModel, match="would ignore the field 'steer'"):
        main.build_app()


@pytest.mark.parametrize("how", ["before", "error", "in a stream", "breaks off"])
def test_from_a_loss_on_an_answer_is_the_error(how: str) -> None:
    """Whatever the route makes of it: an error of its own kind, or a stream that breaks off."""
    from steer.vllm import server

    engine = Engine()
    app = app_of(engine)

    async def losing(request: Request) -> Response:
        [ticket] = engine.steer._tickets.values()
        engine.generate((await request.json()).get("vllm_xargs"))

        async def events() -> AsyncIterator[str]:
            yield "data: {}\n\n"
            ticket.lost = True
            if how == "breaks off":
                raise RuntimeError("what no route catches")
            yield "data: what is left\n\n"

        if how in ("before", "error"):
            ticket.lost = True
            if how == "error":
                raise RuntimeError("what no route catches")
            return JSONResponse({"error": "in another way"}, 400)
        return StreamingResponse(events(), media_type="text/event-stream")

    app.router.routes = [r for r in app.router.routes if getattr(r, "path", None) != "/v1/completions"]
    app.add_api_route("/v1/completions", losing, methods=["POST"])
    app.add_middleware(server.Middleware)
    with TestClient(app, "http://127.0.0.1", raise_server_exceptions=False) as client:
        answer = client.post("/api/v1/completions", json={"model": "tiny", "steer": "refusal"})
    told = answer.text if answer.status_code == 400 else answer.text.split("data: ")[-2]
    assert json.loads(told)["error"]["code"] == "not_finite"
    assert "what is left" not in answer.text
    assert answer.status_code == (200 if how in ("in a stream", "breaks off") else 400)
    assert engine.steer.registry.get("refusal").pins == 0
