"""The HTTP routes of real servers, each for its whole life: inputs by its own OpenAPI document, near-right bodies of
the routes that generate and that manage, and every field of every request type. No answer is a 5xx, and what must be
right about a server still is (`Life`)."""

from __future__ import annotations

import importlib.util
import os
import re
import sys
import tempfile
from pathlib import Path
from random import Random
from typing import Any
from urllib.parse import quote

import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from tqdm import tqdm

from steer.serve import audit
from tests import models
from tests.fuzz import directions, mutate, specs
from tests.fuzz.fields import JSON
from tests.fuzz.life import Life, by_field
from tests.fuzz.surface import Outcome
from tests.serve.rules import POLICY, SECRETS
from tests.servers import Server

#: Of all requests: by the document, to routes that generate, to routes that manage; the rest are fields.
SHARES = (0.4, 0.25, 0.1)


def run(requests: int) -> Outcome:
    """On one server of the transformers backend, with a policy and an audit log."""
    outcome = Outcome()
    with tempfile.TemporaryDirectory(prefix="steer-fuzz-") as name:
        folder = Path(name)
        model = models.save("llama", folder / "tiny")
        (folder / "directions").mkdir()
        for seed, direction in enumerate(("refusal", "verbosity"), 1):
            models.direction(model, seed=seed).save(folder / "directions" / f"{direction}.safetensors")
        policy, log = folder / "policy.toml", folder / "audit.jsonl"
        policy.write_text(POLICY)
        options = [str(folder / "tiny"), "--directions", str(folder / "directions"), "--context", "64"]
        options += ["--policy", str(policy), "--audit", str(log), "--audit-fsync", "never"]
        with Server(*options, directions=folder / "directions") as server, _bar(requests, "routes") as bar:
            server.client.headers["Authorization"] = f"Bearer {SECRETS['all']}"
            life = Life(server, _versions(model), outcome, policy, bar.update)
            document, generating, managing = (int(share * requests) for share in SHARES)
            by_document(life, document)
            by_body(life, generating)
            by_control(life, managing)
            by_field(life, requests - life.inputs)
            ended(life)
        head = audit.Head.parse((folder / "audit.jsonl.head").read_text())
        if problems := audit.verify([log], [head]).problems:
            outcome.findings["the audit log is not whole"] = str(problems)[:3000]
    return outcome


def run_vllm(requests: int) -> Outcome:
    """Fields alone, on vLLM's own server."""
    from tests.vllm import device, tiny

    os.environ.update(device.ENVIRONMENT)
    outcome = Outcome()
    with tempfile.TemporaryDirectory(prefix="steer-fuzz-") as name:
        folder = Path(name)
        model = tiny.make("llama", folder / "tiny")
        (folder / "directions").mkdir()
        command = [sys.executable, "-m", "tests.vllm.run_server", str(folder / "tiny"), str(folder / "directions")]
        options = ["--host", "127.0.0.1", "--dtype", "float32", "--max-model-len", "256", "--served-model-name", "tiny"]
        options += device.ARGUMENTS
        with (
            Server(*options, command=command, directions=folder / "directions") as server,
            _bar(requests, "vllm") as bar,
        ):
            life = Life(server, _versions(model), outcome, step=bar.update)
            by_field(life, requests)
            ended(life, r'File ".*/steer/')  # vLLM itself logs the exceptions of some refused requests
    return outcome


def has_vllm() -> bool:
    return importlib.util.find_spec("vllm") is not None


def _versions(model: Any) -> list[bytes]:
    return [models.direction(model, seed=seed).to_bytes() for seed in (1, 2, 3)]


def _bar(requests: int, name: str) -> Any:
    return tqdm(total=requests, desc=name, mininterval=5)


def ended(life: Life, ours: str = "Traceback") -> None:
    """`ours`: a pattern of what does not belong into the log."""
    life.look()
    if life.server.process.poll() is not None:
        life.found("the process ended", life.server.log[-3000:])
    elif found := re.search(ours, life.server.log):
        life.found("a traceback in the log", life.server.log[max(0, found.start() - 1000) :])


def by_document(life: Life, requests: int) -> None:
    document = life.server.client.get("/openapi.json").json()
    schema = schemathesis.openapi.from_dict(document)
    operations = list(schema.get_all_operations())
    key = {name: life.server.client.headers[name] for name in ("Authorization",) if name in life.server.client.headers}
    for result in operations if requests else ():

        @settings(
            max_examples=requests // len(operations),
            deadline=None,
            suppress_health_check=list(HealthCheck),
            database=None,
            phases=[Phase.generate],
        )
        @given(case=result.ok().as_strategy())  # type: ignore[union-attr]
        def check(case: Any) -> None:
            answer = case.call(base_url=life.server.url, headers=key)
            life.seen(answer, f"{case.method} {case.path} {case.body!r:.500}")

        check()


def by_body(life: Life, requests: int) -> None:
    for number in range(requests):
        rng = Random(f"routes {number}")
        data, headers = specs.make_carriers(rng)
        path = rng.choice(("/v1/completions", "/v1/chat/completions"))
        if rng.random() < 0.5:
            data = data.replace(b'"prompt"', b'"max_tokens": 1, "prompt"', 1)
        if path == "/v1/chat/completions":
            data = data.replace(b'"prompt": "x"', b'"messages": [{"role": "user", "content": "x"}]', 1)
        if rng.random() < 0.1:
            data = mutate.octets(rng, data)
        plain = [(b"content-type", b"application/json")]
        plain += [(k, v) for k, v in headers if not {0, 10, 13} & set(v) and v == v.strip()]
        life.ask(f"{path} {data[:500]!r} {plain}", "POST", path, content=data, headers=plain)


def by_control(life: Life, requests: int) -> None:
    """Files put and deleted under names of all kinds, and the switch."""
    for number in range(requests):
        rng = Random(f"control {number}")
        kind = rng.random()
        name = quote(
            rng.choice(("refusal", "verbosity", "other", mutate.characters(rng, "other"))), safe="", errors="replace"
        )
        if kind < 0.5:
            data = directions.make(rng)
            headers = {"content-type": "application/octet-stream"}
            life.ask(f"PUT {name} control {number}", "PUT", f"/v1/directions/{name}", content=data, headers=headers)
        elif kind < 0.7:
            life.ask(f"{name} control {number}", rng.choice(("GET", "DELETE")), f"/v1/directions/{name}")
        else:
            tree = mutate.within(rng, {"enabled": rng.random() < 0.5, "reason": mutate.text(rng)})
            data = mutate.dumped(rng, tree).encode("utf-8", "surrogatepass")
            life.ask(f"/v1/steering {data[:300]!r}", "POST", "/v1/steering", content=data, headers=JSON)
