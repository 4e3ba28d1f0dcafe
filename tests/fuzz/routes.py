"""The HTTP routes of a real server, by its own OpenAPI document and by raw bodies: no answer is a 5xx."""

from __future__ import annotations

import tempfile
from pathlib import Path
from random import Random
from typing import Any

import httpx
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from tqdm import tqdm

from tests import models
from tests.fuzz import mutate, specs
from tests.fuzz.surface import Outcome
from tests.servers import Server


def run(requests: int) -> Outcome:
    """Half of them by the document, half near-right bodies of the generation routes and files put as directions."""
    outcome = Outcome()
    with tempfile.TemporaryDirectory(prefix="steer-fuzz-") as name:
        folder = Path(name)
        model = models.save("llama", folder / "tiny")
        (folder / "directions").mkdir()
        for seed, direction in enumerate(("refusal", "verbosity"), 1):
            models.direction(model, seed=seed).save(folder / "directions" / f"{direction}.safetensors")
        with Server(str(folder / "tiny"), "--directions", str(folder / "directions"), "--context", "64") as server:
            with tqdm(total=requests, desc="routes", mininterval=5) as bar:
                by_document(server, requests // 2, outcome, bar)
                by_body(server, requests - bar.n, outcome, bar)
            if server.process.poll() is not None:
                outcome.findings["the process ended"] = server.log[-3000:]
            elif "Traceback" in server.log:
                outcome.findings["a traceback in the log"] = server.log[server.log.index("Traceback") :][:3000]
    return outcome


def seen(answer: Any, what: str, outcome: Outcome, bar: Any) -> None:
    outcome.counts[str(answer.status_code)] += 1
    if answer.status_code >= 500:
        outcome.findings.setdefault(f"{answer.status_code} {answer.text[:80]}", what)
    bar.update()


def by_document(server: Server, requests: int, outcome: Outcome, bar: Any) -> None:
    document = server.client.get("/openapi.json").json()
    schema = schemathesis.openapi.from_dict(document).exclude(path="/v1/steering", method="POST")
    operations = list(schema.get_all_operations())
    for result in operations:

        @settings(
            max_examples=requests // len(operations),
            deadline=None,
            suppress_health_check=list(HealthCheck),
            database=None,
            phases=[Phase.generate],
        )
        @given(case=result.ok().as_strategy())
        def check(case: Any) -> None:
            answer = case.call(base_url=server.url)
            seen(answer, f"{case.method} {case.path} {case.body!r:.500}", outcome, bar)

        check()


def by_body(server: Server, requests: int, outcome: Outcome, bar: Any) -> None:
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
        try:
            answer = server.client.post(path, content=data, headers=plain)
        except httpx.TransportError as error:
            outcome.findings.setdefault(type(error).__name__, f"{path} {data[:300]!r}: {error}")
            continue
        seen(answer, f"{path} {data[:500]!r} {plain}", outcome, bar)
