"""The generated documents are those that the code gives today."""

from __future__ import annotations

from typing import Any

import pytest

from docs import api
from steer.serve.protocol import ChatRequest, CompletionRequest
from steer.serve.readout import ReadLine, ReadReport


@pytest.fixture(scope="module")
def rendered() -> str:
    return api.render()


def test_the_api_reference_is_fresh(rendered: str) -> None:
    assert rendered == api.TARGET.read_text(), "run `make docs`"


def test_every_field_is_described_and_stands_in_the_reference(rendered: str) -> None:
    for model in (ChatRequest, CompletionRequest, ReadReport, ReadLine):
        for name, field in model.model_fields.items():
            assert field.description, f"{model.__name__}.{name}"
            assert f"| `{name}` |" in rendered


def test_the_openapi_document_names_the_carried_fields() -> None:
    for model in (ChatRequest, CompletionRequest):
        properties: dict[str, Any] = model.model_json_schema()["properties"]
        assert {"steer", "steer_readout", "vllm_xargs"} <= set(properties)
